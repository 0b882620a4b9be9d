"""What the server tells of the gateway to chats, which it can do without."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import Any, Iterator, Optional

import pytest

from fake_agent import FakeAgent
from fake_telegram import FakeTelegram
from gateway import Gateway
from server import Server, running_server
from waiting import eventually

Json = Any
NOBODY = {"state": "none", "waiting": 0, "accounts": []}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("chats"), [[{"say": "Hello."}]]) as running:
        yield running


@pytest.fixture(autouse=True)
def clean(server: Server) -> None:
    for name in ("channels.json", "channels.sock"):
        (server.ocp_home / name).unlink(missing_ok=True)


def chats(server: Server) -> Json:
    reply = server.call("GET", "/api/channels")
    assert reply.status == 200
    return reply.json()


def test_without_a_gateway_there_are_no_chats(server: Server) -> None:
    assert chats(server) == NOBODY


def test_accounts_and_who_waits_are_told_and_no_code(server: Server) -> None:
    with FakeTelegram() as telegram, FakeAgent() as agent, Gateway(telegram, agent) as gateway:
        for name in ("channels.json", "channels.sock"):
            (server.ocp_home / name).symlink_to(gateway.home / name)
        telegram.say("hello", sender=7)
        eventually(lambda: telegram.screen(7) and not chats(server)["accounts"][0]["pending"])
        found = chats(server)
        code = gateway.status()["pairing"][0]
        assert found["accounts"][0].pop("lastInboundAt") == pytest.approx(time.time(), abs=30)
        assert found == {"state": "running", "waiting": 1, "accounts": [
            {"name": "telegram:default", "status": "running", "error": "", "note": "",
             "pending": 0, "held": 0, "dead": 0}]}
        assert code not in str(found)
        gateway.kill()
        assert chats(server) == {**NOBODY, "state": "stopped"}


@pytest.mark.parametrize("said", [
    b"", b"garbage\n", b"[]\n", b"{", b'{"channels": 3, "pairing": null}\n',
    b'{"channels": [1], "pairing": 2}\n', b"[" * 200_000, b"\xff\n", None])
def test_a_gateway_that_talks_nonsense_or_not_at_all_is_none(
    server: Server, said: Optional[bytes]
) -> None:
    with speaking(server.ocp_home / "channels.sock", said):
        began_s = time.monotonic()
        assert chats(server) == NOBODY
        assert time.monotonic() - began_s < 5


@contextlib.contextmanager
def speaking(path: Path, said: Optional[bytes]) -> Iterator[None]:
    """A socket that says this to whoever asks, and nothing if it is None."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen()
        is_over = threading.Event()

        def answer() -> None:
            peer = listening.accept()[0]
            with peer, contextlib.suppress(OSError):
                if said is None:
                    is_over.wait()
                else:
                    peer.recv(1000)
                    peer.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        yield
        is_over.set()
        thread.join()
