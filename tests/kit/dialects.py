"""The four dialects from outside: the same question in each, and what an answer to it says.

With the fields that `body` gives, one question in two of them is the same turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from http_client import Reply

Json = Any


class Told(NamedTuple):
    """What an answer says, in no dialect. Thinking is "" where a dialect does not show it."""
    #: One for each choice.
    texts: Sequence[str]
    thinking: str
    signature: str
    #: In the words of the dialect.
    stops: Sequence[str]
    usage: Json
    #: The deltas of a stream, text and thinking, in the order in which they came.
    pieces: Sequence[str] = ()

    @property
    def text(self) -> str:
        (only,) = self.texts
        return only

    @property
    def content(self) -> Told:
        """The same, however it came."""
        return self._replace(pieces=())


class Tongue:
    """How one dialect asks and answers."""

    name = ""
    path = ""

    def body(self, question: str, **fields: Json) -> dict[str, Json]:
        """A request with one question."""
        raise NotImplementedError

    def told(self, reply: Reply) -> Told:
        """What a good answer says, whole or streamed."""
        assert reply.status == 200, reply
        if "event-stream" in str(reply.headers["Content-Type"]):
            return self._streamed([data for _, data in reply.events])
        return self._whole(reply.json())

    def _whole(self, body: Json) -> Told:
        raise NotImplementedError

    def _streamed(self, events: list[Json]) -> Told:
        raise NotImplementedError


def _of_each_choice(chunks: Sequence[Json], field: str) -> list[str]:
    """What the chunks add up to, choice by choice."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    texts: dict[int, str] = {}
    for choice in choices:
        more = choice.get("delta", choice).get(field) or ""
        texts[choice["index"]] = texts.get(choice["index"], "") + more
    return [texts[index] for index in sorted(texts)]


class Chat(Tongue):
    name = "chat"
    path = "/v1/chat/completions"

    def body(self, question: str, **fields: Json) -> dict[str, Json]:
        messages = [{"role": "user", "content": question}]
        shown = {"stream_options": {"include_usage": True}} if fields.get("stream") else {}
        return {"model": "sonnet", "messages": messages, "max_tokens": 500, **shown, **fields}

    def _whole(self, body: Json) -> Told:
        messages = [choice["message"] for choice in body["choices"]]
        thinking = "".join(message.get("reasoning_content", "") for message in messages)
        stops = [choice["finish_reason"] for choice in body["choices"]]
        return Told([m["content"] for m in messages], thinking, "", stops, body["usage"])

    def _streamed(self, events: list[Json]) -> Told:
        *chunks, end = events
        assert end == "[DONE]", end
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        both = [d.get("content") or d.get("reasoning_content") or "" for d in deltas]
        thinking = "".join(delta.get("reasoning_content") or "" for delta in deltas)
        return Told(
            _of_each_choice(chunks, "content"), thinking, "", _stops(chunks),
            chunks[-1]["usage"], [piece for piece in both if piece])


def _stops(chunks: Sequence[Json]) -> list[str]:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    found = {each["index"]: each["finish_reason"] for each in choices if each["finish_reason"]}
    return [found[index] for index in sorted(found)]


class Completions(Tongue):
    name = "completions"
    path = "/v1/completions"

    def body(self, question: str, **fields: Json) -> dict[str, Json]:
        shown = {"stream_options": {"include_usage": True}} if fields.get("stream") else {}
        return {"model": "sonnet", "prompt": question, "max_tokens": 500, **shown, **fields}

    def _whole(self, body: Json) -> Told:
        stops = [choice["finish_reason"] for choice in body["choices"]]
        return Told([choice["text"] for choice in body["choices"]], "", "", stops, body["usage"])

    def _streamed(self, events: list[Json]) -> Told:
        *chunks, end = events
        assert end == "[DONE]", end
        texts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
        return Told(
            _of_each_choice(chunks, "text"), "", "", _stops(chunks), chunks[-1]["usage"],
            [text for text in texts if text])


class Messages(Tongue):
    name = "messages"
    path = "/v1/messages"

    def body(self, question: str, **fields: Json) -> dict[str, Json]:
        messages = [{"role": "user", "content": question}]
        # What the other three leave to the model has to be asked for here.
        thinks = {"thinking": {"type": "adaptive"}}
        return {"model": "sonnet", "messages": messages, "max_tokens": 500, **thinks, **fields}

    def _whole(self, body: Json) -> Told:
        def joined(field: str) -> str:
            return "".join(block.get(field, "") for block in body["content"])

        return Told(
            [joined("text")], joined("thinking"), joined("signature"), [body["stop_reason"]],
            body["usage"])

    def _streamed(self, events: list[Json]) -> Told:
        assert events[-1]["type"] == "message_stop", events[-1]
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        (end,) = [event for event in events if event["type"] == "message_delta"]
        joined = {
            field: "".join(delta.get(field, "") for delta in deltas)
            for field in ("text", "thinking", "signature")}
        both = [delta.get("text") or delta.get("thinking") or "" for delta in deltas]
        return Told(
            [joined["text"]], joined["thinking"], joined["signature"],
            [end["delta"]["stop_reason"]], end["usage"], [piece for piece in both if piece])


class Responses(Tongue):
    name = "responses"
    path = "/v1/responses"

    def body(self, question: str, **fields: Json) -> dict[str, Json]:
        return {"model": "sonnet", "input": question, "max_output_tokens": 500, **fields}

    def _whole(self, body: Json) -> Told:
        parts = [part for item in body["output"] for part in item.get("content") or ()]
        text = "".join(part.get("text", "") for part in parts)
        return Told([text], "", "", [body["status"]], body["usage"])

    def _streamed(self, events: list[Json]) -> Told:
        pieces = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
        return self._whole(events[-1]["response"])._replace(pieces=pieces)


CHAT, MESSAGES, RESPONSES, COMPLETIONS = Chat(), Messages(), Responses(), Completions()
TONGUES: tuple[Tongue, ...] = (CHAT, MESSAGES, RESPONSES, COMPLETIONS)


def named(tongue: Tongue) -> str:
    """For the ids of parametrized tests."""
    return tongue.name


def error_of(tongue: Tongue, body: Mapping[str, Json]) -> str:
    """The type of an error in the shape of this dialect."""
    assert ("type" in body) == (tongue is MESSAGES), body
    return str(body["error"]["type"])
