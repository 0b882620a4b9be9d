"""Fixtures that every test file may use."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest
import support


@pytest.fixture
def free_home(tmp_path: Path) -> Path:
    """An empty folder to be somebody's home."""
    home = tmp_path / "home"
    home.mkdir()
    return home


@pytest.fixture
def server(tmp_path: Path) -> Iterator[support.Server]:
    """A server with default settings on the fake claude, for this test alone."""
    with support.running_server(tmp_path / "server") as running:
        yield running


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[support.Server]:
    """A server with default settings for all tests of a file, which may not change them."""
    with support.running_server(tmp_path_factory.mktemp("server")) as running:
        yield running
