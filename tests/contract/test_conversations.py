"""Conversations over the real claude: turn after turn, sessions, chains, the budget, choices."""

from __future__ import annotations

import base64
import json
import random
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import stub_api as stub
from conversation import (
    EVERY_DIALECT,
    WHOLE_AND_STREAMED,
    Conversation,
    is_continued,
    path_of,
    stats,
)
from depth import rest
from dialects import CHAT, MESSAGES, RESPONSES, Answer, Dialect, Result, Tool, dialect_name
from rig import (
    ANSWER_S,
    MODEL,
    NEWEST_MODEL,
    Claude,
    Rig,
    claude_pids,
    running_rig,
    wait_until,
)
from server import Place, output_of, running_server
from upstream import (
    system_texts,
    turns,
    unmarked,
    upstream_call,
    upstream_messages,
    upstream_result,
)

Json = Any

BLACK = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
WHITE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg==")
#: The smallest file that claims to be a PDF.
PDF = base64.b64encode(
    b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n").decode()



@pytest.fixture
def rig(shared_rig: Rig) -> Rig:
    shared_rig.begin()
    shared_rig.stub.default = echo
    return shared_rig


def echo(body: Mapping[str, Json]) -> stub.Reply:
    """An answer that tells what it answers."""
    texts = [content for _, contents in upstream_messages(body) for content in contents
             if isinstance(content, str)]
    return stub.text(f"Re: {texts[-1]}") if texts else stub.text("Nothing said.")


def dialogue(*questions: str) -> list[tuple[str, list[str]]]:
    """These questions with their echoes, the last without, as the API gets them."""
    found = []
    for question in questions:
        found += [("user", [question]), ("assistant", [f"Re: {question}"])]
    return found[:-1]


# ---------------------------------------------------------------------------
# Turn after turn
# ---------------------------------------------------------------------------

@EVERY_DIALECT
@WHOLE_AND_STREAMED
def test_six_turns_are_one_process_and_one_prefix(
    rig: Rig, dialect: Dialect, streams: bool
) -> None:
    talk = Conversation(rig, dialect, system="Be kind.", streams=streams)
    questions = [f"Question {number}?" for number in range(6)]
    answers = [talk.ask(question) for question in questions]
    assert [said.text for said in answers] == [f"Re: {question}" for question in questions]
    assert is_continued(rig, answers)
    bodies = rig.bodies()
    assert [turns(body) for body in bodies] == [
        dialogue(*questions[:count]) for count in range(1, 7)]
    assert_stable(bodies)


def assert_stable(bodies: Sequence[Mapping[str, Json]]) -> None:
    """Each request begins with all of the one before, but for the marks of the cache."""
    for before, after in zip(bodies, bodies[1:]):
        assert unmarked(after["system"][1:]) == unmarked(before["system"][1:])
        assert unmarked(after["tools"]) == unmarked(before["tools"])
        sooner, later = (unmarked(body["messages"]) for body in (before, after))
        assert later[:len(sooner)] == sooner


@pytest.mark.parametrize("model", [NEWEST_MODEL, *rest(MODEL)])
def test_a_rebuilt_conversation_has_the_turns_of_a_continued_one(rig: Rig, model: str) -> None:
    talk = Conversation(rig, CHAT, system="Be kind.", model=model)
    for number in range(3):
        talk.ask(f"Question {number}?")
    other = Conversation(rig, CHAT, system="Be kind.", model=model, max_tokens=999)
    other.messages = json.loads(json.dumps(talk.messages))
    last = other.ask("Question 3?")
    assert path_of(rig, last) == "rebuilt"
    assert turns(rig.last_body()) == dialogue(*[f"Question {number}?" for number in range(4)])


@pytest.mark.exhaustive
@EVERY_DIALECT
def test_thinking_does_not_part_a_conversation(rig: Rig, dialect: Dialect) -> None:
    rig.script(stub.thinking("Hm, let me see.", "It is so."), stub.text("Bye."))
    more: dict[str, Json] = {}
    if dialect is MESSAGES:
        more = {"thinking": {"type": "adaptive"}}
    if dialect is RESPONSES:
        more = {"reasoning": {"effort": "low", "summary": "auto"}}
    talk = Conversation(rig, dialect, **more)
    answers = [talk.ask("Why?"), talk.ask("Thanks.")]
    assert is_continued(rig, answers)
    _, (role, contents), _ = upstream_messages(rig.last_body())
    # The process keeps its own thinking, whatever the client repeats.
    assert [block if isinstance(block, str) else block["type"] for block in contents] == [
        "thinking", "It is so."]


class Mover(Conversation):
    """A client that has a context at the end of each request and in no history, as OpenClaw."""

    context = ""

    def body(self, **fields: Json) -> dict[str, Json]:
        body = super().body(**fields)
        last = {"role": "user", "content": [self.dialect.text(self.context)]}
        return {**body, self.dialect.field: [*body[self.dialect.field], last]}


def context(text: str) -> str:
    return ("<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\n"
            f"{text}\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>")


@pytest.mark.exhaustive
@EVERY_DIALECT
def test_context_that_moves_to_the_end_does_not_part_a_conversation(
    rig: Rig, dialect: Dialect
) -> None:
    rig.script(
        stub.tool_calls([("weather", {})]), stub.tool_calls([("weather", {})]),
        stub.text("Rain."), stub.text("Bye."))
    talk = Mover(rig, dialect, [Tool("weather")])

    talk.context = context("morning")
    answers = [talk.ask("Weather?")]
    answers.append(talk.send_results([(answers[-1].call.id, Result("Sun."))]))
    talk.context = context("evening")
    answers.append(talk.send_results([(answers[-1].call.id, Result("Rain."))]))
    answers.append(talk.ask("Thanks."))

    assert is_continued(rig, answers)
    told = [[str(part) for part in contents]
            for role, contents in upstream_messages(rig.last_body()) if role == "user"]
    assert ["morning" in "".join(contents) for contents in told] == [True, False, False, False]
    # The middle of a turn takes nothing but results, so what is new comes with one of them.
    assert ["evening" in "".join(contents) for contents in told] == [False, False, True, True]
    assert "Thanks." in told[-1]


@pytest.mark.parametrize("form", ["cached", *rest("parts", "padded")])
def test_the_same_history_in_another_form_goes_on(rig: Rig, form: str) -> None:
    talk = Conversation(rig, CHAT)
    talk.ask("One?")
    for message in talk.messages:
        part: Json = {"type": "text", "text": message["content"]}
        if form == "cached":
            part["cache_control"] = {"type": "ephemeral"}
        message["content"] = message["content"] + "\n" if form == "padded" else [part]
    assert path_of(rig, talk.ask("Two?")) == "continued"
    assert turns(rig.last_body()) == dialogue("One?", "Two?")


@pytest.mark.exhaustive
def test_a_history_that_was_edited_is_told_by_where_it_parts(rig: Rig) -> None:
    talk = Conversation(rig, CHAT)
    for number in range(3):
        talk.ask(f"Question {number}?")
    talk.messages[2]["content"] = "Question CANARY?"
    last = talk.ask("And now?")
    assert path_of(rig, last) == "rewound"
    (entry,) = [entry for entry in rig.server.log_entries("answer_finished")
                if entry["request_id"] == last.request_id]
    assert entry["parted_at"] == 2
    assert "CANARY" not in json.dumps(rig.server.log_entries())
    assert [contents for role, contents in turns(rig.last_body()) if role == "user"] == [
        ["Question 0?"], ["Question CANARY?"], ["Question 2?"], ["And now?"]]


STEPS = 14


@pytest.mark.exhaustive
def test_random_histories_arrive_once_and_in_order(rig: Rig) -> None:
    chance = random.Random(7)
    talks = [Conversation(rig, CHAT, system=f"Caller {number}.") for number in range(2)]
    said = [[] for _ in talks]  # type: list[list[str]]
    for step in range(STEPS):
        which = chance.randrange(len(talks))
        talk, told = talks[which], said[which]
        if told and chance.random() < 0.3:
            keep = chance.randrange(len(told))
            del told[keep:], talk.messages[2 * keep:]
        told.append(f"Word {step} of {which}.")
        assert talk.ask(told[-1]).text == f"Re: {told[-1]}"
        body = rig.last_body()
        assert turns(body) == dialogue(*told)
        assert system_texts(body) == [talk.system]
    assert len(rig.bodies()) == STEPS


# ---------------------------------------------------------------------------
# Side by side
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
def test_two_retries_and_two_branches_run_side_by_side(rig: Rig) -> None:
    talk = Conversation(rig, CHAT)
    talk.ask("One?")
    everybody = threading.Barrier(4)

    def together(body: Mapping[str, Json]) -> stub.Reply:
        everybody.wait(120)
        return echo(body)

    rig.stub.default = together
    branches = [talk.branch() for _ in range(4)]
    questions = ["Two?", "Two?", "Three?", "Four?"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda each: each[0].ask(each[1]), zip(branches, questions)))
    assert [said.text for said in answers] == [f"Re: {question}" for question in questions]
    # Processes that are given up may serve again for the others.
    paths = [path_of(rig, said) for said in answers]
    assert paths.count("continued") == 1 and set(paths) <= {"continued", "rebuilt", "rewound"}
    assert sorted(map(str, map(turns, rig.bodies()[1:]))) == sorted(
        str(dialogue("One?", question)) for question in questions)
    rig.stub.default = echo
    # Every branch has a process of its own now.
    with ThreadPoolExecutor(4) as pool:
        later = list(pool.map(lambda branch: branch.ask("Last?"), branches))
    assert [path_of(rig, said) for said in later] == ["continued"] * 4
    assert sorted(map(str, map(turns, rig.bodies()[5:]))) == sorted(
        str(dialogue("One?", question, "Last?")) for question in questions)


@EVERY_DIALECT
def test_another_last_question_is_put_to_the_same_process(rig: Rig, dialect: Dialect) -> None:
    talk = Conversation(rig, dialect, system="Be kind.")
    talk.ask("One?")
    before = talk.branch()
    talk.ask("Two?")
    other = before.branch()
    again, edited = before.ask("Two?"), other.ask("Three?")
    later = other.ask("Four?")
    assert [said.text for said in (again, edited, later)] == ["Re: Two?", "Re: Three?", "Re: Four?"]
    assert [path_of(rig, said) for said in (again, edited, later)] == [
        "rewound", "rewound", "continued"]
    assert [turns(body) for body in rig.bodies()[2:]] == [
        dialogue("One?", "Two?"), dialogue("One?", "Three?"), dialogue("One?", "Three?", "Four?")]


@pytest.mark.exhaustive
def test_questions_of_their_own_wear_out_no_process(rig: Rig) -> None:
    """Only the newer versions forget the only question they were asked."""
    started = set(claude_pids(rig.server))
    answers = [Conversation(rig, CHAT, system="Translate.").ask(f"Word {n}?") for n in range(12)]
    assert [said.text for said in answers] == [f"Re: Word {n}?" for n in range(12)]
    assert [turns(body) for body in rig.bodies()] == [dialogue(f"Word {n}?") for n in range(12)]
    assert all(system_texts(body) == ["Translate."] for body in rig.bodies())
    paths = [path_of(rig, said) for said in answers]
    if rig.claude.version == "2.1.197":
        assert paths == ["fresh"] * 12
    else:
        assert paths[-7:] == ["rewound"] * 7
        # Those that are parked, the spares, and one that is just leaving.
        assert len(set(claude_pids(rig.server)) - started) <= 7


@pytest.mark.exhaustive
def test_a_forgotten_question_leaves_the_body_of_a_fresh_one(rig: Rig) -> None:
    for number in range(6):
        Conversation(rig, CHAT, system="Translate.").ask(f"Word {number}?")
    fresh, *_, reused = [{**body, "metadata": None} for body in rig.bodies()]
    Conversation(rig, CHAT, system="Another.").ask("Word 5?")
    other = {**rig.last_body(), "metadata": None, "system": None}
    assert {**reused, "system": None} == other
    assert set(reused) == set(fresh)


@pytest.mark.exhaustive
def test_who_goes_on_finds_the_conversation_that_nobody_pushed_out(rig: Rig) -> None:
    """Nothing is forgotten that would have been kept."""
    talks = [Conversation(rig, CHAT, system="Translate.") for _ in range(3)]
    for number, talk in enumerate(talks):
        talk.ask(f"Word {number}?")
    assert [path_of(rig, talk.ask("Sure?")) for talk in talks] == ["continued"] * 3


@pytest.mark.exhaustive
def test_callers_with_the_same_words_are_never_mixed(rig: Rig) -> None:
    callers = [Conversation(rig, CHAT, system=f"Keep CANARY-{number}.") for number in range(3)]
    for question in ("Hello?", "Tell me.", "Thanks."):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda talk, said=question: talk.ask(said), callers))
    for body in rig.bodies():
        words = {word for word in ("CANARY-0", "CANARY-1", "CANARY-2") if word in json.dumps(body)}
        assert len(words) == 1
    assert len(rig.bodies()) == 9


@pytest.mark.exhaustive
def test_keys_and_the_server_itself_are_callers_of_their_own(
    claude: Claude, tmp_path: Path
) -> None:
    env = {"PROXY_API_KEY": "key-of-the-clients", "OCP_ADMIN_KEY": "key-of-the-admin"}
    with running_rig(tmp_path, claude, **env) as rig:
        rig.stub.default = echo
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello?"}]}
        first = call_as(rig, "key-of-the-clients", body)
        body["messages"] += [*first.repeated, {"role": "user", "content": "Again?"}]
        other = call_as(rig, "key-of-the-admin", body)
        again = call_as(rig, "key-of-the-clients", body)
        assert [path_of(rig, said) for said in (other, again)] == ["rebuilt", "continued"]


def call_as(rig: Rig, key: str, body: Json) -> Answer:
    headers = {"Authorization": f"Bearer {key}"}
    return CHAT.read_answer(rig.server.call("POST", CHAT.path, body, headers, timeout_s=ANSWER_S))


# ---------------------------------------------------------------------------
# Sessions and chains
# ---------------------------------------------------------------------------

def ask_session(rig: Rig, dialect: Dialect, name: str, content: Json, **fields: Json) -> Answer:
    """A request that brings nothing but the new message."""
    return Conversation(rig, dialect, ocp_session_id=name, **fields).ask(content)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dialect", [CHAT, MESSAGES], ids=dialect_name)
def test_a_session_remembers_for_its_client(rig: Rig, dialect: Dialect) -> None:
    name = f"session of {dialect.name}"
    answers = [ask_session(rig, dialect, name, word) for word in ("One?", "Two?", "Three?")]
    assert is_continued(rig, answers)
    assert turns(rig.last_body()) == dialogue("One?", "Two?", "Three?")
    ask_session(rig, dialect, f"other {name}", "Four?")
    assert turns(rig.last_body()) == dialogue("Four?")


#: Each conversation takes the process of the one before, where that may be.
FEW = {"OCP_PARKED_PROCESSES": "1"}


@pytest.mark.exhaustive
def test_sessions_survive_a_restart_and_can_be_forgotten(claude: Claude, tmp_path: Path) -> None:
    tool = Tool("weather")
    with running_rig(tmp_path, claude, **FEW) as rig:
        rig.stub.default = echo
        ask_session(rig, CHAT, "mine", "One?")
        ask_session(rig, CHAT, "other", "Un?")
        rig.script(stub.tool_calls([("weather", {"city": "Bern"})]))
        talk = Conversation(rig, CHAT, [tool], ocp_session_id="mine")
        call = talk.ask("Weather?").call
    with running_rig(tmp_path, claude, **FEW) as rig:
        rig.script(stub.text("Warm."))
        talk = Conversation(rig, CHAT, [tool], ocp_session_id="mine")
        last = talk.send_results([(call.id, Result("20"))])
        assert (last.text, path_of(rig, last)) == ("Warm.", "rebuilt")
        assert upstream_messages(rig.only_body()) == [
            *dialogue("One?", "x")[:-1], ("user", ["Weather?"]),
            ("assistant", [upstream_call(call)]),
            ("user", [upstream_result(call, Result("20"))])]
        listed = rig.server.call("GET", "/sessions").json()["sessions"]
        assert [(each["id"], each["messages"]) for each in listed] == [("mine", 6), ("other", 2)]
        assert "Bern" not in json.dumps(listed)
        assert_forgotten(rig)


def assert_forgotten(rig: Rig) -> None:
    rig.stub.default = echo
    assert rig.server.call("DELETE", "/sessions/mine").json() == {"cleared": 1}
    assert rig.server.call("DELETE", "/sessions/mine").status == 404
    ask_session(rig, CHAT, "mine", "Who are you?")
    assert turns(rig.last_body()) == dialogue("Who are you?")
    assert rig.server.call("DELETE", "/sessions").json() == {"cleared": 2}
    assert rig.server.call("GET", "/sessions").json() == {"sessions": []}
    ask_session(rig, CHAT, "other", "Deux?")
    assert turns(rig.last_body()) == dialogue("Deux?")


@pytest.mark.exhaustive
def test_a_session_belongs_to_its_system_prompt(rig: Rig) -> None:
    for system in ("Be kind.", "Be terse."):
        Conversation(rig, CHAT, system=system, ocp_session_id="prompts").ask("Hello?")
        assert turns(rig.last_body()) == dialogue("Hello?")
    Conversation(rig, CHAT, system="Be kind.", ocp_session_id="prompts").ask("Again?")
    assert turns(rig.last_body()) == dialogue("Hello?", "Again?")


@pytest.mark.exhaustive
def test_a_request_with_answers_of_its_own_knows_better_than_its_session(rig: Rig) -> None:
    ask_session(rig, CHAT, "better", "One?")
    talk = Conversation(rig, CHAT, ocp_session_id="better")
    talk.messages = [
        {"role": "user", "content": "Uno?"}, {"role": "assistant", "content": "Re: Uno?"}]
    talk.ask("Dos?")
    assert turns(rig.last_body()) == dialogue("Uno?", "Dos?")
    ask_session(rig, CHAT, "better", "Tres?")
    assert turns(rig.last_body()) == dialogue("Uno?", "Dos?", "Tres?")


@pytest.mark.exhaustive
def test_a_failed_turn_leaves_its_session_as_it_was(rig: Rig) -> None:
    ask_session(rig, CHAT, "failing", "One?")
    rig.script(then=stub.error(400, "no"))
    assert ask_session(rig, CHAT, "failing", "Bad?").reply.status == 400
    rig.stub.default = echo
    ask_session(rig, CHAT, "failing", "Two?")
    assert turns(rig.last_body()) == dialogue("One?", "Two?")


def chained(rig: Rig, previous: str | None, said: Json, **fields: Json) -> tuple[Answer, str]:
    """A request that goes on from a response; the answer and its id."""
    body = {"model": MODEL, "input": said, "previous_response_id": previous, **fields}
    reply = rig.server.call("POST", RESPONSES.path, body, timeout_s=ANSWER_S)
    found = RESPONSES.read_answer(reply)
    streamed = fields.get("stream")
    final = reply.events[-1][1]["response"] if streamed else reply.json()
    return found, str(final.get("id"))


@pytest.mark.exhaustive
def test_responses_are_chained_by_their_ids(rig: Rig) -> None:
    first, one = chained(rig, None, "First?")
    second, two = chained(rig, one, "Two?", stream=True)
    third, _ = chained(rig, two, [{"role": "user", "content": "Three?"}])
    assert is_continued(rig, (first, second, third))
    assert turns(rig.last_body()) == dialogue("First?", "Two?", "Three?")
    branch, _ = chained(rig, one, "Four?")
    assert path_of(rig, branch) == "rewound"
    assert turns(rig.last_body()) == dialogue("First?", "Four?")


@pytest.mark.exhaustive
def test_a_chain_goes_through_tool_calls(rig: Rig) -> None:
    rig.script(stub.tool_calls([("weather", {}), ("weather", {})]), stub.text("So."))
    tools = RESPONSES.tools([Tool("weather")])
    first, one = chained(rig, None, "Weather?", tools=tools)
    outputs = RESPONSES.results([(call.id, Result("20")) for call in first.calls])
    second, _ = chained(rig, one, outputs, tools=tools)
    assert (second.text, path_of(rig, second)) == ("So.", "continued")
    assert len(rig.bodies()) == 2


@pytest.mark.exhaustive
def test_a_response_that_was_not_stored_or_was_deleted_is_unknown(rig: Rig) -> None:
    _, hidden = chained(rig, None, "One?", store=False)
    _, gone = chained(rig, None, "One?")
    assert rig.server.call("GET", f"/v1/responses/{gone}").json()["id"] == gone
    assert rig.server.call("DELETE", f"/v1/responses/{gone}").json()["deleted"]
    for response_id in (hidden, gone, "resp_no"):
        assert rig.server.call("GET", f"/v1/responses/{response_id}").status == 404
        body = {"model": MODEL, "input": "Two?", "previous_response_id": response_id}
        reply = rig.server.call("POST", RESPONSES.path, body)
        assert (reply.status, reply.json()["error"]["param"]) == (400, "previous_response_id")
        assert reply.json()["error"]["code"] == "previous_response_not_found"


# ---------------------------------------------------------------------------
# The budget
# ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small(claude: Claude, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_rig(
        tmp_path_factory.mktemp("small"), claude, CLAUDE_MAX_PROMPT_CHARS="3000",
    ) as started:
        yield started


@pytest.mark.exhaustive
def test_the_oldest_messages_go_when_a_prompt_is_too_long(small: Rig) -> None:
    small.begin()
    small.stub.default = echo
    talk = Conversation(small, CHAT, system="Be kind.")
    for number in range(5):
        for role in ("user", "assistant"):
            talk.messages.append({"role": role, "content": f"{role} {number} " + "x" * 400})
    assert talk.ask("And now?").finish == "stop"
    found = turns(small.only_body())
    assert found[-1] == ("user", ["And now?"])
    assert found[0][0] == "user" and found[0][1][0].startswith("user 2 ")
    assert system_texts(small.only_body()) == ["Be kind."]
    assert small.server.log_entries("prompt_truncated")[-1]["dropped_messages"] == 4


@pytest.mark.exhaustive
def test_a_tool_exchange_is_kept_or_dropped_whole(small: Rig) -> None:
    small.begin()
    tools = [Tool("weather")]
    call = stub.tool_calls([("weather", {})])
    small.script(call, stub.text("Re."), call, stub.text("So."))
    talk = Conversation(small, CHAT, tools)
    first = talk.ask("One? " + "x" * 700)
    talk.send_results([(first.call.id, Result("y" * 700))])
    second = talk.ask("Two? " + "x" * 700)
    last = talk.send_results([(second.call.id, Result("z" * 900))])
    assert last.text == "So."
    found = upstream_messages(small.last_body())
    assert [role for role, _ in found] == ["user", "assistant", "user"]
    assert found[1:] == [("assistant", [upstream_call(second.call)]), (
        "user", [upstream_result(second.call, Result("z" * 900))])]


@EVERY_DIALECT
def test_what_cannot_fit_is_refused_in_the_apis_words(small: Rig, dialect: Dialect) -> None:
    small.begin()
    said = Conversation(small, dialect).ask("x" * 4000)
    error = said.reply.json()["error"]
    assert said.reply.status == 400
    assert error["message"].startswith("prompt is too long: ") and " maximum" in error["message"]
    assert dialect is MESSAGES or error["code"] == "context_length_exceeded"
    assert small.bodies() == []


# ---------------------------------------------------------------------------
# Several answers
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
@WHOLE_AND_STREAMED
def test_three_answers_are_three_choices(rig: Rig, streams: bool) -> None:
    texts = iter(["Heads.", "Tails.", "Edge."])
    rig.stub.default = lambda body: stub.text(next(texts), output_tokens=7)
    talk = Conversation(rig, CHAT, n=3, stream=streams, stream_options={"include_usage": True})
    body = talk.body(messages=[{"role": "user", "content": "Toss."}])
    reply = rig.server.call("POST", CHAT.path, body, timeout_s=ANSWER_S)
    chunks = [data for _, data in reply.events if data != "[DONE]"] if streams else [reply.json()]
    said = dict.fromkeys(range(3), "")
    finishes = []
    for choice in [choice for chunk in chunks for choice in chunk["choices"]]:
        said[choice["index"]] += choice["delta" if streams else "message"].get("content") or ""
        finishes += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert sorted(said.values()) == ["Edge.", "Heads.", "Tails."]
    assert finishes == ["stop"] * 3
    usage = chunks[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (18, 21)
    assert len(rig.bodies()) == 3


@pytest.mark.exhaustive
def test_one_choice_that_fails_is_the_failure_of_all(rig: Rig) -> None:
    rig.script(stub.text("Heads."), stub.text("Tails."), then=stub.error(400, "no"))
    body = Conversation(rig, CHAT, n=3).body(messages=[{"role": "user", "content": "Toss."}])
    assert rig.server.call("POST", CHAT.path, body, timeout_s=ANSWER_S).status == 400
    wait_until(lambda: stats(rig)["activeRequests"] == 0)


@pytest.mark.exhaustive
def test_a_choice_of_several_may_be_gone_on_from(rig: Rig) -> None:
    texts = iter(["Heads.", "Tails."])
    rig.stub.default = lambda body: stub.text(next(texts))
    talk = Conversation(rig, CHAT)
    body = talk.body(messages=[{"role": "user", "content": "Toss."}], n=2)
    choices = rig.server.call("POST", CHAT.path, body, timeout_s=ANSWER_S).json()["choices"]
    rig.stub.default = echo
    for choice in choices:
        branch = talk.branch()
        branch.messages = [{"role": "user", "content": "Toss."}, choice["message"]]
        assert path_of(rig, branch.ask("And now?")) == "continued"
        assert turns(rig.last_body())[1] == ("assistant", [choice["message"]["content"]])


# ---------------------------------------------------------------------------
# Pictures and papers
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
@EVERY_DIALECT
def test_pdfs_and_images_stay_in_the_history(rig: Rig, dialect: Dialect) -> None:
    content = [dialect.text("What is it?"), dialect.image(BLACK), dialect.pdf(PDF)]
    talk = Conversation(rig, dialect)
    talk.ask(content)
    continued = talk.ask("Sure?")
    other = Conversation(rig, dialect, system=f"Speak {dialect.name}.")
    other.messages = talk.messages[:-2]
    rebuilt = other.ask("Sure?")
    assert [path_of(rig, said) for said in (continued, rebuilt)] == ["continued", "rebuilt"]
    for body in rig.bodies()[1:]:
        found = turns(body)
        assert found[0][1][0] == "What is it?"
        assert [block["source"]["data"] for block in found[0][1][1:]] == [BLACK, PDF]
        assert [block["type"] for block in found[0][1][1:]] == ["image", "document"]
        assert found[1:] == [("assistant", ["Re: What is it?"]), ("user", ["Sure?"])]


@pytest.mark.exhaustive
@EVERY_DIALECT
def test_a_tool_may_answer_with_a_pdf(rig: Rig, dialect: Dialect) -> None:
    rig.script(stub.tool_calls([("weather", {})]), stub.text("Read."))
    talk = Conversation(rig, dialect, [Tool("weather")])
    call = talk.ask("Read it.").call
    (entry,) = dialect.results([(call.id, Result("Here:", [BLACK]))])
    filled = json.loads(json.dumps(entry).replace(
        json.dumps(dialect.image(BLACK)), json.dumps(dialect.pdf(PDF))))
    talk.messages.append(filled)
    last = talk.send()
    assert last.text == "Read." and path_of(rig, last) in ("rebuilt", "rewound")
    (_, contents) = turns(rig.last_body())[-1]
    kinds = [part["type"] for part in contents[0]["content"]]
    assert kinds[:2] == ["text", "document"]
    assert contents[0]["content"][1]["source"]["data"] == PDF


def png(width: int, height: int, noise: int = 0) -> str:
    """An image, grey or with so many bytes of noise in each line."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (len(content).to_bytes(4, "big") + kind + content
                + zlib.crc32(kind + content).to_bytes(4, "big"))

    dice = random.Random(width)
    lines = b"".join(
        b"\0" + dice.randbytes(noise).ljust(width, b"\x80")
        for _ in range(height))
    sides = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return base64.b64encode(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", sides + b"\x08\0\0\0\0")
        + chunk(b"IDAT", zlib.compress(lines, 1)) + chunk(b"IEND", b"")).decode()


def pictures(body: Json) -> list[str]:
    """Return what stands in the user's messages, images by their type."""
    return [part if isinstance(part, str) else part["type"]
            for role, contents in turns(body) if role == "user" for part in contents]


LEFT_OUT = "[An older image was left out here.]"


@pytest.mark.exhaustive
@EVERY_DIALECT
@pytest.mark.parametrize("count", [101, *rest(21, 100)])
def test_a_history_of_many_images_arrives(rig: Rig, dialect: Dialect, count: int) -> None:
    talk = Conversation(rig, dialect, system=f"Look at {count} in {dialect.name}.")
    left = count - 1
    while left:
        images = min(left, 20)
        left -= images
        talk.messages.append({"role": "user", "content": [dialect.image(BLACK)] * images})
        talk.messages.append({"role": "assistant", "content": "I see."})
    asked = talk.ask([dialect.text("And?"), dialect.image(WHITE)])
    kept = 80 if count > 100 else count
    dropped = count - kept
    assert pictures(rig.last_body()) == [
        *[LEFT_OUT] * dropped, *["image"] * (kept - 1), "And?", "image"]
    assert asked.headers["X-OCP-Adjusted"] == (f"images_dropped={dropped}" if dropped else None)
    again = talk.ask([dialect.text("Sure?"), dialect.image(BLACK)])
    assert path_of(rig, again) == ("rebuilt" if count == 100 else "continued")
    assert pictures(rig.last_body()).count("image") == (80 if count == 100 else kept + 1)


@EVERY_DIALECT
def test_text_files_arrive_as_text_and_base64_as_it_has_to_be(rig: Rig, dialect: Dialect) -> None:
    text = "Stra\u00dfe,\u4e2d\u6587\n1,2"
    content = [
        dialect.text("Read:"), dialect.pdf(base64.b64encode(text.encode()).decode()),
        dialect.image("\r\n".join(WHITE[at: at + 20] for at in range(0, len(WHITE), 20))),
        dialect.image(BLACK.rstrip("=").replace("+", "-").replace("/", "_")),
    ]
    Conversation(rig, dialect).ask(content)
    ((_, found),) = turns(rig.only_body())
    named = [] if dialect.name == "messages" else ["Title: a.pdf"]
    assert found[:2 + len(named)] == ["Read:", *named, text]
    assert [part["source"]["data"] for part in found[2 + len(named):]] == [WHITE, BLACK]


@pytest.mark.exhaustive
@EVERY_DIALECT
def test_a_large_image_of_a_result_is_scaled_in_a_rebuilt_conversation_too(
    rig: Rig, dialect: Dialect
) -> None:
    rig.script(stub.tool_calls([("weather", {})]), then=stub.text("Read."))
    talk = Conversation(rig, dialect, [Tool("weather")], system=f"Scale in {dialect.name}.")
    call = talk.ask("Read it.").call
    talk.messages += dialect.results([(call.id, Result("Here:", [png(2600, 20), BLACK]))])
    rig.end_parked()
    last = talk.send()
    assert (last.text, path_of(rig, last)) == ("Read.", "rebuilt")
    contents = turns(rig.last_body())[-1][1]
    result = [part.get("text", part["type"]) for part in contents[0]["content"]]
    assert result[:3] == ["Here:", "[Image 1 of the results is below.]", "image"]
    assert contents[1] == "Image 1 of the results:"
    head = base64.b64decode(contents[2]["source"]["data"])[:24]
    assert 1900 < int.from_bytes(head[16:20], "big") <= 2000


@pytest.mark.exhaustive
def test_addresses_go_to_the_api_where_the_operator_allows_it(
    claude: Claude, tmp_path: Path
) -> None:
    address = {"type": "url", "url": "https://example.org/a.pdf"}
    paper = {"type": "document", "source": address, "title": "a.pdf"}
    picture = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [picture, paper]}
    with running_rig(tmp_path, claude, CLAUDE_IMAGE_ALLOW_URL="1") as rig:
        talk = Conversation(rig, MESSAGES, [Tool("weather")])
        talk.messages = [
            {"role": "user", "content": [MESSAGES.text("Read:"), paper, picture]},
            {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
        assert talk.send().status == 200
        found = turns(rig.last_body())
    assert found[0] == ("user", ["Read:", paper, picture])
    assert found[-1][1][0]["content"][:2] == [picture, paper]


@pytest.mark.exhaustive
@pytest.mark.parametrize("bare", [True, False], ids=["last", "earlier"])
def test_an_image_above_the_api_s_own_limit_is_scaled_wherever_it_is(rig: Rig, bare: bool) -> None:
    heavy = png(1990, 1990, 1990)
    assert len(heavy) > 5_242_880
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [MESSAGES.image(heavy)]}
    talk = Conversation(rig, MESSAGES, [Tool("weather")], system=f"Heavy: {bare}.")
    talk.messages = [
        {"role": "user", "content": [MESSAGES.image(heavy)]},
        {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    if not bare:
        talk.messages += [{"role": "assistant", "content": "So."},
                          {"role": "user", "content": "And?"}]
    assert talk.send().status == 200
    sizes = [len(part["source"]["data"]) for _, contents in turns(rig.last_body())
             for part in contents if "source" in part]
    assert len(sizes) == 2 and max(sizes) < 5_242_880


# ---------------------------------------------------------------------------
# Agent mode
# ---------------------------------------------------------------------------

BASH = ("Bash", {"command": "echo CANARY-$((40+2))", "description": "d"})


@pytest.fixture(scope="module", params=["all", *rest("final")])
def agent(
    request: pytest.FixtureRequest, claude: Claude, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Rig, str]]:
    env = {"CLAUDE_ALLOWED_TOOLS": "Bash", "OCP_AGENT_TEXT": request.param,
           "OCP_WARM_PROCESSES": "0"}
    with running_rig(tmp_path_factory.mktemp("agent"), claude, **env) as started:
        yield started, request.param


@EVERY_DIALECT
@WHOLE_AND_STREAMED
def test_an_agents_rounds_are_one_answer(
    agent: tuple[Rig, str], dialect: Dialect, streams: bool
) -> None:
    rig, text = agent
    rig.begin()
    rig.script(
        stub.tool_calls([BASH], text="Let me look.", input_tokens=1000),
        stub.text("Found it.", input_tokens=30))
    talk = Conversation(rig, dialect, streams=streams)
    said = talk.ask("Go.")
    wanted = "Let me look.\n\nFound it." if text == "all" else "Found it."
    assert (said.text, said.calls, said.finish) == (wanted, [], "stop")
    assert "Bash" not in said.reply.text
    (result,) = upstream_messages(rig.last_body())[-1][1]
    assert "CANARY-42" in result.content
    if said.prompt_tokens:
        assert said.prompt_tokens == 38
    assert path_of(rig, talk.ask("Thanks.")) == "continued"
    assert len(rig.bodies()) == 3


@pytest.mark.exhaustive
def test_an_agent_uses_the_clients_tools_too(agent: tuple[Rig, str]) -> None:
    rig, _ = agent
    rig.begin()
    rig.script(
        stub.tool_calls([BASH]), stub.tool_calls([("weather", {"city": "Bern"})]),
        stub.text("Warm."))
    talk = Conversation(rig, CHAT, [Tool("weather")])
    said = talk.ask("Go.")
    assert (said.call.name, said.finish) == ("weather", "tool_calls")
    last = talk.send_results([(said.call.id, Result("20"))])
    assert (last.text.strip(), path_of(rig, last)) == ("Warm.", "continued")
    assert len(rig.bodies()) == 3


@pytest.mark.parametrize("setting", ["CLAUDE_ALLOWED_TOOLS", *rest("CLAUDE_MCP_CONFIG")])
def test_an_agent_that_strangers_could_reach_does_not_start(
    tmp_path: Path, setting: str
) -> None:
    env = {setting: "Bash", "CLAUDE_BIND": "0.0.0.0"}
    with pytest.raises(AssertionError, match="server ended with 2"):
        with running_server(tmp_path, env=env):
            pass
    assert "agent mode" in output_of(Place(tmp_path))
