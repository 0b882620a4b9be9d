"""Answers in parts: the Markdown of models, cut and written as each platform wants it."""

from __future__ import annotations

import random
import re
import time
from typing import Any

import pytest

from channel_tools import FakeTools, channels
from depth import by_depth

#: What a channel needs to be made; it is not used.
SETTINGS = {"botToken": "1:a", "token": "t", "appId": "1", "clientSecret": "s", "clientId": "c"}
each_row = pytest.mark.parametrize("row", channels.ROWS, ids=lambda row: row.id)
PIECES = (
    "word ", "a sentence that ends. ", "\u4f60\u597d\u3002", "\U0001f600", "e\u0301", "\n", "\n\n",
    "**bold** ", "_it_ ", "`code` ", "[label](https://example.com/a_b(c)) ", "https://a.b/c?d=e&f ",
    "[key](http://[host]:80/x) ",
    "# heading\n", "- item\n", "> quoted\n", "<&>", "snake_case_name ", "* ", "~~x~~ ",
    "\n```python\nif a < b:\n    pass\n```\n", "\n~~~\nraw\n~~~\n",
    "\n| a | b |\n|---|---|\n| 1 | 2 |\n",
    "\n```a-very-long-language-name-that-no-one-repeats\nx\n```\n", "x" * 90,
)


def generated(chance: random.Random) -> str:
    """A text such as models write, and some that they do not."""
    return "".join(chance.choice(PIECES) for _ in range(chance.randint(1, 150))).strip()


def bare(text: str) -> str:
    """A text without fences and white space, which a cut may add or take away."""
    return re.sub(r"\s", "", re.sub(r"(?m)^(`{3,}|~{3,}).*$", "", text))


def fences(text: str) -> int:
    """How many lines of a text open or close a fence."""
    return len(re.findall(r"(?m)^(?:`{3,}|~{3,})", text))


def measured(row: Any, limit: int) -> Any:
    """What tells whether a part fits into a message of this size."""
    channel = row.make(FakeTools(**SETTINGS), None)
    return lambda text: channel.length(channel.render(text)) <= limit


@each_row
def test_every_part_fits_after_it_was_rendered_and_nothing_is_lost(row: Any) -> None:
    chance = random.Random(11)
    fits = measured(row, 300)
    for _ in range(by_depth(10, 40, 200)):
        text = generated(chance)
        parts = channels.split_markdown(text, fits)
        assert all(map(fits, parts)) and all(part.strip() for part in parts)
        assert bare("\n".join(parts)) == bare(text)
        assert all(fences(part) % 2 == 0 for part in parts[:-1])


@each_row
def test_a_short_text_is_one_part_as_it_is(row: Any) -> None:
    text = "One.\n\n```py\nx = 1\n```"
    assert channels.split_markdown(text, measured(row, row.limit)) == [text]


def test_a_fence_that_is_cut_is_closed_and_opened_again() -> None:
    text = "```python\n" + "\n".join(f"line {number}" for number in range(30)) + "\n```\nend"
    parts = channels.split_markdown(text, lambda part: len(part) <= 100)
    assert len(parts) > 2
    assert all(part.startswith("```python\n") and "\n```" in part for part in parts)


@pytest.mark.parametrize(("text", "first"), [
    ("a" * 70 + ". " + "b" * 70, "a" * 70 + ". "), ("a" * 70 + "\n\n" + "b. c " * 20, "a" * 70),
    ("\u4f60" * 70 + "\u3002" + "\u597d" * 70, "\u4f60" * 70 + "\u3002"),
    ("a" * 70 + " " + "b" * 70, "a" * 70 + " "), ("x" * 200, "x" * 100),
])
def test_a_text_is_cut_at_the_best_place(text: str, first: str) -> None:
    assert channels.split_markdown(text, lambda part: len(part) <= 100)[0] == first


def test_a_letter_that_is_two_units_is_not_torn() -> None:
    telegram = channels.Telegram.row.make(FakeTools(**SETTINGS), None)
    for lead in range(4):
        text = "a" * lead + "\U0001f600" * 4000
        parts = channels.split_markdown(
            text, lambda part: telegram.length(telegram.render(part)) <= 4096)
        assert "".join(parts) == text and telegram.length(parts[0]) in (4095, 4096)


@pytest.mark.parametrize("mark", ["\u0301", "\u200d\U0001f525", "\ufe0f"])
def test_a_mark_stays_with_its_letter(mark: str) -> None:
    parts = channels.split_markdown("x" * 99 + f"e{mark}" + "y" * 50, lambda part: len(part) <= 100)
    assert not any(part.startswith(mark[0]) for part in parts)


@pytest.mark.parametrize("text", [
    "```\nhttps://example.com/" + "a" * 900 + "\n```\nend", "e" + "\u0301" * 900, "`" * 900,
    "~" * 900 + "\ntext", "```python\n[label](https://a.b/" + "c" * 900 + ")",
    "> " * 450, "| " * 450 + "\n|-|\n",
])
@each_row
def test_a_text_comes_to_its_end_in_few_parts_whatever_it_is(row: Any, text: str) -> None:
    parts, fits = channels.split_markdown(text, measured(row, 300)), measured(row, 300)
    assert all(map(fits, parts)) and len(parts) < 20
    assert bare("".join(parts)) == bare(text)


@pytest.mark.parametrize("piece", ["[", "[a]("])
def test_a_line_whose_elements_never_end_takes_no_long_time(piece: str) -> None:
    began_s = time.process_time()
    channels.render(piece * 50_000, channels.TELEGRAM_HTML)
    assert time.process_time() - began_s < 8


def test_a_link_is_not_torn() -> None:
    link = "[the label](https://example.com/" + "p" * 40 + ")"
    parts = channels.split_markdown(f"{'w ' * 30}{link} {'w ' * 60}", lambda part: len(part) <= 110)
    assert any(link in part for part in parts)


NARROW = "| Name | Value |\n|:---|---:|\n| a | **1** |\n| b |  |\n"
WIDE = "a|b|c|d|e\n-|-|-|-|-\n1|2|3|4|5555\n"


def test_a_narrow_table_becomes_lines_and_a_wide_one_is_aligned() -> None:
    assert channels.render(NARROW, channels.Markup()) == (
        "Name: a\nValue: **1**\n\nName: b\n")
    assert channels.render(WIDE, channels.Markup()) == (
        "```\na  b  c  d  e\n1  2  3  4  5555\n```\n")


@pytest.mark.parametrize(("markdown", "plain"), [
    ("**a** _b_ `c` ~~d~~", "a b c d"), ("[x](https://y.z)", "x (https://y.z)"),
    ("![](https://y.z/p.png)", "https://y.z/p.png"), ("## T ##", "T"),
    ("```py\na*b*c\n```", "a*b*c"),
    ("snake_case_name 2*3*4", "snake_case_name 2*3*4"), ("> a\n> **b**", "> a\n> b"),
    ("https://a.b/c_d_e", "https://a.b/c_d_e"),
])
def test_a_text_without_markup_says_the_same(markdown: str, plain: str) -> None:
    assert channels.render(markdown, channels.PLAIN) == plain
