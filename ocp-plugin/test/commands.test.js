import assert from "node:assert/strict";
import { test } from "node:test";

import { ProxyError } from "../lib/client.js";
import {
  answer, isPrivate, settingValue, showHealth, showHelp, showKeys, showLogs, showModels,
  showSessions, showSetting, showSettings, showStatus, showUsage, showVersion,
} from "../lib/commands.js";
import { MOST_CHARS, MOST_LINES } from "../lib/format.js";

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

const use = (client) => () => ({
  client, settings: { url: "http://x" }, restart: async () => "Restarted." });
const DIRECT = { channel: "telegram", senderId: "42", from: "telegram:42" };
const say = (args, client, ctx = {}) => answer({ args, ...ctx }, use(client));

test("help lists every command and is short enough", () => {
  const help = showHelp();
  for (const name of ["usage", "status", "health", "models", "settings", "logs", "sessions",
    "clear", "keys", "restart", "version", "help"]) {
    assert.match(help, new RegExp(`^${name}\\b`, "m"));
  }
  assert.ok(help.length < MOST_CHARS);
  assert.ok(help.split("\n").length <= MOST_LINES);
});

// What a proxy could say that is not ours: markup, mentions, and lines without end.
const FOUL = "<b>x</b> **y** [a](http://e) `z` ``` @everyone \u202e\n# T";
const LONG = `${FOUL} ${"long ".repeat(200)}`;

/** The same in every text of a value. */
function fouled(value) {
  if (typeof value === "string") return LONG;
  if (Array.isArray(value)) return value.map(fouled);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, fouled(each)]));
}

const LIMIT_ROW = { utilization: 0.5, percent: "50%", resetsIn: "2h" };
const PLAN = { currentSession: LIMIT_ROW, extraUsage: { state: "x" },
  weeklyLimits: { allModels: LIMIT_ROW, opus: LIMIT_ROW } };
const many = (row) => Array.from({ length: 40 }, () => row);
const SHOWN = {
  usage: [showUsage, { plan: PLAN, proxy: { uptime: "1h", totalRequests: 2 },
    models: Object.fromEntries(many(0).map((_, at) => [`m${at}`, { requests: 1, errors: 0 }])) }],
  status: [showStatus, { plan: PLAN, recentErrors: many({ time: "2026", message: "m" }),
    proxy: { status: "ok", version: "1", uptime: "1h", auth: "a", fix: "f" },
    requests: { total: 1, active: 0, errors: 0, timeouts: 0 } }],
  health: [showHealth, { status: "ok", version: "1", claudeBinaryOk: true, claudeVersion: "2",
    auth: { ok: true }, authMode: "none", tls: false, parked: 0, spares: { m: 1 }, fix: "f",
    stats: { activeRequests: 0, queued: 0 }, concurrency: { maxConcurrent: 1, maxQueue: 2 },
    uptimeHuman: "1h" }],
  models: [showModels, { data: many({ id: "m", context_window: 1000, max_output_tokens: 5 }) }],
  setting: [(setting) => showSetting("timeout", setting), SETTING],
  logs: [showLogs, { level: "all", entries: many({ ts: "2026", level: "info", event: "e" }) }],
  sessions: [(list) => showSessions(list, 0),
    { sessions: many({ id: "i", caller: "c", messages: 1, lastUsed: "2026-01-01T00:00:00Z" }) }],
  keys: [(list) => showKeys(list, 0),
    { keys: many({ name: "n", keyPreview: "ocp_", lastUsed: null }) }],
  version: [showVersion, { version: "1", claudeVersion: "2" }],
};

/** An answer without its fences, its code spans and the bold that begins it. */
function outside(text) {
  return text.replace(/```[^]*?```/g, "").replace(/`[^`\n]*`/g, "")
    .replace(/^\*\*[^*]*\*\*/, "");
}

for (const [name, [show, value]] of Object.entries(SHOWN)) {
  test(`${name}: whatever the proxy says stays in its fence, and the answer is short`, () => {
    for (const said of [show(value), show(fouled(value))]) {
      assert.ok(said.length <= MOST_CHARS, `${said.length} characters`);
      assert.ok(said.split("\n").length <= MOST_LINES, said);
      assert.doesNotMatch(outside(said), /[<[*@#]|long/, said);
      assert.equal(said.split("```").length, 3);
      assert.match(said, /^\*\*OCP [a-z]+\*\*\n/);
    }
  });
}

test("the login has the same words everywhere", () => {
  const [show, health] = SHOWN.health;
  const words = new Map([[null, "not known yet"], [true, "logged in"], [false, "not logged in"]]);
  for (const [ok, login] of words) {
    assert.match(show({ ...health, auth: { ok } }), new RegExp(`^Login +${login}$`, "m"));
  }
});

test("the list of settings is whole, and may be longer", () => {
  const names = Array.from({ length: 24 }, (_, at) => `setting${at}`);
  const shown = showSettings(Object.fromEntries(names.map((name) => [name, SETTING])));
  for (const name of names) assert.match(shown, new RegExp(`\\b${name}\\b`));
  assert.ok(shown.length <= MOST_CHARS);
});

test("complaints and typed names are in code spans", async () => {
  const foul = "<b>x</b> `y` @everyone";
  for (const words of ["settings", "keys revoke", "", "settings timeout"]) {
    const args = `${words} ${foul}`;
    const client = proxy({ "GET /settings": { timeout: SETTING },
      "PATCH /settings": { results: { timeout: { error: `no: ${foul}` } }, current: {} },
      [`DELETE /api/keys/${encodeURIComponent(foul)}`]: { revoked: false } });
    const said = await say(args, client);
    assert.doesNotMatch(outside(said), /[<@]/, said);
  }
  const broken = proxy({ "GET /status": new TypeError(foul) });
  assert.doesNotMatch(outside(await say(undefined, broken)), /[<@]/);
});

test("settings that make no sense are an answer, too", async () => {
  const said = await answer({}, () => { throw new Error("proxyUrl is no address"); });
  assert.equal(said, "OCP's plugin failed: `proxyUrl is no address`");
});

test("an unknown command is answered with the way to the list", async () => {
  assert.equal(await say("dance", proxy()), "There is no `/ocp dance`. See `/ocp help`.");
});

test("what the proxy complains of is the answer", async () => {
  const client = proxy({ "GET /status": new ProxyError("No OCP proxy answers at http://x.") });
  assert.equal(await say(undefined, client), "No OCP proxy answers at http://x.");
});

test("usage shows limits as bars and says what is not known", () => {
  const unknown = { utilization: null, percent: null };
  const usage = {
    plan: { currentSession: { utilization: 0.21, percent: "21%", resetsIn: "3h 12m" },
      weeklyLimits: { allModels: unknown, opus: unknown }, extraUsage: { state: "off" } },
    proxy: { uptime: "1h 3m", totalRequests: 18 },
    models: { "claude-sonnet-5": { requests: 18, errors: 0, avgElapsed: 20_000 } },
  };
  assert.equal(showUsage(usage), ["**OCP usage**", "```", "Session  [##........] 21%  3h 12m", "",
    "Model     Reqs  Err    Avg", "sonnet-5    18    0  20.0s", "", "Extra usage: off",
    "Up 1h 3m, 18 requests", "```"].join("\n"));
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
  const direct = await say("keys add My phone", client, DIRECT);
  assert.match(direct, /ocp_secret/);
  assert.match(direct, /For `My phone`/);
  const group = await say("keys add My phone", client, { from: "telegram:group:-100" });
  assert.doesNotMatch(group, /ocp_secret/);
  assert.equal(client.asked.length, 1);
});

test("groups, channels and threads are not private, and neither is what is not known", () => {
  const main = { sessionKey: "agent:main:main" };
  for (const ctx of [
    { ...DIRECT, ...main, from: "telegram:group:-1" }, { ...DIRECT, ...main, from: "telegram:-1" },
    { ...DIRECT, to: "discord:channel:9" }, { from: "discord:channel:9", ...main },
    { ...DIRECT, sessionKey: "agent:main:slack:channel:c1:thread:5" },
    { ...DIRECT, from: "1203@g.us", ...main }, { from: "x:9", channel: "x", senderId: "7" }, {},
  ]) {
    assert.equal(isPrivate(ctx), false, JSON.stringify(ctx));
  }
  for (const ctx of [
    DIRECT, { from: "discord:42", ...main }, { gatewayClientScopes: ["operator.admin"] },
    { sessionKey: "agent:main:slack:direct:u1" }, { sessionKey: "agent:main:telegram:dm:42" },
  ]) {
    assert.equal(isPrivate(ctx), true, JSON.stringify(ctx));
  }
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
  assert.equal(await say("settings timeout 7", client), "`timeout` is now `7 ms`");
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
