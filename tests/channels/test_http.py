"""Connections of channels: proxies, addresses, and a connection that is kept."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Iterator

import pytest

from channel_tools import FakeTools, channels, receiving
from fake_discord import FakeDiscord
from tls_files import write_tls_files
from waiting import eventually


class Site:
    """A server, and a proxy on the same port that leads every host to it."""

    def __init__(self) -> None:
        self.heads: list[tuple[str, dict[str, str]]] = []
        self.connections = 0
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                site.connections += 1
                super().setup()

            def do_CONNECT(self) -> None:  # noqa: N802
                site.heads.append((self.path, dict(self.headers.items())))
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")

            def do_GET(self) -> None:  # noqa: N802
                site.heads.append((self.path, dict(self.headers.items())))
                body = b"x" * int(self.path.rpartition("/")[2])
                is_cut = self.path.startswith("/cut/")
                self.send_response(200)
                self.send_header("Content-Length", str(len(body) + is_cut))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = is_cut or self.path.startswith("/last/")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    threading.Thread(target=made.server.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def http() -> Iterator[Any]:
    made = channels.Http(channels.Connector("", {}))
    yield made
    made.close()


def test_a_proxy_is_asked_with_its_password_and_loopback_goes_straight(site: Site) -> None:
    connector = channels.Connector(f"http://me:p%40ss@127.0.0.1:{site.port}", {})
    http = channels.Http(connector)
    assert http.call("GET", "http://platform.test/3").body == b"xxx"
    assert site.heads[0][0] == "platform.test:80"
    assert site.heads[0][1]["Proxy-Authorization"] == "Basic bWU6cEBzcw=="
    assert http.call("GET", f"{site.url}/2").body == b"xx"
    assert [path for path, _ in site.heads] == ["platform.test:80", "/3", "/2"]
    http.close()


class Tunnels:
    """A proxy that knows nothing but CONNECT, and where each host is."""

    def __init__(self, hosts: dict[str, int]) -> None:
        #: What it was asked to connect to.
        self.asked: list[str] = []
        tunnels = self

        class Handler(socketserver.StreamRequestHandler):
            rbufsize = 0

            def handle(self) -> None:
                place = self.rfile.readline().split()[1].decode()
                while self.rfile.readline().strip():
                    pass
                tunnels.asked.append(place)
                with socket.create_connection(("127.0.0.1", hosts[place])) as other:
                    self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    back = threading.Thread(target=pump, args=(other, self.request))
                    back.start()
                    pump(self.request, other)
                    back.join()

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Tunnels:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def pump(source: socket.socket, target: socket.socket) -> None:
    """Pass on what comes, and the end of it."""
    with contextlib.suppress(OSError):
        while piece := source.recv(65_536):
            target.sendall(piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("is_setting", [True, False])
def test_a_platform_behind_a_proxy_is_heard_and_answered_through_it(is_setting: bool) -> None:
    with FakeDiscord() as discord:
        hosts = {"api.test:80": int(discord.url.rpartition(":")[2]),
                 "gateway.test:80": discord.gateway.port}
        discord.gateway.url = "ws://gateway.test"
        tools = FakeTools(token=discord.token, apiRoot="http://api.test")
        with Tunnels(hosts) as proxy:
            connector = channels.Connector(proxy.url if is_setting else "", {
                "HTTPS_PROXY": "http://127.0.0.1:1" if is_setting else proxy.url})
            http = channels.Http(connector)
            channel = channels.Discord(tools, http)
            with receiving(channel, tools):
                discord.say("hello")
                eventually(lambda: tools.texts() == ["hello"])
                channel.send(tools.messages[0].route, channels.Part("hi", True, "nonce"))
            http.close()
        assert discord.screen("91000") == ["hi"] and not discord.faults
        assert set(proxy.asked) == set(hosts)


def test_a_server_is_asked_by_tls_only_if_its_certificate_is_trusted(
    site: Site, http: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_tls_files(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["OCP_TLS_CERT"], files["OCP_TLS_KEY"])
    site.server.socket = context.wrap_socket(site.server.socket, server_side=True)
    url = f"https://localhost:{site.port}/3"
    with pytest.raises(channels.NetworkFailed, match="its certificate is not valid"):
        http.call("GET", url)
    trusting = ssl.create_default_context(cafile=files["OCP_TLS_CERT"])
    monkeypatch.setattr(channels, "trusted_servers", lambda: trusting)
    assert [http.call("GET", url).body for _ in range(2)] == [b"xxx"] * 2


def test_hosts_of_no_proxy_go_straight() -> None:
    environ = {"HTTPS_PROXY": "http://127.0.0.1:1", "NO_PROXY": "a.test, .b.test:8443,.c.test"}
    connector = channels.Connector("", environ)
    used = {name: connector._uses_proxy(channels.Target(True, name, 443, "/"))
            for name in ("a.test", "x.a.test", "c.test", "x.c.test", "na.test", "b.test")}
    assert used == {"a.test": False, "x.a.test": False, "c.test": False, "x.c.test": False,
                    "na.test": True, "b.test": True}


def test_one_connection_serves_calls_until_the_server_ends_it(site: Site, http: Any) -> None:
    for _ in range(3):
        assert http.call("GET", f"{site.url}/5").status == 200
    assert site.connections == 1
    http.call("GET", f"{site.url}/last/1")
    eventually(lambda: not http._idle or not http._idle[1].is_usable())
    assert http.call("GET", f"{site.url}/5").status == 200
    assert site.connections == 2


def test_an_answer_that_is_too_large_is_an_error(site: Site, http: Any) -> None:
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        http.call("GET", f"{site.url}/11", max_bytes=10)
    assert http.call("GET", f"{site.url}/10", max_bytes=10).body == b"x" * 10


def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(site: Site, http: Any) -> None:
    with pytest.raises(channels.NetworkFailed, match="broke off"):
        http.call("GET", f"{site.url}/cut/100")


@pytest.mark.parametrize(("path", "headers"), [
    ("/bothidden-1 /getMe", {}), ("/1", {"Authorization": "Bearer hidden-1\nX: y"}),
    ("/1", {"Authorization": "Bearer hidden-1\u4f60"}),
])
def test_what_cannot_be_sent_is_not_shown(
    site: Site, http: Any, path: str, headers: dict[str, str]
) -> None:
    with pytest.raises(channels.NetworkFailed, match="cannot be sent") as failed:
        http.call("GET", site.url + path, headers=headers)
    assert "hidden-1" not in str(failed.value)


@pytest.mark.parametrize(("value", "seconds"), [
    ("2.5", 2.5), ("-1", 0.0), ("nan", 0.0), ("inf", 31 * 86_400.0), ("1e99", 31 * 86_400.0),
    ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0), (None, 0.0), ([1], 0.0),
])
def test_a_pause_that_is_asked_for_is_a_number_that_can_be_waited(
    value: Any, seconds: float
) -> None:
    assert channels.seconds_of(value) == seconds


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_what_comes_from_strangers_leads_to_no_private_address(
    site: Site, http: Any, host: str
) -> None:
    with pytest.raises(channels.NetworkFailed, match="not public"):
        http.call("GET", f"http://{host}:{site.port}/1", only_public=True)


@pytest.mark.parametrize(("address", "is_public"), [
    ("8.8.8.8", True), ("198.18.0.7", True), ("10.0.0.1", False), ("169.254.1.1", False),
    ("::1", False), ("::ffff:127.0.0.1", False), ("fe80::1%eth0", False), ("2606:4700::1", True),
])
def test_addresses_of_the_internet(address: str, is_public: bool) -> None:
    assert channels.is_public(address) == is_public


@pytest.mark.parametrize("url", ["ftp://a/b", "http://", "//a", "http://a:x/", "nonsense"])
def test_what_is_no_address_fails_as_a_network_does(http: Any, url: str) -> None:
    with pytest.raises(channels.NetworkFailed):
        http.call("GET", url)


def test_a_reader_is_woken_up_from_another_thread(http: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        wires: list[Any] = []
        failed: list[str] = []

        def read() -> None:
            try:
                http.open("GET", f"http://127.0.0.1:{server.getsockname()[1]}/", timeout_s=60,
                          on_open=wires.append)
            except channels.NetworkFailed as problem:
                failed.append(str(problem))

        reader = threading.Thread(target=read)
        reader.start()
        eventually(lambda: wires)
        wires[0].cut()
        reader.join(10)
        assert failed
