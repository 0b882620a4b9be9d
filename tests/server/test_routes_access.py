"""Who may use which route: every row of the table of routes, in every mode, with every kind of
key; pages in browsers; and that no key turns up where it has no business.
"""
from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest

from chat import CHAT_PATH, NO_IDLE, error_of, question
from http_client import Reply, http_request
from keys import (
    ADMIN_KEY,
    ANONYMOUS_KEY,
    MULTI,
    SHARED,
    SHARED_KEY,
    ask_as,
    bearer,
    key_in_place,
    new_key,
)
from project import load_script
from raw_http import RawConnection, head
from server import Place, Server, running_server

ocp = load_script("ocp_server.py")

Json = Any

MODES = ("none", "shared", "multi")
#: Every kind of key that somebody may come with.
KINDS = ("no", "wrong", "revoked", "expired", "user", "anonymous", "shared", "admin")
#: Whom a key makes of its holder; any other makes a stranger.
HOLDERS = {
    "none": dict.fromkeys(KINDS, "admin"),
    "shared": {"shared": "caller", "admin": "admin"},
    "multi": {"user": "caller", "anonymous": "caller", "admin": "admin"},
}
#: What each of them gets at a route: let in, or a refusal.
VERDICTS = {
    ("stranger", "PUBLIC"): "in", ("stranger", "CALLER"): "401", ("stranger", "ADMIN"): "401",
    ("caller", "PUBLIC"): "in", ("caller", "CALLER"): "in", ("caller", "ADMIN"): "403",
    ("admin", "PUBLIC"): "in", ("admin", "CALLER"): "in", ("admin", "ADMIN"): "in",
}
#: No endpoint takes this: whoever is let in is told so, and nothing is made or asked.
NONSENSE = {"nonsense": True}
EVIL = "https://evil.example"


class Guarded(NamedTuple):
    """A server of one mode, and a key of each kind."""

    mode: str
    server: Server
    keys: dict[str, str]


def settings_of(mode: str) -> dict[str, str]:
    if mode == "shared":
        return SHARED
    if mode == "multi":
        return {**MULTI, "PROXY_ANONYMOUS_KEY": ANONYMOUS_KEY, "PROXY_ADVERTISE_ANON_KEY": "0"}
    return {**NO_IDLE, "OCP_ADMIN_KEY": ADMIN_KEY}


def keys_in_place(folder: Path) -> dict[str, str]:
    """A key of each kind; the database of the server has those that belong there."""
    database = Place(folder).ocp_home / "ocp.db"
    passed = {"expiry_s": int(time.time()) - 5}
    return {
        "no": "", "wrong": "ocp_" + "A" * 32, "admin": ADMIN_KEY, "shared": SHARED_KEY,
        "anonymous": ANONYMOUS_KEY, "user": key_in_place(database, "user"),
        "revoked": key_in_place(database, "revoked", revoked=True),
        "expired": key_in_place(database, "expired", columns=passed),
    }


@pytest.fixture(scope="module", params=MODES)
def guarded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    """A server of each mode, all with the same keys in their databases."""
    folder = tmp_path_factory.mktemp(request.param)
    keys = keys_in_place(folder)
    with running_server(folder, env=settings_of(request.param)) as server:
        yield Guarded(request.param, server, keys)


@pytest.fixture(scope="module")
def multi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("multi-alone")
    keys = keys_in_place(folder)
    with running_server(folder, env=settings_of("multi")) as server:
        yield Guarded("multi", server, keys)


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants no key, as most people run it."""
    with running_server(tmp_path_factory.mktemp("open"), env=NO_IDLE) as server:
        yield server


# ---------------------------------------------------------------------------
# Every route
# ---------------------------------------------------------------------------

def shown(route: Any) -> str:
    return f"{route.method} {route.path}"


def path_of(route: Any) -> str:
    """A path of this route; what is named in it does not exist."""
    return str(route.path).replace("{id}", "nobody").replace("{key}", "nobody").replace(
        "{model}", "nobody")


def knock(
    server: Server, route: Any, key: str = "", headers: Optional[dict[str, str]] = None,
    path: str = "",
) -> Reply:
    """A request to a route that asks for nothing; of an answer without end, the beginning."""
    body = None if route.method == "GET" else NONSENSE
    sent = {**bearer(key), **(headers or {})}
    connection = http_request(server.port, route.method, path or path_of(route), body, sent)
    try:
        response = connection.getresponse()
        endless = response.headers["Content-Type"].startswith("text/event-stream")
        received = response.read1() if endless else response.read()
        return Reply(response.status, response.headers, received)
    finally:
        connection.close()


def verdict(reply: Reply) -> str:
    """Whether somebody was let in; an endpoint's own complaint means yes."""
    return str(reply.status) if reply.status in (401, 403, 405, 500, 502) else "in"


def wanted(mode: str, kind: str) -> dict[str, str]:
    """What a key of this kind gets at each route."""
    holder = HOLDERS[mode].get(kind, "stranger")
    return {shown(route): VERDICTS[holder, route.access.name] for route in ocp.ROUTES}


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_opens_the_routes_of_its_holder_and_no_other(guarded: Guarded, kind: str) -> None:
    server, key = guarded.server, guarded.keys[kind]

    verdicts = {shown(route): verdict(knock(server, route, key)) for route in ocp.ROUTES}

    assert verdicts == wanted(guarded.mode, kind)


@pytest.mark.few_cases
@pytest.mark.parametrize("kind", KINDS)
def test_a_key_in_x_api_key_opens_the_same_routes(guarded: Guarded, kind: str) -> None:
    headers = {"x-api-key": guarded.keys[kind]} if guarded.keys[kind] else {}

    verdicts = {
        shown(route): verdict(knock(guarded.server, route, headers=headers))
        for route in ocp.ROUTES
    }

    assert verdicts == wanted(guarded.mode, kind)


def spellings(path: str) -> list[str]:
    """Other ways to write a path; not all of them have to work."""
    found = [path + "/", path + "//", "/" + path, "/v1" + path, "/v1/v1" + path, path + "?a=b"]
    found += [path.removeprefix("/v1"), path.upper(), path.replace("e", "%65")]
    return [f"http://localhost{path}", *found]


@pytest.mark.parametrize("kind", ["no", "user"])
def test_no_way_to_write_a_path_leads_around_the_key(multi: Guarded, kind: str) -> None:
    key, wanted_here = multi.keys[kind], wanted("multi", kind)
    closed = [route for route in ocp.ROUTES if wanted_here[shown(route)] != "in"]

    passed = [
        f"{shown(route)} as {path}" for route in closed for path in spellings(path_of(route))
        if knock(multi.server, route, key, path=path).status not in (401, 403, 404)
    ]

    assert closed and not passed


def test_every_refusal_of_a_key_says_what_to_send(multi: Guarded) -> None:
    refused = [knock(multi.server, route) for route in ocp.ROUTES if route.access.name != "PUBLIC"]

    for reply in refused:
        assert reply.json()["error"]["type"] == "authentication_error", reply
        assert "Authorization: Bearer" in reply.json()["error"]["message"]
        assert reply.headers["WWW-Authenticate"] == 'Bearer realm="ocp"'
        assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(("kind", "word"), [("revoked", "revoked"), ("expired", "expired")])
def test_a_key_that_was_good_once_says_why_it_is_not(
    multi: Guarded, kind: str, word: str
) -> None:
    reply = multi.server.call("GET", "/v1/models", headers=bearer(multi.keys[kind]))

    assert reply.status == 401
    assert word in error_of(reply)["message"]


def test_an_admin_route_tells_a_user_where_the_admin_key_is(multi: Guarded) -> None:
    reply = multi.server.call("GET", "/api/keys", headers=bearer(multi.keys["user"]))

    assert reply.status == 403
    assert "OCP_ADMIN_KEY" in error_of(reply)["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_a_refused_key_is_told_in_the_shape_of_the_dialect(multi: Guarded, path: str) -> None:
    reply = multi.server.call("POST", path, NONSENSE)

    assert reply.status == 401
    assert reply.json()["type"] == "error"
    assert reply.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("path", ["/v1/models/gpt-9", "/v1/messages/batches", "/v1/files"])
def test_what_is_not_there_is_told_in_the_words_of_the_client(
    open_server: Server, path: str
) -> None:
    openai = open_server.call("GET", path)
    anthropic = open_server.call("GET", path, headers={"anthropic-version": "2023-06-01"})

    assert (openai.status, error_of(openai)["type"]) == (404, "invalid_request_error")
    assert (anthropic.status, anthropic.json()["type"]) == (404, "error")
    assert anthropic.json()["error"]["type"] == "not_found_error"


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW")


def allowed_methods(path: str) -> set[str]:
    found = {route.method for route in ocp.ROUTES if path_of(route) == path}
    return found | ({"HEAD"} if "GET" in found else set()) | {"OPTIONS"}


@pytest.mark.parametrize("path", sorted({path_of(route) for route in ocp.ROUTES}))
def test_a_wrong_method_is_refused_and_told_the_right_ones(guarded: Guarded, path: str) -> None:
    allowed = allowed_methods(path)

    for method in METHODS:
        if method in allowed:
            continue
        reply = guarded.server.call(method, path, headers=bearer(guarded.keys["admin"]))
        assert reply.status == 405, (method, reply)
        assert set(reply.headers["Allow"].split(", ")) == allowed


@pytest.mark.parametrize("kind", ["no", "user", "admin"])
def test_head_asks_for_the_same_key_as_get(multi: Guarded, kind: str) -> None:
    key = multi.keys[kind]

    for route in ocp.ROUTES:
        if route.method == "GET":
            whole = knock(multi.server, route, key)
            alone = multi.server.call("HEAD", path_of(route), headers=bearer(key))
            assert (alone.status, alone.body) == (whole.status, b""), shown(route)


# ---------------------------------------------------------------------------
# Pages and names of others
# ---------------------------------------------------------------------------

def refusals(server: Server, key: str, headers: dict[str, str]) -> dict[str, tuple[int, bool]]:
    """What every route says to such a request: the status, and whether a page may read it."""
    replies = {shown(route): knock(server, route, key, headers) for route in ocp.ROUTES}
    return {
        name: (reply.status, "Access-Control-Allow-Origin" in reply.headers)
        for name, reply in replies.items()
    }


#: A refusal that nobody but the server's own programs can read, for each route.
ALL_REFUSED = {shown(route): (403, False) for route in ocp.ROUTES}


@pytest.mark.parametrize("origin", [EVIL, "null"])
def test_no_route_answers_a_page_of_another_origin(guarded: Guarded, origin: str) -> None:
    found = refusals(guarded.server, guarded.keys["admin"], {"Origin": origin})

    assert found == ALL_REFUSED


@pytest.mark.parametrize("origin", [
    "http://localhost:1", "https://127.0.0.1", "http://127.0.0.1.evil.example", "file://",
    "chrome-extension://abc", "localhost", "http://evil.127.0.0.1:PORT", "http://127.0.0.1:PORT0",
    "http://127.0.0.1:PORT@evil.example",
])
def test_an_origin_that_is_almost_the_servers_own_is_another_one(
    open_server: Server, origin: str
) -> None:
    port = str(open_server.port)
    headers = {"Origin": origin.replace("PORT", port), "Host": f"127.0.0.1:{port}"}

    reply = open_server.call("GET", "/v1/models", headers=headers)

    assert reply.status == 403


@pytest.mark.parametrize("host", ["evil.example:3456", "127.0.0.1.evil.example"])
def test_no_route_answers_under_a_name_of_somebody_else(guarded: Guarded, host: str) -> None:
    found = refusals(guarded.server, guarded.keys["admin"], {"Host": host})

    assert found == ALL_REFUSED


def test_a_page_of_a_rebound_name_is_of_the_same_origin_and_refused(guarded: Guarded) -> None:
    rebound = {"Host": "evil.example:80", "Origin": "http://evil.example:80"}

    found = refusals(guarded.server, guarded.keys["admin"], rebound)

    assert found == ALL_REFUSED


@pytest.mark.parametrize("path", sorted({path_of(route) for route in ocp.ROUTES}))
def test_no_preflight_of_another_origin_is_granted(open_server: Server, path: str) -> None:
    for method in ("POST", "PATCH", "DELETE"):
        asked = {"Origin": EVIL, "Access-Control-Request-Method": method,
                 "Access-Control-Request-Headers": "content-type"}
        reply = open_server.call("OPTIONS", path, headers=asked)
        granted = [name for name in reply.headers if name.lower().startswith("access-control")]
        assert (reply.status, granted) == (403, []), method


@pytest.mark.parametrize("content_type", [
    "text/plain", "text/plain; charset=utf-8", "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x", "", "application/json",
])
@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/messages", "/v1/responses", "/v1/completions"])
def test_a_page_in_a_browser_cannot_spend_the_plan(
    open_server: Server, path: str, content_type: str
) -> None:
    body = json.dumps({**question(), "input": "hi", "prompt": "hi", "max_tokens": 9})
    headers = {"Origin": EVIL, "Content-Type": content_type}

    reply = open_server.call("POST", path, body, headers)

    assert reply.status == 403
    assert open_server.fake_log("line") == []


def test_even_an_origin_that_is_allowed_has_to_send_json(tmp_path: Path) -> None:
    with running_server(tmp_path, env={**NO_IDLE, "OCP_ALLOWED_ORIGINS": EVIL}) as server:
        headers = {"Origin": EVIL, "Content-Type": "text/plain"}
        form = server.call("POST", CHAT_PATH, json.dumps(question()), headers)
        asked = server.fake_log("line")
        real = server.call("POST", CHAT_PATH, question(), {"Origin": EVIL})

    assert (form.status, asked, real.status) == (403, [], 200)


#: What a page cannot run as a script or apply as a style.
KINDS_OF_ANSWERS = ("application/json", "text/plain", "text/event-stream", "text/html")


def test_what_a_page_gets_without_saying_who_it_is_is_no_script(open_server: Server) -> None:
    for route in ocp.ROUTES:
        if route.method == "GET":
            reply = knock(open_server, route, headers={"Sec-Fetch-Mode": "no-cors"})
            kind = reply.headers["Content-Type"].partition(";")[0]
            assert kind in KINDS_OF_ANSWERS, shown(route)
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            assert reply.headers["Cache-Control"] in ("no-store", "no-cache")
            assert "Access-Control-Allow-Origin" not in reply.headers


MACHINE = socket.gethostname()


@pytest.mark.parametrize("host", [
    "localhost", "127.0.0.1:3456", "[::1]:3456", "LOCALHOST:80", "ocp.localhost", "127.9.9.9",
    MACHINE, f"{MACHINE.upper()}:3456",
])
def test_the_server_answers_under_its_own_names(open_server: Server, host: str) -> None:
    for path in ("/v1/models", "/settings"):
        assert open_server.call("GET", path, headers={"Host": host}).status == 200


#: Names that somebody in the network, or the owner of a domain, can point at this machine.
NETWORK_NAMES = ("nas", "evil", "evil.lan", "attacker.local", "x.internal", "x.home.arpa", "x.home",
                 "localhost.lan", "localhost.evil.example", f"{MACHINE}.evil", "192.168.1.7",
                 "0.0.0.0", "[fe80::1]")


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_where_loopback_makes_the_operator_a_name_of_the_network_is_refused(
    open_server: Server, name: str
) -> None:
    rebound = {"Host": f"{name}:3456", "Origin": f"http://{name}:3456"}
    change = {"maxConcurrent": 3}

    replies = [
        open_server.call("PATCH", "/settings", change, rebound),
        open_server.call("PATCH", "/settings", change, {"Host": name}),
        open_server.call("GET", "/v1/models", headers={"Host": name}),
    ]

    assert [reply.status for reply in replies] == [403] * 3
    assert "OCP_ALLOWED_HOSTS" in error_of(replies[0])["message"]


def test_a_name_that_is_allowed_is_one_of_the_servers_own(tmp_path: Path) -> None:
    env = {**NO_IDLE, "OCP_ALLOWED_HOSTS": "Nas.Lan, ocp"}
    with running_server(tmp_path, env=env) as server:
        found = [
            server.call("GET", "/settings", headers={"Host": host}).status
            for host in ("nas.lan:3456", "OCP", "other.lan")
        ]

    assert found == [200, 200, 403]


@pytest.mark.parametrize("name", ["nas", "nas.local", "nas.lan", "192.168.1.7", "[fd00::1]"])
def test_where_a_key_makes_the_caller_names_of_the_network_are_fine(
    multi: Guarded, name: str
) -> None:
    headers = {**bearer(multi.keys["user"]), "Host": f"{name}:3456"}

    assert multi.server.call("GET", "/v1/models", headers=headers).status == 200


@pytest.mark.parametrize("name", ["nas.lan", "192.168.1.7", "nas"])
def test_other_machines_may_use_names_of_the_network_in_mode_none(name: str) -> None:
    config = ocp.load_config({**NO_IDLE, "CLAUDE_BIND": "0.0.0.0"})

    assert ocp.is_own_host(config, name, "192.168.1.20")
    assert not ocp.is_own_host(config, name, "127.0.0.1")
    assert not ocp.is_own_host(config, "nas.example", "192.168.1.20")


# ---------------------------------------------------------------------------
# Ways to send a key
# ---------------------------------------------------------------------------

RIGHT_WAYS: dict[str, Callable[[str], dict[str, str]]] = {
    "lower": lambda key: {"authorization": f"bearer {key}"},
    "upper": lambda key: {"AUTHORIZATION": f"BEARER {key}"},
    "mixed": lambda key: {"Authorization": f"BeArEr {key}"},
    "spaces": lambda key: {"Authorization": f"  Bearer    {key}  "},
    "x-api-key": lambda key: {"x-api-key": key},
    "X-Api-Key": lambda key: {"X-Api-Key": f" {key} "},
    "beside-basic": lambda key: {"Authorization": "Basic dTpw", "x-api-key": key},
    "beside-nothing": lambda key: {"Authorization": "Bearer ", "x-api-key": key},
    "both": lambda key: {"Authorization": f"Bearer {key}", "x-api-key": key},
    "behind-another": lambda key: {"Authorization": "Bearer wrong", "x-api-key": key},
    "before-another": lambda key: {"Authorization": f"Bearer {key}", "x-api-key": "wrong"},
}
WRONG_WAYS: dict[str, Callable[[str], dict[str, str]]] = {
    "bare": lambda key: {"Authorization": key},
    "basic": lambda key: {"Authorization": f"Basic {key}"},
    "glued": lambda key: {"Authorization": f"Bearer{key}"},
    "quoted": lambda key: {"Authorization": f'Bearer "{key}"'},
    "cookie": lambda key: {"Cookie": f"key={key}"},
}


@pytest.mark.parametrize("kind", ["user", "anonymous", "admin"])
@pytest.mark.parametrize("way", RIGHT_WAYS)
def test_a_key_may_be_sent_this_way(multi: Guarded, way: str, kind: str) -> None:
    headers = RIGHT_WAYS[way](multi.keys[kind])

    assert multi.server.call("GET", "/v1/models", headers=headers).status == 200


@pytest.mark.parametrize("way", WRONG_WAYS)
def test_a_key_is_not_taken_from_anywhere_else(multi: Guarded, way: str) -> None:
    headers = WRONG_WAYS[way](multi.keys["admin"])

    assert multi.server.call("GET", "/v1/models", headers=headers).status == 401


@pytest.mark.parametrize("name", ["key", "token", "api_key", "x-api-key", "Authorization"])
def test_a_key_in_the_address_opens_nothing(multi: Guarded, name: str) -> None:
    reply = multi.server.call("GET", f"/v1/models?{name}={multi.keys['admin']}")

    assert reply.status == 401


def near_misses(key: str) -> list[str]:
    """Keys that are almost this one, of every length."""
    found = [key[:count] for count in range(1, len(key))] + [key[at:] for at in range(1, len(key))]
    other = "x" if key[-1] != "x" else "y"
    found += [key + other, key + key, key[:-1] + other, other + key[1:], key[::-1]]
    found += [key.swapcase(), key + "\xe9", key + " " + key, "*", "%", "None", "null", "undefined"]
    return [*found, "x" * 50_000, key + "x" * 50_000]


@pytest.mark.parametrize("guarded", ["shared", "multi"], indirect=True, scope="module")
@pytest.mark.parametrize("kind", ["user", "anonymous", "shared", "admin"])
def test_a_near_miss_is_as_wrong_as_any_other_key(guarded: Guarded, kind: str) -> None:
    key = guarded.keys[kind]

    taken = [
        len(miss) for miss in near_misses(key)
        if guarded.server.call("GET", "/v1/models", headers=bearer(miss)).status != 401
    ]

    assert not taken


@pytest.mark.parametrize("given", ["", "wanted-key-", "wanted-key-12", "\ud800", "\xff" * 40])
def test_two_secrets_are_the_same_when_they_are_equal_only(given: str) -> None:
    assert ocp.same_secret("wanted-key-1", "wanted-key-1")
    assert not ocp.same_secret(given, "wanted-key-1")


def test_a_secret_that_is_not_set_is_nobodys() -> None:
    assert not ocp.same_secret("", "")


def test_a_key_of_other_letters_works_as_it_was_set(tmp_path: Path) -> None:
    key = "schl\u00fcssel-des-hauses"
    sent = f"Authorization: Bearer {key}".encode()
    request = head("GET", "/v1/models").replace(b"\r\n\r\n", b"\r\n" + sent + b"\r\n\r\n")
    with running_server(tmp_path, env={**SHARED, "PROXY_API_KEY": key}) as server:
        with RawConnection(server.port) as wire:
            wire.send(request)
            reply = wire.reply()

    assert reply.status == 200


# ---------------------------------------------------------------------------
# Who is the machine itself
# ---------------------------------------------------------------------------

PROXY_HEADERS = (
    "Forwarded", "Via", "X-Forwarded", "X-Forwarded-For", "x-forwarded-for", "X-Forwarded-Host",
    "X-Forwarded-Proto", "X-Forwarded-Port", "X-Forwarded-Server", "X-Forwarded-Prefix",
    "X-Forwarded-Client-Cert", "Forwarded-For", "X_Forwarded_For", "X-Real-IP", "X-Client-IP",
    "X-Cluster-Client-IP", "True-Client-IP", "Fastly-Client-IP", "Fly-Client-IP", "Client-IP",
    "CF-Connecting-IP", "CF-Connecting-IPv6", "CF-Ray", "CF-Visitor", "CDN-Loop",
    "DO-Connecting-IP", "X-Original-Forwarded-For", "X-Original-Host", "X-Original-URL",
    "X-Envoy-External-Address", "X-Amzn-Trace-Id", "X-Azure-ClientIP", "X-ProxyUser-Ip",
    "X-Remote-Addr", "Tailscale-User-Login", "Fly-Forwarded-Port",
)
#: Headers of clients and SDKs that look a little like those.
CLIENT_HEADERS = (
    "User-Agent", "X-Stainless-Lang", "X-Request-Id", "anthropic-version", "OpenAI-Organization",
    "X-Client-Name", "X-Client-Version", "x-ms-client-request-id", "traceparent", "X-Title",
    "X-Session-Id", "Origin", "Accept", "Cache-Control", "HTTP-Referer", "Sec-Fetch-Site", "X-App",
)


@pytest.mark.parametrize("header", PROXY_HEADERS)
@pytest.mark.parametrize("value", ["127.0.0.1", ""])
def test_any_header_of_a_proxy_makes_of_the_operator_somebody_else(
    header: str, value: str
) -> None:
    headers = http.client.HTTPMessage()
    headers[header] = value
    config = ocp.load_config(settings_of("none"))

    with pytest.raises(ocp.Forbidden):
        ocp.authorize(config, None, ocp.Access.ADMIN, headers, "127.0.0.1")

    caller = ocp.authorize(config, None, ocp.Access.CALLER, headers, "127.0.0.1")
    assert caller == ocp.Caller("remote")


@pytest.mark.parametrize("header", CLIENT_HEADERS)
def test_headers_of_clients_are_none_of_a_proxy(header: str) -> None:
    headers = http.client.HTTPMessage()
    headers[header] = "1"

    assert not ocp.is_forwarded(headers)


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Via", "X-Real-IP"])
@pytest.mark.parametrize("value", ["127.0.0.1", "203.0.113.9", ""])
def test_whoever_comes_through_a_proxy_is_no_admin(
    open_server: Server, header: str, value: str
) -> None:
    verdicts = {
        shown(route): verdict(knock(open_server, route, headers={header: value}))
        for route in ocp.ROUTES
    }

    assert verdicts == {
        shown(route): VERDICTS["caller", route.access.name] for route in ocp.ROUTES
    }


LOCAL_PEERS = ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "::1%lo")
OTHER_PEERS = ("192.168.1.5", "10.0.0.1", "fe80::1%eth0", "::ffff:192.168.1.5", "2001:db8::1",
               "0.0.0.0", "::", "localhost", "", "1270.0.0.1")


def admitted(mode: str, access: Any, peer: str) -> Any:
    """Who somebody without a key is who comes from this address."""
    config = ocp.load_config(settings_of(mode))
    return ocp.authorize(config, None, access, http.client.HTTPMessage(), peer)


@pytest.mark.parametrize("peer", LOCAL_PEERS)
def test_in_mode_none_the_machine_itself_is_an_admin(peer: str) -> None:
    assert admitted("none", ocp.Access.ADMIN, peer) == ocp.Caller("local", is_admin=True)


@pytest.mark.parametrize("peer", OTHER_PEERS)
def test_in_mode_none_others_may_use_the_api_only(peer: str) -> None:
    with pytest.raises(ocp.Forbidden):
        admitted("none", ocp.Access.ADMIN, peer)

    assert admitted("none", ocp.Access.CALLER, peer) == ocp.Caller("remote")


@pytest.mark.parametrize("access", [ocp.Access.CALLER, ocp.Access.ADMIN])
@pytest.mark.parametrize("peer", LOCAL_PEERS)
def test_in_mode_shared_the_machine_itself_needs_the_key_too(peer: str, access: Any) -> None:
    with pytest.raises(ocp.Unauthorized):
        admitted("shared", access, peer)


def status_at(host: str, port: int, path: str) -> int:
    connection = http.client.HTTPConnection(host, port, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_server_on_all_addresses_knows_the_machine_itself_in_both_families(
    tmp_path: Path
) -> None:
    with running_server(tmp_path, env={**NO_IDLE, "CLAUDE_BIND": "::"}) as server:
        found = [status_at(host, server.port, "/api/keys") for host in ("::1", "127.0.0.1")]

    assert found == [200, 200]


def test_a_server_on_the_loopback_of_ipv6_is_found_where_it_says(tmp_path: Path) -> None:
    with running_server(tmp_path, env={**NO_IDLE, "CLAUDE_BIND": "::1"}) as server:
        status = status_at("::1", server.port, "/api/keys")
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.port), timeout=1).close()

    assert status == 200
    assert f"http://[::1]:{server.port}/v1" in server.output


# ---------------------------------------------------------------------------
# What must not be told
# ---------------------------------------------------------------------------

class Used(NamedTuple):
    """A server on which every key was used rightly and wrongly."""

    server: Server
    #: The keys by their kinds.
    secrets: dict[str, str]
    #: Everything that the server said to those who used them.
    replies: list[Reply]
    admin_key: str


def use(server: Server, key: str) -> list[Reply]:
    """What comes of a key that is sent rightly, wrongly, and beside bad requests."""
    found = [
        ask_as(server, key), ask_as(server, key, model=5), ask_as(server, key, stream=True),
        server.call("POST", "/v1/messages", b"{", bearer(key)),
        server.call("GET", "/api/keys", headers=bearer(key)),
        server.call("GET", "/v1/models", headers={"x-api-key": key}),
        server.call("GET", "/v1/models", headers={"x-api-key": key[:-1]}),
        server.call("GET", "/v1/models", headers={"Authorization": key}),
        server.call("GET", f"/v1/models?key={key}"),
        server.call("GET", "/nothing", headers=bearer(key)),
        server.call("PUT", "/v1/models", headers=bearer(key)),
        server.call("GET", "/v1/models", headers={**bearer(key), "Origin": EVIL}),
        server.call("GET", "/v1/models", headers={**bearer(key), "Host": "evil.example"}),
    ]
    with RawConnection(server.port) as wire:
        wire.send(head("GET", "/v1/models", f"Authorization: Bearer {key}", "broken"))
        return [*found, wire.reply()]


def secretive_env(mode: str, keys: dict[str, str]) -> dict[str, str]:
    """The settings of a mode, with keys in variables that claude gets otherwise."""
    own = settings_of(mode)
    if mode == "multi":
        # Its admin key is the one that the server makes.
        del own["OCP_ADMIN_KEY"]
    secrets = [own[name] for name in own if name.endswith("_KEY") and len(own[name]) > 1]
    copies = {f"LC_NOTE_{number}": secret for number, secret in enumerate(secrets)}
    return {**own, **copies, "OCP_LOG_LEVEL": "debug", "TERM": keys["user"],
            "OPENAI_API_KEY": keys["revoked"], "ANTHROPIC_AUTH_TOKEN": keys["expired"]}


@pytest.fixture(scope="module", params=MODES)
def used(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Used]:
    folder = tmp_path_factory.mktemp(f"used-{request.param}")
    keys = keys_in_place(folder)
    with running_server(folder, env=secretive_env(request.param, keys)) as server:
        if request.param == "multi":
            keys["admin"] = (server.ocp_home / "admin-key").read_text().strip()
            made = server.call("POST", "/api/keys", {"name": "made"}, bearer(keys["admin"]))
            keys["made"] = made.json()["key"]
            path = "/api/keys/made/rotate"
            keys["rotated"] = server.call("POST", path, {}, bearer(keys["admin"])).json()["key"]
        secrets = {kind: key for kind, key in keys.items() if key}
        replies = [reply for key in secrets.values() for reply in use(server, key)]
        yield Used(server, secrets, replies, keys["admin"])


def told_to_the_admin(used: Used) -> bytes:
    routes = [route for route in ocp.ROUTES if route.method == "GET"]
    replies = [knock(used.server, route, used.admin_key) for route in routes]
    replies.append(used.server.call("GET", "/logs?n=1000", headers=bearer(used.admin_key)))
    return b"\n".join(reply.body + str(reply.headers).encode() for reply in replies)


def files_of(used: Used, pattern: str) -> bytes:
    found = sorted(used.server.ocp_home.glob(pattern))
    assert found
    return b"\n".join(path.read_bytes() for path in found)


#: Where no key may stand.
PLACES: dict[str, Callable[[Used], bytes]] = {
    "log file": lambda used: files_of(used, "logs/*"),
    "database": lambda used: files_of(used, "ocp.db*"),
    "terminal": lambda used: used.server.output.encode(),
    "health": lambda used: used.server.call("GET", "/health").body,
    "replies": lambda used: b"\n".join(
        reply.body + str(reply.headers).encode() for reply in used.replies),
    "admin routes": told_to_the_admin,
    "child": lambda used: json.dumps(used.server.fake_log("start")).encode(),
    "what claude hears": lambda used: json.dumps(used.server.lines()).encode(),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_key_is_found_in_this_place(used: Used, place: str) -> None:
    found = PLACES[place](used)

    assert len(found) > 50
    assert [kind for kind, key in used.secrets.items() if key.encode() in found] == []


def test_the_log_has_all_that_was_done_with_the_keys(used: Used) -> None:
    logged = files_of(used, "logs/*")

    assert b"request_refused" in logged and b"answer_finished" in logged


def test_a_key_in_a_path_is_blotted_out_of_the_log(multi: Guarded) -> None:
    key = str(new_key(multi.server, name="in-a-path")["key"])

    for path in (f"/{key}/v1/models", f"/v1/models/{key}", f"/api/keys/{key}"):
        multi.server.call("GET", path, headers=bearer(multi.keys["user"]))

    assert key[4:].encode() not in (multi.server.ocp_home / "logs" / "ocp.log").read_bytes()
    assert key[4:] not in multi.server.output


@pytest.mark.parametrize("advertised", ["1", "0"])
def test_health_tells_the_anonymous_key_unless_it_is_to_be_kept(
    tmp_path: Path, advertised: str
) -> None:
    env = {**settings_of("multi"), "PROXY_ADVERTISE_ANON_KEY": advertised}
    with running_server(tmp_path, env=env) as server:
        health = server.call("GET", "/health").json()

    told = {"anonymousKey": ANONYMOUS_KEY} if advertised == "1" else {}
    assert {name: health[name] for name in health if name == "anonymousKey"} == told
