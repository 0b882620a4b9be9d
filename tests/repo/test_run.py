"""The program that runs the tests: when it runs them in parallel, and what a skipped one does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from programs import CLIENTS
from project import REPO, clean_env, load_script

run = load_script("tests/run.py")

HAS_XDIST = importlib.util.find_spec("xdist") is not None
needs_xdist = pytest.mark.skipif(not HAS_XDIST, reason="no pytest-xdist: run .ci/run once")
each_way = pytest.mark.parametrize("spread", [
    pytest.param((), id="serial"),
    pytest.param(("-n", "2", "--dist", "loadfile"), id="parallel", marks=needs_xdist)])


@pytest.fixture
def with_xdist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


@pytest.mark.parametrize("arguments", [
    [], ["-x"], ["-k", "no"], ["--color=no"], ["-p", "no:cacheprovider"]])
def test_all_tests_run_on_one_worker_more_than_cores(
    with_xdist: None, arguments: list[str],
) -> None:
    assert run.parallel(arguments)[:2] == ["-n", str((os.cpu_count() or 1) + 1)]


@pytest.mark.parametrize("arguments", [
    ["-n", "0"], ["-n2"], ["--numprocesses=2"], ["--dist", "load"], ["-p", "no:xdist"], ["--pdb"],
    ["-s"], ["--capture=no"], ["--collect-only"]])
def test_who_says_how_to_run_them_is_obeyed(with_xdist: None, arguments: list[str]) -> None:
    assert run.parallel(arguments) == []


def test_the_environment_may_say_it_too(
    with_xdist: None, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-x -n 0")

    assert run.parallel([]) == []


def test_without_xdist_tests_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    assert run.parallel([]) == []


def run_tests(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(REPO / "tests/run.py"), "-p", "no:cacheprovider"]
    return subprocess.run([*program, *arguments, str(folder)], env=clean_env(), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)


@each_way
def test_a_skipped_test_and_a_skipped_file_are_failures_if_all_are_required(
    tmp_path: Path, spread: tuple[str, ...],
) -> None:
    (tmp_path / "test_one.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_skipped(): pytest.skip('no moon')\n")
    (tmp_path / "test_two.py").write_text(
        "import pytest\npytest.importorskip('no_such_module')\ndef test_good(): pass\n")

    required = run_tests(tmp_path, "--require-all", *spread)
    assert required.returncode == 1 and "FAILED: 2 skipped" in required.stdout, required.stdout
    assert "no moon" in required.stdout
    assert run_tests(tmp_path, *spread).returncode == 0


@each_way
def test_an_expected_failure_is_none(tmp_path: Path, spread: tuple[str, ...]) -> None:
    (tmp_path / "test_one.py").write_text(
        "import pytest\n@pytest.mark.xfail\ndef test_bad(): assert 0\ndef test_good(): pass\n")

    ran = run_tests(tmp_path, "--require-all", *spread)
    assert ran.returncode == 0 and "1 passed, 1 xfailed" in ran.stdout, ran.stdout


def test_ci_installs_every_client_that_tests_look_for() -> None:
    script = (REPO / ".ci/run").read_text()

    packages = {package for _, _, names in CLIENTS.values() for package in names.split()}
    assert [package for package in sorted(packages) if package not in script] == []
