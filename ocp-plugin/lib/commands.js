/**
 * The commands of /ocp: a table at the end. A command that shows something has a pure show
 * function, from the proxy's JSON to Markdown.
 */
import { readFileSync } from "node:fs";

import { createClient, ProxyError } from "./client.js";
import { age, bar, clip, code, duration, page, table, tokens, wrap } from "./format.js";

const { version: PLUGIN_VERSION } = JSON.parse(
  readFileSync(new URL("../package.json", import.meta.url), "utf8"));

/** The command was written in a wrong way. */
class UsageError extends Error {}

// ==== 1. Reading =============================================================

function limitRow(name, limit) {
  if (!limit || limit.utilization === null) return null;
  return `${name.padEnd(8)} ${bar(limit.utilization)} ${limit.percent}`
    + (limit.resetsIn ? `  ${limit.resetsIn}` : "");
}

function planLines(plan) {
  const { allModels, ...each } = plan.weeklyLimits;
  const rows = [
    limitRow("Session", plan.currentSession), limitRow("Week", allModels),
    ...Object.entries(each).map(([model, limit]) => limitRow(`  ${clip(model, 6)}`, limit)),
  ].filter(Boolean);
  return rows.length ? rows : ["Not known yet: claude tells with an answer."];
}

export function showUsage(usage) {
  const models = Object.entries(usage.models).filter(([, each]) => each.requests > 0);
  const rows = models.map(([name, each]) => [
    name.replace(/^claude-/, ""), each.requests, each.errors, duration(each.avgElapsed)]);
  const lines = [...planLines(usage.plan)];
  if (rows.length) lines.push("", ...table([["Model", "Reqs", "Err", "Avg"], ...rows], 18));
  const extra = usage.plan.extraUsage?.state;
  lines.push("", ...(extra ? [`Extra usage: ${clip(extra, 40)}`] : []),
    clip(`Up ${usage.proxy.uptime}, ${usage.proxy.totalRequests} requests`, 60));
  return page("OCP usage", lines);
}

export function showStatus(status) {
  const { proxy, requests } = status;
  const lines = [
    ...table([
      ["Proxy", `${proxy.status}, ${proxy.version}, up ${proxy.uptime}`],
      ["Login", clip(proxy.auth, 60)],
      ["Requests", `${requests.total}, ${requests.active} active`],
      ["Errors", `${requests.errors}, ${requests.timeouts} timeouts`],
    ], 60),
    "", ...planLines(status.plan),
  ];
  const errors = status.recentErrors.map((each) => (
    `${each.time.slice(11, 19)} ${clip(each.message, 70)}`));
  return page("OCP status", errors.length ? [...lines, "", ...errors] : lines);
}

const LOGIN = new Map([[null, "not known yet"], [true, "logged in"], [false, "not logged in"]]);

export function showHealth(health) {
  const stats = health.stats;
  const login = LOGIN.get(health.auth.ok);
  const spares = Object.values(health.spares).reduce((sum, count) => sum + count, 0);
  return page("OCP health", table([
    ["Status", health.status],
    ["Version", health.version],
    ["Claude", health.claudeBinaryOk ? health.claudeVersion : "not found"],
    ["Login", login],
    ["Access", `${health.authMode}${health.tls ? ", https" : ""}`],
    ["Running", `${stats.activeRequests} of ${health.concurrency.maxConcurrent}`],
    ["Queued", `${stats.queued} of ${health.concurrency.maxQueue}`],
    ["Waiting", `${spares} spare, ${health.parked} parked`],
    ["Up", health.uptimeHuman],
  ], 40), health.fix ? `To do: ${code(health.fix, 200)}` : "");
}

export function showModels(list) {
  const rows = list.data.map((row) => [
    row.id, tokens(row.context_window), tokens(row.max_output_tokens)]);
  return page("OCP models", table([["Model", "Window", "Out"], ...rows], 28));
}

/** More lines than elsewhere: a list of names is useless when half of it is missing. */
const MOST_SETTINGS = 30;

function settingRow([name, setting]) {
  const mark = setting.source === "default" ? "" : ` (${setting.source})`;
  return [name, `${setting.value}${setting.unit ? ` ${setting.unit}` : ""}${mark}`];
}

export function showSettings(settings) {
  return page("OCP settings", table(Object.entries(settings).map(settingRow), 30),
    "Change: `/ocp settings NAME VALUE`, back: `/ocp settings NAME default`", MOST_SETTINGS);
}

export function showSetting(name, setting) {
  const range = setting.type === "number" ? `${setting.min} to ${setting.max}` : setting.type;
  return page("OCP setting", [...table([
    ["Name", name], ["Value", `${setting.value} ${setting.unit}`], ["From", setting.source],
    ["Default", `${setting.default}`], ["Takes", range], ["Variable", setting.env],
  ], 40), "", ...wrap(setting.desc, 44)]);
}

const LOG_HEAD = new Set(["ts", "level", "event"]);

function logLine(entry) {
  const rest = Object.entries(entry)
    .filter(([name, value]) => !LOG_HEAD.has(name) && name !== "request_id" && value !== null)
    .map(([name, value]) => `${name}=${typeof value === "object" ? JSON.stringify(value) : value}`);
  return clip(`${entry.ts.slice(11, 19)} ${entry.level} ${entry.event} ${rest.join(" ")}`, 150);
}

export function showLogs(logs) {
  const lines = logs.entries.map(logLine);
  return page("OCP log", lines.length ? lines : ["Nothing."]);
}

export function showSessions(list, nowMs) {
  if (list.sessions.length === 0) return "**OCP sessions**\nNone.";
  const rows = list.sessions.map((each) => [
    each.id, each.caller, each.messages, age(each.lastUsed, nowMs)]);
  return page("OCP sessions", table([["Id", "Who", "Msgs", "Ago"], ...rows], 16));
}

export function showKeys(list, nowMs) {
  if (list.keys.length === 0) return "**OCP keys**\nNone. Create one: `/ocp keys add NAME`";
  const rows = list.keys.map((key) => [
    key.name, key.keyPreview,
    key.revoked ? "revoked" : key.expired ? "expired" : age(key.lastUsed, nowMs)]);
  return page("OCP keys", table([["Name", "Key", "Used"], ...rows], 18));
}

export function showVersion(health) {
  return page("OCP version", table([
    ["Proxy", health.version], ["Claude", health.claudeVersion ?? "not found"],
    ["Plugin", PLUGIN_VERSION]], 30));
}

// ==== 2. Writing =============================================================

const SHARED = /[:_](group|channel|room|guild|thread|topic|space)s?[:_]|@g\.us|:-\d/i;
const DIRECT = /^agent:[^:]+:main$|:(direct|dm):/i;

/** Return whether nobody else reads the answer. A place that is unknown is not private. */
export function isPrivate(ctx) {
  const places = [ctx.from, ctx.to, ctx.sessionKey].filter(Boolean).join(" ");
  if (SHARED.test(places)) return false;
  // Clients of the gateway have scopes; in a private chat the sender is the place itself.
  return Boolean(ctx.gatewayClientScopes) || DIRECT.test(ctx.sessionKey ?? "")
    || Boolean(ctx.senderId) && ctx.from === `${ctx.channel}:${ctx.senderId}`;
}

async function addKey({ client, ctx }, name) {
  if (!name) throw new UsageError("keys add NAME");
  if (!isPrivate(ctx)) {
    return "A key is a secret: ask for it in a private chat with me, not here.";
  }
  const made = await client.post("/api/keys", { name });
  return page("OCP key", [made.key],
    `For ${code(made.name, 64)}. It is shown once: delete this message when the key is where it `
      + "belongs.");
}

async function revokeKey({ client }, name) {
  if (!name) throw new UsageError("keys revoke NAME");
  const { revoked } = await client.delete(`/api/keys/${encodeURIComponent(name)}`);
  return revoked ? `Revoked ${code(name, 64)}.`
    : `There is no active key ${code(name, 64)}. See \`/ocp keys\`.`;
}

const KEY_ACTS = { add: addKey, revoke: revokeKey };

async function runKeys(use, [verb, ...words]) {
  if (verb === undefined) return showKeys(await use.client.get("/api/keys"), Date.now());
  if (!Object.hasOwn(KEY_ACTS, verb)) throw new UsageError("keys [add|revoke NAME]");
  refuseReaders(use.ctx);
  return KEY_ACTS[verb](use, words.join(" "));
}

/** Return the value that was typed as the setting's type. The proxy checks its range. */
export function settingValue(word, type) {
  if (word === "default") return null;
  if (type === "number" && word.trim() !== "" && Number.isFinite(Number(word))) return Number(word);
  if (type === "boolean" && ["true", "on", "yes"].includes(word)) return true;
  if (type === "boolean" && ["false", "off", "no"].includes(word)) return false;
  return word;
}

async function runSettings({ client, ctx }, [name, ...words]) {
  const settings = await client.get("/settings");
  if (name === undefined) return showSettings(settings);
  const setting = Object.hasOwn(settings, name) ? settings[name] : null;
  if (!setting) return `There is no setting ${code(name, 40)}. See \`/ocp settings\`.`;
  if (words.length === 0) return showSetting(name, setting);
  refuseReaders(ctx);
  const value = settingValue(words.join(" "), setting.type);
  const { results, current } = await client.patch("/settings", { [name]: value });
  const { error } = results[name];
  if (error) return `Not changed: ${code(`${name} ${error}`, 240)}`;
  const now = `${current[name].value} ${current[name].unit}`;
  return `${code(name, 40)} is now ${code(now, 80)}`;
}

const CLEARED = {
  sessions: ["/sessions", "remembered conversations"],
  cache: ["/cache", "cached answers"],
};

async function runClear({ client, ctx }, [what = "sessions"]) {
  if (!Object.hasOwn(CLEARED, what)) throw new UsageError("clear [sessions|cache]");
  refuseReaders(ctx);
  const [path, noun] = CLEARED[what];
  const { cleared } = await client.delete(path);
  return `Cleared ${Number(cleared)} ${noun}.`;
}

/** Refuse a client of the gateway that may only read. Chats have no scopes. */
function refuseReaders(ctx) {
  const scopes = ctx.gatewayClientScopes;
  if (scopes && !scopes.includes("operator.admin")) {
    throw new ProxyError("This changes the proxy, and needs the scope operator.admin.");
  }
}

// ==== 3. The table ===========================================================

/** Return the function of a command that only shows the answer of a path. */
const shows = (path, show) => async ({ client }) => show(await client.get(path), Date.now());

function logQuery(words) {
  const count = words.find((word) => /^\d+$/.test(word)) ?? "8";
  const level = words.find((word) => /^[a-z]+$/i.test(word)) ?? "all";
  return `/logs?n=${encodeURIComponent(count)}&level=${encodeURIComponent(level.toLowerCase())}`;
}

const COMMANDS = [
  ["usage", "", "plan limits and requests", shows("/usage", showUsage)],
  ["status", "", "proxy, login and plan", shows("/status", showStatus)],
  ["health", "", "what everybody may know", shows("/health", showHealth)],
  ["models", "", "what it serves", shows("/v1/models", showModels)],
  ["settings", "[NAME [VALUE]]", "show or change", runSettings],
  ["logs", "[COUNT] [LEVEL]", "the newest events", async ({ client }, words) => (
    showLogs(await client.get(logQuery(words))))],
  ["sessions", "", "remembered conversations", shows("/sessions", showSessions)],
  ["clear", "[sessions|cache]", "forget them", runClear],
  ["keys", "[add|revoke NAME]", "keys of devices", runKeys],
  ["restart", "", "end and start the proxy", async ({ restart, ctx }) => {
    refuseReaders(ctx);
    return restart();
  }],
  ["version", "", "of proxy, claude and plugin", async ({ settings }) => (
    showVersion(await createClient(settings, null).get("/health")))],
  ["help", "", "this list", async () => showHelp()],
].map(([name, takes, help, run]) => ({ name, takes, help, run }));

export function showHelp() {
  const rows = COMMANDS.map((each) => [`${each.name} ${each.takes}`.trim(), each.help]);
  return page("/ocp COMMAND, none spends anything", table(rows, 28));
}

/**
 * Return the Markdown that answers a "/ocp ..." message. Never throws: OpenClaw would hide why.
 *
 * useOf   returns { settings, client, restart }; it may throw
 */
export async function answer(ctx, useOf) {
  const [name = "status", ...words] = (ctx.args ?? "").trim().split(/\s+/).filter(Boolean);
  const command = COMMANDS.find((each) => each.name === name.toLowerCase());
  if (!command) return `There is no ${code(`/ocp ${name}`, 40)}. See \`/ocp help\`.`;
  try {
    return await command.run({ ...useOf(), ctx }, words);
  } catch (error) {
    if (error instanceof UsageError) return `Usage: \`/ocp ${error.message}\``;
    if (error instanceof ProxyError) return error.message;
    return `OCP's plugin failed: ${code(error.message, 300)}`;
  }
}
