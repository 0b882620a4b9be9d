"""Models: which there are, what they are called, and which options their API is sent."""
from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from project import REPO, load_script
from rendering import MODELS

ocp = load_script("ocp_server.py")

LISTED = MODELS.all()
NEWEST = LISTED[0]
NEW = MODELS.find("claude-of-next-year-1")
#: How a budget of thinking tokens and levels of effort are understood.
ADAPTIVE = [model for model in LISTED if model.thinking == "adaptive"]
BUDGET = [model for model in LISTED if model.thinking == "budget"]
SAMPLING = [model for model in LISTED if model.sampling]
#: Whether thinking can be switched off.
STOPPABLE = [model for model in LISTED if model.thinking_off != "never"]
ALWAYS = [model for model in ADAPTIVE if model.thinking_off == "never"]
EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "max")


def name_of(model: Any) -> str:
    return str(model.id)


def wanted(
    effort: str | None = None, budget_tokens: int | None = None, **fields: Any
) -> Any:
    """What a client asks for."""
    return ocp.RequestedOptions(thinking=ocp.Thinking(effort, budget_tokens), **fields)


# -- the list -----------------------------------------------------------------


def test_the_built_in_models_equal_models_json() -> None:
    assert json.loads(Path(REPO, "models.json").read_text("utf-8")) == ocp.BUILTIN_MODELS


@pytest.mark.parametrize("model", LISTED, ids=name_of)
def test_a_listed_model_is_described_in_words_that_the_server_knows(model: Any) -> None:
    assert model.known
    assert model.thinking in ("adaptive", "budget")
    assert list(model.efforts) == [level for level in EFFORTS if level in model.efforts]
    assert 0 < model.default_max_tokens <= model.max_tokens < model.context_window
    assert model.display_name
    assert model.thinking_off in ("disabled", "between_tools", "never")
    assert {model.default_effort, model.thinking_off_max_effort} <= {"", *model.efforts}
    assert bool(model.default_effort) == (model.thinking == "adaptive")


@pytest.mark.parametrize("model", LISTED, ids=name_of)
def test_the_prices_of_a_model_have_the_api_s_proportions(model: Any) -> None:
    for prices in filter(None, (model.prices, model.long_prompt_prices)):
        assert prices.output == pytest.approx(5 * prices.input)
        assert prices.cache_write_5m == pytest.approx(1.25 * prices.input)
        assert prices.cache_write_1h == pytest.approx(2 * prices.input)
        assert 0 < prices.cache_read <= 0.1 * prices.input
    assert (model.long_prompt_prices is None) == (model.long_prompt_tokens == 0)


def test_a_long_prompt_of_the_newest_haiku_costs_more() -> None:
    haiku = MODELS.find("claude-haiku-5-5")

    assert haiku.long_prompt_tokens == 100_000
    assert haiku.long_prompt_prices == ocp.Prices(0.5, 2.5, 0.625, 1, 0.05)
    assert haiku.prices == ocp.Prices(0.1, 0.5, 0.125, 0.2, 0.01)


@pytest.mark.parametrize("model", LISTED, ids=name_of)
def test_a_model_is_found_by_its_id(model: Any) -> None:
    assert MODELS.find(model.id) is model


@pytest.mark.parametrize(
    ("alias", "model_id"),
    [(alias, model_id) for group in ("aliases", "legacyAliases")
     for alias, model_id in ocp.BUILTIN_MODELS[group].items()],
)
def test_an_alias_gives_the_listed_model_that_it_stands_for(alias: str, model_id: str) -> None:
    found = MODELS.find(alias)

    assert (found.id, found.known) == (MODELS.find(model_id).id, True)
    assert found.id == model_id or model_id in ocp.BUILTIN_MODELS["aliases"]


def test_no_alias_hides_a_model_of_that_name() -> None:
    ids = {model.id for model in LISTED}

    assert not ids & {*ocp.BUILTIN_MODELS["aliases"], *ocp.BUILTIN_MODELS["legacyAliases"]}


def test_every_name_that_is_told_is_one_that_is_found() -> None:
    assert all(MODELS.find(name).known for name in MODELS.names())


SPELLINGS = {
    "claude-sonnet-4-6": (
        "claude-sonnet-4.6", "anthropic/claude-sonnet-4-6", "ocp/claude-sonnet-4-6",
        "openai/claude-sonnet-4.6", "claude/claude-sonnet-4-6", "Claude Sonnet 4.6",
        "claude_sonnet_4_6", "CLAUDE-SONNET-4-6", " claude-sonnet-4-6\n", "sonnet-4.6",
        "openrouter/anthropic/claude-sonnet-4.6", "us.anthropic.claude-sonnet-4-6-v1:0",
        "anthropic.claude-sonnet-4-6-v1", "global.anthropic.claude-sonnet-4-6",
        "claude-sonnet-4-6@default", "claude-sonnet-4-6-latest", "claude-sonnet-4-6@20260217",
        "claude-sonnet-4-6-20260217", "claude-4.6-sonnet", "claude-4-6-sonnet-20260217",
        "anthropic/claude-sonnet-4.6:thinking", "claude-sonnet-4.6:beta", "claude-sonnet-4-6:free",
        "anthropic:claude-sonnet-4-6", "claude-4.6-sonnet-thinking", "sonnet-4.6:online",
    ),
    "claude-haiku-4-5-20251001": (
        "claude-haiku-4.5", "claude-haiku-4-5@20251001",
        "eu.anthropic.claude-haiku-4-5-20251001-v1:0", "claude-haiku-4-5-latest",
    ),
    "claude-haiku-5-5": (
        "claude-haiku", "Claude Haiku", "claude-haiku-latest", "haiku-latest", "anthropic:haiku",
        "Haiku", "ocp/haiku", "claude-haiku-5.5", "haiku5.5",
    ),
    "claude-fable-5-2": ("fable", "claude-fable", "Claude Fable 5.2", "anthropic/claude-fable-5.2"),
    "claude-opus-4-5-20251101": (
        "claude-opus-4-5", "claude-opus-4.5", "vertex_ai/claude-opus-4-5@20251101",
        "us.anthropic.claude-opus-4-5-20251101-v1:0",
    ),
    "claude-opus-5": ("claude-opus 5", "Claude-opus-5", "claude-opus-5:latest", "claude-opus-5-0"),
    "claude-opus-5-5": (
        "opus", "OPUS", "anthropic/opus", "claude-opus", "claude-opus-latest", "best", "opus5.5",
        "openrouter/anthropic/claude-opus-5.5:nitro", "claude-5.5-opus", "claude-opus-5-5-20260901",
        "us.anthropic.claude-opus-5-5-v1:0", "claude-opus-5-5@20260901",
    ),
    "claude-sonnet-5-5": (
        "claude-sonnet", "claude sonnet", "anthropic/claude-sonnet:thinking", "default",
        "CLAUDE-SONNET-5.5", "sonnet-5.5", "ocp/claude-sonnet-5-5",
    ),
}


@pytest.mark.parametrize(
    ("model_id", "name"), [(key, name) for key, names in SPELLINGS.items() for name in names]
)
def test_a_model_is_found_in_every_spelling(model_id: str, name: str) -> None:
    found = MODELS.find(name)

    assert (found.id, found.argument, found.known) == (model_id, model_id, True)


def test_an_older_model_is_found_and_not_listed() -> None:
    older = [model for model in LISTED if not model.listed]

    assert list(map(name_of, older)) == ["claude-opus-4-5-20251101"]
    assert not set(map(name_of, older)) & set(MODELS.names())


def test_another_date_of_a_dated_model_is_that_model_by_another_name() -> None:
    found = MODELS.find("claude-haiku-4-5-20270101")

    assert (found.id, found.argument) == ("claude-haiku-4-5-20251001", "claude-haiku-4-5-20270101")
    assert (found.thinking, found.known) == ("budget", False)


@pytest.mark.parametrize(
    ("name", "argument", "window"),
    [
        ("claude-sonnet-4-6[1m]", "claude-sonnet-4-6[1m]", 1_000_000),
        ("anthropic/claude-opus-4.6[1M]", "claude-opus-4-6[1m]", 1_000_000),
        ("sonnet[1m]", "claude-sonnet-5-5", 1_000_000),
        ("fable[1m]", "claude-fable-5-2", 1_000_000),
        ("claude-x[1m]", "claude-x[1m]", 1_000_000),
        ("claude-haiku-4-5[1m]", "claude-haiku-4-5-20251001", 200_000),
        ("claude-opus-4-5[1m]", "claude-opus-4-5-20251101", 200_000),
    ],
)
def test_the_long_window_is_asked_for_by_a_suffix(name: str, argument: str, window: int) -> None:
    found, plain = MODELS.find(name), MODELS.find(name[:-4])

    assert (found.argument, found.context_window) == (argument, window)
    assert (found.id, found.known) == (plain.id, plain.known)


@pytest.mark.parametrize(
    "name", ["claude-4.6-sonnet-1m", "claude-sonnet-4.6 1M", "claude-4.6-sonnet-1m-thinking",
             "claude-sonnet-4-6[1m]:thinking"],
)
def test_other_ways_to_write_the_suffix_ask_for_the_long_window_too(name: str) -> None:
    found = MODELS.find(name)

    assert (found.argument, found.known) == ("claude-sonnet-4-6[1m]", True)
    assert found.context_window == 1_000_000


@pytest.mark.parametrize(
    ("name", "argument", "window"),
    [
        ("claude-sonnet-4-6", "claude-sonnet-4-6[1m]", 1_000_000),
        ("claude-haiku-4-5", "claude-haiku-4-5-20251001", 200_000),
        ("opus", "claude-opus-5-5", 1_000_000),
    ],
)
def test_the_long_window_may_be_asked_for_beside_the_name(
    name: str, argument: str, window: int
) -> None:
    found = MODELS.find(name, long_context=True)

    assert (found.argument, found.context_window) == (argument, window)


# -- other names --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("claude-opus-9", "claude-opus-5-5"),
        ("claude-opus-4-9", "claude-opus-4-8"),
        ("claude-opus-4-1-20250805", "claude-opus-4-5-20251101"),
        ("claude-sonnet-4-7-20260801", "claude-sonnet-4-6"),
        ("claude-sonnet-4-5-20250929", "claude-sonnet-4-6"),
        ("claude-sonnet-6", "claude-sonnet-5-5"),
        ("claude-sonnet-5-4", "claude-sonnet-5"),
        ("claude-haiku-4-6", "claude-haiku-4-5-20251001"),
        ("claude-haiku-5-6", "claude-haiku-5-5"),
        ("claude-fable-5-3", "claude-fable-5-2"),
        ("claude-mythos-5-2", "claude-opus-5-5"),
        ("claude-mythos-preview", "claude-opus-5-5"),
        ("claude-3-5-sonnet-20241022", "claude-sonnet-4-6"),
        ("claude-3-5-haiku-latest", "claude-haiku-4-5-20251001"),
        ("claude-2.1", "claude-haiku-4-5-20251001"),
        ("claude-of-next-year", "claude-opus-5-5"),
    ],
)
def test_an_unlisted_claude_behaves_as_the_nearest_of_its_family(name: str, like: str) -> None:
    found, model = MODELS.find(name), MODELS.find(like)
    spelled = ocp.canonical_name(name)

    assert found == model._replace(
        id=spelled, display_name=spelled, argument=spelled, known=False, listed=False,
        first_cli=(), fast_mode=False,
    )


@pytest.mark.parametrize(
    "name",
    ["gpt-4o", "", " ", "claude-", "claude--x", "claude", "sonnet-x", "anthropic/", "[1m]"]
    + ["claude-../x", "claude-" + "x" * 200, "--claude-x", "claude-\u00e9", "claude-x\0"],
)
def test_any_other_name_is_unknown(name: str) -> None:
    with pytest.raises(ocp.UnknownModel) as caught:
        MODELS.find(name)

    assert caught.value.param == "model"


def test_an_unknown_name_is_answered_with_the_names_that_there_are() -> None:
    with pytest.raises(ocp.UnknownModel) as caught:
        MODELS.find("gpt-4o")

    assert "'gpt-4o'" in caught.value.message
    assert caught.value.message.endswith("`ocp settings modelAliases NAME=MODEL,...`.")
    assert all(name in caught.value.message for name in MODELS.names())


def test_an_unknown_name_is_repeated_on_one_short_line_only() -> None:
    with pytest.raises(ocp.UnknownModel) as caught:
        MODELS.find("x\n" * 5000)

    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1000


# -- efforts in names ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model_id", "effort"),
    [
        ("sonnet:low", "claude-sonnet-5-5", "low"),
        ("sonnet-low", "claude-sonnet-5-5", "low"),
        ("anthropic/claude-opus-4.6:MAX", "claude-opus-4-6", "max"),
        ("claude-4.6-opus-high-thinking", "claude-opus-4-6", "high"),
        ("Claude Sonnet 4.6:none", "claude-sonnet-4-6", "none"),
        ("haiku:xhigh[1m]", "claude-haiku-5-5", "xhigh"),
        ("sonnet[1m]:medium", "claude-sonnet-5-5", "medium"),
        ("claude-nova-9-high", "claude-nova-9", "high"),
        ("claude-haiku-4-5-minimal", "claude-haiku-4-5-20251001", "minimal"),
    ],
)
def test_a_name_may_end_with_an_effort(name: str, model_id: str, effort: str) -> None:
    found = MODELS.find(name)

    assert (found.id, found.named_effort) == (model_id, effort)


def test_the_suffix_of_the_long_window_may_stand_on_both_sides_of_the_effort() -> None:
    arguments = {MODELS.find(name).argument for name in (
        "claude-sonnet-4-6[1m]:low", "claude-sonnet-4-6:low[1m]", "claude-sonnet-4-6-1m-low")}

    assert arguments == {"claude-sonnet-4-6[1m]"}


def test_an_id_that_ends_like_an_effort_is_an_id() -> None:
    offered = ocp.OfferedModel("opus", "claude-opus-6-max", (), None)
    models = MODELS.with_claude(ocp.ClaudeModels((2, 2, 0), (offered,)))

    found = models.find("claude-opus-6-max")

    assert (found.id, found.named_effort) == ("claude-opus-6-max", "")
    assert models.find("claude-opus-6-max-low").named_effort == "low"


@pytest.mark.parametrize("name", ["gpt-4o:low", "low", ":low", "-low", "sonnet:ultra", "x" + ":low"
                                  * 5_000])
def test_an_effort_does_not_make_a_name_of_any_word(name: str) -> None:
    with pytest.raises(ocp.UnknownModel):
        MODELS.find(name)


def effort_of(model: Any, **wish: Any) -> Any:
    return ocp.options_for(model, wanted(**wish))[0].effort


def test_the_effort_is_that_of_the_request_then_of_the_name_then_of_the_operator() -> None:
    named = MODELS.find("opus:low")
    both = named._replace(operator_effort="max")
    operators = MODELS.find("opus")._replace(operator_effort="max")

    assert effort_of(both, effort="high") == "high"
    assert effort_of(both) == "low"
    assert effort_of(operators) == "max"
    assert effort_of(MODELS.find("opus")) is None


@pytest.mark.parametrize("model", LISTED, ids=name_of)
def test_an_effort_in_the_name_counts_like_one_in_the_request(model: Any) -> None:
    for level in ("none", *EFFORTS):
        for wish in ({}, {"temperature": 0.3}, {"budget_tokens": 4_096}, {"forces_tool": True}):
            named = ocp.options_for(model._replace(named_effort=level), wanted(**wish))

            assert named == ocp.options_for(model, wanted(effort=level, **wish)), (level, wish)


@pytest.mark.parametrize("model", LISTED, ids=name_of)
def test_an_operator_s_effort_changes_nothing_but_the_effort(model: Any) -> None:
    for level in ocp.EFFORTS:
        for wish in ({}, {"temperature": 0.3}, {"effort": "none"}, {"forces_tool": True}):
            plain, ignored = ocp.options_for(model, wanted(**wish))
            found = ocp.options_for(model._replace(operator_effort=level), wanted(**wish))

            is_off = plain.thinking_tokens == 0 or plain.effort == "low"
            effort = plain.effort if is_off else ocp.nearest_effort(model, level)
            assert found == (plain._replace(effort=effort), ignored), (level, wish)


@pytest.mark.parametrize("model", [m for m in ADAPTIVE if m in STOPPABLE], ids=name_of)
def test_a_request_that_turns_thinking_off_wins_over_the_name(model: Any) -> None:
    options, _ = ocp.options_for(model._replace(named_effort="high"), wanted(budget_tokens=0))

    assert (options.thinking_tokens, options.effort) == (0, None)


# -- the operator's aliases ---------------------------------------------------


def with_aliases(text: str) -> Any:
    return MODELS.with_aliases(text)


@pytest.mark.parametrize(
    ("name", "argument", "effort"),
    [
        ("gpt-4o", "claude-sonnet-5-5", ""),
        ("GPT-4o ", "claude-sonnet-5-5", ""),
        ("openai/gpt-4o", "claude-sonnet-5-5", ""),
        ("gpt-4o:high", "claude-sonnet-5-5", "high"),
        ("fast", "claude-haiku-5-5", "low"),
        ("fast:max", "claude-haiku-5-5", "max"),
        ("deep-low", "claude-opus-5-5", "max"),
        ("wide", "claude-sonnet-4-6[1m]", ""),
        ("llama3:8b", "claude-haiku-5-5", ""),
        ("sonnet", "claude-sonnet-5-5", "low"),
        ("claude-sonnet-5-5", "claude-sonnet-5-5", ""),
    ],
)
def test_a_name_of_the_operator_s_leads_to_its_model(
    name: str, argument: str, effort: str
) -> None:
    models = with_aliases(
        "gpt-4o=claude-sonnet-5.5, fast=haiku:low, deep-low=opus:max, wide=claude-sonnet-4-6[1m],"
        "llama3:8b=haiku, sonnet=sonnet:low")

    found = models.find(name)

    assert (found.argument, found.named_effort) == (argument, effort)


def test_names_of_the_operator_s_are_told_and_may_limit_a_key() -> None:
    models = with_aliases("gpt-4o=sonnet,fast=haiku:low")

    assert models.names()[-2:] == ["gpt-4o", "fast"]
    assert models.aliases_of(models.find("sonnet")) == ["sonnet", "default", "gpt-4o"]
    assert models.resolve(["fast", "gpt-4o"]) == {"claude-haiku-5-5", "claude-sonnet-5-5"}
    assert models.is_alias("fast") and models.is_alias("opus") and not models.is_alias("gpt-5")


def test_an_alias_of_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="There is no model 'gpt-5'"):
        MODELS.check_aliases("fast=haiku,slow=gpt-5")
    with pytest.raises(ValueError, match="There is no model 'fast'"):
        with_aliases("fast=haiku").check_aliases("fast=haiku,slow=fast")
    MODELS.check_aliases("fast=haiku:low,new=claude-nova-9")


# -- the claude in use --------------------------------------------------------

OLD, NEW_CLI = (2, 1, 197), (2, 1, 332)
LEVELS = ["low", "medium", "high", "xhigh", "max"]


def row_of(value: str, model_id: str, **fields: Any) -> dict[str, Any]:
    """A row of what claude lists."""
    return {"value": value, "resolvedModel": model_id, "displayName": value.title(), **fields}


def as_reported(version: Any, *rows: dict[str, Any], argument: str = "claude-opus-5-5") -> Any:
    """The models after a process has reported these rows."""
    catalog = ocp.ModelCatalog(MODELS)
    catalog.add_report(version, argument, ocp.offered_models(list(rows)))
    return catalog.models


def test_before_a_report_an_alias_is_the_newest_of_its_family_that_claude_knows() -> None:
    catalog = ocp.ModelCatalog(MODELS)
    aliases = ("opus", "sonnet", "haiku", "fable", "best", "default")

    catalog.set_version(OLD)

    assert [catalog.models.find(name).id for name in aliases] == [
        "claude-opus-4-8", "claude-sonnet-5", "claude-haiku-4-5-20251001", "claude-fable-5",
        "claude-opus-4-8", "claude-sonnet-5"]
    catalog.set_version(NEW_CLI)
    assert [catalog.models.find(name).id for name in aliases] == [
        MODELS.find(name).id for name in aliases]


def test_an_alias_is_what_claude_says() -> None:
    models = as_reported(
        NEW_CLI, row_of("default", "claude-opus-5-5"), row_of("opus[1m]", "claude-opus-4-6[1m]"),
        row_of("sonnet", "claude-sonnet-5"))

    found = [models.find(name).id for name in ("default", "opus", "best", "sonnet", "haiku")]

    assert found == ["claude-opus-5-5", "claude-opus-4-6", "claude-opus-4-6", "claude-sonnet-5",
                     "claude-haiku-5-5"]


def test_a_model_that_claude_is_too_old_for_is_not_listed_and_says_what_it_needs() -> None:
    models = MODELS.with_claude(ocp.ClaudeModels(OLD))

    listed = [model.id for model in models.offered()]

    assert listed == [model.id for model in LISTED if model.listed and model.first_cli <= OLD]
    assert "claude-sonnet-5" in listed and "claude-sonnet-5-5" not in listed
    assert not {"claude-opus-5-5", "claude-opus-5"} & set(models.names())
    with pytest.raises(ocp.ModelNeedsNewerClaude) as caught:
        models.check_runs(models.find("claude-sonnet-5-5"))
    assert "2.1.284" in caught.value.message and "2.1.197" in caught.value.message
    models.check_runs(models.find("claude-sonnet-5-6"))


def test_families_that_the_account_does_not_get_are_not_listed() -> None:
    models = as_reported(
        NEW_CLI, row_of("sonnet", "claude-sonnet-5-5"), row_of("haiku", "claude-haiku-5-5"))

    assert {model.lineage[0] for model in models.offered()} == {"sonnet", "haiku"}
    assert models.find("fable").id == "claude-fable-5-2"


def test_a_model_that_only_claude_knows_is_listed_first() -> None:
    models = as_reported((2, 2, 0), row_of(
        "opus", "claude-opus-6-1", supportedEffortLevels=["max", "low", "new"],
        supportsThinkingOff=True))

    found = models.find("opus")

    assert models.offered()[0] == found == models.find("claude-opus-6-1")
    assert (found.id, found.display_name, found.known) == (
        "claude-opus-6-1", "Claude Opus 6.1", True)
    assert (found.efforts, found.cli_thinking_off) == (("low", "max"), True)
    assert found.prices == models.find("claude-opus-5-5").prices
    assert found.context_window == MODELS.find("claude-opus-5-5").context_window


def test_claude_completes_what_the_file_says() -> None:
    models = as_reported(NEW_CLI, row_of(
        "sonnet", "claude-sonnet-5-5", supportedEffortLevels=["low", "high"],
        supportsThinkingOff=False, supportsFastMode=True))

    found = models.find("sonnet")

    assert (found.efforts, found.cli_thinking_off) == (("low", "high"), False)
    assert (found.fast_mode, MODELS.find("sonnet").fast_mode) == (True, False)
    assert models.find("opus").cli_thinking_off is None


def test_the_model_of_a_process_is_no_offer_of_the_account() -> None:
    catalog = ocp.ModelCatalog(MODELS)
    sonnet, nova = row_of("sonnet", "claude-sonnet-5-5"), row_of("claude-nova-9", "claude-nova-9")

    catalog.add_report(NEW_CLI, "claude-nova-9", ocp.offered_models([sonnet, nova]))

    assert "claude-nova-9" not in catalog.models.names()
    catalog.add_report(NEW_CLI, "claude-sonnet-5-5", ocp.offered_models([sonnet, nova]))
    assert "claude-nova-9" in catalog.models.names()
    catalog.add_report(NEW_CLI, "claude-nova-9", ocp.offered_models([sonnet, nova]))
    assert "claude-nova-9" in catalog.models.names()


def test_the_model_of_the_first_process_is_listed_until_another_process_tells() -> None:
    catalog = ocp.ModelCatalog(MODELS)
    opus, haiku = row_of("opus", "claude-opus-5-5"), row_of("haiku", "claude-haiku-5-5")
    own = row_of("claude-sonnet-5-5", "claude-sonnet-5-5")

    def families() -> set[str]:
        return {model.lineage[0] for model in catalog.models.offered()}

    catalog.add_report(NEW_CLI, "claude-sonnet-5-5[1m]", ocp.offered_models([opus, haiku, own]))
    first = families()
    catalog.add_report(NEW_CLI, "claude-sonnet-5-5[1m]", ocp.offered_models([opus, haiku, own]))
    again = families()
    catalog.add_report(NEW_CLI, "claude-opus-5-5", ocp.offered_models([haiku]))

    assert first == again == {"opus", "sonnet", "haiku"}
    assert families() == {"opus", "haiku"}


def test_an_alias_of_a_model_that_claude_is_too_old_for_is_not_told() -> None:
    models = with_aliases("fast=claude-haiku-4-5,new=claude-opus-5-5:low,opus=sonnet")

    told = models.with_claude(ocp.ClaudeModels(OLD)).names()

    assert ("fast" in told, "new" in told, told.count("opus")) == (True, False, 1)


def test_an_alias_that_the_model_of_a_process_hides_stays() -> None:
    catalog = ocp.ModelCatalog(MODELS)
    sonnet, fable = row_of("sonnet", "claude-sonnet-5-5"), row_of("fable", "claude-fable-5-1")
    own = row_of("claude-fable-5-1", "claude-fable-5-1")

    catalog.add_report(NEW_CLI, "claude-sonnet-5-5", ocp.offered_models([sonnet, fable]))
    catalog.add_report(NEW_CLI, "claude-fable-5-1", ocp.offered_models([sonnet, own]))

    assert catalog.models.find("fable").id == "claude-fable-5-1"
    assert {model.lineage[0] for model in catalog.models.offered()} == {"sonnet", "fable"}
    moved = row_of("fable", "claude-fable-5-2")
    catalog.add_report(NEW_CLI, "claude-fable-5-1", ocp.offered_models([sonnet, moved, own]))
    assert catalog.models.find("fable").id == "claude-fable-5-2"


class ChangingApp:
    """An app whose aliases change whenever somebody looks at its models."""

    def __init__(self) -> None:
        self.config = ocp.load_config({})
        self._aliases = itertools.chain(["gpt-4o=haiku"], itertools.repeat("gpt-4o=opus"))

    @property
    def models(self) -> Any:
        return with_aliases(next(self._aliases))


def test_a_change_of_the_models_does_not_reach_a_request_that_is_being_parsed() -> None:
    caller = ocp.Caller("device", models=("gpt-4o",))
    exchange = SimpleNamespace(caller=caller, dialect=ocp.CHAT, headers={})
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hi"}]}

    turn = ocp._parse_turn(ChangingApp(), exchange, body, counted=True)

    assert turn.model.id == "claude-haiku-5-5"


def test_another_claude_is_not_believed_what_the_last_one_said() -> None:
    catalog = ocp.ModelCatalog(MODELS)
    catalog.add_report(NEW_CLI, "", ocp.offered_models([row_of("opus", "claude-opus-5")]))
    assert catalog.models.find("opus").id == "claude-opus-5"

    catalog.set_version(OLD)
    assert catalog.models.find("opus").id == "claude-opus-4-8"
    catalog.add_report(NEW_CLI, "", ocp.offered_models([row_of("opus", "claude-opus-5")]))
    assert catalog.models.find("opus").id == "claude-opus-4-8"


@pytest.mark.parametrize(
    "rows",
    [None, {}, "x", [None, 1, "x", []], [{}], [{"value": "opus"}],
     [{"resolvedModel": "claude-opus-5-5"}], [{"value": 7, "resolvedModel": "claude-opus-5-5"}],
     [row_of("opus", "gpt-4")], [row_of("opus", "../x")], [{"value": "opus", "resolvedModel": 7}]],
    ids=str,
)
def test_what_claude_lists_in_another_form_is_left_out(rows: Any) -> None:
    assert ocp.offered_models(rows) == ()


def test_odd_fields_of_a_listed_model_are_left_out() -> None:
    (found,) = ocp.offered_models([row_of(
        "opus", "claude-opus-5-5", supportedEffortLevels="low", supportsThinkingOff="no",
        supportsFastMode=1)])

    assert found == ocp.OfferedModel("opus", "claude-opus-5-5", (), None)


# -- the file -----------------------------------------------------------------


def test_without_a_file_the_built_in_models_are_used(tmp_path: Path) -> None:
    assert ocp.load_models(str(tmp_path)).all() == LISTED


def test_a_file_replaces_the_built_in_models(tmp_path: Path) -> None:
    row = {**ocp.BUILTIN_MODELS["models"][0], "id": "claude-mine"}
    source = {"models": [row], "aliases": {"mine": "claude-mine"}, "legacyAliases": {}}
    Path(tmp_path, "models.json").write_text(json.dumps(source), "utf-8")

    models = ocp.load_models(str(tmp_path))

    assert models.names() == ["claude-mine", "mine"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"models": 1, "aliases": {}, "legacyAliases": {}}']
    + ['{"models": [{"id": "a"}], "aliases": {}, "legacyAliases": {}}', '{"models": [NaN]}'],
)
def test_a_file_that_cannot_be_used_stops_the_start(tmp_path: Path, text: str) -> None:
    Path(tmp_path, "models.json").write_text(text, "utf-8")

    with pytest.raises(ocp.ConfigError, match=r"models\.json"):
        ocp.load_models(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [{"efforts": ["low", "ultra"]}, {"efforts": "low"}, {"thinking": "deep"}, {"maxTokens": "many"},
     {"sampling": "no"}, {"id": 7}, {"contextWindow": 1.5}, {"reasoning": 1},
     {"thinkingOff": "sometimes"}, {"defaultEffort": "ultra"}, {"firstCli": "new"}, {"prices": {}},
     {"thinkingOffMaxEffort": "none"}, {"forcedTools": None},
     {"prices": {**ocp.BUILTIN_MODELS["models"][0]["prices"], "input": "4"}},
     {"prices": {**ocp.BUILTIN_MODELS["models"][0]["prices"], "input": 4.0001}}],
    ids=str,
)
def test_a_model_of_the_file_with_a_wrong_value_stops_the_start(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    row = {**ocp.BUILTIN_MODELS["models"][0], **change}
    source = {"models": [row], "aliases": {}, "legacyAliases": {}}
    Path(tmp_path, "models.json").write_text(json.dumps(source), "utf-8")

    with pytest.raises(ocp.ConfigError, match=r"models\.json"):
        ocp.load_models(str(tmp_path))


@pytest.mark.parametrize(
    ("count", "aliases"), [(1, {"opus": "claude-gone"}), (1, {"a": "b", "b": "a"}), (0, {})],
    ids=["a dangling alias", "a circle of aliases", "empty"],
)
def test_a_file_without_what_it_names_stops_the_start(
    tmp_path: Path, count: int, aliases: dict[str, str]
) -> None:
    rows = ocp.BUILTIN_MODELS["models"][:count]
    source = {"models": rows, "aliases": aliases, "legacyAliases": {}}
    Path(tmp_path, "models.json").write_text(json.dumps(source), "utf-8")

    with pytest.raises(ocp.ConfigError, match=r"models\.json"):
        ocp.load_models(str(tmp_path))


# -- options: whatever a client asks, the API is sent nothing that it refuses --

TEMPERATURES = (None, 0.0, 0.3, 1.0)
TOP_PS = (None, 0.0, 0.5, 0.95, 1.0)
LIMITS = (None, 1, 1_024, 1_025, 2_048, 64_000)


def every_wish() -> list[Any]:
    return [
        wanted(max_tokens=limit, temperature=temperature, top_p=top_p, effort=effort)
        for temperature, top_p, effort, limit in itertools.product(
            TEMPERATURES, TOP_PS, (None, "none", *EFFORTS), LIMITS
        )
    ]


def thinks(options: Any) -> bool:
    return bool(options.thinking_tokens != 0)


def sampling_of(options: Any) -> dict[str, float]:
    """The sampling parameters that are sent."""
    assert list(options.sampling) == sorted(set(options.sampling))
    return dict(options.sampling)


def changes_sampling(options: Any) -> bool:
    return any(value != 1 for value in sampling_of(options).values())


#: What the API refuses: (name, whether it would refuse these options of this model).
REFUSALS: dict[str, Callable[[Any, Any], bool]] = {
    "sampling together with thinking": lambda model, options: (
        thinks(options) and changes_sampling(options)
        and (set(sampling_of(options)) != {"top_p"} or sampling_of(options)["top_p"] < 0.95)
    ),
    "a top_p beside the temperature that claude sends without thinking": lambda model, options: (
        not thinks(options) and "top_p" in sampling_of(options)
    ),
    "both sampling parameters": lambda model, options: (
        {"temperature", "top_p"} <= set(sampling_of(options))
    ),
    "sampling of a model that takes none": lambda model, options: (
        not model.sampling and sampling_of(options) != {}
    ),
    "a budget that is too small": lambda model, options: (
        options.thinking_tokens is not None and 0 < options.thinking_tokens < 1_024
    ),
    "a budget that leaves no room for an answer": lambda model, options: (
        (options.thinking_tokens or 0) >= (options.max_tokens or model.default_max_tokens)
    ),
    "a level of effort that the model does not know": lambda model, options: (
        options.effort is not None and options.effort not in model.efforts
    ),
}


@pytest.mark.parametrize("model", [*LISTED, NEW], ids=name_of)
def test_no_wish_leads_to_what_the_api_refuses(model: Any) -> None:
    led = [(wish, ocp.options_for(model, wish)[0]) for wish in every_wish()]

    refused = {
        name: [wish for wish, options in led if is_refused(model, options)]
        for name, is_refused in REFUSALS.items()}

    assert refused == dict.fromkeys(REFUSALS, [])


@pytest.mark.parametrize("model", [*LISTED, NEW], ids=name_of)
def test_a_sampling_parameter_is_either_sent_or_named_as_ignored(model: Any) -> None:
    for wish in every_wish():
        options, ignored = ocp.options_for(model, wish)
        for name in ("temperature", "top_p"):
            wanted, sent = getattr(wish, name), sampling_of(options).get(name)
            assert sent in (None, wanted), wish
            if wanted not in (None, 1):
                assert (sent is None) == (name in ignored), wish
            else:
                assert name not in ignored, wish


@pytest.mark.parametrize("model", [*LISTED, NEW], ids=name_of)
def test_limits_and_stop_sequences_are_always_sent(model: Any) -> None:
    wish = wanted(max_tokens=7, stop_sequences=("a", "b"), temperature=0.3, effort="high")

    options, _ = ocp.options_for(model, wish)

    assert (options.max_tokens, options.stop_sequences) == (7, ("a", "b"))


@pytest.mark.parametrize("model", ADAPTIVE, ids=name_of)
def test_a_wish_for_nothing_changes_nothing_of_an_adaptive_model(model: Any) -> None:
    assert ocp.options_for(model, wanted()) == (ocp.Options(), ())


@pytest.mark.parametrize("model", BUDGET, ids=name_of)
def test_a_model_with_a_budget_thinks_only_when_asked(model: Any) -> None:
    options, _ = ocp.options_for(model, wanted())

    assert options.thinking_tokens == 0


@pytest.mark.parametrize("model", STOPPABLE, ids=name_of)
def test_the_effort_none_turns_thinking_off(model: Any) -> None:
    options, _ = ocp.options_for(model, wanted(effort="none"))

    assert (options.thinking_tokens, options.effort) == (0, None)


#: How a client says that it wants no thinking.
OFF: dict[str, dict[str, Any]] = {
    "effort": {"effort": "none"}, "budget": {"budget_tokens": 0}, "limit": {"max_tokens": 2_047},
    "no answer": {"max_tokens": 0},
}


@pytest.mark.parametrize("way", OFF)
@pytest.mark.parametrize(
    ("name", "sent"),
    [("claude-sonnet-5-5", "between_tools"), ("claude-haiku-5-5", "disabled"),
     ("claude-opus-5", ""), ("claude-sonnet-5", ""), ("claude-sonnet-4-6", ""),
     ("claude-haiku-4-5", "")],
)
def test_thinking_is_switched_off_in_the_way_of_the_model(name: str, sent: str, way: str) -> None:
    options, ignored = ocp.options_for(MODELS.find(name), wanted(**OFF[way]))

    assert (options.thinking_tokens, options.thinking_type, ignored) == (0, sent, ())


@pytest.mark.parametrize("way", OFF)
@pytest.mark.parametrize("model", ALWAYS, ids=name_of)
def test_a_model_that_always_thinks_gets_its_lowest_effort(model: Any, way: str) -> None:
    options, ignored = ocp.options_for(model, wanted(**OFF[way]))

    assert (options.thinking_tokens, options.thinking_type, options.effort) == (None, "", "low")
    assert ignored == ()


@pytest.mark.parametrize("model", ALWAYS, ids=name_of)
def test_the_field_that_could_not_switch_thinking_off_is_named(model: Any) -> None:
    wish = ocp.RequestedOptions(thinking=ocp.Thinking("high", 0, off_field="thinking"))

    options, ignored = ocp.options_for(model, wish)

    assert (options.effort, ignored) == ("high", ("thinking",))


@pytest.mark.parametrize("model", ADAPTIVE, ids=name_of)
def test_a_short_limit_leaves_no_room_for_thinking_unless_it_is_asked_for(model: Any) -> None:
    short = ocp.options_for(model, wanted(max_tokens=100))[0]
    asked = ocp.options_for(model, wanted(max_tokens=100, effort="high"))[0]
    long = ocp.options_for(model, wanted(max_tokens=2_048))[0]

    assert short.thinking_tokens == 0 or short.effort == "low"
    assert (asked.thinking_tokens, asked.effort) == (None, "high")
    assert (long.thinking_tokens, long.effort) == (None, None)


@pytest.mark.parametrize("level", ["xhigh", "max"])
@pytest.mark.parametrize(
    ("name", "highest"),
    [("claude-sonnet-5-5", "high"), ("claude-haiku-5-5", "high"), ("claude-opus-5", "high"),
     ("claude-opus-4-8", None)],
)
def test_an_effort_is_lowered_to_what_goes_without_thinking(
    name: str, highest: str | None, level: str
) -> None:
    options, _ = ocp.options_for(MODELS.find(name), wanted(effort=level, budget_tokens=0))

    assert (options.thinking_tokens, options.effort) == (0, highest or level)


@pytest.mark.parametrize(
    ("name", "sent", "tokens"),
    [("claude-sonnet-5-5", "between_tools", 0), ("claude-haiku-5-5", "disabled", 0),
     ("claude-opus-5-5", "", None), ("claude-opus-4-8", "", None)],
)
def test_the_effort_minimal_is_low_and_no_thinking_in_models_that_claude_cannot_stop(
    name: str, sent: str, tokens: int | None
) -> None:
    options, ignored = ocp.options_for(MODELS.find(name), wanted(effort="minimal"))

    assert (options.effort, options.thinking_type, options.thinking_tokens) == ("low", sent, tokens)
    assert ignored == ()


def test_a_model_that_cannot_stop_thinking_is_sent_no_sampling() -> None:
    model = MODELS.find("claude-sonnet-4-6")._replace(thinking_off="never")

    options, ignored = ocp.options_for(model, wanted(temperature=0.3))

    assert (options.sampling, options.thinking_tokens, ignored) == ((), None, ("temperature",))


# -- what the API refuses ------------------------------------------------------

def test_a_refusal_is_remembered_until_another_claude_is_in_use() -> None:
    catalog = ocp.ModelCatalog(MODELS)
    catalog.set_version((2, 1, 332))
    catalog.add_refusal(ocp.ModelRefusal("claude-haiku-5-5", "thinking_off", "never"))
    catalog.add_refusal(ocp.ModelRefusal("claude-haiku-5-5", "forced_tools", False))
    catalog.add_report((2, 1, 332), "x", ocp.offered_models([row_of("haiku", "claude-haiku-5-5")]))
    refused = catalog.models.find("haiku:high")
    other = catalog.models.find("sonnet")
    catalog.set_version((2, 1, 333))

    assert (refused.thinking_off, refused.forced_tools) == ("never", False)
    assert other == MODELS.find("sonnet")
    assert catalog.models.find("haiku") == MODELS.find("haiku")


def test_what_claude_does_not_say_leaves_what_the_file_says() -> None:
    models = as_reported(NEW_CLI, row_of("haiku", "claude-haiku-5-5"))

    assert models.find("haiku").cli_thinking_off is False
    assert models.find("claude-haiku-5-9").sent_thinking_off == "disabled"


@pytest.mark.parametrize("model", SAMPLING, ids=name_of)
def test_a_temperature_alone_is_kept_and_thinking_goes(model: Any) -> None:
    options, ignored = ocp.options_for(model, wanted(temperature=0.3))

    assert (sampling_of(options), options.thinking_tokens, ignored) == ({"temperature": 0.3}, 0, ())


@pytest.mark.parametrize("model", SAMPLING, ids=name_of)
def test_an_effort_is_kept_and_the_temperature_goes(model: Any) -> None:
    options, ignored = ocp.options_for(model, wanted(temperature=0.3, effort="high"))

    assert thinks(options)
    assert (sampling_of(options), ignored) == ({}, ("temperature",))


@pytest.mark.parametrize("model", SAMPLING, ids=name_of)
def test_a_temperature_of_one_goes_with_thinking(model: Any) -> None:
    options, ignored = ocp.options_for(model, wanted(temperature=1.0, effort="high"))

    assert thinks(options)
    assert ignored == ()


@pytest.mark.parametrize(
    ("model", "sent"),
    [("claude-sonnet-4-6", {"top_p": 0.97}), ("claude-haiku-4-5", {}), ("opus", {})],
)
def test_a_high_top_p_goes_with_thinking_where_there_is_some(
    model: str, sent: dict[str, float]
) -> None:
    options, ignored = ocp.options_for(MODELS.find(model), wanted(top_p=0.97))

    assert (sampling_of(options), ignored) == (sent, () if sent else ("top_p",))


@pytest.mark.parametrize("model", SAMPLING, ids=name_of)
def test_of_two_sampling_parameters_the_temperature_is_kept(model: Any) -> None:
    options, ignored = ocp.options_for(model, wanted(temperature=0.3, top_p=0.5))

    assert (sampling_of(options), ignored) == ({"temperature": 0.3}, ("top_p",))


@pytest.mark.parametrize("model", SAMPLING, ids=name_of)
@pytest.mark.parametrize(
    ("wish", "sent", "named"),
    [
        ({"temperature": 1.0, "top_p": 0.5}, {}, ("top_p",)),
        ({"temperature": 0.5, "top_p": 1.0}, {"temperature": 0.5}, ()),
        ({"temperature": 1.0, "top_p": 1.0}, {}, ()),
        ({"temperature": 1.3}, {}, ("temperature",)),
        ({"temperature": 2.0, "top_p": 0.5}, {}, ("temperature", "top_p")),
        ({"top_k": 5}, {"top_k": 5}, ()),
        ({"top_k": 5, "temperature": 0.5}, {"temperature": 0.5, "top_k": 5}, ()),
    ],
    ids=str,
)
def test_a_default_excludes_nothing(
    model: Any, wish: dict[str, float], sent: dict[str, float], named: tuple[str, ...]
) -> None:
    options, ignored = ocp.options_for(model, wanted(**wish))

    assert (sampling_of(options), ignored) == (sent, named)


@pytest.mark.parametrize("model", [m for m in STOPPABLE if m.forced_tools], ids=name_of)
@pytest.mark.parametrize("wish", [{}, {"effort": "high"}, {"budget_tokens": 4_096}], ids=str)
def test_a_forced_call_turns_thinking_off(model: Any, wish: dict[str, Any]) -> None:
    options, _ = ocp.options_for(model, wanted(forces_tool=True, **wish))

    assert options.thinking_tokens == 0


@pytest.mark.parametrize("model", [m for m in LISTED if not m.forced_tools], ids=name_of)
@pytest.mark.parametrize("wish", [{}, {"effort": "high"}, {"effort": "none"}], ids=str)
def test_a_call_that_cannot_be_forced_changes_no_option(model: Any, wish: dict[str, Any]) -> None:
    assert ocp.options_for(model, wanted(forces_tool=True, **wish)) == ocp.options_for(
        model, wanted(**wish))


@pytest.mark.parametrize("model", BUDGET, ids=name_of)
@pytest.mark.parametrize(
    ("tokens", "limit", "budget"),
    [(1_024, None, 1_024), (10_000, 30_000, 10_000), (10_000, 10_001, 10_000),
     (10_000, 10_000, 5_000), (2_000, 2_000, 0), (40_000, None, 16_000), (0, None, 0)],
)
def test_a_budget_that_the_client_names_is_kept_if_it_leaves_room_for_an_answer(
    model: Any, tokens: int, limit: int | None, budget: int
) -> None:
    options, ignored = ocp.options_for(model, wanted(budget_tokens=tokens, max_tokens=limit))

    assert options.thinking_tokens == budget
    assert ignored == (() if budget == tokens else ("thinking.budget_tokens",))


@pytest.mark.parametrize("model", ADAPTIVE, ids=name_of)
def test_an_adaptive_model_is_told_no_budget_but_none(model: Any) -> None:
    budgets = [
        ocp.options_for(model, wanted(budget_tokens=tokens))[0].thinking_tokens
        for tokens in (None, 1_024, 30_000, 0)
    ]

    assert budgets == [None, None, None, 0 if model in STOPPABLE else None]


@pytest.mark.parametrize("model", BUDGET, ids=name_of)
@pytest.mark.parametrize(
    ("effort", "limit", "budget"),
    [
        ("minimal", None, 1_024), ("low", None, 2_048), ("max", None, 16_000),
        ("high", 5_000, 2_500), ("low", 64_000, 2_048), ("high", 2_048, 1_024),
        ("high", 2_047, 0), ("low", 1, 0),
    ],
)
def test_an_effort_becomes_a_budget_that_leaves_half_of_the_limit(
    model: Any, effort: str, limit: int, budget: int
) -> None:
    options, _ = ocp.options_for(model, wanted(effort=effort, max_tokens=limit))

    assert options.thinking_tokens == budget
    assert options.effort == ocp.nearest_effort(model, effort)


@pytest.mark.parametrize(
    ("levels", "wanted", "given"),
    [
        (("low", "medium", "high"), "medium", "medium"),
        (("low", "medium", "high"), "minimal", "low"),
        (("low", "medium", "high"), "max", "high"),
        (("low", "high", "max"), "xhigh", "high"),
        (("high",), "low", "high"),
        ((), "high", None),
    ],
)
def test_a_level_that_the_model_lacks_becomes_the_next_lower_one(
    levels: tuple[str, ...], wanted: str, given: str
) -> None:
    model = NEWEST._replace(efforts=levels)

    assert ocp.nearest_effort(model, wanted) == given
