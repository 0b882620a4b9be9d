"""How much a run is to check: tests/run.py says it, and tests that repeat something ask here."""

from __future__ import annotations

import os
from typing import TypeVar

Value = TypeVar("Value")

#: "quick", "gate" or "all". Without tests/run.py, pytest was told itself which tests to run.
DEPTH = os.environ.get("OCP_TEST_DEPTH", "all")


def by_depth(quick: Value, gate: Value, everything: Value) -> Value:
    """Return the value for this run, for example how many rounds a test takes."""
    return {"quick": quick, "gate": gate}.get(DEPTH, everything)
