"""How tests ask a running server: chat requests in short, checks of what came back, and a
client that speaks HTTP by hand."""
from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import select
import shlex
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from support import Reply, Server, Stream, all_processes, eventually

Json = Any
Found = TypeVar("Found")

CHAT = "/v1/chat/completions"
#: For a server on which every process that there is works on an answer.
BARE = {"OCP_WARM_PROCESSES": "0", "OCP_PARKED_PROCESSES": "0"}
#: A turn has to be over within a second; the rest is for a busy machine.
SOON_S = 10.0
#: The fields of an error in the OpenAI shape, all of them always there.
ERROR_FIELDS = {"message", "type", "param", "code"}


# ---------------------------------------------------------------------------
# Chat
# ---------------------------------------------------------------------------

def question(text: Json = "hi", **fields: Json) -> dict[str, Json]:
    """The body of a chat request with one message."""
    return {"model": "sonnet", "messages": [{"role": "user", "content": text}], **fields}


def encoded(value: Json) -> bytes:
    return json.dumps(value).encode()


def ask(server: Server, text: Json = "hi", **fields: Json) -> Reply:
    """A chat request and its complete answer, streamed if the fields say so."""
    return server.call("POST", CHAT, question(text, **fields))


def told(server: Server, text: Json = "hi", **fields: Json) -> Stream:
    """A chat request whose answer is read as it comes; to be used in a `with`."""
    return server.stream(CHAT, question(text, **fields))


def chunks(events: Iterable[tuple[str, Json]]) -> list[Json]:
    """The chunks of a streamed answer; errors and [DONE] are none."""
    return [data for _, data in events if isinstance(data, dict) and "choices" in data]


def pieces(events: Iterable[tuple[str, Json]], field: str = "content") -> list[str]:
    """What the chunks say, piece by piece."""
    deltas = [choice["delta"] for chunk in chunks(events) for choice in chunk["choices"]]
    return [delta[field] for delta in deltas if delta.get(field)]


def finish_reasons(events: Iterable[tuple[str, Json]]) -> list[str]:
    choices = [choice for chunk in chunks(events) for choice in chunk["choices"]]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


def content_of(reply: Reply) -> str:
    """The text of a whole answer."""
    assert reply.status == 200, reply
    return str(reply.json()["choices"][0]["message"]["content"])


def error_of(reply: Reply) -> dict[str, Json]:
    """The error in a reply, which has to have the OpenAI shape."""
    assert reply.status >= 400, reply
    assert reply.headers["Content-Type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"} and set(body["error"]) == ERROR_FIELDS, body
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    return dict(body["error"])


def broken_stream(events: list[tuple[str, Json]]) -> dict[str, Json]:
    """The error that ends a stream; nothing in the stream may look like a success."""
    assert finish_reasons(events) == []
    assert "[DONE]" not in [data for _, data in events]
    error: dict[str, Json] = events[-1][1]["error"]
    assert set(error) == ERROR_FIELDS
    return error


# ---------------------------------------------------------------------------
# The state of a server
# ---------------------------------------------------------------------------

def health(server: Server) -> dict[str, Json]:
    found: dict[str, Json] = server.call("GET", "/health").json()
    return found


def running(server: Server) -> int:
    return int(health(server)["concurrency"]["inflight"])


def waiting(server: Server) -> int:
    return int(health(server)["concurrency"]["queued"])


def at_rest(server: Server) -> bool:
    """Whether nobody runs or waits."""
    return running(server) == 0 and waiting(server) == 0


def spares(server: Server) -> dict[str, int]:
    return dict(health(server)["spares"])


def asked_process(server: Server, number: int = 1) -> int:
    """The pid of the claude that got this question, counted from 1; waits for it."""
    return int(eventually(lambda: server.queries()[number - 1:number])[0]["pid"])


def is_gone(pid: int) -> bool:
    """Whether there is no such process, not even as a zombie."""
    return not os.path.exists(f"/proc/{pid}")


def is_dead(pid: int) -> bool:
    """Whether a process runs no more. Whoever inherited it may have left it as a zombie."""
    return pid not in [each.pid for each in all_processes() if not each.is_zombie]


def cpu_s(pid: int) -> float:
    """The processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stays(measure: Callable[[], Found], seconds: float) -> Found:
    """A value that has not changed for so long; waits for that."""
    seen = [(time.monotonic(), measure())]

    def unchanged() -> bool:
        now_s, value = time.monotonic(), measure()
        if value != seen[-1][1]:
            seen.append((now_s, value))
        return now_s - seen[-1][0] > seconds

    eventually(unchanged, timeout_s=seconds + 25)
    return seen[-1][1]


def last_entry(server: Server, name: str) -> dict[str, Json]:
    """The newest log entry of this name; waits for one."""
    return eventually(lambda: server.log_entries(name))[-1]


def at_once(jobs: Iterable[Callable[[], Found]]) -> list[Found]:
    """The results of all jobs, which run at the same time."""
    todo = list(jobs)
    with ThreadPoolExecutor(len(todo)) as pool:
        futures = [pool.submit(job) for job in todo]
        return [future.result() for future in futures]


# ---------------------------------------------------------------------------
# A quick claude
# ---------------------------------------------------------------------------

_PLAYER = """#!/bin/sh
[ "$1" = --version ] && echo 2.1.329 && exit
cd {folder}
while read -r line; do
    case "$line" in *'"type":"user"'*) ;; *) continue ;; esac
    cat said
    echo $$ >> asked
    . ./then
done
"""


class Player:
    """A claude in a few lines of shell, which start faster than Python: for hundreds of answers.

    To every question it prints the same bytes, notes that it was asked, and then does something.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "player"
        self._folder.mkdir(parents=True)
        #: For running_server().
        self.program = self._folder / "claude"
        self.program.write_text(_PLAYER.format(folder=shlex.quote(str(self._folder))))
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


# ---------------------------------------------------------------------------
# HTTP by hand
# ---------------------------------------------------------------------------

def head(
    method: str = "POST", path: str = CHAT, *lines: str, version: str = "HTTP/1.1"
) -> bytes:
    """The head of a request; `lines` are header lines besides Host."""
    text = "\r\n".join([f"{method} {path} {version}", "Host: localhost", *lines, "", ""])
    return text.encode("latin-1")


def post(body: bytes, *lines: str, path: str = CHAT, version: str = "HTTP/1.1") -> bytes:
    """A POST with a Content-Length."""
    sized = f"Content-Length: {len(body)}"
    return head("POST", path, sized, *lines, version=version) + body


def chunked(*parts: bytes, trailer: bytes = b"") -> bytes:
    """A chunked body."""
    framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return framed + b"0\r\n" + trailer + b"\r\n"


class Wire:
    """A connection on which every byte is the test's own; to be used in a `with`."""

    def __init__(self, port: int, timeout_s: float = 30) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self._file: io.BufferedReader = self.socket.makefile("rb")
        #: What was heard by hear().
        self.said = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *error: object) -> None:
        self.hang_up()

    def hang_up(self) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Sends; a server that closes meanwhile has answered already."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def dribble(self, data: bytes, pause_s: float) -> None:
        """Sends byte by byte, with pauses, until the server says something."""
        for at in range(len(data)):
            self.send(data[at:at + 1])
            if select.select([self.socket], [], [], pause_s)[0]:
                return

    def hear(self, words: bytes, times: int = 1) -> None:
        """Reads on until these words have been said so often; to be used instead of replies."""
        while self.said.count(words) < times:
            piece = self.socket.recv(1 << 16)
            assert piece, self.said[-1000:]
            self.said += piece

    def end_sending(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def status_line(self) -> str:
        return self._file.readline().decode("latin-1").strip()

    def reply(self, *, bodyless: bool = False) -> Reply:
        """The next answer; "100 Continue" is one too. `bodyless` = it answers a HEAD."""
        status = int(self.status_line().split()[1])
        headers = http.client.parse_headers(self._file)
        has_body = not bodyless and status >= 200 and status != 204
        return Reply(status, headers, self._body(headers) if has_body else b"")

    def _body(self, headers: http.client.HTTPMessage) -> bytes:
        if headers["Transfer-Encoding"] == "chunked":
            return self._chunks()
        length = headers["Content-Length"]
        return self._file.read() if length is None else self._file.read(int(length))

    def _chunks(self) -> bytes:
        """A chunked body. Raises ValueError when it is cut off."""
        body = b""
        while True:
            size = int(self._file.readline(), 16)
            body += self._file.read(size)
            assert self._file.readline() == b"\r\n"
            if not size:
                return body

    def is_closed(self, timeout_s: float = 25) -> bool:
        """Whether the server closes now, without another word."""
        self.socket.settimeout(timeout_s)
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True
        except socket.timeout:
            return False


def exchanged(server: Server, request: bytes) -> Reply:
    """The first answer to these bytes, on a connection of its own."""
    with Wire(server.port) as wire:
        wire.send(request)
        return wire.reply()


def seconds_of(job: Callable[[], object]) -> float:
    """How long it takes."""
    started_s = time.monotonic()
    job()
    return time.monotonic() - started_s
