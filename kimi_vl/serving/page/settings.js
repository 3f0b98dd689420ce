// The settings dialog: what is in its fields, and what is wrong with it.
import { key } from "./api.js";
import { byId } from "./dom.js";

const NUMBERS = { budget: "budget", "max-tokens": "maxTokens", temperature: "temperature", "top-p": "topP", seed: "seed" };
const FRAMES = { fps: "fps", "max-frames": "max_frames", start: "start", end: "end" };
const FIELDS = ["system", "schema", "pages", ...Object.keys(NUMBERS), ...Object.keys(FRAMES)];

/** The settings as they are now, and the fields whose values cannot be sent: [{id, problem}]. */
export function readSettings() {
  const settings = { model: byId("model").value, system: byId("system").value.trim() ? byId("system").value : "" };
  const problems = [];
  settings.thinks = byId("thinking").getAttribute("aria-pressed") === "true";
  settings.places = byId("places").checked;
  const number = (id) => {
    const field = byId(id);
    if (!field.validity.valid) problems.push({ id, problem: outOfBounds(field) });
    return field.value === "" ? null : field.valueAsNumber;
  };
  for (const [id, name] of Object.entries(NUMBERS)) settings[name] = number(id);
  settings.reading = { pages: byId("document-settings").hidden ? null : byId("pages").value.trim() || null };
  for (const [id, name] of Object.entries(FRAMES)) {
    settings.reading[name] = byId("video-settings").hidden ? null : number(id);
  }
  problems.push(...readingProblems(settings.reading));
  const { schema, problem } = readSchema(byId("schema").value);
  settings.schema = schema;
  if (problem) problems.push({ id: "schema", problem });
  return { settings, problems };
}

function outOfBounds(field) {
  const name = field.labels[0].textContent;
  const kind = field.step === "1" ? "a whole number" : "a number";
  const least = Number(field.min).toLocaleString("en");
  if (field.max === "") return `${name} must be ${kind} of at least ${least}.`;
  return `${name} must be ${kind} from ${least} to ${Number(field.max).toLocaleString("en")}.`;
}

/** What no bounds of a field say of how videos and documents are read. */
function readingProblems({ fps, start, end, pages }) {
  const problems = [];
  if (fps === 0) problems.push({ id: "fps", problem: "Frames a second must be above 0." });
  if (end !== null && end <= (start ?? 0)) problems.push({ id: "end", problem: "The end must be after the start." });
  if (pages !== null && !/^\s*\d+\s*(-\s*\d*\s*)?(,\s*\d+\s*(-\s*\d*\s*)?)*$/.test(pages)) {
    problems.push({ id: "pages", problem: "Pages must be numbers and ranges like 1-3,7." });
  }
  return problems;
}

/** Show the settings of videos and documents where there are some, and those of the `next` message in the box. */
export function showReading(earlier, next) {
  const among = (files, wanted) => files.some(({ kind }) => kind === wanted);
  const [video, document] = ["video", "document"].map((kind) => among(next, kind));
  byId("video-settings").hidden = !video && !among(earlier, "video");
  byId("document-settings").hidden = !document && !among(earlier, "document");
  const { fps, max_frames: most, start, end, pages } = readSettings().settings.reading;
  const words = [
    video && fps !== null && `${fps} frame${fps === 1 ? "" : "s"} a second`,
    video && most !== null && `${most} frame${most === 1 ? "" : "s"} at most`,
    video && (start !== null || end !== null) && `${start ?? 0} s to ${end === null ? "the end" : `${end} s`}`,
    document && pages !== null && `pages ${pages}`,
  ];
  const chip = byId("reading");
  chip.hidden = !video && !document;
  chip.textContent = words.filter(Boolean).join(", ") || (video ? "Frames" : "Pages");
  chip.classList.toggle("chosen", words.some(Boolean));
}

/** A JSON schema from text: {schema, problem}, of which one is null, or both where there is no text. */
export function readSchema(text) {
  if (!text.trim()) return { schema: null, problem: null };
  let schema;
  try {
    schema = JSON.parse(text);
  } catch {
    return { schema: null, problem: `This is no JSON yet: look at ${placeOfFault(text)}.` };
  }
  if (typeof schema !== "object" || schema === null || Array.isArray(schema)) {
    return { schema: null, problem: "A JSON schema is an object: { … }." };
  }
  return { schema, problem: null };
}

/** Where the longest beginning ends that could still become JSON. Browsers say it in many ways, or not at all. */
function placeOfFault(text) {
  let [low, high] = [0, text.length];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (mayBecomeJson(text.slice(0, middle))) low = middle;
    else high = middle - 1;
  }
  if (!text.slice(low).trim()) return "its end, where something is missing";
  const before = text.slice(0, low).split("\n");
  return `line ${before.length}, column ${before.at(-1).length + 1}`;
}

function mayBecomeJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch ({ message }) {
    const position = /position (\d+)/.exec(message);
    return position ? Number(position[1]) >= text.length : /end of|EOF|unterminated/i.test(message);
  }
}

/** Say beside each field what is wrong with it. */
export function showProblems() {
  const { settings, problems } = readSettings();
  for (const id of FIELDS) {
    const found = problems.find((problem) => problem.id === id);
    const place = byId(`${id}-problem`);
    if (place) place.textContent = found?.problem ?? "";
    byId(id).setAttribute("aria-invalid", String(Boolean(found)));
  }
  byId("json-set").hidden = !byId("schema").value.trim();
  return { settings, problems };
}

/** Open the dialog, at a field if one is named. */
export function openSettings(id = null) {
  const dialog = byId("settings");
  byId("key").value = key.get();
  if (!dialog.open) dialog.showModal();
  if (id) byId(id).focus();
}

/** `changed` is called when a setting has. */
export function prepareSettings(changed) {
  const dialog = byId("settings");
  const form = dialog.querySelector("form");
  const show = () => {
    showProblems();
    changed();
  };
  form.addEventListener("input", show);
  byId("key").addEventListener("change", () => key.set(byId("key").value.trim()));
  byId("reset").addEventListener("click", () => {
    for (const id of FIELDS) byId(id).value = "";
    byId("thinking").setAttribute("aria-pressed", "true");
    byId("places").checked = false;
    show();
  });
  // Enter in a field closes the dialog, but not in a text of several lines; so does a press beside it.
  form.addEventListener("submit", () => key.set(byId("key").value.trim()));
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  byId("open-settings").addEventListener("click", () => openSettings());
  byId("json-set").addEventListener("click", () => openSettings("schema"));
  byId("reading").addEventListener("click", () => openSettings(byId("video-settings").hidden ? "pages" : "fps"));
  showProblems();
}
