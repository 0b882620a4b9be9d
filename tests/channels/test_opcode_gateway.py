"""The gateway that Discord and QQ share: heartbeats, sessions, and the ends of connections. Frames
come from a script, at times of a clock that nobody waits for."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any, Optional, Union

import pytest

from channel_tools import FakeTools, channels
from clock import FakeClock
from depth import by_depth

Json = Any
HELLO = {"op": 10, "d": {"heartbeat_interval": 40_000}}
READY = {"op": 0, "s": 1, "t": "READY", "d": {"session_id": "one", "user": {"id": "4242"},
                                             "resume_gateway_url": "wss://resume.example"}}
ACK = {"op": 11}


class Script:
    """A connection on which frames come, each so many seconds after the one before it."""

    def __init__(self, clock: FakeClock, *frames: tuple[float, Union[Json, str, Exception]]
                 ) -> None:
        self._clock = clock
        #: When each frame comes, counted from the first call.
        times = itertools.accumulate(after_s for after_s, _ in frames)
        self._frames = [(at_s, frame) for at_s, (_, frame) in zip(times, frames)]
        self._began_s: Optional[float] = None
        #: What was sent, and when.
        self.sent: list[tuple[float, Json]] = []
        #: What is answered to a heartbeat at once.
        self.answer: Optional[Json] = ACK
        self.code = 0

    def receive(self, timeout_s: float) -> Optional[str]:
        if self._began_s is None:
            self._began_s = self._clock.now_s
        due_s = self._began_s + self._frames[0][0] if self._frames else math.inf
        if due_s <= self._clock.now_s + timeout_s:
            frame = self._frames.pop(0)[1]
            self._clock.now_s = max(self._clock.now_s, due_s)
            if isinstance(frame, Exception):
                raise frame
            return frame if isinstance(frame, str) else json.dumps(frame)
        self._clock.advance(max(timeout_s, 0.0))
        return None

    def send(self, text: str) -> None:
        frame = json.loads(text)
        self.sent.append((self._clock.now_s, frame))
        if frame["op"] == 1 and self.answer is not None:
            self._frames.insert(0, (0.0, self.answer))

    def close(self, code: int) -> None:
        self.code = self.code or code

    def ops(self) -> list[int]:
        """The opcodes that were sent."""
        return [frame["op"] for _, frame in self.sent]


class Made(channels.OpcodeChannel):  # type: ignore[name-defined,misc]
    """A platform whose events carry texts."""

    endings = {4004: channels.Ending("wrong token", "take another one"),
               4009: channels._NEW_SESSION, 4008: channels._TOO_FAST}

    def __init__(self, tools: FakeTools, clock: FakeClock) -> None:
        super().__init__(tools, None, "https://api.example", clock)

    def gateway_url(self) -> str:
        return "wss://gateway.example"

    def token(self) -> str:
        return "the token"

    def identity(self) -> Json:
        return {"intents": 7}

    def message(self, event: str, data: Json) -> Any:
        return data["say"] if event == "MESSAGE" else None


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def tools() -> FakeTools:
    return FakeTools()


@pytest.fixture
def channel(tools: FakeTools, clock: FakeClock) -> Made:
    return Made(tools, clock)


class Upstream:
    """What connections are made of, one after the other, and where they were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *scripts: Any) -> None:
        self.urls: list[str] = []
        left = list(scripts)

        def connect(connector: Any, url: str) -> Any:
            self.urls.append(url)
            script = left.pop(0)
            if isinstance(script, Exception):
                raise script
            return script

        monkeypatch.setattr(channels.WebSocket, "connect", connect)


def run(channel: Made, monkeypatch: pytest.MonkeyPatch, *scripts: Any) -> tuple[Any, list[str]]:
    """What ends the last of these connections, and where they were made."""
    channel.http = type("Http", (), {"connector": None})
    upstream = Upstream(monkeypatch, *scripts)
    ended: Any = None
    for _ in scripts:
        try:
            channel.run()
        except Exception as problem:
            ended = problem
    return ended, upstream.urls


def event(seq: int, text: str = "", name: str = "MESSAGE") -> Json:
    return {"op": 0, "s": seq, "t": name, "d": {"say": text}}


GONE = channels.WebSocketClosed(1006)


def test_a_session_begins_with_what_identifies_the_bot(
    channel: Made, tools: FakeTools, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(clock, (0, HELLO), (0.1, READY), (0.1, GONE))
    run(channel, monkeypatch, script)
    assert script.sent[0][1] == {"op": 2, "d": {"token": "the token", "intents": 7}}
    assert tools.state() == {"session_id": "one", "seq": 1, "url": "wss://resume.example",
                             "bot_id": "4242"}


def test_a_session_is_resumed_where_the_platform_says(
    channel: Made, tools: FakeTools, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Script(clock, (0, HELLO), (0, event(3, "c")), (0, event(4, "", "RESUMED")), (1, GONE))
    _, urls = run(
        channel, monkeypatch,
        Script(clock, (0, HELLO), (0, READY), (1, event(2, "b")), (0, GONE)), second)
    assert urls == ["wss://gateway.example", "wss://resume.example"]
    assert second.sent[0][1] == {
        "op": 6, "d": {"token": "the token", "session_id": "one", "seq": 2}}
    assert tools.messages == ["b", "c"] and tools.state()["seq"] == 4


def test_an_address_that_is_gone_is_not_asked_again(
    channel: Made, tools: FakeTools, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = Script(clock, (0, HELLO), (0, GONE))
    _, urls = run(channel, monkeypatch, Script(clock, (0, HELLO), (0, READY), (0, GONE)),
                  channels.NetworkFailed("refused"), third)
    assert urls[2] == "wss://gateway.example"
    assert third.ops() == [6]


def test_heartbeats_go_out_in_time_with_the_last_number(
    channel: Made, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    began_s = clock.now_s
    script = Script(clock, (0, HELLO), (0, READY), (60, event(2, "x")), (100, GONE))
    run(channel, monkeypatch, script)
    beats = [(at_s - began_s, frame["d"]) for at_s, frame in script.sent if frame["op"] == 1]
    assert beats[0][0] < 40
    times = [at_s for at_s, _ in beats]
    assert [round(later - sooner) for sooner, later in zip(times, times[1:])] == (
        [40] * (len(beats) - 1)) and len(beats) >= 3
    assert all(seq == (2 if at_s > 60 else 1) for at_s, seq in beats)


def test_a_heartbeat_without_an_answer_ends_the_connection_and_not_the_session(
    channel: Made, tools: FakeTools, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(clock, (0, HELLO), (0, READY))
    script.answer = None
    ended, _ = run(channel, monkeypatch, script)
    assert isinstance(ended, channels.Retry) and "heartbeat" in str(ended)
    assert script.code == 4000 and script.ops().count(1) == 1
    assert tools.state()["session_id"] == "one"


def test_a_heartbeat_that_the_platform_asks_for_goes_out_at_once(
    channel: Made, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels.secrets, "randbelow", lambda below: below - 1)
    script = Script(clock, (0, HELLO), (0, READY), (1, {"op": 1}), (0, GONE))
    run(channel, monkeypatch, script)
    assert script.ops() == [2, 1]


@pytest.mark.parametrize(("frames", "after_s"), [([], 15), ([(1, HELLO)], 31)])
def test_a_gateway_that_says_nothing_is_left(
    channel: Made, tools: FakeTools, clock: FakeClock, monkeypatch: pytest.MonkeyPatch,
    frames: Any, after_s: float
) -> None:
    began_s = clock.now_s
    ended, _ = run(channel, monkeypatch, Script(clock, *frames))
    assert isinstance(ended, channels.Retry) and clock.now_s - began_s == after_s
    assert tools.frames == 0


@pytest.mark.parametrize(("end", "kind", "after_s", "is_kept"), [
    (channels.WebSocketClosed(1000), channels.Retry, 0.0, True),
    (channels.WebSocketClosed(1001), channels.Retry, 0.0, True),
    (channels.WebSocketClosed(4000), channels.Retry, 0.0, True),
    (channels.WebSocketClosed(4008), channels.Retry, 60.0, True),
    (channels.WebSocketClosed(4009), channels.Retry, 3.0, False),
    (channels.WebSocketClosed(4004), channels.Fatal, None, True),
    ({"op": 7, "d": None}, channels.Retry, 0.0, True),
    ({"op": 9, "d": True}, channels.Retry, 3.0, True),
    ({"op": 9, "d": False}, channels.Retry, 3.0, False),
])
def test_what_follows_the_end_of_a_connection(
    channel: Made, tools: FakeTools, clock: FakeClock, monkeypatch: pytest.MonkeyPatch,
    end: Any, kind: Any, after_s: Optional[float], is_kept: bool
) -> None:
    ended, _ = run(channel, monkeypatch, Script(clock, (0, HELLO), (0, READY), (90, end)))
    assert type(ended) is kind
    assert getattr(ended, "after_s", None) == after_s
    assert ("session_id" in tools.state()) == is_kept
    assert getattr(ended, "fix", "") == ("take another one" if kind is channels.Fatal else "")


def test_connections_that_are_cut_at_once_are_made_more_slowly(
    channel: Made, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = [Script(clock, (0, HELLO), (1, channels.WebSocketClosed(4009))) for _ in range(3)]
    assert run(channel, monkeypatch, *cut)[0].after_s == 60.0
    held = Script(clock, (0, HELLO), (9, channels.WebSocketClosed(4009)))
    assert run(channel, monkeypatch, held)[0].after_s == 3.0


def test_a_session_whose_connections_are_all_cut_at_once_is_given_up(
    channel: Made, tools: FakeTools, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No heartbeat comes before the cut.
    monkeypatch.setattr(channels.secrets, "randbelow", lambda below: below - 1)
    run(channel, monkeypatch, Script(clock, (0, HELLO), (0, READY), (9, GONE)))
    for count in range(1, 5):
        assert tools.state()
        cut = Script(clock, (0, HELLO), (1, GONE))
        assert run(channel, monkeypatch, cut)[0].after_s == (60.0 if count >= 3 else 0.0)
        assert cut.ops() == [6]
    assert not tools.state()


def test_a_message_that_is_not_safe_comes_again(
    channel: Made, tools: FakeTools, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Script(clock, (0, HELLO), (0, READY), (1, event(2, "a")), (1, GONE))

    def fail_at_first_message(message: Any, state: Any = None) -> None:
        if message == "a" and not tools.messages:
            raise OSError("disk full")
        accept(message, state)

    accept = tools.accept
    monkeypatch.setattr(tools, "accept", fail_at_first_message)
    ended, _ = run(channel, monkeypatch, first)
    assert isinstance(ended, OSError) and tools.state()["seq"] == 1


def test_numbers_of_events_without_a_message_are_kept_with_the_next_heartbeat(
    channel: Made, tools: FakeTools, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels.secrets, "randbelow", lambda below: 0)
    numbers = [event(seq, "", "TYPING_START") for seq in range(2, 50)]
    script = Script(clock, (0, HELLO), (0, READY), *((0.1, each) for each in numbers),
                    (60, channels.WebSocketClosed(4009)))
    run(channel, monkeypatch, script)
    # READY, the heartbeat in the middle, and the end.
    assert [state.get("seq") for state in tools.states] == [1, 49, None]


def test_the_end_of_the_account_leaves_the_session_open(
    channel: Made, tools: FakeTools, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(clock, (0, HELLO), (0, READY), (5, GONE))
    tools.stop.set()
    ended, _ = run(channel, monkeypatch, script)
    assert ended is None and script.code == 4000
    assert tools.state()["session_id"] == "one"


JUNK = ["", "no json", "[]", "7", "null", '"x"', "{}", '{"op":[]}', '{"op":99}', "[" * 20_000,
        '{"op":0,"s":"x","t":7,"d":[1]}', '{"op":0,"t":"MESSAGE","d":null}',
        '{"op":11,"d":{}}', '{"op":null}', '{"op":0,"s":null,"t":"MESSAGE","d":{}}']


def test_no_frame_of_any_form_stops_the_next_one(
    channel: Made, tools: FakeTools, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(5)
    junk = [(0.001, chance.choice(JUNK)) for _ in range(by_depth(200, 500, 1000))]
    script = Script(clock, (0, HELLO), (0, READY), *junk, (0, event(2, "still there")), (0, GONE))
    run(channel, monkeypatch, script)
    assert tools.messages == ["still there"]


@pytest.mark.parametrize("hello", [{"op": 10}, {"op": 10, "d": {}}, {"op": 10, "d": 5},
                                   {"op": 10, "d": {"heartbeat_interval": "often"}}])
def test_a_greeting_of_another_form_is_a_reason_to_try_again(
    channel: Made, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, hello: Json
) -> None:
    ended, _ = run(channel, monkeypatch, Script(clock, (0, hello)))
    assert isinstance(ended, channels.Retry)


def test_a_greeting_with_no_pause_between_heartbeats_is_not_obeyed(
    channel: Made, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(clock, (0, {"op": 10, "d": {"heartbeat_interval": 0}}), (0, READY), (9, GONE))
    run(channel, monkeypatch, script)
    assert script.ops().count(1) <= 10
