"""What ocp_connect.py does to OpenClaw: the registration, and the list of models kept up to date.

OpenClaw itself is a small program here, which reads, merges and refuses as the real one does;
tests/clients/test_openclaw.py does the same with that one. Without it on the PATH the file is
edited.
"""
from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from connect_home import KEY, MODELS, OTHER, SERVER, Home
from processes import Ran
from project import load_script
from server import Server

connect = load_script("ocp_connect")
Json = Any

PRIMARY, BACKUP = connect.Role.PRIMARY, connect.Role.BACKUP
KEYLESS = SERVER._replace(key="")
URL = "http://127.0.0.1:3456"

#: OpenClaw as far as it is asked anything. Beside it, a file `refuse` holds what it is to
#: complain of when it should change its configuration.
FAKE_OPENCLAW = r'''
import json, os, re, sys

HERE = os.path.dirname(os.path.abspath(__file__))
PATH = os.environ.get("OPENCLAW_CONFIG_PATH") or os.path.join(
    os.environ["HOME"], ".openclaw", "openclaw.json")


def load():
    if not os.path.exists(PATH):
        return {}
    with open(PATH) as file:
        text = re.sub(r"^\s*//.*$", "", file.read(), flags=re.M)
    return json.loads(re.sub(r",(\s*[}\]])", r"\1", text))


def complain(name):
    place = os.path.join(HERE, name)
    if os.path.exists(place):
        with open(place) as file:
            sys.exit(file.read())


def names(path):
    return [quoted or plain for quoted, plain in re.findall(r'\["([^"]+)"\]|([^.\[\]]+)', path)]


def ids(value):
    return [row.get("id") for row in value if isinstance(row, dict)]


def merged(now, patch, path, replaced):
    if isinstance(now, list) and isinstance(patch, list) and path not in replaced:
        gone = [each for each in ids(now) if each is not None and each not in ids(patch)]
        if gone:
            sys.exit("Refusing to replace %s; it would remove existing entries: %s."
                     % (".".join(path), ", ".join(gone)))
    if not isinstance(patch, dict):
        return patch
    now = dict(now) if isinstance(now, dict) else {}
    for name, value in patch.items():
        if value is None:
            now.pop(name, None)
        else:
            now[name] = merged(now.get(name), value, [*path, name], replaced)
    return now


with open(os.path.join(HERE, "calls.jsonl"), "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\n")
if sys.argv[1:3] == ["config", "file"]:
    print(PATH)
elif sys.argv[1:4] == ["config", "patch", "--stdin"]:
    complain("refuse")
    words = sys.argv[4:]
    assert words[::2] == ["--replace-path"] * (len(words) // 2), words
    whole = merged(load(), json.load(sys.stdin), [], [names(path) for path in words[1::2]])
    whole.setdefault("meta", {})["lastTouchedVersion"] = "2026.9.6"
    os.makedirs(os.path.dirname(PATH), exist_ok=True)
    with open(PATH, "w") as file:
        file.write(json.dumps(whole, indent=2) + "\n")
    os.chmod(PATH, 0o600)
    print("Applied 1 config update(s).")
else:
    sys.exit("unknown command")
'''


PROGRAM = f"#!{sys.executable} -IS\n{FAKE_OPENCLAW}"
CODE = compile(FAKE_OPENCLAW, "openclaw", "exec")
RUN_COMMAND = connect.run_command


def run_command(
    command: Sequence[str], environ: Mapping[str, str], stdin: str = "", timeout_s: float = 60
) -> Any:
    """What connect.run_command does, with the program above in this process."""
    program = shutil.which(command[0], path=environ["PATH"])
    if not program or Path(program).read_bytes() != PROGRAM.encode():
        return RUN_COMMAND(command, environ, stdin, timeout_s)
    code, error, output = 0, "", io.StringIO()
    with contextlib.redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(environ))
        patch.setattr(sys, "argv", [program, *command[1:]])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            exec(CODE, {"__file__": program})
        except SystemExit as end:
            code, error = 1, f"{end}\n"
    return connect.Ran(code, output.getvalue(), error)


class Lab(Home):
    """A home in which there is OpenClaw, or at least its file."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(folder)
        self.capsys = capsys
        self.file = folder / ".openclaw/openclaw.json"
        self.machine = connect.dataclasses.replace(
            self.machine, environ={**self.machine.environ, "HOME": str(folder)})

    def install(self) -> None:
        """Puts OpenClaw on the PATH."""
        self.put("bin/openclaw", PROGRAM).chmod(0o755)

    def complain(self, words: str) -> None:
        """Makes OpenClaw refuse every change with these words."""
        self.put("bin/refuse", words)

    def has(self, config: Json) -> bytes:
        """Gives OpenClaw this configuration, a value or the text itself; its bytes."""
        text = config if isinstance(config, str) else json.dumps(config, indent=2) + "\n"
        return self.put(".openclaw/openclaw.json", text).read_bytes()

    def config(self) -> Json:
        return json.loads(self.file.read_text())

    def providers(self) -> Json:
        return self.config()["models"]["providers"]

    def edit(self, change: Mapping[str, Json]) -> None:
        """Somebody adds something at the top of the file."""
        self.file.write_text(json.dumps({**self.config(), **change}, indent=2) + "\n")

    def copies(self) -> list[Path]:
        """The copies beside the file."""
        return sorted(self.file.parent.glob("openclaw.json.ocp-*"))

    def run(self, *args: str) -> Ran:
        """The script as it is run, without a terminal."""
        self.capsys.readouterr()
        error = ""
        try:
            code = int(connect.program(args, self.machine, connect.Terminal("/nowhere")))
        except connect.Problem as problem:
            code, error = int(problem.code), str(problem)
        said = self.capsys.readouterr()
        return Ran(code, said.out, said.err + error)


@pytest.fixture
def bare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Lab:
    """A home without the program."""
    monkeypatch.setattr(connect, "run_command", run_command)
    return Lab(tmp_path / "home", capsys)


@pytest.fixture
def lab(bare: Lab) -> Lab:
    """A home with the program."""
    bare.install()
    return bare


@pytest.fixture(params=["program", "file"])
def either(request: pytest.FixtureRequest, bare: Lab) -> Lab:
    """One of both."""
    if request.param == "program":
        bare.install()
    return bare


@pytest.mark.parametrize(("words", "stdin"), [
    (("config", "file"), ""), (("config", "patch", "--stdin"), '{"a": {"b": 1}}'),
    (("config", "patch", "--stdin"), '{"list": [{"id": "b"}]}'), (("nonsense",), "")])
def test_openclaw_says_here_what_it_says_as_a_program(
    lab: Lab, words: tuple[str, ...], stdin: str
) -> None:
    ran = []
    for run in (run_command, RUN_COMMAND):
        lab.has({"list": [{"id": "a"}]})
        ran.append((run(("openclaw", *words), lab.machine.environ, stdin), lab.file.read_bytes()))

    assert ran[0] == ran[1]


# ---------------------------------------------------------------------------
# The provider
# ---------------------------------------------------------------------------

def test_with_a_key_the_provider_names_the_file_that_holds_it(either: Lab) -> None:
    either.connect("openclaw")

    config = either.config()
    secret, key_file = config["secrets"]["providers"]["ocp"], either.folder / ".config/ocp/key"
    assert secret == {"source": "file", "path": str(key_file), "mode": "singleValue"}
    assert config["models"]["providers"]["claude-local"]["apiKey"] == {
        "source": "file", "provider": "ocp", "id": "value"}
    assert key_file.read_text().strip() == KEY and KEY not in either.file.read_text()
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600


def test_an_openclaw_elsewhere_gets_its_own_address_and_path_of_the_key(either: Lab) -> None:
    original = either.has({"gateway": {"port": 1}})
    there = {"openclaw_url": "http://172.17.0.1:3456", "openclaw_key_path": "/state/ocp-key"}

    either.connect("openclaw", **there)

    assert either.providers()["claude-local"]["baseUrl"] == "http://172.17.0.1:3456/v1"
    assert either.config()["secrets"]["providers"]["ocp"]["path"] == "/state/ocp-key"
    assert not (either.folder / ".config/ocp/key").exists()
    assert not either.plan("openclaw", **there).edits
    either.connect("openclaw", **{**there, "openclaw_url": "http://host.docker.internal:3456"})
    assert [row["baseUrl"] for row in either.providers().values()] == [
        "http://host.docker.internal:3456/v1"]
    either.undo("openclaw")
    assert either.file.read_bytes() == original


@pytest.mark.parametrize(("word", "complaint"), [
    ("--openclaw-url=172.17.0.1:3456", "is not an address"),
    ("--openclaw-url=http://a b", "is not an address"),
    ("--openclaw-key-path=key", "is not an absolute path"),
    ("--openclaw-key-path=/a\nb", "is not an absolute path")])
def test_an_address_or_path_elsewhere_that_is_none_is_refused(
    bare: Lab, capsys: pytest.CaptureFixture[str], word: str, complaint: str
) -> None:
    with pytest.raises(SystemExit):
        bare.run("127.0.0.1", word)

    assert complaint in capsys.readouterr().err


def test_without_a_key_there_is_openclaws_word_for_none(either: Lab) -> None:
    either.connect("openclaw", server=KEYLESS)

    assert either.providers()["claude-local"]["apiKey"] == "custom-local"
    assert "secrets" not in either.config()


def test_openclaw_entries_are_what_openclaw_accepts(either: Lab) -> None:
    either.connect("openclaw")

    config = either.config()
    provider = config["models"]["providers"]["claude-local"]
    assert set(config) - {"meta"} == {"secrets", "models", "agents"}
    assert set(config["agents"]["defaults"]) == {"model"}
    assert provider["api"] == "openai-completions" and provider["baseUrl"] == SERVER.api
    assert provider["timeoutSeconds"] == 660
    for entry, model in zip(provider["models"], MODELS):
        assert (entry["contextWindow"], entry["maxTokens"]) == model[2:4]
        assert entry["input"] == ["text", "image"] and entry["reasoning"] == model.reasoning
        assert entry["name"] == f"{model.name} (via CLI)" and not any(entry["cost"].values())
        assert entry["compat"]["supportsPromptCacheKey"] is True


def test_efforts_begin_with_none_so_that_off_means_off() -> None:
    model = MODELS[0]._replace(efforts=("low", "high"))

    compat = connect.openclaw_row(model)["compat"]

    assert compat["supportedReasoningEfforts"] == ["none", "low", "high"]
    assert "supportedReasoningEfforts" not in connect.openclaw_row(MODELS[0])["compat"]


@pytest.mark.parametrize("later", [SERVER, KEYLESS])
def test_a_second_run_changes_nothing(either: Lab, later: Any) -> None:
    either.has({"gateway": {"mode": "local"}})
    either.connect("openclaw", server=later)
    before = either.file.read_bytes()

    plan = either.connect("openclaw", server=later)

    assert either.file.read_bytes() == before
    assert [tool for tool, _ in plan.settled if tool == "openclaw"] == ["openclaw"]


def test_another_key_is_read_again_by_a_gateway_that_is_told_to(either: Lab) -> None:
    first = either.connect("openclaw")
    before = either.file.read_bytes()

    plan = either.connect("openclaw", server=SERVER._replace(key="ocp_" + "other" * 6))

    assert either.file.read_bytes() == before
    assert not [hint for hint in first.hints if "secrets reload" in hint]
    assert [hint for hint in plan.hints if "openclaw secrets reload" in hint]
    assert "other" in (either.folder / ".config/ocp/key").read_text()


def test_a_server_that_wants_no_key_any_more_leaves_no_secret_behind(either: Lab) -> None:
    either.has({"gateway": {"mode": "local"}})
    either.connect("openclaw")

    either.connect("openclaw", server=KEYLESS)

    assert "secrets" not in either.config()
    assert either.providers()["claude-local"]["apiKey"] == "custom-local"


def test_models_that_are_gone_go_though_openclaw_refuses_to_lose_any(lab: Lab) -> None:
    lab.connect("openclaw")

    lab.connect("openclaw", server=SERVER._replace(models=MODELS[:2]))

    ids = [row["id"] for row in lab.providers()["claude-local"]["models"]]
    assert ids == [model.id for model in MODELS[:2]]
    calls = connect.json.loads((lab.folder / "bin/calls.jsonl").read_text().splitlines()[-1])
    assert calls == ["config", "patch", "--stdin", "--replace-path",
                     'models.providers["claude-local"].models']


def test_what_was_written_in_between_stays_on_a_second_run(either: Lab) -> None:
    either.has({"gateway": {"mode": "local"}})
    either.connect("openclaw")
    rows = either.providers()
    rows["claude-local"]["models"].append({"id": "mine", "name": "Mine"})
    rows["other"] = {"baseUrl": "http://other/v1", "models": [{"id": "x", "name": "X"}]}
    either.edit({"channels": {"telegram": {"enabled": True}}, "models": {"providers": rows},
                 "plugins": {"entries": {"x": {"enabled": True}}}})

    either.connect("openclaw", server=SERVER._replace(models=MODELS[:1]))

    config = either.config()
    assert config["channels"] == {"telegram": {"enabled": True}}
    assert config["plugins"] == {"entries": {"x": {"enabled": True}}}
    assert config["models"]["providers"]["other"] == rows["other"]
    ids = [row["id"] for row in config["models"]["providers"]["claude-local"]["models"]]
    assert ids == [MODELS[0].id, "mine"]
    either.undo()
    config = either.config()
    config.pop("meta", None)
    assert config == {
        "gateway": {"mode": "local"}, "channels": {"telegram": {"enabled": True}},
        "models": {"providers": {"other": rows["other"]}},
        "plugins": {"entries": {"x": {"enabled": True}}}}


def test_a_provider_of_the_users_with_our_name_stays(either: Lab) -> None:
    entry = {"baseUrl": "http://192.0.2.99:1/v1", "models": [{"id": "gpt", "name": "Theirs"}]}
    secret = {"source": "env", "name": "MINE"}
    before = either.has({"models": {"providers": {"claude-local": entry}},
                         "secrets": {"providers": {"ocp": secret}}})

    plan = either.connect("openclaw", role=connect.Role.PRIMARY)

    config, ours = either.config(), either.providers()["claude-local-2"]
    assert either.providers()["claude-local"] == entry
    assert config["secrets"]["providers"]["ocp"] == secret
    assert [row["id"] for row in ours["models"]] == [model.id for model in MODELS]
    assert ours["apiKey"]["provider"] == "ocp-2" in config["secrets"]["providers"]
    assert config["agents"]["defaults"]["model"]["primary"].startswith("claude-local-2/")
    assert "OCP is called claude-local-2" in connect.show_plan(plan, either.machine, KEY, False)
    assert not either.connect("openclaw").edits
    either.undo()
    assert either.file.read_bytes() == before


def test_another_server_takes_the_place_of_the_first(either: Lab) -> None:
    before = either.has({"gateway": {"mode": "local"}})
    either.connect("openclaw")

    either.connect("openclaw", server=OTHER)

    assert list(either.providers()) == ["claude-local"]
    assert either.providers()["claude-local"]["baseUrl"] == OTHER.api
    either.undo()
    assert either.file.read_bytes() == before


def test_comments_that_openclaw_loses_come_back_with_undo(lab: Lab) -> None:
    before = lab.has('{\n  // mine\n  "gateway": {"mode": "local"},\n}\n')

    plan = lab.connect("openclaw")

    assert any("without the comments" in note for edit in plan.edits for note in edit.notes)
    assert b"// mine" not in lab.file.read_bytes()
    lab.undo()
    assert lab.file.read_bytes() == before


def test_without_the_program_comments_stay_where_they_are(bare: Lab) -> None:
    text = "{\n  // mine\n  gateway: { mode: 'local', }, // here\n  models: { /* none */ },\n}\n"
    before = bare.has(text)

    bare.connect("openclaw")

    after = bare.file.read_text()
    assert connect.json_comments(after) == connect.json_comments(text)
    assert connect.json_find(after, ("gateway", "mode")) == "local"
    bare.undo()
    assert bare.file.read_bytes() == before


def test_openclaw_that_refuses_the_patch_is_quoted(lab: Lab) -> None:
    before = lab.has({})
    lab.complain("Invalid option")
    record, plan = connect.load_record(lab.machine.state_folder), lab.plan("openclaw")

    writer = connect.Writer(lab.machine, record, KEY)
    writer.connect(plan, "url")

    assert lab.file.read_bytes() == before and "Invalid option" in writer.failures[0]
    assert str(lab.file) not in connect.load_record(lab.machine.state_folder).files


def test_a_retired_file_of_openclaw_is_reported_and_left(either: Lab) -> None:
    content = '{"version":1,"profiles":{"claude-local:default":{}}}'
    path = either.put(".openclaw/agents/main/agent/auth-profiles.json", content)

    plan = either.connect("openclaw")

    assert any("doctor --fix" in hint for hint in plan.hints) and path.read_text() == content


def test_openclaw_places_its_configuration_by_its_variables(lab: Lab) -> None:
    def where(**environ: str) -> str:
        return str(connect.openclaw_config(connect.Machine("/h", environ, "linux", False)))

    assert where(PATH="") == "/h/.openclaw/openclaw.json"
    assert where(PATH="", OPENCLAW_HOME="/x") == "/x/.openclaw/openclaw.json"
    assert where(PATH="", OPENCLAW_STATE_DIR="/x") == "/x/openclaw.json"
    assert where(PATH="", OPENCLAW_CONFIG_PATH="/x/f", OPENCLAW_STATE_DIR="/y") == "/x/f"
    assert where(**{**lab.machine.environ, "OPENCLAW_CONFIG_PATH": "/x/g"}) == "/x/g"


PLUGIN = Path(connect.__file__).parent / "ocp-plugin"


def test_the_plugin_says_the_same(bare: Lab, shared_server: Server) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    url = f"http://127.0.0.1:{shared_server.port}"
    rows = shared_server.call("GET", "/v1/models").json()["data"]
    program = (
        f"import {{ providerEntry }} from {json.dumps((PLUGIN / 'lib/registration.js').as_uri())};"
        f"console.log(JSON.stringify(providerEntry({json.dumps(url)}, {json.dumps(rows)}, false)))")

    said = subprocess.run(
        [node, "--input-type=module", "-e", program], capture_output=True, timeout=120, check=True)

    connected(bare, shared_server)
    assert json.loads(said.stdout) == bare.providers()["claude-local"]
    assert any("supportedReasoningEfforts" in row["compat"]
               for row in bare.providers()["claude-local"]["models"])


# ---------------------------------------------------------------------------
# The default model
# ---------------------------------------------------------------------------

BEFORE = {"primary": "anthropic/x", "fallbacks": ["openai/y"]}
OURS = "claude-local/claude-sonnet-5-5"


@pytest.mark.parametrize(("before", "more", "wanted"), [
    (None, {}, {"primary": OURS, "fallbacks": []}),
    ({"fallbacks": ["openai/y"]}, {}, {"primary": OURS, "fallbacks": []}),
    ("anthropic/x", {}, "anthropic/x"),
    (BEFORE, {}, BEFORE),
    (BEFORE, {"role": PRIMARY}, {"primary": OURS, "fallbacks": []}),
    (BEFORE, {"role": PRIMARY, "allow_fallback": True},
     {"primary": OURS, "fallbacks": ["openai/y"]}),
    ("anthropic/x", {"role": BACKUP}, {"primary": "anthropic/x", "fallbacks": [OURS]}),
    (BEFORE, {"role": BACKUP}, {"primary": "anthropic/x", "fallbacks": ["openai/y", OURS]}),
    ({"primary": "anthropic/x", "fallbacks": [OURS, "openai/y"]}, {"role": BACKUP},
     {"primary": "anthropic/x", "fallbacks": ["openai/y", OURS]}),
])
def test_the_place_of_our_models_among_the_others(
    either: Lab, before: Json, more: Mapping[str, Json], wanted: Json
) -> None:
    original = either.has({"agents": {"defaults": {"model": before}}} if before else {})

    plan = either.connect("openclaw", **more)

    assert either.config()["agents"]["defaults"]["model"] == wanted
    closed = wanted == {"primary": OURS, "fallbacks": []}
    assert any("no fallback" in hint for hint in plan.hints) == closed
    assert not either.plan("openclaw").edits, "a plain run keeps the place that it has"
    either.undo()
    assert either.file.read_bytes() == original


HAIKU = "claude-local/claude-haiku-4-5"


@pytest.mark.parametrize(("chosen", "more", "wanted"), [
    ({"primary": HAIKU, "fallbacks": ["openai/y"]}, {}, None),
    ({"primary": "anthropic/x", "fallbacks": [HAIKU, "openai/y"]}, {}, None),
    ({"primary": "claude-local/claude-2", "fallbacks": []}, {},
     {"primary": OURS, "fallbacks": []}),
    ({"primary": HAIKU, "fallbacks": ["openai/y"]}, {"role": PRIMARY},
     {"primary": OURS, "fallbacks": []}),
    ({"primary": "anthropic/z", "fallbacks": []}, {}, None),
])
def test_what_the_user_has_chosen_since_stays_on_a_plain_run(
    either: Lab, chosen: Json, more: Mapping[str, Json], wanted: Json
) -> None:
    either.has({"agents": {"defaults": {"model": BEFORE}}})
    either.connect("openclaw", role=PRIMARY)
    either.edit({"agents": {"defaults": {"model": chosen}}})

    either.connect("openclaw", **more)

    assert either.config()["agents"]["defaults"]["model"] == (wanted or chosen)


def test_nothing_to_back_up_makes_no_default(either: Lab) -> None:
    either.connect("openclaw", role=BACKUP)

    assert "agents" not in either.config()


def test_as_backup_the_primary_is_not_written_again(lab: Lab) -> None:
    lab.has({"agents": {"defaults": {"model": BEFORE}}})

    lab.connect("openclaw", role=BACKUP)

    done = connect.load_record(lab.machine.state_folder).files[str(lab.file)].done
    paths = [each.path for each in done if each.path[0] == "agents"]
    assert paths == [("agents", "defaults", "model", "fallbacks")]


# ---------------------------------------------------------------------------
# A name of one's own
# ---------------------------------------------------------------------------

def connected(lab: Lab, server: Server, *more: str) -> Ran:
    """A run that has to go well."""
    ran = lab.run(f"127.0.0.1:{server.port}", "--only", "openclaw", "--yes", *more)
    assert ran.code == 0, ran
    return ran


def test_a_chosen_name_is_kept_until_another_is_chosen(either: Lab, shared_server: Server) -> None:
    either.has({"agents": {"defaults": {"model": BEFORE}}})
    connected(either, shared_server, "--provider-name", "plan", "--primary")

    again = connected(either, shared_server)
    assert list(either.providers()) == ["plan"] and "nothing was changed" in again.stdout

    rows = either.providers()
    rows["plan"]["models"].append({"id": "mine", "name": "Mine"})
    either.edit({"models": {"providers": rows}})
    connected(either, shared_server, "--provider-name", "claude-max")
    assert list(either.providers()) == ["claude-max"]
    assert either.providers()["claude-max"]["models"] == rows["plan"]["models"]
    model = either.config()["agents"]["defaults"]["model"]
    assert model["primary"].startswith("claude-max/") and model["fallbacks"] == []
    assert either.run("--undo", "--yes").code == 0
    left = either.config()
    assert "providers" not in left.get("models", {})
    assert left["agents"]["defaults"]["model"] == BEFORE


def test_a_backup_follows_its_name(either: Lab, shared_server: Server) -> None:
    either.has({"agents": {"defaults": {"model": BEFORE}}})
    connected(either, shared_server, "--backup")

    connected(either, shared_server, "--provider-name", "plan")

    model = either.config()["agents"]["defaults"]["model"]
    assert model["primary"] == BEFORE["primary"]
    assert model["fallbacks"] == ["openai/y", "plan/claude-sonnet-5-5"]


@pytest.mark.parametrize("entry", [
    {"baseUrl": "https://api.example.com/v1", "models": []}, {"apiKey": "x"}])
def test_a_name_that_somebody_else_has_is_refused(
    either: Lab, shared_server: Server, entry: Json
) -> None:
    before = either.has({"models": {"providers": {"taken": entry}}})

    ran = either.run(f"127.0.0.1:{shared_server.port}", "--only", "openclaw", "--yes",
                     "--provider-name", "taken")

    assert ran.code == 2 and "choose another name with --provider-name" in ran.stderr
    assert f"already has your own provider taken{', for ' * ('baseUrl' in entry)}" in ran.stderr
    assert entry.get("baseUrl", "") in ran.stderr
    assert either.file.read_bytes() == before and not (either.folder / ".config").exists()


def test_a_provider_that_leads_here_already_is_taken_over(
    either: Lab, shared_server: Server
) -> None:
    url = f"http://localhost:{shared_server.port}/v1"
    before = either.has({"models": {"providers": {"plan": {"baseUrl": url, "models": []}}}})

    connected(either, shared_server, "--provider-name", "plan")

    assert len(either.providers()["plan"]["models"]) > 3
    assert either.run("--undo", "--yes").code == 0
    assert either.file.read_bytes() == before


@pytest.mark.parametrize("name", ["Plan", "a b", "", "-x", "a/b", 'a"b', "x" * 64])
def test_what_is_no_name_is_wrong_usage(bare: Lab, name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        bare.run("127.0.0.1", f"--provider-name={name}")

    assert ended.value.code == 2 and "is not a name" in bare.capsys.readouterr().err


# ---------------------------------------------------------------------------
# --sync
# ---------------------------------------------------------------------------

def row_of(model: Any, **more: Json) -> dict[str, Json]:
    return {**connect.openclaw_row(model), **more}


ROWS = [row_of(model) for model in MODELS]


def provider(rows: Json = ROWS, url: str = f"{URL}/v1", **more: Json) -> dict[str, Json]:
    return {"baseUrl": url, "apiKey": "custom-local", "models": rows, **more}


def with_providers(**providers: Json) -> dict[str, Json]:
    return {"gateway": {"mode": "local"}, "models": {"providers": providers}}


@pytest.fixture(autouse=True)
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the script, whose list of models is that of these tests."""
    place = tmp_path / "tree"
    place.mkdir()
    names = ("id", "displayName", "contextWindow", "maxTokens", "reasoning", "efforts")
    rows = [dict(zip(names, model)) for model in MODELS]
    (place / "models.json").write_text(json.dumps({"models": rows}))
    monkeypatch.setattr(connect, "HERE", str(place))
    return place


RETIRED = {"id": "claude-2", "name": "Claude 2 (via CLI)"}
MINE = {"id": "mine", "name": "My own", "contextWindow": 5}
DRIFTS = {
    "a model is missing": (ROWS[:1], ROWS),
    "there is none yet": ([], ROWS),
    "one is retired": ([*ROWS, RETIRED], ROWS),
    "a window has changed": ([row_of(MODELS[0], contextWindow=7), *ROWS[1:]], ROWS),
    "a level of effort is new": (
        [row_of(MODELS[0], compat={"supportsPromptCacheKey": False}), *ROWS[1:]], ROWS),
    "the order is another": (ROWS[::-1], ROWS),
    "a row of the user's stays": ([MINE, ROWS[0]], [*ROWS, MINE]),
    "what the user has added to a row stays": (
        [row_of(MODELS[0], maxTokens=1, params={"temperature": 0}, compat={"strict": True})],
        [row_of(MODELS[0], params={"temperature": 0},
                compat={"strict": True, **ROWS[0]["compat"]}), *ROWS[1:]]),
}


@pytest.mark.parametrize("drift", sorted(DRIFTS))
def test_sync_brings_the_models_up_to_date_and_nothing_else(either: Lab, drift: str) -> None:
    rows, wanted = DRIFTS[drift]
    before = either.has({**with_providers(ocp=provider(rows, timeoutSeconds=5)),
                         "agents": {"defaults": {"model": "ocp/claude-2"}}})

    ran = either.run("--sync")

    assert ran.code == 0 and ran.stderr == "", ran
    config = either.config()
    config.pop("meta", None)
    assert config == {**with_providers(ocp=provider(wanted, timeoutSeconds=5)),
                      "agents": {"defaults": {"model": "ocp/claude-2"}}}
    (copy,) = either.copies()
    assert copy.read_bytes() == before and stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert re.fullmatch(r"openclaw\.json\.ocp-\d{8}-\d{6}", copy.name)
    assert f"Copy of the original: ~/.openclaw/{copy.name}" in ran.stdout

    synced = either.file.read_bytes()
    again = either.run("--sync")
    assert (again.code, again.stdout) == (0, f"OpenClaw has the models of {URL}.\n")
    assert either.file.read_bytes() == synced and either.copies() == [copy]


def test_sync_does_every_provider_that_leads_here(either: Lab) -> None:
    either.has(with_providers(
        one=provider(ROWS[:1]), two=provider([RETIRED], f"http://localhost:3456{'/v1'}")))

    ran = either.run("--sync", "--json")

    answer = json.loads(ran.stdout)
    assert ran.code == 0 and answer["providers"] == ["one", "two"]
    assert answer["written"] == [str(either.file)] and answer["failures"] == []
    assert [each["models"] for each in either.providers().values()] == [ROWS, ROWS]


@pytest.mark.parametrize("url", [
    "https://api.anthropic.com", "http://127.0.0.1:3457/v1", "http://192.0.2.7:3456/v1",
    "https://127.0.0.1/v1", "${PROXY}/v1", "http://[::1", "http://127.0.0.1:port/v1", ""])
def test_sync_leaves_the_providers_of_others_alone(either: Lab, url: str) -> None:
    before = either.has(with_providers(other=provider([RETIRED], url), odd=None, strange="x"))

    ran = either.run("--sync")

    assert ran.code == 0 and "OpenClaw does not use http://127.0.0.1:3456" in ran.stdout
    assert ran.stdout.count("\n") == 1
    assert either.file.read_bytes() == before and not either.copies()


def test_sync_asks_nobody_where_another_port_is(
    bare: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(connect, "is_this_machine", lambda host: not asked.append(host))
    bare.has(with_providers(other=provider([], "https://api.example.com/v1")))

    bare.run("--sync")

    assert set(asked) == {"127.0.0.1"}


def test_sync_looks_at_the_port_that_it_is_told(either: Lab) -> None:
    either.has(with_providers(old=provider([]), new=provider([], "http://127.0.0.1:4000/v1")))

    ran = either.run("--sync", "127.0.0.1:4000")

    assert ran.code == 0
    assert [len(each["models"]) for each in either.providers().values()] == [0, len(ROWS)]


def test_sync_shows_and_changes_nothing_in_a_dry_run(either: Lab) -> None:
    before = either.has(with_providers(ocp=provider([RETIRED])))

    ran = either.run("--sync", "--dry-run")

    assert ran.code == 0 and "claude-2" in ran.stdout and MODELS[0].id in ran.stdout
    assert either.file.read_bytes() == before and not either.copies()


def test_sync_where_there_is_no_openclaw_says_so_and_changes_nothing(bare: Lab) -> None:
    ran = bare.run("--sync")

    assert ran.code == 0 and "OpenClaw is not on this machine" in ran.stdout
    assert list(bare.folder.iterdir()) == []


def test_sync_without_openclaw_says_so_as_json(bare: Lab) -> None:
    ran = bare.run("--sync", "--json")

    assert ran.code == 0 and json.loads(ran.stdout)["openclaw"] is False


@pytest.mark.parametrize("config", [None, {}, {"models": {}}, {"models": {"providers": []}}])
def test_sync_says_when_openclaw_does_not_use_the_server(lab: Lab, config: Json) -> None:
    before = None if config is None else lab.has(config)

    ran = lab.run("--sync")

    assert ran == Ran(0, f"OpenClaw does not use {URL}: `ocp connect {URL} --only openclaw` adds "
                         "it.\n", "")
    assert (lab.file.read_bytes() if config is not None else None) == before


def test_a_sync_that_openclaw_does_not_take_leaves_the_file_as_it_was(lab: Lab) -> None:
    before = lab.has(with_providers(ocp=provider([RETIRED])))
    lab.complain("models: Invalid input")

    ran = lab.run("--sync")

    assert ran.code == 1 and "models: Invalid input" in ran.stderr
    assert lab.file.read_bytes() == before and not lab.copies()


def test_a_sync_that_is_refused_leaves_the_record_as_it_was(lab: Lab) -> None:
    before = lab.has({"gateway": {"mode": "local"}})
    lab.connect("openclaw", server=KEYLESS._replace(url=URL, models=MODELS[:1]))
    after, record = lab.file.read_bytes(), (lab.folder / ".config/ocp/connect.json").read_bytes()
    lab.complain("no")

    assert lab.run("--sync").code == 1

    assert lab.file.read_bytes() == after
    assert (lab.folder / ".config/ocp/connect.json").read_bytes() == record
    lab.undo()
    assert lab.file.read_bytes() == before


@pytest.mark.parametrize("text", [
    '{models: {providers: {ocp: {baseUrl: "%s", models: [ /* old */ ]}}}}',
    '{models: {providers: {ocp: {baseUrl: "%s", models: [{id: "mine", window: 0x10}]}}}}',
    '{models: {providers: {ocp: {baseUrl: "%s", models: []}}',
])
def test_a_list_that_cannot_be_changed_safely_is_left_with_a_sentence(
    bare: Lab, text: str
) -> None:
    before = bare.has(text % URL)

    ran = bare.run("--sync")

    assert ran.code == 1 and ran.stderr.startswith("~/.openclaw/openclaw.json "), ran
    assert ran.stderr.count(".") >= 2 and ran.stdout == ""
    assert bare.file.read_bytes() == before and not bare.copies()


def test_comments_elsewhere_stay_when_the_list_is_brought_up_to_date(bare: Lab) -> None:
    bare.has('{\n  // mine\n  models: { providers: {\n    ocp: { // ours\n'
             f'      baseUrl: "{URL}/v1", models: [], }}\n  }} }},\n}}\n')

    assert bare.run("--sync").code == 0

    text = bare.file.read_text()
    assert connect.json_comments(text) == ["// mine", "// ours"]
    assert connect.json_find(text, ("models", "providers", "ocp", "models")) == ROWS


def test_a_file_that_is_read_only_is_left(bare: Lab) -> None:
    before = bare.has(with_providers(ocp=provider([])))
    bare.file.chmod(0o400)

    ran = bare.run("--sync")

    assert ran.code == 1 and "is read-only" in ran.stderr
    assert bare.file.read_bytes() == before and not bare.copies()


def test_undo_after_a_sync_gives_the_bytes_back(either: Lab) -> None:
    before = either.has({"gateway": {"mode": "local"}})
    either.connect("openclaw", server=KEYLESS._replace(url=URL, models=MODELS[:1]))

    assert either.run("--sync").code == 0
    assert len(either.providers()["claude-local"]["models"]) == len(MODELS)
    either.undo()

    assert either.file.read_bytes() == before


def test_undo_after_a_sync_keeps_what_somebody_else_has_written(either: Lab) -> None:
    either.has({"gateway": {"mode": "local"}})
    either.connect("openclaw", server=KEYLESS._replace(url=URL, models=MODELS[:1]))
    either.edit({"channels": {}})

    assert either.run("--sync").code == 0
    either.undo()

    config = either.config()
    config.pop("meta", None)
    assert config == {"gateway": {"mode": "local"}, "channels": {}}


def test_after_a_sync_a_run_has_nothing_to_change(either: Lab) -> None:
    server = KEYLESS._replace(url=URL)
    either.connect("openclaw", server=server._replace(models=MODELS[:1]))
    rows = either.providers()
    rows["claude-local"]["models"].append(MINE)
    either.edit({"models": {"providers": rows}})

    assert either.run("--sync").code == 0

    plan = either.plan("openclaw", server=server)
    assert not plan.edits, connect.new_lines(plan.edits[0])


def test_the_list_of_a_server_elsewhere_is_asked_from_it(
    bare: Lab, shared_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{shared_server.port}"
    bare.has(with_providers(ocp=provider([], f"{url}/v1")))
    monkeypatch.setattr(connect, "is_this_machine", lambda host: False)

    assert bare.run("--sync", url).code == 0

    known = {row["id"] for row in shared_server.call("GET", "/v1/models").json()["data"]}
    assert {row["id"] for row in bare.providers()["ocp"]["models"]} == known


def test_from_a_pipe_the_list_is_asked_from_the_server(
    bare: Lab, shared_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{shared_server.port}"
    bare.has(with_providers(ocp=provider([], f"{url}/v1")))
    monkeypatch.setattr(connect, "HERE", "")

    assert bare.run("--sync", url).code == 0

    rows = bare.providers()["ocp"]["models"]
    connected(bare, shared_server, "--provider-name", "ocp")
    assert bare.providers()["ocp"]["models"] == rows != ROWS


def test_both_lists_say_the_same(
    bare: Lab, shared_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "HERE", str(Path(connect.__file__).parent))
    connected(bare, shared_server)

    ran = bare.run("--sync", f"127.0.0.1:{shared_server.port}")

    assert ran.stdout.startswith("OpenClaw has the models of "), ran


def test_without_a_list_and_without_a_server_it_says_so(bare: Lab, listed: Path) -> None:
    os.unlink(listed / "models.json")
    bare.has(with_providers(ocp=provider([], "http://127.0.0.1:9/v1")))

    ran = bare.run("--sync", "127.0.0.1:9")

    assert ran.code == 3 and "Cannot reach" in ran.stderr


@pytest.mark.parametrize("text", ["", "{", "[]", '{"models": [1]}', '{"models": 1}'])
def test_a_list_of_models_that_is_none_is_named(bare: Lab, listed: Path, text: str) -> None:
    (listed / "models.json").write_text(text)
    before = bare.has(with_providers(ocp=provider([])))

    ran = bare.run("--sync")

    assert ran.code == 1 and "models.json cannot be used as a list of models" in ran.stderr
    assert bare.file.read_bytes() == before


# ---------------------------------------------------------------------------
# The patch
# ---------------------------------------------------------------------------

def random_value(chance: random.Random, depth: int = 0) -> Json:
    """A JSON value without null."""
    if depth < 4 and chance.random() < 0.6:
        names = chance.sample("abcde", chance.randint(0, 4))
        return {name: random_value(chance, depth + 1) for name in names}
    return chance.choice([1, 2.5, "x", "", True, [], [1, {"a": 2}], {}])


def patched(target: Json, patch: Json) -> Json:
    """MergePatch of RFC 7396, section 2."""
    if not isinstance(patch, dict):
        return patch
    target = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        else:
            target[name] = patched(target.get(name), value)
    return target


@pytest.mark.parametrize("block", range(10))
def test_a_merge_patch_makes_the_one_value_the_other(block: int) -> None:
    for seed in range(block * 200, block * 200 + 200):
        chance = random.Random(seed)
        before, after = ({"root": random_value(chance)} for _ in range(2))

        patch = connect.merge_patch(before, after)

        assert patched(before, patch) == after, seed
        assert connect.merge_patch(after, after) == {}


def test_a_merge_patch_names_only_what_changes() -> None:
    before = {"a": {"b": 1, "c": [1]}, "d": 2, "e": {"f": 3}}
    after = {"a": {"b": 1, "c": [1, 2]}, "e": {}}

    assert connect.merge_patch(before, after) == {"a": {"c": [1, 2]}, "d": None, "e": {"f": None}}
