// The box at the bottom: the text and pictures of the next message, and of an earlier one while it is edited.
import { announce, byId, element, icon } from "./dom.js";
import * as picture from "./pictures.js";

export class Composer {
  pictures = [];
  #draft = null; // what was in the box before an earlier message came into it
  #reading = 0; // files that are read just now

  constructor() {
    this.text = byId("text");
    this.text.addEventListener("input", () => this.#fit());
    byId("attach").addEventListener("click", () => byId("files").click());
    byId("files").addEventListener("change", ({ target }) => {
      this.addFiles([...target.files]);
      target.value = "";
    });
    this.#acceptPasted();
    this.#acceptDropped();
  }

  get isEmpty() {
    return !this.text.value.trim() && !this.pictures.length;
  }

  get isReading() {
    return this.#reading > 0;
  }

  /** Bring the cursor into the box, but where that would open a keyboard on the screen. */
  focus() {
    if (!matchMedia("(hover: none)").matches) this.text.focus();
  }

  set(text, pictures) {
    this.text.value = text;
    this.pictures = [...pictures];
    this.#show();
    this.#fit();
  }

  /** Take what is in the box out of it. */
  take() {
    const taken = { text: this.text.value, pictures: this.pictures };
    const draft = this.#draft;
    this.#draft = null;
    byId("editing").hidden = true;
    this.notice("");
    this.set(draft?.text ?? "", draft?.pictures ?? []);
    return taken;
  }

  /** Put an earlier message into the box; what was there comes back afterwards. */
  edit(text, pictures) {
    this.#draft ??= { text: this.text.value, pictures: this.pictures };
    byId("editing").hidden = false;
    this.notice("");
    this.set(text, pictures);
    this.text.focus();
  }

  /** A sentence above the box, with a button if `action` is [label, function]. */
  notice(text, action = null) {
    const place = byId("notice");
    place.hidden = !text;
    place.replaceChildren(text);
    if (action) {
      const button = element("button", { type: "button", className: "link" }, action[0]);
      button.addEventListener("click", action[1]);
      place.append(" ", button);
    }
  }

  async addFiles(files) {
    this.notice("");
    const problems = [];
    for (const file of files) {
      if (this.pictures.length >= picture.LIMITS.pictures) {
        problems.push([`A message can have ${picture.LIMITS.pictures} pictures.`]);
        break;
      }
      this.#reading += 1;
      try {
        this.#add(await picture.read(file));
      } catch (error) {
        if (!(error instanceof picture.PictureError)) throw error;
        const { picture: large } = error;
        problems.push([error.message, large && ["Add a smaller copy", () => this.#addSmaller(large)]]);
      } finally {
        this.#reading -= 1;
      }
    }
    if (problems.length === 1) this.notice(...problems[0]);
    else if (problems.length) this.notice(problems.map(([text]) => text).join(" "));
    this.focus();
  }

  #add(added) {
    this.pictures.push(added);
    announce(`${added.name} added`);
    this.#show();
  }

  async #addSmaller(large) {
    this.notice("");
    this.#add(await picture.smaller(large));
    this.focus();
  }

  async #makeSmaller(old) {
    const made = await picture.smaller(old);
    const at = this.pictures.indexOf(old);
    if (at >= 0) this.pictures[at] = made;
    announce(`${made.name} is now ${made.width} by ${made.height} pixels`);
    this.#show();
  }

  #show() {
    const list = byId("pictures");
    list.hidden = !this.pictures.length;
    list.replaceChildren(...this.pictures.map((each) => this.#item(each)));
  }

  #item(shown) {
    const remove = element("button", { type: "button", className: "remove", "aria-label": `Remove ${shown.name}` }, icon("close"));
    remove.addEventListener("click", () => {
      this.pictures.splice(this.pictures.indexOf(shown), 1);
      announce(`${shown.name} removed`);
      this.#show();
      (byId("pictures").querySelector(".remove") ?? this.text).focus();
    });
    const item = element("li", {}, picture.thumbnail(shown), remove);
    if (picture.isLarge(shown)) {
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
