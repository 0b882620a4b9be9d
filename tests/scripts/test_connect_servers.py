"""ocp_connect.py against a server that is wrong or hostile: one sentence, and nothing written."""
from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Union

import pytest

from processes import Ran
from project import load_script

connect = load_script("ocp_connect")
Json = Any
#: What is answered on a path: bytes, or a function that sends them.
Answer = Union[bytes, Callable[[socket.socket], None]]


def http(body: Json, status: str = "200 OK", *lines: str) -> bytes:
    """An answer that ends with its connection; a body that is not bytes is sent as JSON."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return "\r\n".join([f"HTTP/1.0 {status}", *lines, "", ""]).encode() + text


HEALTH = {"authMode": "none", "version": "1.2.3"}
MODEL = {"id": "claude-x", "display_name": "Claude X", "context_window": 1000,
         "max_output_tokens": 100}


def listing(*rows: Json) -> bytes:
    return http({"data": list(rows)})


def good(**others: Answer) -> dict[str, Answer]:
    """A server that is right, but for what is named."""
    answers: dict[str, Answer] = {
        "health": http(HEALTH), "models": listing(MODEL),
        "completions": http({"choices": [{"message": {"content": "OK"}}]})}
    return {**answers, **others}


@contextlib.contextmanager
def served(answers: Mapping[str, Answer]) -> Iterator[int]:
    """A port where each path, by its last word, has such an answer."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(30)
            path = client.recv(65_536).split(b" ", 2)[1].decode()
            found = answers[path.rpartition("/")[2]]
            if isinstance(found, bytes):
                client.sendall(found)
                # What is left unread of the request would reset the connection.
                client.shutdown(socket.SHUT_WR)
                while client.recv(65_536):
                    pass
            else:
                found(client)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        # Closing alone would not wake the thread that waits in accept().
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def run(
    home: Path, capsys: pytest.CaptureFixture[str], answers: Mapping[str, Answer], *args: str,
    **environ: str,
) -> Ran:
    """What a run against such a server ends with."""
    environ = {"PATH": "/usr/bin:/bin", "SHELL": "/bin/bash", "HOME": str(home), **environ}
    machine = connect.Machine(str(home), environ, "linux", False)
    error = ""
    with served(answers) as port:
        try:
            code = int(connect.program(
                [f"127.0.0.1:{port}", "--only", "aider,continue,opencode", "--yes", *args],
                machine, connect.Terminal("/nowhere")))
        except connect.Problem as problem:
            code, error = int(problem.code), str(problem)
    said = capsys.readouterr()
    return Ran(code, said.out, said.err + error)


def is_one_sentence(text: str) -> bool:
    return text.isprintable() and 20 < len(text) < 500 and text.endswith((".", "?"))


def nested(depth: int) -> bytes:
    return b"[" * depth


DEEP, HTML = nested(200_000), b"<!DOCTYPE html>\n<html><body>Hello</body></html>"
LONG = http(b'{"data": [' + b"1," * 4_500_000)
ELSEWHERE = http(b"", "302 Found", "Location: http://192.0.2.1/")

NO_OCP = {
    "html": http(HTML, "200 OK", "Content-Type: text/html"),
    "html with an error": http(HTML, "404 Not Found"),
    "a redirect": ELSEWHERE, "deep JSON": http(DEEP), "too long": LONG,
    "a deep error": http(DEEP, "500 Oops"),
    "a long error": http(b"x" * 9_000_000, "500 Oops"),
    "a number": http(3), "another JSON": http({"status": "ok"}), "not text": http(b"\xff\x00\xfe"),
    "an unknown mode": http({**HEALTH, "authMode": ["none"]}),
    "no version": http({**HEALTH, "version": 3}),
    "a number of a million digits": http(b"9" * 1_000_000),
}


@pytest.mark.parametrize("name", sorted(NO_OCP))
def test_what_is_no_ocp_server_is_one_sentence_and_nothing_is_written(
    free_home: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    ran = run(free_home, capsys, good(health=NO_OCP[name]))

    assert ran.code == 3 and "is not an OCP server (" in ran.stderr, ran
    assert is_one_sentence(ran.stderr) and ran.stdout == "" and not list(free_home.iterdir())


def window(text: bytes) -> bytes:
    return http(b'{"data": [{"id": "claude-x", "context_window": ' + text + b"}]}")


NO_MODELS = {
    "data that is a number": (http({"data": 3}), "it lists no models"),
    "data that is an object": (http({"data": {"a": 1}}), "it lists no models"),
    "no object": (http([1, 2]), "it lists no models"),
    "rows that are no objects": (listing(1, "x", None, []), "it lists no models"),
    "names with control characters": (
        listing({"id": "a\x1b[2J"}, {"id": "b\n"}, {"id": "\u202ec"}, {"id": "{env:HOME}"},
                {"id": "x" * 200}, {"id": ["a"]}), "it lists no models"),
    "a window without an end": (window(b"Infinity"), "context_window of claude-x is Infinity"),
    "a window of 1e999": (window(b"1e999"), "context_window of claude-x is Infinity"),
    "a window of no number": (window(b"NaN"), "context_window of claude-x is NaN"),
    "a window that is huge": (window(b"9" * 18), "is 999999999999999999, which is not a number"),
    "a window that is very huge": (window(b"9" * 500_000), "is Infinity, which is not a number"),
    "a window below nothing": (window(b"-5"), "context_window of claude-x is -5"),
    "a window of nothing": (window(b"0"), "context_window of claude-x is 0"),
    "a window in words": (window(b'"many\\u001b"'), 'context_window of claude-x is "many'),
    "a window that is true": (window(b"true"), "context_window of claude-x is true"),
    "an answer that is a list": (window(b"[1]"), "context_window of claude-x is [1]"),
    "too many models": (
        listing(*({"id": f"m{number}"} for number in range(10_000))), "more than 500 models"),
    "deep JSON": (http(DEEP), "nested too deeply"),
    "html": (http(HTML), "the answer is not JSON"),
    "a redirect": (ELSEWHERE, "redirects to another address (302)"),
    "too long": (LONG, "longer than 8 MB"),
    "an error of html": (http(HTML, "500 Oops"), "the status is 500"),
    "an error with commands": (
        http({"error": {"message": "\x1b[2Jhi\n\u202e" + "x" * 9_000}}, "500 Oops"), "?[2Jhi"),
}


@pytest.mark.parametrize("name", sorted(NO_MODELS))
def test_a_list_of_models_that_is_none_is_one_sentence_and_nothing_is_written(
    free_home: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    answer, said = NO_MODELS[name]

    ran = run(free_home, capsys, good(models=answer))

    assert ran.code == 1 and said in ran.stderr, ran
    assert "does not list its models as OCP does: " in ran.stderr and is_one_sentence(ran.stderr)
    assert not list(free_home.iterdir())


def endless_body(client: socket.socket) -> None:
    client.sendall(http(b'["'))
    while True:
        client.sendall(b"x" * 100_000)


def endless_error(client: socket.socket) -> None:
    client.sendall(http(b"", "500 Oops"))
    while True:
        client.sendall(b"x" * 100_000)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def endless_chunk(client: socket.socket) -> None:
    client.sendall(CHUNKED + b"-1\r\n")
    while True:
        client.sendall(b"x" * 100_000)


@pytest.mark.parametrize("path", ["health", "models"])
@pytest.mark.parametrize("answer", [endless_body, endless_error, endless_chunk])
def test_a_body_without_an_end_is_read_up_to_a_limit(
    free_home: Path, capsys: pytest.CaptureFixture[str], path: str, answer: Answer
) -> None:
    ran = run(free_home, capsys, good(**{path: answer}))

    assert ran.code in (1, 3) and "the answer is longer than 8 MB" in ran.stderr
    assert is_one_sentence(ran.stderr) and not list(free_home.iterdir())


@pytest.mark.parametrize("answer", [
    b"", b"\x00", b"SSH-2.0-x\r\n", b"HTTP/1.1 99999 x\r\n\r\n", b"HTTP/1.1 200 OK\r\n" * 300,
    b"HTTP/1.1 200 OK\r\na: " + b"b" * 70_000, b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5_000 + b"\r\n\r\n{}",
    CHUNKED + b"-5\r\nabc", CHUNKED + b"zz\r\nabc", CHUNKED + b"5" * 70_000,
    CHUNKED + b"ffffffffffffffffffff\r\nabc", CHUNKED + b"5\r\nab",
])
@pytest.mark.parametrize("path", ["health", "models"])
def test_broken_http_is_one_sentence_and_nothing_is_written(
    free_home: Path, capsys: pytest.CaptureFixture[str], path: str, answer: Answer
) -> None:
    ran = run(free_home, capsys, good(**{path: answer}))

    assert ran.code in (1, 3) and is_one_sentence(ran.stderr), ran
    assert not list(free_home.iterdir())


def dripping(start: bytes, drop: bytes) -> Answer:
    """What sends a beginning, and then a little again and again, each time within any timeout."""
    def send(client: socket.socket) -> None:
        client.sendall(start)
        while True:
            time.sleep(0.02)
            client.sendall(drop)

    return send


DRIPS = {
    "nothing": dripping(b"", b""), "a status line": dripping(b"HTTP/1.0 200 O", b"K"),
    "headers": dripping(b"HTTP/1.0 200 OK\r\n", b"a: b\r\n"),
    "a body": dripping(http(b""), b" "), "an error": dripping(http(b"", "500 Oops"), b" "),
    "goes on": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunks": dripping(CHUNKED, b"1\r\n \r\n"),
}


@pytest.mark.parametrize("name", sorted(DRIPS))
@pytest.mark.parametrize("path", ["health", "models"])
def test_one_deadline_ends_an_answer_that_drips(
    free_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    name: str, path: str,
) -> None:
    # A hundred headers, after which http.client gives up by itself, would take longer.
    monkeypatch.setattr(connect, "FETCH_TIMEOUT_S", 1.0)

    ran = run(free_home, capsys, good(**{path: DRIPS[name]}))

    assert ran.code in (1, 3) and is_one_sentence(ran.stderr), ran
    assert "no complete answer came within 1 s" in ran.stderr
    assert not list(free_home.iterdir())


@pytest.mark.parametrize("answer, said", [
    (dripping(http(b""), b" "), "no complete answer came within 1 s"),
    (endless_body, "the answer is longer than 8 MB"),
    (http(DEEP), "the answer is nested too deeply"), (http(HTML), "the answer is not JSON"),
    (http({"choices": 3}), "the answer is not a chat completion"), (b"", "Remote end closed"),
])
def test_a_trial_answer_that_is_wrong_is_said_after_the_files_are_written(
    free_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    answer: Answer, said: str,
) -> None:
    if "within 1 s" in said:
        monkeypatch.setattr(connect, "TRIAL_TIMEOUT_S", 1.0)

    ran = run(free_home, capsys, good(completions=answer))

    assert ran.code == 1 and f"claude-x does not answer: {said}" in ran.stdout, ran
    assert (free_home / ".aider.conf.yml").exists()


BAD_KEYS = ["${{secrets.X}}", "{env:HOME}", "{file:/etc/passwd}", "a b", "a\nb", "\x1b[2J", "a'b",
            "$HOME", "`id`", "k\u00e9y", "x" * 1_001, ["a"], 5, {"a": 1}]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_an_advertised_key_with_other_characters_is_refused(
    free_home: Path, capsys: pytest.CaptureFixture[str], key: Json
) -> None:
    ran = run(free_home, capsys, good(health=http({**HEALTH, "anonymousKey": key})))

    assert ran.code == 1 and "characters that no key may have" in ran.stderr, ran
    assert is_one_sentence(ran.stderr.partition("written. ")[0] + ".")
    assert not list(free_home.iterdir())


@pytest.mark.parametrize("key", [key for key in BAD_KEYS if isinstance(key, str)])
@pytest.mark.parametrize("source", ["--key", "OCP_CONNECT_KEY"])
def test_a_given_key_with_other_characters_is_wrong_usage(
    free_home: Path, capsys: pytest.CaptureFixture[str], key: str, source: str
) -> None:
    if source == "--key":
        ran = run(free_home, capsys, good(), "--key", key)
    else:
        ran = run(free_home, capsys, good(), OCP_CONNECT_KEY=key)

    assert ran.code == 2 and ran.stderr.startswith(f"{source} is empty or has characters"), ran
    assert not list(free_home.iterdir())


def test_a_key_of_every_character_that_is_allowed_is_taken(
    free_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "aZ09._~+/=-"

    ran = run(free_home, capsys, good(), "--key", key)

    assert ran.code == 0 and (free_home / ".config/ocp/key").read_text() == key, ran


def test_names_of_models_command_neither_terminals_nor_tools(
    free_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["{file:~/.ssh/id}", "${{secrets.X}}", "\x1b[2J\x9b", "a\u202eb\u2066", "a\nb: c",
             "\ud800", "n" * 5_000, 7, {"a": 1}]
    rows = [{"id": f"m{number}", "display_name": name, "efforts": ["low", "{env:X}", 3, "a\n"]}
            for number, name in enumerate(names)]

    ran = run(free_home, capsys, good(models=listing(*rows, rows[0])))

    assert ran.code == 0, ran
    config = (free_home / ".config/opencode/opencode.json").read_text("utf-8")
    texts = config + (free_home / ".continue/config.yaml").read_text("utf-8") + ran.stdout
    assert "{file:" not in texts and "${{" not in texts and "n" * 101 not in texts
    assert texts.replace("\n", "").isprintable()
    assert len(json.loads(config)["provider"]["ocp"]["models"]) == len(names)


def test_what_health_says_is_shown_on_one_line_of_limited_length(
    free_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "\x1b[2J\n" + "x" * 100_000
    health = http({**HEALTH, "version": words, "status": words, "fix": [words]})

    ran = run(free_home, capsys, good(health=health))

    assert ran.code == 0 and max(map(len, ran.stdout.splitlines())) < 700, ran
    assert ran.stdout.replace("\n", "").isprintable()


def test_the_limit_of_time_leaves_no_alarm_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(connect.OutOfTime), connect.time_limit(0.01):
        time.sleep(20)
    with connect.time_limit(50):
        pass

    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
