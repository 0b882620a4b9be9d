"""Nothing of the owner reaches a prompt, and nothing of a conversation stays on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stub_api as stub
from conversation import Conversation
from depth import rest
from dialects import CHAT, TOOL_DIALECTS, Dialect, Result, Tool
from rig import MODEL, NEWEST_MODEL, Claude, Rig, running_rig, wait_until

Json = Any

#: What the owner's own files say, and nobody else may hear.
OWNER = {
    "accountUuid": "5e1f0000-0000-4000-8000-00000000aaaa",
    "organizationUuid": "5e1f0000-0000-4000-8000-00000000bbbb",
    "emailAddress": "owner.secret@example.com",
    "displayName": "Olga Ownerova",
    "fullName": "Olga Petrovna Ownerova",
    "organizationName": "owner.secret@example.com's Organization",
    "organizationRole": "admin",
    "billingType": "stripe_subscription",
    "hasExtraUsageEnabled": False,
}
WORDS = ("owner.secret", "Olga", "Ownerova", "ownerhome", "xonsh")


def logged_in_home(folder: Path) -> Path:
    """A home whose owner has logged in to claude, as `claude auth login` leaves it."""
    home = folder / "ownerhome"
    (home / ".claude").mkdir(parents=True)
    (home / ".claude.json").write_text(json.dumps({
        "hasCompletedOnboarding": True, "numStartups": 3, "oauthAccount": OWNER,
        "projects": {str(home): {"allowedTools": []}},
    }))
    (home / ".claude" / ".credentials.json").write_text(json.dumps({"claudeAiOauth": {
        "accessToken": "sk-ant-oat01-of-the-file", "refreshToken": "sk-ant-ort01-x",
        "expiresAt": 4102444800000, "scopes": ["user:inference", "user:profile"],
        "subscriptionType": "max",
    }}))
    return home


@pytest.fixture(scope="module")
def owned(claude: Claude, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A server whose owner is logged in by files in the home, not by a token in the environment."""
    folder = tmp_path_factory.mktemp("owned")
    home = logged_in_home(folder)
    ocp_home = home / ".ocp"
    settings = {"HOME": str(home), "OCP_HOME": str(ocp_home), "CLAUDE_CODE_OAUTH_TOKEN": None,
                "SHELL": "/opt/ownerhome/xonsh"}
    with running_rig(folder, claude, **settings) as rig:
        yield rig


@pytest.mark.differs_by_version
@pytest.mark.parametrize("model", [NEWEST_MODEL, *rest(MODEL)])
@pytest.mark.parametrize("dialect", TOOL_DIALECTS, ids=lambda each: each.name)
def test_no_prompt_says_who_the_owner_is(owned: Rig, dialect: Dialect, model: str) -> None:
    owned.begin()
    owned.script(stub.tool_calls([("weather", {"city": "Rome"})]), stub.text("Warm."))
    talk = Conversation(owned, dialect, [Tool("weather")], "Be kind.", model=model)
    call = talk.ask("What is my e-mail address?").call
    talk.send_results([(call.id, Result("warm"))])
    bodies = owned.bodies()
    assert len(bodies) == 2
    for body in bodies:
        told = json.dumps(body, ensure_ascii=False)
        assert [word for word in WORDS if word in told] == []


def files_with(folder: Path, words: list[str]) -> list[str]:
    """The files below a folder whose names or contents hold one of the words."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        if any(word in str(path) or word.encode() in content for word in words):
            found.append(str(path.relative_to(folder)))
    return found


@pytest.mark.parametrize("dialect", TOOL_DIALECTS, ids=lambda each: each.name)
def test_no_word_of_a_conversation_stays_on_disk(
    claude: Claude, tmp_path: Path, dialect: Dialect
) -> None:
    home = logged_in_home(tmp_path)
    words = ["zquestion", "zfailed", "zresult", "zanswer", "zaborted"]
    settings = {"HOME": str(home), "OCP_HOME": str(home / ".ocp"),
                "XDG_CACHE_HOME": str(home / "caches"), "CLAUDE_CODE_OAUTH_TOKEN": None,
                "OCP_WARM_PROCESSES": "0"}
    with running_rig(tmp_path, claude, **settings) as rig:
        rig.script(
            stub.tool_calls([("weather", {"city": "zresult"}), ("weather", {"city": "b"})]),
            stub.text("zanswer"), stub.text("zaborted", gap_s=3.0))
        talk = Conversation(rig, dialect, [Tool("weather")], "zquestion: be kind.")
        first, second = talk.ask("zquestion").calls
        failed = Result("zfailed, on a rainy day", is_error=dialect.name == "messages")
        assert talk.send_results([(first.id, failed), (second.id, Result("zresult", [BLACK]))]
                                 ).text == "zanswer"
        talk.messages.append({"role": "user", "content": "zquestion again"})
        with rig.server.stream(talk.dialect.path, talk.body()):
            wait_until(lambda: len(rig.bodies()) == 3)
        assert claude_sockets(tmp_path) == []
    assert files_with(tmp_path, words) == []


BLACK = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


def claude_sockets(folder: Path) -> list[str]:
    """The sockets on which a claude listens for other sessions of the same user."""
    return [str(path) for path in folder.rglob("*") if path.is_socket()]


def test_the_working_folder_says_nothing_of_the_owner(owned: Rig) -> None:
    owned.begin()
    owned.script(stub.text("Hi."))
    Conversation(owned, CHAT, model=MODEL).ask("Hello?")
    assert "ownerhome" not in json.dumps(owned.last_body())
    assert "ocp-" in json.dumps(owned.last_body()) or owned.is_old
