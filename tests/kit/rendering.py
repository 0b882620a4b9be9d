"""What the tests of the dialects share: parsing without a server, and answers as bytes.

The bytes of answers are compared with the files in golden/. With OCP_UPDATE_GOLDEN=1 those are
written anew instead of compared; look at the difference before it is kept.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from http_client import SseParser
from project import DATA, load_script

ocp = load_script("ocp_server.py")

Json = dict[str, Any]

GOLDEN = DATA / "golden"
MODELS = ocp.Models(ocp.BUILTIN_MODELS)
SONNET = MODELS.find("sonnet")
LIMITS = ocp.Limits(
    image_allow_url=False, max_image_bytes=64, max_images=3, max_image_total_bytes=100
)
CREATED_S = 1_700_000_000
REQUEST_ID = "req_1"
#: A PDF as far as limits look at it.
PDF = "data:application/pdf;base64,JVBERi0="
PNG = "data:image/png;base64,iVBORw0="
#: A message of a request, the same in all dialects that have messages.
USER = {"role": "user", "content": "Hello"}


def no_response(response_id: str) -> list[Any]:
    """Nothing was stored."""
    raise ocp.BadRequest(f"There is no response {response_id}.", param="previous_response_id")


def no_item(item_id: str) -> Json:
    """Nothing was stored."""
    raise ocp.NotFound(f"There is no item {item_id}.", param="input")


def parsing(
    limits: Any = LIMITS,
    recall: Callable[[str], list[Any]] = no_response,
    session: Callable[[str, str], list[Any]] = lambda session_id, system: [],
    item: Callable[[str], Json] = no_item,
) -> Any:
    """What a dialect is told about the server."""
    return ocp.ParseEnvironment(MODELS, "sonnet", limits, recall, item, session)


def refusal_of(dialect: Any, body: object, about: Any = None) -> Any:
    """The error that a body gives."""
    with pytest.raises(ocp.OcpError) as caught:
        dialect.parse(body, about or parsing())
    return caught.value


def block(text: str) -> Json:
    return {"type": "text", "text": text}


def steps_for(
    turn: Any, operator_prompt: str = "", version: Any = (2, 1, 332), **fields: Any
) -> list[bytes]:
    """What a fresh claude is sent for a turn, step by step."""
    setup = ocp.setup_lines(turn, operator_prompt)
    steps: list[bytes] = ocp.message_steps(turn, version, setup, **fields)[0]
    return steps


def user(*content: Any) -> Any:
    """A message of the user's with these blocks; a text is one of text."""
    return ocp.Message("user", [block(part) if isinstance(part, str) else part for part in content])


def assistant(*content: Any) -> Any:
    return ocp.Message("assistant", user(*content).content)


def conversation(found: Any) -> list[tuple[str, list[str]]]:
    """Roles and texts of a Turn's messages; blocks of other types by their type."""
    return [
        (message.role, [part.get("text", part["type"]) for part in message.content])
        for message in found.messages
    ]


# -- events -------------------------------------------------------------------

USAGE = ocp.Usage(input_tokens=10, output_tokens=7, cache_read_tokens=5, cache_write_tokens=3)
STARTED = ocp.Started("msg_1", "claude-sonnet-5", USAGE._replace(output_tokens=1))
TEXT = [
    ocp.BlockStarted(1, {"type": "text", "text": ""}),
    ocp.Delta(1, "text", "Gr\u00fc\u00df"),
    ocp.Delta(1, "text", "e, \"du\"\n"),
    ocp.BlockStopped(1),
]
THINKING = [
    ocp.BlockStarted(0, {"type": "thinking", "thinking": ""}),
    ocp.Delta(0, "thinking", "Someone "),
    ocp.Delta(0, "thinking", "greets."),
    ocp.Delta(0, "signature", "c2ln"),
    ocp.BlockStopped(0),
]


def call(index: int, call_id: str, name: str, *pieces: str) -> list[Any]:
    """The events of a tool call whose arguments come in these pieces."""
    began = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
    deltas = [ocp.Delta(index, "arguments", piece) for piece in pieces]
    return [ocp.BlockStarted(index, began), *deltas, ocp.BlockStopped(index)]


WEATHER = call(2, "toolu1", "weather", "", '{"city', '": "Paris"}')
SECOND = call(3, "toolu2", "clock", "{}")
#: The same, by a model that says nothing where there is nothing to say.
CLOCK = call(3, "toolu2", "clock")
#: A call that ended with the limit of tokens in the middle of its arguments.
CUT_OFF = call(2, "toolu3", "weather", '{"city": "Pa')
REFUSED = ocp.Delta(0, "refusal", "I cannot say it in that form.")


def finished(reason: str = "end_turn", usage: Any = USAGE, sequence: str | None = None) -> Any:
    return ocp.Finished(reason, sequence, usage)


REASONED = finished(usage=USAGE._replace(reasoning_tokens=4))


def numbered(events: Iterable[Any]) -> list[Any]:
    """The events with their blocks counted from 0 in each message, as a reader counts them."""
    found: list[Any] = []
    number = -1
    for event in events:
        if isinstance(event, ocp.Started):
            number = -1
        number += isinstance(event, ocp.BlockStarted)
        found.append(event._replace(block_index=max(0, number))
                     if hasattr(event, "block_index") else event)
    return found


# -- answers ------------------------------------------------------------------


def flowing(events: Iterable[Any]) -> Iterator[Any]:
    """The events one by one, each with its choice, 0 if it names none; an error among them is
    raised in its place."""
    for event in events:
        if isinstance(event, Exception):
            raise event
        yield event if type(event) is tuple else (0, event)


def gathered(turn: Any, events: Iterable[Any]) -> list[Any]:
    """The whole answers of these events."""
    outcomes = [ocp.AnswerRecord(turn.choice(index), 0.0) for index in range(turn.choices)]
    for index, event in flowing(events):
        outcomes[index].add(event, 0.0)
    return [outcome.answer() for outcome in outcomes]


def whole(dialect: Any, turn: Any, events: Iterable[Any]) -> Any:
    """The body of an answer that is not streamed."""
    return dialect.answer_body(turn, gathered(turn, events))


def whole_bytes(dialect: Any, turn: Any, events: Iterable[Any]) -> bytes:
    """The same, as it is sent."""
    return bytes(ocp.to_json(whole(dialect, turn, events)) + b"\n")


def stream_bytes(dialect: Any, turn: Any, events: Iterable[Any]) -> bytes:
    """A streamed answer as it is sent, with the end that its failure has."""
    renderer = dialect.renderer(turn)
    sent = []
    try:
        for index, event in flowing(events):
            silent = isinstance(event, ocp.Tick)
            sent.append(renderer.keepalive() if silent else renderer.event(index, event))
        sent.append(renderer.end())
    except ocp.OcpError as error:
        sent.append(renderer.failure(error, REQUEST_ID))
    return b"".join(sent)


def frames(sent: bytes) -> list[tuple[str, Any]]:
    """The server-sent events of a stream: (name, data) each."""
    parser = SseParser()
    for line in sent.split(b"\n"):
        parser.feed(line)
    return parser.events


def check_golden(name: str, found: bytes) -> None:
    """Compares with the file; with OCP_UPDATE_GOLDEN=1 writes it instead."""
    file = GOLDEN / name
    if os.environ.get("OCP_UPDATE_GOLDEN"):
        file.write_bytes(found)
    assert found.decode("utf-8") == file.read_bytes().decode("utf-8")


def golden_name(dialect: str, name: str) -> str:
    """The file of an answer; its name says whether it is streamed."""
    return f"{dialect}-{name}.{'json' if name.startswith('whole') else 'sse'}"
