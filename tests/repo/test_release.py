"""`tools/release.py`: what a release changes, builds and tags, in a repository of its own."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from project import REPO, clean_env

CHANGELOG = "# Changelog\n\n## Unreleased\n\n- It does more.\n\n## 0.1.0 - 2026-01-01\n\n- Begun.\n"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", REPO / "tools" / "release.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["release"] = module
    spec.loader.exec_module(module)
    return module


release = load_tool()


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def environment() -> dict[str, str]:
    return clean_env(
        HOME="/nonexistent", GIT_CONFIG_NOSYSTEM="1", GIT_AUTHOR_NAME="t", GIT_COMMITTER_NAME="t",
        GIT_AUTHOR_EMAIL="t@example.org", GIT_COMMITTER_EMAIL="t@example.org")


class Repository:
    """A repository with everything in it that says a version, and a few other files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tools").mkdir(parents=True)
        (folder / "tests").mkdir()
        shutil.copy(REPO / "tools" / "release.py", folder / "tools")
        for name in ("ocp_server.py", "ocp_connect.py", "ocp_channels.py", "ocp_tenants.py"):
            (folder / name).write_text('"""x"""\nVERSION = "0.1.0"\nOTHER = "0.1.0"\n')
        (folder / "ocp.py").write_text("#!/usr/bin/env python3\n")
        (folder / "ocp.py").chmod(0o755)
        for name in release._VERSION_IN_JSON:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text('{\n  "version": "0.1.0"\n}\n')
        (folder / "CHANGELOG.md").write_text(CHANGELOG)
        (folder / "tests" / "test_x.py").write_text("")
        (folder / ".gitignore").write_text("dist/\n")
        git(folder, "init", "-q", "-b", "main")
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", "begun")

    def release(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/release.py", *words]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True,
                              env=environment(), check=False)

    def dist(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder / "dist").iterdir()}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


PASSED = ("--passed", "all of them", "--date", "2026-12-01")


def test_every_file_that_says_a_version_says_that_of_the_server() -> None:
    found = release.versions(REPO)
    assert set(found) == {*release.SINGLE, *release._VERSION_IN_JSON}
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("name", release.SINGLE)
def test_a_script_that_is_offered_alone_tells_uv_which_python_it_needs(name: str) -> None:
    lines = (REPO / name).read_text().splitlines()
    assert lines[1:4] == ["# /// script", '# requires-python = ">=3.9"', "# ///"]


def test_a_release_changes_what_says_the_version_and_tags_it(repository: Repository) -> None:
    done = repository.release("0.2.0", *PASSED)
    assert done.returncode == 0, done.stderr
    assert "git push origin main v0.2.0" in done.stdout
    folder = repository.folder
    assert set(release.versions(folder).values()) == {"0.2.0"}
    assert 'OTHER = "0.1.0"' in (folder / "ocp_server.py").read_text()
    changelog = (folder / "CHANGELOG.md").read_text()
    assert changelog == CHANGELOG.replace("Unreleased", "0.2.0 - 2026-12-01")
    assert git(folder, "status", "--porcelain") == ""
    assert git(folder, "log", "-1", "--format=%s") == "Release 0.2.0"
    told = git(folder, "for-each-ref", "--format=%(objecttype) %(contents)", "refs/tags/v0.2.0")
    sums = (folder / "dist" / "SHA256SUMS").read_text()
    assert told == f"tag OCP 0.2.0\n\nTests passed: all of them\n\n{sums}".strip()


def test_the_files_of_a_release_fit_their_sums_and_are_built_the_same_again(
    repository: Repository
) -> None:
    assert repository.release("0.2.0", *PASSED).returncode == 0
    built = repository.dist()
    assert set(built) == {
        "SHA256SUMS", "ocp-0.2.0.tar.gz", "ocp.py", "ocp_channels.py", "ocp_connect.py",
        "ocp_server.py", "ocp_tenants.py"}
    for line in built["SHA256SUMS"].decode().splitlines():
        wanted, _, name = line.partition("  ")
        assert hashlib.sha256(built[name]).hexdigest() == wanted

    shutil.rmtree(repository.folder / "dist")
    (repository.folder / "ocp.py").touch()
    again = repository.release("--rebuild")

    assert again.returncode == 0, again.stderr
    assert repository.dist() == built


def test_the_archive_is_sorted_and_names_no_user_and_no_time_of_its_making(
    repository: Repository
) -> None:
    assert repository.release("0.2.0", *PASSED).returncode == 0
    packed = gzip.decompress(repository.dist()["ocp-0.2.0.tar.gz"])
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        members = tar.getmembers()
    names = [member.name for member in members]
    assert names == sorted(names) and "ocp-0.2.0/ocp_server.py" in names
    assert not [name for name in names if "tests/" in name or "tools/" in name or "/." in name]
    assert {(each.uid, each.gid, each.uname, each.gname, each.mtime) for each in members} == {
        (0, 0, "root", "root", 1_796_083_200)}
    modes = {member.name: member.mode for member in members}
    assert modes["ocp-0.2.0/ocp.py"] == 0o755 and modes["ocp-0.2.0/ocp_server.py"] == 0o644


def test_a_dry_run_shows_what_would_be_tagged_and_changes_nothing(repository: Repository) -> None:
    before = git(repository.folder, "for-each-ref")
    shown = repository.release("0.2.0", *PASSED, "--dry-run")
    assert shown.returncode == 0 and '+VERSION = "0.2.0"' in shown.stdout
    assert git(repository.folder, "for-each-ref") == before
    assert git(repository.folder, "status", "--porcelain") == ""
    assert not (repository.folder / "dist").exists()
    # The sums are those that the release then has.
    assert repository.release("0.2.0", *PASSED).returncode == 0
    assert repository.dist()["SHA256SUMS"].decode() in shown.stdout


@pytest.mark.parametrize("words, reason", [
    (("0.2.0",), "--passed the tests that passed"),
    (("0.2.0", "--passed", " "), "--passed the tests that passed"),
    (("0.2", *PASSED), "not a version such as 1.2.3"),
    (("0.0.9", *PASSED), "not newer than 0.1.0"),
    (("0.2.0", "--passed", "x", "--date", "today"), "does not match format"),
])
def test_a_release_without_its_reasons_is_refused(
    words: tuple[str, ...], reason: str, repository: Repository
) -> None:
    done = repository.release(*words)
    assert done.returncode in (1, 2) and reason in done.stderr
    assert git(repository.folder, "log", "--format=%s") == "begun"


def test_a_changed_tree_and_an_empty_changelog_are_refused(repository: Repository) -> None:
    changelog = repository.folder / "CHANGELOG.md"
    changelog.write_text("# Changelog\n\n## Unreleased\n\n## 0.1.0 - 2026-01-01\n")
    assert "changes that are not committed" in repository.release("0.2.0", *PASSED).stderr
    git(repository.folder, "commit", "-qam", "nothing to tell")
    assert "has nothing under" in repository.release("0.2.0", *PASSED).stderr


def test_a_release_that_there_is_already_is_refused(repository: Repository) -> None:
    assert repository.release("0.2.0", *PASSED).returncode == 0
    assert "is not newer than 0.2.0" in repository.release("0.2.0", *PASSED).stderr


def test_a_release_that_cannot_be_signed_says_how_to_take_its_commit_back(
    repository: Repository
) -> None:
    git(repository.folder, "config", "gpg.program", "false")
    done = repository.release("0.2.0", *PASSED, "--sign")
    assert done.returncode == 1 and "git reset --hard HEAD~1" in done.stderr
    git(repository.folder, "reset", "-q", "--hard", "HEAD~1")
    assert repository.release("0.2.0", *PASSED).returncode == 0


def test_where_signers_are_named_a_release_has_to_be_signed(repository: Repository) -> None:
    folder = repository.folder
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not installed")
    key = folder.parent / "key"
    subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", str(key)], check=True)
    public = key.with_suffix(".pub").read_text()
    (folder / "tools" / "allowed_signers").write_text(f"t@example.org {public}")
    git(folder, "add", "tools/allowed_signers")
    git(folder, "commit", "-qm", "signers")
    assert "use --sign" in repository.release("0.2.0", *PASSED).stderr
    git(folder, "config", "gpg.format", "ssh")
    git(folder, "config", "user.signingkey", str(key))

    done = repository.release("0.2.0", *PASSED, "--sign")

    assert done.returncode == 0, done.stderr
    assert "BEGIN SSH SIGNATURE" in git(folder, "cat-file", "tag", "v0.2.0")
