/**
 * Answers in Markdown that read well in Telegram and Discord: a line in bold, and below it a
 * fence with columns. Discord's message ends at 2,000 characters and folds after 17 lines.
 */

export const MOST_CHARS = 1800;
const MOST_LINES = 15;
const CUT = "...";
const FENCE = "```";

/** Text that stays on its line and inside of its fence, at most so long. */
export function clip(value, width) {
  const text = String(value ?? "").replace(/[\u0000-\u001f\u007f\u2028\u2029]+/g, " ")
    .replaceAll("`", "'").trim();
  return text.length > width ? text.slice(0, Math.max(0, width - CUT.length)) + CUT : text;
}

const NUMBER = /^-?\d+(\.\d+)?(%|ms|[smhkM])?$/;

/** Rows of cells as aligned lines. Columns of numbers, below a heading, are aligned right. */
export function table(rows, widest = 24) {
  const cells = rows.map((row) => row.map((cell) => clip(cell, widest)));
  const columns = Math.max(0, ...cells.map((row) => row.length));
  const spans = Array.from({ length: columns }, (_, at) => ({
    width: Math.max(...cells.map((row) => (row[at] ?? "").length)),
    isNumeric: cells.length > 1 && cells.slice(1).every((row) => NUMBER.test(row[at] ?? "")),
  }));
  return cells.map((row) => row.map((cell, at) => (
    spans[at].isNumeric ? cell.padStart(spans[at].width) : cell.padEnd(spans[at].width)
  )).join("  ").trimEnd());
}

/** Lines in a fence; those that are too many are counted instead. */
export function fence(lines, most = MOST_LINES) {
  const shown = lines.length > most
    ? [...lines.slice(0, most - 1), `... and ${lines.length - most + 1} more`] : lines;
  return [FENCE, ...shown.map((line) => line.replaceAll("`", "'")), FENCE].join("\n");
}

/** A whole answer, cut where it would be too long, with its fence closed all the same. */
export function page(title, lines, after = "", most = MOST_LINES) {
  const tail = after ? `\n${after}` : "";
  const kept = [...lines];
  const build = () => (
    [`**${title}**`, kept.length ? fence(kept, most) : ""].filter(Boolean).join("\n"));
  while (kept.length && build().length + tail.length > MOST_CHARS) kept.pop();
  return build() + tail;
}

/** A share of one as a bar of ten characters. */
export function bar(share) {
  const filled = Math.round(Math.min(1, Math.max(0, share)) * 10);
  return `[${"#".repeat(filled)}${".".repeat(10 - filled)}]`;
}

/** Milliseconds in the unit that one would say. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "-";
  if (ms < 1000) return `${Math.round(ms)}ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)}s`;
  return ms < 3_600_000 ? `${Math.round(ms / 60_000)}m` : `${(ms / 3_600_000).toFixed(1)}h`;
}

/** A number of tokens, short. */
export function tokens(count) {
  if (count >= 1_000_000) return `${Number((count / 1_000_000).toFixed(1))}M`;
  return count >= 1000 ? `${Math.round(count / 1000)}k` : String(count);
}

/** How long ago an ISO time was. */
export function age(iso, nowMs) {
  const seconds = Math.max(0, (nowMs - Date.parse(iso ?? "")) / 1000);
  if (Number.isNaN(seconds)) return "never";
  const [size, unit] = [[86_400, "d"], [3600, "h"], [60, "m"], [1, "s"]]
    .find(([span]) => seconds >= span) ?? [1, "s"];
  return `${Math.floor(seconds / size)}${unit}`;
}
