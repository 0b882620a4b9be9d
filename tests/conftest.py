"""Fixtures that every test file may use."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Iterator, Optional

import pytest

from project import load_script
from server import Server, running_server

#: The files that take longest, longest first. Workers take files in this order, so that none is
#: alone with a long one in the end. A wrong order costs time and nothing else; pytest's
#: --durations=50 tells which tests take long.
LONGEST = (
    "test_openclaw", "test_contract_tools", "test_contract_conversations", "test_contract_chat",
    "test_contract_safety", "test_connect_agents", "test_contract_shapes", "test_contract_fake",
    "test_contract_errors", "test_agents", "test_install", "test_contract_life", "test_leaving",
    "test_contract_plan")


#: Parameters that say how a test asks, and not what.
MANNERS = ("dialect", "streams")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = {f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
    left_out = repetitions(items)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=sorted(left_out, key=lambda item: item.nodeid))


def repetitions(items: list[pytest.Item]) -> set[pytest.Item]:
    """The tests to leave out: an older claude is asked everything, but only in one manner, since
    those are made by OCP alone. Which one differs from test to test."""
    groups: dict[tuple[object, ...], list[pytest.Item]] = {}
    asking = {item: version_of(item) for item in items}
    newest = max(filter(None, asking.values()), default=None)
    for item, version in asking.items():
        if version in (None, newest):
            continue
        indices = sorted(item.callspec.indices.items())  # type: ignore[attr-defined]
        what = [pair for pair in indices if pair[0] not in MANNERS]
        groups.setdefault((item.path, item.name.partition("[")[0], *what), []).append(item)
    return {
        item for (_, name, *_), group in groups.items()
        for index, item in enumerate(group)
        if index != zlib.crc32(str(name).encode()) % len(group)
    }


def version_of(item: pytest.Item) -> Optional[tuple[int, ...]]:
    """The version of the real claude that a test asks, None for one that asks none."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    version = getattr(params.get("claude"), "version", None)
    return tuple(map(int, version.split("."))) if version else None


@pytest.fixture
def free_home(tmp_path: Path) -> Path:
    """An empty folder to be somebody's home."""
    home = tmp_path / "home"
    home.mkdir()
    return home


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """Where the server's database is, or will be."""
    return tmp_path / "ocp.db"


@pytest.fixture
def store(store_path: Path) -> Iterator[Any]:
    """An empty database of the server's."""
    made = load_script("ocp_server.py").Store(str(store_path))
    yield made
    made.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server with default settings on the fake claude, for this test alone."""
    with running_server(tmp_path / "server") as running:
        yield running


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with default settings for all tests of a file, which may not change them."""
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running
