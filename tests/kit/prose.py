"""Wraps the prose of Markdown pages: paragraphs and list items, nothing else."""
from __future__ import annotations

import re

WIDTH = 118
#: A word that would begin something else at the start of a line.
_BEGINS_A_BLOCK = re.compile(r"[-+*>]$|[#|>]|\d+[.)]$|<!--")
#: Code and links, which stay in one line, so that they can be copied.
_WHOLE = re.compile(r"`[^`]+`|\[[^\]]*\]\([^)]*\)")
_ITEM = re.compile(r"(\s*)([-*]|\d+\.) (.*)")


def _words(text: str) -> list[str]:
    """Return what may not be broken."""
    joined = _WHOLE.sub(lambda found: found[0].replace(" ", "\0"), text).split()
    return [word.replace("\0", " ") for word in joined]


def _wrapped_paragraph(words: list[str], first: str, rest: str) -> list[str]:
    lines, line = [], first
    for word in _words(" ".join(words)):
        is_empty = line in (first, rest)
        if not is_empty and len(line) + 1 + len(word) > WIDTH and not _BEGINS_A_BLOCK.match(word):
            lines.append(line)
            line, is_empty = rest, True
        line += word if is_empty else f" {word}"
    return [*lines, line]


def wrapped(text: str) -> str:
    """Return the page `text` with its prose wrapped at WIDTH. Code, tables, headings, pictures and
    HTML stay as they are."""
    lines: list[str] = []
    words: list[str] = []
    first = rest = ""
    is_code = False

    def end_paragraph() -> None:
        if words:
            lines.extend(_wrapped_paragraph(words, first, rest))
            words.clear()

    for line in text.splitlines():
        item = _ITEM.fullmatch(line)
        is_fence = line.lstrip().startswith("```")
        if is_fence or is_code or not line.strip() or re.match(r"\s*([|#<]|!\[)", line) or (
                line.startswith("    ") and not words):
            end_paragraph()
            lines.append(line)
            is_code ^= is_fence
        elif item:
            end_paragraph()
            first = f"{item[1]}{item[2]} "
            rest = " " * len(first)
            words.extend(item[3].split())
        else:
            if not words:
                first = rest = line[:len(line) - len(line.lstrip())]
            words.extend(line.split())
    end_paragraph()
    return "\n".join(lines) + "\n"
