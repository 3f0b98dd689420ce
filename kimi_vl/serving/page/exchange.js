// One question and its answer.
import { button, byId, element, icon } from "./dom.js";
import { Reply } from "./reply.js";
import { shown } from "./shown.js";

export class Exchange {
  reply = null;
  settings = null; // with which it was asked
  controller = null; // of the request that writes into the reply

  /**
   * `message` has a `text`, `files` and the `form` in which the text is asked, "" for as it is; `actions` edit, again,
   * curl and python, each a function of an exchange.
   */
  constructor(message, actions) {
    Object.assign(this, message);
    this.actions = Object.fromEntries(Object.entries(actions).map(([name, act]) => [name, () => act(this)]));
    this.node = element("li", { className: "exchange" }, this.#question());
  }

  get answer() {
    return this.reply?.answer ?? "";
  }

  #question() {
    const bubble = element("div", { className: "bubble" });
    if (this.files.length) bubble.append(element("div", { className: "shown" }, ...this.files.map((file) => shown(file))));
    const form = byId("form").querySelector(`[value="${this.form}"]`);
    if (this.form) bubble.append(element("p", { className: "form" }, form.label));
    if (this.text) bubble.append(element("p", { textContent: this.text, dir: "auto" }));
    const edit = button("Edit and send again", icon("edit"), this.actions.edit);
    const actions = element("div", { className: "actions" }, edit);
    return element("article", { className: "question", "aria-label": "You" }, bubble, actions);
  }

  /** Begin a new reply; gives what brings the former one back. */
  begin(json) {
    const former = this.reply;
    this.reply = new Reply(json, this.actions);
    former?.node.remove();
    this.node.append(this.reply.node);
    return () => {
      if (!former?.answer) return;
      this.reply.node.replaceWith(former.node);
      this.reply = former;
    };
  }
}
