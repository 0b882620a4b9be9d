"""How much a run is to check: tests/run.py says it, and tests that repeat something ask here."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import pytest

Value = TypeVar("Value")

#: "quick", "gate" or "all". Without tests/run.py, pytest was told itself which tests to run.
DEPTH = os.environ.get("OCP_TEST_DEPTH", "all")


def by_depth(quick: Value, gate: Value, everything: Value) -> Value:
    """Return the value for this run, for example how many rounds a test takes."""
    return {"quick": quick, "gate": gate}.get(DEPTH, everything)


def rest(*cases: Any) -> list[Any]:
    """Return parameters for the cases of a test that only --all runs.

    They are second proofs: the other cases show the same. A tuple has a value for each name."""
    return [
        pytest.param(*(case if type(case) is tuple else (case,)), marks=pytest.mark.exhaustive)
        for case in cases]
