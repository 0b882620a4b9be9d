"""The uninstaller: records walked backwards, what stays, and what is found without a record."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import pytest

import fake_services
from fake_services import FakeServices
from ocp_command import Stream
from project import load_script

Json = Any
uninstall: ModuleType = load_script("uninstall")


class UninstallMachine:
    """A HOME with a record in it, and stand-ins of the service managers without processes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = folder / "a home"
        self.ocp = self.home / ".ocp"
        self.units = self.home / ".config/systemd/user"
        self.agents = self.home / "Library/LaunchAgents"
        for path in (self.ocp, self.units, self.agents):
            path.mkdir(parents=True)
        self.services = FakeServices(folder, ())
        monkeypatch.setattr(fake_services, "STATE", self.services.state)
        monkeypatch.setattr(uninstall.subprocess, "run", self.services.answer)

    def record(self, *actions: Json, **fields: Json) -> None:
        text = {"version": 1, "data_dir": str(self.ocp), "actions": actions, **fields}
        (self.ocp / "install.json").write_text(json.dumps(text))

    def file(self, name: str, text: str, backup: Optional[str] = None, **fields: Json) -> Json:
        """A file that was installed, and its entry; with the backup of what was there."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        kept = path.with_name(path.name + ".ocp-backup") if backup is not None else None
        if kept:
            kept.write_text(str(backup))
        return {
            "kind": "write_file", "path": str(path), "backup": str(kept) if kept else None,
            "sha256": [uninstall.checksum(str(path))], "then": [], "data": False, **fields}

    def run(self, *arguments: str, system: str = "Linux") -> int:
        return int(uninstall.main(list(arguments), {"HOME": str(self.home)}, system))

    def names(self) -> set[str]:
        """The files below HOME."""
        return {str(path.relative_to(self.home)) for path in self.home.rglob("*")
                if not path.is_dir()}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UninstallMachine:
    return UninstallMachine(tmp_path, monkeypatch)


def command(*undo: str) -> Json:
    return {"kind": "run", "path": None, "backup": None, "command": [], "undo": list(undo)}


def test_a_record_is_undone_backwards_and_then_nothing_is_left(
    machine: UninstallMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    reload = ["systemctl", "--user", "daemon-reload"]
    entries = [
        {"kind": "make_dir", "path": str(machine.home / "made"), "backup": None},
        machine.file("made/unit", "unit", then=reload),
        command("systemctl", "--user", "disable", "--now", "ocp.service"),
        command(),
        command("loginctl", "disable-linger", "me"),
    ]
    machine.services.set("enabled", "ocp.service")
    machine.record(*entries)
    assert machine.run("--yes") == 0
    assert machine.services.calls() == [
        "loginctl disable-linger me", "systemctl --user disable --now ocp.service",
        " ".join(reload)]
    assert machine.names() == set() and not (machine.home / "made").exists()
    assert not machine.ocp.exists()
    capsys.readouterr()
    assert machine.run() == 0
    assert "Nothing of OCP's service is left here." in capsys.readouterr().out


def test_what_is_gone_already_is_no_failure(machine: UninstallMachine) -> None:
    gone = machine.file("gone", "text")
    os.unlink(gone["path"])
    machine.record(
        {"kind": "make_dir", "path": str(machine.home / "never made"), "backup": None}, gone,
        command("systemctl", "--user", "disable", "--now", "ocp.service"),
        command("launchctl", "bootout", "gui/501/dev.ocp.server"))
    assert machine.run("--yes") == 0
    assert machine.names() == set()


def test_backups_come_back_and_changed_files_stay(
    machine: UninstallMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = machine.file("changed", "as installed")
    changed_too = machine.file("changed too", "as installed", backup="as before")
    machine.record(machine.file("launcher", "ours", backup="theirs"), changed, changed_too)
    (machine.home / "changed").write_text("by its owner")
    (machine.home / "changed too").write_text("by its owner")
    assert machine.run("--yes") == 0
    shown = capsys.readouterr().out
    assert (machine.home / "launcher").read_text() == "theirs"
    assert machine.names() == {"launcher", "changed", "changed too", "changed too.ocp-backup"}
    assert shown.count("kept: it was changed since") == 2
    assert "changed too.ocp-backup is what was there" in shown


def test_a_backup_whose_new_file_was_never_written_goes_quietly(machine: UninstallMachine) -> None:
    entry = machine.file("launcher", "theirs", backup="theirs", sha256=["of what never came"])
    machine.record(entry)
    assert machine.run("--yes") == 0
    assert machine.names() == {"launcher"}


def test_data_stays_unless_it_is_purged(
    machine: UninstallMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = machine.file(".ocp/ocp.env", "A=1", data=True)
    (machine.ocp / "ocp.db").write_text("keys")
    machine.record(settings)
    assert machine.run("--yes") == 0
    assert machine.names() == {".ocp/ocp.env", ".ocp/ocp.db"}
    assert "--purge removes it" in capsys.readouterr().out
    assert machine.run("--yes") == 0
    assert "--purge removes it" in capsys.readouterr().out
    assert machine.run("--yes", "--purge") == 0
    assert not machine.ocp.exists()
    assert machine.run("--yes", "--purge") == 0


def test_settings_that_the_user_changed_are_purged_too(machine: UninstallMachine) -> None:
    machine.record(machine.file(".ocp/ocp.env", "A=1", data=True))
    (machine.ocp / "ocp.env").write_text("A=2")
    assert machine.run("--yes", "--purge") == 0
    assert machine.names() == set()


@pytest.mark.parametrize("data_dir", ["", "documents", ".."])
def test_purge_never_removes_a_folder_that_is_not_ours(
    data_dir: str, machine: UninstallMachine
) -> None:
    (machine.home / "documents").mkdir()
    (machine.home / "documents/letter").write_text("dear")
    machine.record(data_dir=str(machine.home / data_dir))
    assert machine.run("--yes", "--purge") == 0
    assert machine.names() == {"documents/letter"}


def test_a_dry_run_changes_nothing(
    machine: UninstallMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.record(machine.file("launcher", "ours"), command("systemctl", "disable", "x"))
    before = machine.names()
    assert machine.run("--dry-run", "--purge") == 0
    shown = capsys.readouterr().out
    assert "remove ~/launcher" in shown and "run systemctl disable x" in shown
    assert "WITH ALL KEYS" in shown
    assert machine.names() == before and machine.services.calls() == []


def test_without_a_terminal_nothing_is_done_unasked(
    machine: UninstallMachine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.record(machine.file("launcher", "ours"))
    assert machine.run() == 2
    monkeypatch.setattr(sys, "stdin", None)
    assert machine.run() == 2
    assert "--yes" in capsys.readouterr().err and "launcher" in machine.names()


@pytest.mark.parametrize("answer, code", [("n\n", 1), ("\n", 1), ("", 1), ("y\n", 0), ("YES\n", 0)])
def test_only_a_yes_on_the_terminal_removes_anything(
    machine: UninstallMachine, capsys: pytest.CaptureFixture[str], answer: str, code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine.record(machine.file("launcher", "ours"))
    monkeypatch.setattr(sys, "stdin", Stream(answer, terminal=True))
    assert machine.run() == code
    assert ("launcher" in machine.names()) is bool(code)
    assert ("Nothing was changed" in capsys.readouterr().err) is bool(code)


@pytest.mark.parametrize("answer, is_removed", [("n\n", False), ("", False), ("y\n", True)])
def test_a_service_of_the_original_needs_a_yes_of_its_own(
    machine: UninstallMachine, answer: str, is_removed: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    unit = machine.home / ".config/systemd/user/ocp-proxy.service"
    unit.parent.mkdir(parents=True, exist_ok=True)
    unit.write_text("[Service]\n")
    monkeypatch.setattr(sys, "stdin", Stream("y\n" + answer, terminal=True))
    assert machine.run() == 0
    assert unit.exists() is not is_removed


def test_what_cannot_be_undone_stays_in_the_record_for_the_next_run(
    machine: UninstallMachine
) -> None:
    stop = command("systemctl", "--user", "disable", "--now", "ocp.service")
    machine.record(machine.file("unit", "ours"), stop)
    machine.services.set("enabled", "ocp.service")
    machine.services.set("unreachable")
    assert machine.run("--yes", "--purge") == 1
    assert json.loads((machine.ocp / "install.json").read_text())["actions"] == [stop]
    machine.services.set("unreachable", None)
    assert machine.run("--yes", "--purge") == 0
    assert not machine.services.get("enabled") and not machine.ocp.exists()


def test_an_interrupted_run_goes_on_where_it_was(
    machine: UninstallMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.record(machine.file("a", "x"), machine.file("b", "x"), machine.file("c", "x"))
    real, calls = uninstall.remove_file, 0

    def failing(path: str) -> bool:
        nonlocal calls
        calls += path.endswith(("/a", "/b", "/c"))
        if calls == 2:
            raise KeyboardInterrupt
        return bool(real(path))

    with monkeypatch.context() as patch:
        patch.setattr(uninstall, "remove_file", failing)
        assert machine.run("--yes") == 130
    assert [Path(entry["path"]).name for entry in json.loads(
        (machine.ocp / "install.json").read_text())["actions"]] == ["a", "b"]
    assert machine.run("--yes") == 0
    assert machine.names() == set()


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"version": 2, "actions": []}', '{"version": 1}',
    '{"version": 1, "actions": [{"kind": "magic"}]}',
])
def test_a_record_that_cannot_be_understood_is_refused(
    text: str, machine: UninstallMachine
) -> None:
    (machine.ocp / "install.json").write_text(text)
    assert machine.run("--yes", "--purge") == 2
    assert machine.names() == {".ocp/install.json"}


def test_our_own_service_is_found_without_a_record(machine: UninstallMachine) -> None:
    (machine.units / "ocp.service").write_text("[Service]")
    machine.services.set("enabled", "ocp.service")
    assert machine.run("--yes") == 0
    assert machine.names() == set() and not machine.services.get("enabled")
    assert "systemctl --user daemon-reload" in machine.services.calls()


def test_services_of_the_original_need_a_yes_of_their_own(
    machine: UninstallMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("ocp-proxy.service", "openclaw-proxy.service", "somebody-else.service"):
        (machine.units / label).write_text("[Service]")
    assert machine.run("--yes") == 0
    assert len(machine.names()) == 3
    assert "ocp-proxy.service stays; --legacy removes it" in capsys.readouterr().out
    assert machine.run("--yes", "--legacy") == 0
    assert machine.names() == {".config/systemd/user/somebody-else.service"}


def test_agents_of_the_original_are_known_too(machine: UninstallMachine) -> None:
    for label in ("dev.ocp.server", "dev.ocp.proxy", "ai.openclaw.proxy"):
        (machine.agents / f"{label}.plist").write_text("x")
    machine.services.set("active", "dev.ocp.proxy")
    assert machine.run("--yes", "--legacy", system="Darwin") == 0
    assert machine.names() == set() and not machine.services.get("active")


@pytest.mark.parametrize(("has_path", "has_backup", "left", "words"), [
    (False, True, {"unit": "theirs"}, "put back as it was before"),
    (True, False, {"unit": "another"}, "never moved"),
    (False, False, {}, "already gone"),
    (True, True, {"unit": "another", "unit.ocp-backup": "theirs"}, "is what was there"),
])
def test_a_file_that_was_moved_away_comes_back(
    machine: UninstallMachine, has_path: bool, has_backup: bool, left: dict[str, str], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, backup = machine.home / "unit", machine.home / "unit.ocp-backup"
    if has_path:
        path.write_text("another")
    if has_backup:
        backup.write_text("theirs")
    machine.record({"kind": "move_file", "path": str(path), "backup": str(backup), "then": []})
    assert machine.run("--yes") == 0
    assert {name: (machine.home / name).read_text() for name in machine.names()} == left
    assert words in capsys.readouterr().out


def test_a_service_of_the_machine_is_looked_for_only_when_that_is_said(
    machine: UninstallMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = machine.home / "lib"
    folder.mkdir()
    (folder / "ocp.db").write_text("keys")
    monkeypatch.setattr(uninstall, "_SYSTEM_FOLDERS", (str(folder),))
    monkeypatch.setattr(uninstall.os, "getuid", lambda: 1000)
    assert machine.run("--yes", "--purge") == 0 and folder.exists()
    assert machine.run("--yes", "--purge", "--system") == 2 and folder.exists()
    monkeypatch.setattr(uninstall.os, "getuid", lambda: 0)
    options = uninstall.argument_parser().parse_args(["--purge", "--system", "--dry-run"])
    session = uninstall.this_session({"HOME": str(machine.home)}, options)
    assert str(folder) in uninstall.prepare(session, options, "Linux").data
