"""Install what the tests and checks use, in the versions of versions.txt beside this file.

    python3 .ci/install.py [NAME ...]       these folders and programs, or all that are missing
    python3 .ci/install.py --raise          write the newest versions into versions.txt

Folders are installed side by side. Each one gets a copy of its lines when it is complete, so a
changed version is noticed and a folder half installed is installed again. The programs
"chromium", "sandbox" and "shells" come from Debian, in the version that it has. Needs python3 with
venv, node with npm, and a network; for the programs, the right to install them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
VERSIONS = REPO / ".ci" / "versions.txt"
#: In a folder that is complete: the lines that it was installed from.
STAMP = ".ocp-installed"
#: What Debian's packages give, each with its command: the browser of
#: tests/clients/test_dashboard.py, what claude confines itself with in
#: tests/contract/test_agents.py, and the shells of tests/scripts/test_connect.py.
PROGRAMS = {
    "chromium": {"chromium": "chromium"},
    "sandbox": {"bubblewrap": "bwrap", "socat": "socat"},
    "shells": {"fish": "fish", "zsh": "zsh", "tcsh": "tcsh"},
}
#: apt-get refuses to run twice at the same time.
apt = threading.Lock()
#: No package is looked up for longer.
LOOKUP_S = 120


class Pin(NamedTuple):
    """One line of versions.txt."""
    folder: str
    #: "pip" or "npm".
    kind: str
    #: As the installer takes it: name==version with a marker, or name@version.
    requirement: str
    #: Whether --raise leaves the version as it is.
    is_kept: bool


def read_pins(text: str) -> list[Pin]:
    """Return the pins of a versions file. Raises ValueError for a line of another form."""
    pins = []
    for line in text.splitlines():
        content, _, comment = line.partition("#")
        if not content.strip():
            continue
        fields = content.split(None, 2)
        if len(fields) != 3 or fields[1] not in ("pip", "npm"):
            raise ValueError(f"not of the form FOLDER pip|npm REQUIREMENT: {line}")
        folder, kind, requirement = fields
        pins.append(Pin(folder, kind, requirement.strip(), comment.strip() == "keep"))
    return pins


def folders_of(pins: list[Pin]) -> dict[str, list[Pin]]:
    """Return the pins by folder, in the order of the file."""
    folders: dict[str, list[Pin]] = {}
    for pin in pins:
        folders.setdefault(pin.folder, []).append(pin)
    return folders


# -- installing -----------------------------------------------------------------

def run(command: list[str], **more: str) -> None:
    """Run a command quietly. Raises RuntimeError with all that it printed if it fails."""
    done = subprocess.run(
        command, env={**os.environ, **more}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout.decode(errors='replace')}")


def install_pip(folder: Path, pins: list[Pin]) -> None:
    """Little of what is installed is ever imported, so nothing is compiled beforehand."""
    if not (folder / "bin" / "python").exists():
        run([sys.executable, "-m", "venv", str(folder)])
    run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile",
         "--disable-pip-version-check", *(pin.requirement for pin in pins)])


def install_npm(folder: Path, pins: list[Pin]) -> None:
    """The folder gets a package.json of its own, or npm would use one further up.

    A node among the packages comes first, and installs the others: OpenClaw asks for it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"name": "only-for-tests", "private": true}\n')
    path = f"{folder / 'node_modules' / '.bin'}{os.pathsep}{os.environ['PATH']}"
    requirements = [pin.requirement for pin in pins]
    nodes = [each for each in requirements if each.startswith("node@")]
    for group in (nodes, [each for each in requirements if each not in nodes]):
        if group:
            run(["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund",
                 "--loglevel=error", *group], PATH=path)


INSTALLERS = {"pip": install_pip, "npm": install_npm}


def install(name: str, pins: list[Pin]) -> str:
    """Install a folder unless it is complete; return one line about it."""
    folder = REPO / name
    stamp = folder / STAMP
    wanted = "".join(f"{pin.kind} {pin.requirement}\n" for pin in pins)
    if stamp.exists() and stamp.read_text() == wanted:
        return f"{name}: is there"
    stamp.unlink(missing_ok=True)
    for kind, installer in INSTALLERS.items():
        mine = [pin for pin in pins if pin.kind == kind]
        if mine:
            installer(folder, mine)
    stamp.write_text(wanted)
    return f"{name}: installed {', '.join(pin.requirement for pin in pins)}"


def install_programs(name: str) -> str:
    """Install the programs of one name from Debian unless all are there; return one line."""
    packages = PROGRAMS[name]
    if all(map(shutil.which, packages.values())):
        return f"{name}: is there"
    with apt:
        run(["apt-get", "update", "-qq"])
        run(["apt-get", "install", "-y", "-qq", *packages], DEBIAN_FRONTEND="noninteractive")
    return f"{name}: installed {', '.join(packages)}"


def install_all(names: list[str]) -> int:
    """Install these folders and programs, side by side; return the exit code."""
    folders = folders_of(read_pins(VERSIONS.read_text()))
    unknown = sorted(set(names) - {*folders, *PROGRAMS})
    if unknown:
        known = ", ".join([*folders, *PROGRAMS])
        print(f"nothing is installed under the name {', '.join(unknown)}; there are {known}")
        return 2
    wanted = names or [*folders, *PROGRAMS]
    failed = 0
    with ThreadPoolExecutor(len(wanted)) as pool:
        jobs = [pool.submit(install_programs, name) if name in PROGRAMS
                else pool.submit(install, name, folders[name]) for name in wanted]
        for name, job in zip(wanted, jobs):
            try:
                print(job.result(), flush=True)
            except (OSError, RuntimeError) as error:
                failed += 1
                print(f"FAILED: could not install {name}:\n{error}", flush=True)
    return 1 if failed else 0


# -- newer versions ---------------------------------------------------------------

def newest(pin: Pin) -> str:
    """Return the requirement with the newest version of its package."""
    if pin.kind == "npm":
        name, _, _ = pin.requirement.rpartition("@")
        shown = subprocess.run(["npm", "view", name, "version", "--json"], check=True,
                               stdout=subprocess.PIPE, timeout=LOOKUP_S)
        return f"{name}@{json.loads(shown.stdout)}"
    name = pin.requirement.partition("==")[0]
    shown = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", name,
         "--disable-pip-version-check"], check=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, timeout=LOOKUP_S)
    version = shown.stdout.decode().partition("(")[2].partition(")")[0]
    return re.sub(r"==[^;\s]+", f"=={version}", pin.requirement)


def raise_versions() -> int:
    """Write the newest versions into versions.txt, and show what changed; 0 is the exit code."""
    text = VERSIONS.read_text()
    for pin in read_pins(text):
        raised = pin.requirement if pin.is_kept else newest(pin)
        if raised != pin.requirement:
            print(f"{pin.requirement} -> {raised}", flush=True)
            text = text.replace(f"  {pin.requirement}\n", f"  {raised}\n")
    draft = VERSIONS.with_suffix(".draft")
    draft.write_text(text)
    os.replace(draft, VERSIONS)
    return 0


def main(arguments: list[str]) -> int:
    if arguments == ["--raise"]:
        return raise_versions()
    if any(each.startswith("-") for each in arguments):
        print(__doc__)
        return 0 if arguments == ["--help"] else 2
    return install_all(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
