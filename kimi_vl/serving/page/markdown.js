// A small part of Markdown, drawn while it is being written: paragraphs, headings, lists, quotes, code, tables, rules.
//
// A line is understood as soon as its beginning tells what it is, and nothing that is finished is touched again: only
// the text that still grows is drawn anew, and plain words at its end are simply appended.
import { element } from "./dom.js";
import { inline } from "./inline.js";

const FENCE = /^([ \t]*)(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+/;
const ITEM = /^[ \t]*([-*+]|\d{1,9}[.)])[ \t]+/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}>[ \t]?/;
const TABLE_ROW = /^ {0,3}\|/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
// The beginning of a line that can still become several things.
const UNCLEAR = /^[ \t]*(?:[+>]?|\d{1,9}[.)]?|#{1,6}|`{1,2}|~{1,2}|[-*_][-*_ \t]*)[ \t]*$/;
const WAITS_FOR_ITS_END = /^[ \t]*(?:\||`{3}|~{3})/;
const INLINE = /[\\`*_~[\]()!\n]/;
const LONG = 4000; // characters from which a text that grows is shown as it is, until it is complete
const CODE_BLOCK = 4000; // characters in one block of code: what grows is laid out anew, the blocks before it are not

export class MarkdownWriter {
  #root;
  #held = ""; // the beginning of a line that is not understood yet
  #flows = false; // whether the line is understood, so that the rest of it belongs to what is open
  #open = null; // the Text or Code that grows
  #lists = []; // the open lists, outermost first: {indent, list, item}
  #head = ""; // a line that may be the head of a table
  #table = null; // {body, columns}

  constructor(root) {
    this.#root = root;
  }

  write(text) {
    const lines = text.split("\n");
    lines.forEach((piece, at) => {
      if (at) this.#endLine();
      this.#piece(piece);
    });
    this.#open?.draw();
  }

  end() {
    if (this.#held) this.#begin(this.#held, true);
    this.#held = "";
    this.#headWasText();
    this.#close();
  }

  #piece(piece) {
    if (this.#flows) {
      this.#open.add(piece);
      return;
    }
    this.#held += piece;
    if (this.#unclear(this.#held)) return;
    this.#begin(this.#held, false);
    this.#held = "";
    this.#flows = true;
  }

  #unclear(line) {
    if (this.#open instanceof Code) return /^[ \t]*(?:`*|~*)[ \t]*$/.test(line);
    return UNCLEAR.test(line) || WAITS_FOR_ITS_END.test(line) || (this.#head !== "" && /^[ \t]*[:-]/.test(line));
  }

  #endLine() {
    if (!this.#flows) this.#begin(this.#held, true);
    else if (this.#open instanceof Code) this.#open.add("\n");
    else if (this.#open.kind === "heading") this.#close();
    this.#held = "";
    this.#flows = false;
  }

  /** Understand a line by its beginning. `whole`: nothing more of it comes; else what is open takes the rest. */
  #begin(line, whole) {
    if (this.#open instanceof Code) {
      if (whole && this.#open.isClosedBy(line)) this.#close();
      else this.#open.add(this.#open.unindented(line) + (whole ? "\n" : ""));
      return;
    }
    if (this.#isOfTable(line, whole)) return;
    const indent = /^[ \t]*/.exec(line)[0].replaceAll("\t", "    ").length;
    const fence = whole && FENCE.exec(line);
    if (!line.trim()) {
      this.#close();
    } else if (whole && RULE.test(line)) {
      this.#closeAll();
      this.#root.append(element("hr"));
    } else if (fence) {
      this.#close();
      this.#open = new Code(this.#container(indent), fence);
    } else if (HEADING.test(line)) {
      this.#closeAll();
      const [mark, { length }] = HEADING.exec(line);
      this.#begun("heading", this.#root, element(`h${Math.min(6, length + 2)}`), line.slice(mark.length));
      if (whole) this.#close();
    } else if (ITEM.test(line)) {
      const [{ length }, mark] = ITEM.exec(line);
      this.#close();
      this.#begun("item", this.#newItem(indent, mark), element("span"), line.slice(length));
    } else if (QUOTE.test(line)) {
      const text = line.replace(QUOTE, "");
      if (this.#open?.kind === "quote") {
        this.#open.add(`\n${text}`);
      } else {
        this.#closeAll();
        const quote = element("blockquote");
        this.#root.append(quote);
        this.#begun("quote", quote, element("p"), text);
      }
    } else if (this.#open) {
      this.#open.add(`\n${line.trimStart()}`);
    } else {
      this.#begun("paragraph", this.#container(indent), element("p"), line.trimStart());
    }
  }

  #begun(kind, parent, node, text) {
    parent.append(node);
    this.#open = new Text(kind, node);
    this.#open.add(text);
  }

  #close() {
    this.#open?.close();
    this.#open = null;
  }

  #closeAll() {
    this.#close();
    this.#lists = [];
  }

  /** The list item that a block with this indent belongs to, or the root. */
  #container(indent) {
    while (this.#lists.length && indent <= this.#lists.at(-1).indent) this.#lists.pop();
    return this.#lists.at(-1)?.item ?? this.#root;
  }

  #newItem(indent, mark) {
    const tag = /\d/.test(mark) ? "OL" : "UL";
    while (this.#lists.length && indent < this.#lists.at(-1).indent) this.#lists.pop();
    const besides = () => this.#lists.length > 0 && indent < this.#lists.at(-1).indent + 2;
    if (besides() && this.#lists.at(-1).list.tagName !== tag) this.#lists.pop();
    if (!besides()) {
      const list = element(tag);
      if (tag === "OL") list.start = Number.parseInt(mark, 10);
      (this.#lists.at(-1)?.item ?? this.#root).append(list);
      this.#lists.push({ indent, list, item: null });
    }
    const open = this.#lists.at(-1);
    open.item = element("li");
    open.list.append(open.item);
    return open.item;
  }

  #isOfTable(line, whole) {
    const looks = whole && TABLE_ROW.test(line);
    if (this.#table) {
      if (looks) this.#table.body.append(row("td", cells(line), this.#table.columns));
      else this.#table = null;
      return looks;
    }
    if (this.#head) {
      const names = cells(this.#head);
      if (whole && TABLE_RULE.test(line) && cells(line).length === names.length) {
        this.#head = "";
        this.#closeAll();
        const body = element("tbody");
        const table = element("table", {}, element("thead", {}, row("th", names, names.length)), body);
        const scrolls = { className: "table", tabIndex: 0, role: "group", "aria-label": "Table" };
        this.#root.append(element("div", scrolls, table));
        this.#table = { body, columns: names.length };
        return true;
      }
      this.#headWasText();
    }
    if (looks) this.#head = line;
    return looks;
  }

  /** What looked like the head of a table is text after all. */
  #headWasText() {
    const text = this.#head.trim();
    this.#head = "";
    if (text && this.#open) this.#open.add(`\n${text}`);
    else if (text) this.#begun("paragraph", this.#container(0), element("p"), text);
  }
}

/** The text of one paragraph, heading or item. */
class Text {
  #node;
  #source = "";
  #shown = 0;

  constructor(kind, node) {
    this.kind = kind;
    this.#node = node;
  }

  add(text) {
    this.#source += text;
  }

  draw() {
    const added = this.#source.slice(this.#shown);
    if (!added) return;
    const last = this.#node.lastChild;
    const isPlain = this.#source.length > LONG || !INLINE.test(this.#source.charAt(this.#shown - 1) + added);
    if (last?.nodeType === Node.TEXT_NODE && isPlain) last.appendData(added);
    else this.#node.replaceChildren(...inline(this.#source));
    this.#shown = this.#source.length;
  }

  close() {
    const source = this.kind === "heading" ? this.#source.replace(/[ \t]+#+[ \t]*$/, "") : this.#source;
    this.#node.replaceChildren(...inline(source.trimEnd()));
  }
}

/** A block of code. Its text only ever grows. */
class Code {
  #text = document.createTextNode("");
  #node = element("code", {}, this.#text);
  #fence;
  #indent;

  constructor(parent, [, indent, fence, info]) {
    const language = info.trim();
    const label = language ? `Code, ${language}` : "Code";
    parent.append(element("pre", { tabIndex: 0, role: "group", "aria-label": label, "data-language": language }, this.#node));
    this.#fence = fence;
    this.#indent = new RegExp(`^[ \t]{0,${indent.length}}`);
  }

  isClosedBy(line) {
    const mark = line.trim();
    return mark.length >= this.#fence.length && mark === this.#fence[0].repeat(mark.length);
  }

  unindented(line) {
    return line.replace(this.#indent, "");
  }

  add(text) {
    if (this.#text.length > CODE_BLOCK && this.#text.data.endsWith("\n")) {
      this.#text = document.createTextNode("");
      this.#node.append(element("span", {}, this.#text));
    }
    this.#text.appendData(text);
  }

  draw() {}

  close() {}
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function row(tag, texts, columns) {
  const length = Math.max(columns, texts.length);
  return element("tr", {}, ...Array.from({ length }, (_, at) => element(tag, {}, ...inline(texts[at] ?? ""))));
}
