/** How OpenClaw is told about the proxy's models; ocp_connect.py tells it the same. */

/** Above the server's own limit of 600 s, so that its words arrive before OpenClaw gives up. */
const TIMEOUT_S = 660;
/** OpenClaw's own word for a provider that wants no key. */
const NO_KEY = "custom-local";

/** One row of /v1/models as OpenClaw lists it. */
function modelEntry(row) {
  const compat = {
    supportsPromptCacheKey: true, supportsReasoningEffort: Boolean(row.reasoning),
  };
  // Without "none", OpenClaw's "off" would be the model's own default.
  if (row.efforts?.length) compat.supportedReasoningEfforts = ["none", ...row.efforts];
  return {
    id: row.id,
    name: `${row.display_name ?? row.id} (via CLI)`,
    reasoning: Boolean(row.reasoning),
    input: ["text", "image"],
    // The plan pays, not the token.
    cost: { input: 0, output: 0, cacheRead: 0, cacheWrite: 0 },
    contextWindow: row.context_window,
    maxTokens: row.max_output_tokens,
    compat,
  };
}

/** The models.providers entry of a proxy. The key is OpenClaw's to keep, not the entry's. */
export function providerEntry(url, rows, hasKey) {
  return {
    baseUrl: `${url}/v1`,
    ...(hasKey ? {} : { apiKey: NO_KEY }),
    api: "openai-completions",
    timeoutSeconds: TIMEOUT_S,
    models: rows.map(modelEntry),
  };
}

/** The rows whose ids are wanted, in that order; all of them when none is named. */
export function chosenRows(rows, wanted) {
  if (wanted.length === 0) return rows;
  return wanted.map((id) => rows.find((row) => row.id === id)).filter(Boolean);
}
