"""What two versions of claude say of the plan, word for word, and reports made of that."""

from __future__ import annotations

import json
from typing import Any

from project import DATA

Json = Any

LINES: dict[str, dict[str, dict[str, Json]]] = json.loads((DATA / "plan.json").read_text())
OLD, NEW = LINES["2.1.197"], LINES["2.1.329"]
#: A window of which nothing was told.
UNKNOWN = dict.fromkeys((
    "utilization", "percent", "resetsIn", "resetsAt", "resetsAtHuman", "status", "observedAt"))
#: Extra usage of which nothing was told.
UNKNOWN_EXTRA: dict[str, Json] = {
    "state": None, "status": None, "inUse": False,
    **dict.fromkeys(("enabled", "used", "limit", "currency", "utilization"))}


def shares(report: Json) -> list[Json]:
    """How much of the session and of the week is used."""
    plan = report["plan"]
    return [plan["currentSession"]["utilization"],
            plan["weeklyLimits"]["allModels"]["utilization"]]
