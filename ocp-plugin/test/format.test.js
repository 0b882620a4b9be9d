import assert from "node:assert/strict";
import { test } from "node:test";

import {
  age, bar, clip, code, counted, duration, fence, MOST_CHARS, MOST_LINES, page, table, tokens, wrap,
} from "../lib/format.js";

test("text of others cannot leave its line or its fence", () => {
  assert.equal(clip("a```\nb\u2028c", 20), "a''' b c");
  assert.equal(clip("a\u202eb\u200fc", 20), "a b c");
  assert.equal(fence(["x ``` y"]), "```\nx ''' y\n```");
  assert.deepEqual([code("a `b`", 9), code("", 9), code(null, 9)], ["`a 'b'`", "`-`", "`-`"]);
});

test("a character that is cut in two is none any more", () => {
  assert.equal(clip("aaaa\u{1f600}bcd", 8), "aaaa\ufffd...");
});

test("long text is broken between words", () => {
  assert.deepEqual(wrap("one two three four", 9), ["one two", "three", "four"]);
  assert.deepEqual(wrap("", 9), [""]);
});

test("columns of numbers below a heading are aligned right, versions are not", () => {
  assert.deepEqual(table([["Model", "Reqs"], ["opus", 7], ["haiku", 120]]),
    ["Model  Reqs", "opus      7", "haiku   120"]);
  assert.deepEqual(table([["Proxy", "0.1.0"], ["Claude", "2.1.329"]]),
    ["Proxy   0.1.0", "Claude  2.1.329"]);
});

test("an answer is never too long, and its fence is closed", () => {
  const long = page("T", Array.from({ length: 14 }, () => "x".repeat(300)), "the end");
  assert.ok(long.length <= MOST_CHARS);
  assert.ok(long.endsWith("```\nthe end"));
});

test("lines that are too many are counted", () => {
  const many = Array.from({ length: 40 }, (_, at) => `line ${at}`);
  const lines = page("T", many, "the end").split("\n");
  assert.equal(lines.length, MOST_LINES);
  assert.equal(lines.at(-3), "... and 30 more");
  assert.match(page("T", many.map(() => "x".repeat(400))), /and 36 more/);
});

test("bars, durations, tokens and ages are short", () => {
  assert.equal(bar(0.25), "[###.......]");
  assert.equal(bar(7), "[##########]");
  assert.deepEqual([null, 12, 1500, 120_000, 5_400_000].map(duration),
    ["-", "12ms", "1.5s", "2m", "1.5h"]);
  assert.deepEqual([7, 64_000, 1_000_000].map(tokens), ["7", "64k", "1M"]);
  assert.equal(age("2026-11-20T14:00:00Z", Date.parse("2026-11-20T17:10:00Z")), "3h");
  assert.equal(age(null, 0), "never");
});

test("a count has its plural", () => {
  assert.deepEqual([0, 1, 2, "1"].map((count) => counted(count, "error")),
    ["0 errors", "1 error", "2 errors", "1 error"]);
});
