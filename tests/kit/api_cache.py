"""The prompt cache of the Anthropic API, as its documentation describes it ("Prompt caching").

    cache = PromptCache()
    usage = cache.take(body)                  # what the API would report for this request
    reply = text("Paris.")._replace(**usage._asdict())

An entry is the digest of everything up to a block with `cache_control`: tools, then system, then
messages. Only such blocks are written. A request looks for entries from each of its own marked
blocks back, 20 blocks at most, and reads up to the last one that it finds. An entry lives for 5
minutes or an hour after its last use. A prompt that is too short is not cached.

Tokens are counted as characters of a block's canonical JSON, divided by four. Entries can be read
at once; the API's can be when the first response begins. How many marks there may be, and in which
order, is a rule of api_rules.py. Left out: automatic caching, switching citations or web search,
and that older models drop earlier thinking.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

from api_rules import as_blocks

Json = Any
Body = Mapping[str, Json]

#: How far one marked block looks back, itself included.
LOOK_BACK_BLOCKS = 20
LIFETIMES_S = {"5m": 300.0, "1h": 3_600.0}
#: The shortest prompt that is cached, in tokens. Beginnings of ids; the first row that fits wins.
#: Where the documentation gives two numbers, the larger one.
SHORTEST_TOKENS: Sequence[tuple[str, int]] = (
    ("claude-haiku-4-5", 4_096), ("claude-opus-4-5", 4_096), ("claude-opus-4-6", 4_096),
    ("claude-opus-4-7", 4_096), ("claude-sonnet-4-6", 2_048), ("", 1_024))
#: Of claude's own making, another one in each request, and no part of the prompt.
_BILLING = "x-anthropic-billing-header:"


class Usage(NamedTuple):
    """The tokens of one prompt, under the names of stub_api.Reply."""
    #: Behind the last marked block.
    input_tokens: int = 0
    cache_read: int = 0
    cache_creation: int = 0

    @property
    def prompt_tokens(self) -> int:
        """All of them."""
        return self.input_tokens + self.cache_read + self.cache_creation

    @property
    def fresh_tokens(self) -> int:
        """Those that the API had to read anew."""
        return self.input_tokens + self.cache_creation


class Piece(NamedTuple):
    """A block of the prompt; or parameters that later blocks depend on, which have no tokens."""
    #: Where it stands in the body.
    path: str
    #: Canonical JSON, with the role in front.
    text: str
    tokens: int
    #: How long an entry that ends here lives; 0 = the block is not marked.
    lifetime_s: float = 0.0


def _canonical(value: Json) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _without_mark(block: Body) -> dict[str, Json]:
    kept = {name: value for name, value in block.items() if name != "cache_control"}
    if block.get("type") == "tool_result" and isinstance(block.get("content"), list):
        kept["content"] = [_without_mark(inner) for inner in block["content"]]
    return kept


def _piece(path: str, block: Body, role: str = "") -> Piece:
    text = _canonical(_without_mark(block))
    mark = block.get("cache_control")
    lifetime_s = LIFETIMES_S[mark.get("ttl", "5m")] if mark else 0.0
    return Piece(path, f"{role}{text}", -(-len(text) // 4), lifetime_s)


def _parameters(path: str, values: Mapping[str, Json]) -> Piece:
    return Piece(path, _canonical(values), 0)


def pieces_of(body: Body) -> list[Piece]:
    """Return the prompt in the order in which the API reads it."""
    messages = [
        (f"messages.{number}.content.{index}", block, f"{message['role']}: ")
        for number, message in enumerate(body["messages"])
        for index, block in enumerate(as_blocks(message["content"]))]
    has_images = any(block["type"] == "image" for _, block, _ in messages)
    return [
        _parameters("model", {"model": body.get("model")}),
        *(_piece(f"tools.{number}", tool) for number, tool in enumerate(body.get("tools") or ())),
        _parameters("speed", {"speed": body.get("speed")}),
        *(_piece(f"system.{number}", block)
          for number, block in enumerate(as_blocks(body.get("system")))
          if not block["text"].startswith(_BILLING)),
        _parameters("parameters of the messages", {
            "thinking": body.get("thinking"), "tool_choice": body.get("tool_choice"),
            "images": has_images}),
        *(_piece(*message) for message in messages)]


def common_pieces(pieces: Sequence[Piece], others: Sequence[Piece]) -> int:
    """Return how many pieces two prompts have in common at their beginning."""
    pairs = zip(pieces, others)
    return next((at for at, (one, other) in enumerate(pairs) if one.text != other.text),
                min(len(pieces), len(others)))


class _End(NamedTuple):
    """The end of a block, up to which a prompt may be cached."""
    digest: bytes
    #: Of the prompt up to here.
    tokens: int
    lifetime_s: float


def _ends_of(pieces: Sequence[Piece]) -> list[_End]:
    ends, digest, tokens = [], b"", 0
    for piece in pieces:
        digest = hashlib.sha256(digest + piece.text.encode("utf-8", "surrogatepass")).digest()
        tokens += piece.tokens
        if piece.tokens:
            ends.append(_End(digest, tokens, piece.lifetime_s))
    return ends


class _Entry(NamedTuple):
    lifetime_s: float
    expires_s: float


class PromptCache:
    """The cache of one organization. All methods may be called from any thread.

    shortest_tokens     the shortest prompt that is cached; None takes the model's"""

    def __init__(self, shortest_tokens: Optional[int] = None) -> None:
        self._shortest_tokens = shortest_tokens
        #: Guards the two fields below.
        self._lock = threading.Lock()
        self._now_s = 0.0
        self._entries: dict[bytes, _Entry] = {}

    def pass_time(self, seconds: float) -> None:
        """Let entries grow older. No other time passes here."""
        with self._lock:
            self._now_s += seconds

    def take(self, body: Body) -> Usage:
        """Return what a request reads, and write what it marks."""
        ends = _ends_of(pieces_of(body))
        shortest = self._shortest_of(body)
        marked = [at for at, end in enumerate(ends) if end.lifetime_s and end.tokens >= shortest]
        with self._lock:
            found = self._find(ends, marked)
            if found is not None:
                self._write(ends[found])
            for at in marked:
                self._write(ends[at])
        total = ends[-1].tokens if ends else 0
        cached = ends[marked[-1]].tokens if marked else 0
        read = 0 if found is None else ends[found].tokens
        return Usage(total - cached, read, cached - read)

    def _shortest_of(self, body: Body) -> int:
        if self._shortest_tokens is not None:
            return self._shortest_tokens
        model = str(body.get("model"))
        return next(tokens for start, tokens in SHORTEST_TOKENS if model.startswith(start))

    def _find(self, ends: Sequence[_End], marked: Sequence[int]) -> Optional[int]:
        """Return the last end that has an entry, seen from the marked ones."""
        seen = (at for mark in reversed(marked)
                for at in range(mark, max(-1, mark - LOOK_BACK_BLOCKS), -1))
        return next((at for at in seen if self._is_alive(ends[at])), None)

    def _is_alive(self, end: _End) -> bool:
        entry = self._entries.get(end.digest)
        return entry is not None and self._now_s < entry.expires_s

    def _write(self, end: _End) -> None:
        """Write an entry; one that is there lives on, for the longer of the two lifetimes."""
        lifetime_s = end.lifetime_s
        if self._is_alive(end):
            lifetime_s = max(lifetime_s, self._entries[end.digest].lifetime_s)
        self._entries[end.digest] = _Entry(lifetime_s, self._now_s + lifetime_s)
