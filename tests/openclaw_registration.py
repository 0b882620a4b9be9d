"""How OpenClaw is told about the proxy: the reference of the fenced part, with no import of ours.

Each script that registers carries the lines between the fences, byte for byte; the plugin says the
same in ocp-plugin/lib/registration.js. What they give goes to `openclaw config patch --stdin`.
"""

from __future__ import annotations

from typing import Any, Mapping, Optional, Sequence

Json = Any

# --- shared: openclaw_patch
#: Above the server's own limit of 600 s, so that its words arrive before OpenClaw gives up.
OPENCLAW_TIMEOUT_S = 660
#: OpenClaw's own word for a provider that wants no key. Any other is taken for a secret, which its
#: doctor copies into a store that wins over the configuration from then on.
OPENCLAW_NO_KEY = "custom-local"


def openclaw_patch(
    models: Sequence[Mapping[str, Json]], base_url: str, has_key: bool = False,
    provider: str = "claude-local", model: Optional[Json] = None,
) -> dict[str, Json]:
    """The patch that registers these models; again, it changes nothing.

    models    rows of models.json, or of /v1/models
    base_url  of the proxy, with or without /v1
    has_key   the proxy wants a key, which belongs into OpenClaw's store and not in here:
              `openclaw models auth paste-api-key --provider PROVIDER` with the key on stdin
    model     the new agents.defaults.model, from openclaw_model(); None leaves it alone"""
    url = base_url.rstrip("/")
    entry = {
        "baseUrl": url if url.endswith("/v1") else url + "/v1",
        # None takes away what an earlier registration has left.
        "apiKey": None if has_key else OPENCLAW_NO_KEY,
        "api": "openai-completions",
        "timeoutSeconds": OPENCLAW_TIMEOUT_S, "models": [_openclaw_row(row) for row in models],
    }
    patch: dict[str, Json] = {"models": {"providers": {provider: entry}}}
    if model is not None:
        patch["agents"] = {"defaults": {"model": model}}
    return patch


def _openclaw_row(row: Mapping[str, Json]) -> dict[str, Json]:
    """One model as OpenClaw lists it."""
    compat: dict[str, Json] = {
        "supportsPromptCacheKey": True, "supportsReasoningEffort": bool(row["reasoning"])}
    if row.get("efforts"):
        # Without "none", OpenClaw's "off" would be the model's own default.
        compat["supportedReasoningEfforts"] = ["none", *row["efforts"]]
    return {
        "id": row["id"],
        "name": row.get("openclawName") or f"{row.get('display_name') or row['id']} (via CLI)",
        "reasoning": row["reasoning"],
        "input": ["text", "image"],
        # The plan pays, not the token.
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
        "contextWindow": row.get("contextWindow") or row["context_window"],
        "maxTokens": row.get("maxTokens") or row["max_output_tokens"],
        "compat": compat,
    }


def openclaw_model(
    role: str, model_id: str, current: Json = None, keep_fallbacks: bool = False,
    provider: str = "claude-local",
) -> dict[str, Json]:
    """The agents.defaults.model that makes a model the primary one, or a backup of what is there.

    current         the present one: a name, {primary, fallbacks}, or None
    keep_fallbacks  leave a primary model the fallbacks that are there. Without them OpenClaw fails
                    closed: when the proxy is down, nobody else is asked, and nothing is spent"""
    present = {"primary": current} if isinstance(current, str) else dict(current or {})
    ref = f"{provider}/{model_id}"
    primary = present.get("primary")
    others = [each for each in present.get("fallbacks", []) if each != ref]
    if role == "primary" or primary in (None, ref):
        return {"primary": ref, "fallbacks": others if keep_fallbacks else []}
    return {"primary": primary, "fallbacks": [*others, ref]}
# --- end shared
