"""The module json, imported without re and enum, which take half of the time in which the fake
claude starts.

json uses patterns where it has no C code, and for the blanks around a value. While it is imported,
an object stands for re that knows only these blanks.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Blanks:
    """What json sees of re: every pattern is the one of blanks, and its own match."""

    VERBOSE = MULTILINE = DOTALL = 0

    def __init__(self, end: int = 0) -> None:
        self._end = end

    def compile(self, *_: Any) -> Blanks:
        return self

    def match(self, text: str, start: int) -> Blanks:
        end = start
        while text[end:end + 1] in (" ", "\t", "\n", "\r"):
            end += 1
        return Blanks(end)

    def end(self) -> int:
        return self._end


if "re" not in sys.modules:
    sys.modules["re"] = Blanks()  # type: ignore[assignment]
    import json
    del sys.modules["re"]
else:
    import json

__all__ = ["json"]
