"""Clients of the four API dialects: each builds its requests and reads its replies.

`DIALECTS` holds all four, `TOOL_DIALECTS` the three that have tools and conversations.

Index: 1 values that belong to no dialect   2 what all dialects share   3 chat and completions
4 messages   5 responses   6 the tables
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional, Union

from http_client import Reply

Json = Any


# ---------------------------------------------------------------------------
# 1 Values that belong to no dialect
# ---------------------------------------------------------------------------

class Tool(NamedTuple):
    """A tool of the client."""
    name: str
    schema: Mapping[str, Json] = {"type": "object", "properties": {"city": {"type": "string"}}}
    description: str = "Tells something."


class Call(NamedTuple):
    """A tool call as the client got it. The arguments are JSON text."""
    id: str
    name: str
    arguments: str

    @property
    def input(self) -> Json:
        return json.loads(self.arguments)


class Result(NamedTuple):
    """The result of a tool. Images are base64 PNGs. Only messages can say that it failed."""
    text: str
    images: Sequence[str] = ()
    is_error: bool = False


class ForcedTool(NamedTuple):
    """The choice of one tool that the model has to call."""
    name: str


#: "auto", "none", "required", or the tool that has to be called.
Choice = Union[str, ForcedTool]


class Answer(NamedTuple):
    """A reply as a client reads it: whole, streamed or failed, the same fields for every dialect.

    Failures have an `error`, and only what had arrived before it."""
    reply: Reply
    #: One for each choice.
    texts: Sequence[str] = ()
    refusal: str = ""
    #: "" where the dialect does not show it.
    thinking: str = ""
    signature: str = ""
    calls: Sequence[Call] = ()
    #: Every one that arrived, ordered by choice, in the words of the dialect.
    stop_reasons: Sequence[str] = ()
    #: stop, tool_calls, length, content_filter or refusal. "" unless one choice ended well.
    finish: str = ""
    usage: Optional[dict[str, Json]] = None
    error: Optional[dict[str, Json]] = None
    #: Whether it is a success, or a stream with the mark that ends a success.
    is_complete: bool = False
    #: The deltas of a stream in their order: text, refusals, and thinking if it is shown.
    pieces: Sequence[str] = ()
    #: The messages or items that the next request repeats.
    repeated: Sequence[Json] = ()

    @property
    def status(self) -> int:
        return self.reply.status

    @property
    def headers(self) -> Any:
        """Names in any case. [] gives None for a header that is not there."""
        return self.reply.headers

    @property
    def request_id(self) -> str:
        return str(self.reply.headers["x-request-id"])

    @property
    def text(self) -> str:
        """The text of the only choice."""
        assert len(self.texts) < 2, self
        return "".join(self.texts)

    @property
    def call(self) -> Call:
        """The only call."""
        (call,) = self.calls
        return call

    @property
    def content(self) -> Mapping[str, Json]:
        """All fields that are equal for two replies with the same answer, whole or streamed."""
        transport = ("reply", "pieces", "repeated")
        return {name: value for name, value in self._asdict().items() if name not in transport}

    @property
    def prompt_tokens(self) -> int:
        """All tokens of the prompt, cached or not. 0 if there is no usage."""
        names = ("prompt_tokens", "input_tokens", "cache_read_input_tokens",
                 "cache_creation_input_tokens")
        return sum((self.usage or {}).get(name, 0) for name in names)


# ---------------------------------------------------------------------------
# 2 What all dialects share
# ---------------------------------------------------------------------------

class Dialect:
    """One API dialect, from the client's side."""

    name = ""
    path = ""
    #: The request field that holds the conversation.
    field = "messages"
    #: The request field that limits the answer.
    limit_field = "max_tokens"

    def __repr__(self) -> str:
        return f"<Dialect {self.name}>"

    # -- requests --------------------------------------------------------------

    def body(self, question: str, **fields: Json) -> dict[str, Json]:
        """Return a request with one question. The same question and fields are the same turn in
        every dialect."""
        return {
            "model": "sonnet", self.field: self.conversation(question), self.limit_field: 4_000,
            **self.defaults(fields), **fields}

    def conversation(self, question: str) -> Json:
        """Return a conversation of one question."""
        return [{"role": "user", "content": question}]

    def defaults(self, fields: Mapping[str, Json]) -> dict[str, Json]:
        """Return the fields without which this dialect would tell less than the others do."""
        return {}

    def system_fields(self, system: str) -> dict[str, Json]:
        """Return the fields of every request, with the system prompt where it has a field."""
        return {}

    def system_messages(self, system: str) -> list[Json]:
        """Return the system prompt where it is a message."""
        return []

    def tools(self, tools: Iterable[Tool]) -> list[Json]:
        raise NotImplementedError

    def choice(self, choice: Choice) -> Json:
        raise NotImplementedError

    def one_call_fields(self, choice: Choice) -> dict[str, Json]:
        """Return the fields that ask for one call at a time."""
        return {"parallel_tool_calls": False}

    def results(self, results: Sequence[tuple[str, Result]]) -> list[Json]:
        """Return the messages or items with these results, by the ids of their calls."""
        raise NotImplementedError

    def result_content(self, result: Result) -> Json:
        if not result.images:
            return result.text
        return [self.text(result.text), *(self.image(data) for data in result.images)]

    def schema_fields(self, schema: Json) -> dict[str, Json]:
        """Return the fields that ask for an answer of this schema."""
        raise NotImplementedError

    def text(self, text: str) -> Json:
        return {"type": "text", "text": text}

    def image(self, base64_data: str) -> Json:
        raise NotImplementedError

    def pdf(self, base64_data: str) -> Json:
        raise NotImplementedError

    # -- replies ---------------------------------------------------------------

    def read_answer(self, reply: Reply) -> Answer:
        """Read any reply. A stream has to end as a success or with an error."""
        if "event-stream" in (reply.headers["content-type"] or ""):
            answer = self.read_stream(reply)
            assert reply.status == 200 and (answer.is_complete or answer.error), reply.text[-500:]
            return answer
        body = reply.json()
        if reply.status == 200:
            return self.read_whole(reply, body)
        assert not {"choices", "content", "output"} & set(body), reply
        return Answer(reply, error=body["error"])

    def read_success(self, reply: Reply) -> Answer:
        """Read a reply that has to be a success."""
        answer = self.read_answer(reply)
        assert reply.status == 200 and answer.is_complete and answer.error is None, reply
        return answer

    def read_whole(self, reply: Reply, body: Json) -> Answer:
        raise NotImplementedError

    def read_stream(self, reply: Reply) -> Answer:
        raise NotImplementedError


# ---------------------------------------------------------------------------
# 3 Chat and completions
# ---------------------------------------------------------------------------

class Chat(Dialect):
    """OpenAI's chat completions."""

    name = "chat"
    path = "/v1/chat/completions"

    def defaults(self, fields: Mapping[str, Json]) -> dict[str, Json]:
        return _usage_in_streams(fields)

    def system_messages(self, system: str) -> list[Json]:
        return [{"role": "system", "content": system}] if system else []

    def tools(self, tools: Iterable[Tool]) -> list[Json]:
        return [{"type": "function", "function": {
            "name": tool.name, "description": tool.description, "parameters": tool.schema,
        }} for tool in tools]

    def choice(self, choice: Choice) -> Json:
        if isinstance(choice, ForcedTool):
            return {"type": "function", "function": {"name": choice.name}}
        return choice

    def results(self, results: Sequence[tuple[str, Result]]) -> list[Json]:
        return [{"role": "tool", "tool_call_id": call_id, "content": self.result_content(result)}
                for call_id, result in results]

    def schema_fields(self, schema: Json) -> dict[str, Json]:
        described = {"name": "answer", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": described}}

    def image(self, base64_data: str) -> Json:
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_data}"}}

    def pdf(self, base64_data: str) -> Json:
        data = f"data:application/pdf;base64,{base64_data}"
        return {"type": "file", "file": {"filename": "a.pdf", "file_data": data}}

    def read_whole(self, reply: Reply, body: Json) -> Answer:
        messages = [choice["message"] for choice in body["choices"]]
        assert all({"content", "refusal"} <= set(message) for message in messages), reply
        calls = [_openai_call(call) for message in messages
                 for call in message.get("tool_calls", ())]
        return _read_choices(reply, [body])._replace(calls=calls, repeated=messages)

    def read_stream(self, reply: Reply) -> Answer:
        answer = _read_chunks(reply)
        calls = _streamed_calls(_parts(_chunks_of(reply)))
        message: Json = {"role": "assistant", "content": "".join(answer.texts) or None}
        if calls:
            message["tool_calls"] = [{"id": call.id, "type": "function", "function": {
                "name": call.name, "arguments": call.arguments}} for call in calls]
        return answer._replace(calls=calls, repeated=[message])


class Completions(Dialect):
    """OpenAI's older text completions, which have neither tools nor conversations."""

    name = "completions"
    path = "/v1/completions"
    field = "prompt"

    def conversation(self, question: str) -> Json:
        return question

    def defaults(self, fields: Mapping[str, Json]) -> dict[str, Json]:
        return _usage_in_streams(fields)

    def read_whole(self, reply: Reply, body: Json) -> Answer:
        return _read_choices(reply, [body])

    def read_stream(self, reply: Reply) -> Answer:
        return _read_chunks(reply)


def _usage_in_streams(fields: Mapping[str, Json]) -> dict[str, Json]:
    return {"stream_options": {"include_usage": True}} if fields.get("stream") else {}


def _chunks_of(reply: Reply) -> list[Json]:
    """Return the chunks of a stream, among them the one that is an error."""
    return [data for _, data in reply.events if data != "[DONE]"]


def _parts(objects: Iterable[Json]) -> list[Json]:
    """Return what holds text: deltas, messages, or the choices themselves."""
    choices = [choice for each in objects for choice in each.get("choices", ())]
    return [choice.get("delta", choice.get("message", choice)) for choice in choices]


def _read_choices(reply: Reply, objects: Sequence[Json]) -> Answer:
    """Read one whole object, or the chunks of a stream."""
    choices = [choice for each in objects for choice in each.get("choices", ())]
    parts = _parts(objects)
    texts: dict[int, str] = {}
    for choice, part in zip(choices, parts):
        more = part.get("content") or part.get("text") or ""
        texts[choice["index"]] = texts.get(choice["index"], "") + more
    refusal, thinking = ("".join(part.get(field) or "" for part in parts)
                         for field in ("refusal", "reasoning_content"))
    ends = [(each["index"], each["finish_reason"]) for each in choices if each["finish_reason"]]
    reasons = [reason for _, reason in sorted(ends)]
    finish = reasons[0] if len(reasons) == 1 else ""
    return Answer(
        reply, [texts[index] for index in sorted(texts)], refusal, thinking,
        stop_reasons=reasons, finish="refusal" if refusal and finish else finish,
        usage=objects[-1].get("usage"), is_complete=True)


def _read_chunks(reply: Reply) -> Answer:
    chunks = _chunks_of(reply)
    answer = _read_choices(reply, chunks)
    pieces = [part.get("content") or part.get("text") or part.get("refusal")
              or part.get("reasoning_content") for part in _parts(chunks)]
    errors = [chunk["error"] for chunk in chunks if "error" in chunk]
    is_complete = reply.events[-1][1] == "[DONE]"
    return answer._replace(
        finish=answer.finish if is_complete and not errors else "",
        error=errors[-1] if errors else None, is_complete=is_complete,
        pieces=[piece for piece in pieces if piece])


def _openai_call(call: Mapping[str, Json]) -> Call:
    return Call(call["id"], call["function"]["name"], call["function"]["arguments"])


def _streamed_calls(deltas: Iterable[Mapping[str, Json]]) -> list[Call]:
    """Return the calls of these deltas: each begins with id and name, in the order of index."""
    calls: list[Call] = []
    for piece in [piece for delta in deltas for piece in delta.get("tool_calls") or ()]:
        if "id" in piece:
            assert piece["index"] == len(calls)
            calls.append(_openai_call(piece))
        else:
            call = calls[piece["index"]]
            more = call.arguments + piece["function"]["arguments"]
            calls[piece["index"]] = call._replace(arguments=more)
    return calls


# ---------------------------------------------------------------------------
# 4 Messages
# ---------------------------------------------------------------------------

_MESSAGES_FINISHES = {
    "end_turn": "stop", "stop_sequence": "stop", "tool_use": "tool_calls", "max_tokens": "length",
    "refusal": "refusal"}


class Messages(Dialect):
    """Anthropic's messages."""

    name = "messages"
    path = "/v1/messages"

    def defaults(self, fields: Mapping[str, Json]) -> dict[str, Json]:
        # The other three leave it to the model.
        return {"thinking": {"type": "adaptive"}}

    def system_fields(self, system: str) -> dict[str, Json]:
        return {"max_tokens": 4000, **({"system": system} if system else {})}

    def tools(self, tools: Iterable[Tool]) -> list[Json]:
        return [{"name": tool.name, "description": tool.description, "input_schema": tool.schema}
                for tool in tools]

    def choice(self, choice: Choice) -> Json:
        if isinstance(choice, ForcedTool):
            return {"type": "tool", "name": choice.name}
        return {"type": {"required": "any"}.get(choice, choice)}

    def one_call_fields(self, choice: Choice) -> dict[str, Json]:
        return {"tool_choice": {**self.choice(choice), "disable_parallel_tool_use": True}}

    def results(self, results: Sequence[tuple[str, Result]]) -> list[Json]:
        blocks = [{"type": "tool_result", "tool_use_id": call_id, "is_error": result.is_error,
                   "content": self.result_content(result)} for call_id, result in results]
        return [{"role": "user", "content": blocks}]

    def schema_fields(self, schema: Json) -> dict[str, Json]:
        return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}

    def image(self, base64_data: str) -> Json:
        source = {"type": "base64", "media_type": "image/png", "data": base64_data}
        return {"type": "image", "source": source}

    def pdf(self, base64_data: str) -> Json:
        source = {"type": "base64", "media_type": "application/pdf", "data": base64_data}
        return {"type": "document", "source": source}

    def read_whole(self, reply: Reply, body: Json) -> Answer:
        blocks = body["content"]
        text, thinking, signature = (
            "".join(block.get(field, "") for block in blocks)
            for field in ("text", "thinking", "signature"))
        calls = [Call(block["id"], block["name"], json.dumps(block["input"]))
                 for block in blocks if block["type"] == "tool_use"]
        is_refused = body["stop_reason"] == "refusal"
        return Answer(
            reply, ["" if is_refused else text], text if is_refused else "", thinking, signature,
            calls, [body["stop_reason"]], _MESSAGES_FINISHES[body["stop_reason"]], body["usage"],
            is_complete=True, repeated=[{"role": "assistant", "content": blocks}])

    def read_stream(self, reply: Reply) -> Answer:
        assert all(name == data["type"] for name, data in reply.events), reply.text[-500:]
        events = [data for name, data in reply.events if name != "ping"]
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        both = [delta.get("text") or delta.get("thinking") for delta in deltas]
        pieces = [piece for piece in both if piece]
        if events[-1]["type"] == "error":
            return Answer(reply, error=events[-1]["error"], pieces=pieces)
        start, *middle, end, stop = events
        assert [event["type"] for event in (start, end, stop)] == [
            "message_start", "message_delta", "message_stop"]
        body = {**start["message"], **end["delta"], "usage": end["usage"],
                "content": _streamed_blocks(middle)}
        return self.read_whole(reply, body)._replace(pieces=pieces)


def _streamed_blocks(events: Iterable[Mapping[str, Json]]) -> list[Json]:
    """Return the blocks of a message: one is complete before the next begins, counted from 0."""
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
            if name == "citation":
                blocks[-1].setdefault("citations", []).append(piece)
                continue
            name = "_json" if name == "partial_json" else name
            blocks[-1][name] = blocks[-1].get(name, "") + piece
        else:
            assert kind == "content_block_stop", event
            is_open = False
            _close_block(blocks[-1])
    assert not is_open
    return blocks


def _close_block(block: dict[str, Json]) -> None:
    arguments = block.pop("_json")
    if block["type"] in ("tool_use", "server_tool_use") and arguments:
        try:
            block["input"] = json.loads(arguments)
        except ValueError:
            # The limit cut it off, which the stop reason says.
            block["input"] = None


# ---------------------------------------------------------------------------
# 5 Responses
# ---------------------------------------------------------------------------

class Responses(Dialect):
    """OpenAI's responses."""

    name = "responses"
    path = "/v1/responses"
    field = "input"
    limit_field = "max_output_tokens"

    def conversation(self, question: str) -> Json:
        return question

    def system_fields(self, system: str) -> dict[str, Json]:
        return {"instructions": system} if system else {}

    def tools(self, tools: Iterable[Tool]) -> list[Json]:
        return [{"type": "function", "name": tool.name, "description": tool.description,
                 "parameters": tool.schema} for tool in tools]

    def choice(self, choice: Choice) -> Json:
        if isinstance(choice, ForcedTool):
            return {"type": "function", "name": choice.name}
        return choice

    def results(self, results: Sequence[tuple[str, Result]]) -> list[Json]:
        return [{"type": "function_call_output", "call_id": call_id,
                 "output": self.result_content(result)} for call_id, result in results]

    def schema_fields(self, schema: Json) -> dict[str, Json]:
        return {"text": {"format": {"type": "json_schema", "name": "answer", "schema": schema}}}

    def text(self, text: str) -> Json:
        return {"type": "input_text", "text": text}

    def image(self, base64_data: str) -> Json:
        return {"type": "input_image", "image_url": f"data:image/png;base64,{base64_data}"}

    def pdf(self, base64_data: str) -> Json:
        data = f"data:application/pdf;base64,{base64_data}"
        return {"type": "input_file", "filename": "a.pdf", "file_data": data}

    def read_whole(self, reply: Reply, body: Json) -> Answer:
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
        return Answer(
            reply, [text], refusal, calls=calls, stop_reasons=[body["status"]], finish=finish,
            usage=body["usage"], is_complete=True, repeated=body["output"])

    def read_stream(self, reply: Reply) -> Answer:
        assert all(name == data["type"] for name, data in reply.events), reply.text[-500:]
        events = [data for _, data in reply.events]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        kinds = ("response.output_text.delta", "response.refusal.delta")
        pieces = [event["delta"] for event in events if event["type"] in kinds]
        body = events[-1]["response"]
        if body["status"] == "failed":
            return Answer(reply, error=body["error"], pieces=pieces)
        answer = self.read_whole(reply, body)
        assert "".join(pieces) == answer.text + answer.refusal
        return answer._replace(pieces=pieces)


# ---------------------------------------------------------------------------
# 6 The tables
# ---------------------------------------------------------------------------

CHAT, MESSAGES, RESPONSES, COMPLETIONS = Chat(), Messages(), Responses(), Completions()
DIALECTS: tuple[Dialect, ...] = (CHAT, MESSAGES, RESPONSES, COMPLETIONS)
TOOL_DIALECTS: tuple[Dialect, ...] = (CHAT, MESSAGES, RESPONSES)


def dialect_name(dialect: Dialect) -> str:
    """Return the id of a parameter that is a dialect."""
    return dialect.name
