"""Requests that the operator has written to files: which ones, what of them, and no secrets."""
from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest

from chat import CHAT_PATH, ask, both_ways, error_of, question, stream_chat
from http_client import Reply
from keys import ADMIN_KEY, MULTI, SHARED, SHARED_KEY, as_admin, bearer
from project import REPO, clean_env, load_script
from server import Server, running_server
from waiting import eventually, in_parallel

ocp = load_script("ocp_server.py")

Json = Any


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path) as started:
        yield started


def start(server: Server, **fields: Json) -> Json:
    reply = server.call("POST", "/api/capture", fields)
    assert reply.status == 201, reply.text
    return reply.json()


def report(server: Server) -> Json:
    return server.call("GET", "/api/capture").json()


def files(server: Server) -> list[Path]:
    found = (server.ocp_home / "captures").glob("*/*.txt")
    return sorted(found, key=lambda path: path.stat().st_mtime)


def texts(server: Server) -> str:
    return "".join(path.read_text() for path in files(server))


@both_ways
def test_a_captured_request_is_there_as_it_came_and_as_it_went_to_claude(
    server: Server, stream: bool
) -> None:
    start(server, requests=1)
    body = json.dumps(question("Why is the sky blue?", stream=stream)).encode()
    reply = server.call("POST", f"{CHAT_PATH}?a=b", body, {"X-Own": "seen", "User-Agent": "tool/1"})
    assert reply.status == 200

    (path,) = eventually(lambda: files(server))
    text = path.read_text()
    assert path.name == reply.headers["X-Request-Id"] + ".txt"
    assert text.startswith(f"POST {CHAT_PATH}\na: b\n")
    assert "X-Own: seen\n" in text and "User-Agent: tool/1\n" in text
    assert f"\n\n{body.decode()}\n" in text
    _, *parts = text.split("\n--- ")
    sent = [part for part in parts if part.startswith("to claude")]
    heard = [part for part in parts if part.startswith("from claude")]
    assert any('"subtype":"initialize"' in part for part in sent)
    assert any("Why is the sky blue?" in part for part in sent)
    assert any('"type":"assistant"' in part for part in heard)
    assert not any("content_block_delta" in part for part in heard)
    assert any(part.startswith("answered with status 200") for part in parts)


def test_the_folder_and_the_files_are_their_owners_alone(server: Server) -> None:
    start(server)
    ask(server)
    (path,) = eventually(lambda: files(server))
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (path.parent.parent, path.parent, path)]
    assert modes == [0o700, 0o700, 0o600]
    assert report(server)["captures"] == [{
        "folder": str(path.parent), "files": 1, "bytes": path.stat().st_size,
        "startedAt": report(server)["captures"][0]["startedAt"]}]


def test_it_ends_after_so_many_requests_and_is_loud_meanwhile(server: Server) -> None:
    assert server.call("GET", "/health").json()["capture"] is None
    started = start(server, requests=2, minutes=3)
    assert started["active"] and started["remaining"] == 2
    shown = server.call("GET", "/health").json()["capture"]
    assert {**shown, "endsAt": ""} == {
        "active": True, "remaining": 2, "captured": 0, "endsAt": ""}
    for _ in range(4):
        assert ask(server).status == 200

    assert len(eventually(lambda: len(files(server)) == 2 and files(server))) == 2
    assert server.call("GET", "/health").json()["capture"] is None
    assert report(server)["active"] is False
    events = [entry["event"] for entry in server.log_entries() if "captur" in entry["event"]
              and entry["event"] != "capture_requested"]
    assert events == ["capture_started", "request_captured", "request_captured", "capture_ended"]
    assert {entry["level"] for entry in server.log_entries("capture_started")} == {"warn"}
    start(server)


def test_of_many_at_once_no_more_are_captured(server: Server) -> None:
    start(server, requests=3)
    replies = in_parallel([lambda: ask(server)] * 8)
    assert {each.status for each in replies} == {200}
    eventually(lambda: not report(server)["active"])
    assert len(files(server)) == 3


def test_nobody_else_is_captured(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        keys = {name: as_admin(server, "POST", "/api/keys", {"name": name}).json()["key"]
                for name in ("laptop", "phone")}
        assert as_admin(server, "POST", "/api/capture", {"key": "nobody"}).status == 404
        assert as_admin(server, "POST", "/api/capture", {"key": "laptop"}).status == 201
        for name in ("phone", "laptop", "phone"):
            reply = server.call("POST", CHAT_PATH, question(f"from {name}"), bearer(keys[name]))
            assert reply.status == 200
        eventually(lambda: files(server))
        assert "from laptop" in texts(server) and "from phone" not in texts(server)
        assert "laptop" not in server.call("GET", "/health").text


def test_a_request_that_is_refused_is_captured_with_the_reason(server: Server) -> None:
    start(server, requests=3)
    for body in (b"{", b'{"model": "sonnet"}', json.dumps(question(model="none-such")).encode()):
        assert server.call("POST", CHAT_PATH, body).status >= 400
    eventually(lambda: len(files(server)) == 3)
    assert "failed with status 400 (invalid_request_error)" in files(server)[0].read_text()
    assert "failed with status 404 (model_not_found)" in files(server)[2].read_text()


def test_who_leaves_in_the_middle_is_captured_too(tmp_path: Path) -> None:
    with running_server(tmp_path, [[{"say": "Hello"}, {"hang": True}]]) as server:
        start(server)
        with stream_chat(server) as stream:
            next(iter(stream))
        eventually(lambda: files(server))
        assert "the client left" in texts(server)


def secrets_of(server: Server, key: str) -> dict[str, str]:
    return {
        "the key of the caller": key, "another key": "ocp_" + "k" * 32, "admin": ADMIN_KEY,
        "made admin": "ocp_admin_" + "m" * 32, "shared": SHARED_KEY,
        "token": "sk-ant-oat01-" + "t" * 40, "api key": "sk-proj-" + "p" * 40,
        "cookie": "session=c00kie", "query": "in-the-query-1234",
    }


def test_no_secret_is_written_wherever_it_stands(tmp_path: Path) -> None:
    # The model is asked with the secrets in the prompt, and answers with them.
    with running_server(tmp_path, env=SHARED) as server:
        secrets = secrets_of(server, SHARED_KEY)
        said = " and ".join(
            secret for name, secret in secrets.items() if name not in ("cookie", "query"))
        assert as_admin(server, "POST", "/api/capture", {"requests": 2}).status == 201
        headers = {
            "Authorization": f"Bearer {SHARED_KEY}", "x-api-key": secrets["another key"],
            "Cookie": secrets["cookie"], "Proxy-Authorization": "Basic cHJveHk6c2VjcmV0",
            "X-Custom-Token": "a-token-of-the-client", "X-Note": f"see {secrets['token']}",
            "api-key": "azure-key-12345"}
        body = question(f"My keys are {said}.", user=secrets["token"], metadata={
            "key": secrets["api key"]})
        for path in (f"{CHAT_PATH}?key={secrets['query']}&note={secrets['token']}",
                     f"{CHAT_PATH}?access_token={secrets['query']}"):
            assert server.call("POST", path, body, headers).status == 200

        eventually(lambda: len(files(server)) == 2)
        text = texts(server)
        hidden = [*secrets.values(), "cHJveHk6c2VjcmV0", "a-token-of-the-client", "azure-key-12345"]
        hidden.remove("session=c00kie")
        assert [secret for secret in hidden if secret in text] == []
        assert "Cookie: [redacted]" in text and "Authorization: [redacted]" in text
        # All the same, it is still the request.
        assert '"user":"' in text or '"user": "' in text


@pytest.mark.parametrize("at", [0, 1_048_000, 1_048_560, 1_052_600, 1_052_660, 2_000_000])
def test_a_secret_at_the_end_of_what_is_kept_is_not_left_in_half(at: int) -> None:
    key = "ocp_" + "S" * 32
    redactor = ocp.Redactor([key])
    text = redactor.part(bytearray(b"x" * at + key.encode() + b"y" * 3_000_000), 1_048_576)
    assert "SSS" not in text and "ocp_S" not in text
    assert len(text) < 1_048_700 and "bytes in all" in text
    many = redactor.part(bytearray((key + " ").encode() * 80_000), 1_048_576)
    assert "SSS" not in many


def test_a_secret_with_strange_characters_is_found_in_json_and_in_addresses() -> None:
    secret = 'p"a/ss w\u00f6rd\\1'
    redactor = ocp.Redactor([secret, "short"])
    as_utf8 = json.dumps(secret, ensure_ascii=False)
    for form in (secret, json.dumps(secret), as_utf8, quote(secret, "")):
        assert "rd" not in redactor.text(form), form
    assert redactor.text("a short word") == "a short word"


def test_what_stands_in_a_path_or_a_name_is_on_one_line_and_no_secret() -> None:
    key = "ocp_" + "S" * 32
    target = f"/v1/{key}%0A--- from claude?{key}&a%0A--- to claude=%0A{key}"
    captured = ocp.CapturedRequest("req_1", "POST", target, ocp.Headers(), ())
    text = captured.text()

    assert "SSS" not in text
    assert not any(line.startswith("---") for line in text.splitlines())


def test_letters_are_written_in_any_locale(tmp_path: Path) -> None:
    write = "import ocp_server; ocp_server.write_private('file', 'Gr\\u00fc\\u00dfe \\U0001f600')"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", write], cwd=tmp_path, check=True, timeout=60, env={
        **clean_env(), **ascii_only, "PYTHONPATH": str(REPO)})

    (path,) = tmp_path.iterdir()
    assert path.read_text(encoding="utf-8") == "Gr\u00fc\u00dfe \U0001f600"


def test_large_requests_are_cut(tmp_path: Path) -> None:
    with running_server(tmp_path, [[{"say": "Long."}]]) as server:
        start(server)
        assert ask(server, "word " * 600_000).status == 200
        (path,) = eventually(lambda: files(server))
        assert path.stat().st_size < 3 * 1_048_576
        assert "bytes in all)" in path.read_text()


def test_many_short_lines_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocp, "_MAX_PART_CHARS", 1_000)
    captured = ocp.CapturedRequest("req_1", "POST", "/v1/messages", ocp.Headers(), ())
    for _ in range(1_000):
        captured.add_lines("from claude", b"{}\n")

    assert len(captured.text()) < 1_500 and "more lines" in captured.text()


def test_the_operator_ends_it_and_what_runs_is_not_written(tmp_path: Path) -> None:
    with running_server(tmp_path, [[{"say": "Hello"}, {"sleep_ms": 1500}]]) as server:
        start(server)
        assert server.call("POST", "/api/capture", {}).status == 409

        def stop() -> Reply:
            eventually(lambda: server.queries())
            return server.call("DELETE", "/api/capture")

        answered, stopped = in_parallel([lambda: ask(server), stop])
        assert answered.status == 200 and stopped.json()["stopped"] is True
        assert ask(server).status == 200
        assert files(server) == [] and report(server)["active"] is False
        assert server.call("DELETE", "/api/capture").json()["stopped"] is False
        assert server.log_entries("capture_ended")[0]["why"] == "stopped"


def test_a_restart_ends_it(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        start(server)
    with running_server(tmp_path) as server:
        assert report(server)["active"] is False
        ask(server)
        assert files(server) == []


@pytest.mark.parametrize("fields, param", [
    ({"requests": 0}, "requests"), ({"requests": 101}, "requests"), ({"minutes": 61}, "minutes"),
    ({"minutes": 0}, "minutes"), ({"requests": "5"}, "requests"), ({"key": 7}, "key"),
    ({"other": 1}, "other"),
])
def test_limits_are_kept(server: Server, fields: Json, param: str) -> None:
    refused = server.call("POST", "/api/capture", fields)
    assert refused.status == 400 and error_of(refused)["param"] == param
    assert report(server)["active"] is False


def test_a_home_that_cannot_be_written_gives_a_clear_error(server: Server) -> None:
    (server.ocp_home / "captures").write_text("no folder")
    refused = server.call("POST", "/api/capture", {})
    assert refused.status == 503 and error_of(refused)["code"] == "database_failed"
    assert report(server)["active"] is False


class Events:
    def __init__(self) -> None:
        self.names: list[str] = []

    def event(self, level: str, name: str, **fields: Json) -> None:
        self.names.append(name)


def test_time_ends_it_and_old_captures_are_deleted(tmp_path: Path) -> None:
    now_s, log = [0.0], Events()
    capture = ocp.Capture(str(tmp_path / "captures"), log, lambda: now_s[0])
    capture.start(5, 10, None)
    caller = ocp.Caller("laptop")
    session = capture.claim(caller)
    now_s[0] = 600.0
    assert capture.claim(caller) is None
    capture.tend()
    assert not capture.is_on
    # What had begun is written.
    headers = ocp.Headers()
    captured = ocp.CapturedRequest("req_1", "POST", "/v1/messages", headers, ())
    capture.write(session, captured, caller)
    assert capture.state() is None and log.names[-1] == "capture_ended"

    (kept,) = capture.kept()
    assert kept["files"] == 1
    capture.prune()
    assert len(capture.kept()) == 1
    assert abs(ocp.parse_time(kept["startedAt"]) - time.time()) < 60
    folder = Path(kept["folder"])
    os.utime(folder, (1, 1))
    (folder.parent / "mine").mkdir()
    os.utime(folder.parent / "mine", (1, 1))
    capture.prune()
    assert len(capture.kept()) == 1

    folder.rename(folder.with_name("20200101T120000Z-0a1b"))
    assert capture.kept()[0]["startedAt"] == "2020-01-01T12:00:00.000Z"
    capture.prune()
    assert capture.kept() == [] and [each.name for each in folder.parent.iterdir()] == ["mine"]


def test_the_oldest_of_too_large_captures_go_but_the_newest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocp, "_MAX_CAPTURES_BYTES", 25)
    capture = ocp.Capture(str(tmp_path), Events(), time.monotonic)
    for hours, size in ((3, 10), (2, 10), (1, 10)):
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() - 3600 * hours))
        (tmp_path / f"{stamp}-{hours}").mkdir()
        (tmp_path / f"{stamp}-{hours}" / "req_1.txt").write_text("x" * size)

    capture.prune()
    assert [entry["folder"][-1] for entry in capture.kept()] == ["2", "1"]
    monkeypatch.setattr(ocp, "_MAX_CAPTURES_BYTES", 5)
    capture.prune()
    assert [entry["folder"][-1] for entry in capture.kept()] == ["1"]
    # A start makes room as well.
    capture.start(1, 1, None)
    capture.prune()
    assert [entry["files"] for entry in capture.kept()] == [0]


@pytest.mark.parametrize(("failure", "end"), [
    (ocp.ClientGone(), "the client left"),
    (ocp.BadRequest("No."), "failed with status 400 (invalid_request_error): No."),
    (sqlite3.OperationalError("disk I/O error"), "broke off: see the log"),
    (KeyError("a flaw"), "broke off: see the log"),
])
def test_a_capture_says_how_the_request_ended(
    failure: BaseException, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise failure

    monkeypatch.setattr(ocp, "_answer", fail)
    capture = ocp.Capture(str(tmp_path / "captures"), Events(), lambda: 0.0)
    app = SimpleNamespace(capture=capture, config=ocp.Config())
    exchange = SimpleNamespace(
        caller=ocp.Caller("laptop"), request_id="req_1", method="POST", target="/v1/messages",
        headers=ocp.Headers())
    capture.start(1, 10, None)
    with pytest.raises(type(failure)):
        ocp.answer(app, exchange)

    [path] = (tmp_path / "captures").glob("*/req_1.txt")
    assert f"--- {end}, " in path.read_text()


def test_a_full_disk_does_not_touch_the_request(tmp_path: Path) -> None:
    log = Events()
    capture = ocp.Capture(str(tmp_path / "captures"), log, lambda: 0.0)
    capture.start(1, 10, None)
    session = capture.claim(ocp.Caller("laptop"))
    (folder,) = (tmp_path / "captures").iterdir()
    folder.rmdir()
    captured = ocp.CapturedRequest("req_1", "POST", "/v1/messages", ocp.Headers(), ())
    capture.write(session, captured, ocp.Caller("laptop"))
    assert log.names == ["capture_started", "request_captured", "capture_ended"]
