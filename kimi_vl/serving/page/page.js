// The page's conduct: a conversation, one request at a time, and the keyboard.
import { RequestError, baseUrl, complete, key, models, version } from "./api.js";
import { LIMITS, dataUrl, isPicture, sentBytes, tooMany } from "./attachments.js";
import { Composer } from "./composer.js";
import { announce, byId } from "./dom.js";
import { explain } from "./errors.js";
import { Estimate } from "./estimate.js";
import { Exchange } from "./exchange.js";
import { ideas } from "./ideas.js";
import { fetchPrompts } from "./prompts.js";
import { estimateBody, requestBody } from "./request.js";
import { openSettings, prepareSettings, readSettings, showProblems, showReading } from "./settings.js";
import { curl, python } from "./snippets.js";

const MOST_WAITS = 5; // how often a busy server is asked again without anybody pressing a button

const composer = new Composer();
const estimate = new Estimate((told) => composer.showEstimate(told));
let exchanges = []; // of this conversation
let session = newSession();
let running = null; // {controller} of the request that runs, or {end} of a waiting for the time to ask again
let edited = null; // the exchange whose message is in the composer

/** Random, so that a load balancer keeps a conversation on one server; it says nothing about anybody. */
function newSession() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// ---- sending

const actions = {
  edit(exchange) {
    stop();
    edited = exchange;
    composer.edit(exchange);
    const first = exchanges.indexOf(exchange);
    exchanges.forEach((each, at) => each.node.classList.toggle("dropped", at >= first));
  },
  again: (exchange) => void ask(exchange),
  curl: (exchange) => curl(upTo(exchange), exchange.settings, baseUrl(), Boolean(key.get())),
  python: (exchange) => python(upTo(exchange), exchange.settings, baseUrl(), Boolean(key.get())),
};

const upTo = (exchange) => exchanges.slice(0, exchanges.indexOf(exchange) + 1);
const filesOf = (some) => some.flatMap(({ files }) => files);

/** The exchanges that stay when what is in the box is sent. */
const kept = () => (edited ? exchanges.slice(0, exchanges.indexOf(edited)) : exchanges);

function leaveEditing() {
  edited = null;
  for (const { node } of exchanges) node.classList.remove("dropped");
}

/** The settings, or null where one of them cannot be sent; then it is shown. */
function checkedSettings() {
  const { settings, problems } = showProblems();
  if (!problems.length) return settings;
  openSettings(problems[0].id);
  return null;
}

function send() {
  if (composer.isReading || composer.isEmpty) return;
  if (running?.controller) {
    announce("An answer is still coming");
    return;
  }
  const problem = tooLarge();
  if (problem) {
    composer.notice(problem);
    return;
  }
  if (!checkedSettings()) return;
  const first = edited ? exchanges.indexOf(edited) : exchanges.length;
  const message = composer.take();
  leaveEditing();
  const exchange = new Exchange(message, actions);
  for (const dropped of exchanges.splice(first)) dropped.node.remove();
  exchanges.push(exchange);
  byId("conversation").append(exchange.node);
  byId("welcome").hidden = true;
  follow(true);
  ask(exchange);
}

/** Why what is in the box cannot be sent with what was before, or "". */
function tooLarge() {
  const files = [...filesOf(kept()), ...composer.files];
  if (tooMany(files)) return tooMany(files);
  if (bytesOfRequest() <= LIMITS.body) return "";
  return `The files of this conversation are too large together: a body may have ${Math.floor(LIMITS.body / 2 ** 20)} MiB. Send less, or begin a new chat.`;
}

/** What is in the box as an exchange that has not been asked. */
const next = () => ({ text: composer.text.value, files: composer.files, form: composer.form });

/** Bytes of the body that what is in the box would make. */
function bytesOfRequest() {
  const asked = [...kept(), next()];
  const words = JSON.stringify(requestBody(asked, readSettings().settings, () => ""));
  return filesOf(asked).reduce((sum, file) => sum + sentBytes(file), new Blob([words]).size);
}

/** The files, the form or the settings have changed: show what follows from it. */
function renew() {
  composer.showForm();
  showReading(filesOf(exchanges), composer.files);
  if (!composer.files.length || readSettings().problems.length || tooLarge()) {
    estimate.drop();
    return;
  }
  estimate.renew(bytesOfRequest(), async () => {
    const asked = [...kept(), next()];
    await Promise.all(filesOf(asked).map(dataUrl));
    return estimateBody(asked, readSettings().settings, (file) => file.data);
  });
}

/** Ask for the answer of an exchange, anew if it has one. What follows it is dropped. */
async function ask(exchange, waits = 0) {
  renew();
  const settings = checkedSettings();
  if (!settings) return;
  stop();
  for (const later of exchanges.splice(exchanges.indexOf(exchange) + 1)) later.node.remove();
  const controller = new AbortController();
  exchange.settings = settings;
  exchange.controller = controller;
  running = { controller };
  const hasFocus = exchange.node.contains(document.activeElement);
  const restoreFormer = exchange.begin(settings.schema !== null);
  if (hasFocus) composer.focus(); // the button that was pressed is gone
  showRunning();
  follow(true);
  announce("Waiting for the answer");
  let end = null;
  let problem = null;
  try {
    end = await receive(exchange, settings, controller.signal);
  } catch (error) {
    problem = error;
  }
  if (exchange.controller !== controller) return; // it is asked anew already
  if (running?.controller === controller) running = null;
  if (end) {
    exchange.reply.finish(end, exchange.files, filesOf(upTo(exchange)).filter(isPicture));
    announce(exchange.answer ? `Answer: ${exchange.answer.slice(0, 600)}` : "The answer is empty");
  } else if (controller.signal.aborted) {
    exchange.reply.stopped();
    announce("Stopped");
  } else {
    if (exchange.reply.isEmpty) restoreFormer();
    fail(exchange, problem, waits);
  }
  showRunning();
  follow();
}

/** Show an answer while it comes; gives how it ended. */
async function receive(exchange, settings, signal) {
  const asked = upTo(exchange);
  const { reply } = exchange;
  await Promise.all(filesOf(asked).map(dataUrl));
  signal.throwIfAborted();
  const body = requestBody(asked, settings, (file) => file.data);
  const end = { finish: null, usage: null, extra: null };
  let waiting = false;
  let freeAt = 0; // a draw that took long is followed by a pause four times as long, so that the page stays quick
  const draw = () => {
    waiting = false;
    const began = performance.now();
    reply.draw();
    follow();
    freeAt = performance.now() + 4 * (performance.now() - began);
  };
  const drawSoon = () => {
    if (waiting) return;
    waiting = true;
    setTimeout(requestAnimationFrame, Math.max(0, freeAt - performance.now() - 16), draw);
  };
  for await (const piece of complete(body, session, signal)) {
    if (piece.thinking && !reply.thinking) announce("Thinking");
    if (piece.answer && !reply.answer) announce("Answering");
    reply.add(piece);
    for (const name of Object.keys(end)) end[name] = piece[name] ?? end[name];
    drawSoon();
  }
  return end;
}

function fail(exchange, error, waits) {
  if (!(error instanceof RequestError)) console.error(error);
  const problem = explain(error);
  const shown = exchange.reply.failed(problem);
  announce("");
  if (problem.needsKey) askForKey(() => ask(exchange));
  if (problem.wait !== null && waits < MOST_WAITS) countDown(exchange, problem, shown, waits);
}

/** Ask a busy server again when it said so; stop ends the waiting. */
function countDown(exchange, problem, { text, retry }, waits) {
  let left = Math.max(1, problem.wait);
  const note = document.createElement("span");
  note.setAttribute("aria-hidden", "true"); // a number that changes every second is not read out
  text.append(" ", note);
  retry.textContent = "Try now";
  const tell = () => (note.textContent = `Trying again in ${left} s.`);
  tell();
  const timer = setInterval(() => {
    left -= 1;
    if (left > 0) tell();
    else ask(exchange, waits + 1);
  }, 1000);
  const end = () => {
    clearInterval(timer);
    note.remove();
    retry.textContent = "Try again";
  };
  running = { end };
}

function stop() {
  const stopped = running;
  if (!stopped) return;
  running = null;
  stopped.end?.();
  stopped.controller?.abort();
  showRunning();
}

function showRunning() {
  const focused = document.activeElement;
  byId("stop").hidden = !running;
  byId("send").hidden = Boolean(running);
  if (focused === byId("stop") || focused === byId("send")) composer.focus();
  document.body.classList.toggle("running", Boolean(running));
}

// ---- the end of the page stays in sight while an answer comes, unless the reader has gone elsewhere

let following = true;

function follow(again = false) {
  following ||= again;
  if (following) window.scrollTo(0, document.documentElement.scrollHeight);
  showLatest();
}

const atEnd = () => window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 60;

function showLatest() {
  byId("latest").hidden = atEnd() || !exchanges.length;
}

// ---- keys and other ways in

let afterKey = null;

function askForKey(then) {
  afterKey = then;
  byId("asked-key").value = "";
  if (!byId("ask-key").open) byId("ask-key").showModal();
}

function newChat() {
  stop();
  leaveEditing();
  if (!byId("editing").hidden) composer.take();
  exchanges = [];
  session = newSession();
  byId("form").value = "";
  byId("conversation").replaceChildren();
  byId("welcome").hidden = false;
  composer.notice("");
  composer.focus();
  renew();
  showLatest();
}

function prepareKeys() {
  composer.text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (running) stop();
    else if (edited) byId("leave-editing").click();
    composer.focus();
  });
}

const THEMES = ["system", "light", "dark"];

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "system";
  const label = theme === "system" ? "Colours: as the system" : `Colours: ${theme}`;
  byId("theme").setAttribute("aria-label", label);
  byId("theme").title = label;
}

function nextTheme() {
  const root = document.documentElement;
  const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "system") + 1) % THEMES.length];
  if (next === "system") delete root.dataset.theme;
  else root.dataset.theme = next;
  try {
    localStorage.setItem("theme", next);
  } catch {
    // Storage may be forbidden: then the choice lives as long as the page.
  }
  showTheme();
  announce(byId("theme").title);
}

async function meetServer() {
  try {
    const served = await models();
    showModels(served);
    const said = await version().catch(() => "");
    const context = served[0]?.max_model_len;
    const facts = [said && `Version ${said}`, context && `context of ${context.toLocaleString("en")} tokens`];
    byId("about").textContent = facts.filter(Boolean).join(", ");
    composer.notice("");
  } catch (error) {
    const problem = explain(error);
    if (problem.needsKey) askForKey(meetServer);
    else composer.notice(`${problem.title} ${problem.detail.replace(" Your message is kept.", "")}`, ["Try again", meetServer]);
  }
}

function showModels(served) {
  const choice = byId("model");
  choice.replaceChildren(...served.map(({ id }) => new Option(id, id)));
  byId("model-choice").hidden = served.length < 2;
  byId("model-name").textContent = served.length === 1 ? served[0].id : "";
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", newChat);
byId("theme").addEventListener("click", nextTheme);
byId("latest").addEventListener("click", () => follow(true));
byId("leave-editing").addEventListener("click", () => {
  leaveEditing();
  composer.take();
  composer.focus();
});
byId("thinking").addEventListener("click", ({ currentTarget }) => {
  const thinks = currentTarget.getAttribute("aria-pressed") !== "true";
  currentTarget.setAttribute("aria-pressed", String(thinks));
});
byId("ask-key").querySelector("form").addEventListener("submit", () => {
  key.set(byId("asked-key").value.trim());
  afterKey?.();
});
byId("leave-key").addEventListener("click", () => byId("ask-key").close());
window.addEventListener("scroll", () => {
  following = atEnd();
  showLatest();
}, { passive: true });
byId("ideas").append(...ideas((text, files) => {
  composer.set(text, []);
  composer.addFiles(files);
}));
composer.earlierFiles = () => filesOf(kept());
composer.onChange = renew;
fetchPrompts().then(() => composer.showForm());
prepareSettings(renew);
prepareKeys();
showTheme();
meetServer();
