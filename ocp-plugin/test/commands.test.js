import assert from "node:assert/strict";
import { test } from "node:test";

import { ProxyError } from "../lib/client.js";
import { answer, isShared, settingValue, showHelp, showLogs, showUsage } from "../lib/commands.js";
import { MOST_CHARS } from "../lib/format.js";

const SETTING = { value: 5, type: "number", min: 1, max: 9, unit: "ms", desc: "d",
  source: "default", default: 5, env: "X" };

/** A proxy that notes what it is asked. */
function proxy(answers = {}) {
  const asked = [];
  const call = (method) => async (path, body) => {
    asked.push([method, path, ...(body === undefined ? [] : [body])]);
    const found = answers[`${method} ${path}`];
    if (found instanceof Error) throw found;
    return found;
  };
  return { asked, get: call("GET"), post: call("POST"), patch: call("PATCH"),
    delete: call("DELETE") };
}

const use = (client) => ({
  client, settings: { url: "http://x" }, restart: async () => "Restarted." });
const say = (args, client, ctx = {}) => answer({ args, ...ctx }, use(client));

test("help lists every command and is short enough", () => {
  const help = showHelp();
  for (const name of ["usage", "status", "health", "models", "settings", "logs", "sessions",
    "clear", "keys", "restart", "version", "help"]) {
    assert.match(help, new RegExp(`^${name}\\b`, "m"));
  }
  assert.ok(help.length < MOST_CHARS);
});

test("an unknown command is answered with the list", async () => {
  assert.match(await say("dance", proxy()), /There is no `\/ocp dance`/);
});

test("what the proxy complains of is the answer", async () => {
  const client = proxy({ "GET /status": new ProxyError("No OCP proxy answers at http://x.") });
  assert.equal(await say(undefined, client), "No OCP proxy answers at http://x.");
});

test("usage shows limits as bars and says what is not known", () => {
  const unknown = { utilization: null, percent: null };
  const usage = {
    plan: { currentSession: { utilization: 0.21, percent: "21%", resetsIn: "3h 12m" },
      weeklyLimits: { allModels: unknown, opus: unknown }, extraUsage: { status: "rejected" } },
    proxy: { uptime: "1h 3m", totalRequests: 18 },
    models: { "claude-sonnet-5": { requests: 18, errors: 0, avgElapsed: 20_000 } },
  };
  assert.equal(showUsage(usage), ["**OCP usage**", "```", "Session  [##........] 21%  3h 12m", "",
    "Model     Reqs  Err    Avg", "sonnet-5    18    0  20.0s", "```",
    "Up 1h 3m, 18 requests, extra usage `rejected`"].join("\n"));
});

test("log lines are cut, and keep to their fence", () => {
  const entry = { ts: "2026-11-20T14:01:53.000Z", level: "warn", event: "answer_failed",
    request_id: "r", message: "``` @everyone\n".repeat(40) };
  const shown = showLogs({ level: "warn", entries: [entry] });
  assert.equal(shown.split("```").length, 3);
  assert.ok(shown.length < 300);
});

test("logs take a count and a level in any order", async () => {
  const client = proxy({ "GET /logs?n=3&level=error": { level: "error", entries: [] } });
  assert.match(await say("logs error 3", client), /Nothing/);
  assert.match(await say("logs 3 ERROR", client), /Nothing/);
});

test("a key is shown in a private chat only", async () => {
  const client = proxy({ "POST /api/keys": { name: "My phone", key: "ocp_secret" } });
  assert.match(await say("keys add My phone", client, { from: "telegram:42" }), /ocp_secret/);
  const group = await say("keys add My phone", client, { from: "telegram:group:-100" });
  assert.doesNotMatch(group, /ocp_secret/);
  assert.equal(client.asked.length, 1);
});

test("groups, channels and threads are shared, direct chats are not", () => {
  assert.equal(isShared({ from: "telegram:group:-1", sessionKey: "agent:main:main" }), true);
  assert.equal(isShared({ from: "discord:channel:9" }), true);
  assert.equal(isShared({ sessionKey: "agent:main:slack:channel:c1:thread:5" }), true);
  const direct = { from: "discord:42", to: "discord:42", sessionKey: "agent:main:main" };
  assert.equal(isShared(direct), false);
});

test("revoking names what was not there", async () => {
  const client = proxy({ "DELETE /api/keys/a%20b": { revoked: false } });
  assert.match(await say("keys revoke a b", client), /no active key `a b`/);
});

test("a client of the gateway that may only read cannot change anything", async () => {
  const client = proxy({ "GET /settings": { timeout: SETTING } });
  for (const args of ["keys add x", "clear", "restart", "settings timeout 7"]) {
    const said = await say(args, client, { gatewayClientScopes: ["operator.read"] });
    assert.match(said, /operator.admin/);
  }
  assert.deepEqual(client.asked, [["GET", "/settings"]]);
});

test("a setting is set in its own type, and put back with default", async () => {
  assert.deepEqual([settingValue("7", "number"), settingValue("off", "boolean"),
    settingValue("7", "string"), settingValue("default", "number"), settingValue("x", "number")],
  [7, false, "7", null, "x"]);
  const client = proxy({ "GET /settings": { timeout: SETTING },
    "PATCH /settings": { results: { timeout: { ok: true } },
      current: { timeout: { ...SETTING, value: 7 } } } });
  assert.equal(await say("settings timeout 7", client), "`timeout` is now `7` ms");
  assert.deepEqual(client.asked.at(-1), ["PATCH", "/settings", { timeout: 7 }]);
});

test("the names of JavaScript itself are nothing to us", async () => {
  const client = proxy({ "GET /settings": { timeout: SETTING } });
  assert.match(await say("settings constructor", client), /no setting `constructor`/);
  assert.match(await say("keys constructor x", client), /^Usage/);
  assert.match(await say("constructor", client), /There is no/);
});

test("only what is known is cleared", async () => {
  assert.equal(await say("clear constructor", proxy()), "Usage: `/ocp clear [sessions|cache]`");
  assert.equal(await say("clear cache", proxy({ "DELETE /cache": { cleared: 2 } })),
    "Cleared 2 cached answers.");
});
