/** The proxy and its models as OpenClaw lists them, in the same form as ocp_connect.py. */

/** Above the server's own limit of 600 s, so that its error arrives before OpenClaw gives up. */
const TIMEOUT_S = 660;
/** OpenClaw's own value for a provider that needs no key. */
const NO_KEY = "custom-local";

/** Return a row of /v1/models as OpenClaw lists it. */
function modelEntry(row) {
  const compat = {
    supportsPromptCacheKey: true, supportsReasoningEffort: Boolean(row.reasoning),
  };
  // Without "none", OpenClaw's "off" would mean the model's default.
  if (row.efforts?.length) compat.supportedReasoningEfforts = ["none", ...row.efforts];
  return {
    id: row.id,
    name: `${row.display_name ?? row.id} (via CLI)`,
    reasoning: Boolean(row.reasoning),
    input: ["text", "image"],
    // The plan is paid for, not the token.
    cost: { input: 0, output: 0, cacheRead: 0, cacheWrite: 0 },
    contextWindow: row.context_window,
    maxTokens: row.max_output_tokens,
    compat,
  };
}

/** Return the models.providers entry of a proxy. OpenClaw keeps the key elsewhere. */
export function providerEntry(url, rows, hasKey) {
  return {
    baseUrl: `${url}/v1`,
    ...(hasKey ? {} : { apiKey: NO_KEY }),
    api: "openai-completions",
    timeoutSeconds: TIMEOUT_S,
    models: rows.map(modelEntry),
  };
}

/** Return the rows whose ids are wanted, in that order; all when none is wanted. */
export function chosenRows(rows, wanted) {
  if (wanted.length === 0) return rows;
  return wanted.map((id) => rows.find((row) => row.id === id)).filter(Boolean);
}
