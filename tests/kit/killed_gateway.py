"""ocp_channels.py that ends itself as kill -9 would, at the Nth step after its first message, or at
the first one of a name.

A step is the moment before or after a change of the database, the end of a transaction, or a call
of a platform. Its arguments are the step, a file for its name, and those of ocp_channels.py."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ocp_channels  # noqa: E402


class Killer:
    """Counts steps."""

    def __init__(self, step: str, file: str) -> None:
        """`step` is a number or a name."""
        self._name, self._file = step, file
        self._left = int(step) if step.isdigit() else 0
        self.is_counting = False

    def step(self, name: str) -> None:
        """Count a step, and end the program at the last one."""
        if not self.is_counting:
            return
        self._left -= 1
        if self._left == 0 or name == self._name:
            Path(self._file).write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)


def between(killer: Killer, owner: Any, method: str, name_of: Callable[..., str]) -> None:
    """Count a step before and after each call of a method."""
    original = getattr(owner, method)

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        killer.step(f"before {name_of(*args)}")
        result = original(self, *args, **options)
        killer.step(f"after {name_of(*args)}")
        return result

    setattr(owner, method, counted)


def main(words: list[str]) -> int:
    """Run the gateway until it ends itself."""
    killer = Killer(words[0], words[1])
    accept, transaction = ocp_channels.LiveAccount.accept, ocp_channels.Store.transaction

    def counted_accept(self: Any, message: Any, state: Any = None) -> None:
        killer.is_counting = killer.is_counting or message is not None
        killer.step("received")
        accept(self, message, state)

    @contextlib.contextmanager
    def counted_transaction(self: Any) -> Iterator[None]:
        with transaction(self):
            yield
        killer.step("after a transaction")

    ocp_channels.LiveAccount.accept = counted_accept
    ocp_channels.Store.transaction = counted_transaction
    between(killer, ocp_channels.Store, "run",
            lambda statement, *_: statement.partition("(")[0].strip())
    between(killer, ocp_channels.Http, "call", lambda method, url, *_: url.rpartition("/")[2])
    return ocp_channels.main(words[2:], os.environ)
