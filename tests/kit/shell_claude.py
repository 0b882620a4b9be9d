"""A claude in a few lines of shell, for hundreds of answers."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chat import encoded

Json = Any
_SHELL_CLAUDE = """#!/bin/sh
[ "$1" = --version ] && echo 2.1.329 && exit
cd {folder}
while read -r line; do
    case "$line" in *'"type":"user"'*) ;; *) continue ;; esac
    cat said
    echo $$ >> asked
    . ./then
done
"""


class ShellClaude:
    """A claude in a few lines of shell, which start faster than Python: for hundreds of answers.

    To every question it prints the same bytes, notes that it was asked, and then does something.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "player"
        self._folder.mkdir(parents=True)
        #: For running_server().
        self.program = self._folder / "claude"
        self.program.write_text(_SHELL_CLAUDE.format(folder=shlex.quote(str(self._folder))))
        self.program.chmod(0o755)
        self.play([])

    def play(self, said: Iterable[Json | bytes], then: str = "") -> None:
        """What to print: lines, or bytes as they are. `then` = commands for the shell."""
        parts = [each if isinstance(each, bytes) else encoded(each) + b"\n" for each in said]
        (self._folder / "said").write_bytes(b"".join(parts))
        (self._folder / "then").write_text(then + "\n")

    def asked(self) -> list[int]:
        """The pids of the processes that were asked, and have printed what there was."""
        noted = self._folder / "asked"
        return [int(pid) for pid in noted.read_text().split()] if noted.exists() else []


def lines_of_an_answer(*texts: str) -> list[Json]:
    """What a claude prints for an answer of these deltas, which come third and after."""
    def event(kind: str, **fields: Json) -> Json:
        return {"type": "stream_event", "event": {"type": kind, **fields}}

    usage = {"input_tokens": 10, "output_tokens": 7}
    deltas = [event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
              for text in texts]
    return [
        event("message_start", message={"id": "msg_1", "model": "m", "usage": usage}),
        event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *deltas, event("content_block_stop", index=0),
        event("message_delta", delta={"stop_reason": "end_turn"}, usage=usage),
        event("message_stop"), {"type": "result", "subtype": "success", "is_error": False}]
