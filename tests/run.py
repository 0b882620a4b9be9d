"""Run the tests: python3 tests/run.py [--require-all] [pytest arguments]

Needs nothing but Python 3.9 or newer. Uses this interpreter's pytest if it has one, else makes
.venv in the repository and installs pytest there. Ends with pytest's exit code.

Where pytest-xdist is installed too, all tests run in parallel; -n 0 runs them one by one. Tests
that are named run one by one anyway.

--require-all, or OCP_TEST_REQUIRE_ALL=1 in the environment: a skipped test is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

REPO = Path(__file__).resolve().parent.parent
VENV = REPO / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
NO_VENV = """Cannot make .venv, see above. On Debian and Ubuntu: apt install python3-venv
Or install pytest for this interpreter yourself, and run this again."""
NO_PYTEST = """Cannot install pytest, see above. Is there a network?
Without one, install pytest for this interpreter in another way, and run this again."""
#: They say how tests are spread, or need the process that has the terminal, or run no test.
NOT_PARALLEL = {"-n", "--numprocesses", "--dist", "--tx", "no:xdist", "-s", "--capture", "--pdb",
                "--trace", "--collect-only", "--co", "--fixtures", "--markers", "-h", "--help"}


class SkipCounter:
    """A pytest plugin that turns skipped tests into a failure of the run."""

    def __init__(self) -> None:
        self.skipped = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        # An expected failure is reported as skipped too, but it did run.
        self.skipped += bool(report.skipped and not hasattr(report, "wasxfail"))

    def pytest_collectreport(self, report: Any) -> None:
        self.skipped += bool(report.skipped)

    def pytest_sessionfinish(self, session: Any) -> None:
        if self.skipped and session.exitstatus == 0:
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.skipped:
            terminalreporter.write_line(
                f"FAILED: {self.skipped} skipped, but this run requires all tests", red=True)


def main(arguments: list[str]) -> int:
    if importlib.util.find_spec("pytest") is None:
        run_in_venv(arguments)
    import pytest

    plugins = []
    if "--require-all" in arguments or os.environ.get("OCP_TEST_REQUIRE_ALL") == "1":
        plugins.append(SkipCounter())
    chosen = [argument for argument in arguments if argument != "--require-all"]
    if not any(is_path(argument) for argument in chosen):
        chosen = [*parallel(chosen), *chosen, str(REPO / "tests")]
    return int(pytest.main(["-q", "-rs", "--rootdir", str(REPO), *chosen], plugins))


def parallel(arguments: list[str]) -> list[str]:
    """The arguments that make pytest use all cores, [] where it cannot or should not.

    A file stays on one worker, because its tests share servers; tests/conftest.py orders them.
    One more worker than cores, because many tests wait for a moment."""
    given = [*arguments, *shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))]
    # As in -n2 and in --capture=no.
    options = {name for each in given for name in (each[:2], each.partition("=")[0])}
    if options & NOT_PARALLEL or importlib.util.find_spec("xdist") is None:
        return []
    workers = (os.cpu_count() or 1) + 1
    return ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]


def is_path(argument: str) -> bool:
    """Whether a pytest argument names tests, as in tests/test_x.py::test_y."""
    return not argument.startswith("-") and Path(argument.partition("::")[0]).exists()


def run_in_venv(arguments: list[str]) -> NoReturn:
    """Go on as the interpreter of .venv, once it has a pytest."""
    if not VENV_PYTHON.exists():
        print(f"No pytest here: making {VENV}", flush=True)
        step([sys.executable, "-m", "venv", str(VENV)], NO_VENV)
    look = [str(VENV_PYTHON), "-c", "import pytest"]
    if subprocess.run(look, stderr=subprocess.DEVNULL).returncode:
        print(f"Installing pytest into {VENV}", flush=True)
        step([str(VENV_PYTHON), "-m", "pip", "install", "--quiet",
              "--disable-pip-version-check", "pytest"], NO_PYTEST)
    os.execv(str(VENV_PYTHON), [str(VENV_PYTHON), str(Path(__file__).resolve()), *arguments])


def step(command: list[str], complaint: str) -> None:
    """Run a command; leaves with the complaint if it fails."""
    if subprocess.run(command).returncode:
        sys.exit(complaint)


if __name__ == "__main__":
    if sys.version_info < (3, 9):
        sys.exit("The tests need Python 3.9 or newer.")
    sys.exit(main(sys.argv[1:]))
