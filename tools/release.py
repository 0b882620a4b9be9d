"""Makes a release: dates the changelog, sets the version, commits, builds the files, tags.

    python3 tools/release.py 1.2.3 --passed "tests/run.py --all, Python 3.9, Linux" --dry-run
    python3 tools/release.py 1.2.3 --passed "..." [--sign] [--date YYYY-MM-DD]
    python3 tools/release.py --rebuild          the files of the release that is checked out, again

Nothing is pushed: what remains to do is printed at the end. The version stands in ocp_server.py;
files that are used without it repeat it, and a test holds them equal. The files are built from
the commit alone, sorted and with fixed times and owners: the same commit gives the same bytes.
The message of the tag has their SHA-256 sums, which `ocp update` compares; a signature of the tag
covers them too. See docs/releasing.md.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import gzip
import hashlib
import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

#: Scripts that are offered alone too.
SINGLE = ("ocp_server.py", "ocp.py", "ocp_connect.py", "ocp_channels.py", "ocp_tenants.py")
#: What only those who change OCP need.
LEFT_OUT = ("tests/", "bench/", "tools/", ".", "pyproject.toml", "ocp-plugin/test/")
#: Who may sign a release, in the form of ssh-keygen. Where it is there, `ocp update` wants it.
SIGNERS = "tools/allowed_signers"
SUMS = "SHA256SUMS"
UNRELEASED = "## Unreleased"
#: Documents that say the version.
_VERSION_IN_JSON = (
    "docs/openapi.json", "ocp-plugin/openclaw.plugin.json", "ocp-plugin/package.json")
#: Lines that say the version.
_SAYS_VERSION = (
    re.compile(r'(?m)^(VERSION = ")([^"]+)(")$'), re.compile(r'(?m)^( +"version": ")([^"]+)(",?)$'))


class Refused(Exception):
    """Why no release is made."""


class File(NamedTuple):
    """A file of the commit."""

    mode: int
    content: bytes


def git(folder: Path, *words: str, stdin: str | None = None) -> bytes:
    """Return what git prints. Raises Refused with its complaint."""
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, check=False,
        input=None if stdin is None else stdin.encode())
    if done.returncode != 0:
        raise Refused(f"git {words[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def version_tuple(text: str) -> tuple[int, ...]:
    """Return a version as numbers. Raises Refused if it is none."""
    if not re.fullmatch(r"\d{1,6}\.\d{1,6}\.\d{1,6}", text):
        raise Refused(f"{text!r} is not a version such as 1.2.3.")
    return tuple(map(int, text.split(".")))


def version_files(folder: Path) -> Iterator[tuple[Path, re.Pattern[str]]]:
    """Yield every file that says the version, ocp_server.py first, and how its line looks."""
    in_script, in_json = _SAYS_VERSION
    scripts = sorted(folder.glob("*.py"), key=lambda path: (path.name != "ocp_server.py", path))
    for path in scripts:
        if in_script.search(path.read_text("utf-8")):
            yield path, in_script
    for name in _VERSION_IN_JSON:
        yield folder / name, in_json


def versions(folder: Path) -> dict[str, str]:
    """Return what version each file says."""
    found = {}
    for path, pattern in version_files(folder):
        line = pattern.search(path.read_text("utf-8"))
        found[path.relative_to(folder).as_posix()] = line[2] if line else ""
    return found


def dated(changelog: str, version: str, date: str) -> str:
    """Return the changelog with its unreleased part as this release. Raises Refused."""
    head, mark, rest = changelog.partition(f"\n{UNRELEASED}\n")
    if not mark or not re.match(r"\s*(- |### )", rest):
        raise Refused(f"CHANGELOG.md has nothing under {UNRELEASED!r}.")
    return f"{head}\n## {version} - {date}\n{rest}"


def edits(folder: Path, version: str, date: str) -> dict[str, str]:
    """Return the new text of each file that a release changes. Raises Refused."""
    changed = {"CHANGELOG.md": dated((folder / "CHANGELOG.md").read_text("utf-8"), version, date)}
    for path, pattern in version_files(folder):
        text = path.read_text("utf-8")
        changed[path.relative_to(folder).as_posix()] = pattern.sub(rf"\g<1>{version}\3", text, 1)
    return changed


def check(folder: Path, version: str, is_signed: bool) -> None:
    """Raise Refused unless this release can be made here."""
    wanted = version_tuple(version)
    changed = git(folder, "status", "--porcelain", "--untracked-files=no").decode()
    if changed:
        raise Refused(f"The tree has changes that are not committed:\n{changed}")
    tags = re.findall(r"(?m)^v(\d+\.\d+\.\d+)$", git(folder, "tag", "--list").decode())
    newest = max([*tags, versions(folder)["ocp_server.py"]], key=version_tuple)
    if wanted < version_tuple(newest) or version in tags:
        raise Refused(f"{version} is not newer than {newest}.")
    if (folder / SIGNERS).exists() and not is_signed:
        raise Refused(f"There is {SIGNERS}, so `ocp update` takes signed tags only: use --sign.")


def committed(folder: Path) -> dict[str, File]:
    """Return the files of the commit that go into the archive."""
    found = {}
    for line in git(folder, "ls-tree", "-r", "-z", "HEAD").decode().split("\0"):
        about, _, name = line.partition("\t")
        if name and not name.startswith(LEFT_OUT):
            mode, kind, object_id = about.split()
            if mode not in ("100644", "100755") or kind != "blob":
                raise Refused(f"{name} is not a plain file.")
            found[name] = File(int(mode, 8) & 0o777, git(folder, "cat-file", "blob", object_id))
    return found


def archive(files: Mapping[str, File], top: str, at_s: int) -> bytes:
    """Return a compressed archive with everything in the folder `top`: same input, same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, file in sorted(files.items()):
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size, member.mode, member.mtime = len(file.content), file.mode, at_s
            member.uname = member.gname = "root"
            tar.addfile(member, io.BytesIO(file.content))
    return gzip.compress(packed.getvalue(), 9, mtime=at_s)


def assets(files: Mapping[str, File], version: str, date: str) -> dict[str, bytes]:
    """Return the files of a release by name, with their sums."""
    day = datetime.datetime.strptime(date + " +0000", "%Y-%m-%d %z")
    top = f"ocp-{version}"
    built = {f"{top}.tar.gz": archive(files, top, int(day.timestamp()))}
    built.update((name, files[name].content) for name in SINGLE)
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in built.items()]
    return {**built, SUMS: "".join(lines).encode()}


def write_assets(built: Mapping[str, bytes], folder: Path) -> None:
    """Write the files of a release."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in built.items():
        (folder / name).write_bytes(content)


def show_edits(folder: Path, changed: Mapping[str, str]) -> None:
    """Print what a release would change."""
    for name, text in changed.items():
        before = (folder / name).read_text("utf-8").splitlines()
        lines = difflib.unified_diff(before, text.splitlines(), name, name, lineterm="", n=0)
        print("\n".join(lines))


def tag(folder: Path, version: str, message: str, is_signed: bool) -> None:
    """Tag the commit, and verify the signature as `ocp update` will. Raises Refused."""
    kind = "--sign" if is_signed else "--annotate"
    git(folder, "tag", kind, "--cleanup=verbatim", "--file=-", f"v{version}", stdin=message)
    if is_signed and (folder / SIGNERS).exists():
        git(folder, "-c", f"gpg.ssh.allowedSignersFile={folder / SIGNERS}", "verify-tag",
            f"v{version}")


def release(folder: Path, options: argparse.Namespace) -> None:
    """Make the release. Raises Refused."""
    version, date = options.version, options.date
    check(folder, version, options.sign)
    changed = edits(folder, version, date)
    files = committed(folder)
    for name, text in changed.items():
        files[name] = files[name]._replace(content=text.encode())
    built = assets(files, version, date)
    sums = built[SUMS].decode()
    message = f"OCP {version}\n\nTests passed: {options.passed}\n\n{sums}"
    if options.dry_run:
        show_edits(folder, changed)
        print(f"\nThe tag v{version}{', signed' if options.sign else ''}, would say:\n\n{message}")
        print("Nothing was changed.")
        return
    for name, text in changed.items():
        (folder / name).write_text(text, "utf-8")
    git(folder, "commit", "--quiet", "-m", f"Release {version}", "--", *changed)
    # What was announced is what the commit holds.
    if assets(committed(folder), version, date) != built:
        raise Refused("The commit is not what was planned. Look at it, then: git reset HEAD~1")
    write_assets(built, options.output)
    try:
        tag(folder, version, message, options.sign)
    except Refused as refused:
        raise Refused(f"{refused}\nThe release is committed and not tagged. Take the commit back "
                      "with: git reset --hard HEAD~1") from None
    branch = git(folder, "rev-parse", "--abbrev-ref", "HEAD").decode().strip()
    print(f"{sums}\nv{version} is tagged, and its files are in {options.output}. What remains:\n"
          f"  git push origin {branch} v{version}\n"
          f"  put the files of {options.output} on the page of the release")


def rebuild(folder: Path, options: argparse.Namespace) -> None:
    """Build the files of the release that is checked out. Raises Refused."""
    files = committed(folder)
    found = re.search(r"(?m)^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$",
                      files["CHANGELOG.md"].content.decode())
    if not found:
        raise Refused("CHANGELOG.md has no release yet.")
    built = assets(files, found[1], found[2])
    write_assets(built, options.output)
    print(built[SUMS].decode(), end="")


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("version", nargs="?", metavar="VERSION", help="the new version, such as 1.2.3")
    add("--passed", metavar="TESTS", help="which tests passed, and where: stands in the tag")
    add("--date", help="day of the release; by default today",
        default=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"))
    add("--sign", action="store_true", help="sign the tag with the key that git is set up with")
    add("--dry-run", action="store_true", help="show everything and change nothing")
    add("--rebuild", action="store_true", help="only build the files of the checked out release")
    add("--output", type=Path, default=Path("dist"), help="folder for the files; by default dist")
    return parser


def main() -> int:
    """Make a release, or build one again. Returns the exit code."""
    parser = arguments()
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent.parent
    if not options.rebuild and not (options.version and (options.passed or "").strip()):
        parser.error("name the version, and with --passed the tests that passed")
    try:
        datetime.datetime.strptime(options.date, "%Y-%m-%d")
        (rebuild if options.rebuild else release)(folder, options)
    except (Refused, OSError, ValueError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
