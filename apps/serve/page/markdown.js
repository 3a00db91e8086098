// Markdown to DOM nodes. Nothing is ever parsed as HTML: every character of the source ends in a
// text node, and only this file decides which elements stand around it.
//
// All text keeps its place in the source, so that `paint(from, to)` can colour it by who wrote it.

const DEEPEST = 10; // lists in quotes in lists: what is deeper stays as it was written
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const SEPARATOR = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const ESCAPED = /[!-/:-@[-`{-~]/;
const ADDRESS = /^https?:\/\/[^\s<>"'`*]+/;
const TARGET = /^\s*(\S+)(?:\s+"[^"]*")?\s*$/;
const SAFE = new Set(["http:", "https:", "mailto:"]);

// A line is {from, text}: `text` stands in the source at `from`.
export function linesOf(source) {
  const lines = [];
  let from = 0;
  for (const text of source.split("\n")) {
    lines.push({ from, text });
    from += text.length + 1;
  }
  return lines;
}

const behind = (line, count) => ({ from: line.from + count, text: line.text.slice(count) });
const blank = (line) => !line.text.trim();

// Return the blocks of lines: {kind, lines, ...}. Half-written ones count as whole.
export function blocksOf(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const start = at, text = lines[at].text;
    let found;
    if (blank(lines[at])) {
      at += 1;
      continue;
    } else if ((found = FENCE.exec(text))) {
      const closing = new RegExp(`^ {0,3}${found[1][0]}{${found[1].length},}[ \\t]*$`);
      at += 1;
      while (at < lines.length && !closing.test(lines[at].text)) at += 1;
      blocks.push({ kind: "code", language: found[2].trim(), inner: lines.slice(start + 1, at) });
      at += 1;
    } else if ((found = HEADING.exec(text))) {
      const line = behind(lines[at], found[0].length);
      line.text = line.text.replace(/[ \t]+#+[ \t]*$/, "");
      blocks.push({ kind: "heading", level: found[1].length, inner: [line] });
      at += 1;
    } else if (RULE.test(text)) {
      blocks.push({ kind: "rule" });
      at += 1;
    } else if (QUOTE.test(text)) {
      const inner = [];
      while (at < lines.length && (found = QUOTE.exec(lines[at].text))) {
        inner.push(behind(lines[at], found[0].length));
        at += 1;
      }
      blocks.push({ kind: "quote", inner });
    } else if (ITEM.test(text)) {
      at = takeList(lines, at, blocks);
    } else if (text.includes("|") && at + 1 < lines.length && SEPARATOR.test(lines[at + 1].text)) {
      const rows = [lines[at]];
      at += 2;
      while (at < lines.length && lines[at].text.includes("|")) rows.push(lines[at++]);
      blocks.push({ kind: "table", rows });
    } else {
      at += 1;
      while (at < lines.length && !blank(lines[at]) && !interrupts(lines[at].text)) at += 1;
      blocks.push({ kind: "paragraph", inner: lines.slice(start, at) });
    }
    blocks.at(-1).lines = lines.slice(start, at);
  }
  return blocks;
}

function interrupts(text) {
  return FENCE.test(text) || HEADING.test(text) || QUOTE.test(text) || RULE.test(text)
    || ITEM.test(text);
}

// Take a list that begins at a line; return the line behind it.
function takeList(lines, at, blocks) {
  const mark = ITEM.exec(lines[at].text)[2], ordered = /\d/.test(mark);
  const items = [];
  let width = 0;
  for (; at < lines.length; at += 1) {
    const line = lines[at], indent = line.text.length - line.text.trimStart().length;
    const found = ITEM.exec(line.text);
    if (items.length && indent >= width && !blank(line)) {
      items.at(-1).push(behind(line, width));
    } else if (found && /\d/.test(found[2]) === ordered && !RULE.test(line.text)) {
      width = Math.max(2, found[0].length > 6 ? found[1].length + 2 : found[0].length);
      items.push([behind(line, Math.min(found[0].length, line.text.length))]);
    } else if (blank(line)) {
      const next = lines[at + 1];
      if (!next || blank(next)) break;
      const goesOn = next.text.length - next.text.trimStart().length >= width;
      const other = ITEM.exec(next.text);
      if (!goesOn && !(other && /\d/.test(other[2]) === ordered)) break;
      items.at(-1).push(line);
    } else if (found || interrupts(line.text) || blank(lines[at - 1])) {
      break;
    } else {
      items.at(-1).push(line); // a paragraph that goes on without its indent
    }
  }
  blocks.push({ kind: "list", ordered, first: ordered ? Number.parseInt(mark, 10) : 1, items });
  return at;
}

function element(name, style) {
  const made = document.createElement(name);
  if (style) made.className = style;
  return made;
}

// Append a block as an element. `paint(parent, from, to)` appends the source between two places.
export function renderBlock(parent, block, paint, depth = 0) {
  if (block.kind === "rule") {
    parent.append(element("hr"));
  } else if (block.kind === "code") {
    renderCode(parent, block, paint);
  } else if (block.kind === "heading") {
    inline(parent.appendChild(element(`h${Math.min(6, block.level + 2)}`)), block.inner, paint);
  } else if (block.kind === "quote") {
    renderBlocks(parent.appendChild(element("blockquote")), block.inner, paint, depth + 1);
  } else if (block.kind === "list") {
    const list = parent.appendChild(element(block.ordered ? "ol" : "ul"));
    if (block.first !== 1) list.start = block.first;
    for (const item of block.items) renderItem(list, item, paint, depth);
  } else if (block.kind === "table") {
    renderTable(parent, block.rows, paint);
  } else {
    inline(parent.appendChild(element("p")), block.inner, paint);
  }
}

export function renderBlocks(parent, lines, paint, depth = 0) {
  if (depth > DEEPEST) {
    inline(parent.appendChild(element("p")), lines, paint);
    return;
  }
  for (const block of blocksOf(lines)) renderBlock(parent, block, paint, depth);
}

function renderItem(list, lines, paint, depth) {
  const item = list.appendChild(element("li"));
  const tight = !lines.some(blank);
  if (depth >= DEEPEST) {
    inline(item, lines, paint);
    return;
  }
  for (const block of blocksOf(lines)) {
    if (tight && block.kind === "paragraph") inline(item, block.inner, paint);
    else renderBlock(item, block, paint, depth + 1);
  }
}

function renderCode(parent, block, paint) {
  const box = parent.appendChild(element("div", "code"));
  const bar = box.appendChild(element("div", "bar"));
  bar.appendChild(element("span")).textContent = block.language;
  const copy = bar.appendChild(element("button", "copy"));
  copy.type = "button";
  copy.textContent = "Copy";
  const code = box.appendChild(element("pre")).appendChild(element("code"));
  block.inner.forEach((line, number) => {
    const last = number === block.inner.length - 1;
    paint(code, line.from, line.from + line.text.length);
    if (!last) code.append("\n");
  });
}

function renderTable(parent, rows, paint) {
  const table = parent.appendChild(element("div", "scroll")).appendChild(element("table"));
  rows.forEach((row, number) => {
    const line = table.appendChild(element("tr"));
    for (const cell of cellsOf(row)) {
      inline(line.appendChild(element(number ? "td" : "th")), [cell], paint);
    }
  });
}

function cellsOf(line) {
  const cells = [];
  let from = 0;
  for (let at = 0; at <= line.text.length; at += 1) {
    if (at < line.text.length && (line.text[at] !== "|" || line.text[at - 1] === "\\")) continue;
    const text = line.text.slice(from, at), lead = text.length - text.trimStart().length;
    const outside = (from === 0 || at === line.text.length) && !text.trim();
    if (!outside) cells.push({ from: line.from + from + lead, text: text.trim() });
    from = at + 1;
  }
  return cells;
}

// Append lines with their inline marks; a line's end is a line break, as the model wrote it.
function inline(parent, lines, paint) {
  let text = "";
  const places = []; // of every character in the source
  lines.forEach((line, number) => {
    if (number) {
      text += "\n";
      places.push(line.from - 1);
    }
    const shown = number ? line.text.trimStart() : line.text;
    const cut = line.text.length - shown.length;
    for (let at = 0; at < shown.length; at += 1) places.push(line.from + cut + at);
    text += shown;
  });
  new Inline(text, places, paint).run(parent, 0, text.length, 0);
}

class Inline {
  constructor(text, places, paint) {
    this.text = text;
    this.places = places;
    this.paint = paint;
    this.missing = new Map(); // marks that do not come again before a place: never searched twice
  }

  // Append the text between two places with its marks.
  run(parent, from, to, depth) {
    let plain = from, at = from;
    const flush = (end) => {
      if (end > plain) this.write(parent, plain, end);
    };
    while (at < to) {
      const found = depth < DEEPEST && this.mark(at, to, from);
      if (!found) {
        at += 1;
        continue;
      }
      flush(at);
      if (found.name === "br") {
        parent.append(document.createElement("br"));
      } else if (found.name === "escape") {
        this.write(parent, at + 1, at + 2);
      } else {
        const made = parent.appendChild(document.createElement(found.name));
        if (found.href) {
          made.href = found.href;
          made.title = found.href;
          made.target = "_blank";
          made.rel = "noopener noreferrer nofollow";
        }
        if (found.raw) this.write(made, found.from, found.to);
        else this.run(made, found.from, found.to, depth + 1);
      }
      at = plain = found.end;
    }
    flush(to);
  }

  // Append characters that stand next to each other here, but perhaps not in the source.
  write(parent, from, to) {
    let start = from;
    for (let at = from + 1; at <= to; at += 1) {
      if (at < to && this.places[at] === this.places[at - 1] + 1) continue;
      this.paint(parent, this.places[start], this.places[at - 1] + 1);
      start = at;
    }
  }

  // Return the mark that begins at a place: {name, from, to, end}, or null.
  mark(at, to, from) {
    const text = this.text, here = text[at];
    if (here === "\n") return { name: "br", end: at + 1 };
    if (here === "\\" && at + 1 < to && ESCAPED.test(text[at + 1])) {
      return { name: "escape", end: at + 2 };
    }
    if (here === "`") return this.code(at, to);
    if (here === "*" || here === "_" || here === "~") return this.emphasis(at, to, from);
    if (here === "[") return this.link(at, to);
    if (here === "h" && !/\w/.test(text[at - 1] ?? " ")) return this.address(at, to);
    return null;
  }

  code(at, to) {
    const ticks = /^`+/.exec(this.text.slice(at, Math.min(to, at + 64)))[0];
    const end = this.find(ticks, at + ticks.length, to);
    if (end < 0) return null;
    return { name: "code", raw: true, from: at + ticks.length, to: end, end: end + ticks.length };
  }

  emphasis(at, to, from) {
    const text = this.text, one = text[at];
    const double = text[at + 1] === one;
    if (one === "~" && !double) return null;
    const mark = double ? one + one : one, start = at + mark.length;
    if (start >= to || /\s/.test(text[start])) return null;
    if (one === "_" && at > from && /\w/.test(text[at - 1])) return null;
    const end = this.closing(mark, start, to);
    if (end < 0) return null;
    const name = one === "~" ? "del" : double ? "strong" : "em";
    return { name, from: start, to: end, end: end + mark.length };
  }

  // Return where a mark closes, not directly at `start`, or -1.
  closing(mark, start, to) {
    const text = this.text, none = `${mark}${to}`;
    if (start >= (this.missing.get(none) ?? Infinity)) return -1;
    let end = this.find(mark, start + 1, to);
    while (end >= 0) {
      const behind = text[end + mark.length] ?? " ";
      const doubled = mark.length === 1 && behind === mark;
      const inWord = mark[0] === "_" && /\w/.test(behind);
      if (!doubled && !inWord && !/\s/.test(text[end - 1])) return end;
      end = this.find(mark, end + (doubled ? 2 : 1), to);
    }
    this.missing.set(none, start);
    return -1;
  }

  link(at, to) {
    if (this.text[at - 1] === "!") return null; // an image would load from elsewhere
    const middle = this.find("](", at + 1, to);
    if (middle < 0 || this.text.slice(at + 1, middle).includes("[")) return null;
    const end = this.find(")", middle + 2, to);
    const written = end < 0 ? null : TARGET.exec(this.text.slice(middle + 2, end));
    const href = written && safe(written[1]);
    return href && { name: "a", href, from: at + 1, to: middle, end: end + 1 };
  }

  address(at, to) {
    const found = ADDRESS.exec(this.text.slice(at, Math.min(to, at + 2048)));
    const written = found?.[0].replace(/[.,;:!?)\]]+$/, "");
    const href = written && safe(written);
    const end = at + (written?.length ?? 0);
    return href ? { name: "a", href, raw: true, from: at, to: end, end } : null;
  }

  find(mark, from, to) {
    if (from >= (this.missing.get(mark) ?? Infinity)) return -1;
    const end = this.text.indexOf(mark, from);
    if (end < 0) this.missing.set(mark, from);
    return end >= 0 && end + mark.length <= to ? end : -1;
  }
}

// Return an address that a link may have, or null.
function safe(written) {
  try {
    const url = new URL(written);
    return SAFE.has(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}
