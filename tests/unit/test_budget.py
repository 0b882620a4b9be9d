"""The budget of a prompt: which messages fit, and about how many tokens there are."""
from __future__ import annotations

import json
from typing import Any

import pytest

from project import load_script
from rendering import SONNET, assistant, block, conversation, user

ocp = load_script("ocp_server.py")

Json = dict[str, Any]


def use(call_id: str) -> Json:
    return {"type": "tool_use", "id": call_id, "name": "weather", "input": {}}


def result(call_id: str, text: str = "Sunny.") -> Json:
    return {"type": "tool_result", "tool_use_id": call_id, "content": [block(text)]}


PICTURE = {"type": "image",
           "source": {"type": "base64", "media_type": "image/png", "data": "a" * 5000}}
PAPER = {"type": "document",
         "source": {"type": "base64", "media_type": "application/pdf", "data": "a" * 5000}}


def turn(*messages: Any, **fields: Any) -> Any:
    return ocp.Turn(
        **{"model": SONNET, "messages": list(messages), "options": ocp.Options(), **fields}
    )


def characters(part: Json) -> int:
    """The characters that a block is counted as."""
    if part["type"] == "text":
        return len(part["text"])
    if part["type"] == "tool_result":
        return sum(characters(inner) for inner in part["content"])
    return 0 if "source" in part else len(part["name"] + compact(part["input"]))


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def weight(*messages: Any) -> int:
    """The characters that these messages are counted as."""
    return sum(characters(part) for message in messages for part in message.content)


def fitted(asked: Any, most_chars: int) -> tuple[list[Any], int]:
    """What is left of a Turn's messages, and how many were dropped."""
    found, dropped = ocp.truncate_to_budget(asked, most_chars)
    return found.messages, dropped


def refusal(asked: Any, most_chars: int) -> Any:
    with pytest.raises(ocp.ContextTooLong) as caught:
        ocp.truncate_to_budget(asked, most_chars)
    return caught.value


TALK = [user("a" * 50), assistant("b" * 50), user("c" * 50), assistant("d" * 50), user("e" * 50)]


def test_what_fits_is_left_alone() -> None:
    asked = turn(*TALK)

    found, dropped = ocp.truncate_to_budget(asked, weight(*TALK))

    assert found is asked and dropped == 0


@pytest.mark.parametrize(("kept", "dropped"), [(4, 2), (3, 2), (2, 4), (1, 4)])
def test_the_newest_messages_are_kept_and_the_first_of_them_is_the_user_s(
    kept: int, dropped: int
) -> None:
    assert fitted(turn(*TALK), weight(*TALK[-kept:])) == (TALK[dropped:], dropped)


def test_one_character_too_few_drops_the_oldest_exchange() -> None:
    assert fitted(turn(*TALK), weight(*TALK) - 1) == (TALK[2:], 2)


def test_a_conversation_over_the_limit_keeps_its_head_for_many_turns() -> None:
    talk = [(user, assistant)[place % 2]("x" * 50) for place in range(101)]
    heads = []
    for newest in range(0, 101, 2):
        messages, dropped = fitted(turn(*talk[:newest + 1]), 1_000)
        assert weight(*messages) <= 1_000
        heads.append(dropped)

    assert heads[:10] == [0] * 10
    # Twenty messages fit, and no more than sixteen of them are left.
    assert heads[10:19] == [6, 6, 6, 12, 12, 12, 18, 18, 18]
    assert heads == sorted(heads)


def test_where_four_fifths_cannot_be_had_what_fits_stays() -> None:
    talk = [user("a" * 10), assistant("b" * 5), user("c" * 5), assistant("d" * 5), user("e" * 85)]

    assert fitted(turn(*talk), 100) == (talk[2:], 2)


def test_a_turn_is_not_changed_by_what_is_dropped() -> None:
    asked = turn(*TALK, system="Be brief.", stream=True)
    before = list(asked.messages)

    found, _ = ocp.truncate_to_budget(asked, 200)

    assert asked.messages == before
    assert found == asked._replace(messages=found.messages)


def test_the_system_prompt_counts_and_stays() -> None:
    system = "s" * 100
    most = weight(*TALK[2:])

    assert fitted(turn(*TALK), most)[1] == 2
    found, dropped = ocp.truncate_to_budget(turn(*TALK, system=system), most)
    assert (found.system, dropped) == (system, 4)
    assert fitted(turn(*TALK, system=system), most + 100)[1] == 2


def test_what_may_fit_the_model_s_window_is_for_the_api_to_decide() -> None:
    small = SONNET._replace(context_window=80)

    for chars in (80, 80 * 5, 80 * 32):
        ocp.check_window(turn(user("x" * chars), model=small))


def test_what_no_text_could_fit_into_the_window_is_refused_at_once() -> None:
    small = SONNET._replace(context_window=80)
    talk = [user("x" * 2_000), assistant("y" * 500), user("z" * 61)]

    with pytest.raises(ocp.ContextTooLong) as caught:
        ocp.check_window(turn(*talk, model=small))

    assert caught.value.message == "prompt is too long: 732 tokens > 80 maximum"
    assert (caught.value.status, caught.value.param) == (400, "messages")
    ocp.check_window(turn(*talk[1:], model=small))


@pytest.mark.parametrize("place", [0, 1])
def test_each_of_several_prompts_has_to_fit_the_window(place: int) -> None:
    small = SONNET._replace(context_window=80)
    prompts = [[user("a")], [user("b")]]
    ocp.check_window(turn(*prompts[0], model=small, choices=2, other_prompts=(prompts[1],)))

    prompts[place] = [user("x" * 2_561)]
    with pytest.raises(ocp.ContextTooLong):
        ocp.check_window(turn(*prompts[0], model=small, choices=2, other_prompts=(prompts[1],)))


def test_system_prompt_and_tools_count_for_the_window_too() -> None:
    small = SONNET._replace(context_window=80)
    tool = ocp.Tool("weather", "t" * 2_000, {"type": "object"})

    with pytest.raises(ocp.ContextTooLong):
        ocp.check_window(turn(user("a"), system="s" * 600, tools=(tool,), model=small))


@pytest.mark.parametrize("part", [PICTURE, PAPER], ids=["image", "document"])
def test_the_length_of_an_attachment_s_data_does_not_count(part: Json) -> None:
    messages = [user("a", part), assistant("b"), user("c", part)]

    assert fitted(turn(*messages), weight(*messages)) == (messages, 0)


# -- tools --------------------------------------------------------------------

EXCHANGE = [
    user("a" * 50), assistant("b" * 50), user("Weather?"), assistant(use("t1"), use("t2")),
    user(result("t1"), result("t2")), assistant(use("t3")), user(result("t3")), assistant("d"),
    user("e"),
]


@pytest.mark.parametrize("first", range(1, len(EXCHANGE)))
def test_a_call_stays_with_its_result(first: int) -> None:
    left, dropped = fitted(turn(*EXCHANGE), weight(*EXCHANGE[first:]))

    assert left == EXCHANGE[dropped:]
    assert dropped in (0, 2, 8)
    assert dropped >= first
    calls = [part["id"] for m in left for part in m.content if part["type"] == "tool_use"]
    results = [p["tool_use_id"] for m in left for p in m.content if p["type"] == "tool_result"]
    assert calls == results


def test_the_question_behind_a_running_exchange_stays() -> None:
    running = EXCHANGE[:7]

    assert fitted(turn(*running), weight(*running[2:])) == (running[2:], 2)


def test_an_exchange_that_does_not_fit_as_a_whole_is_too_long() -> None:
    running = EXCHANGE[:7]

    error = refusal(turn(*running), weight(*running[2:]) - 1)

    assert (error.status, error.error_code) == (400, "context_length_exceeded")
    assert error.message.startswith("prompt is too long: ")
    assert error.param == "messages"


# -- one measure --------------------------------------------------------------

#: The same text in several scripts, as long as each other.
SCRIPTS = ["a" * 300, "\u00e9" * 300, "\u4e2d" * 300, "\U0001f600" * 300, "\ud800" * 300]


def everywhere(text: str) -> Any:
    """A turn that says a text at every place where a client may say something."""
    tool = ocp.Tool("weather", text, {"type": "object", "properties": {text: {"title": text}}})
    call = {**use("t1"), "input": {text: [text, 1, True, None]}}
    return turn(
        user(text), assistant(text, call), user(result("t1", text), text), assistant(text),
        user(text), system=text, tools=(tool, tool),
        output_schema=ocp.OutputSchema({"const": text}, True),
    )


@pytest.mark.parametrize("text", SCRIPTS, ids=ascii)
def test_a_character_counts_as_one_in_every_script_and_place(text: str) -> None:
    latin, other = everywhere(SCRIPTS[0]), everywhere(text)

    assert ocp.prompt_chars(other) == ocp.prompt_chars(latin)
    assert ocp.estimate_tokens(other) == ocp.estimate_tokens(latin)
    for most in range(2_000, 6_000, 250):
        assert outcome(other, most) == outcome(latin, most)


def outcome(asked: Any, most_chars: int) -> object:
    """How many messages are dropped, or the words of the refusal."""
    try:
        return fitted(asked, most_chars)[1]
    except ocp.ContextTooLong as error:
        return error.message


@pytest.mark.parametrize("text", SCRIPTS[1:4], ids=ascii)
def test_tools_in_any_script_leave_room_for_the_history(text: str) -> None:
    tools = tuple(ocp.Tool(f"t{number}", text, {"title": text}) for number in range(10))
    messages = [user("a" * 1000), assistant("b" * 1000), user("c")]

    assert fitted(turn(*messages, tools=tools), 9_000) == (messages, 0)


def test_a_prompt_is_everything_that_is_told_to_the_model() -> None:
    schema = {"type": "object"}
    tool = ocp.Tool("weather", "Tells it.", schema)
    asked = turn(
        user("Hello", PICTURE), assistant("Hi.", use("t1")), user(result("t1", "Sun."), PAPER),
        system="Be brief.", tools=(tool,), output_schema=ocp.OutputSchema(schema, True),
    )

    assert ocp.prompt_chars(asked) == sum(map(len, (
        "Hello", "Hi.", "weather", "{}", "Sun.", "Be brief.", "weather", "Tells it.",
        compact(schema), compact(schema),
    )))


def test_the_measure_of_a_whole_prompt_is_the_sum_of_its_parts() -> None:
    alone = [turn(message) for message in EXCHANGE]

    assert ocp.prompt_chars(turn(*EXCHANGE)) == sum(map(ocp.prompt_chars, alone))
    assert ocp.prompt_chars(turn(*EXCHANGE)) == weight(*EXCHANGE)


# -- too long -----------------------------------------------------------------


def test_a_newest_message_that_does_not_fit_is_too_long() -> None:
    error = refusal(turn(*TALK, user("x" * 3_000)), 300)

    assert (error.status, error.error_code) == (400, "context_length_exceeded")
    assert error.param == "messages"
    assert error.headers()["x-should-retry"] == "false"


def test_agents_know_by_the_words_that_they_have_to_shorten_their_history() -> None:
    assert refusal(turn(user("x" * 3_500)), 350).message == (
        "prompt is too long: 1000 tokens > 100 maximum"
    )


@pytest.mark.parametrize("most", range(20, 40))
def test_the_number_in_these_words_is_always_over_the_maximum(most: int) -> None:
    words = refusal(turn(user("x" * (most + 1))), most).message.split()
    assert int(words[4]) > int(words[7])


def test_the_system_prompt_alone_may_be_too_long() -> None:
    assert refusal(turn(user("a"), system="s" * 500), 350).message.endswith(" > 100 maximum")


def test_both_ends_of_the_limit() -> None:
    newest = user("x" * 30)

    assert fitted(turn(newest), weight(newest)) == ([newest], 0)
    assert refusal(turn(newest), weight(newest) - 1)


@pytest.mark.parametrize("most", range(60, 700, 20))
def test_what_is_left_fits_or_is_refused(most: int) -> None:
    asked = turn(*EXCHANGE, *TALK, system="s" * 20)
    try:
        left, _ = fitted(asked, most)
    except ocp.ContextTooLong:
        assert weight(asked.messages[-1]) + 20 > most
        return

    assert weight(*left) + 20 <= most
    assert (left[0].role, left[-1]) == ("user", TALK[-1])
    assert conversation(turn(*left))[0][1][0] != "tool_result"


# -- an estimate of tokens ----------------------------------------------------

WEATHER = ocp.Tool("weather", "Tells the weather of a city.", {"type": "object"})


@pytest.mark.parametrize("words", [1, 10, 1_000, 50_000])
def test_an_estimate_is_a_token_for_some_characters(words: int) -> None:
    found = ocp.estimate_tokens(turn(user("word " * words)))

    assert words <= found <= 2 * words + 20


def test_a_prompt_has_at_least_a_token() -> None:
    assert ocp.estimate_tokens(turn(user())) >= 1


@pytest.mark.parametrize(
    "more",
    [{"system": "Be brief, please."}, {"tools": (WEATHER,)},
     {"messages": [user("Hello"), assistant("Hi."), user("Hello")]}],
    ids=["system", "tools", "messages"],
)
def test_everything_that_the_model_reads_counts(more: Json) -> None:
    asked = turn(user("Hello"))

    assert ocp.estimate_tokens(asked._replace(**more)) > ocp.estimate_tokens(asked)


@pytest.mark.parametrize("part", [PICTURE, PAPER], ids=["image", "document"])
def test_an_attachment_is_taken_for_a_fixed_number(part: Json) -> None:
    plain = ocp.estimate_tokens(turn(user("Hello")))

    assert ocp.estimate_tokens(turn(user("Hello", part))) == plain + 1_500
    assert ocp.estimate_tokens(turn(user("Hello", part, part))) == plain + 3_000
