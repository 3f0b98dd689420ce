// One answer on the page: its thinking, its text, how it ended. Shows what it is told; sends nothing.
import { copied, button, element, icon } from "./dom.js";
import { figures } from "./figures.js";
import { MarkdownWriter } from "./markdown.js";
import { places } from "./places.js";
import { taken } from "./taken.js";

// Characters of thinking after which a line begins a new paragraph, and after which a space does: what grows is laid
// out anew, the paragraphs before it are not.
const PARAGRAPH = 2000;
const LONGEST_LINE = 20_000;

export class Reply {
  thinking = "";
  answer = "";
  #shown = { thinking: 0, answer: 0 };
  #times = { began: performance.now(), first: null, answer: null };
  #userFolds = false; // the reader has folded or unfolded the thinking: it stays so
  #thinks = true;
  #growing = null; // the text node at the end of the thinking

  /** `json`: the answer is a JSON text, shown as code. `actions` are functions: edit, again, curl and python. */
  constructor(json, actions) {
    this.actions = actions;
    this.summary = element("span", { className: "label" }, "Thinking");
    this.thought = element("div", { className: "thought", dir: "auto" });
    const summary = element("summary", {}, icon("fold"), this.summary);
    summary.addEventListener("click", () => (this.#userFolds = true));
    this.details = element("details", { open: true, hidden: true }, summary, this.thought);
    this.prose = element("div", { className: "prose", dir: "auto" });
    this.code = json ? element("code") : null;
    if (json) this.prose.append(element("pre", { tabIndex: 0, role: "group", "aria-label": "JSON" }, this.code));
    this.writer = json ? null : new MarkdownWriter(this.prose);
    const dots = [element("span"), element("span"), element("span")];
    this.waiting = element("p", { className: "waiting", role: "img", "aria-label": "Waiting for the answer" }, ...dots);
    this.below = element("div", { className: "below" });
    const parts = [this.waiting, this.details, this.prose, this.below];
    this.node = element("article", { className: "answer", "aria-label": "Answer", "aria-busy": "true" }, ...parts);
  }

  get isEmpty() {
    return !this.thinking && !this.answer;
  }

  /** Take a piece; it is shown by `draw`. */
  add({ thinking, answer }) {
    if (!thinking && !answer) return;
    this.#times.first ??= performance.now();
    if (answer) this.#times.answer ??= performance.now();
    this.thinking += thinking;
    this.answer += answer;
  }

  /** Show what was added since the last time. What is there already is left as it is. */
  draw() {
    const thinking = this.thinking.slice(this.#shown.thinking);
    const answer = this.answer.slice(this.#shown.answer);
    this.#shown = { thinking: this.thinking.length, answer: this.answer.length };
    if (thinking || answer) this.waiting.hidden = true;
    if (thinking) {
      this.details.hidden = false;
      this.details.classList.toggle("live", this.#thinks);
      this.#appendThought(thinking);
      this.thought.scrollTop = this.thought.scrollHeight;
    }
    if (!answer) return;
    this.#endThinking();
    if (this.writer) this.writer.write(answer);
    else this.code.append(answer);
  }

  #appendThought(text) {
    text.split("\n").forEach((line, at) => {
      if (at && this.#growing?.length < PARAGRAPH) this.#growing.appendData("\n");
      else if (at) this.#growing = null;
      if (!this.#growing) {
        this.#growing = document.createTextNode("");
        this.thought.append(element("p", {}, this.#growing));
      }
      this.#growing.appendData(line);
      if (this.#growing.length > LONGEST_LINE && line.endsWith(" ")) this.#growing = null;
    });
  }

  #endThinking() {
    if (!this.#thinks) return;
    this.#thinks = false;
    if (!this.#userFolds) this.details.open = false;
    this.details.classList.remove("live");
    this.#tellThinking();
  }

  #tellThinking(addition = "") {
    const took = ((this.#times.answer ?? performance.now()) - this.#times.first) / 1000;
    this.summary.textContent = `Thought for ${took < 10 ? Math.max(0.1, took).toFixed(1) : Math.round(took)} s${addition}`;
  }

  #end() {
    this.draw();
    this.waiting.hidden = true;
    this.writer?.end();
    this.#endThinking();
    this.node.setAttribute("aria-busy", "false");
  }

  /**
   * The answer is complete. `end`: the finish reason, the usage and the server's extra figures, where they came. `files`
   * are those of its question, `pictures` those of its whole request.
   */
  finish({ finish, usage, extra }, files, pictures) {
    this.#end();
    if (extra?.grounding) this.#showPlaces(extra.grounding, pictures);
    this.below.append(...taken(extra?.media, files));
    if (extra?.thinking_closed_by === "budget") this.#tellThinking(", up to its budget");
    if (this.code) this.#formatJson();
    if (finish === "length") this.#note("The answer is cut off: it has as many tokens as it may. The settings can allow more.");
    else if (!this.answer) this.#note("The answer is empty.");
    this.#foot(usage && figures(usage, this.#times.began, this.#times.first, performance.now()));
  }

  #showPlaces(grounding, pictures) {
    const found = places(grounding, pictures);
    this.below.append(...found);
    if (!found.length) this.#note("The answer names no place in a picture.");
  }

  #formatJson() {
    try {
      this.code.textContent = JSON.stringify(JSON.parse(this.answer), null, 2);
    } catch {
      // Cut off: shown as it came.
    }
  }

  stopped() {
    this.#end();
    this.#note("Stopped.");
    this.#foot();
  }

  /** Show what went wrong below what has come. Gives the text and the button, for a count-down. */
  failed({ title, detail }) {
    if (this.isEmpty || this.node.ariaBusy === "true") this.#end();
    this.below.querySelector(".error")?.remove();
    const text = element("p", {}, element("strong", {}, title), " ", detail);
    const retry = element("button", { type: "button", className: "filled" }, "Try again");
    const edit = element("button", { type: "button", className: "quiet" }, "Edit the message");
    retry.addEventListener("click", this.actions.again);
    edit.addEventListener("click", this.actions.edit);
    this.below.prepend(element("div", { className: "error", role: "alert" }, text, element("div", { className: "row" }, retry, edit)));
    if (!this.below.querySelector(".actions")) this.#foot();
    return { text, retry };
  }

  #note(text) {
    this.below.append(element("p", { className: "note" }, text));
  }

  #foot(figures = "") {
    const { again, curl, python } = this.actions;
    const foot = element("div", { className: "actions" });
    if (this.answer) foot.append(button("Copy the answer", icon("copy"), (node) => copied(node, this.answer)));
    foot.append(button("Answer again", icon("again"), again));
    foot.append(button("Copy this request for curl", "curl", (node) => copied(node, curl())));
    foot.append(button("Copy this request for Python", "Python", (node) => copied(node, python())));
    if (figures) foot.append(element("p", { className: "figures", title: figures }, figures));
    this.below.append(foot);
  }
}
