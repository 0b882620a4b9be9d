"""The program that runs the tests, and the one that installs what they use."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from programs import CLIENT_FOLDERS, CLIENTS, REAL_CLAUDES
from project import REPO, clean_env, load_script

run = load_script("tests/run.py")
install = load_script(".ci/install.py")
selection = load_script("tests/conftest.py")

HAS_XDIST = importlib.util.find_spec("xdist") is not None
needs_xdist = pytest.mark.skipif(not HAS_XDIST, reason="no pytest-xdist")
each_way = pytest.mark.parametrize("spread", [
    pytest.param((), id="serial", marks=pytest.mark.exhaustive),
    pytest.param(("-n", "2", "--dist", "loadfile"), id="parallel", marks=needs_xdist)])


@pytest.fixture
def with_xdist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "has", lambda *names: True)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


@pytest.mark.parametrize("arguments", [
    [], ["-x"], ["-k", "no"], ["--color=no"], ["-p", "no:cacheprovider"]])
def test_all_tests_run_on_one_worker_more_than_cores(
    with_xdist: None, arguments: list[str],
) -> None:
    assert run.parallel(arguments)[:2] == ["-n", str((os.cpu_count() or 1) + 2)]


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
    monkeypatch.setattr(run, "has", lambda *names: False)

    assert run.parallel([]) == []


def run_tests(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(REPO / "tests/run.py"), "-p", "no:cacheprovider"]
    return subprocess.run([*program, *arguments, str(folder)], env=clean_env(), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)


@pytest.mark.slow
@each_way
def test_a_skipped_test_and_a_skipped_file_are_failures_if_all_are_required(
    tmp_path: Path, spread: tuple[str, ...],
) -> None:
    (tmp_path / "test_one.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_skipped(): pytest.skip('no moon')\n"
        "def test_older(): pytest.skip('not for this claude: it has no stars')\n")
    (tmp_path / "test_two.py").write_text(
        "import pytest\npytest.importorskip('no_such_module')\ndef test_good(): pass\n")

    required = run_tests(tmp_path, "--require-all", *spread)
    assert required.returncode == 1 and "FAILED: 2 skipped" in required.stdout, required.stdout
    assert "no moon" in required.stdout and "no stars" in required.stdout
    assert run_tests(tmp_path, *spread).returncode == 0


@pytest.mark.exhaustive
@each_way
def test_an_expected_failure_is_none(tmp_path: Path, spread: tuple[str, ...]) -> None:
    (tmp_path / "test_one.py").write_text(
        "import pytest\n@pytest.mark.xfail\ndef test_bad(): assert 0\ndef test_good(): pass\n")

    ran = run_tests(tmp_path, "--require-all", *spread)
    assert ran.returncode == 0 and "1 passed, 1 xfailed" in ran.stdout, ran.stdout


# ---------------------------------------------------------------------------
# What is chosen
# ---------------------------------------------------------------------------

QUICK_ROOMS = ["unit", "server", "scripts", "channels", "repo"]


@pytest.mark.parametrize(("arguments", "depth", "rooms"), [
    ([], "quick", QUICK_ROOMS),
    (["-x"], "quick", QUICK_ROOMS),
    (["--gate"], "gate", [*QUICK_ROOMS, "contract", "clients"]),
    (["--all"], "all", [*QUICK_ROOMS, "contract", "clients"]),
    (["unit"], "quick", ["unit"]),
    (["contract"], "gate", ["contract"]),
    (["--all", "contract", "unit"], "all", ["contract", "unit"]),
    ([str(REPO / "tests/repo/test_run.py")], "all", []),
])
def test_arguments_choose_how_much_runs(
    arguments: list[str], depth: str, rooms: list[str]
) -> None:
    choice = run.choose(arguments)

    assert (choice.depth, choice.rooms) == (depth, rooms)
    assert not set(choice.options) & {"--gate", "--all", *run.ROOMS}


def test_two_depths_at_once_are_refused() -> None:
    with pytest.raises(SystemExit, match="--gate, --all"):
        run.choose(["--gate", "--all"])


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "Quick: unit, server, scripts, channels, repo; without slow tests."),
    ([], "Left to --all: contract, clients, slow tests"),
    (["--gate", "unit"], "Gate: unit; each claim once."),
    (["--all"], "everything that this machine can run"),
])
def test_the_first_line_says_what_runs_and_what_is_left_out(
    arguments: list[str], words: str
) -> None:
    line = run.headline(run.choose(arguments))

    assert words in line and "\n" not in line


def test_skips_are_listed_by_reason_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(
        "import pytest\n@pytest.mark.parametrize('number', range(3))\n"
        "def test_skipped(number): pytest.skip('no moon')\n"
        "@pytest.mark.skipif(True, reason='no sun')\ndef test_other(): pass\n")

    printed = run_tests(tmp_path).stdout
    assert "3 skipped: no moon\n1 skipped: no sun\n" in printed


def test_every_room_has_tests_and_stands_in_the_readme() -> None:
    readme = (REPO / "tests/README.md").read_text()

    for room in run.ROOMS:
        assert list((REPO / "tests" / room).glob("test_*.py")), room
        assert f"| `{room}/`" in readme, room


class Asking:
    """A test as pytest has collected it, on a claude."""

    def __init__(self, name: str, mark: str = "", **params: Any) -> None:
        self.path = Path("test_some.py")
        self.name = f"{name}[{params}]"
        self.callspec = SimpleNamespace(params=params)
        self._mark = mark

    def get_closest_marker(self, name: str) -> bool:
        return name == self._mark


NEW, OLD = (SimpleNamespace(version=version, path=REPO) for version in ("2.1.332", "2.1.197"))
PLAYED, PLAYED_OLD = (
    SimpleNamespace(version=version, path=None) for version in ("2.1.329", "2.1.197"))


def test_the_gate_asks_older_claudes_one_case_of_each_test_that_differs_by_version() -> None:
    same = [Asking("same", claude=each) for each in (NEW, OLD)]
    differing = [Asking("differs", "differs_by_version", claude=each, case=case)
                 for each in (NEW, OLD) for case in range(3)]
    fakes = [Asking("fake", kind=each) for each in (NEW, OLD, PLAYED, PLAYED_OLD)]
    neither = Asking("neither", case=1)

    left_out = selection.other_versions([*same, *differing, *fakes, neither])

    assert {same[1], fakes[1], fakes[3]} < left_out
    assert left_out < {same[1], *differing[3:], fakes[1], fakes[3]}
    assert len(left_out & set(differing)) == 2


def test_the_gate_asks_the_real_claude_one_case_and_the_fake_one_each_case_in_one_manner() -> None:
    asked = {(about, mark): [Asking(name, *mark, case=case, dialect=dialect, **{about: claude})
                             for case in range(3) for dialect in ("chat", "messages")]
             for name, about, claude, mark in (
                 ("real", "claude", NEW, ()), ("each", "claude", NEW, ("each_case",)),
                 ("fake", "kind", PLAYED, ()))}
    neither = [Asking("neither", dialect=dialect) for dialect in ("chat", "messages")]

    left_out = selection.other_cases([*sum(asked.values(), []), *neither])

    assert [len(left_out & set(items)) for items in asked.values()] == [5, 3, 3]
    assert not left_out & set(neither)


def test_three_cases_stand_for_all_where_a_test_says_so() -> None:
    many = [Asking("many", "few_cases", case=case) for case in range(10)]
    two = [Asking("two", "few_cases", case=case) for case in range(2)]
    others = [Asking("others", case=case) for case in range(10)]

    left_out = selection.all_but_few([*many, *two, *others])

    assert left_out == {*many[1:5], *many[6:9]}


# ---------------------------------------------------------------------------
# Versions
# ---------------------------------------------------------------------------

def test_every_client_that_tests_look_for_has_a_folder_with_pinned_versions() -> None:
    pins = install.read_pins(install.VERSIONS.read_text())

    assert set(CLIENTS.values()) == set(CLIENT_FOLDERS)
    assert {*CLIENT_FOLDERS, *REAL_CLAUDES, ".venv"} == {pin.folder for pin in pins}
    assert [pin for pin in pins if not re.search(r"(==|@)\d+(\.\d+)+", pin.requirement)] == []


def test_the_tests_are_run_by_the_pinned_pytest_and_validate_with_the_pinned_validator() -> None:
    found = run.pinned((*run.RUNNERS, *run.VALIDATORS))

    assert [each.partition("==")[0] for each in found] == [
        "pytest", "pytest", "pytest-xdist", "jsonschema-rs"]


@pytest.mark.parametrize("line", ["pytest==1.0", "folder pip", "folder gem rails@1.0"])
def test_a_line_of_another_form_is_no_pin(line: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        install.read_pins(f"# comment\n\n{line}\n")


def test_versions_that_are_kept_are_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = tmp_path / "versions.txt"
    kept = "a  npm  @s/y@1.0  # keep\n"
    versions.write_text(f"# Head\na  pip  x==1.0; python_version > '3'\n{kept}")
    monkeypatch.setattr(install, "VERSIONS", versions)
    monkeypatch.setattr(install, "newest", lambda pin: pin.requirement.replace("1.0", "2.0"))

    assert install.raise_versions() == 0
    assert versions.read_text() == f"# Head\na  pip  x==2.0; python_version > '3'\n{kept}"


def test_a_folder_is_installed_again_only_when_its_versions_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(install, "REPO", tmp_path)
    monkeypatch.setattr(install, "INSTALLERS", {
        "pip": lambda folder, pins: (folder.mkdir(exist_ok=True), calls.append(folder.name))})

    for text in ("a  pip  x==1.0", "a  pip  x==1.0", "a  pip  x==1.1"):
        install.install("a", install.read_pins(text))
    assert calls == ["a", "a"]


def test_an_install_that_fails_says_which_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path, pins: object) -> None:
        folder.mkdir(exist_ok=True)
        if folder.name == "bad":
            raise RuntimeError("no network")

    versions = tmp_path / "versions.txt"
    versions.write_text("bad  pip  x==1.0\ngood  pip  y==1.0\n")
    monkeypatch.setattr(install, "REPO", tmp_path)
    monkeypatch.setattr(install, "VERSIONS", versions)
    monkeypatch.setattr(install, "INSTALLERS", {"pip": fail})

    assert install.install_all(["bad", "good"]) == 1
    printed = capsys.readouterr().out
    assert "could not install bad:\nno network" in printed and "good: installed" in printed
    assert [path.parent.name for path in tmp_path.glob(f"*/{install.STAMP}")] == ["good"]


def test_programs_are_installed_only_where_one_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"chromium", "fish", "zsh"}
    ran: list[list[str]] = []
    monkeypatch.setattr(install.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(install, "run", lambda command, **more: ran.append(command))

    assert install.install_all(["chromium", "shells"]) == 0
    printed = capsys.readouterr().out
    assert "chromium: is there" in printed and "shells: installed fish, zsh, tcsh" in printed
    assert [command[:2] for command in ran] == [["apt-get", "update"], ["apt-get", "install"]]
    assert ran[1][-3:] == ["fish", "zsh", "tcsh"]


def test_a_name_that_nothing_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert install.install_all(["shels"]) == 2
    assert "shells" in capsys.readouterr().out
