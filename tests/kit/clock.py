"""Clocks that tests set, for code that is given its clock."""

from __future__ import annotations

import time


class FakeClock:
    """Time, as far as the code under test can tell. `step_s` is how far each look moves it on."""

    def __init__(self, now_s: float = 1_000.0, step_s: float = 0.0) -> None:
        self.now_s = float(now_s)
        self._step_s = step_s

    def __call__(self) -> float:
        self.now_s += self._step_s
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self.now_s += seconds


class SkippingClock:
    """Real time, but for sleep, which takes none and moves the clock on instead."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.slept: list[float] = []

    def time(self) -> float:
        return time.time() + self.ahead_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.ahead_s += seconds
