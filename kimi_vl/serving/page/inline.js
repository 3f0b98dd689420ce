// The text of a Markdown block as nodes: code, strong, emphasis, deletion, links and line breaks.
import { element } from "./dom.js";

const SPECIAL = /[\\`*_~[!\n\0]/g;
const ESCAPED = /[*_`#~|]/; // not brackets: \[ and \( begin formulas
const LINK = /!?\[([^[\]\n\0]{1,300})\]\(([^\s()<>"\0]{1,2000})(?:[ \t]+"[^"\n]{0,300}")?\)/y;
const WORD = /[A-Za-z0-9]/;
const MARKS = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };
const DEEPEST = 6;

/** The nodes of a text. The work grows with its length alone, whatever is in it. */
export function inline(source) {
  return new Inline(source.replaceAll("\0", "\ufffd")).nodes(0);
}

class Inline {
  constructor(source) {
    this.source = source;
    this.code = new Map(); // where a code span begins: [its end, its text]
    this.masked = this.#mask(); // the same with NUL for code, in which no mark is looked for
  }

  #mask() {
    const runs = [...this.source.matchAll(/`+/g)];
    const following = new Map(); // positions in `runs` of runs of each length, the first last
    runs.forEach((run, at) => {
      const same = following.get(run[0].length) ?? following.set(run[0].length, []).get(run[0].length);
      same.unshift(at);
    });
    const pieces = [];
    let done = 0;
    for (let at = 0; at < runs.length; at++) {
      const { 0: marks, index } = runs[at];
      const same = following.get(marks.length);
      while (same.length && same.at(-1) <= at) same.pop();
      if (!same.length || this.source[index - 1] === "\\") continue;
      at = same.at(-1);
      const end = runs[at].index + marks.length;
      const text = this.source.slice(index + marks.length, runs[at].index).replaceAll("\n", " ");
      this.code.set(index, [end, text.replace(/^ (.*\S.*) $/, "$1")]);
      pieces.push(this.source.slice(done, index), "\0".repeat(end - index));
      done = end;
    }
    return pieces.join("") + this.source.slice(done);
  }

  nodes(from, to = this.source.length, depth = 0) {
    const found = [];
    const hopeless = new Set(); // marks that are not closed before `to`
    let plain = from;
    let at = from;
    const add = (node, next) => {
      this.#text(found, plain, at);
      if (node) found.push(node);
      plain = at = next;
    };
    while (at < to) {
      SPECIAL.lastIndex = at;
      const special = SPECIAL.exec(this.masked);
      if (!special || special.index >= to) break;
      at = special.index;
      const character = special[0];
      if (character === "\0") {
        const [end, text] = this.code.get(at);
        add(element("code", {}, text), end);
      } else if (character === "\n") {
        add(element("br"), at + 1);
      } else if (character === "\\" && ESCAPED.test(this.masked[at + 1] ?? "")) {
        add(null, at + 1);
        at += 1; // the character itself is text
      } else if (character === "[" || character === "!") {
        const link = this.#link(at, to, depth);
        if (link) add(...link);
        else at += 1;
      } else {
        const span = MARKS[character] || character === "~" ? this.#span(at, to, depth, hopeless) : null;
        if (span) add(...span);
        else while (this.masked[at] === character || at === special.index) at += 1;
      }
    }
    at = to;
    this.#text(found, plain, to);
    return found;
  }

  #text(found, from, to) {
    if (to > from) found.push(document.createTextNode(this.source.slice(from, to)));
  }

  /** Web addresses only: nothing that would run, and nothing that is loaded by itself. */
  #link(at, to, depth) {
    LINK.lastIndex = at;
    const match = LINK.exec(this.masked);
    if (!match || LINK.lastIndex > to || depth >= DEEPEST) return null;
    const href = webAddress(match[2]);
    if (!href) return null;
    const label = at + match[0].indexOf("[") + 1;
    const children = this.nodes(label, label + match[1].length, depth + 1);
    const link = element("a", { href, rel: "noopener noreferrer nofollow", target: "_blank" }, ...children);
    return [link, at + match[0].length];
  }

  #span(at, to, depth, hopeless) {
    const { source, masked } = this;
    const character = masked[at];
    const double = masked.startsWith(character.repeat(2), at);
    const mark = double ? character.repeat(2) : character;
    const inner = at + mark.length;
    if (!MARKS[mark] || depth >= DEEPEST || hopeless.has(mark)) return null;
    if (inner >= to || /\s/.test(source[inner])) return null;
    const before = at > 0 ? source[at - 1] : "";
    if (mark === "**" || mark === "~~" ? /\d/.test(before) : WORD.test(before)) return null;
    const closing = this.#closing(mark, inner, to);
    if (closing < 0) {
      hopeless.add(mark);
      return null;
    }
    return [element(MARKS[mark], {}, ...this.nodes(inner, closing, depth + 1)), closing + mark.length];
  }

  #closing(mark, from, to) {
    const { source, masked } = this;
    let at = from;
    while ((at = masked.indexOf(mark, at)) >= 0 && at < to) {
      let end = at;
      while (masked[end] === mark[0] && end < to) end += 1;
      const length = end - at;
      const fits = mark.length === 2 ? length >= 2 : length !== 2;
      const inWord = mark[0] === "_" || mark === "*" ? WORD.test(source[end] ?? "") : false;
      if (fits && at > from && !/\s/.test(source[at - 1]) && source[at - 1] !== "\\" && !inWord) return end - mark.length;
      at = end;
    }
    return -1;
  }
}

function webAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}
