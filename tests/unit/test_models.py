"""Models: which there are, what they are called, and which options their API is sent."""
from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
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
    assert 0 < model.max_tokens < model.context_window
    assert model.display_name


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

    assert (found.id, found.known) == (model_id, True)


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
        "claude-haiku-4.5", "claude-haiku-4-5@20251001", "Haiku", "ocp/haiku",
        "eu.anthropic.claude-haiku-4-5-20251001-v1:0", "claude-haiku-4-5-latest", "claude-haiku",
        "Claude Haiku", "claude-haiku-latest", "haiku-latest", "anthropic:haiku",
    ),
    "claude-opus-4-5-20251101": (
        "claude-opus-4-5", "claude-opus-4.5", "vertex_ai/claude-opus-4-5@20251101",
        "us.anthropic.claude-opus-4-5-20251101-v1:0",
    ),
    "claude-opus-4-20250514": ("claude-opus-4-0", "claude-opus-4@20250514"),
    "claude-opus-5": (
        "opus", "OPUS", "claude-opus 5", "anthropic/opus", "Claude-opus-5", "claude-opus",
        "claude-opus-5:latest", "claude-opus-latest",
    ),
    "claude-sonnet-5": ("claude-sonnet", "claude sonnet", "anthropic/claude-sonnet:thinking"),
}


@pytest.mark.parametrize(
    ("model_id", "name"), [(key, name) for key, names in SPELLINGS.items() for name in names]
)
def test_a_model_is_found_in_every_spelling(model_id: str, name: str) -> None:
    found = MODELS.find(name)

    assert (found.id, found.argument, found.known) == (model_id, model_id, True)


def test_an_older_model_is_found_and_not_listed() -> None:
    older = [model for model in LISTED if not model.listed]

    assert {"claude-opus-4-5-20251101", "claude-sonnet-4-5-20250929"} <= set(map(name_of, older))
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
        ("claude-sonnet-4-5[1m]", "claude-sonnet-4-5-20250929[1m]", 1_000_000),
        ("sonnet[1m]", "claude-sonnet-5", 1_000_000),
        ("claude-x[1m]", "claude-x[1m]", 1_000_000),
        ("haiku[1m]", "claude-haiku-4-5-20251001", 200_000),
        ("claude-opus-4-5[1m]", "claude-opus-4-5-20251101", 200_000),
    ],
)
def test_the_long_window_is_asked_for_by_a_suffix(name: str, argument: str, window: int) -> None:
    found, plain = MODELS.find(name), MODELS.find(name[:-4])

    assert (found.argument, found.context_window) == (argument, window)
    assert (found.id, found.known) == (plain.id, plain.known)


@pytest.mark.parametrize(
    "name", ["claude-4-sonnet-1m", "claude-sonnet-4 1M", "claude-4-sonnet-1m-thinking",
             "claude-sonnet-4[1m]:thinking"],
)
def test_other_ways_to_write_the_suffix_ask_for_the_long_window_too(name: str) -> None:
    found = MODELS.find(name)

    assert (found.argument, found.known) == ("claude-sonnet-4-20250514[1m]", True)
    assert found.context_window == 1_000_000


@pytest.mark.parametrize(
    ("name", "argument", "window"),
    [
        ("claude-sonnet-4-6", "claude-sonnet-4-6[1m]", 1_000_000),
        ("haiku", "claude-haiku-4-5-20251001", 200_000),
        ("opus", "claude-opus-5", 1_000_000),
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
        ("claude-opus-9", "claude-opus-5"),
        ("claude-opus-4-9", "claude-opus-4-8"),
        ("claude-opus-4-2-20250901", "claude-opus-4-1-20250805"),
        ("claude-sonnet-4-7-20260801", "claude-sonnet-4-6"),
        ("claude-sonnet-6", "claude-opus-5"),
        ("claude-sonnet-5-5", "claude-sonnet-5"),
        ("claude-haiku-4-6", "claude-haiku-4-5-20251001"),
        ("claude-haiku-5-5", "claude-opus-5"),
        ("claude-fable-5-2", "claude-opus-5"),
        ("claude-mythos-preview", "claude-opus-5"),
        ("claude-3-5-sonnet-20241022", "claude-sonnet-4-20250514"),
        ("claude-3-5-haiku-latest", "claude-haiku-4-5-20251001"),
        ("claude-2.1", "claude-opus-4-20250514"),
        ("claude-of-next-year", "claude-opus-5"),
    ],
)
def test_an_unlisted_claude_behaves_as_the_nearest_of_its_family(name: str, like: str) -> None:
    found, model = MODELS.find(name), MODELS.find(like)
    spelled = ocp.canonical_name(name)

    assert found == model._replace(
        id=spelled, display_name=spelled, argument=spelled, known=False, listed=False
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
    assert all(name in caught.value.message for name in MODELS.names())


def test_an_unknown_name_is_repeated_on_one_short_line_only() -> None:
    with pytest.raises(ocp.UnknownModel) as caught:
        MODELS.find("x\n" * 5000)

    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1000


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
     {"sampling": "no"}, {"id": 7}, {"contextWindow": 1.5}, {"reasoning": 1}],
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
    ("count", "aliases"), [(1, {"opus": "claude-gone"}), (0, {})], ids=["a dangling alias", "empty"]
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
        (options.thinking_tokens or 0) >= (options.max_tokens or model.max_tokens)
    ),
    "a level of effort that the model does not know": lambda model, options: (
        options.effort is not None and options.effort not in model.efforts
    ),
}


@pytest.mark.parametrize("refusal", sorted(REFUSALS))
@pytest.mark.parametrize("model", [*LISTED, NEW], ids=name_of)
def test_no_wish_leads_to_what_the_api_refuses(model: Any, refusal: str) -> None:
    refused = [
        wish for wish in every_wish() if REFUSALS[refusal](model, ocp.options_for(model, wish)[0])
    ]

    assert refused == []


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


@pytest.mark.parametrize("model", LISTED, ids=name_of)
def test_the_effort_none_turns_thinking_off(model: Any) -> None:
    options, _ = ocp.options_for(model, wanted(effort="none"))

    assert (options.thinking_tokens, options.effort) == (0, None)


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
    [("claude-sonnet-4-6", {"top_p": 0.97}), ("haiku", {}), ("opus", {})],
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


@pytest.mark.parametrize("model", LISTED, ids=name_of)
@pytest.mark.parametrize("wish", [{}, {"effort": "high"}, {"budget_tokens": 4_096}], ids=str)
def test_a_forced_call_turns_thinking_off(model: Any, wish: dict[str, Any]) -> None:
    options, _ = ocp.options_for(model, wanted(forces_tool=True, **wish))

    assert options.thinking_tokens == 0


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

    assert budgets == [None, None, None, 0]


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
