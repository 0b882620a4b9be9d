import assert from "node:assert/strict";
import { test } from "node:test";

import {
  childEnv, createRestart, createSupervisor, probe, reasonNotToStart, restartDelay, startChild,
} from "../lib/service.js";

const SETTINGS = { url: "http://127.0.0.1:3456", host: "127.0.0.1", port: 3456, isLocal: true,
  autoStart: true, autoRestart: true, restartDelayMs: 1000, command: ["ocp"], record: null };

/** Time that passes only when it is told to, and a proxy that is up when it is said to be. */
class World {
  constructor(state) {
    this.state = state;
    this.nowMs = 0;
    this.timers = new Map();
    this.children = [];
    this.said = [];
    this.failure = null;
  }

  now() { return this.nowMs; }
  async probe() {
    await this.slow;
    return this.state;
  }

  cancel(id) { this.timers.delete(id); }
  later(run, ms) {
    const id = Symbol("timer");
    this.timers.set(id, { run, atMs: this.nowMs + ms });
    return id;
  }

  start() {
    if (this.refusal) throw this.refusal;
    let ended;
    const child = { pid: this.children.length + 1, signals: [],
      whenEnded: new Promise((resolve) => { ended = resolve; }),
      end: (signal) => { child.signals.push(signal); ended(`ended with ${signal}`); },
      crash: () => ended("ended with 1") };
    this.children.push(child);
    return child;
  }

  log = { info: (text) => this.said.push(text), warn: (text) => this.said.push(text) };
  health = { reportFailure: (error) => { this.failure = error.message; },
    clearFailure: () => { this.failure = null; } };

  /** Lets the next timer fire; how long it had waited. */
  async step() {
    await settle();
    const [id, next] = [...this.timers].sort((one, other) => one[1].atMs - other[1].atMs)[0];
    const waitedMs = next.atMs - this.nowMs;
    this.timers.delete(id);
    this.nowMs = next.atMs;
    next.run();
    await settle();
    return waitedMs;
  }
}

const settle = () => new Promise((resolve) => { setImmediate(resolve); });

function begin(state, changes = {}) {
  const world = new World(state);
  const wired = { now: () => world.now(), probe: () => world.probe(), start: () => world.start(),
    later: (run, ms) => world.later(run, ms), cancel: (id) => world.cancel(id) };
  const supervisor = createSupervisor({ ...SETTINGS, ...changes }, world.log, world.health, wired);
  supervisor.start();
  return { world, supervisor };
}

test("a proxy that is down is started, and ends with the gateway", async () => {
  const { world, supervisor } = begin("down");
  await settle();
  assert.equal(world.children.length, 1);
  world.state = "ocp";
  await world.step();
  assert.match(world.said.at(-1), /healthy \(started, pid 1\)/);
  await supervisor.stop();
  assert.deepEqual(world.children[0].signals, ["SIGTERM"]);
  assert.equal(world.timers.size, 0);
});

test("a proxy that runs already is adopted, and never stopped", async () => {
  const { world, supervisor } = begin("ocp");
  await world.step();
  assert.equal(world.children.length, 0);
  assert.match(world.said[0], /adopted/);
  assert.equal(await supervisor.restart(), false);
  await supervisor.stop();
  assert.equal(world.timers.size, 0);
});

test("an adopted proxy may be away for a moment, then one is started", async () => {
  const { world } = begin("ocp");
  await settle();
  world.state = "down";
  await world.step();
  assert.equal(world.children.length, 0);
  for (let count = 0; count < 12; count += 1) await world.step();
  assert.equal(world.children.length, 1);
});

test("one that keeps on ending is started again after a growing delay", async () => {
  const { world } = begin("down");
  await settle();
  const waits = [];
  for (let count = 0; count < 4; count += 1) {
    world.children.at(-1).crash();
    await settle();
    waits.push(await world.step());
  }
  assert.deepEqual(waits, [1000, 2000, 4000, 8000]);
  assert.equal(world.failure, "OCP: the proxy ended with 1");
  assert.equal(restartDelay(1000, 40), 60_000);
});

test("without autoRestart it stays down, and says so", async () => {
  const { world } = begin("down", { autoRestart: false });
  await settle();
  world.children[0].crash();
  await settle();
  await world.step();
  await world.step();
  assert.equal(world.children.length, 1);
  assert.match(world.failure, /autoRestart is off/);
});

test("one that has been given up comes back when it is asked for", async () => {
  const { world, supervisor } = begin("down", { autoRestart: false });
  await settle();
  world.children[0].crash();
  await settle();
  assert.equal(await supervisor.restart(), true);
  assert.equal(await world.step(), 0);
  assert.equal(world.children.length, 2);
});

test("one that waits for its next start is started when it is asked for", async () => {
  const { world, supervisor } = begin("down");
  await settle();
  world.children[0].crash();
  await settle();
  assert.equal(await supervisor.restart(), true);
  assert.equal(await world.step(), 0);
  assert.equal(world.children.length, 2);
});

test("a check that was under way when it ended does not shorten the delay", async () => {
  const { world } = begin("down");
  await settle();
  let answered;
  world.slow = new Promise((resolve) => { answered = resolve; });
  await world.step();
  world.children[0].crash();
  await settle();
  answered();
  await settle();
  assert.equal(world.children.length, 1);
  world.slow = null;
  assert.equal(await world.step(), 1000);
  assert.equal(world.children.length, 2);
});

test("what cannot be started at all is tried again, ever more rarely", async () => {
  const { world } = begin("down");
  world.refusal = new Error("spawn E2BIG");
  const waits = [];
  for (let count = 0; count < 3; count += 1) waits.push(await world.step());
  assert.match(world.said.join(), /could not be started: spawn E2BIG/);
  assert.deepEqual(waits, [1000, 2000, 4000]);
  assert.equal(world.children.length, 0);
});

test("something that listens and is silent is not started over", async () => {
  const { world } = begin("silent");
  await settle();
  assert.equal(world.children.length, 0);
  assert.match(world.failure, /does not answer/);
});

test("a health report that fails does not end the watch", async () => {
  const { world } = begin("ocp");
  world.health.clearFailure = () => { throw new Error("gone"); };
  await settle();
  assert.equal(world.timers.size, 1);
  assert.match(world.said.join(), /gone/);
});

test("something else on the port is neither used nor started over", async () => {
  const { world } = begin("other");
  await settle();
  assert.equal(world.children.length, 0);
  assert.match(world.failure, /not an OCP proxy/);
});

test("/ocp restart ends what was started, and it comes back at once", async () => {
  const { world, supervisor } = begin("down");
  await settle();
  world.state = "ocp";
  await world.step();
  assert.equal(await supervisor.restart(), true);
  world.state = "down";
  assert.equal(await world.step(), 0);
  assert.equal(world.children.length, 2);
  assert.equal(world.failure, null);
});

test("one that is started but never answers is ended", async () => {
  const { world } = begin("down");
  await settle();
  for (let count = 0; count < 125 && world.children[0].signals.length === 0; count += 1) {
    await world.step();
  }
  assert.deepEqual(world.children[0].signals, ["SIGTERM"]);
  assert.equal(world.children.length, 1);
});

test("why a proxy is not started is said", () => {
  const why = (changes) => reasonNotToStart({ ...SETTINGS, ...changes });
  assert.equal(why({}), null);
  assert.match(why({ isLocal: false }), /another machine/);
  assert.match(why({ autoStart: false, record: { label: "x" } }), /service manager/);
  assert.match(why({ command: null }), /no command/);
});

test("the proxy gets none of OpenClaw's secrets", () => {
  const env = { PATH: "/bin", HOME: "/h", TELEGRAM_BOT_TOKEN: "t", OPENAI_API_KEY: "k",
    CLAUDE_TIMEOUT: "5", OPENCLAW_GATEWAY_TOKEN: "g", LC_ALL: "C" };
  assert.deepEqual(childEnv(SETTINGS, env), { PATH: "/bin", HOME: "/h", CLAUDE_TIMEOUT: "5",
    LC_ALL: "C", CLAUDE_PROXY_PORT: "3456", CLAUDE_BIND: "127.0.0.1" });
});

test("a real child is ended, and its last words are kept", async () => {
  const script = "process.stderr.write('listening\\nport is taken\\n'); process.exitCode = 3";
  const child = startChild({ ...SETTINGS, command: [process.execPath, "-e", script] });
  assert.equal(await child.whenEnded, "ended with 3: port is taken");
  const none = startChild({ ...SETTINGS, command: ["/nowhere/ocp"] });
  assert.match(await none.whenEnded, /could not be started: .*ENOENT/);
});

test("a process that the child has left behind does not hide its end", async () => {
  const command = ["sh", "-c", "sleep 20 & echo bye >&2; exit 1"];
  const child = startChild({ ...SETTINGS, command });
  assert.equal(await child.whenEnded, "ended with 1: bye");
});

test("an installed proxy is restarted by its own command", async () => {
  const record = { label: "ocp.service", python: "/py", server_path: "/opt/ocp/ocp_server.py" };
  const ran = [];
  const restart = createRestart(() => ({ ...SETTINGS, record }), () => null,
    async (...command) => { ran.push(command); return { ok: true, words: "restarted `x`" }; });
  assert.equal(await restart(), "Restarted. `restarted 'x'`");
  assert.deepEqual(ran, [["/py", ["/opt/ocp/ocp.py", "restart"]]]);
});

test("a proxy of somebody else is left alone", async () => {
  const restart = createRestart(() => ({ ...SETTINGS, isLocal: false }), () => null);
  assert.match(await restart(), /was not started by OpenClaw/);
});

test("what answers, what is silent and what is not there are told apart", async () => {
  const saying = (text) => probe(SETTINGS, async () => new Response(text));
  assert.equal(await saying('{"authMode": "none", "claudeBinaryOk": true, "version": "1"}'), "ocp");
  assert.equal(await saying('{"status": "ok"}'), "other");
  assert.equal(await saying("<html>"), "other");
  const failing = (name) => probe(SETTINGS, async () => { throw new DOMException("x", name); });
  assert.equal(await failing("TimeoutError"), "silent");
  assert.equal(await failing("NetworkError"), "down");
});
