"""The rules by which the Messages API is reported to refuse a request with status 400.

`violation(body, headers)` returns the API's words for the first rule that a request breaks, None
if it breaks none. RULES says of each rule where it was reported. What nobody has reported passes,
and a model that is not in MODELS has only the rules that all models have.

Index: 1 models   2 the request   3 fields   4 messages   5 tool calls   6 tools   7 thinking
8 images and documents   9 the cache   10 the rules
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple, Optional

try:
    import jsonschema_rs
except ImportError:  # It comes with the tools of .venv; without it one rule is silent.
    jsonschema_rs = None  # type: ignore[assignment]

Json = Any
Body = Mapping[str, Json]


# ---------------------------------------------------------------------------
# 1 Models
# ---------------------------------------------------------------------------

class Model(NamedTuple):
    """What one model refuses. The default is a model of which nothing is known."""
    max_output: int = 1 << 30
    #: Values of thinking.type.
    refused_thinking: frozenset[str] = frozenset()
    takes_sampling: bool = True
    takes_top_p_beside_temperature: bool = True
    takes_forced_tools: bool = True
    takes_prefill: bool = True
    takes_system_messages: bool = True
    #: None is a model of which they are unknown.
    efforts: Optional[Sequence[str]] = None
    #: Images and pages of documents in one request.
    max_media: int = 600


ALL_EFFORTS = ("high", "low", "max", "medium", "xhigh")
_WITHOUT_XHIGH = ("high", "low", "max", "medium")
_ALWAYS_ADAPTIVE = Model(
    128_000, frozenset({"enabled", "disabled", "between_tools"}), takes_sampling=False,
    takes_forced_tools=False, takes_prefill=False, efforts=ALL_EFFORTS)
_ADAPTIVE = _ALWAYS_ADAPTIVE._replace(
    refused_thinking=frozenset({"enabled", "between_tools"}), takes_forced_tools=True)
_BOTH = Model(
    128_000, frozenset({"between_tools"}), takes_top_p_beside_temperature=False,
    takes_prefill=False, takes_system_messages=False, efforts=_WITHOUT_XHIGH, max_media=100)
_BUDGET = _BOTH._replace(
    max_output=64_000, refused_thinking=frozenset({"adaptive", "between_tools"}),
    takes_prefill=True, efforts=())

#: Beginnings of ids; the first row that fits wins.
MODELS: Sequence[tuple[str, Model]] = (
    ("claude-opus-5-5", _ALWAYS_ADAPTIVE),
    ("claude-opus-5", _ADAPTIVE),
    ("claude-opus-4-8", _ADAPTIVE),
    ("claude-opus-4-7", _ADAPTIVE._replace(takes_system_messages=False)),
    ("claude-opus-4-6", _BOTH),
    ("claude-opus-4-5", _BUDGET._replace(efforts=("high", "low", "medium"))),
    ("claude-opus-4", _BUDGET._replace(max_output=32_000)),
    ("claude-sonnet-5-5", _ALWAYS_ADAPTIVE._replace(
        refused_thinking=frozenset({"enabled", "disabled"}))),
    ("claude-sonnet-5", _ADAPTIVE),
    ("claude-sonnet-4-6", _BOTH),
    ("claude-sonnet-4-5", _BUDGET),
    ("claude-sonnet-4", _BUDGET._replace(takes_top_p_beside_temperature=True)),
    ("claude-haiku-5", _ADAPTIVE),
    ("claude-haiku-4-5", _BUDGET),
    ("claude-fable-5-", _ALWAYS_ADAPTIVE),
    ("claude-fable-5", _ALWAYS_ADAPTIVE._replace(takes_forced_tools=True)),
)


def model_of(name: str) -> Model:
    """Return what is known of the model with this id."""
    return next((model for start, model in MODELS if name.startswith(start)), Model())


# ---------------------------------------------------------------------------
# 2 The request
# ---------------------------------------------------------------------------

class Placed(NamedTuple):
    """A content block, and the path by which the API names it."""
    path: str
    block: dict[str, Json]
    #: Of the message that it is in.
    role: str


class Run(NamedTuple):
    """Messages of one role in a row, which the API takes for one."""
    #: The number of the first one.
    number: int
    role: str
    blocks: list[Placed]


class Request:
    """A request whose fields have the right types, taken apart for the rules."""

    def __init__(self, body: Body, headers: Mapping[str, str]) -> None:
        self.body = body
        self.betas = {name.strip() for name in headers.get("anthropic-beta", "").split(",")}
        self.model = model_of(body["model"])
        self.messages: list[dict[str, Json]] = body["messages"]
        self.tools: list[dict[str, Json]] = body.get("tools") or []
        self.thinking: dict[str, Json] = body.get("thinking") or {}
        self.choice: dict[str, Json] = body.get("tool_choice") or {}
        self.effort: Optional[str] = (body.get("output_config") or {}).get("effort")

    @property
    def thinks(self) -> bool:
        return self.thinking.get("type") in ("enabled", "adaptive")

    @property
    def forces_tools(self) -> bool:
        return self.choice.get("type") in ("any", "tool")

    def blocks(self, *kinds: str) -> list[Placed]:
        """Return the blocks of the messages, those inside tool results too; of all kinds or of
        these."""
        found = [inner for placed in self._outer() for inner in _with_inner(placed)]
        return [each for each in found if not kinds or each.block["type"] in kinds]

    def runs(self) -> list[Run]:
        """Return the messages of user and assistant, those of one role in a row as one."""
        found: list[Run] = []
        for number, message in enumerate(self.messages):
            if message["role"] == "system":
                continue
            blocks = _placed(number, message)
            if found and found[-1].role == message["role"]:
                found[-1].blocks.extend(blocks)
            else:
                found.append(Run(number, message["role"], blocks))
        return found

    def _outer(self) -> Iterator[Placed]:
        for number, message in enumerate(self.messages):
            yield from _placed(number, message)


def as_blocks(content: Json) -> list[dict[str, Json]]:
    """Return content as blocks. An empty string is none."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content or [])


def _placed(number: int, message: Body) -> list[Placed]:
    return [Placed(f"messages.{number}.content.{index}", block, message["role"])
            for index, block in enumerate(as_blocks(message["content"]))]


def _with_inner(placed: Placed) -> Iterator[Placed]:
    yield placed
    if placed.block["type"] == "tool_result":
        for index, inner in enumerate(as_blocks(placed.block.get("content"))):
            yield Placed(f"{placed.path}.tool_result.content.{index}", inner, placed.role)


Complaints = Iterator[str]


# ---------------------------------------------------------------------------
# 3 Fields
# ---------------------------------------------------------------------------

_ARRAY, _OBJECT = "a valid array", "an object"
#: Field -> how the API calls its type, and the type. What else there may be is in _BETA_FIELDS.
_FIELDS: Mapping[str, tuple[str, Any]] = {
    "model": ("a valid string", str),
    "tool_choice": (_OBJECT, dict),
    "tools": (_ARRAY, list),
    "messages": (_ARRAY, list),
    "system": (_ARRAY, (str, list)),
    "thinking": (_OBJECT, dict),
    "output_config": (_OBJECT, dict),
    "cache_control": (_OBJECT, dict),
    "max_tokens": ("a valid integer", int),
    "metadata": (_OBJECT, dict),
    "stop_sequences": (_ARRAY, list),
    "temperature": ("a valid number", (int, float)),
    "service_tier": ("'auto' or 'standard_only'", str),
    "top_k": ("a valid integer", int),
    "top_p": ("a valid number", (int, float)),
    "stream": ("a valid boolean", bool),
    "container": (_OBJECT, (dict, str)),
    "inference_geo": ("a valid string", str),
}
#: Fields that are there only with a beta -> the beginning of its name.
_BETA_FIELDS = {
    "context_management": "context-management-", "diagnostics": "cache-diagnosis-",
    "fallbacks": "server-side-fallback-", "fallback_credit_token": "server-side-fallback-",
    "mcp_servers": "mcp-client-", "speed": "fast-mode-", "thread": "thread",
    "output_format": "structured-outputs-"}
_CACHE = frozenset({"type", "cache_control"})
#: Type of a content block -> the fields that it may have. Other types are not looked at.
_BLOCK_FIELDS = {
    "text": _CACHE | {"text", "citations"},
    "image": _CACHE | {"source"},
    "document": _CACHE | {"source", "title", "context", "citations"},
    "tool_use": _CACHE | {"id", "name", "input", "caller"},
    "tool_result": _CACHE | {"tool_use_id", "content", "is_error"},
    "thinking": frozenset({"type", "thinking", "signature"}),
    "redacted_thinking": frozenset({"type", "data"}),
}
#: The field without which a block is none.
_NEEDED = {
    "text": "text", "image": "source", "document": "source", "tool_use": "id",
    "tool_result": "tool_use_id", "thinking": "signature", "redacted_thinking": "data"}
_TOOL_FIELDS = _CACHE | {
    "name", "description", "input_schema", "strict", "input_examples", "defer_loading",
    "eager_input_streaming", "allowed_callers"}
_MESSAGE_FIELDS = {"role", "content", "output_config", "clear_at"}
_MAX_USER_ID_CHARS = 256


def field_types(body: Body) -> Complaints:
    """The one check of a body that may be anything; the others rely on it."""
    for name in ("model", "messages", "max_tokens"):
        if name not in body:
            yield f"{name}: Field required"
    for name, (noun, kind) in _FIELDS.items():
        if name in body:
            value = body[name]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                yield f"{name}: Input should be {noun}"
    for number, message in enumerate(body.get("messages", ())):
        yield from _message_types(f"messages.{number}", message)


def _message_types(path: str, message: Body) -> Complaints:
    if message.get("role") not in ("user", "assistant", "system"):
        role = message.get("role")
        yield f'messages: Unexpected role "{role}". Allowed roles are "user" or "assistant"'
    if "content" not in message:
        yield f"{path}.content: Field required"
    elif not isinstance(message["content"], (str, list)):
        yield f"{path}.content: Input should be a valid array"
    else:
        yield from _block_types(f"{path}.content", as_blocks(message["content"]))


def _block_types(path: str, blocks: Sequence[Json]) -> Complaints:
    for index, block in enumerate(blocks):
        if not isinstance(block, dict):
            yield f"{path}.{index}: Input should be an object"
        elif "type" not in block:
            yield f"{path}.{index}.type: Field required"
        elif _NEEDED.get(block["type"], "type") not in block:
            yield f"{path}.{index}.{block['type']}.{_NEEDED[block['type']]}: Field required"
        elif block["type"] == "tool_result":
            inner = as_blocks(block.get("content"))
            yield from _block_types(f"{path}.{index}.tool_result.content", inner)


def unknown_fields(request: Request) -> Complaints:
    names = [
        name for name in request.body
        if name not in _FIELDS and not _has_beta(request, _BETA_FIELDS.get(name))]
    for number, message in enumerate(request.messages):
        names += _outside(f"messages.{number}", message, _MESSAGE_FIELDS)
    for path, block, _ in request.blocks():
        allowed = _BLOCK_FIELDS.get(block["type"], block)
        names += _outside(f"{path}.{block['type']}", block, allowed)
    for number, tool in enumerate(request.tools):
        if is_custom(tool):
            names += _outside(f"tools.{number}.custom", tool, _TOOL_FIELDS)
    names += _outside("metadata", request.body.get("metadata", {}), {"user_id"})
    for name in names:
        yield f"{name}: Extra inputs are not permitted"


def _has_beta(request: Request, start: Optional[str]) -> bool:
    return start is not None and any(name.startswith(start) for name in request.betas)


def _outside(path: str, fields: Iterable[str], allowed: Iterable[str]) -> list[str]:
    return [f"{path}.{name}" for name in fields if name not in allowed]


def limits(request: Request) -> Complaints:
    body, most = request.body, request.model.max_output
    if body["max_tokens"] < 0:
        yield "max_tokens: must be greater than or equal to 0"
    if body["max_tokens"] == 0 and body.get("stream"):
        yield "max_tokens: 0 is not allowed with stream: true"
    if body["max_tokens"] > most:
        yield (f"max_tokens: {body['max_tokens']} > {most}, which is the maximum allowed number "
               f"of output tokens for {body['model']}")
    if not all(isinstance(each, str) and each.strip() for each in body.get("stop_sequences", ())):
        yield "stop_sequences: each stop sequence must contain non-whitespace"
    if len(body.get("metadata", {}).get("user_id") or "") > _MAX_USER_ID_CHARS:
        yield (f"metadata.user_id: String should have at most {_MAX_USER_ID_CHARS} characters")


def sampling(request: Request) -> Complaints:
    given = [name for name in ("temperature", "top_p", "top_k") if name in request.body]
    for name in given:
        if not request.model.takes_sampling:
            yield f"`{name}` is deprecated for this model."
        if name != "top_k" and not 0 <= request.body[name] <= 1:
            yield f"{name}: range: 0..1"
    if {"temperature", "top_p"} <= set(given):
        if not request.model.takes_top_p_beside_temperature:
            yield ("`temperature` and `top_p` cannot both be specified for this model. "
                   "Please use only one.")


# ---------------------------------------------------------------------------
# 4 Messages
# ---------------------------------------------------------------------------

_DIRECTIVE = ("the directive-only form (content: [] with output_config) is accepted at any "
              "position")


def empty_messages(request: Request) -> Complaints:
    runs = request.runs()
    if not request.messages:
        yield "messages: at least one message is required"
    for run in runs:
        if not run.blocks and run.role == "user":
            yield f"messages.{run.number}: user messages must have non-empty content"
        if not run.blocks and run.role == "assistant" and run is not runs[-1]:
            yield (f"messages.{run.number}: all messages must have non-empty content except for "
                   "the optional final assistant message")


def first_role(request: Request) -> Complaints:
    if request.messages and request.messages[0]["role"] == "assistant":
        yield 'messages: first message must use the "user" role'


def system_messages(request: Request) -> Complaints:
    for number, message in enumerate(request.messages):
        is_directive = message["content"] == [] and "output_config" in message
        if message["role"] != "system" or is_directive:
            continue
        path = f"messages.{number}"
        following = request.messages[number + 1:number + 2]
        blocks = as_blocks(message["content"])
        if not request.model.takes_system_messages:
            yield "role 'system' is not supported on this model"
        if not blocks:
            yield f"{path}: system content must contain at least one block"
        if any(block["type"] not in ("text", "tool_addition", "tool_removal") for block in blocks):
            yield (f"{path}: role 'system' supports text, tool_addition, and tool_removal blocks "
                   "only")
        if number == 0:
            yield (f"{path}: use the top-level 'system' parameter for the initial system prompt; "
                   + _DIRECTIVE)
        if any(each["role"] == "user" for each in following):
            yield (f"{path}: role 'system' must precede an 'assistant' message or end the array; "
                   + _DIRECTIVE)
        if not all(block.get("text", "x").strip() for block in blocks):
            yield f"{path}: system text blocks must contain non-whitespace text"


def empty_texts(request: Request) -> Complaints:
    for path, block, role in request.blocks("text"):
        if not block["text"] and "cache_control" in block:
            yield f"{path}.text: cache_control cannot be set for empty text blocks"
        if not block["text"]:
            yield "messages: text content blocks must be non-empty"
        # Nobody has reported it of texts inside tool results.
        if not block["text"].strip() and role != "system" and "tool_result" not in path:
            yield "messages: text content blocks must contain non-whitespace text"
    for number, block in enumerate(as_blocks(request.body.get("system"))):
        if block.get("type") != "text":
            yield f"system.{number}.type: Input should be 'text'"
        elif not block["text"] and "cache_control" in block:
            yield f"system.{number}: cache_control cannot be set for empty text blocks"
        elif not block["text"]:
            yield "system: text content blocks must be non-empty"
        elif not block["text"].strip():
            yield "system: text content blocks must contain non-whitespace text"


def prefill(request: Request) -> Complaints:
    last = request.runs()[-1] if request.runs() else None
    if last is None or last.role != "assistant":
        return
    if not request.model.takes_prefill:
        yield ("This model does not support assistant message prefill. The conversation must end "
               "with a user message.")
    text = last.blocks[-1].block.get("text", "") if last.blocks else ""
    if text != text.rstrip():
        yield "messages: final assistant content cannot end with trailing whitespace"


# ---------------------------------------------------------------------------
# 5 Tool calls
# ---------------------------------------------------------------------------

_ID = "^[a-zA-Z0-9_-]+$"
_TOOL_NAME = "^[a-zA-Z0-9_-]{1,128}$"
_MAX_CALLED_NAME_CHARS = 200


def call_fields(request: Request) -> Complaints:
    for path, block, _ in request.blocks("tool_use"):
        name = block.get("name", "")
        if not re.search(_ID, block["id"]):
            yield f"{path}.tool_use.id: String should match pattern '{_ID}'"
        if not name:
            yield f"{path}.tool_use.name: String should have at least 1 character"
        if len(name) > _MAX_CALLED_NAME_CHARS:
            yield (f"{path}.tool_use.name: String should have at most {_MAX_CALLED_NAME_CHARS} "
                   "characters")
        if not isinstance(block.get("input"), dict):
            yield f"{path}.tool_use.input: Input should be an object"
    for path, block, _ in request.blocks("tool_result"):
        if not re.search(_ID, block["tool_use_id"]):
            yield f"{path}.tool_result.tool_use_id: String should match pattern '{_ID}'"


def unique_calls(request: Request) -> Complaints:
    seen = set()
    for path, block, _ in request.blocks("tool_use"):
        if block["id"] in seen:
            yield f"{path}: `tool_use` ids must be unique"
        seen.add(block["id"])


def call_results(request: Request) -> Complaints:
    """Each call has its one result at the beginning of the next message, and no other is there."""
    runs = request.runs()
    nobody = Run(-1, "user", [])
    for run, following in zip(runs, [*runs[1:], nobody]):
        called = [each.block["id"] for each in run.blocks if each.block["type"] == "tool_use"]
        answered = _leading_results(following)
        missing = [each for each in called if each not in answered]
        if missing:
            yield (f"messages.{run.number}: `tool_use` ids were found without `tool_result` blocks "
                   f"immediately after: {', '.join(missing)}. Each `tool_use` block must have a "
                   "corresponding `tool_result` block in the next message.")
    for previous, run in zip([nobody, *runs], runs):
        yield from _unexpected_results(previous, run)


def _leading_results(run: Run) -> list[str]:
    found = []
    for each in run.blocks:
        if each.block["type"] != "tool_result":
            break
        found.append(each.block["tool_use_id"])
    return found


def _unexpected_results(previous: Run, run: Run) -> Complaints:
    called = {each.block["id"] for each in previous.blocks if each.block["type"] == "tool_use"}
    seen = set()
    for path, block, _ in run.blocks:
        if block["type"] != "tool_result":
            continue
        call_id = block["tool_use_id"]
        if call_id not in called:
            yield (f"{path}: unexpected `tool_use_id` found in `tool_result` blocks: {call_id}. "
                   "Each `tool_result` block must have a corresponding `tool_use` block in the "
                   "previous message.")
        elif call_id in seen:
            yield (f"{path}: each tool_use must have a single result. Found multiple "
                   f"`tool_result` blocks with id: {call_id}")
        seen.add(call_id)


# ---------------------------------------------------------------------------
# 6 Tools
# ---------------------------------------------------------------------------

_PROPERTY = "^[a-zA-Z0-9_.-]{1,64}$"
_JSON_SCHEMA = "https://json-schema.org/draft/2020-12/schema"


def is_custom(tool: Body) -> bool:
    """Return whether the client runs this tool, and says what it takes."""
    return bool(tool.get("type", "custom") == "custom")


def tool_names(request: Request) -> Complaints:
    names = [tool.get("name") for tool in request.tools]
    for number, tool in enumerate(request.tools):
        path, name = f"tools.{number}.custom.name", tool.get("name")
        if not is_custom(tool):
            continue
        if name is None:
            yield f"{path}: Field required"
        elif not name:
            yield f"{path}: String should have at least 1 character"
        elif not re.search(_TOOL_NAME, name):
            yield f"{path}: String should match pattern '{_TOOL_NAME}'"
    if len(set(names)) < len(names):
        yield "tools: Tool names must be unique."


def tool_schemas(request: Request) -> Complaints:
    for number, tool in enumerate(request.tools):
        if is_custom(tool):
            path = f"tools.{number}.custom.input_schema"
            yield from _schema_complaints(path, tool.get("input_schema"))


def _schema_complaints(path: str, schema: Json) -> Complaints:
    if schema is None:
        yield f"{path}: Field required"
    elif not isinstance(schema, dict):
        yield f"{path}: Input should be an object"
    elif "type" not in schema:
        yield f"{path}.type: Field required"
    elif schema["type"] != "object":
        yield f"{path}.type: Input should be 'object'"
    elif {"oneOf", "allOf", "anyOf"} & set(schema):
        yield (f"{path}: input_schema does not support oneOf, allOf, or anyOf at the top level")
    elif not _is_json_schema(schema):
        yield (f"{path}: JSON schema is invalid. It must match JSON Schema draft 2020-12 "
               "(https://json-schema.org/draft/2020-12).")
    elif not all(re.search(_PROPERTY, name) for name in schema.get("properties", ())):
        yield f"{path}.properties: Property keys should match pattern '{_PROPERTY}'"


def _is_json_schema(schema: Json) -> bool:
    """Whatever draft the schema says it is of."""
    if jsonschema_rs is None:
        return True
    without_draft = {name: value for name, value in schema.items() if name != "$schema"}
    valid: bool = jsonschema_rs.meta.is_valid({**without_draft, "$schema": _JSON_SCHEMA})
    return valid


def tool_choice(request: Request) -> Complaints:
    kind, name = request.choice.get("type"), request.choice.get("name")
    if not request.choice:
        return
    if kind not in ("auto", "any", "tool", "none"):
        yield "tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'"
    elif kind == "tool" and name not in [tool.get("name") for tool in request.tools]:
        yield f"Tool '{name}' not found in provided tools"
    elif not request.tools:
        yield f"tool_choice.{kind} may only be specified while providing tools"
    elif request.forces_tools and not request.model.takes_forced_tools:
        yield 'tool_choice: type "tool" and "any" are not supported for this model.'


# ---------------------------------------------------------------------------
# 7 Thinking
# ---------------------------------------------------------------------------

_IN_THOUGHT = "when thinking is enabled or in adaptive mode."
_LEAST_BUDGET_TOKENS = 1024
#: The types with which a model does not think before it answers.
_WITHOUT_THINKING = ("disabled", "between_tools")
#: How the API ends its refusal of a type.
_INSTEAD = {
    "between_tools": 'Use "thinking.type.between_tools" for the lowest thinking setting, or '
                     '"thinking.type.adaptive" and "output_config.effort" to control thinking '
                     "behavior.",
    "adaptive": 'Use "thinking.type.adaptive" and "output_config.effort" to control thinking '
                "behavior.",
}


def thinking_types(request: Request) -> Complaints:
    kind, refused = request.thinking.get("type"), request.model.refused_thinking
    if kind is None and request.thinking:
        yield "thinking.type: Field required"
    elif kind == "adaptive" and kind in refused:
        yield "adaptive thinking is not supported on this model"
    elif kind in refused:
        instead = "adaptive" if "between_tools" in refused or kind == "enabled" else "between_tools"
        yield f'"thinking.type.{kind}" is not supported for this model. {_INSTEAD[instead]}'


def thinking_budget(request: Request) -> Complaints:
    budget = request.thinking.get("budget_tokens")
    if request.thinking.get("type") != "enabled":
        return
    if budget is None:
        yield "thinking.enabled.budget_tokens: Field required"
    elif budget < _LEAST_BUDGET_TOKENS:
        yield ("thinking.enabled.budget_tokens: Input should be greater than or equal to "
               f"{_LEAST_BUDGET_TOKENS}")
    # With this beta and tools the budget is for all thinking of a turn.
    elif budget >= request.body["max_tokens"] and not (
        request.tools and _has_beta(request, "interleaved-thinking-")
    ):
        yield "`max_tokens` must be greater than `thinking.budget_tokens`."


def thinking_and_sampling(request: Request) -> Complaints:
    body = request.body
    if not request.thinks:
        return
    if body.get("temperature", 1) != 1:
        yield f"`temperature` may only be set to 1 {_IN_THOUGHT}"
    if body.get("top_p", 1) < 0.95:
        yield f"`top_p` must be greater than or equal to 0.95 or unset {_IN_THOUGHT}"
    if "top_k" in body:
        yield f"`top_k` must be unset {_IN_THOUGHT}"


def thinking_and_forced_tools(request: Request) -> Complaints:
    if request.thinking.get("type") == "enabled" and request.forces_tools:
        yield "Thinking may not be enabled when tool_choice forces tool use."


def thinking_in_a_loop(request: Request) -> Complaints:
    answers = [run for run in request.runs() if run.role == "assistant"]
    runs = request.runs()
    if request.thinking.get("type") != "enabled" or not answers or not _leading_results(runs[-1]):
        return
    first = answers[-1].blocks[0]
    if first.block["type"] not in ("thinking", "redacted_thinking"):
        yield (f"{first.path}.type: Expected `thinking` or `redacted_thinking`, but found "
               f"`{first.block['type']}`. When `thinking` is enabled, a final `assistant` message "
               "must start with a thinking block (preceeding the lastmost set of `tool_use` and "
               "`tool_result` blocks).")


def thinking_signatures(request: Request) -> Complaints:
    for path, block, _ in request.blocks("thinking"):
        if not block["signature"]:
            yield f"{path}: Invalid `signature` in `thinking` block"


def efforts(request: Request) -> Complaints:
    known, effort = request.model.efforts, request.effort
    if effort is None or known is None:
        return
    if not known:
        yield "This model does not support the effort parameter."
    elif effort not in known:
        yield (f"This model does not support effort level '{effort}'. "
               f"Supported levels: {', '.join(known)}.")
    elif request.thinking.get("type") in _WITHOUT_THINKING and effort in ("xhigh", "max"):
        yield (f"output_config.effort '{effort}' is not supported when thinking is disabled on "
               "this model. Use effort 'high' or below, or enable thinking.")


# ---------------------------------------------------------------------------
# 8 Images and documents
# ---------------------------------------------------------------------------

_IMAGE_STARTS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"), (b"RIFF", "image/webp"))
_IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_MAX_IMAGE_BYTES = 10 * 1024 * 1024
_MAX_PIXELS, _MAX_PIXELS_OF_MANY, _MANY_IMAGES = 8000, 2000, 20


def images(request: Request) -> Complaints:
    found = request.blocks("image")
    most = request.model.max_media
    if len(found) > most:
        yield f"Too much media: 0 document pages + {len(found)} images > {most}"
    is_many = len(found) > _MANY_IMAGES
    for path, block, _ in found:
        source = block["source"]
        if source.get("type") == "base64":
            yield from _image_complaints(f"{path}.image.source.base64", source, is_many)


def _image_complaints(path: str, source: Body, is_many: bool) -> Complaints:
    data, named = source.get("data", ""), source.get("media_type")
    most = _MAX_PIXELS_OF_MANY if is_many else _MAX_PIXELS
    content = _decoded(data)
    if named not in _IMAGE_TYPES:
        yield (f"{path}.media_type: Input should be 'image/jpeg', 'image/png', 'image/gif' or "
               "'image/webp'")
    elif not data:
        yield f"{path}: image cannot be empty"
    elif content is None:
        yield f"{path}.data: invalid base64 data"
    elif len(data) > _MAX_IMAGE_BYTES:
        yield f"{path}: image exceeds 10 MB maximum: {len(data)} bytes > {_MAX_IMAGE_BYTES} bytes"
    elif image_type(content) is None:
        yield "Could not process image"
    elif image_type(content) != named:
        yield f"{path}.data: Image does not match the provided media type {named}"
    elif max(_png_size(content)) > most:
        of_many = " for many-image requests" if is_many else ""
        yield (f"{path}.data: At least one of the image dimensions exceed max allowed size"
               f"{of_many}: {most} pixels")


def _decoded(data: str) -> Optional[bytes]:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        return None


def image_type(content: bytes) -> Optional[str]:
    """Return what an image is by its first bytes, None if it is none."""
    return next((kind for start, kind in _IMAGE_STARTS if content.startswith(start)), None)


def _png_size(content: bytes) -> tuple[int, int]:
    """Of other images nothing is known."""
    if image_type(content) != "image/png" or len(content) < 24:
        return 0, 0
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def documents(request: Request) -> Complaints:
    for path, block, _ in request.blocks("document"):
        source = block["source"]
        kind, named = source.get("type"), source.get("media_type")
        data = source.get("data", "")
        if kind == "text" and named != "text/plain":
            yield f"{path}.document.source.text.media_type: Input should be 'text/plain'"
        if kind != "base64":
            continue
        if named != "application/pdf":
            yield f"{path}.document.source.base64.media_type: Input should be 'application/pdf'"
        elif not data:
            yield f"{path}.pdf.source.base64.data: PDF cannot be empty"
        elif not (_decoded(data) or b"").startswith(b"%PDF"):
            yield f"{path}.pdf.source.base64.data: The PDF specified was not valid."


# ---------------------------------------------------------------------------
# 9 The cache
# ---------------------------------------------------------------------------

_MAX_BREAKPOINTS = 4


def breakpoints(request: Request) -> Complaints:
    tools = [(f"tools.{number}", tool) for number, tool in enumerate(request.tools)]
    system = [(f"system.{number}", block)
              for number, block in enumerate(as_blocks(request.body.get("system")))]
    messages = [(path, block) for path, block, _ in request.blocks()]
    # The order in which the API reads them.
    marks = [(path, block["cache_control"]) for path, block in [*tools, *system, *messages]
             if block.get("cache_control")]
    count = len(marks) + bool(request.body.get("cache_control"))
    if count > _MAX_BREAKPOINTS:
        yield f"A maximum of 4 blocks with cache_control may be provided. Found {count}."
    is_short = False
    for path, mark in marks:
        if is_short and mark.get("ttl") == "1h":
            yield (f"{path}.cache_control.ttl: a ttl='1h' cache_control block must not come after "
                   "a ttl='5m' cache_control block. Note that blocks are processed in the "
                   "following order: `tools`, `system`, `messages`.")
        is_short = is_short or mark.get("ttl", "5m") == "5m"


# ---------------------------------------------------------------------------
# 10 The rules
# ---------------------------------------------------------------------------

class Rule(NamedTuple):
    """A rule, and where it is reported: issues of public trackers, the API's documents."""
    check: Callable[[Request], Complaints]
    source: str


#: In the order in which the API complains, as far as that was measured.
RULES: Sequence[Rule] = (
    Rule(unknown_fields, "documents: errors; BerriAI/litellm 39815 of the cache and thinking"),
    Rule(limits, "documents: models, messages; anthropics/claude-code release notes of names"),
    Rule(empty_messages, "anthropics/claude-code 2196, 6774"),
    Rule(first_role, "documents: messages, as they were until 2025"),
    Rule(system_messages, "documents: mid-conversation system messages"),
    Rule(empty_texts, "askalf/dario 1066; documents of many clients"),
    Rule(tool_names, "BerriAI/litellm 26788; anthropics/claude-code 10687 of equal names"),
    Rule(tool_schemas, "anthropics/claude-code 586, 2758, 79418; decocms/studio 6874"),
    Rule(tool_choice, "documents: tool use, migration to 5.5"),
    Rule(call_fields, "farion1231/cc-switch 1181, vybestack/llxprt-code 964"),
    Rule(unique_calls, "trycua/cua 524"),
    Rule(call_results, "anthropics/claude-code 5375, 13460; BerriAI/litellm 17632"),
    Rule(prefill, "documents: migration to 4.6; junjiem/dify-plugin-agent-mcp_sse 118"),
    Rule(thinking_types, "documents: thinking, troubleshooting thinking"),
    Rule(thinking_budget, "documents: extended thinking"),
    Rule(thinking_and_forced_tools, "mastra-ai/mastra 7507; pydantic/pydantic-ai 7283 of adaptive"),
    Rule(thinking_and_sampling, "documents: extended thinking"),
    Rule(thinking_in_a_loop, "documents: extended thinking"),
    Rule(thinking_signatures, "documents: troubleshooting thinking"),
    Rule(sampling, "documents: migration to 4.7; Vali-98/ChatterUI 564 of both at once"),
    Rule(efforts, "documents: effort; anthropics/claude-code 76689"),
    Rule(images, "anthropics/claude-code 3073, 13131; documents: vision"),
    Rule(documents, "documents: PDF support"),
    Rule(breakpoints, "tghamm/Anthropic.SDK 50; documents: prompt caching"),
)


def violation(body: Body, headers: Mapping[str, str]) -> Optional[str]:
    """Return why the API would refuse a request, None if nothing is known against it.

    Names of headers are in lower case."""
    for complaint in field_types(body):
        return complaint
    request = Request(body, headers)
    return next((complaint for rule in RULES for complaint in rule.check(request)), None)
