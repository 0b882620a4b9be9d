"""Pytest fixtures for tests over a real claude, which a folder's conftest.py imports.

A module that wants other settings of the server than the default names them:

    RIG_SETTINGS = {"OCP_WARM_PROCESSES": "0"}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pytest

from rig import Claude, Rig, each_claude, running_rig


class RigCache:
    """One rig for each claude and each set of settings, started on its first use."""

    def __init__(self, stack: ExitStack, folders: pytest.TempPathFactory) -> None:
        self._stack = stack
        self._folders = folders
        self._rigs: dict[tuple[str, frozenset[tuple[str, str]]], Rig] = {}

    def get(self, claude: Claude, settings: Mapping[str, str]) -> Rig:
        key = claude.version, frozenset(settings.items())
        if key not in self._rigs:
            folder = self._folders.mktemp("rig")
            self._rigs[key] = self._stack.enter_context(running_rig(folder, claude, **settings))
        return self._rigs[key]


@pytest.fixture(scope="module", params=each_claude())
def claude(request: pytest.FixtureRequest) -> Claude:
    """Every real claude. Pytest runs the tests of a module claude by claude."""
    found: Claude = request.param
    return found


@pytest.fixture(scope="session")
def rigs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RigCache]:
    """The rigs of this worker, which run until its end."""
    with ExitStack() as stack:
        yield RigCache(stack, tmp_path_factory)


@pytest.fixture(scope="module")
def shared_rig(request: pytest.FixtureRequest, claude: Claude, rigs: RigCache) -> Iterator[Rig]:
    """The rig with the settings of the module, for its own fixtures of module scope."""
    found = rigs.get(claude, getattr(request.module, "RIG_SETTINGS", {}))
    yield found
    found.assert_nothing_refused()
    # The next module finds no conversation of this one, and the memory is free meanwhile.
    found.end_parked()


@pytest.fixture
def rig(shared_rig: Rig) -> Iterator[Rig]:
    """The rig with the settings of the module, for one test."""
    shared_rig.begin()
    yield shared_rig
    shared_rig.assert_nothing_refused()
