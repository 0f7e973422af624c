// Text of a model as page elements: code, headings, lists, bold, italic. Builds nodes and sets their text, so that
// nothing a model writes can become an element, an address or a script. Knows no page.

const FENCE = /^ {0,3}(```|~~~)\s*([\w+-]*)\s*$/;
const HEADING = /^(#{1,4})\s+(.*)$/;
const BULLET = /^\s*[-*+]\s+(.*)$/;
const NUMBERED = /^\s*(\d{1,3})[.)]\s+(.*)$/;
const INLINE = /(`+)([^`]|[^`].*?[^`])\1(?!`)|\*\*(\S(?:.*?\S)?)\*\*|\*(\S(?:.*?\S)?)\*/;

export function render(text) {
  const out = document.createDocumentFragment();
  const lines = text.split("\n");
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) at += 1;
    else if (FENCE.test(line)) at = code(lines, at, out);
    else if (HEADING.test(line)) at = heading(lines, at, out);
    else if (BULLET.test(line)) at = list(lines, at, out, BULLET, "ul");
    else if (NUMBERED.test(line)) at = list(lines, at, out, NUMBERED, "ol");
    else at = paragraph(lines, at, out);
  }
  return out;
}

function code(lines, start, out) {
  const fence = FENCE.exec(lines[start])[1];
  let end = start + 1;
  while (end < lines.length && lines[end].trim() !== fence) end += 1;
  const block = document.createElement("pre");
  const inner = document.createElement("code");
  inner.textContent = lines.slice(start + 1, end).join("\n");
  block.append(inner);
  out.append(block);
  return end + 1;
}

function heading(lines, at, out) {
  const [, marks, text] = HEADING.exec(lines[at]);
  const node = document.createElement(`h${marks.length + 2}`);
  inline(text, node);
  out.append(node);
  return at + 1;
}

function list(lines, start, out, pattern, kind) {
  const node = document.createElement(kind);
  let at = start;
  if (kind === "ol") node.start = Number(pattern.exec(lines[start])[1]);
  for (; at < lines.length && pattern.test(lines[at]); at += 1) {
    const item = document.createElement("li");
    inline(pattern.exec(lines[at]).at(-1), item);
    node.append(item);
  }
  out.append(node);
  return at;
}

function paragraph(lines, start, out) {
  const node = document.createElement("p");
  let at = start;
  const begins = (line) => [FENCE, HEADING, BULLET, NUMBERED].some((pattern) => pattern.test(line));
  for (; at < lines.length && lines[at].trim() && (at === start || !begins(lines[at])); at += 1) {
    if (at > start) node.append(document.createElement("br"));
    inline(lines[at], node);
  }
  out.append(node);
  return at;
}

function inline(text, parent) {
  let rest = text;
  for (let found = INLINE.exec(rest); found; found = INLINE.exec(rest)) {
    parent.append(rest.slice(0, found.index));
    const [all, ticks, inCode, bold, italic] = found;
    const node = document.createElement(ticks ? "code" : bold ? "strong" : "em");
    if (ticks) node.textContent = inCode;
    else inline(bold ?? italic, node);
    parent.append(node);
    rest = rest.slice(found.index + all.length);
  }
  parent.append(rest);
}
