"""Pytest fixtures for tests over a real claude, which a folder's conftest.py imports.

A module that wants other settings of the server than the default names them:

    RIG_SETTINGS = {"OCP_WARM_PROCESSES": "0"}
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rig import Claude, Rig, each_claude, running_rig


@pytest.fixture(scope="module", params=each_claude())
def claude(request: pytest.FixtureRequest) -> Claude:
    """Every real claude. Pytest runs the tests of a module claude by claude."""
    found: Claude = request.param
    return found


@pytest.fixture(scope="module")
def shared_rig(
    request: pytest.FixtureRequest, claude: Claude, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rig]:
    """The rig with the settings of the module, for its own fixtures of module scope.

    It ends with the module: a claude that only waits takes a hundredth of a core, and more in its
    first seconds."""
    settings = getattr(request.module, "RIG_SETTINGS", {})
    with running_rig(tmp_path_factory.mktemp("rig"), claude, **settings) as started:
        yield started


@pytest.fixture
def rig(shared_rig: Rig) -> Iterator[Rig]:
    """The rig with the settings of the module, for one test."""
    shared_rig.begin()
    yield shared_rig
    shared_rig.assert_nothing_refused()
