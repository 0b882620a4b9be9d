/**
 * Keeps the proxy running while the gateway does.
 *
 * A healthy proxy that runs already is adopted: it is watched, and never stopped. A proxy that was
 * started here is started again when it ends, after a growing delay, and ends with the gateway.
 *
 * This is not OpenClaw's localService, which starts the server at the first request instead of
 * with the gateway, starts one in each OpenClaw process, and passes OpenClaw's whole environment.
 */
import { execFile, spawn } from "node:child_process";
import { dirname, join } from "node:path";

import { createClient, isOcpHealth } from "./client.js";
import { clip, code } from "./format.js";

// ==== 1. Starting ============================================================

const CHECK_MS = 15_000;
const STARTING_CHECK_MS = 250;
const PROBE_TIMEOUT_MS = 3000;
const START_TIMEOUT_MS = 30_000;
const MOST_DELAY_MS = 60_000;
/** After this time a proxy counts as steady, and is restarted as quickly as the first time. */
const STEADY_MS = 60_000;
/** An adopted proxy may be away for this time, for instance while it is restarted. */
const ABSENCE_MS = 10_000;
const STOP_TIMEOUT_MS = 10_000;
const MOST_ERROR_CHARS = 2000;
const LAST_WORDS_MS = 500;

/** What the proxy needs of the gateway's environment, which contains OpenClaw's secrets. */
const KEPT_NAMES = new Set([
  "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR", "DBUS_SESSION_BUS_ADDRESS",
  "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
  "NODE_EXTRA_CA_CERTS",
]);
const KEPT_PREFIXES = ["LC_", "XDG_", "SSL_CERT_", "CLAUDE_", "OCP_", "PROXY_"];

function isKept(name) {
  return KEPT_NAMES.has(name) || KEPT_PREFIXES.some((prefix) => name.startsWith(prefix));
}

function keptEnv(env) {
  return Object.fromEntries(Object.entries(env).filter(([name]) => isKept(name)));
}

/** Return the environment of a proxy that is started. */
export function childEnv(settings, env) {
  return {
    ...keptEnv(env),
    CLAUDE_PROXY_PORT: String(settings.port),
    CLAUDE_BIND: settings.host,
  };
}

/** Start a proxy; return its pid, whenEnded (a promise of the reason) and end(signal). */
export function startChild(settings, env = process.env) {
  const [program, ...args] = settings.command;
  const child = spawn(program, args, {
    env: childEnv(settings, env), stdio: ["ignore", "ignore", "pipe"] });
  let said = "";
  child.stderr.setEncoding("utf8").on("data", (piece) => {
    said = (said + piece).slice(-MOST_ERROR_CHARS);
  });
  const whenEnded = new Promise((resolve) => {
    const end = (code, signal) => {
      const last = said.trim().split("\n").at(-1);
      resolve(`ended with ${signal ?? code}${last ? `: ${clip(last, 300)}` : ""}`);
    };
    child.once("error", (error) => resolve(`could not be started: ${clip(error.message, 300)}`));
    child.once("close", end);
    // Its last output may be on its way, but a child of its own may hold the pipe for ever.
    child.once("exit", (...how) => setTimeout(end, LAST_WORDS_MS, ...how));
  });
  return { pid: child.pid, whenEnded, end: (signal) => child.kill(signal) };
}

/** Return "ocp", "other" (another program), "silent" (it does not answer) or "down". */
export async function probe(settings, fetch = globalThis.fetch) {
  try {
    const response = await fetch(`${settings.url}/health`, {
      redirect: "error", signal: AbortSignal.timeout(PROBE_TIMEOUT_MS) });
    const text = await response.text();
    try {
      return isOcpHealth(JSON.parse(text)) ? "ocp" : "other";
    } catch {
      return "other";
    }
  } catch (error) {
    return error.name === "TimeoutError" ? "silent" : "down";
  }
}

/** Return how long to wait before a start after so many failures. */
export function restartDelay(firstMs, failures) {
  return Math.min(MOST_DELAY_MS, firstMs * 2 ** Math.min(failures, 16));
}

// ==== 2. The supervisor ======================================================

const WORLD = {
  probe, start: startChild, now: () => Date.now(),
  later: (run, ms) => {
    const timer = setTimeout(run, ms);
    timer.unref();
    return timer;
  },
  cancel: clearTimeout,
};

/** Return why a proxy that is down is not started here, or null if it is. */
export function reasonNotToStart(settings) {
  if (!settings.isLocal) return "it is on another machine";
  if (!settings.autoStart) {
    return settings.record?.label ? "the system's service manager runs it" : "autoStart is off";
  }
  return settings.command ? null : "no command is set that starts it";
}

class Supervisor {
  constructor(settings, log, health, world) {
    Object.assign(this, { settings, log, health, world });
    this.child = null;
    /** Resolves when the last child that was ended on purpose is gone. */
    this.ending = null;
    this.isStopped = false;
    /** Whether it has ended and may not be started again. */
    this.isGivenUp = false;
    this.failures = 0;
    /** The number of the check: the result of an earlier one comes too late. */
    this.turn = 0;
    /** Since when nothing has answered, null while something does. */
    this.downSinceMs = null;
    this.wasUp = false;
    this.said = null;
  }

  start() {
    this.look();
  }

  /** Check, and plan the next check whatever the result. */
  look() {
    this.check().catch((error) => {
      this.log.warn(`OCP: ${clip(error.message, 300)}`);
      this.again(CHECK_MS);
    });
  }

  /** End the proxy if it was started here. */
  async stop() {
    this.isStopped = true;
    this.pause();
    await this.endChild();
  }

  /** Restart the proxy if it is ours, or start it if it may be; return whether that is so. */
  async restart() {
    if (!this.child && (this.downSinceMs === null || this.whyNot(true))) return false;
    this.failures = 0;
    this.isGivenUp = false;
    this.wasUp = false;
    this.pause();
    await this.endChild();
    this.again(0);
    return true;
  }

  /** Return why a proxy that is down is not started, or null. `asked`: a user asked for it. */
  whyNot(asked = false) {
    const gaveUp = this.isGivenUp && !asked;
    return reasonNotToStart(this.settings) ?? (gaveUp ? "autoRestart is off" : null);
  }

  /** End the child on purpose, so that its end is no failure. */
  async endChild() {
    const child = this.child;
    this.child = null;
    if (child) this.ending = this.terminate(child);
    // Also when somebody else has begun to end it.
    await this.ending;
  }

  async terminate(child) {
    child.end("SIGTERM");
    const impatience = this.world.later(() => child.end("SIGKILL"), STOP_TIMEOUT_MS);
    await child.whenEnded;
    this.world.cancel(impatience);
  }

  /** Log a message once, until there is another one. */
  tell(level, text) {
    if (this.said === text) return;
    this.said = text;
    this.log[level](`OCP: ${text}`);
  }

  /** Let no check happen, also not the one that is under way. */
  pause() {
    this.turn += 1;
    this.world.cancel(this.timer);
  }

  again(ms) {
    if (this.isStopped) return;
    this.pause();
    this.timer = this.world.later(() => this.look(), ms);
  }

  async check() {
    const { turn } = this;
    const state = await this.world.probe(this.settings);
    if (turn !== this.turn) return;
    this.again({
      ocp: () => this.whenUp(), other: () => this.whenTaken(), silent: () => this.whenSilent(),
      down: () => this.whenDown(),
    }[state]());
  }

  whenUp() {
    this.downSinceMs = null;
    this.wasUp = true;
    if (this.child && this.world.now() - this.startedMs > STEADY_MS) this.failures = 0;
    this.health?.clearFailure();
    const whose = this.child ? `started, pid ${this.child.pid}` : "adopted, it runs already";
    this.tell("info", `${this.settings.url} is healthy (${whose})`);
    return CHECK_MS;
  }

  whenTaken() {
    this.fail(`${this.settings.url} is used by a program that is not an OCP proxy; free the port, `
      + "or set another one");
    return CHECK_MS;
  }

  /** Something listens, so another proxy could not. */
  whenSilent() {
    this.downSinceMs ??= this.world.now();
    if (this.child) return this.whileStarting();
    this.fail(`what listens at ${this.settings.url} does not answer`);
    return CHECK_MS;
  }

  whenDown() {
    this.downSinceMs ??= this.world.now();
    if (this.child) return this.whileStarting();
    const reason = this.whyNot();
    if (reason) {
      this.fail(`nothing answers at ${this.settings.url}, and ${reason}`);
      return CHECK_MS;
    }
    if (this.wasUp && this.world.now() - this.downSinceMs < ABSENCE_MS) return 1000;
    this.begin();
    return STARTING_CHECK_MS;
  }

  whileStarting() {
    const silentMs = this.world.now() - Math.max(this.startedMs, this.downSinceMs);
    if (silentMs < START_TIMEOUT_MS) return STARTING_CHECK_MS;
    this.fail(`the started proxy does not answer at ${this.settings.url}`);
    this.terminate(this.child);
    return CHECK_MS;
  }

  begin() {
    this.log.info(`OCP: starting ${this.settings.command.join(" ")} for ${this.settings.url}`);
    this.said = null;
    this.startedMs = this.world.now();
    const child = this.tryToStart();
    this.child = child;
    child.whenEnded.then((why) => this.whenEnded(child, why));
  }

  /** Start a child; return one that has ended already if the system refuses. */
  tryToStart() {
    try {
      return this.world.start(this.settings);
    } catch (error) {
      const why = `could not be started: ${clip(error.message, 300)}`;
      return { pid: null, whenEnded: Promise.resolve(why), end: () => {} };
    }
  }

  whenEnded(child, why) {
    if (this.child !== child) return;
    this.child = null;
    // The next check must not wait for it as for an adopted proxy.
    this.wasUp = false;
    this.fail(`the proxy ${why}`);
    if (!this.settings.autoRestart) {
      this.isGivenUp = true;
      this.again(CHECK_MS);
      return;
    }
    if (this.world.now() - this.startedMs > STEADY_MS) this.failures = 0;
    const delayMs = restartDelay(this.settings.restartDelayMs, this.failures);
    this.failures += 1;
    this.log.info(`OCP: starting it again in ${delayMs} ms`);
    this.again(delayMs);
  }

  fail(text) {
    this.tell("warn", text);
    this.health?.reportFailure(new Error(`OCP: ${text}`));
  }
}

/** Return what watches the proxy between start() and stop(). `world` is for tests. */
export function createSupervisor(settings, log, health, world = WORLD) {
  return new Supervisor(settings, log, health, world);
}

// ==== 3. /ocp restart ========================================================

const RESTART_TIMEOUT_MS = 90_000;

function runProgram(program, args) {
  return new Promise((resolve) => {
    const options = { timeout: RESTART_TIMEOUT_MS, env: keptEnv(process.env) };
    execFile(program, args, options, (error, stdout, stderr) => {
      const words = (error && stderr.trim()) || stdout.trim() || error?.message;
      resolve({ ok: !error, words });
    });
  });
}

/** Wait until the proxy answers again; return its version, or null. */
async function whenBack(settings, tries = 40) {
  for (let attempt = 0; attempt < tries; attempt += 1) {
    if (await probe(settings) === "ocp") {
      return (await createClient(settings, null).get("/health")).version;
    }
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
  return null;
}

/** Return the function of /ocp restart: by the supervisor, or by `ocp restart` if installed. */
export function createRestart(settingsOf, supervisorOf, run = runProgram) {
  return async () => {
    const settings = settingsOf();
    if (await supervisorOf()?.restart()) {
      const version = await whenBack(settings);
      return version ? `The proxy is back, version ${code(version, 20)}.`
        : `It does not answer yet at ${code(settings.url, 200)}. See \`/ocp status\` in a minute.`;
    }
    const { record } = settings;
    if (!settings.isLocal || !record?.label || !record.server_path || !record.python) {
      return `The proxy at ${code(settings.url, 200)} was not started by OpenClaw. `
        + "Restart it on its machine: `ocp restart`";
    }
    const script = join(dirname(record.server_path), "ocp.py");
    const { ok, words } = await run(record.python, [script, "restart"]);
    return `${ok ? "Restarted." : "It could not be restarted."} ${code(words, 300)}`;
  };
}
