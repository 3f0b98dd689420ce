// Making nodes. Text from anywhere becomes text nodes, never markup.

/** An element; keys with a dash become attributes, others properties. Children are nodes or texts. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

/** One of the drawings that index.html holds. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const node = document.createElementNS(space, "svg");
  node.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#icon-${name}`);
  node.append(use);
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Tell those who hear the page instead of seeing it. */
export function announce(text) {
  byId("status").textContent = text;
}

/** Put text on the clipboard, also where the browser keeps its clipboard interface to secure origins. */
export async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Permission was refused: the older way may still work.
    }
  }
  const focused = document.activeElement;
  const field = element("textarea", { value: text, className: "unseen", "aria-hidden": "true" });
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return done;
}

/** A button with a name for those who hear it; `shown` is a drawing or a word. */
export function button(label, shown, press) {
  const className = typeof shown === "string" ? "quiet small" : "quiet";
  const node = element("button", { type: "button", className, title: label, "aria-label": label }, shown);
  node.addEventListener("click", () => press(node));
  return node;
}

/** Copy a text, and say on the button that it was done. */
export async function copied(node, text) {
  const done = await copy(text);
  announce(done ? "Copied" : "It could not be copied");
  node.classList.add(done ? "done" : "failed");
  setTimeout(() => node.classList.remove("done", "failed"), 1500);
}
