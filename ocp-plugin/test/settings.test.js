import assert from "node:assert/strict";
import { test } from "node:test";

import { addressOf, readSettings } from "../lib/settings.js";

const HOME = "/home/ann";

function around(files = {}, env = {}) {
  return {
    env, home: HOME, script: "/opt/ocp/ocp_server.py", addresses: ["127.0.0.1", "192.168.1.5"],
    exists: (path) => path in files, read: (path) => files[path] ?? null,
  };
}

const RECORD = { label: "ocp.service", url: "http://127.0.0.1:4000", python: "/usr/bin/python3",
  server_path: "/opt/ocp/ocp_server.py" };
const INSTALLED = { [`${HOME}/.ocp/install.json`]: JSON.stringify(RECORD) };
const KEY_FILE = { [`${HOME}/.ocp/admin-key`]: "secret\n" };

test("without anything, the proxy is on this machine at its own port", () => {
  const settings = readSettings({}, around());
  assert.equal(settings.url, "http://127.0.0.1:3456");
  assert.deepEqual([settings.host, settings.port, settings.isLocal], ["127.0.0.1", 3456, true]);
  assert.equal(settings.command, null);
});

test("a proxy that listens everywhere is asked on loopback", () => {
  const settings = readSettings({ host: "0.0.0.0", port: 4001 }, around());
  assert.deepEqual([settings.url, settings.host], ["http://127.0.0.1:4001", "0.0.0.0"]);
  assert.equal(addressOf("::", 1), "http://127.0.0.1:1");
  assert.equal(addressOf("fd00::2", 1), "http://[fd00::2]:1");
});

test("the plugin's words win over the environment's, and these over the installer's", () => {
  const env = { OCP_URL: "http://10.0.0.2:9/v1/" };
  const named = readSettings({ proxyUrl: "https://a.b/" }, around(INSTALLED, env));
  assert.equal(named.url, "https://a.b");
  assert.equal(readSettings({}, around(INSTALLED, env)).url, "http://10.0.0.2:9");
  assert.equal(readSettings({}, around(INSTALLED)).url, "http://127.0.0.1:4000");
});

test("the file with the key is for this machine's proxy only", () => {
  assert.equal(readSettings({}, around(KEY_FILE)).adminKey, "secret");
  assert.equal(readSettings({ host: "192.168.1.5" }, around(KEY_FILE)).adminKey, "secret");
  assert.equal(readSettings({ host: "192.168.1.9" }, around(KEY_FILE)).adminKey, null);
  assert.equal(readSettings({ host: "evil.example", adminKeyFile: "~/k" },
    around({ [`${HOME}/k`]: "k" })).adminKey, "k");
});

test("a key in the proxy's settings file wins over the generated one", () => {
  const keyFrom = (text, env) => readSettings({}, around({ ...KEY_FILE,
    [`${HOME}/.ocp/ocp.env`]: text }, env)).adminKey;
  assert.equal(keyFrom("CLAUDE_BIND=::\nOCP_ADMIN_KEY=one\n"), "one");
  assert.equal(keyFrom("OCP_ADMIN_KEY=one\n OCP_ADMIN_KEY='t=wo' \r\n"), "t=wo");
  assert.equal(keyFrom("#OCP_ADMIN_KEY=one\nOCP_ADMIN_KEY=\n"), "secret");
  assert.equal(keyFrom("OCP_ADMIN_KEY=one", { OCP_ADMIN_KEY: "three" }), "three");
  assert.equal(readSettings({ host: "192.168.1.9" },
    around({ [`${HOME}/.ocp/ocp.env`]: "OCP_ADMIN_KEY=one" })).adminKey, null);
});

test("what the service manager runs is not started twice", () => {
  assert.equal(readSettings({}, around()).autoStart, true);
  assert.equal(readSettings({}, around(INSTALLED)).autoStart, false);
  assert.equal(readSettings({ autoStart: true }, around(INSTALLED)).autoStart, true);
});

test("the server beside the plugin is what is started", () => {
  const files = { "/opt/ocp/ocp_server.py": "" };
  assert.deepEqual(readSettings({}, around(files)).command, ["python3", "/opt/ocp/ocp_server.py"]);
  assert.deepEqual(readSettings({ command: ["/bin/x"] }, around(files)).command, ["/bin/x"]);
});

test("a record that is no JSON is as none", () => {
  const files = { [`${HOME}/.ocp/install.json`]: "{" };
  assert.equal(readSettings({}, around(files)).record, null);
});

test("an address that is none is said to be none", () => {
  for (const proxyUrl of ["localhost:3456", "ftp://a", "http://a b", "http://a/x", "http://[::1"]) {
    assert.throws(() => readSettings({ proxyUrl }, around()), /proxyUrl is not an address/);
  }
  assert.throws(() => readSettings({}, around({}, { CLAUDE_PROXY_PORT: "x" })), /is not an address/);
  assert.equal(readSettings({ proxyUrl: " https://a:1/v1/ " }, around()).url, "https://a:1");
});
