"""Libraries that take long to import, and that only some tests use."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest


class Library:
    """A library that is imported when a test uses it. Every worker collects all files, and runs the
    tests of few."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            # pytest looks for such names in whatever a file has.
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)


def library(name: str) -> Any:
    """Return this library. Skips the file that asks for it if it is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the {name} package is not installed", allow_module_level=True)
    return Library(name)
