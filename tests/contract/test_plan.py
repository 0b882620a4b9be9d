"""Plan usage with real claudes: from the headers of answers, and from asking a spare.

The API's messages go to the stub, and what claude asks beside them to a tunnel on this machine."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import stub_api as stub
from plan_lines import UNKNOWN, UNKNOWN_EXTRA
from project import load_script
from rig import WARM, Claude, Rig, claude_pids, running_rig, wait_until
from server import Place
from stub_api import Recorded
from tls_proxy import Tunnel
from waiting import eventually, in_parallel, seconds_of

ocp = load_script("ocp_server")

Json = Any

USAGE_PATH = "/api/oauth/usage"
USAGE_URL = f"https://api.anthropic.com{USAGE_PATH}"
#: What a login is, and by itself asked about, when claude starts.
PROFILE_URL = "https://api.anthropic.com/api/oauth/profile"


def has_spare(rig: Rig) -> bool:
    return bool(rig.server.call("GET", "/health").json()["spares"])


def usage(rig: Rig) -> Json:
    reply = rig.server.call("GET", "/usage")
    assert reply.status == 200, reply
    return reply.json()


# ---------------------------------------------------------------------------
# A bare token
# ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bare(claude: Claude, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A rig whose claude is logged in by a token alone, and was asked for one answer."""
    with running_rig(tmp_path_factory.mktemp("bare"), claude, **WARM) as rig:
        wait_until(lambda: has_spare(rig))
        before = usage(rig)["plan"]
        assert (before["currentSession"], before["weeklyLimits"]["allModels"]) == (UNKNOWN, UNKNOWN)
        assert rig.ask().finish == "stop"
        wait_until(lambda: usage(rig)["plan"]["currentSession"]["resetsAt"])
        yield rig


@pytest.mark.differs_by_version
def test_after_an_answer_the_windows_are_known_as_far_as_claude_tells_them(bare: Rig) -> None:
    plan = usage(bare)["plan"]

    session, week = plan["currentSession"], plan["weeklyLimits"]["allModels"]
    # Fifty minutes from the start of the stub.
    assert session["status"] == "allowed" and re.fullmatch("(4[4-9]|50)m", session["resetsIn"])
    if bare.is_old:
        assert (session["utilization"], session["percent"], week) == (None, None, UNKNOWN)
    else:
        assert (session["utilization"], session["percent"]) == (0.21, "21%")
        assert (week["utilization"], week["percent"], week["status"]) == (0.4, "40%", "allowed")


def test_status_tells_the_same_plan(bare: Rig) -> None:
    status = bare.server.call("GET", "/status").json()

    session = usage(bare)["plan"]["currentSession"]
    assert status["plan"]["currentSession"]["resetsAt"] == session["resetsAt"]
    assert status["proxy"]["auth"] == "logged in"


@pytest.mark.differs_by_version
def test_a_bare_token_leaves_the_rest_unknown(bare: Rig) -> None:
    plan = usage(bare)["plan"]

    assert plan["subscription"] is None
    assert set(plan["weeklyLimits"]) == {"allModels"}
    assert plan["extraUsage"] == {**UNKNOWN_EXTRA, "state": "off", "status": "rejected"}


def test_looking_at_the_plan_asked_the_api_nothing(bare: Rig) -> None:
    usage(bare)

    assert len(bare.stub.requests) == 1


@pytest.mark.exhaustive
def test_a_plan_that_is_used_up_is_told_with_its_reset(claude: Claude, tmp_path: Path) -> None:
    with running_rig(tmp_path, claude, **WARM) as rig:
        rig.script(then=stub.plan_limit(resets_in_s=7_200))
        answer = rig.ask()
        wait_until(lambda: usage(rig)["status"] == "rejected")
        session = usage(rig)["plan"]["currentSession"]

    assert (answer.status, (answer.error or {})["code"]) == (429, "insufficient_quota")
    assert session["status"] == "rejected"
    assert re.fullmatch("2h 0m|1h 5[4-9]m", session["resetsIn"])


# ---------------------------------------------------------------------------
# Extra usage
# ---------------------------------------------------------------------------

def extra_usage(rig: Rig) -> Json:
    return rig.server.call("GET", "/health").json()["extraUsage"]


@pytest.mark.exhaustive
def test_extra_usage_is_told_stopped_and_allowed(claude: Claude, tmp_path: Path) -> None:
    with running_rig(tmp_path, claude, OCP_EXTRA_USAGE="stop", **WARM) as rig:
        rig.script(then=stub.billed("Hello."))
        first = rig.ask()
        wait_until(lambda: extra_usage(rig) == "stopped")
        asked = len(rig.stub.requests)
        refused = rig.ask("Again")
        told = usage(rig)["plan"]
        rig.server.call("PATCH", "/settings", {"extraUsage": "allow"})
        allowed = rig.ask("And again")

    assert (first.status, first.text, allowed.status) == (200, "Hello.", 200)
    assert (refused.status, (refused.error or {})["code"]) == (429, "insufficient_quota")
    assert "ocp settings extraUsage allow" in (refused.error or {})["message"]
    assert 2_900 < int(refused.headers["Retry-After"] or 0) <= 3_000
    assert asked == 1
    assert (told["extraUsage"]["inUse"], told["extraUsage"]["status"]) == (True, "allowed")


@pytest.mark.exhaustive
def test_a_used_up_week_of_one_model_stops_that_model_only(claude: Claude, tmp_path: Path) -> None:
    with running_rig(tmp_path, claude, OCP_EXTRA_USAGE="stop", **WARM) as rig:
        rig.script(then=stub.billed("Hello.", claim="seven_day_opus"))
        assert rig.ask(model="opus").status == 200
        wait_until(lambda: extra_usage(rig) == "stopped")

        assert [rig.ask("Again", model=model).status for model in ("opus", "haiku")] == [429, 200]


# ---------------------------------------------------------------------------
# A full login
# ---------------------------------------------------------------------------

def limits() -> Json:
    """What the API says to the question for usage; the windows are open for another hour."""
    def window(percent: float, hours: float) -> Json:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + hours * 3_600))
        return {"utilization": percent, "resets_at": f"{moment}.123456+00:00"}

    return {"five_hour": window(21.0, 1), "seven_day": window(40.0, 50),
            "seven_day_oauth_apps": None, "seven_day_opus": None,
            "seven_day_sonnet": window(3.0, 50), "extra_usage": {"is_enabled": False}}


@contextmanager
def logged_in(folder: Path, claude: Claude, answer: Json) -> Iterator[tuple[Rig, Tunnel]]:
    """A rig whose claude is logged in as a person does it, with a spare, and the tunnel to the
    hosts of the API, where the question for usage is answered like this."""
    place = Place(folder / "rig")
    credentials = place.home / ".claude" / ".credentials.json"
    credentials.parent.mkdir(parents=True)
    credentials.write_text(json.dumps({"claudeAiOauth": {
        "accessToken": "sk-ant-oat01-full", "refreshToken": "sk-ant-ort01-full",
        "expiresAt": 4_102_444_800_000, "scopes": ["user:inference", "user:profile"],
        "subscriptionType": "max", "rateLimitTier": "default_claude_max_20x"}}))
    credentials.chmod(0o600)
    with Tunnel({USAGE_PATH: answer}) as tunnel:
        env = {**tunnel.env(), "CLAUDE_CODE_OAUTH_TOKEN": None, "OCP_PARKED_PROCESSES": "0"}
        with running_rig(place.folder, claude, **env, **WARM) as rig:
            wait_until(lambda: has_spare(rig))
            yield rig, tunnel


def asked_for_usage(tunnel: Tunnel) -> int:
    return sum(USAGE_URL in line for line in tunnel.asked)


def test_a_spare_of_a_full_login_tells_the_whole_plan_and_nothing_is_spent(
    claude: Claude, tmp_path: Path
) -> None:
    with logged_in(tmp_path, claude, limits()) as (rig, tunnel):
        report = usage(rig)
        again = usage(rig)
        rig.server.call("GET", "/status")

        plan = report["plan"]
        assert plan["subscription"] == "max"
        assert [plan["currentSession"]["percent"], *(
            plan["weeklyLimits"][name]["percent"] for name in ("allModels", "sonnet"))] == [
            "21%", "40%", "3%"]
        assert again["plan"]["currentSession"]["utilization"] == 0.21
        assert asked_for_usage(tunnel) == 1, "it was asked more than once a minute"
        assert rig.stub.requests == []
        # Nothing else is asked of the API's hosts but what claude asks by itself at its start.
        assert {line.partition(" ")[2] for line in tunnel.asked} <= {USAGE_URL, PROFILE_URL}


@pytest.mark.exhaustive
def test_a_spare_that_was_asked_asks_the_api_what_a_fresh_one_asks(
    claude: Claude, tmp_path: Path
) -> None:
    with logged_in(tmp_path, claude, limits()) as (rig, tunnel):
        (spare,) = claude_pids(rig.server)
        usage(rig)
        assert asked_for_usage(tunnel) == 1 and claude_pids(rig.server) == [spare]
        for _ in range(2):
            wait_until(lambda: has_spare(rig))
            assert rig.ask("Hi there?").finish == "stop"
            assert rig.server.log_entries("answer_finished")[-1]["warm"] is True

        asked, fresh = rig.stub.requests
        assert asked_for_usage(tunnel) == 1
        assert plain_body(asked) == plain_body(fresh)
        assert plain_headers(asked) == plain_headers(fresh)


#: What is another in every process, or every day.
_CHANGING = re.compile(
    r"[0-9a-f]{8}-[0-9a-f-]{27}|cc_version=[^;]*;|cch=[^;]*;|[0-9a-f]{64}")
_CHANGING_HEADERS = ("host", "x-claude-code-session-id", "x-client-request-id", "content-length")


def plain_body(request: Recorded) -> str:
    return _CHANGING.sub("X", json.dumps(request.body, sort_keys=True))


def plain_headers(request: Recorded) -> Mapping[str, str]:
    return {name: value for name, value in request.headers.items()
            if name not in _CHANGING_HEADERS}


@pytest.mark.exhaustive
def test_a_hanging_reply_holds_up_one_look_for_a_while_and_no_request(
    claude: Claude, tmp_path: Path
) -> None:
    with logged_in(tmp_path, claude, None) as (rig, tunnel):
        over: list[str] = []

        def look() -> None:
            usage(rig)
            over.append("look")

        def ask() -> None:
            wait_until(lambda: asked_for_usage(tunnel))
            assert rig.ask().finish == "stop"

        def look_again() -> None:
            wait_until(lambda: asked_for_usage(tunnel))
            usage(rig)
            over.append("second look")

        took_s = seconds_of(lambda: in_parallel([look, ask, look_again]))
        wait_until(lambda: has_spare(rig))

        assert over == ["second look", "look"] and took_s > 3
        # It gives up by itself, and before OCP would.
        assert eventually(lambda: tunnel.endured_s)[0] < ocp.PLAN_QUERY_TIMEOUT_S
        assert usage(rig)["plan"]["subscription"] == "max"
        share = None if rig.is_old else 0.4
        # The answer's own news come behind it.
        wait_until(lambda: usage(rig)["plan"]["weeklyLimits"]["allModels"]["utilization"] == share)


@pytest.mark.exhaustive
def test_a_refused_question_leaves_the_plan_unknown(claude: Claude, tmp_path: Path) -> None:
    with logged_in(tmp_path, claude, 429) as (rig, tunnel):
        plan = usage(rig)["plan"]

        assert asked_for_usage(tunnel) == 1
        assert (plan["currentSession"], plan["subscription"]) == (UNKNOWN, "max")
        assert rig.ask().finish == "stop"
