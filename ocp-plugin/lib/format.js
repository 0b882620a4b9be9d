/**
 * Answers in Markdown that read well in Telegram and Discord: a line in bold, and below it a
 * fence with columns. In Discord a message ends at 2,000 characters or 17 lines. Whatever is not
 * written in this plugin stands in a fence or a code span, where no markup and no mention works.
 */

export const MOST_CHARS = 1800;
/** With title and fence. */
export const MOST_LINES = 15;
const CUT = "...";
const FENCE = "```";

/** Characters that are not seen, but end a line or turn the direction of what is. */
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069]+/g;

/** Text that stays on its line and inside of its fence, at most so long. */
export function clip(value, width) {
  const text = String(value ?? "").replace(UNSEEN, " ").replaceAll("`", "'").trim();
  const cut = text.length > width ? text.slice(0, Math.max(0, width - CUT.length)) + CUT : text;
  // Half of a character would make Telegram refuse the message.
  return cut.toWellFormed();
}

/** The same as a code span. An empty one would be two bare backticks. */
export function code(value, width) {
  return `\`${clip(value, width) || "-"}\``;
}

/** Text in lines of at most so many characters, cut between words. */
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
export function fence(lines, most) {
  const shown = lines.length > most
    ? [...lines.slice(0, most - 1), `... and ${lines.length - most + 1} more`] : lines;
  return [FENCE, ...shown.map((line) => line.replaceAll("`", "'")), FENCE].join("\n");
}

/** A whole answer, cut where it would be too long, with its fence closed all the same. */
export function page(title, lines, after = "", most = MOST_LINES) {
  const tail = after ? `\n${after}` : "";
  // Title, both ends of the fence, and what follows are lines, too.
  let room = Math.min(lines.length, most - (after ? 4 : 3));
  const build = () => `**${title}**\n${fence(lines, room)}${tail}`;
  while (room > 1 && build().length > MOST_CHARS) room -= 1;
  return build();
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
