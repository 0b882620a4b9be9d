"""Keys of devices: how they are made, named, limited, changed and ended, and what is one's own."""
from __future__ import annotations

import datetime
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from chat import CHAT_PATH, HANG, NO_IDLE, content_of, encoded, error_of, question
from http_client import Reply
from keys import ADMIN_KEY, MULTI, SHARED, as_admin, ask_as, bearer, key_in_place, new_key
from project import load_script
from raw_http import RawConnection, post
from server import Place, Server, running, running_server, waiting
from waiting import eventually, in_parallel

ocp = load_script("ocp_server.py")

Json = Any

HAIKU = "claude-haiku-5-5"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of mode multi; every test makes keys of its own."""
    with running_server(tmp_path_factory.mktemp("house"), env=MULTI) as server:
        yield server


def is_good(server: Server, key: str) -> bool:
    """Whether a key opens the API."""
    status = server.call("GET", "/v1/models", headers=bearer(key)).status
    assert status in (200, 401)
    return status == 200


def shown(server: Server, id_or_name: object) -> dict[str, Json]:
    reply = as_admin(server, "GET", f"/api/keys/{quote(str(id_or_name))}")
    assert reply.status == 200, reply
    found: dict[str, Json] = reply.json()
    return found


def listed(server: Server) -> list[dict[str, Json]]:
    found: list[dict[str, Json]] = as_admin(server, "GET", "/api/keys").json()["keys"]
    return found


def change(server: Server, id_or_name: object, **fields: Json) -> Reply:
    return as_admin(server, "PATCH", f"/api/keys/{quote(str(id_or_name))}", fields)


def changed(server: Server, id_or_name: object, **fields: Json) -> dict[str, Json]:
    """The key after a change that has to succeed."""
    reply = change(server, id_or_name, **fields)
    assert reply.status == 200, reply
    found: dict[str, Json] = reply.json()
    return found


def revoke(server: Server, id_or_name: object) -> Json:
    reply = as_admin(server, "DELETE", f"/api/keys/{quote(str(id_or_name))}")
    assert reply.status == 200, reply
    return reply.json()


def rotate(server: Server, id_or_name: object, **fields: Json) -> Reply:
    return as_admin(server, "POST", f"/api/keys/{quote(str(id_or_name))}/rotate", fields)


def param_of(reply: Reply) -> Json:
    """The field that a refusal is about."""
    assert reply.status == 400, reply
    assert error_of(reply)["type"] == "invalid_request_error"
    return error_of(reply)["param"]


# ---------------------------------------------------------------------------
# The admin key
# ---------------------------------------------------------------------------

GENERATED = {name: value for name, value in MULTI.items() if name != "OCP_ADMIN_KEY"}


def admin_key_of(server: Server) -> str:
    return (server.ocp_home / "admin-key").read_text().strip()


def mode_of(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


@pytest.mark.parametrize("settings", [
    GENERATED, {name: value for name, value in SHARED.items() if name != "OCP_ADMIN_KEY"},
], ids=["multi", "shared"])
def test_the_first_start_makes_an_admin_key_that_only_its_owner_can_read(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    with running_server(tmp_path, env=settings) as server:
        key = admin_key_of(server)

        assert re.fullmatch(r"ocp_admin_[\w-]{32}", key)
        assert mode_of(server.ocp_home / "admin-key") == "0o600"
        assert as_admin(server, "GET", "/api/keys", key=key).status == 200


def test_the_admin_key_is_the_same_at_the_next_start(tmp_path: Path) -> None:
    with running_server(tmp_path, env=GENERATED) as server:
        first = admin_key_of(server)
    with running_server(tmp_path, env=GENERATED) as server:
        second = admin_key_of(server)
        status = as_admin(server, "GET", "/api/keys", key=first).status

    assert (second, status) == (first, 200)


def test_an_admin_key_of_ones_own_is_the_only_one(tmp_path: Path) -> None:
    with running_server(tmp_path, env=GENERATED) as server:
        made = admin_key_of(server)
    with running_server(tmp_path, env=MULTI) as server:
        statuses = [as_admin(server, "GET", "/api/keys", key=key).status
                    for key in (made, ADMIN_KEY)]
        kept = admin_key_of(server)

    assert (statuses, kept) == ([401, 200], made)


@pytest.mark.parametrize("settings", [MULTI, NO_IDLE], ids=["given", "none"])
def test_no_admin_key_is_made_where_none_is_wanted(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    with running_server(tmp_path, env=settings) as server:
        names = os.listdir(server.ocp_home)

    assert "admin-key" not in names


def test_an_empty_admin_key_file_is_filled_and_opens_nothing(tmp_path: Path) -> None:
    home = Place(tmp_path).ocp_home
    home.mkdir(mode=0o700)
    (home / "admin-key").write_text("\n")

    with running_server(tmp_path, env=GENERATED) as server:
        statuses = [server.call("GET", "/api/keys", headers=headers).status
                    for headers in ({}, {"Authorization": "Bearer "}, bearer(admin_key_of(server)))]

    assert statuses == [401, 401, 200]


def test_a_start_takes_the_rights_of_others_off_what_lies_there(tmp_path: Path) -> None:
    home = Place(tmp_path).ocp_home
    key_in_place(home / "ocp.db", "laptop")
    (home / "logs").mkdir()
    (home / "admin-key").write_text("ocp_admin_" + "k" * 32)
    (home / "logs" / "ocp.log").write_text("")
    for path in (home, *home.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)

    with running_server(tmp_path, env=GENERATED) as server:
        open_ones = [path.name for path in (home, *home.rglob("*")) if path.stat().st_mode & 0o077]
        told = [entry["path"] for entry in server.log_entries("file_modes_tightened")]

    assert open_ones == []
    assert {str(home), str(home / "ocp.db"), str(home / "admin-key")} <= set(told)


# ---------------------------------------------------------------------------
# Making a key
# ---------------------------------------------------------------------------

def test_a_new_key_is_told_with_its_secret_and_all_that_is_known_of_it(house: Server) -> None:
    made = new_key(house, name="Desk 1", note="under the desk", maxConcurrent=2)

    secret = made.pop("key")
    assert ocp.has_key_format(secret)
    assert {**made, **shown(house, made["id"])} == made
    assert (made["name"], made["note"], made["maxConcurrent"]) == ("Desk 1", "under the desk", 2)
    assert made["keyPreview"] == f"{secret[:8]}...{secret[-4:]}"


def test_a_new_key_says_why_its_device_cannot_reach_the_server(house: Server) -> None:
    made = new_key(house, name="far away")
    listing = as_admin(house, "GET", "/api/keys").json()
    rotated = rotate(house, made["id"]).json()

    for told in (made, listing, rotated):
        assert told["connectUrl"] is None
        assert "listens on 127.0.0.1" in told["connectNote"] and "ocp lan" in told["connectNote"]


def test_a_new_key_says_where_its_device_reaches_the_server(tmp_path: Path) -> None:
    open_to_all = {**MULTI, "OCP_PUBLIC_URL": "https://ocp.example.org/"}
    with running_server(tmp_path, env=open_to_all) as server:
        made = new_key(server, name="far away")

        assert (made["connectUrl"], made["connectNote"]) == ("https://ocp.example.org", None)
        assert server.call("GET", "/health", headers={"Host": "ocp.example.org"}).status == 200


def test_a_key_that_nobody_asks_for_says_so(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        made = new_key(server, name="idle")

        assert "In mode none keys of devices have no effect" in made["connectNote"]


def test_a_new_key_has_no_limits_and_no_past(house: Server) -> None:
    made = new_key(house, name="plain")

    assert {name: made[name] for name in made if name.startswith("quota_")} == dict.fromkeys((
        "quota_daily", "quota_weekly", "quota_monthly", "quota_tokens_daily",
        "quota_tokens_weekly", "quota_tokens_monthly", "quota_usd_daily", "quota_usd_weekly",
        "quota_usd_monthly"))
    known = {name: made[name] for name in (
        "revoked", "expiry", "expired", "models", "maxConcurrent", "note", "lastUsed", "revokedAt")}
    assert known == {"revoked": 0, "expiry": None, "expired": False, "models": [],
                     "maxConcurrent": 0, "note": "", "lastUsed": None, "revokedAt": None}


def test_the_times_of_a_key_are_those_of_its_birth(house: Server) -> None:
    before_s = int(time.time())

    made = new_key(house, name="timed")

    assert before_s <= ocp.parse_time(made["createdAt"]) <= time.time()
    assert made["created_at"] == made["createdAt"][:19].replace("T", " ")


def test_a_key_works_at_once_in_every_dialect(house: Server) -> None:
    key = new_key(house, name="worker")["key"]
    messages = {"model": "haiku", "max_tokens": 9, "messages": question()["messages"]}

    asked = [
        ask_as(house, key),
        house.call("POST", "/v1/messages", messages, {"x-api-key": key}),
        house.call("POST", "/v1/responses", {"input": "hi"}, bearer(key)),
        house.call("POST", "/v1/completions", {"prompt": "hi"}, bearer(key)),
    ]

    assert [reply.status for reply in asked] == [200] * 4


def test_a_key_without_a_name_gets_one(house: Server) -> None:
    made = new_key(house)

    assert re.fullmatch(r"key-[0-9]{13}.*", made["name"])
    assert shown(house, made["name"])["id"] == made["id"]


def test_many_keys_without_names_can_be_made_at_once(house: Server) -> None:
    made = in_parallel([lambda: as_admin(house, "POST", "/api/keys", {})] * 16)

    assert {reply.status for reply in made} == {201}
    assert len({reply.json()["name"] for reply in made}) == 16


def test_keys_are_listed_newest_first_revoked_ones_too(house: Server) -> None:
    ids = [new_key(house, name=f"in-line-{number}")["id"] for number in range(3)]
    revoke(house, ids[1])

    entries = [entry for entry in listed(house) if entry["id"] in ids]

    assert [entry["id"] for entry in entries] == ids[::-1]
    assert [entry["revoked"] for entry in entries] == [0, 1, 0]


def test_a_secret_is_told_only_once(house: Server) -> None:
    made = new_key(house, name="secretive")

    later = [as_admin(house, "GET", "/api/keys"), as_admin(house, "GET", "/api/keys/secretive"),
             change(house, "secretive", note="x"),
             as_admin(house, "GET", "/api/keys/secretive/quota"), as_admin(house, "GET", "/logs")]

    assert not [reply for reply in later if made["key"] in reply.text]


# ---------------------------------------------------------------------------
# A secret that clients have already
# ---------------------------------------------------------------------------

def test_a_key_may_be_made_with_a_secret_that_its_client_has_already(house: Server) -> None:
    secret = "c0ffee" * 10

    made = new_key(house, name="moved", secret=secret)

    assert (made["key"], is_good(house, secret)) == (secret, True)
    assert made["keyPreview"] == "c0ffeec0...ffee"
    assert secret not in as_admin(house, "GET", "/api/keys").text


def test_a_key_may_be_rotated_to_a_secret_that_stands_somewhere_already(house: Server) -> None:
    made, secret = new_key(house), "in-the-file_" * 4

    assert rotate(house, made["id"], secret=secret).json()["key"] == secret
    assert (is_good(house, secret), is_good(house, made["key"])) == (True, False)


@pytest.mark.parametrize("state", ["valid", "revoked", "replaced"])
def test_a_secret_that_a_key_has_or_had_makes_no_other_one(house: Server, state: str) -> None:
    made, other = new_key(house), new_key(house)
    if state == "revoked":
        revoke(house, made["id"])
    if state == "replaced":
        rotate(house, made["id"])

    replies = [as_admin(house, "POST", "/api/keys", {"secret": made["key"]}),
               rotate(house, other["id"], secret=made["key"])]

    for reply in replies:
        assert (reply.status, error_of(reply)["code"]) == (409, "key_exists")
        assert made["key"] not in reply.text
    assert is_good(house, other["key"])


def test_the_admin_key_is_no_secret_of_a_key(tmp_path: Path) -> None:
    secret = "admin-of-a-house-with-a-long-key"
    with running_server(tmp_path, env={**MULTI, "OCP_ADMIN_KEY": secret}) as server:
        reply = as_admin(server, "POST", "/api/keys", {"secret": secret}, key=secret)

    assert (reply.status, error_of(reply)["code"]) == (409, "key_exists")


@pytest.mark.parametrize("secret", ["a" * 31, "a" * 129, "a" * 31 + " ", "a" * 31 + "\u00e9", 7])
def test_a_secret_of_another_form_is_refused(house: Server, secret: Json) -> None:
    made = new_key(house)

    replies = [as_admin(house, "POST", "/api/keys", {"secret": secret}),
               rotate(house, made["id"], secret=secret)]

    assert [param_of(reply) for reply in replies] == ["secret"] * 2
    assert is_good(house, made["key"])


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'"laptop"', b"{"])
@pytest.mark.parametrize(("method", "path"), [
    ("POST", "/api/keys"), ("PATCH", "/api/keys/bodiless"), ("PATCH", "/api/keys/bodiless/quota"),
])
def test_a_body_that_is_no_object_is_refused(
    house: Server, method: str, path: str, body: bytes
) -> None:
    if not [entry for entry in listed(house) if entry["name"] == "bodiless"]:
        new_key(house, name="bodiless")
    count = len(listed(house))

    assert param_of(as_admin(house, method, path, body)) is None
    assert len(listed(house)) == count


@pytest.mark.parametrize("field", ["key", "id", "revoked", "Name", "quota_daily", "hash", "admin"])
def test_a_field_that_there_is_not_is_refused(house: Server, field: str) -> None:
    new = as_admin(house, "POST", "/api/keys", {"name": f"odd {field}", field: 1})
    made = new_key(house, name=f"odd {field}")
    existing = change(house, made["id"], **{field: 1})
    limited = as_admin(house, "PATCH", f"/api/keys/{made['id']}/quota", {"daily": 1, field: 1})

    assert [param_of(reply) for reply in (new, existing, limited)] == [field] * 3
    assert shown(house, made["id"])["quota_daily"] is None


@pytest.mark.parametrize(("field", "value", "route"), [
    ("quota", {"daily": 5}, "PATCH /api/keys/{key}/quota"),
    ("secret", "ocp_new", "POST /api/keys/{key}/rotate"), ("revoked", True, "DELETE"),
    ("login", None, "PUT /api/keys/{key}/login")])
def test_a_field_that_another_route_changes_is_refused_with_that_route(
    house: Server, field: str, value: Json, route: str
) -> None:
    made = new_key(house, name=f"elsewhere {field}")
    reply = change(house, made["id"], note="lost?", **{field: value})

    assert (param_of(reply), shown(house, made["id"])["note"]) == (field, "")
    assert route in reply.json()["error"]["message"]


WRONG_FIELDS: list[tuple[str, Json]] = [
    ("maxConcurrent", -1), ("maxConcurrent", 1001), ("maxConcurrent", 1.5),
    ("maxConcurrent", "2"), ("maxConcurrent", True), ("maxConcurrent", []),
    ("note", 5), ("note", ["a"]), ("note", True), ("models", 5), ("models", [5]),
    ("models", ["gpt-4"]), ("models", {"haiku": True}), ("models", ["haiku", ""]),
    ("softPercent", 0), ("softPercent", 101), ("softPercent", 79.5), ("softPercent", "80"),
    ("softPercent", True), ("modelQuotas", 5), ("modelQuotas", ["opus"]),
]


@pytest.mark.parametrize(("field", "value"), WRONG_FIELDS)
def test_a_field_of_a_wrong_value_is_named(house: Server, field: str, value: Json) -> None:
    made = new_key(house)

    replies = [as_admin(house, "POST", "/api/keys", {field: value}),
               change(house, made["id"], **{field: value})]

    assert [param_of(reply) for reply in replies] == [field] * 2
    assert shown(house, made["id"])[field] == made[field]


def test_a_quota_may_be_set_at_the_birth_of_a_key(house: Server) -> None:
    made = new_key(house, quota={"daily": 0, "tokensMonthly": 10**12, "weekly": None,
                                  "usdDaily": 0.25})

    assert {name: made[name] for name in made if name.startswith("quota_") and
            made[name] is not None} == {
                "quota_daily": 0, "quota_tokens_monthly": 10**12, "quota_usd_daily": 0.25}


@pytest.mark.parametrize(("quota_", "param"), [
    ({"daily": -1}, "quota.daily"), ({"hourly": 1}, "quota.hourly"),
    ({"tokensDaily": "5"}, "quota.tokensDaily"), (5, "quota"), ([], "quota"),
    ({"usdDaily": -0.01}, "quota.usdDaily"), ({"usdWeekly": "2.5"}, "quota.usdWeekly"),
    ({"usdDaily": True}, "quota.usdDaily"), ({"usdDaily": 1e-7}, "quota.usdDaily"),
    ({"usdDaily": 0.1234567}, "quota.usdDaily"), ({"usdWeekly": 1_000_001}, "quota.usdWeekly"),
])
def test_a_wrong_quota_at_birth_is_named_by_its_path(
    house: Server, quota_: Json, param: str
) -> None:
    reply = as_admin(house, "POST", "/api/keys", {"quota": quota_})

    assert param_of(reply) == param


# ---------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["x", "x" * 64, "My laptop", "a.b_c-d", "9 lives", "-", "1.5",
                                  "quota", "Admin1", "localhost", "K\u00fcche", "mum's ipad",
                                  "\u4e66\u623f", "caf\u00e9 #1 \U0001f4bb", "\u00fc" * 64,
                                  "a%2Fb?",
                                  "a;b", 'say "hi"'])
def test_this_name_may_be_had(house: Server, name: str) -> None:
    made = new_key(house, name=name)

    assert (made["name"], shown(house, name)["id"]) == (name, made["id"])


@pytest.mark.parametrize("name", [
    "", " ", " a", "a ", "x" * 65, "a/b", "a\\b", ".", "..", "a\nb", "a\n", "a\tb", "a\x85b",
    "a\u00a0b", "a\u202eb", "a\u200fb", "a\u2066b", "a\u200bb", "a\ud800b", "a\ufeff",
    "\u0661", "1", "007", 5, True, [], ["a"], {}, 1.5,
    "admin", "anonymous", "local", "public", "remote", "shared", "ADMIN", "Anonymous",
])
def test_this_name_may_not_be_had(house: Server, name: Json) -> None:
    made = new_key(house)

    replies = [as_admin(house, "POST", "/api/keys", {"name": name}),
               change(house, made["id"], name=name)]

    assert [param_of(reply) for reply in replies] == ["name"] * 2
    assert shown(house, made["id"])["name"] == made["name"]


def test_a_name_is_the_same_in_every_form_of_unicode_and_every_case(house: Server) -> None:
    made = new_key(house, name="Gru\u0308ne Stube")
    again = as_admin(house, "POST", "/api/keys", {"name": "GR\u00dcNE STUBE"})

    assert made["name"] == "Gr\u00fcne Stube"
    assert (again.status, error_of(again)["code"]) == (409, "name_taken")
    for form in ("gr\u00fcne stube", "Gru\u0308ne Stube", str(made["id"])):
        assert shown(house, form)["id"] == made["id"]


@pytest.mark.parametrize("name", ["B\u00fcro", "dad's phone", "50% \u2615"])
def test_a_key_with_any_name_works_in_every_route(house: Server, name: str) -> None:
    made = new_key(house, name=name)
    path = f"/api/keys/{quote(name, safe='')}"

    assert changed(house, name, note="here")["note"] == "here"
    assert as_admin(house, "PATCH", f"{path}/quota", {"daily": 5}).status == 200
    assert as_admin(house, "GET", f"{path}/quota").json()["name"] == name
    key = rotate(house, name).json()["key"]
    assert ask_as(house, key).status == 200
    usage = as_admin(house, "GET", "/api/usage?all=true").json()
    assert name in [row["key_name"] for row in usage["byKey"]]
    assert as_admin(house, "GET", "/metrics").status == 200
    assert name in [entry.get("key") for entry in house.log_entries("key_rotated")]
    assert revoke(house, name)["revoked"] is True
    assert shown(house, made["id"])["revoked"] == 1


@pytest.mark.parametrize("again", ["Kitchen", "kitchen", "KITCHEN"])
def test_a_name_is_had_once_in_any_case(house: Server, again: str) -> None:
    if not [entry for entry in listed(house) if entry["name"] == "Kitchen"]:
        new_key(house, name="Kitchen")
    other = new_key(house)

    refused = [as_admin(house, "POST", "/api/keys", {"name": again}),
               change(house, other["id"], name=again)]

    for reply in refused:
        assert (reply.status, error_of(reply)["code"]) == (409, "name_taken")
        assert error_of(reply)["param"] == "name"
        assert again in error_of(reply)["message"]


def test_of_many_who_want_a_name_at_once_one_gets_it(house: Server) -> None:
    wanting = [lambda: as_admin(house, "POST", "/api/keys", {"name": "wanted by all"})] * 8

    statuses = sorted(reply.status for reply in in_parallel(wanting))

    assert statuses == [201] + [409] * 7


def test_the_name_of_a_revoked_key_is_free_for_another_one(house: Server) -> None:
    first = new_key(house, name="phoenix")
    revoke(house, "phoenix")

    second = new_key(house, name="Phoenix")

    assert second["id"] != first["id"]
    assert shown(house, "phoenix")["id"] == second["id"]
    assert (is_good(house, first["key"]), is_good(house, second["key"])) == (False, True)


def test_a_renamed_key_is_found_by_its_new_name_only(house: Server) -> None:
    made = new_key(house, name="old name")

    entry = changed(house, "old name", name="new name")

    assert (entry["id"], entry["name"]) == (made["id"], "new name")
    assert shown(house, "NEW NAME")["id"] == made["id"]
    assert as_admin(house, "GET", "/api/keys/old%20name").status == 404
    assert is_good(house, made["key"])


def test_a_key_may_be_renamed_to_its_own_name_in_another_case(house: Server) -> None:
    made = new_key(house, name="shout")

    assert changed(house, made["id"], name="SHOUT")["name"] == "SHOUT"


@pytest.mark.parametrize(("method", "path"), [
    ("GET", "/api/keys/{}"), ("PATCH", "/api/keys/{}"), ("POST", "/api/keys/{}/rotate"),
    ("GET", "/api/keys/{}/quota"), ("PATCH", "/api/keys/{}/quota"),
])
@pytest.mark.parametrize("unknown", ["nobody", "999999", "9" * 15, "9" * 40, "%27", "a%2Fb"])
def test_a_key_that_there_is_not_is_not_found(
    house: Server, method: str, path: str, unknown: str
) -> None:
    reply = as_admin(house, method, path.format(unknown), {} if method != "GET" else None)

    assert reply.status == 404
    assert error_of(reply)["type"] == "invalid_request_error"


# ---------------------------------------------------------------------------
# Expiry
# ---------------------------------------------------------------------------

def in_days(days: float, form: str = "%Y-%m-%dT%H:%M:%S") -> str:
    """A moment from now, in UTC, without its zone."""
    moment = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=days)
    return moment.strftime(form)


def test_an_expiry_may_be_a_span_from_now(house: Server) -> None:
    for span, seconds in (("30d", 30 * 86_400), ("12h", 12 * 3600), ("90m", 5400), ("1m", 60)):
        made = new_key(house, expiry=span)
        assert abs(ocp.parse_time(made["expiry"]) - time.time() - seconds) < 10, span


@pytest.mark.parametrize(("ending", "ahead_s"), [
    ("Z", 0), (".500Z", 0), ("+00:00", 0), ("+02:00", 7200), ("-0530", -19_800),
])
def test_an_expiry_may_be_a_time_with_its_zone(
    house: Server, ending: str, ahead_s: int
) -> None:
    text = in_days(3)

    made = new_key(house, expiry=text + ending)

    assert ocp.parse_time(made["expiry"]) == ocp.parse_time(text + "Z") - ahead_s


def test_an_expiry_may_be_a_day(house: Server) -> None:
    made = new_key(house, expiry=in_days(400, "%Y-%m-%d"))

    assert abs(ocp.parse_time(made["expiry"]) - time.time() - 400 * 86_400) < 2 * 86_400


@pytest.mark.parametrize("expiry", [
    "tomorrow", "", " ", "0d", "0m", "-1d", "1.5d", "30", "30 days", "30w", "9999999d", "1d2h",
    "2020-01-01", "2020-01-01T00:00:00Z", "2027-13-01", "2027-02-30", "27-01-31",
    "2027-01-31T25:00", "2027-01-31T00:00:00+2", "01/31/2027", "0001-01-01", "\u0661d",
    5, 1_900_000_000, True, [], {},
])
def test_an_expiry_that_is_none_or_has_passed_is_refused(house: Server, expiry: Json) -> None:
    made = new_key(house, expiry="30d")

    replies = [as_admin(house, "POST", "/api/keys", {"expiry": expiry}),
               change(house, made["id"], expiry=expiry)]

    assert [param_of(reply) for reply in replies] == ["expiry"] * 2
    assert shown(house, made["id"])["expiry"] == made["expiry"]


@pytest.mark.slow
def test_a_key_ends_when_its_time_is_up_and_lives_again_with_more(house: Server) -> None:
    made = new_key(house, expiry=in_days(4 / 86_400) + "Z")

    eventually(lambda: not is_good(house, made["key"]))
    assert shown(house, made["id"])["expired"] is True

    changed(house, made["id"], expiry="1h")
    assert is_good(house, made["key"])
    assert changed(house, made["id"], expiry=None)["expiry"] is None
    assert shown(house, made["id"])["expired"] is False


# ---------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------

def asking_for(model: Json) -> dict[str, dict[str, Json]]:
    """A request for this model in each dialect, by its path."""
    messages = question()["messages"]
    named = {} if model is None else {"model": model}
    return {
        CHAT_PATH: {"messages": messages, **named},
        "/v1/messages": {"messages": messages, "max_tokens": 9, **named},
        "/v1/messages/count_tokens": {"messages": messages, **named},
        "/v1/responses": {"input": "hi", **named},
        "/v1/completions": {"prompt": "hi", **named},
    }


@pytest.mark.parametrize("model", ["sonnet", "claude-opus-5-5", None, "claude-unlisted-9"])
def test_a_model_that_a_key_may_not_use_is_refused_in_every_dialect(
    house: Server, model: Json
) -> None:
    key = new_key(house, models=["haiku"])["key"]
    before = len(house.queries())

    replies = {path: house.call("POST", path, body, bearer(key))
               for path, body in asking_for(model).items()}

    assert {reply.status for reply in replies.values()} == {403}
    told = error_of(replies[CHAT_PATH])
    assert (told["code"], told["param"]) == ("model_not_allowed", "model")
    assert "haiku only" in told["message"]
    assert len(house.queries()) == before


@pytest.mark.parametrize("allowed", ["haiku", HAIKU, "claude-haiku-5.5"])
@pytest.mark.parametrize("asked", ["haiku", HAIKU, "claude-haiku"])
def test_a_model_may_be_allowed_and_asked_for_by_any_of_its_names(
    house: Server, allowed: str, asked: str
) -> None:
    made = new_key(house, models=[allowed])

    reply = house.call("POST", "/v1/messages/count_tokens",
                       asking_for(asked)["/v1/messages/count_tokens"], bearer(made["key"]))

    kept = allowed if allowed == "haiku" else HAIKU
    assert (made["models"], reply.status) == ([kept], 200)


def test_a_key_sees_the_models_that_it_may_use(house: Server) -> None:
    keys = [new_key(house, models=models)["key"] for models in (["haiku", "sonnet"], [])]

    seen = [[model["id"] for model in house.call("GET", "/v1/models", headers=bearer(key)).json()[
        "data"]] for key in keys]

    assert sorted(seen[0]) == sorted(["claude-sonnet-5-5", HAIKU])
    assert seen[1] == [model["id"] for model in ocp.BUILTIN_MODELS["models"]]


@pytest.mark.parametrize("name", ["sonnet", "claude-opus-5-5"])
def test_a_model_that_a_key_may_not_use_is_not_shown_either(house: Server, name: str) -> None:
    key = new_key(house, models=["haiku"])["key"]

    statuses = [house.call("GET", f"/v1/models/{each}", headers=bearer(key)).status
                for each in ("haiku", name)]

    assert statuses[0] == 200
    assert statuses[1] in (403, 404)


@pytest.mark.parametrize("everything", [[], None])
def test_the_models_of_a_key_can_be_changed_at_any_time(
    house: Server, everything: Json
) -> None:
    made = new_key(house, models=["haiku"])
    assert ask_as(house, made["key"]).status == 403

    assert changed(house, made["id"], models=everything)["models"] == []

    assert ask_as(house, made["key"]).status == 200


def test_a_model_that_is_named_twice_is_kept_once(house: Server) -> None:
    assert new_key(house, models=["haiku", HAIKU, "Claude Haiku 5.5"])["models"] == ["haiku", HAIKU]


# ---------------------------------------------------------------------------
# How many at a time
# ---------------------------------------------------------------------------

def streaming(server: Server, key: str) -> Any:
    """A request that is sent and streamed; its answer begins when claude says something."""
    return server.stream(CHAT_PATH, question(), bearer(key))


def waiter(server: Server, key: str) -> RawConnection:
    """A client that has sent its question and waits."""
    wire = RawConnection(server.port)
    wire.send(post(encoded(question(stream=True)), f"Authorization: Bearer {key}"))
    return wire


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Server]:
    """A server whose answers begin and do not end."""
    with running_server(tmp_path, [[{"say": "well "}, HANG]], env=MULTI) as server:
        yield server


def test_a_key_gets_so_many_answers_at_a_time_and_others_are_not_kept_waiting(
    slow: Server
) -> None:
    narrow = new_key(slow, name="narrow", maxConcurrent=1)["key"]
    wide = new_key(slow, name="wide")["key"]

    with streaming(slow, narrow):
        second = waiter(slow, narrow)
        try:
            eventually(lambda: waiting(slow) == 1)
            with streaming(slow, wide), streaming(slow, wide):
                assert (running(slow), waiting(slow)) == (3, 1)
        finally:
            second.hang_up()


def test_the_next_answer_of_a_key_begins_when_the_one_before_it_is_over(slow: Server) -> None:
    key = new_key(slow, maxConcurrent=1)["key"]

    with streaming(slow, key):
        second = waiter(slow, key)
        eventually(lambda: waiting(slow) == 1)

    try:
        assert second.status_line() == "HTTP/1.1 200 OK"
        assert (running(slow), waiting(slow)) == (1, 0)
    finally:
        second.hang_up()


def test_a_change_of_how_many_holds_from_the_next_request_on(slow: Server) -> None:
    made = new_key(slow, maxConcurrent=1)

    with streaming(slow, made["key"]):
        changed(slow, made["id"], maxConcurrent=2)
        with streaming(slow, made["key"]):
            assert (running(slow), waiting(slow)) == (2, 0)


def test_several_choices_of_one_request_count_one_by_one(house: Server) -> None:
    key = new_key(house, maxConcurrent=1)["key"]

    reply = ask_as(house, key, n=3)

    assert [choice["message"]["content"] for choice in reply.json()["choices"]] == [
        "You said: hi"] * 3


# ---------------------------------------------------------------------------
# Notes, last use
# ---------------------------------------------------------------------------

def test_a_note_is_kept_in_one_line(house: Server) -> None:
    made = new_key(house, note="for\n the  kids")

    assert made["note"] == "for the kids"
    assert changed(house, made["id"], note=None)["note"] == ""
    assert len(changed(house, made["id"], note="x" * 5000)["note"]) <= 500


def test_a_change_leaves_everything_else_as_it_is(house: Server) -> None:
    made = new_key(house, name="settled", note="old", models=["haiku"], maxConcurrent=3,
                   expiry="30d", quota={"daily": 5})
    secret = made.pop("key")

    entry = changed(house, "settled", note="new")

    assert {**made, **entry} == {**made, "note": "new"}
    assert changed(house, "settled") == entry
    assert is_good(house, secret)


def test_a_key_tells_when_it_was_used_last(house: Server) -> None:
    made = new_key(house)
    unused = shown(house, made["id"])["lastUsed"]
    before_s = int(time.time())

    house.call("GET", "/v1/models", headers=bearer(made["key"]))

    assert unused is None
    assert before_s <= ocp.parse_time(shown(house, made["id"])["lastUsed"]) <= time.time()


# ---------------------------------------------------------------------------
# The end of a key
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("by", ["id", "name"])
def test_a_revoked_key_is_dead_at_once(house: Server, by: str) -> None:
    made = new_key(house, name=f"doomed by {by}")
    assert is_good(house, made["key"])

    told = revoke(house, made[by])

    assert told == {"revoked": True, "idOrName": str(made[by])}
    assert not is_good(house, made["key"])
    entry = shown(house, made["id"])
    assert entry["revoked"] == 1
    assert abs(ocp.parse_time(entry["revokedAt"]) - time.time()) < 10


@pytest.mark.parametrize("unknown", ["nobody", "999999"])
def test_revoking_what_is_not_there_is_no_error(house: Server, unknown: str) -> None:
    assert revoke(house, unknown) == {"revoked": False, "idOrName": unknown}


def test_a_key_is_revoked_once(house: Server) -> None:
    made = new_key(house)
    revoke(house, made["id"])
    when = shown(house, made["id"])["revokedAt"]

    assert revoke(house, made["id"]) == {"revoked": False, "idOrName": str(made["id"])}
    assert shown(house, made["id"])["revokedAt"] == when


def test_revoking_a_name_ends_the_key_that_has_it_now(house: Server) -> None:
    first = new_key(house, name="twice")
    revoke(house, "twice")
    second = new_key(house, name="twice")

    assert revoke(house, "TWICE")["revoked"] is True
    assert (is_good(house, first["key"]), is_good(house, second["key"])) == (False, False)
    assert revoke(house, "twice")["revoked"] is False


def test_a_revoked_key_cannot_be_changed_or_brought_back(house: Server) -> None:
    made = new_key(house, name="gone")
    revoke(house, "gone")

    replies = [change(house, made["id"], note="x"), rotate(house, made["id"]),
               change(house, made["id"], expiry=None),
               as_admin(house, "PATCH", f"/api/keys/{made['id']}/quota", {"daily": 1})]

    assert [reply.status for reply in replies] == [400] * 4
    assert "revoked" in error_of(replies[0])["message"]
    assert not is_good(house, made["key"])


def test_a_rotated_key_has_a_new_secret_and_is_the_same_otherwise(house: Server) -> None:
    made = new_key(house, name="wheel", note="kept", quota={"daily": 9})
    assert is_good(house, made["key"])
    before = shown(house, "wheel")

    told = rotate(house, "wheel").json()

    assert (told["id"], told["name"]) == (made["id"], "wheel")
    assert ocp.has_key_format(told["key"]) and told["oldSecret"] is None
    assert (is_good(house, made["key"]), is_good(house, told["key"])) == (False, True)
    preview = f"{told['key'][:8]}...{told['key'][-4:]}"
    assert shown(house, "wheel") == {**before, "keyPreview": preview}


def test_an_old_secret_works_for_the_time_that_it_is_given(house: Server) -> None:
    made = new_key(house, name="roaming")
    told = rotate(house, "roaming", grace="24h").json()

    assert (is_good(house, made["key"]), is_good(house, told["key"])) == (True, True)
    assert told["oldSecret"] == shown(house, "roaming")["oldSecret"]
    assert told["oldSecret"]["keyPreview"] == made["keyPreview"]
    assert abs(ocp.parse_time(told["oldSecret"]["until"]) - time.time() - 86_400) < 60
    ended = as_admin(house, "DELETE", "/api/keys/roaming/grace").json()
    assert (ended["ended"], shown(house, "roaming")["oldSecret"]) == (True, None)
    assert (is_good(house, made["key"]), is_good(house, told["key"])) == (False, True)
    assert as_admin(house, "DELETE", "/api/keys/roaming/grace").json()["ended"] is False


@pytest.mark.parametrize("fields", [{}, {"grace": "1h"}], ids=["at once", "with grace"])
def test_only_the_last_of_the_old_secrets_has_grace(house: Server, fields: Json) -> None:
    first = new_key(house)
    second = rotate(house, first["id"], grace="1h").json()

    third = rotate(house, first["id"], **fields).json()

    good = [is_good(house, each["key"]) for each in (first, second, third)]
    assert good == [False, bool(fields), True]


def test_a_revoked_key_gives_no_grace_to_its_old_secret(house: Server) -> None:
    made = new_key(house)
    rotate(house, made["id"], grace="1h")

    revoke(house, made["id"])

    assert not is_good(house, made["key"])
    assert shown(house, made["id"])["oldSecret"] is None


@pytest.mark.slow
def test_the_time_of_an_old_secret_ends_also_over_a_restart(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        short, long = (new_key(server, name=name) for name in ("short", "long"))
        rotate(server, "short", grace="2s")
        rotate(server, "long", grace="1h")
    with running_server(tmp_path, env=MULTI) as server:
        assert is_good(server, long["key"])
        eventually(lambda: not is_good(server, short["key"]))
        assert shown(server, "short")["oldSecret"] is None


@pytest.mark.parametrize("grace", ["soon", "31d", 24, "-1h", ["1h"]])
def test_a_grace_that_is_none_is_refused_and_nothing_is_rotated(house: Server, grace: Json) -> None:
    made = new_key(house)

    assert param_of(rotate(house, made["id"], grace=grace)) == "grace"
    assert is_good(house, made["key"])


def test_a_rotated_key_has_used_what_it_had_used(house: Server) -> None:
    made = new_key(house, quota={"daily": 1})
    assert ask_as(house, made["key"]).status == 200

    secret = rotate(house, made["id"]).json()["key"]

    assert ask_as(house, secret).status == 429


# ---------------------------------------------------------------------------
# Who did what
# ---------------------------------------------------------------------------

def test_every_change_leaves_a_line_that_says_who_did_it(house: Server) -> None:
    made = new_key(house, name="watched")
    changed(house, "watched", note="x")
    rotate(house, "watched")
    as_admin(house, "PATCH", "/api/keys/watched/quota", {"daily": 7})
    revoke(house, "watched")

    lines = [entry for entry in house.log_entries() if entry.get("key") == "watched"]

    assert [entry["event"] for entry in lines] == [
        "key_created", "key_changed", "key_rotated", "quota_updated", "key_revoked"]
    assert {(entry["by"], entry["peer"], entry["id"], entry["level"]) for entry in lines} == {
        ("admin", "127.0.0.1", made["id"], "info")}
    assert lines[1]["fields"] == ["note"]
    assert lines[3]["quota"] == {"daily": 7}


def test_a_change_that_is_refused_leaves_no_such_line(house: Server) -> None:
    made = new_key(house)
    count = len(house.log_entries())

    change(house, made["id"], maxConcurrent=-1)
    as_admin(house, "POST", "/api/keys", {"name": "1"})
    house.call("DELETE", f"/api/keys/{made['id']}", headers=bearer(made["key"]))

    # A refusal is told first and logged then; the last one may be summed up with others.
    lines = eventually(lambda: house.log_entries()[count:][1:] and house.log_entries()[count:])
    assert {entry["event"] for entry in lines} == {"request_refused"}
    assert is_good(house, made["key"])


# ---------------------------------------------------------------------------
# What survives, what is one's own
# ---------------------------------------------------------------------------

def test_keys_survive_a_restart_with_all_that_is_known_of_them(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        good = new_key(server, name="good", models=["haiku"], maxConcurrent=2, expiry="30d",
                       note="kept", quota={"weekly": 3})
        bad = new_key(server, name="bad")
        is_good(server, good["key"])
        revoke(server, "bad")
        before = listed(server)
    with running_server(tmp_path, env=MULTI) as server:
        after = listed(server)
        found = (is_good(server, good["key"]), is_good(server, bad["key"]))

    # A minute may pass in between.
    for entry in (*before, *after):
        for row in (entry["quota"] or {}).values():
            del row["resetsIn"]
    assert (after, found) == (before, (True, False))


def test_keys_outlive_a_server_that_is_killed(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        made = new_key(server)
        server.kill()
    with running_server(tmp_path, env=MULTI) as server:
        assert is_good(server, made["key"])


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of mode multi with a place for the process of every key that the tests make."""
    env = {**MULTI, "OCP_PARKED_PROCESSES": "64"}
    with running_server(tmp_path_factory.mktemp("memory"), env=env) as server:
        yield server


def others_of(server: Server, made: dict[str, Json]) -> dict[str, str]:
    """Keys that have no business with what this one said: by how they came to be. Renames it."""
    name, keys = made["name"], {"another": new_key(server)["key"], "the admin": ADMIN_KEY}
    changed(server, name, name=f"{name} renamed")
    keys["one of the name it had"] = new_key(server, name=name)["key"]
    return keys


def heard(server: Server) -> list[str]:
    """The texts of the messages that claude got last."""
    messages = server.queries()[-1]["messages"]
    return [block["text"] for message in messages for block in message["content"]]


def test_a_session_is_its_keys_own_whatever_it_is_called(memory: Server) -> None:
    made = new_key(memory, name="talker")
    ask_as(memory, made["key"], "my secret", ocp_session_id="s1")
    strangers = others_of(memory, made)

    for how, key in strangers.items():
        ask_as(memory, key, "what was it?", ocp_session_id="s1")
        assert heard(memory) == ["what was it?"], how
    ask_as(memory, made["key"], "what was it?", ocp_session_id="s1")

    assert heard(memory) == ["my secret", "You said: my secret", "what was it?"]


def test_the_session_of_a_revoked_key_is_not_that_of_the_next_of_its_name(
    memory: Server
) -> None:
    made = new_key(memory, name="heir")
    ask_as(memory, made["key"], "my will", ocp_session_id="s2")
    revoke(memory, "heir")

    ask_as(memory, new_key(memory, name="heir")["key"], "well?", ocp_session_id="s2")

    assert heard(memory) == ["well?"]


def test_a_session_goes_on_with_a_rotated_secret(memory: Server) -> None:
    made = new_key(memory, name="changer")
    ask_as(memory, made["key"], "one", ocp_session_id="s3")

    ask_as(memory, rotate(memory, "changer").json()["key"], "two", ocp_session_id="s3")

    assert heard(memory) == ["one", "You said: one", "two"]


def test_sessions_are_listed_under_the_names_that_keys_have_now(memory: Server) -> None:
    made = new_key(memory, name="before")
    ask_as(memory, made["key"], ocp_session_id="named")
    changed(memory, "before", name="after")

    sessions = as_admin(memory, "GET", "/sessions").json()["sessions"]

    assert [each["caller"] for each in sessions if each["id"] == "named"] == ["after"]


def test_a_stored_response_is_its_keys_own_whatever_it_is_called(memory: Server) -> None:
    made = new_key(memory, name="author")
    asked = memory.call("POST", "/v1/responses", {"input": "my draft"}, bearer(made["key"])).json()
    path = f"/v1/responses/{asked['id']}"
    more = {"input": "and?", "previous_response_id": asked["id"]}
    strangers = others_of(memory, made)

    for how, key in strangers.items():
        replies = [memory.call("GET", path, headers=bearer(key)),
                   memory.call("DELETE", path, headers=bearer(key)),
                   memory.call("POST", "/v1/responses", more, bearer(key))]
        assert [reply.status for reply in replies] == [404, 404, 400], how
    own = [memory.call("GET", path, headers=bearer(made["key"])),
           memory.call("POST", "/v1/responses", more, bearer(made["key"]))]

    assert [reply.status for reply in own] == [200] * 2
    assert heard(memory) == ["my draft", "You said: my draft", "and?"]


def conversation(text: str) -> dict[str, Json]:
    """What a client sends that remembers by itself, after one exchange about `text`."""
    return {"model": "sonnet", "messages": [
        {"role": "user", "content": text}, {"role": "assistant", "content": f"You said: {text}"},
        {"role": "user", "content": "and then?"}]}


def path_of_last(server: Server) -> str:
    return str(server.log_entries("answer_finished")[-1]["path"])


def test_a_parked_process_is_its_keys_own_whatever_it_is_called(memory: Server) -> None:
    made = new_key(memory, name="parker")
    content_of(ask_as(memory, made["key"], "park me"))
    strangers = others_of(memory, made)

    for how, key in strangers.items():
        content_of(memory.call("POST", CHAT_PATH, conversation("park me"), bearer(key)))
        assert path_of_last(memory) != "continued", how
    content_of(memory.call("POST", CHAT_PATH, conversation("park me"), bearer(made["key"])))

    assert path_of_last(memory) == "continued"
