"""Fixtures that every test file may use."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Callable, Hashable, Iterator, Optional

import pytest

from depth import DEPTH
from project import load_script
from server import Server, running_server

#: The files that take longest, longest first. Workers take files in this order, so that none is
#: alone with a long one in the end. A wrong order costs time and nothing else; pytest's
#: --durations=50 tells which tests take long.
LONGEST = (
    "contract/test_conversations", "contract/test_chat", "contract/test_tools",
    "contract/test_fake_claude", "contract/test_safety", "clients/test_openclaw",
    "contract/test_errors", "contract/test_prompt_cache", "contract/test_life",
    "contract/test_plan", "contract/test_shapes", "contract/test_options",
    "clients/test_dashboard", "server/test_hanging",
    "channels/test_killed_gateway", "channels/test_commands", "channels/test_telegram_chat",
    "channels/test_discord_chat", "channels/test_qq_chat", "channels/test_killed_opcodes",
    "channels/test_killed_asia", "channels/test_dingtalk", "channels/test_wechat",
    "server/test_storage", "server/test_leaving", "scripts/test_install", "server/test_usage",
    "server/test_alone", "server/test_attacks", "server/test_refusals", "server/test_failures",
    "server/test_settings_live", "server/test_routes_access", "server/test_keys",
    "server/test_plan", "scripts/test_ocp_service", "server/test_metrics", "server/test_flights",
    "scripts/test_ocp", "scripts/test_connect_openclaw", "scripts/test_connect_run")
#: Parameters that say how a test asks, and not what. OCP alone makes the difference.
MANNERS = ("dialect", "stream", "streams", "package")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the files, and leave out what this depth does not run; see tests/README.md."""
    place = {f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get("/".join(item.path.parts[-2:]), len(LONGEST)))
    left_out = set(filter(is_left_out, items))
    if DEPTH != "all":
        left_out |= all_but_few([item for item in items if item not in left_out])
    if DEPTH == "gate":
        for others in (other_versions, other_cases):
            left_out |= others([item for item in items if item not in left_out])
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=sorted(left_out, key=lambda item: item.nodeid))


def is_left_out(item: pytest.Item) -> bool:
    """Return whether a test's own marks keep it out of this run."""
    marks = {"quick": ("slow", "exhaustive"), "gate": ("exhaustive",)}.get(DEPTH, ())
    return any(item.get_closest_marker(mark) for mark in marks)


def all_but_few(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the cases of tests marked `few_cases`, without the first, the middle and the last."""
    groups: dict[Hashable, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few_cases"):
            groups.setdefault((item.path, item.name.partition("[")[0]), []).append(item)
    return {item for group in groups.values()
            for item in {*group} - {group[0], group[len(group) // 2], group[-1]}}


def other_versions(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the tests on an older claude of which others tell as much.

    Those are the newest one's; and where versions differ, the one of the test's cases that is
    kept for each older version. The fake claude plays two versions too."""
    versions = {item: version_of(item) for item in items if version_of(item)}
    newest = {is_real: max(each for each in versions.values() if each[0] == is_real)
              for is_real in {each[0] for each in versions.values()}}
    older = [item for item, version in versions.items() if version != newest[version[0]]]
    differing = [item for item in older if item.get_closest_marker("differs_by_version")]
    return set(older) - one_of_each(differing, lambda item: versions[item])


def other_cases(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the tests on a claude of which another case or another manner of asking tells as much.

    A case on the real claude costs about a second, so there is one for each version; a test
    marked `each_case` has all of them. The fake claude costs little: there every case runs in one
    manner."""
    def what(item: pytest.Item) -> Hashable:
        params = item.callspec.params  # type: ignore[attr-defined]
        version = version_of(item)
        if version is not None and version[0] and not item.get_closest_marker("each_case"):
            return version
        return tuple((name, repr(params[name])) for name in sorted(set(params) - set(MANNERS)))

    on_claude = [item for item in items if version_of(item)]
    return set(on_claude) - one_of_each(on_claude, what)


def one_of_each(
    items: list[pytest.Item], kind: Callable[[pytest.Item], Hashable]
) -> set[pytest.Item]:
    """Return one item of each test function and kind. Which one differs from test to test."""
    groups: dict[Hashable, list[pytest.Item]] = {}
    for item in items:
        name = item.name.partition("[")[0]
        groups.setdefault((item.path, name, kind(item)), []).append(item)
    return {group[zlib.crc32(group[0].name.partition("[")[0].encode()) % len(group)]
            for group in groups.values()}


def version_of(item: pytest.Item) -> Optional[tuple[bool, tuple[int, ...]]]:
    """Return whether the claude that a test asks is a real one, and its version; None if the test
    is not for each version."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    asked = params.get("claude") or params.get("kind")
    if not hasattr(asked, "version"):
        return None
    return asked.path is not None, tuple(map(int, asked.version.split(".")))


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
