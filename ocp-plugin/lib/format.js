/**
 * Formats answers in Markdown for Telegram and Discord: a line in bold, and below it a fence with
 * columns. Discord cuts a message at 2,000 characters or 17 lines. Text that is not from this
 * plugin is always inside a fence or a code span, where no markup and no mention works.
 */

export const MOST_CHARS = 1800;
/** Including title and fence. */
export const MOST_LINES = 15;
const CUT = "...";
const FENCE = "```";

/** Invisible characters, which may end a line or change the direction of text. */
const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069]+/g;

/** Return text that stays on its line and inside its fence, at most `width` long. */
export function clip(value, width) {
  const text = String(value ?? "").replace(INVISIBLE, " ").replaceAll("`", "'").trim();
  const cut = text.length > width ? text.slice(0, Math.max(0, width - CUT.length)) + CUT : text;
  // Telegram refuses a message with half of a surrogate pair.
  return cut.toWellFormed();
}

/** Return the same as a code span. An empty one would be two bare backticks. */
export function code(value, width) {
  return `\`${clip(value, width) || "-"}\``;
}

/** Return text in lines of at most `width` characters, cut between words. */
export function wrap(text, width) {
  const lines = [];
  for (const word of clip(text, 400).split(" ")) {
    const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
    if (lines.length && longer.length <= width) lines[lines.length - 1] = longer;
    else lines.push(clip(word, width));
  }
  return lines;
}

const NUMBER = /^-?\d+(\.\d+)?(%|ms|[smhkM])?$/;

/** Return rows of cells as aligned lines. Columns of numbers are aligned right. */
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

/** Return lines in a fence, with a count in the place of those beyond `most`. */
export function fence(lines, most) {
  const shown = lines.length > most
    ? [...lines.slice(0, most - 1), `... and ${lines.length - most + 1} more`] : lines;
  return [FENCE, ...shown.map((line) => line.replaceAll("`", "'")), FENCE].join("\n");
}

/** Return a whole answer, cut if it would be too long, with its fence closed. */
export function page(title, lines, after = "", most = MOST_LINES) {
  const tail = after ? `\n${after}` : "";
  // The title, both ends of the fence and what follows need lines, too.
  let room = Math.min(lines.length, most - (after ? 4 : 3));
  const build = () => `**${title}**\n${fence(lines, room)}${tail}`;
  while (room > 1 && build().length > MOST_CHARS) room -= 1;
  return build();
}

/** Return a share from 0 to 1 as a bar of ten characters. */
export function bar(share) {
  const filled = Math.round(Math.min(1, Math.max(0, share)) * 10);
  return `[${"#".repeat(filled)}${".".repeat(10 - filled)}]`;
}

/** Return milliseconds in a unit for people. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "-";
  if (ms < 1000) return `${Math.round(ms)}ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)}s`;
  return ms < 3_600_000 ? `${Math.round(ms / 60_000)}m` : `${(ms / 3_600_000).toFixed(1)}h`;
}

/** Return a number of tokens, short. */
export function tokens(count) {
  if (count >= 1_000_000) return `${Number((count / 1_000_000).toFixed(1))}M`;
  return count >= 1000 ? `${Math.round(count / 1000)}k` : String(count);
}

/** Return how long ago an ISO time was. */
export function age(iso, nowMs) {
  const seconds = Math.max(0, (nowMs - Date.parse(iso ?? "")) / 1000);
  if (Number.isNaN(seconds)) return "never";
  const [size, unit] = [[86_400, "d"], [3600, "h"], [60, "m"], [1, "s"]]
    .find(([span]) => seconds >= span) ?? [1, "s"];
  return `${Math.floor(seconds / size)}${unit}`;
}

/** Return a count with its noun, in the plural where it needs one. */
export function counted(count, noun) {
  return `${Number(count)} ${noun}${Number(count) === 1 ? "" : "s"}`;
}
