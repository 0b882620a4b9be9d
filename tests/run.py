"""Run the tests: python3 tests/run.py [--gate | --all] [--require-all] [ROOM ...] [pytest options]

Without arguments it runs what is quick and needs nothing but Python 3.9.
Rooms are unit, server, scripts, repo, contract and clients; README.md beside this file says what
is in each. Tests that are named by path run alone, whatever they cost.

--gate   what has to pass before a change lands: all rooms, each claim checked once
--all    everything that this machine can run, in every manner and with all repetitions
--require-all, or OCP_TEST_REQUIRE_ALL=1 in the environment: a skipped test is a failure

Uses this interpreter if it has pytest and pytest-xdist, else makes .venv in the repository and
installs them there. Tests run in parallel; -n 0 runs them one by one. Ends with pytest's exit code.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Optional

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
VERSIONS = REPO / ".ci" / "versions.txt"
#: What the tests themselves are run by.
RUNNERS = ("pytest", "pytest-xdist")
#: What quick tests use where there is a wheel of it; without, they are skipped and say so.
VALIDATORS = ("jsonschema-rs",)
NO_VENV = """Cannot make {venv}, see above. On Debian and Ubuntu: apt install python3-venv
Or install pytest and pytest-xdist for this interpreter yourself, and run this again."""
NO_PYTEST = """Cannot install pytest, see above. Is there a network?
Without one, install pytest and pytest-xdist for this interpreter, and run this again."""
#: They say how tests are spread, or need the process that has the terminal, or run no test.
NOT_PARALLEL = {"-n", "--numprocesses", "--dist", "--tx", "no:xdist", "-s", "--capture", "--pdb",
                "--trace", "--collect-only", "--co", "--fixtures", "--markers", "-h", "--help"}
#: A memory file system, and how much it must have free: tests write many small files, and wait
#: for the disk whenever a program asks that they are safe there.
MEMORY = Path("/dev/shm")
MEMORY_BYTES = 1 << 30

ROOMS = ("unit", "server", "scripts", "channels", "repo", "contract", "clients")


class Depth(NamedTuple):
    """How much is run when no test is named."""
    rooms: tuple[str, ...]
    about: str


#: conftest.py knows which tests each depth leaves out, and depth.py the rounds of those that
#: repeat something.
DEPTHS = {
    "quick": Depth(
        ("unit", "server", "scripts", "channels", "repo"),
        "without slow tests. Left to --all: {others}, slow tests, most of the repetitions"),
    "gate": Depth(
        ROOMS,
        "each claim once. Left to --all: every manner, most cases and clients, most repetitions"),
    "all": Depth(ROOMS, "everything that this machine can run"),
}


# ---------------------------------------------------------------------------
# The interpreter
# ---------------------------------------------------------------------------

def has(*modules: str) -> bool:
    return all(importlib.util.find_spec(name) for name in modules)


def use_venv(arguments: list[str]) -> None:
    """Go on as the interpreter of a venv with pytest and pytest-xdist, made if need be.

    Returns if there cannot be one and this interpreter has at least pytest. Raises SystemExit
    if it has not."""
    venv = venv_folder()
    python = venv / "bin" / "python"
    complaint = ""
    if not python.exists():
        print(f"No pytest and pytest-xdist here: making {venv}", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", str(venv)]).returncode:
            complaint = NO_VENV.format(venv=venv)
    look = [str(python), "-c", "import pytest, xdist"]
    if not complaint and subprocess.run(look, stderr=subprocess.DEVNULL).returncode:
        print(f"Installing pytest into {venv}", flush=True)
        if pip_install(python, *pinned(RUNNERS)):
            pip_install(python, "--only-binary=:all:", *pinned(VALIDATORS))
        else:
            complaint = NO_PYTEST
    if not complaint:
        os.execv(str(python), [str(python), str(Path(__file__).resolve()), *arguments])
    if not has("pytest"):
        sys.exit(complaint)
    print("Going on with this interpreter's pytest, one test after another", flush=True)


def venv_folder() -> Path:
    """Return .venv, or a folder with the version in its name if another Python made .venv."""
    version = "%d.%d" % sys.version_info[:2]
    usual = REPO / ".venv"
    settings = usual / "pyvenv.cfg"
    is_ours = not settings.exists() or f"version = {version}." in settings.read_text()
    return usual if is_ours else REPO / f".venv-{version}"


def pip_install(python: Path, *arguments: str) -> bool:
    """Install into the venv of this interpreter, and return whether that worked."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return subprocess.run([*command, *arguments]).returncode == 0


def pinned(names: tuple[str, ...]) -> list[str]:
    """Return the requirements of these packages, as versions.txt has them."""
    lines = [line.partition("#")[0].split(None, 2) for line in VERSIONS.read_text().splitlines()]
    found = [fields[2].strip() for fields in lines if fields[:2] == [".venv", "pip"]]
    return [each for each in found if each.partition("==")[0] in names]


# ---------------------------------------------------------------------------
# What is run
# ---------------------------------------------------------------------------

class Choice(NamedTuple):
    """What the arguments ask for."""
    depth: str
    #: [] if tests are named by path.
    rooms: list[str]
    is_all_required: bool
    #: What is left for pytest.
    options: list[str]


def choose(arguments: list[str]) -> Choice:
    """Return what to run. Raises SystemExit for a depth that does not go with the rest."""
    depths = [name for name in DEPTHS if f"--{name}" in arguments]
    is_required = "--require-all" in arguments or os.environ.get("OCP_TEST_REQUIRE_ALL") == "1"
    own = {"--require-all", *(f"--{name}" for name in DEPTHS)}
    rooms = [each for each in arguments if each in ROOMS]
    options = [each for each in arguments if each not in own and each not in ROOMS]
    if len(depths) > 1:
        sys.exit(f"run.py: choose one of {', '.join(f'--{name}' for name in depths)}")
    if any(is_path(each) for each in options):
        return Choice("all", [], is_required, options)
    # Whoever names a room wants all of it that is quick there; contract and clients never are.
    is_quick = set(rooms) <= set(DEPTHS["quick"].rooms)
    depth = depths[0] if depths else "quick" if is_quick else "gate"
    return Choice(depth, rooms or list(DEPTHS[depth].rooms), is_required, options)


def is_path(argument: str) -> bool:
    """Return whether a pytest argument names tests, as in tests/unit/test_x.py::test_y."""
    return not argument.startswith("-") and Path(argument.partition("::")[0]).exists()


def headline(choice: Choice) -> str:
    """Return the line that says what is run and what is left out."""
    if not choice.rooms:
        return "The tests that are named, in every manner"
    others = ", ".join(room for room in ROOMS if room not in choice.rooms) or "nothing else"
    about = DEPTHS[choice.depth].about.format(others=others)
    return f"{choice.depth.capitalize()}: {', '.join(choice.rooms)}; {about}"


def parallel(arguments: list[str]) -> list[str]:
    """Return the arguments that make pytest use all cores, [] where it cannot or should not.

    A file stays on one worker, because its tests share servers; tests/conftest.py orders them.
    Two more workers than cores, because many tests wait for a moment."""
    given = [*arguments, *shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))]
    # As in -n2 and in --capture=no.
    options = {name for each in given for name in (each[:2], each.partition("=")[0])}
    if options & NOT_PARALLEL or not has("xdist"):
        return []
    workers = (os.cpu_count() or 1) + 2
    return ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]


# ---------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------

#: The first words of a skip's reason where an older claude lacks what is tested. Installing
#: something would not help.
NOT_APPLICABLE = "not for this claude: "


class SkipReport:
    """A pytest plugin that lists skipped tests by reason; a skip may be a failure of the run."""

    def __init__(self, is_all_required: bool) -> None:
        self.is_all_required = is_all_required
        #: Reason -> how many tests or files.
        self.skipped: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        # An expected failure is reported as skipped too, but it did run.
        if report.skipped and not hasattr(report, "wasxfail"):
            self._note(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.skipped:
            self._note(report)

    def _note(self, report: Any) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        self.skipped[str(reason).partition("Skipped: ")[2] or str(reason)] += 1

    def missing(self) -> int:
        """Return how many tests have to run and were skipped because something is missing."""
        if not self.is_all_required:
            return 0
        return sum(count for reason, count in self.skipped.items()
                   if not reason.startswith(NOT_APPLICABLE))

    def pytest_sessionfinish(self, session: Any) -> None:
        if self.missing() and session.exitstatus == 0:
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for reason, count in sorted(self.skipped.items()):
            terminalreporter.write_line(f"{count} skipped: {reason}")
        if self.missing():
            terminalreporter.write_line(
                f"FAILED: {self.missing()} skipped,"
                " but this run requires all tests", red=True)


def main(arguments: list[str]) -> int:
    if not has("pytest", "xdist"):
        use_venv(arguments)
    import pytest

    choice = choose(arguments)
    print(headline(choice), flush=True)
    os.environ["OCP_TEST_DEPTH"] = choice.depth
    # What is compiled once need not be compiled by every worker and every server again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    # Plugins of packages that only some tests need would cost every worker a second.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    places = [str(TESTS / room) for room in choice.rooms]
    spread = parallel(choice.options) if places else []
    plugins = ["-p", "xdist.plugin"] if has("xdist") else []
    folder = None if "--basetemp" in " ".join(choice.options) else memory_folder()
    command = ["-q", "--rootdir", str(REPO), *plugins, *spread, *choice.options, *places]
    if folder:
        command += ["--basetemp", str(folder / "tests")]
    code = int(pytest.main(command, [SkipReport(choice.is_all_required)]))
    if folder and code:
        print(f"The files of the tests are in {folder} until the next run.")
    elif folder:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def memory_folder() -> Optional[Path]:
    """Return a new folder in memory; None where there is no such file system, or too little room.

    Removes those of failed runs before it."""
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < MEMORY_BYTES:
        return None
    mine = MEMORY / f"ocp-tests-{os.getuid()}"
    try:
        mine.mkdir(mode=0o700, exist_ok=True)
        for old in mine.iterdir():
            if not Path("/proc", old.name.partition("-")[0]).exists():
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=mine))
    except OSError:
        return None


if __name__ == "__main__":
    if sys.version_info < (3, 9):
        sys.exit("The tests need Python 3.9 or newer.")
    sys.exit(main(sys.argv[1:]))
