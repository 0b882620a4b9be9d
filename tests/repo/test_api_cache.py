"""What the stand-in for the API's prompt cache reads, writes and forgets."""

from __future__ import annotations

from typing import Any, Optional

import pytest

import api_cache
from api_cache import LOOK_BACK_BLOCKS, PromptCache, Usage

Json = Any

MARK = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}
IMAGE = {"type": "image", "cache_control": MARK}


def text(words: str, mark: Optional[dict[str, str]] = None) -> Json:
    return {"type": "text", "text": words, **({"cache_control": mark} if mark else {})}


def asked(*blocks: Json, **fields: Json) -> dict[str, Json]:
    """A request of one user message."""
    return {"model": "claude-sonnet-5", "messages": [{"role": "user", "content": list(blocks)}],
            **fields}


def size(*blocks: Json) -> int:
    """The tokens of these blocks."""
    pieces = api_cache.pieces_of(asked(*blocks))
    return sum(piece.tokens for piece in pieces)


@pytest.fixture
def cache() -> PromptCache:
    return PromptCache(shortest_tokens=0)


def test_a_conversation_that_grows_is_read_up_to_where_the_last_request_ended(
    cache: PromptCache,
) -> None:
    first, second = text("one"), text("another one")

    assert cache.take(asked(text("one", MARK))) == Usage(0, 0, size(first))
    assert cache.take(asked(first, text("another one", MARK))) == Usage(
        0, size(first), size(second))


def test_what_stands_behind_the_last_mark_is_input(cache: PromptCache) -> None:
    body = asked(text("one", MARK), text("another one"))

    assert cache.take(body) == Usage(size(text("another one")), 0, size(text("one")))
    assert cache.take(body).fresh_tokens == size(text("another one"))


def test_nothing_is_written_or_read_without_a_mark(cache: PromptCache) -> None:
    cache.take(asked(text("one"), text("two", MARK)))

    assert cache.take(asked(text("one", MARK))).cache_read == 0
    assert cache.take(asked(text("one"), text("two"))) == Usage(size(text("one"), text("two")))


@pytest.mark.parametrize("added, is_read", [(LOOK_BACK_BLOCKS - 1, True),
                                            (LOOK_BACK_BLOCKS, False)])
def test_a_mark_looks_back_twenty_blocks(cache: PromptCache, added: int, is_read: bool) -> None:
    cache.take(asked(text("start", MARK)))
    more = [text(f"more {number}") for number in range(added - 1)]

    assert bool(cache.take(asked(text("start"), *more, text("end", MARK))).cache_read) is is_read


def test_an_earlier_mark_looks_back_too(cache: PromptCache) -> None:
    cache.take(asked(text("start", MARK)))
    more = [text(f"more {number}") for number in range(LOOK_BACK_BLOCKS)]

    usage = cache.take(asked(text("start", MARK), *more, text("end", MARK)))

    assert usage.cache_read == size(text("start"))


def test_an_entry_lives_for_its_time_after_its_last_use(cache: PromptCache) -> None:
    short, long = asked(text("short", MARK)), asked(text("long", HOUR))
    for body in (short, long):
        cache.take(body)

    for _ in range(2):
        cache.pass_time(299)
        assert cache.take(short).cache_read
    cache.pass_time(300)
    assert not cache.take(short).cache_read
    cache.pass_time(2_000)
    assert cache.take(long).cache_read
    cache.pass_time(3_600)
    assert not cache.take(long).cache_read


@pytest.mark.parametrize("model, shortest", [
    ("claude-sonnet-5-5", 1_024), ("claude-sonnet-4-6", 2_048), ("claude-haiku-4-5", 4_096)])
def test_a_short_prompt_is_not_cached(model: str, shortest: int) -> None:
    cache, empty = PromptCache(), size(text(""))
    long, short = (
        asked(text("x" * 4 * (shortest - empty + more), MARK), model=model) for more in (0, -1))

    assert cache.take(long) == Usage(0, 0, shortest)
    assert [cache.take(short) for _ in range(2)] == [Usage(shortest - 1)] * 2


@pytest.mark.parametrize("change, kept", [
    ({"tools": [{"name": "other"}]}, 0),
    ({"model": "claude-opus-5"}, 0),
    ({"speed": "fast"}, 0),
    ({"system": [text("Be kind.", MARK)]}, 0),
    ({"thinking": {"type": "adaptive"}}, 1),
    ({"tool_choice": {"type": "any"}}, 1),
    ({"messages": [{"role": "assistant", "content": [text("Hi", MARK)]}]}, 1),
    ({"messages": [{"role": "user", "content": [text("Ho", MARK)]}]}, 1),
    ({"messages": [{"role": "user", "content": [text("Hi"), IMAGE]}]}, 1),
    ({"system": [text("x-anthropic-billing-header: 2"), text("Be brief.", HOUR)]}, 2),
    ({"messages": [{"role": "user", "content": [text("Hi", HOUR)]}]}, 2),
    ({"max_tokens": 5}, 2),
])
def test_a_change_spoils_what_comes_after_it(
    cache: PromptCache, change: dict[str, Json], kept: int
) -> None:
    """`kept` of the marked parts, tools with system and the message, are still read."""
    body = asked(
        text("Hi", MARK), tools=[{"name": "one"}],
        system=[text("x-anthropic-billing-header: 1"), text("Be brief.", MARK)])
    whole = cache.take(body).cache_creation

    parts = [0, whole - size(text("Hi")), whole]
    assert cache.take({**body, **change}).cache_read == parts[kept]


def test_a_string_is_a_block_of_text(cache: PromptCache) -> None:
    cache.take(asked(text("one", MARK)))
    body = asked()
    body["messages"] = [{"role": "user", "content": "one"},
                        {"role": "user", "content": [text("two", MARK)]}]

    assert cache.take(body).cache_read == size(text("one"))


def test_prompts_have_pieces_in_common_up_to_the_first_that_differs() -> None:
    one, two = (api_cache.pieces_of(asked(text("same"), text(words))) for words in ("a", "b"))

    assert api_cache.common_pieces(one, two) == len(one) - 1
    assert api_cache.common_pieces(one, one[:2]) == 2
    assert one[-1].path == "messages.0.content.1"
