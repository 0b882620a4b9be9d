import assert from "node:assert/strict";
import { test } from "node:test";

import { ProxyError } from "../lib/client.js";
import { createProvider } from "../lib/login.js";

const HEALTH = { authMode: "none", claudeBinaryOk: true, version: "1" };
const ROWS = ["claude-opus-5-5", "claude-sonnet-5-5"].map((id) => ({
  id, display_name: id, context_window: 1000, max_output_tokens: 100, reasoning: true,
  efforts: ["low", "high"] }));
const SETTINGS = { host: "127.0.0.1", port: 3456, models: [] };

/** A user with these answers to texts, who keeps the first suggestion of a list. */
function user(texts) {
  const notes = [];
  return { notes, text: async () => texts.shift(), note: async (text) => notes.push(text),
    multiselect: async ({ initialValues }) => initialValues,
    select: async ({ initialValue }) => initialValue };
}

function signingIn(health, prompter, settings = SETTINGS) {
  const clientOf = ({ url }, key) => ({ get: async (path) => {
    if (url !== "http://10.0.0.2:4000") throw new ProxyError("No OCP proxy answers.");
    if (path === "/health") return health;
    if (health.authMode !== "none" && key !== "ocp_right") throw new ProxyError("bad key", 401);
    return { data: ROWS };
  } });
  return createProvider(() => settings, clientOf).auth[0].run({ prompter });
}

test("signing in without a key writes the provider and fails closed", async () => {
  const result = await signingIn(HEALTH, user(["10.0.0.2", "4000"]));
  const provider = result.configPatch.models.providers.ocp;
  assert.deepEqual(result.profiles, []);
  assert.equal(provider.baseUrl, "http://10.0.0.2:4000/v1");
  assert.equal(provider.apiKey, "custom-local");
  assert.deepEqual(provider.models[0].compat.supportedReasoningEfforts, ["none", "low", "high"]);
  assert.deepEqual(result.configPatch.agents.defaults.model,
    { primary: "ocp/claude-opus-5-5", fallbacks: [] });
});

test("a key goes into OpenClaw's store, after a wrong one too", async () => {
  const prompter = user(["10.0.0.2", "4000", "ocp_wrong", "ocp_right"]);
  const result = await signingIn({ ...HEALTH, authMode: "multi" }, prompter);
  assert.deepEqual(prompter.notes, ["The proxy does not accept this key."]);
  assert.equal(result.profiles[0].credential.key, "ocp_right");
  assert.equal("apiKey" in result.configPatch.models.providers.ocp, false);
});

test("a wrong address can be corrected; something else on the port is not taken", async () => {
  const prompter = user(["10.0.0.9", "1", "10.0.0.2", "4000"]);
  await signingIn(HEALTH, prompter);
  assert.deepEqual(prompter.notes, ["No OCP proxy answers."]);
  const other = user(["10.0.0.2", "4000", "10.0.0.2", "4000", "10.0.0.2", "4000"]);
  await assert.rejects(signingIn({ status: "ok" }, other), /something else/);
});

test("the plugin's models are those that are offered, in its order", async () => {
  const settings = { ...SETTINGS, models: ["claude-sonnet-5-5", "nonsense"] };
  const result = await signingIn(HEALTH, user(["10.0.0.2", "4000"]), settings);
  assert.deepEqual(result.configPatch.models.providers.ocp.models.map((row) => row.id),
    ["claude-sonnet-5-5"]);
  assert.equal(result.defaultModel, "ocp/claude-sonnet-5-5");
});

test("the https address of the plugin's settings is asked by https", async () => {
  const settings = { ...SETTINGS, host: "ocp.example", port: 443, url: "https://ocp.example" };
  const asked = [];
  const clientOf = ({ url }) => ({ get: async () => {
    asked.push(url);
    throw new ProxyError("No OCP proxy answers.");
  } });
  const provider = createProvider(() => settings, clientOf);
  const prompter = user(["ocp.example", "443", "ocp.example", "80", "ocp.example", "443"]);
  await assert.rejects(provider.auth[0].run({ prompter }), /No OCP proxy/);
  assert.deepEqual(asked,
    ["https://ocp.example", "http://ocp.example:80", "https://ocp.example"]);
});
