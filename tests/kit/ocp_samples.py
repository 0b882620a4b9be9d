"""Answers of the management API, as tests and docs/ocp-command.md show them."""

from __future__ import annotations

import calendar
from typing import Any

from ocp_command import HEALTH

Json = Any

#: The moment at which the samples are looked at.
NOW_S = float(calendar.timegm((2026, 11, 20, 15, 0, 0)))

PLAN: Json = {
    "currentSession": {
        "utilization": 0.21, "percent": "21%", "resetsIn": "3h 12m",
        "resetsAt": "2026-11-20T18:12:00Z", "resetsAtHuman": "Fri, Nov 20, 6:12 PM",
        "status": "allowed", "observedAt": "2026-11-20T14:58:00Z"},
    "weeklyLimits": {
        "allModels": {
            "utilization": 0.4, "percent": "40%", "resetsIn": "3d 1h",
            "resetsAt": "2026-11-23T16:00:00Z", "resetsAtHuman": "Mon, Nov 23, 4:00 PM"},
        "opus": {"utilization": 0.93, "percent": "93%", "resetsIn": "3d 1h"}},
    "extraUsage": {
        "state": "on", "status": "allowed", "inUse": False, "enabled": True, "used": 12.34,
        "limit": 50.0, "currency": "USD", "utilization": 0.247},
    "representativeClaim": "five_hour", "subscription": "max",
}
USAGE: Json = {
    "status": "allowed", "fetchedAt": "2026-11-20T14:58:00Z", "plan": PLAN,
    "proxy": {"totalRequests": 19, "activeRequests": 1, "errors": 1, "timeouts": 0,
              "uptime": "1h 3m"},
    "models": {
        "claude-sonnet-5-5": {
            "requests": 18, "successes": 17, "errors": 1, "timeouts": 0, "avgElapsed": 20_400,
            "maxElapsed": 45_000, "avgPromptChars": 36_000, "maxPromptChars": 56_200,
            "inputTokens": 9_100, "outputTokens": 6_400, "cacheReadTokens": 410_000,
            "cacheWriteTokens": 21_000, "cacheReadShare": 0.9316, "listPriceUsd": 0.2072},
        "claude-haiku-4-5-20251001": {
            "requests": 1, "successes": 1, "errors": 0, "timeouts": 0, "avgElapsed": 840,
            "maxElapsed": 840, "avgPromptChars": 12, "maxPromptChars": 12,
            "inputTokens": 9, "outputTokens": 14, "cacheReadTokens": 0,
            "cacheWriteTokens": 0, "cacheReadShare": 0.0, "listPriceUsd": 0.000079}},
}
CAPTURE: Json = {
    "active": True, "remaining": 5, "captured": 0, "endsAt": "2026-11-20T15:10:00Z",
    "key": "laptop", "folder": "/home/u/.ocp/captures/20261120T150000Z-5f3a",
    "captures": [
        {"folder": "/home/u/.ocp/captures/20261118T091500Z-c07d", "files": 5, "bytes": 421_000,
         "startedAt": "2026-11-18T09:15:00Z"},
        {"folder": "/home/u/.ocp/captures/20261120T150000Z-5f3a", "files": 0, "bytes": 0,
         "startedAt": "2026-11-20T15:00:00Z"}],
}
COUNTS: Json = {
    "requests": 12, "successes": 11, "errors": 1, "input_tokens": 1_200,
    "output_tokens": 3_400, "cache_read_tokens": 45_000, "cache_write_tokens": 800, "cached": 0,
    "cache_read_share": 0.9574,
    "web_search_requests": 4,
    "list_price_usd": 0.0441, "avg_elapsed_ms": 4_200, "last_request": "2026-11-20T14:55:00Z",
}
SMALL: Json = {
    **COUNTS, "requests": 3, "successes": 3, "errors": 0, "input_tokens": 90,
    "output_tokens": 310, "cache_read_tokens": 0, "cache_read_share": 0.0,
    "avg_elapsed_ms": 840, "web_search_requests": 0, "list_price_usd": 0.00164,
    "last_request": "2026-11-18T15:00:00Z",
}
API_USAGE: Json = {
    "since": "2026-11-19T15:00:00Z", "until": "2026-11-20T15:00:00Z",
    "scope": {"self": None, "all": True},
    "totals": {**COUNTS, "requests": 15, "output_tokens": 3_710, "list_price_usd": 0.04574},
    "byKey": [{"key_name": "laptop", **COUNTS}, {"key_name": "phone", **SMALL}],
    "byModel": [{"model": "claude-sonnet-5-5", **COUNTS},
                {"model": "claude-haiku-4-5-20251001", **SMALL}],
    "byPath": [{"path": "continued", **COUNTS}, {"path": "fresh", **SMALL}],
    "byTag": [{"tag": "Anna", **COUNTS}, {"tag": "Ben", **SMALL}],
    "timeline": [], "recent": [],
    "daily": [{"day": "2026-11-19", **SMALL}, {"day": "2026-11-20", **COUNTS}],
}
STATUS: Json = {
    "proxy": {"status": "ok", "version": "1.0.0", "uptime": "1h 3m", "auth": "logged in",
              "fix": None},
    "requests": {"total": 19, "active": 1, "errors": 1, "timeouts": 0}, "plan": PLAN,
    "recentErrors": [
        {"time": "2026-11-20T14:40:00Z", "id": "req_4f2a90c1b7d3e5a86c0f1e2d", "key": "laptop",
         "model": "claude-sonnet-5-5", "kind": "upstream_failed",
         "message": "claude ended early"}],
}
MODELS: Json = {"object": "list", "data": [
    {"id": "claude-sonnet-5-5", "display_name": "Claude Sonnet 5.5",
     "context_window": 1_000_000, "max_output_tokens": 128_000, "reasoning": True,
     "aliases": ["sonnet", "default"], "default": True},
    {"id": "claude-haiku-4-5-20251001", "display_name": "Claude Haiku 4.5",
     "context_window": 200_000, "max_output_tokens": 64_000, "reasoning": False,
     "aliases": ["haiku"], "default": False}]}
SETTINGS: Json = {
    "timeout": {
        "value": 600_000, "type": "number", "min": 1_000, "max": 3_600_000, "unit": "ms",
        "desc": "longest time for one answer", "source": "default", "default": 600_000,
        "env": "CLAUDE_TIMEOUT"},
    "sessionId": {
        "value": False, "type": "boolean", "desc": "take session_id", "source": "stored",
        "default": False, "env": "OCP_SESSION_ID"},
    "logLevel": {
        "value": "info", "type": "string", "desc": "least level that is logged",
        "source": "environment", "default": "info", "env": "OCP_LOG_LEVEL"},
}
LOGS: Json = {"count": 2, "level": "all", "entries": [
    {"ts": "2026-11-20T14:01:53.120Z", "level": "info", "event": "answer_finished",
     "model": "claude-sonnet-5-5", "elapsed_ms": 4200},
    {"ts": "2026-11-20T14:02:10.004Z", "level": "error", "event": "claude_died", "code": 1}]}
ERROR: Json = {
    "id": "req_4f2a90c1b7d3e5a86c0f1e2d", "at": "2026-11-20T14:40:00Z", "key": "laptop",
    "peer": "192.0.2.21", "path": "/v1/chat/completions", "model": "claude-sonnet-5-5",
    "status": 502, "kind": "upstream_failed", "message": "claude ended early",
    "action": "Retry. If it stays so, run `ocp doctor` and update claude.",
    "userAgent": "OpenAI/Python 3.57.0", "totalMs": 4200}
REFUSAL: Json = {
    "id": "req_9b1d03e57ac24f6880d2c4a1", "at": "2026-11-20T13:10:00Z",
    "lastAt": "2026-11-20T14:57:00Z", "count": 31, "peer": "192.0.2.9",
    "path": "/v1/chat/completions", "status": 401, "kind": "replaced_api_key",
    "preview": "ocp_-135...oiwb", "key": "phone",
    "message": "The key ocp_-135...oiwb was replaced on 2026-11-20: use the newer one, or ask the "
    "operator of this server for it.",
    "action": "Put the newer key of phone into the client, or create another with "
    "`ocp keys rotate phone`.", "userAgent": "curl/8.9.1"}
ERRORS: Json = {"errors": [ERROR], "refusals": [REFUSAL], "byKind": [
    {"kind": "replaced_api_key", "status": 401, "count": 31, "lastAt": REFUSAL["lastAt"],
     "message": REFUSAL["message"], "action": REFUSAL["action"]},
    {"kind": "upstream_failed", "status": 502, "count": 1, "lastAt": ERROR["at"],
     "message": ERROR["message"], "action": ERROR["action"]}]}
REQUESTS: Json = {"requests": [
    {"request_id": "req_4f2a90c1b7d3e5a86c0f1e2d", "key_name": "laptop", "tag": "Anna",
     "model": "claude-sonnet-5-5", "dialect": "chat", "stream": True, "state": "running",
     "path": "continued", "since": "2026-11-20T14:59:48Z", "first_token_ms": 840,
     "elapsed_ms": 12_400, "prompt_tokens": 15_200, "output_tokens": 310,
     "response_chars": 930},
    {"request_id": "req_9b1d03e57ac24f6880d2c4a1", "key_name": "phone", "tag": None,
     "model": "claude-haiku-4-5-20251001", "dialect": "messages", "stream": False,
     "state": "queued", "path": None, "since": "2026-11-20T14:59:59Z", "first_token_ms": None,
     "elapsed_ms": 900, "prompt_tokens": None, "output_tokens": 0, "response_chars": 0}]}
ALERTS: Json = {"webhook": "hooks.slack.com (secret)", "format": "slack", "alerts": [
    {"event": "key_quota", "instance": "OCP", "at": "2026-11-20T14:57:00.000Z",
     "title": "the key laptop has reached its warning level (daily requests)",
     "text": "The key laptop has used 160 of its 200 requests (daily). That resets in 9h 3m (Sat "
     "21 Nov, 00:00 UTC). `ocp keys quota laptop` shows its limits.",
     "details": {"key": "laptop", "keyId": 1, "quota": "daily", "model": None, "level": "soft",
                 "used": 160, "limit": 200, "resetsAt": "2026-11-21T00:00:00.000Z"},
     "state": "waiting", "attempts": 2, "nextTryAt": "2026-11-20T15:03:00.000Z",
     "problem": "it failed itself (status 503)"},
    {"event": "plan_window", "instance": "OCP", "at": "2026-11-20T13:10:00.000Z",
     "title": "80 % of the plan's five hours is used",
     "text": "80 % of the plan's five hours is used. That resets in 5h 2m (Fri 20 Nov, 18:12 UTC). "
     "`ocp usage` shows the plan.",
     "details": {"window": "five_hour", "percent": 80, "level": 80,
                 "resetsAt": "2026-11-20T18:12:00.000Z"},
     "state": "delivered", "attempts": 1, "nextTryAt": None, "problem": None}]}
SESSIONS: Json = {"sessions": [
    {"id": "chat-1", "caller": "laptop", "model": "claude-sonnet-5-5", "messages": 6,
     "created": "2026-11-20T13:00:00Z", "lastUsed": "2026-11-20T14:48:00Z"}]}
QUOTA: Json = {"keyId": 2, "name": "laptop", "quota": {
    "daily": {"limit": 50, "used": 12, "inFlight": 0, "resetsIn": "9h 57m"},
    "weekly": {"limit": None, "used": 34, "inFlight": 0, "resetsIn": "2d 9h"},
    "monthly": {"limit": None, "used": 80, "inFlight": 0, "resetsIn": "10d 9h"},
    "tokensDaily": {"limit": 1_000_000, "used": 50_400, "inFlight": 0, "resetsIn": "9h 57m"},
    "tokensWeekly": {"limit": None, "used": 150_000, "inFlight": 0, "resetsIn": "2d 9h"},
    "tokensMonthly": {"limit": None, "used": 400_000, "inFlight": 0, "resetsIn": "10d 9h"},
    "usdDaily": {"limit": None, "used": 0.0441, "inFlight": 0, "resetsIn": "9h 57m"},
    "usdWeekly": {"limit": None, "used": 1.3127, "inFlight": 0, "resetsIn": "2d 9h"},
    "usdMonthly": {"limit": 20, "used": 16.8243, "inFlight": 0, "resetsIn": "10d 9h",
                   "soft": True}},
    "modelQuotaUse": {"opus": {
        "usdDaily": {"limit": 1.5, "used": 0.21, "inFlight": 0, "resetsIn": "9h 57m"}}}}
KEY: Json = {
    "id": 2, "keyPreview": "ocp_ygp2...1eD_", "name": "laptop",
    "created_at": "2026-11-18 15:00:00", "createdAt": "2026-11-18T15:00:00Z", "revoked": 0,
    "expiry": "2026-12-20T15:00:00Z", "expired": False, "models": ["claude-sonnet-5-5"],
    "maxConcurrent": 2, "note": "", "effort": "low", "webSearch": True,
    "lastUsed": "2026-11-20T14:55:00Z", "revokedAt": None,
    "softPercent": 80, "modelQuotas": {"opus": {"usdDaily": 1.5}},
    "quota": QUOTA["quota"], "modelQuotaUse": QUOTA["modelQuotaUse"],
}
ANNA: Json = {
    "id": 3, "keyPreview": "ocp_Wq1b...v0cE", "name": "anna", "createdAt": "2026-11-19T09:00:00Z",
    "revoked": 0, "expiry": None, "expired": False, "models": [], "maxConcurrent": 0, "note": "",
    "lastUsed": "2026-11-20T14:40:00Z",
}
LOGIN: Json = {
    "id": "0c6f1d2a93be", "kind": "token", "folder": None, "state": "logged in",
    "plan": {"currentSession": {"percent": "12%"},
             "weeklyLimits": {"allModels": {"percent": "4%"}}},
    "keys": ["anna"], "used": {"daily": 31, "tokensDaily": 84_200},
}
KEYS: Json = {"logins": [LOGIN], "keys": [ANNA, KEY, {
    "id": 1, "keyPreview": "ocp_8dQx...Zk3a", "name": "old phone",
    "created_at": "2026-10-01 08:00:00", "revoked": 1, "expiry": None, "expired": False,
    "models": [], "maxConcurrent": 0, "note": "", "lastUsed": None}]}
CACHE: Json = {
    "entries": 31, "totalHits": 12, "sizeBytes": 84_200, "inflight": 0, "requesters": 0,
    "hits": 12, "misses": 36, "shared": 2, "bypassed": 5, "maxBytes": 33_554_432,
    "ttl": 3_600_000}
DASHBOARD: Json = {
    "url": "http://127.0.0.1:3456/dashboard", "key": "the admin key: cat /home/u/.ocp/admin-key",
    "deviceUrl": "http://192.0.2.7:3456/dashboard"}
LAN: Json = {
    "host": "192.0.2.7", "url": "http://192.0.2.7:3456", "authMode": "multi", "reachable": True}
DOCTOR: Json = {
    "schema_version": "1", "timestamp": "2026-11-20T15:00:00Z", "ready_to_upgrade": False,
    "install_dir": "/home/u/ocp", "install_dir_source": "script",
    "install_dir_safe_to_replace": True, "current_version": "v1.0.0", "latest_version": "v1.1.0",
    "from_version_supported": True, "units": None, "fail_count": 1, "warn_count": 1,
    "unknown_count": 1,
    "checks": [
        {"id": "python", "title": "Python", "level": "PASS", "message": "Python 3.11.7",
         "checked": True},
        {"id": "file_modes", "title": "Private files", "level": "FAIL",
         "message": "others may read /home/u/.ocp/ocp.db", "checked": True,
         "fix": {"kind": "fix_modes", "human_required": [], "safe": True,
                 "ai_executable": ["chmod 600 /home/u/.ocp/ocp.db"]}},
        {"id": "oauth_ok", "title": "Login", "level": "INFO",
         "message": "not known yet: the first answer tells; `ocp ask hello` gets one",
         "checked": True},
        {"id": "clock", "title": "Clock", "level": "INFO",
         "message": "could not check: the server told no time", "checked": False},
        {"id": "current_version", "title": "Release", "level": "WARN",
         "message": "v1.1.0 is available, 1.0.0 is installed", "checked": True,
         "fix": {"kind": "update", "human_required": [], "safe": False,
                 "ai_executable": ["python3 /home/u/ocp/ocp.py update --yes"]}}],
    "next_action": {
        "kind": "fix_modes", "human_required": [],
        "ai_executable": ["chmod 600 /home/u/.ocp/ocp.db"],
        "verify": "python3 /home/u/ocp/ocp.py doctor"},
}

__all__ = [
    "API_USAGE", "CACHE", "DASHBOARD", "DOCTOR", "ERROR", "ERRORS", "HEALTH", "KEY", "KEYS", "LAN",
    "LOGS", "MODELS", "NOW_S", "PLAN", "QUOTA", "REFUSAL", "SESSIONS", "SETTINGS", "STATUS",
    "USAGE",
]
