// The box at the bottom: the text and files of the next message, and of an earlier one while it is edited.
import { FileError, isPicture, read, size, tooMany } from "./attachments.js";
import { announce, byId, element, icon } from "./dom.js";
import { isLarge, smaller } from "./pictures.js";
import { prompts } from "./prompts.js";
import { card, thumbnail } from "./shown.js";
import { amount, cost, ofFiles } from "./taken.js";

const PLACEHOLDERS = {
  "": "Ask about a file, or anything",
  detect: "What to find, such as: dog, red car",
  click: "A task on this screen, such as: open the settings",
};

export class Composer {
  files = [];
  /** Called when the files or the form have changed. */
  onChange = () => {};
  /** Gives the files of earlier messages that go with the next one. */
  earlierFiles = () => [];
  #draft = null; // what was in the box before an earlier message came into it
  #reading = 0; // files that are read just now
  #cards = new Map(); // of files, by file

  constructor() {
    this.text = byId("text");
    this.text.addEventListener("input", () => this.#fit());
    byId("attach").addEventListener("click", () => byId("files").click());
    byId("files").addEventListener("change", ({ target }) => {
      this.addFiles([...target.files]);
      target.value = "";
    });
    byId("form").addEventListener("change", () => this.showForm());
    this.#acceptPasted();
    this.#acceptDropped();
  }

  get isEmpty() {
    return !this.text.value.trim() && !this.files.length;
  }

  get isReading() {
    return this.#reading > 0;
  }

  /** The name of the ready message that the text goes into, or "". */
  get form() {
    return byId("form-choice").hidden ? "" : byId("form").value;
  }

  /** Bring the cursor into the box, but where that would open a keyboard on the screen. */
  focus() {
    if (!matchMedia("(hover: none)").matches) this.text.focus();
  }

  set(text, files) {
    this.text.value = text;
    this.files = [...files];
    this.#show();
    this.#fit();
  }

  /** Take what is in the box out of it. */
  take() {
    const taken = { text: this.text.value, files: this.files, form: this.form };
    const draft = this.#draft;
    this.#draft = null;
    byId("editing").hidden = true;
    this.notice("");
    this.set(draft?.text ?? "", draft?.files ?? []);
    return taken;
  }

  /** Put an earlier message into the box; what was there comes back afterwards. */
  edit({ text, files, form }) {
    this.#draft ??= { text: this.text.value, files: this.files };
    byId("editing").hidden = false;
    this.notice("");
    byId("form").value = form;
    this.set(text, files);
    this.text.focus();
  }

  /** Offer the ready messages where there is a picture that they can ask about. */
  showForm() {
    const pictures = [...this.earlierFiles(), ...this.files].some(isPicture);
    byId("form-choice").hidden = !pictures || !Object.keys(prompts).length;
    byId("form-choice").classList.toggle("chosen", Boolean(this.form));
    this.text.placeholder = PLACEHOLDERS[this.form];
  }

  /** A sentence above the box, with a button if `action` is [label, function]. */
  notice(text, action = null) {
    const place = byId("notice");
    place.hidden = !text;
    place.replaceChildren(text);
    if (action) place.append(" ", link(...action));
  }

  /** Say what the message would cost, as an Estimate has it. */
  showEstimate({ text = "", problem = "", media = null, ask = null }) {
    const place = byId("estimate");
    place.hidden = !(text || problem || ask);
    place.classList.toggle("problem", Boolean(problem));
    place.replaceChildren(text || problem);
    if (problem) announce(problem);
    if (ask) place.append(link("Count the tokens", ask));
    for (const [file, { told }] of this.#cards) told.textContent = size(file.blob.size);
    for (const [file, use] of ofFiles(media, this.files)) {
      const told = this.#cards.get(file)?.told;
      if (told) told.textContent = [size(file.blob.size), amount(use), cost(use)].join(" · ");
    }
  }

  async addFiles(files) {
    this.notice("");
    const problems = [];
    for (const file of files) {
      this.#reading += 1;
      try {
        const made = await read(file);
        const problem = tooMany([...this.earlierFiles(), ...this.files, made]);
        if (problem) problems.push([problem]);
        else this.#add(made);
      } catch (error) {
        if (!(error instanceof FileError)) throw error;
        const { picture: large } = error;
        problems.push([error.message, large && ["Add a smaller copy", () => this.#addSmaller(large)]]);
      } finally {
        this.#reading -= 1;
      }
    }
    if (problems.length === 1) this.notice(...problems[0]);
    else this.notice([...new Set(problems.map(([text]) => text))].join(" "));
    this.focus();
  }

  #add(added) {
    this.files.push(added);
    announce(`${added.name} added`);
    this.#show();
  }

  async #addSmaller(large) {
    this.notice("");
    this.#add(await smaller(large));
    this.focus();
  }

  async #makeSmaller(old) {
    const made = await smaller(old);
    const at = this.files.indexOf(old);
    if (at >= 0) this.files[at] = made;
    announce(`${made.name} is now ${made.width} by ${made.height} pixels`);
    this.#show();
  }

  #show() {
    const list = byId("attached");
    list.hidden = !this.files.length;
    const former = this.#cards;
    this.#cards = new Map();
    for (const file of this.files) if (!isPicture(file)) this.#cards.set(file, former.get(file) ?? card(file));
    list.replaceChildren(...this.files.map((each) => this.#item(each)));
    this.showForm();
    this.onChange();
  }

  #item(shown) {
    const remove = element("button", { type: "button", className: "remove", "aria-label": `Remove ${shown.name}` }, icon("close"));
    remove.addEventListener("click", () => {
      this.files.splice(this.files.indexOf(shown), 1);
      announce(`${shown.name} removed`);
      this.#show();
      (byId("attached").querySelector(".remove") ?? this.text).focus();
    });
    const item = element("li", {}, this.#cards.get(shown) ?? thumbnail(shown), remove);
    if (isPicture(shown) && isLarge(shown)) {
      const label = `Make ${shown.name} smaller: it has ${shown.width} by ${shown.height} pixels`;
      const shrink = element("button", { type: "button", className: "shrink", title: label, "aria-label": label }, "Make smaller");
      shrink.addEventListener("click", () => this.#makeSmaller(shown));
      item.append(shrink);
    } else if (shown.smaller) {
      item.append(element("span", { className: "shrink" }, `${shown.width} × ${shown.height}`));
    }
    return item;
  }

  /** As high as its text, where the style sheet cannot say so. */
  #fit() {
    if (CSS.supports("field-sizing", "content")) return;
    this.text.style.height = "auto";
    this.text.style.height = `${this.text.scrollHeight}px`;
  }

  #acceptPasted() {
    document.addEventListener("paste", (event) => {
      if (document.querySelector("dialog[open]")) return;
      const files = [...(event.clipboardData?.files ?? [])];
      // A table or a text of an office program comes with a picture of itself: the text is meant.
      if (!files.length || event.clipboardData.types.includes("text/plain")) return;
      event.preventDefault();
      this.addFiles(files);
    });
  }

  #acceptDropped() {
    const veil = byId("drop");
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    let depth = 0; // dragging over a child leaves its parent
    const over = (change) => {
      depth = change ? Math.max(0, depth + change) : 0;
      veil.hidden = depth === 0;
    };
    document.addEventListener("dragenter", (event) => hasFiles(event) && over(+1));
    document.addEventListener("dragleave", (event) => hasFiles(event) && over(-1));
    document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    document.addEventListener("drop", (event) => {
      over(0);
      if (!hasFiles(event)) return;
      event.preventDefault();
      if (!document.querySelector("dialog[open]")) this.addFiles([...event.dataTransfer.files]);
    });
  }
}

function link(label, press) {
  const button = element("button", { type: "button", className: "link" }, label);
  button.addEventListener("click", press);
  return button;
}
