"""What reached the upstream API: messages, tool calls and system prompts of request bodies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dialects import Call, Result

Json = Any
Body = Mapping[str, Json]

#: What claude says to the model by itself, each in a text block of its own.
_OWN_WORDS = re.compile(
    r"<system-reminder>\n(As you answer the user's questions|# Environment\n|You are powered by "
    r"|Today's date is )(?:(?!</?system-reminder>).)*</system-reminder>\s*", re.DOTALL)
_OWN_SYSTEM = "# Environment\n"
#: What claude adds behind the words of others, in a block of its own or in a tool's result.
_ADDED = re.compile(
    r"(\n?<system-reminder>\n(# Environment\n|You are powered by |Today's date is ).*"
    r"</system-reminder>\s*)+\Z", re.DOTALL)


def turns(body: Body) -> list[tuple[str, list[Json]]]:
    """Return the messages of a body as (role, contents), without what claude adds in front.

    A text is a string. Any other block is as it came."""
    found = []
    for message in body["messages"]:
        contents = _without_own_words([_simplified(each) for each in _blocks(message["content"])])
        if message["role"] != "system" or not contents[0].startswith(_OWN_SYSTEM):
            found.append((message["role"], contents))
    return found


def _blocks(content: Json) -> list[dict[str, Json]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _simplified(block: Mapping[str, Json]) -> Json:
    fields = {name: value for name, value in block.items() if name != "cache_control"}
    return fields["text"] if set(fields) == {"type", "text"} else fields


def _without_own_words(contents: list[Json]) -> list[Json]:
    while contents and isinstance(contents[0], str) and _OWN_WORDS.fullmatch(contents[0]):
        contents = contents[1:]
    return contents


def unmarked(value: Json) -> Json:
    """The value without cache_control; texts are lists of blocks, which are the same there."""
    if isinstance(value, list):
        return [unmarked(each) for each in value]
    if not isinstance(value, dict):
        return value
    found = {name: unmarked(each) for name, each in value.items() if name != "cache_control"}
    if isinstance(found.get("content"), str) and "role" in found:
        found["content"] = [{"type": "text", "text": found["content"]}]
    return found


def system_texts(body: Body) -> list[str]:
    """Return the system prompt without the two blocks that claude puts in front."""
    texts = [block["text"] for block in body["system"]]
    assert texts[0].startswith("x-anthropic-billing-header:"), texts
    assert texts[1].startswith("You are a Claude agent"), texts
    return texts[2:]


class UpstreamBlock(NamedTuple):
    """A tool call or a result in a body, with a plain id."""
    #: tool_use or tool_result.
    kind: str
    id: str
    #: The input of a call, the text of a result.
    content: Json
    name: str = ""
    is_error: bool = False
    images: Sequence[str] = ()


def upstream_messages(body: Body) -> list[tuple[str, list[Json]]]:
    """Return the messages of a body as (role, contents), without all that claude adds.

    A text is a string, a tool call or a result an UpstreamBlock. Any other block is as it came."""
    return [(role, [_upstream_block(block) for block in contents if not _is_added(block)])
            for role, contents in turns(body)]


def _is_added(block: Json) -> bool:
    return isinstance(block, str) and bool(_ADDED.match(block))


def _upstream_block(block: Json) -> Json:
    kind = "text" if isinstance(block, str) else block["type"]
    if kind == "tool_use":
        return UpstreamBlock(kind, plain_id(block["id"]), block["input"], block["name"])
    if kind != "tool_result":
        return block
    parts = _blocks(block["content"])
    return UpstreamBlock(
        kind, plain_id(block["tool_use_id"]),
        _ADDED.sub("", "".join(part["text"] for part in parts if part["type"] == "text")),
        is_error=bool(block.get("is_error")),
        images=[part["source"]["data"] for part in parts if part["type"] == "image"])


def upstream_call(call: Call) -> UpstreamBlock:
    """Return the block by which the API gets this call of its own again."""
    return UpstreamBlock("tool_use", plain_id(call.id), call.input, call.name)


def upstream_result(call: Call, result: Result, is_error: bool = False) -> UpstreamBlock:
    """Return the block by which the API gets the result of this call."""
    return UpstreamBlock(
        "tool_result", plain_id(call.id), result.text, "", is_error, list(result.images))


def plain_id(call_id: str) -> str:
    """Return an id without what clients and claude may change in it."""
    return "".join(character for character in call_id if character.isalnum())
