"""Fixtures that every test file may use."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest
import support

#: The files that take longest, longest first. Workers take files in this order, so that none is
#: alone with a long one in the end. A wrong order costs time and nothing else; pytest's
#: --durations=50 tells which tests take long.
LONGEST = (
    "test_openclaw", "test_contract_tools", "test_contract_conversations", "test_contract_chat",
    "test_contract_safety", "test_connect_agents", "test_contract_shapes", "test_contract_fake",
    "test_contract_errors", "test_agents", "test_install", "test_contract_life", "test_leaving",
    "test_contract_plan")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


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
