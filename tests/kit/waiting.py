"""Waiting for what takes its time, and doing several things at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Optional, TypeVar

Found = TypeVar("Found")


def eventually(check: Callable[[], Found], timeout_s: float = 25) -> Found:
    """The first true value of `check`, which may also raise AssertionError meanwhile.

    Raises AssertionError when there was none in time. That is long for a busy machine, and less
    than the pauses of the server that a test may want to tell from at once."""
    begun_s = time.monotonic()
    while True:
        failure: Optional[AssertionError] = None
        try:
            found = check()
            if found:
                return found
        except AssertionError as error:
            failure = error
        waited_s = time.monotonic() - begun_s
        if waited_s > timeout_s:
            raise failure or AssertionError(f"not within {timeout_s} s: {check}")
        # A check takes processor time, so the pauses grow with the wait.
        time.sleep(min(max(0.01, waited_s / 10), 0.1))
#: A turn has to be over within a second; the rest is for a busy machine.
SOON_S = 10.0


def stays(measure: Callable[[], Found], seconds: float) -> Found:
    """A value that has not changed for so long; waits for that."""
    seen = [(time.monotonic(), measure())]

    def unchanged() -> bool:
        now_s, value = time.monotonic(), measure()
        if value != seen[-1][1]:
            seen.append((now_s, value))
        return now_s - seen[-1][0] > seconds

    eventually(unchanged, timeout_s=seconds + 25)
    return seen[-1][1]


def in_parallel(jobs: Iterable[Callable[[], Found]]) -> list[Found]:
    """The results of all jobs, which run at the same time."""
    todo = list(jobs)
    with ThreadPoolExecutor(len(todo)) as pool:
        futures = [pool.submit(job) for job in todo]
        return [future.result() for future in futures]


def seconds_of(job: Callable[[], object]) -> float:
    """How long it takes."""
    started_s = time.monotonic()
    job()
    return time.monotonic() - started_s
