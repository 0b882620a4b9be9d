"""One conversation in three dialects: the same tools, questions and results through chat
completions, Anthropic's messages and OpenAI's responses.

Index: 1 what is said in no dialect   2 dialects   3 conversations   4 what became of a request
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Union

import rig
from http_client import Reply
from rig import MODEL, Rig, turns
from waiting import eventually

Json = Any


# ---------------------------------------------------------------------------
# 1 What is said in no dialect
# ---------------------------------------------------------------------------

class Tool(NamedTuple):
    """A tool of the client's."""
    name: str
    schema: Mapping[str, Json] = {"type": "object", "properties": {"city": {"type": "string"}}}
    description: str = "Tells something."


class Call(NamedTuple):
    """A tool call as the client got it; the arguments are JSON text."""
    id: str
    name: str
    arguments: str

    @property
    def input(self) -> Json:
        return json.loads(self.arguments)


class Result(NamedTuple):
    """A tool's result. Images are base64 PNGs; only messages can tell that it failed."""
    text: str
    images: Sequence[str] = ()
    is_error: bool = False


class Named(NamedTuple):
    """The tool that has to be called."""
    name: str


#: "auto", "none", "required", or the tool that it has to be.
Choice = Union[str, Named]


class Said(NamedTuple):
    """An answer in no dialect."""
    reply: Reply
    text: str = ""
    refusal: str = ""
    thinking: str = ""
    calls: Sequence[Call] = ()
    #: stop, tool_calls, length or refusal; "" for a failure.
    finish: str = ""
    #: What came piece by piece: texts and refusals, in order; empty for a whole answer.
    pieces: Sequence[str] = ()
    prompt_tokens: int = 0
    #: What the next request repeats of it.
    repeated: Sequence[Json] = ()

    @property
    def request_id(self) -> str:
        return str(self.reply.headers["x-request-id"])

    @property
    def call(self) -> Call:
        (call,) = self.calls
        return call


# ---------------------------------------------------------------------------
# 2 Dialects
# ---------------------------------------------------------------------------

class Dialect:
    """How one API says things."""

    name = ""
    path = ""
    #: The field that the conversation is in.
    field = "messages"

    def tools(self, tools: Iterable[Tool]) -> list[Json]:
        raise NotImplementedError

    def choice(self, choice: Choice) -> Json:
        raise NotImplementedError

    def serial(self, choice: Choice) -> dict[str, Json]:
        """The fields that ask for one call at a time."""
        return {"parallel_tool_calls": False}

    def results(self, results: Sequence[tuple[str, Result]]) -> list[Json]:
        raise NotImplementedError

    def shape(self, schema: Json) -> dict[str, Json]:
        """The fields that ask for an answer of this schema."""
        raise NotImplementedError

    def image(self, base64_data: str) -> Json:
        raise NotImplementedError

    def pdf(self, base64_data: str) -> Json:
        raise NotImplementedError

    def text(self, text: str) -> Json:
        return {"type": "text", "text": text}

    def fields(self, system: str) -> dict[str, Json]:
        """The fields of every request, with the system prompt where it has its own."""
        return {}

    def opening(self, system: str) -> list[Json]:
        """The system prompt where it is a message."""
        return []

    def heard(self, reply: Reply) -> Said:
        """The answer, whole or streamed."""
        streamed = "event-stream" in (reply.headers["content-type"] or "")
        if reply.status != 200:
            return Said(reply)
        return self.streamed(reply) if streamed else self.whole(reply, reply.json())

    def whole(self, reply: Reply, body: Json) -> Said:
        raise NotImplementedError

    def streamed(self, reply: Reply) -> Said:
        raise NotImplementedError


class Chat(Dialect):
    name = "chat"
    path = "/v1/chat/completions"

    def tools(self, tools: Iterable[Tool]) -> list[Json]:
        return [{"type": "function", "function": {
            "name": tool.name, "description": tool.description, "parameters": tool.schema,
        }} for tool in tools]

    def choice(self, choice: Choice) -> Json:
        named = isinstance(choice, Named)
        return {"type": "function", "function": {"name": choice.name}} if named else choice

    def results(self, results: Sequence[tuple[str, Result]]) -> list[Json]:
        return [{"role": "tool", "tool_call_id": call_id, "content": [
            self.text(result.text), *(self.image(data) for data in result.images),
        ] if result.images else result.text} for call_id, result in results]

    def shape(self, schema: Json) -> dict[str, Json]:
        described = {"name": "answer", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": described}}

    def image(self, base64_data: str) -> Json:
        return rig.image(base64_data)

    def pdf(self, base64_data: str) -> Json:
        data = f"data:application/pdf;base64,{base64_data}"
        return {"type": "file", "file": {"filename": "a.pdf", "file_data": data}}

    def opening(self, system: str) -> list[Json]:
        return [{"role": "system", "content": system}] if system else []

    def whole(self, reply: Reply, body: Json) -> Said:
        (choice,) = body["choices"]
        message = choice["message"]
        calls = [_openai_call(call["id"], call["function"])
                 for call in message.get("tool_calls", ())]
        refusal = message["refusal"] or ""
        return Said(
            reply, message["content"] or "", refusal, message.get("reasoning_content", ""),
            calls, "refusal" if refusal else choice["finish_reason"],
            prompt_tokens=body["usage"]["prompt_tokens"], repeated=[message])

    def streamed(self, reply: Reply) -> Said:
        *chunks, end = [data for _, data in reply.events]
        assert end == "[DONE]", reply.text[-500:]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        deltas = [choice["delta"] for choice in choices]
        (finish,) = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
        text, refusal, thinking = (
            "".join(delta.get(field) or "" for delta in deltas)
            for field in ("content", "refusal", "reasoning_content"))
        calls = _streamed_calls(deltas)
        message: Json = {"role": "assistant", "content": text or None}
        if calls:
            message["tool_calls"] = [{"id": call.id, "type": "function", "function": {
                "name": call.name, "arguments": call.arguments}} for call in calls]
        pieces = [delta.get("content") or delta.get("refusal") for delta in deltas]
        return Said(
            reply, text, refusal, thinking, calls, "refusal" if refusal else finish,
            [piece for piece in pieces if piece], repeated=[message])


def _openai_call(call_id: str, function: Mapping[str, str]) -> Call:
    return Call(call_id, function["name"], function["arguments"])


def _streamed_calls(deltas: Iterable[Mapping[str, Json]]) -> list[Call]:
    """The calls that these chunks make: each begins with id and name, in the order of index."""
    calls: list[Call] = []
    for piece in [piece for delta in deltas for piece in delta.get("tool_calls") or ()]:
        if "id" in piece:
            assert piece["index"] == len(calls)
            calls.append(_openai_call(piece["id"], piece["function"]))
        else:
            call = calls[piece["index"]]
            more = call.arguments + piece["function"]["arguments"]
            calls[piece["index"]] = call._replace(arguments=more)
    return calls


_MESSAGES_FINISHES = {
    "end_turn": "stop", "tool_use": "tool_calls", "max_tokens": "length", "refusal": "refusal"}


class Messages(Dialect):
    name = "messages"
    path = "/v1/messages"

    def tools(self, tools: Iterable[Tool]) -> list[Json]:
        return [{"name": tool.name, "description": tool.description, "input_schema": tool.schema}
                for tool in tools]

    def choice(self, choice: Choice) -> Json:
        if isinstance(choice, Named):
            return {"type": "tool", "name": choice.name}
        return {"type": {"required": "any"}.get(choice, choice)}

    def serial(self, choice: Choice) -> dict[str, Json]:
        return {"tool_choice": {**self.choice(choice), "disable_parallel_tool_use": True}}

    def results(self, results: Sequence[tuple[str, Result]]) -> list[Json]:
        blocks = [{"type": "tool_result", "tool_use_id": call_id, "content": [
            self.text(result.text), *(self.image(data) for data in result.images),
        ] if result.images else result.text, "is_error": result.is_error}
            for call_id, result in results]
        return [{"role": "user", "content": blocks}]

    def shape(self, schema: Json) -> dict[str, Json]:
        return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}

    def image(self, base64_data: str) -> Json:
        source = {"type": "base64", "media_type": "image/png", "data": base64_data}
        return {"type": "image", "source": source}

    def pdf(self, base64_data: str) -> Json:
        source = {"type": "base64", "media_type": "application/pdf", "data": base64_data}
        return {"type": "document", "source": source}

    def fields(self, system: str) -> dict[str, Json]:
        return {"max_tokens": 4000, **({"system": system} if system else {})}

    def whole(self, reply: Reply, body: Json) -> Said:
        blocks = body["content"]
        text, thinking = (
            "".join(block[kind] for block in blocks if block["type"] == kind)
            for kind in ("text", "thinking"))
        calls = [Call(block["id"], block["name"], json.dumps(block["input"]))
                 for block in blocks if block["type"] == "tool_use"]
        refused = body["stop_reason"] == "refusal"
        usage = body["usage"]
        prompt = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
        return Said(
            reply, "" if refused else text, text if refused else "", thinking, calls,
            _MESSAGES_FINISHES[body["stop_reason"]],
            prompt_tokens=sum(usage[name] for name in prompt),
            repeated=[{"role": "assistant", "content": blocks}])

    def streamed(self, reply: Reply) -> Said:
        events = [data for name, data in reply.events if name == data["type"] != "ping"]
        assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
        blocks = _streamed_blocks(events)
        body = {**events[0]["message"], "content": blocks, **events[-2]["delta"]}
        body["usage"] = {**body["usage"], **events[-2]["usage"]}
        pieces = [event["delta"]["text"] for event in events
                  if event["type"] == "content_block_delta" and "text" in event["delta"]]
        return self.whole(reply, body)._replace(pieces=pieces)


def _streamed_blocks(events: Iterable[Mapping[str, Json]]) -> list[Json]:
    """The blocks of a message: one is complete before the next begins, counted from 0."""
    blocks: list[Json] = []
    is_open = False
    for event in events:
        kind = event["type"]
        if kind == "content_block_start":
            assert not is_open and event["index"] == len(blocks)
            is_open = True
            blocks.append({**event["content_block"], "_json": ""})
        elif kind == "content_block_delta":
            assert is_open and event["index"] == len(blocks) - 1
            fields = {k: v for k, v in event["delta"].items() if k != "type"}
            ((name, piece),) = fields.items()
            name = "_json" if name == "partial_json" else name
            blocks[-1][name] = blocks[-1].get(name, "") + piece
        elif kind == "content_block_stop":
            is_open = False
            _close_block(blocks[-1])
    assert not is_open
    return blocks


def _close_block(block: dict[str, Json]) -> None:
    arguments = block.pop("_json")
    if block["type"] == "tool_use" and arguments:
        try:
            block["input"] = json.loads(arguments)
        except ValueError:
            # Cut off by the limit, which the stop reason tells.
            block["input"] = None


class Responses(Dialect):
    name = "responses"
    path = "/v1/responses"
    field = "input"

    def tools(self, tools: Iterable[Tool]) -> list[Json]:
        return [{"type": "function", "name": tool.name, "description": tool.description,
                 "parameters": tool.schema} for tool in tools]

    def choice(self, choice: Choice) -> Json:
        named = isinstance(choice, Named)
        return {"type": "function", "name": choice.name} if named else choice

    def results(self, results: Sequence[tuple[str, Result]]) -> list[Json]:
        return [{"type": "function_call_output", "call_id": call_id, "output": [
            self.text(result.text), *(self.image(data) for data in result.images),
        ] if result.images else result.text} for call_id, result in results]

    def shape(self, schema: Json) -> dict[str, Json]:
        return {"text": {"format": {"type": "json_schema", "name": "answer", "schema": schema}}}

    def image(self, base64_data: str) -> Json:
        return {"type": "input_image", "image_url": f"data:image/png;base64,{base64_data}"}

    def pdf(self, base64_data: str) -> Json:
        data = f"data:application/pdf;base64,{base64_data}"
        return {"type": "input_file", "filename": "a.pdf", "file_data": data}

    def text(self, text: str) -> Json:
        return {"type": "input_text", "text": text}

    def fields(self, system: str) -> dict[str, Json]:
        return {"instructions": system} if system else {}

    def whole(self, reply: Reply, body: Json) -> Said:
        parts = [part for item in body["output"] if item["type"] == "message"
                 for part in item["content"]]
        text = "".join(part["text"] for part in parts if part["type"] == "output_text")
        refusal = "".join(part["refusal"] for part in parts if part["type"] == "refusal")
        calls = [Call(item["call_id"], item["name"], item["arguments"])
                 for item in body["output"] if item["type"] == "function_call"]
        finish = "refusal" if refusal else "tool_calls" if calls else "stop"
        if body["status"] == "incomplete":
            assert body["incomplete_details"] == {"reason": "max_output_tokens"}
            finish = "length"
        return Said(
            reply, text, refusal, "", calls, finish,
            prompt_tokens=body["usage"]["input_tokens"], repeated=body["output"])

    def streamed(self, reply: Reply) -> Said:
        events = [data for name, data in reply.events if name == data["type"]]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        said = self.whole(reply, events[-1]["response"])
        kinds = ("response.output_text.delta", "response.refusal.delta")
        pieces = [event["delta"] for event in events if event["type"] in kinds]
        assert "".join(pieces) == said.text + said.refusal
        return said._replace(pieces=pieces)


CHAT, MESSAGES, RESPONSES = Chat(), Messages(), Responses()
DIALECTS: tuple[Dialect, ...] = (CHAT, MESSAGES, RESPONSES)


# ---------------------------------------------------------------------------
# 3 Conversations
# ---------------------------------------------------------------------------

class Talk:
    """A client in the middle of a conversation, which it sends whole with every request."""

    def __init__(
        self, rig: Rig, dialect: Dialect, tools: Sequence[Tool] = (), system: str = "",
        streams: bool = False, **fields: Json,
    ) -> None:
        self.rig = rig
        self.dialect = dialect
        self.tools = tools
        self.system = system
        #: Further fields of every request.
        self.more = {"stream": True, **fields} if streams else fields
        self.messages: list[Json] = []

    def branch(self) -> Talk:
        """Another client that knows the same conversation."""
        other = Talk(self.rig, self.dialect, self.tools, self.system, **self.more)
        other.messages = json.loads(json.dumps(self.messages))
        return other

    def body(self, **fields: Json) -> dict[str, Json]:
        dialect = self.dialect
        body = {
            "model": MODEL, dialect.field: [*dialect.opening(self.system), *self.messages],
            **dialect.fields(self.system), **self.more, **fields}
        if self.tools:
            body["tools"] = dialect.tools(self.tools)
        return body

    def send(self, **fields: Json) -> Said:
        """The answer to the conversation as it stands; it becomes part of it."""
        reply = self.rig.server.call(
            "POST", self.dialect.path, self.body(**fields), timeout_s=60)
        said = self.dialect.heard(reply)
        self.messages += said.repeated
        return said

    def ask(self, content: Json, **fields: Json) -> Said:
        """The answer to a user's message."""
        self.messages.append({"role": "user", "content": content})
        return self.send(**fields)

    def give(self, results: Sequence[tuple[str, Result]], **fields: Json) -> Said:
        """The answer to tool results, by the ids of their calls."""
        self.messages += self.dialect.results(results)
        return self.send(**fields)


# ---------------------------------------------------------------------------
# 4 What became of a request
# ---------------------------------------------------------------------------

def path_of(rig: Rig, said: Said) -> str:
    """How the server came to the answer: fresh, continued, rewound or rebuilt."""
    def found() -> list[str]:
        return [str(entry["path"]) for entry in rig.server.log_entries("answer_finished")
                if entry["request_id"] == said.request_id]

    return eventually(found)[0]


def goes_on(rig: Rig, answers: Iterable[Said]) -> bool:
    """Whether a conversation was continued from its beginning, which may have been put to a
    process that had forgotten another one."""
    first, *later = [path_of(rig, said) for said in answers]
    return first in ("fresh", "rewound") and set(later) <= {"continued"}


def stats(rig: Rig) -> dict[str, int]:
    found: dict[str, int] = rig.server.call("GET", "/health").json()["stats"]
    return found


class Seen(NamedTuple):
    """A block that reached the API, as far as it matters who called what."""
    kind: str
    id: str
    #: The input of a call, the text of a result, the text of a text.
    content: Json
    name: str = ""
    is_error: bool = False
    images: Sequence[str] = ()


def seen(body: Mapping[str, Json]) -> list[tuple[str, list[Json]]]:
    """The messages of a body as (role, contents): texts as they are, tool calls and results as
    Seen with plain ids, anything else as it came."""
    return [(role, [_seen(block) for block in contents if not _is_own(block)])
            for role, contents in turns(body)]


#: What claude adds behind the words of others, in a block of its own or in a tool's result.
_ADDED = re.compile(
    r"(\n?<system-reminder>\n(# Environment\n|You are powered by |Today's date is ).*"
    r"</system-reminder>\s*)+\Z", re.DOTALL)


def _is_own(block: Json) -> bool:
    return isinstance(block, str) and bool(_ADDED.match(block))


def _seen(block: Json) -> Json:
    kind = "text" if isinstance(block, str) else block["type"]
    if kind == "tool_use":
        return Seen(kind, plain(block["id"]), block["input"], block["name"])
    if kind != "tool_result":
        return block
    content = block["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return Seen(
        kind, plain(block["tool_use_id"]),
        _ADDED.sub("", "".join(part["text"] for part in parts if part["type"] == "text")),
        is_error=bool(block.get("is_error")),
        images=[part["source"]["data"] for part in parts if part["type"] == "image"])


def called(call: Call) -> Seen:
    """How a call reaches the API again."""
    return Seen("tool_use", plain(call.id), call.input, call.name)


def gave(call: Call, result: Result, is_error: bool = False) -> Seen:
    """How its result does."""
    return Seen("tool_result", plain(call.id), result.text, "", is_error, list(result.images))


def plain(call_id: str) -> str:
    return "".join(character for character in call_id if character.isalnum())
