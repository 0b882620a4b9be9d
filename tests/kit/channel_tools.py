"""What a channel is given, without a program behind it."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Callable, Iterator, Optional

from project import load_script
from waiting import eventually

Json = Any
channels = load_script("ocp_channels")


class FakeTools:
    """Keeps what a channel hands over."""

    def __init__(self, **settings: Json) -> None:
        self.settings = {"requireMention": True, **settings}
        self.stop = threading.Event()
        #: Each message, and each state, in order.
        self.messages: list[Any] = []
        self.states: list[Json] = []
        #: What the next call of `accept` raises.
        self.failure: Optional[Exception] = None
        self.word = ""
        self.frames = 0
        self.events: list[str] = []
        #: What ended each call of `run`.
        self.ends: list[Exception] = []
        self._wake: Callable[[], None] = lambda: None

    def accept(self, message: Any, state: Optional[Json] = None) -> None:
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        if message is not None:
            self.messages.append(message)
        if state is not None:
            self.states.append(state)

    def state(self) -> Json:
        return self.states[-1] if self.states else {}

    def on_stop(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        if self.stop.is_set():
            wake()

    def end(self) -> None:
        """Let the account end."""
        self.stop.set()
        self._wake()

    def note_frame(self) -> None:
        self.frames += 1

    def note(self, word: str) -> None:
        self.word = word

    def log(self, level: str, event: str, **fields: object) -> None:
        self.events.append(event)

    def texts(self) -> list[str]:
        """What the messages say."""
        return [message.text for message in self.messages]


@contextlib.contextmanager
def receiving(channel: Any, tools: FakeTools) -> Iterator[None]:
    """Let a channel receive as a program would, but for the pauses between connections."""
    def run() -> None:
        while not tools.stop.is_set():
            try:
                channel.run()
            except channels.Fatal as fatal:
                tools.ends.append(fatal)
                return
            except Exception as problem:
                tools.ends.append(problem)
                # A platform that is gone must not be asked without end.
                tools.stop.wait(0.02)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        eventually(lambda: tools.frames or tools.ends)
        yield
    finally:
        tools.end()
        thread.join()
