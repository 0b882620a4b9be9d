/** Where the proxy is, which key it accepts, and what starts it. */
import { existsSync, readFileSync } from "node:fs";
import { homedir, networkInterfaces } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const DEFAULT_PORT = 3456;
const LOOPBACK = ["127.0.0.1", "localhost", "::1"];
const EVERY_ADDRESS = ["0.0.0.0", "::"];

/** Return what the settings depend on besides the plugin's configuration; tests replace it. */
export function surroundings() {
  return {
    env: process.env,
    home: homedir(),
    script: fileURLToPath(new URL("../../ocp_server.py", import.meta.url)),
    addresses: Object.values(networkInterfaces()).flat().map((each) => each.address),
    exists: existsSync,
    read: readText,
  };
}

function readText(path) {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return null;
  }
}

/** Return the installer's record of the proxy on this machine, or null. */
function readRecord(folder, read) {
  try {
    const record = JSON.parse(read(join(folder, "install.json")) ?? "null");
    return record !== null && typeof record === "object" ? record : null;
  } catch {
    return null;
  }
}

/** Return an address without a trailing slash or /v1. Throws if it is none. */
function addressIn(text, source) {
  const url = text.trim().replace(/\/+$/, "").replace(/\/v1$/, "");
  if (!/^https?:\/\/[^/\s]+$/i.test(url) || !URL.canParse(url)) {
    throw new Error(`${source} is not an address like http://HOST:PORT`);
  }
  return url;
}

/** Return the address of a proxy that listens on `host`; for every address that is loopback. */
export function addressOf(host, port) {
  const asked = EVERY_ADDRESS.includes(host) ? "127.0.0.1" : host;
  return `http://${asked.includes(":") ? `[${asked}]` : asked}:${port}`;
}

function findUrl(config, env, record) {
  if (config.proxyUrl) return addressIn(config.proxyUrl, "proxyUrl");
  if (config.host || config.port) {
    return addressOf(config.host || "127.0.0.1", config.port || DEFAULT_PORT);
  }
  if (env.OCP_URL) return addressIn(env.OCP_URL, "OCP_URL");
  if (env.CLAUDE_PROXY_PORT) {
    return addressIn(addressOf("127.0.0.1", env.CLAUDE_PROXY_PORT), "CLAUDE_PROXY_PORT");
  }
  if (typeof record?.url === "string") return addressIn(record.url, "url in install.json");
  return addressOf("127.0.0.1", DEFAULT_PORT);
}

/** Return a variable of the proxy's settings file (its last one counts), or undefined. */
function variableIn(text, name) {
  const line = text?.match(new RegExp(`^[ \\t]*${name}=.*$`, "gm"))?.at(-1);
  return line?.slice(line.indexOf("=") + 1).trim().replace(/^(["'])(.*)\1$/, "$2");
}

/** Return the admin key, or null. The default files are for this machine's own proxy only. */
function findAdminKey(config, around, folder, isLocal) {
  if (config.adminKey) return config.adminKey;
  const named = config.adminKeyFile?.replace(/^~(?=\/)/, around.home);
  if (named) return around.read(named)?.trim() || null;
  if (!isLocal) return null;
  return around.env.OCP_ADMIN_KEY
    || variableIn(around.read(join(folder, "ocp.env")), "OCP_ADMIN_KEY")
    || around.read(join(folder, "admin-key"))?.trim() || null;
}

function findCommand(config, around) {
  if (config.command) return config.command;
  return around.exists(around.script) ? ["python3", around.script] : null;
}

/**
 * Return all settings of the plugin. Throws if one cannot be used.
 *
 * url, host, port    where the proxy is asked, and where one that is started listens
 * isLocal            whether that is this machine
 * adminKey           or null
 * models             the models to offer, [] for all
 * command            what starts the proxy, or null
 * record             the installer's record, or null
 * autoStart, autoRestart, restartDelayMs
 */
export function readSettings(config, around) {
  const folder = around.env.OCP_HOME || join(around.home, ".ocp");
  const record = readRecord(folder, around.read);
  const url = findUrl(config, around.env, record);
  const parsed = new URL(url);
  const asked = parsed.hostname.replace(/^\[|\]$/g, "");
  const isLocal = [...LOOPBACK, ...around.addresses].includes(asked);
  const isManaged = Boolean(record?.label);
  return {
    url,
    host: !config.proxyUrl && config.host ? config.host : asked,
    port: Number(parsed.port || (parsed.protocol === "https:" ? 443 : 80)),
    isLocal,
    adminKey: findAdminKey(config, around, folder, isLocal),
    models: config.models ?? [],
    command: findCommand(config, around),
    record,
    // Two programs that start a proxy would fight over its port.
    autoStart: config.autoStart ?? !isManaged,
    autoRestart: config.autoRestart ?? true,
    restartDelayMs: config.restartDelayMs ?? 1000,
  };
}
