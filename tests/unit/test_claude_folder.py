"""The folders that claude gets: nothing in them or in their paths says who the owner is."""
from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from project import load_script

ocp = load_script("ocp_server.py")

Json = dict[str, Any]

ACCOUNT = {
    "accountUuid": "u1", "organizationUuid": "o1", "billingType": "stripe_subscription",
    "emailAddress": "me@example.com", "displayName": "Me", "fullName": "Me Too",
    "organizationName": "me@example.com's Organization", "someNewName": "Me",
}
FETCHED_IN_2100 = {"profileFetchedAt": 4_102_444_800_000}


class Events:
    """Stands for the log."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def event(self, level: str, name: str, **fields: object) -> None:
        self.names.append(name)


def folder_of(
    tmp_path: Path, account: Json | None = ACCOUNT, log: Events | None = None, **options: Any
) -> Any:
    """The folder of a server whose owner has this account."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    if account is not None:
        (home / ".claude.json").write_text(json.dumps({"oauthAccount": account}))
    environ = {"HOME": str(home), **options.pop("environ", {})}
    return ocp.ClaudeFolder(str(tmp_path / "own"), environ, log or Events(), **options)


def written(tmp_path: Path) -> Json:
    found: Json = json.loads((tmp_path / "own" / ".claude.json").read_text())
    return found


def test_claude_finds_the_account_without_address_and_names(tmp_path: Path) -> None:
    variables = folder_of(tmp_path).environment()

    assert variables == {
        "CLAUDE_CONFIG_DIR": str(tmp_path / "own"), "CLAUDE_SECURESTORAGE_CONFIG_DIR": ""}
    assert written(tmp_path) == {
        "hasCompletedOnboarding": True,
        "oauthAccount": {"accountUuid": "u1", "organizationUuid": "o1",
                         "billingType": "stripe_subscription", "accountCreatedAt": None,
                         "subscriptionCreatedAt": None, "ccOnboardingFlags": {},
                         **FETCHED_IN_2100},
    }
    for path in (tmp_path / "own", tmp_path / "own" / ".claude.json"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"oauthAccount": 7}', "{}"])
def test_without_an_account_claude_is_kept_from_asking_for_one(
    tmp_path: Path, content: str | None
) -> None:
    found = folder_of(tmp_path, account=None)
    if content is not None:
        (tmp_path / "home" / ".claude.json").write_text(content)

    found.environment()

    assert written(tmp_path)["oauthAccount"] == {
        "billingType": None, "accountCreatedAt": None, "subscriptionCreatedAt": None,
        "ccOnboardingFlags": {}, **FETCHED_IN_2100,
    }


def test_what_claude_keeps_there_itself_stays_but_never_an_address(tmp_path: Path) -> None:
    found = folder_of(tmp_path)
    found.environment()
    told = {**written(tmp_path), "numStartups": 4, "oauthAccount": ACCOUNT}
    (tmp_path / "own" / ".claude.json").write_text(json.dumps(told))

    found.environment()

    assert written(tmp_path)["numStartups"] == 4
    assert "me@example.com" not in (tmp_path / "own" / ".claude.json").read_text()


def test_another_login_is_taken_over_at_the_next_start(tmp_path: Path) -> None:
    found = folder_of(tmp_path)
    found.environment()
    folder_of(tmp_path, account={**ACCOUNT, "accountUuid": "u2"})

    found.environment()

    assert written(tmp_path)["oauthAccount"]["accountUuid"] == "u2"


def test_the_owner_s_own_folder_is_where_account_and_login_are(tmp_path: Path) -> None:
    own = tmp_path / "elsewhere"
    own.mkdir()
    (own / ".claude.json").write_text(json.dumps({"oauthAccount": {"accountUuid": "u3"}}))

    variables = folder_of(tmp_path, environ={"CLAUDE_CONFIG_DIR": str(own)}).environment()

    assert variables["CLAUDE_SECURESTORAGE_CONFIG_DIR"] == str(own)
    assert written(tmp_path)["oauthAccount"]["accountUuid"] == "u3"


def test_a_folder_that_cannot_be_written_is_told_once_and_not_used(tmp_path: Path) -> None:
    log = Events()
    (tmp_path / "own").write_text("a file")
    found = folder_of(tmp_path, log=log)

    assert [found.environment(), found.environment()] == [{}, {}]
    assert (found.is_private, log.names) == (False, ["owner_not_hidden"])


@pytest.mark.parametrize(
    ("in_private", "in_own", "is_private"),
    [(True, True, True), (True, False, True), (False, False, True), (False, True, False)],
)
def test_where_the_login_is_only_in_the_owner_s_folder_that_one_is_used(
    tmp_path: Path, in_private: bool, in_own: bool, is_private: bool
) -> None:
    asked: list[bool] = []

    def logged_in(variables: Mapping[str, str]) -> bool:
        asked.append(bool(variables))
        return in_private if variables else in_own

    found = folder_of(tmp_path, logged_in=logged_in)

    assert bool(found.environment()) is bool(found.environment()) is is_private
    assert found.is_private is is_private
    assert len(asked) == len(set(asked))


def test_after_another_login_the_private_folder_is_tried_again(tmp_path: Path) -> None:
    answers = {True: False, False: True}
    found = folder_of(tmp_path, logged_in=lambda variables: answers[bool(variables)])
    assert found.environment() == {}

    answers[True] = True
    found.login_changed()

    assert found.environment() != {}


# -- the folder that claude works in --------------------------------------------


def work_folder(tmp_path: Path, **environ: str) -> str:
    config = ocp.load_config({"OCP_HOME": str(tmp_path / "ocp"), **environ})
    found: str = ocp.work_folder(config, {"HOME": str(tmp_path / "olga"), **environ})
    return found


def test_the_working_folder_is_empty_and_stays_the_same(tmp_path: Path) -> None:
    found = work_folder(tmp_path, TMPDIR=str(tmp_path))

    assert found == work_folder(tmp_path, TMPDIR=str(tmp_path))
    assert found == str(tmp_path / f"ocp-{os.getuid()}")
    assert os.listdir(found) == []
    assert stat.S_IMODE(os.stat(found).st_mode) == 0o700


def test_a_folder_for_temporary_files_in_the_home_is_not_used(tmp_path: Path) -> None:
    inside = tmp_path / "olga" / "tmp"
    inside.mkdir(parents=True)

    assert "olga" not in work_folder(tmp_path, TMPDIR=str(inside))


def test_a_link_in_the_place_of_the_working_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"ocp-{os.getuid()}").symlink_to(tmp_path / "theirs")

    found = work_folder(tmp_path, TMPDIR=str(tmp_path))

    assert found.startswith(str(tmp_path / "ocp-"))
    assert not os.path.islink(found)


def test_agents_work_in_a_folder_that_lasts(tmp_path: Path) -> None:
    named = str(tmp_path / "project")

    assert work_folder(tmp_path, CLAUDE_ALLOWED_TOOLS="default") == str(tmp_path / "ocp" / "empty")
    assert work_folder(tmp_path, CLAUDE_ALLOWED_TOOLS="Read", OCP_AGENT_FOLDER=named) == named
