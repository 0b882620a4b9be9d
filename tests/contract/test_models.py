"""What the real claude says of models: of its account, and of what the API takes and costs."""
from __future__ import annotations

import json
import mmap
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from claude_driver import CLAUDE_ARGS, ClaudeDriver
from programs import real_claude_env
from project import clean_env, load_script
from rig import Claude, Rig, real_claudes, running_rig

ocp = load_script("ocp_server.py")

Json = Any


MODELS = ocp.Models(ocp.BUILTIN_MODELS)
#: Aliases, and what the oldest claude and the newest one resolve them to, by models.json.
ALIASES = {
    alias: tuple(
        MODELS.with_claude(ocp.ClaudeModels(version)).find(alias).id
        for version in (ocp.OLDEST_CLAUDE, ())
    )
    for alias in ("opus", "sonnet", "haiku", "fable", "best", "default")
}


# ---------------------------------------------------------------------------
# What `initialize` answers
# ---------------------------------------------------------------------------

def rows_of(claude: Claude, model: str = "claude-sonnet-4-6") -> list[dict[str, Json]]:
    """The models in the answer of a process for this model."""
    args = [model if each == "claude-sonnet-4-6" else each for each in CLAUDE_ARGS]
    with tempfile.TemporaryDirectory(prefix="ocp") as folder:
        env = clean_env(HOME=folder, **real_claude_env("http://127.0.0.1:9"))
        with ClaudeDriver([str(claude.path), *args], env, Path(folder)) as driver:
            answer = driver.control("initialize", systemPrompt=[])
    found: list[dict[str, Json]] = answer["response"]["models"]
    return found


@pytest.mark.differs_by_version
def test_claude_lists_the_models_of_its_account(claude: Claude) -> None:
    rows = rows_of(claude)
    is_old = claude.version == "2.1.197"

    found = {each.name: each for each in ocp.offered_models(rows)}

    assert len(found) == len(rows)
    names = {"default", "sonnet", "opus", "haiku"} | (set() if is_old else {"fable"})
    # claude adds the model that it was started for.
    assert set(found) == names | {"claude-sonnet-4-6"}
    for name in names:
        assert found[name].id == ALIASES[name][0 if is_old else 1]
    assert found["sonnet"].efforts == ocp.EFFORTS
    assert found["haiku"].efforts == (() if is_old else ocp.EFFORTS)
    switches = {each.cli_thinking_off for each in found.values()}
    assert switches == ({None} if is_old else {False, True})
    assert found["claude-sonnet-4-6"].cli_thinking_off is (None if is_old else True)
    fast = {name for name, each in found.items() if each.fast_mode}
    assert fast == ({"opus"} if is_old else {"opus", "fable"})


@pytest.mark.exhaustive
@pytest.mark.differs_by_version
def test_a_process_for_the_model_of_an_alias_lists_its_id_alone(claude: Claude) -> None:
    model = ALIASES["fable"][0 if claude.version == "2.1.197" else 1]

    found = [each.name for each in ocp.offered_models(rows_of(claude, model)) if each.id == model]

    assert found == [model]


@pytest.mark.exhaustive
@pytest.mark.differs_by_version
def test_claude_lists_whatever_model_it_was_started_for(claude: Claude) -> None:
    own = [row for row in rows_of(claude, "claude-nova-9") if row["value"] == "claude-nova-9"]

    assert [row["resolvedModel"] for row in own] == ["claude-nova-9"]


# ---------------------------------------------------------------------------
# Aliases and lists
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
def test_an_alias_is_the_model_that_claude_resolves_it_to(claude: Claude) -> None:
    with tempfile.TemporaryDirectory(prefix="ocp") as folder, running_rig(
            Path(folder), claude, OCP_DEFAULT_MODEL=None) as rig:
        for _ in ("before its report", "after it"):
            for alias, wanted in ALIASES.items():
                rig.begin()
                answer = rig.ask(model=alias)

                model = wanted[0 if rig.is_old else 1]
                assert rig.only_body()["model"] == model, alias
                assert answer.reply.json()["model"] == model
        listed = [row["id"] for row in rig.server.call("GET", "/v1/models").json()["data"]]
    families = {ocp.lineage_of(model)[0] for model in listed}
    assert families == {"opus", "sonnet", "haiku"} | (set() if rig.is_old else {"fable"})
    assert (ALIASES["sonnet"][1] in listed) != rig.is_old


@pytest.mark.differs_by_version
def test_an_old_claude_says_which_one_a_model_needs(rig: Rig) -> None:
    model = MODELS.find(ALIASES["sonnet"][1])

    answer = rig.ask(model=model.id)

    assert answer.status == (404 if rig.is_old else 200)
    assert len(rig.bodies()) == (0 if rig.is_old else 1)
    if rig.is_old:
        assert ".".join(map(str, model.first_cli)) in str(answer.error)


def test_an_effort_in_the_name_reaches_the_api(rig: Rig) -> None:
    rig.ask(model="claude-sonnet-5:low")

    body = rig.only_body()
    assert (body["model"], body["output_config"]["effort"]) == ("claude-sonnet-5", "low")


@pytest.mark.parametrize("name", ["claude-sonnet-5", "claude-opus-4-8", "claude-sonnet-4-6",
                                  "claude-haiku-4-5"])
def test_the_longest_answer_of_a_model_can_be_asked_for(rig: Rig, name: str) -> None:
    limit = MODELS.find(name).max_tokens

    rig.ask(model=name, max_tokens=limit)

    assert rig.only_body()["max_tokens"] == limit


@pytest.mark.differs_by_version
@pytest.mark.parametrize("name", ["claude-opus-4-8", "claude-sonnet-4-6", "claude-haiku-4-5"])
def test_claude_s_own_limit_is_that_of_the_file(rig: Rig, name: str) -> None:
    rig.ask(model=name)

    assert rig.only_body()["max_tokens"] == MODELS.find(name).default_max_tokens


# ---------------------------------------------------------------------------
# The catalogue in the newest claude
# ---------------------------------------------------------------------------

_START = b'{"//":"Hand-maintained baked-in model catalog'
_MAX_BYTES = 200_000


def catalogue_of(claude: Claude) -> dict[str, Json]:
    """The table of models in the program, which is an object of JavaScript."""
    with claude.path.resolve().open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as program:
            start = program.find(_START)
            assert start >= 0
            text = program[start:start + _MAX_BYTES].decode("utf-8", "replace")
    pieces = re.split(r'("(?:[^"\\]|\\.)*")', text)
    for index in range(0, len(pieces), 2):
        plain = re.sub(r"([{,])([A-Za-z_]\w*):", r'\1"\2":', pieces[index])
        pieces[index] = plain.replace("!0", "true").replace("!1", "false")
    # The keys of a minified object may touch a string, so the pieces are joined before parsing.
    found: dict[str, Json] = json.JSONDecoder().raw_decode("".join(pieces))[0]
    return found


@pytest.fixture(scope="module")
def catalogue() -> dict[str, Json]:
    claudes = real_claudes()
    if not claudes:
        pytest.skip("no real claude")
    return catalogue_of(claudes[-1])


def row_in(catalogue: dict[str, Json], model: Any) -> dict[str, Json]:
    (row,) = (row for row in catalogue["models"] if row["provider_ids"]["first_party"] == model.id)
    found: dict[str, Json] = row
    return found


EVERY_MODEL = pytest.mark.parametrize("model", MODELS.all(), ids=lambda model: model.id)


@EVERY_MODEL
def test_window_and_limits_are_those_of_claude_s_catalogue(
    catalogue: dict[str, Json], model: Any
) -> None:
    row = row_in(catalogue, model)

    assert row["display_name"] == model.display_name.partition(" ")[2]
    assert row["context"]["window"] == model.context_window
    has_more = row["context"].get("maximum_window", 0) > model.context_window
    assert has_more == model.long_context
    assert row["max_output_tokens"] == {
        "default": model.default_max_tokens, "upper": model.max_tokens}


@EVERY_MODEL
def test_thinking_is_that_of_claude_s_catalogue(catalogue: dict[str, Json], model: Any) -> None:
    row = row_in(catalogue, model)
    can = set(row["capabilities"])

    assert ("adaptive_thinking" in can) == (model.thinking == "adaptive")
    if model.thinking == "adaptive":
        assert ("xhigh_effort" in can) == ("xhigh" in model.efforts)
        assert "max_effort" in can and "max" in model.efforts
        # Those of 4.6 have no level in the catalogue; the API's default is high.
        assert row.get("default_effort", "high") == model.default_effort
    # claude refuses for Haiku 5.5 what the API documents.
    refuses = "rejects_disabled_thinking" in can and model.id != "claude-haiku-5-5"
    assert refuses == (model.thinking_off != "disabled")
    if "thinking_disabled_effort_cap" in can:
        assert model.thinking_off_max_effort == "high"


@EVERY_MODEL
def test_prices_are_those_of_claude_s_catalogue(catalogue: dict[str, Json], model: Any) -> None:
    row = catalogue["pricing_tiers"][row_in(catalogue, model)["pricing"]]
    long_prompt = row.get("long_prompt", {})

    assert {name: row[name] for name in ocp.Prices._fields} == model.prices._asdict()
    assert long_prompt.get("above_prompt_tokens", 0) == model.long_prompt_tokens
    if long_prompt:
        prices = {name: long_prompt[name] for name in ocp.Prices._fields}
        assert prices == model.long_prompt_prices._asdict()


def test_fast_mode_is_that_of_claude_s_catalogue(catalogue: dict[str, Json]) -> None:
    fast = {row["provider_ids"]["first_party"] for row in catalogue["models"]
            if "fast_mode" in row["capabilities"] and "mythos" not in row["id"]}

    # The API documents that Opus 4.8 has it until the end of November 2026.
    assert {each.id for each in MODELS.all() if each.fast_mode} == fast - {"claude-opus-4-8"}


def test_the_file_has_the_aliases_of_claude_s_catalogue(catalogue: dict[str, Json]) -> None:
    first_party = {row["id"]: row["provider_ids"]["first_party"] for row in catalogue["models"]}
    aliases = {name: first_party[row["default"]] for name, row in catalogue["aliases"].items()}

    assert {**aliases, "best": catalogue["best"]}.items() <= ocp.BUILTIN_MODELS["aliases"].items()


def test_the_file_has_every_current_model_of_claude_s_catalogue(
    catalogue: dict[str, Json]
) -> None:
    known = {model.id for model in MODELS.all()}
    # Models that have ended, or that only some organisations get.
    without = re.compile(r"claude-(3-.*|mythos-.*|sonnet-4-[05]|opus-4-[01])")
    wanted = {row["provider_ids"]["first_party"] for row in catalogue["models"]
              if not without.fullmatch(row["id"])}

    assert wanted == known
