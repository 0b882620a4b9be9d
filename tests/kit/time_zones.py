"""Time zones, and this process in one of them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

#: Zones by their rules, so that they are there on every machine.
ZONES = {
    "UTC": "UTC0",
    "America/New_York": "EST5EDT,M3.2.0,M11.1.0",
    "Europe/Berlin": "CET-1CEST,M3.5.0,M10.5.0/3",
    # Midnight does not exist on one day, and is twice as far away on another one.
    "Asia/Beirut": "EET-2EEST,M3.5.0/0,M10.5.0/0",
    "America/Santiago": "<-04>4<-03>,M9.1.6/24,M4.1.6/24",
    "Africa/Cairo": "EET-2EEST,M4.5.5/0,M10.5.4/24",
    # Midnight comes twice.
    "America/Havana": "CST5CDT,M3.2.0/0,M11.1.0/1",
    "Atlantic/Azores": "<-01>1<+00>,M3.5.0/0,M10.5.0/1",
    "Asia/Kathmandu": "<+0545>-5:45",
    "Australia/Lord_Howe": "<+1030>-10:30<+11>-11,M10.1.0,M4.1.0",
    "Pacific/Kiritimati": "<+14>-14",
}


@contextlib.contextmanager
def zone(name: str) -> Iterator[None]:
    """This process in a time zone: one of ZONES, or another one that the machine knows."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = ZONES.get(name, name)
    time.tzset()
    try:
        yield
    finally:
        if before is None:
            del os.environ["TZ"]
        else:
            os.environ["TZ"] = before
        time.tzset()
