import assert from "node:assert/strict";
import { test } from "node:test";

import { createClient, isOcpHealth } from "../lib/client.js";

const SETTINGS = { url: "http://127.0.0.1:3456", adminKey: "admin" };

/** A client whose proxy answers so, and what it was asked. */
function asking(status, text, key = SETTINGS.adminKey) {
  const asked = [];
  const fetch = async (url, options) => {
    asked.push({ url, ...options });
    if (text instanceof Error) throw text;
    return new Response(text, { status });
  };
  return { asked, client: createClient(SETTINGS, key, fetch) };
}

test("a request carries the key and follows nobody elsewhere", async () => {
  const { asked, client } = asking(200, '{"a": 1}');
  assert.deepEqual(await client.patch("/settings", { x: 1 }), { a: 1 });
  const [{ url, method, headers, body, redirect }] = asked;
  assert.deepEqual([url, method, body, redirect],
    ["http://127.0.0.1:3456/settings", "PATCH", '{"x":1}', "error"]);
  assert.equal(headers.authorization, "Bearer admin");
  const without = asking(200, "{}", null);
  await without.client.get("/health");
  assert.equal("authorization" in without.asked[0].headers, false);
});

const GONE = new TypeError("fetch failed", { cause: { code: "ECONNREFUSED" } });
const SAYINGS = {
  "a proxy that is not there": [0, GONE,
    /^No OCP proxy answers at `http:\/\/127.0.0.1:3456` \(`ECONNREFUSED`\)\.$/],
  "something else": [200, "<b>hello</b>", /is not an OCP proxy: it answered 200/],
  "a refusal": [409, '{"error": {"message": "<b>a</b> `b`"}}', /^The proxy says: `<b>a<\/b> 'b'`$/],
  "several complaints": [400, '{"errors": ["a", "b"]}', /^The proxy says: `a; b`$/],
  "no words": [500, "{}", /^The proxy answered 500\.$/],
  "errors of another shape": [500, '{"errors": {"a": 1}}', /^The proxy answered 500\.$/],
  "a key that is refused": [403, "{}", /does not accept this admin key/],
};
for (const [name, [status, text, wanted]] of Object.entries(SAYINGS)) {
  test(`${name} is a sentence`, async () => {
    await assert.rejects(asking(status, text).client.get("/x"), { message: wanted });
  });
}

test("an answer that breaks off is one that did not come", async () => {
  const fetch = async () => ({ status: 200, ok: true,
    text: async () => { throw new DOMException("x", "TimeoutError"); } });
  await assert.rejects(createClient(SETTINGS, null, fetch).get("/x"), /`TimeoutError`/);
});

test("without a key the advice is to set one", async () => {
  await assert.rejects(asking(401, "{}", null).client.get("/x"),
    /config set plugins.entries.ocp.config.adminKey KEY`/);
});

test("settings of which some were refused are an answer", async () => {
  const answer = await asking(400, '{"results": {}}').client.patch("/settings", {});
  assert.deepEqual(answer, { results: {} });
});

test("only what says what a proxy says is one", () => {
  assert.equal(isOcpHealth({ authMode: "none", claudeBinaryOk: true, version: "1" }), true);
  for (const body of [null, "x", {}, [], { status: "ok", version: "1" }]) {
    assert.equal(isOcpHealth(body), false);
  }
});
