"""What the stand-in for the API refuses and what it takes, in the words of the API."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import pytest

import api_rules
from api_rules import RULES, Request, violation

Json = Any

SONNET, OPUS, NEWEST = "claude-sonnet-4-6", "claude-opus-5", "claude-opus-5-5"
HAIKU = "claude-haiku-4-5-20251001"


def body(*messages: Json, **fields: Json) -> dict[str, Json]:
    """A request that is good in everything that is not given; None takes a field away."""
    given = {"model": SONNET, "max_tokens": 4096, "messages": list(messages) or [user("Hi")],
             **fields}
    return {name: value for name, value in given.items() if value is not None}


def user(*content: Json) -> Json:
    return {"role": "user", "content": blocks(content)}


def assistant(*content: Json) -> Json:
    return {"role": "assistant", "content": blocks(content)}


def system(*content: Json) -> Json:
    return {"role": "system", "content": blocks(content)}


def blocks(content: Sequence[Json]) -> Json:
    """A single string stays one."""
    if len(content) == 1 and isinstance(content[0], str):
        return content[0]
    return [text(each) if isinstance(each, str) else each for each in content]


def text(words: str, **more: Json) -> Json:
    return {"type": "text", "text": words, **more}


def call(call_id: str = "toolu_1", name: str = "look", **more: Json) -> Json:
    return {"type": "tool_use", "id": call_id, "name": name, "input": {}, **more}


def result(call_id: str = "toolu_1", content: Json = "it", **more: Json) -> Json:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def thought(signature: str = "c2ln") -> Json:
    return {"type": "thinking", "thinking": "Hm.", "signature": signature}


def tool(name: str = "look", schema: Optional[Json] = None, **more: Json) -> Json:
    return {"name": name, "input_schema": schema or {"type": "object"}, **more}


def with_tools(*messages: Json, **fields: Json) -> dict[str, Json]:
    return body(*messages, **{"tools": [tool()], **fields})


def loop(*answer: Json, **fields: Json) -> dict[str, Json]:
    """A request with the result of a call."""
    return with_tools(user("Look."), assistant(*answer, call()), user(result()), **fields)


def of_schema(**schema: Json) -> dict[str, Json]:
    return body(tools=[tool(schema={"type": "object", **schema})])


def image(content: bytes, media_type: str = "image/png") -> Json:
    data = base64.b64encode(content).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}


def png(width: int = 1, height: int = 1) -> bytes:
    """As much of a PNG as says how large it is."""
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height)


def pdf(content: bytes, media_type: str = "application/pdf") -> Json:
    return {**image(content, media_type), "type": "document"}


def mark(ttl: str = "5m") -> Json:
    return {"type": "ephemeral", "ttl": ttl}


def marked(*ttls: str) -> Json:
    return user(*[text(f"{number}", cache_control=mark(ttl)) for number, ttl in enumerate(ttls)])


BUDGET = {"type": "enabled", "budget_tokens": 1024}
ADAPTIVE = {"type": "adaptive"}
ANY, NAMED = {"type": "any"}, {"type": "tool", "name": "look"}
NOT_BASE64 = {"type": "image", "source": {
    "type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo"}}
EMPTY_IMAGE = {"type": "image", "source": {
    "type": "base64", "media_type": "image/png", "data": ""}}


class Case(NamedTuple):
    """Requests around one rule: some that break it, with words of the answer, and some good."""
    refused: Mapping[str, dict[str, Json]]
    taken: Sequence[dict[str, Json]] = ()
    headers: Mapping[str, str] = {}


CASES = {
    "types": Case({
        "model: Field required": body(model=None),
        "max_tokens: Field required": body(max_tokens=None),
        "messages: Input should be a valid array": body(messages="Hi"),
        "max_tokens: Input should be a valid integer": body(max_tokens=True),
        'messages: Unexpected role "tool".': body({"role": "tool", "content": "Hi"}),
        "messages.0.content: Field required": body({"role": "user"}),
        "messages.0.content.0.type: Field required": body(user({"text": "Hi"})),
        "messages.1.content.0.thinking.signature: Field required": body(
            user("Hi"), assistant({"type": "thinking", "thinking": "Hm."}), user("So?")),
    }),
    "fields": Case({
        "seed: Extra inputs are not permitted": body(seed=1),
        "speed: Extra inputs are not permitted": body(speed="fast"),
        "messages.0.name: Extra inputs are not permitted": body({**user("Hi"), "name": "me"}),
        "messages.0.content.0.text.id: Extra inputs are not permitted": body(user(text("a", id=1))),
        "messages.1.content.0.tool_use.index: Extra inputs are not permitted": with_tools(
            user("Look."), assistant(call(index=0)), user(result())),
        "messages.1.content.0.thinking.cache_control: Extra inputs are not permitted": body(
            user("a"), assistant({**thought(), "cache_control": mark()}, "b"), user("c")),
        "tools.0.custom.parameters: Extra inputs are not permitted": body(
            tools=[tool(parameters={})]),
        "metadata.name: Extra inputs are not permitted": body(metadata={"name": "me"}),
    }, [body(stream=True, metadata={"user_id": "me"}, service_tier="auto"),
        body(tools=[tool(strict=True, description="Looks.")]),
        body(tools=[{"type": "web_search_20250305", "name": "web_search", "max_uses": 1}]),
        body(user({"type": "container_upload", "file_id": "file_1"}))]),
    "fields with betas": Case(
        {"speed: Extra inputs are not permitted": body(speed="fast")},
        [body(context_management={"edits": []})],
        {"anthropic-beta": "claude-code-20250219, context-management-2025-06-27"}),
    "limits": Case({
        "max_tokens: must be greater than or equal to 0": body(max_tokens=-1),
        "max_tokens: 0 is not allowed with stream": body(max_tokens=0, stream=True),
        "max_tokens: 64001 > 64000, which is the maximum allowed number of output tokens for "
        + HAIKU: body(model=HAIKU, max_tokens=64_001),
        "stop_sequences: each stop sequence must contain non-whitespace": body(
            stop_sequences=["END", "\n"]),
        "metadata.user_id: String should have at most 256": body(metadata={"user_id": "x" * 257}),
    }, [body(max_tokens=0), body(model="claude-of-tomorrow", max_tokens=10**6),
        body(stop_sequences=[" END"]), body(metadata={"user_id": None})]),
    "empty messages": Case({
        "messages: at least one message is required": {**body(), "messages": []},
        "messages.0: user messages must have non-empty content": body(user("")),
        "messages.2: user messages must have non-empty content": body(
            user("a"), assistant("b"), user()),
        "messages.1: all messages must have non-empty content except for the optional final": body(
            user("a"), assistant(""), user("b")),
    }, [body(user(), user("a")), body(user("a"), assistant(), model=HAIKU)]),
    "the first message": Case(
        {'messages: first message must use the "user" role': body(assistant("a"), user("b"))}),
    "system messages": Case({
        "messages.0: use the top-level 'system' parameter": body(
            system("Be."), assistant("a"), model=OPUS),
        "messages.1: role 'system' must precede an 'assistant' message or end the array": body(
            user("a"), system("Be."), user("b"), model=OPUS),
        "messages.1: system content must contain at least one block": body(
            user("a"), system(), model=OPUS),
        "messages.1: system text blocks must contain non-whitespace text": body(
            user("a"), system("x", " "), model=OPUS),
        "messages.1: role 'system' supports text, tool_addition": body(
            user("a"), system(image(png())), model=OPUS),
        "role 'system' is not supported on this model": body(user("a"), system("Be.")),
    }, [body(user("a"), system("Be."), model=OPUS),
        body(user("a"), system("x"), system("y"), assistant("b"), user("c"), model=OPUS),
        body(user("a"), {**system(), "output_config": {"effort": "low"}}, user("b"))]),
    "empty texts": Case({
        "messages: text content blocks must be non-empty": body(user("a", "")),
        "messages: text content blocks must contain non-whitespace text": body(user(" \n")),
        "system: text content blocks must be non-empty": body(system=[text("")]),
        "system: text content blocks must contain non-whitespace text": body(system=" "),
        "messages.0.content.1.text: cache_control cannot be set for empty text blocks": body(
            user("a", text("", cache_control=mark()))),
        "system.0: cache_control cannot be set for empty": body(
            system=[text("", cache_control=mark())]),
    }, [body(system="", user=None), body(system=[text("Be.")]),
        with_tools(user("a"), assistant(call()), user(result(content=""))),
        with_tools(user("a"), assistant(call()), user(result(content=[text(" ")])))]),
    "a text in a result": Case({"messages: text content blocks must be non-empty": with_tools(
        user("a"), assistant(call()), user(result(content=[text("")])))}),
    "names of tools": Case({
        "tools.0.custom.name: Field required": body(tools=[{"input_schema": {"type": "object"}}]),
        "tools.0.custom.name: String should have at least 1": body(tools=[tool("")]),
        "tools.1.custom.name: String should match pattern '^[a-zA-Z0-9_-]{1,128}$'": body(
            tools=[tool(), tool("a.b")]),
        "tools: Tool names must be unique.": body(tools=[tool(), tool()]),
    }, [body(tools=[tool("a" * 128), tool("a-B_1")])]),
    "schemas of tools": Case({
        "tools.0.custom.input_schema: Field required": body(tools=[{"name": "look"}]),
        "tools.0.custom.input_schema.type: Field required": body(
            tools=[tool(schema={"properties": {}})]),
        "tools.0.custom.input_schema.type: Input should be 'object'": body(
            tools=[tool(schema={"type": "array"})]),
        "tools.0.custom.input_schema: input_schema does not support oneOf, allOf, or anyOf at the":
            of_schema(anyOf=[{"required": ["a"]}]),
        "tools.0.custom.input_schema.properties: Property keys should match pattern": of_schema(
            properties={"filter[id]": {"type": "string"}}),
    }, [of_schema(properties={"a.b-c_1": {"anyOf": [{"type": "string"}, {"type": "null"}]}}),
        of_schema(properties={"a": {"type": "object", "properties": {"$b": {}}}}),
        of_schema(**{"$schema": "http://json-schema.org/draft-07/schema#", "x-more": 1})]),
    "the choice of a tool": Case({
        "tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'": with_tools(
            tool_choice={"type": "required"}),
        "tool_choice.any may only be specified while providing tools": body(tool_choice=ANY),
        "Tool 'look' not found in provided tools": body(tools=[tool("hear")], tool_choice=NAMED),
        'tool_choice: type "tool" and "any" are not supported for this model.': with_tools(
            model=NEWEST, tool_choice=ANY),
    }, [with_tools(tool_choice=each, model=model)
        for each, model in ((ANY, OPUS), (NAMED, SONNET), ({"type": "auto"}, NEWEST))]),
    "calls": Case({
        "messages.1.content.0.tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'":
            with_tools(user("a"), assistant(call("exec:2")), user(result("exec:2"))),
        "messages.1.content.0.tool_use.name: String should have at least 1": with_tools(
            user("a"), assistant(call(name="")), user(result())),
        "messages.1.content.0.tool_use.name: String should have at most 200": with_tools(
            user("a"), assistant(call(name="x" * 201)), user(result())),
        "messages.1.content.0.tool_use.input: Input should be an object": with_tools(
            user("a"), assistant(call(input="{}")), user(result())),
        "messages.0.content.0.tool_result.tool_use_id: String should match": with_tools(
            user(result(""))),
    }, [loop("Let me see.")]),
    "equal calls": Case({"messages.3.content.0: `tool_use` ids must be unique": with_tools(
        user("a"), assistant(call()), user(result()), assistant(call()), user(result()))}),
    "results": Case({
        "messages.1: `tool_use` ids were found without `tool_result` blocks immediately after: "
        "toolu_2. Each": with_tools(
            user("a"), assistant(call(), call("toolu_2")), user(result())),
        "messages.1: `tool_use` ids were found without `tool_result`": with_tools(
            user("a"), assistant(call()), user("Quick!", result())),
        "messages.1: `tool_use` ids were found without": with_tools(
            user("a"), assistant(call()), model=HAIKU),
        "messages.2.content.0: unexpected `tool_use_id` found in `tool_result` blocks: toolu_2.":
            with_tools(user("a"), assistant("b"), user(result("toolu_2"))),
        "messages.2.content.1: each tool_use must have a single result. Found multiple": with_tools(
            user("a"), assistant(call()), user(result(), result())),
    }, [with_tools(user("a"), assistant(call(), call("b")), user(result("b"), result(), "So?")),
        with_tools(user("a"), assistant(call()), assistant(call("b")),
                   user(result()), user(result("b")))]),
    "an answer that was begun": Case({
        "This model does not support assistant message prefill.": body(user("a"), assistant("b")),
        "messages: final assistant content cannot end with trailing whitespace": body(
            user("a"), assistant("b "), model=HAIKU),
    }, [body(user("a"), assistant("b"), model=HAIKU),
        body(user("a"), assistant("b "), user("c"))]),
    "types of thinking": Case({
        "adaptive thinking is not supported on this model": body(model=HAIKU, thinking=ADAPTIVE),
        '"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive"':
            body(model=OPUS, thinking=BUDGET),
        '"thinking.type.disabled" is not supported for this model. Use "thinking.type.adaptive"':
            body(model=NEWEST, thinking={"type": "disabled"}),
        '"thinking.type.disabled" is not supported for this model. Use "thinking.type.between_t':
            body(model="claude-sonnet-5-5", thinking={"type": "disabled"}),
        '"thinking.type.between_tools" is not supported': body(
            model=OPUS, thinking={"type": "between_tools"}),
        "thinking.type: Field required": body(thinking={"budget_tokens": 2000}),
    }, [body(thinking=ADAPTIVE), body(thinking=BUDGET), body(model=HAIKU, thinking=BUDGET),
        body(model=OPUS, thinking={"type": "disabled"}),
        body(model="claude-sonnet-5-5", thinking={"type": "between_tools"})]),
    "budgets": Case({
        "thinking.enabled.budget_tokens: Field required": body(thinking={"type": "enabled"}),
        "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024": body(
            thinking={"type": "enabled", "budget_tokens": 1023}),
        "`max_tokens` must be greater than `thinking.budget_tokens`.": body(
            thinking=BUDGET, max_tokens=1024),
    }),
    "budgets of a turn": Case(
        {"`max_tokens` must be greater than": body(thinking=BUDGET, max_tokens=1024)},
        [with_tools(thinking=BUDGET, max_tokens=1024)],
        {"anthropic-beta": "interleaved-thinking-2025-05-14"}),
    "thinking and forced tools": Case({
        "Thinking may not be enabled when tool_choice forces tool use.": with_tools(
            thinking=BUDGET, tool_choice=NAMED)},
        [with_tools(thinking=BUDGET), with_tools(thinking=ADAPTIVE, tool_choice=ANY)]),
    "thinking and sampling": Case({
        "`temperature` may only be set to 1 when thinking is enabled or in adaptive mode.": body(
            thinking=ADAPTIVE, temperature=0.5),
        "`top_p` must be greater than or equal to 0.95 or unset when": body(
            thinking=BUDGET, top_p=0.9),
        "`top_k` must be unset when thinking is enabled": body(thinking=BUDGET, top_k=5),
    }, [body(thinking=BUDGET, temperature=1), body(thinking=BUDGET, top_p=0.95)]),
    "thinking in a loop": Case({
        "messages.1.content.0.type: Expected `thinking` or `redacted_thinking`, but found "
        "`tool_use`.": loop(model=HAIKU, thinking=BUDGET),
    }, [loop(thought(), model=HAIKU, thinking=BUDGET), loop(model=HAIKU), loop(thinking=ADAPTIVE),
        body(user("a"), assistant("b"), user("c"), thinking=BUDGET)]),
    "signatures": Case({"messages.1.content.0: Invalid `signature` in `thinking` block": body(
        user("a"), assistant(thought(""), "b"), user("c"))}),
    "sampling": Case({
        "`temperature` is deprecated for this model.": body(model=OPUS, temperature=1),
        "`top_k` is deprecated for this model.": body(model=NEWEST, top_k=1),
        "top_p: range: 0..1": body(top_p=1.5),
        "`temperature` and `top_p` cannot both be specified for this model.": body(
            temperature=1, top_p=0.9),
    }, [body(temperature=0, top_k=5), body(top_p=0.9), body(model=HAIKU, top_p=0.9)]),
    "efforts": Case({
        "This model does not support the effort parameter.": body(
            model=HAIKU, output_config={"effort": "low"}),
        "This model does not support effort level 'xhigh'. Supported levels: high, low, max, med":
            body(output_config={"effort": "xhigh"}),
        "output_config.effort 'max' is not supported when thinking is disabled": body(
            model=OPUS, thinking={"type": "disabled"}, output_config={"effort": "max"}),
        "output_config.effort 'xhigh' is not supported when thinking is disabled": body(
            model="claude-sonnet-5-5", thinking={"type": "between_tools"},
            output_config={"effort": "xhigh"}),
    }, [body(output_config={"effort": "max"}), body(model=OPUS, output_config={"effort": "xhigh"}),
        body(output_config={})]),
    "images": Case({
        "messages.0.content.0.image.source.base64.media_type: Input should be 'image/jpeg'": body(
            user(image(png(), "image/tiff"))),
        "messages.0.content.0.image.source.base64: image cannot be empty": body(user(EMPTY_IMAGE)),
        "messages.0.content.0.image.source.base64.data: invalid base64 data": body(
            user(NOT_BASE64)),
        "messages.0.content.0.image.source.base64.data: Image does not match the provided media "
        "type image/jpeg": body(user(image(png(), "image/jpeg"))),
        "messages.2.content.0.tool_result.content.0.image.source.base64.data: Image does not":
            with_tools(user("a"), assistant(call()), user(
                result(content=[image(png(), "image/webp")]))),
        "Could not process image": body(user(image(b"no picture"))),
        "messages.0.content.0.image.source.base64: image exceeds 10 MB maximum: ": body(
            user(image(png() + bytes(8 << 20)))),
        "data: At least one of the image dimensions exceed max allowed size: 8000 pixels": body(
            user(image(png(8001)))),
        "exceed max allowed size for many-image requests: 2000 pixels": body(
            user(*[image(png(height=2001))] * 21)),
        "Too much media: 0 document pages + 101 images > 100": body(user(*[image(png())] * 101)),
    }, [body(user(image(png(8000)))), body(user(*[image(png(2000))] * 100)),
        body(user(*[image(png())] * 101), model=OPUS),
        body(user(image(b"\xff\xd8\xff\xe0", "image/jpeg"), image(b"GIF89a", "image/gif"))),
        body(user({"type": "image", "source": {"type": "url", "url": "https://a.example/b"}}))]),
    "documents": Case({
        "messages.0.content.0.document.source.base64.media_type: Input should be 'application/pdf'":
            body(user(pdf(b"%PDF", "text/plain"))),
        "messages.0.content.0.pdf.source.base64.data: PDF cannot be empty": body(user(pdf(b""))),
        "messages.0.content.0.pdf.source.base64.data: The PDF specified was not valid.": body(
            user(pdf(b"no document"))),
        "messages.0.content.0.document.source.text.media_type: Input should be 'text/plain'": body(
            user({"type": "document", "source": {
                "type": "text", "media_type": "text/csv", "data": "a"}})),
    }, [body(user(pdf(b"%PDF-1.7"))),
        body(user({"type": "document", "source": {
            "type": "text", "media_type": "text/plain", "data": "a"}}))]),
    "the cache": Case({
        "A maximum of 4 blocks with cache_control may be provided. Found 5.": body(
            marked("5m", "5m"), system=[text("Be.", cache_control=mark())],
            tools=[tool(cache_control=mark())], cache_control=mark()),
        "messages.0.content.1.cache_control.ttl: a ttl='1h' cache_control block must not come "
        "after a ttl='5m' cache_control block.": body(marked("5m", "1h")),
        "messages.0.content.0.cache_control.ttl: a ttl='1h'": body(
            marked("1h"), system=[text("Be.", cache_control={"type": "ephemeral"})]),
    }, [body(marked("1h", "1h", "5m", "5m"))]),
}

REFUSED = [pytest.param(said, request, case.headers, id=f"{name}: {said[:40]}")
           for name, case in CASES.items() for said, request in case.refused.items()]
TAKEN = [pytest.param(request, case.headers, id=f"{name} {number}")
         for name, case in CASES.items() for number, request in enumerate(case.taken)]


@pytest.mark.parametrize(("said", "request_body", "headers"), REFUSED)
def test_a_request_that_breaks_a_rule_is_refused_in_the_words_of_the_api(
    said: str, request_body: Json, headers: Mapping[str, str]
) -> None:
    assert said in (violation(request_body, headers) or "")


@pytest.mark.parametrize(("request_body", "headers"), TAKEN)
def test_a_request_that_breaks_no_rule_is_taken(
    request_body: Json, headers: Mapping[str, str]
) -> None:
    assert violation(request_body, headers) is None


INVALID_SCHEMAS: Sequence[Json] = (
    {"a": {"type": "any"}}, {"a": None}, {"a": {"type": "integer", "exclusiveMinimum": True}},
    {"a": {"type": "array", "items": [{"type": "string"}]}}, {"a": {"required": ["b", "b"]}},
    {"a": {"type": "string", "required": True}}, {"a": {"enum": "b"}})


@pytest.mark.parametrize("properties", INVALID_SCHEMAS, ids=json.dumps)
def test_a_schema_that_is_none_is_refused(properties: Json) -> None:
    pytest.importorskip("jsonschema_rs", reason="jsonschema_rs is not installed")
    assert "JSON schema is invalid. It must match JSON Schema draft 2020-12" in str(
        violation(of_schema(properties=properties), {}))


def test_every_rule_refuses_a_request_here() -> None:
    broken = {rule.check.__name__ for _, request, headers in (row.values for row in REFUSED)
              if next(api_rules.field_types(request), None) is None
              for rule in RULES if list(rule.check(Request(request, headers)))}
    assert broken == {rule.check.__name__ for rule in RULES}


def test_every_rule_says_where_it_was_reported() -> None:
    assert all(rule.source for rule in RULES)
    assert len({rule.check for rule in RULES}) == len(RULES)
