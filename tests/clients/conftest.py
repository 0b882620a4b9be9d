"""Fixtures for tests with real clients."""

from __future__ import annotations

from typing import Iterator

import pytest

import browser
from rig_fixtures import claude, rig, shared_rig

__all__ = ["chrome", "claude", "rig", "shared_rig"]


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    """A running browser, for the tests of one file."""
    with browser.running_browser(tmp_path_factory.mktemp("browser")) as running:
        yield running
