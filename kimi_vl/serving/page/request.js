// A conversation and the settings as the body of a request. Knows no page and no network.
import { isPicture } from "./attachments.js";
import { inForm } from "./prompts.js";

/**
 * `exchanges` have a `text`, a `form` to ask it in, `files` and, but for the last, an `answer` and the `settings` that
 * they were asked with: files are read as these say, so that an earlier question stays as it was. `urlOf` gives a
 * file's address. What is not set is left out, so that the server's own value holds.
 */
export function requestBody(exchanges, settings, urlOf) {
  const body = { model: settings.model, messages: messages(exchanges, settings, urlOf) };
  Object.assign(body, { stream: true, stream_options: { include_usage: true } });
  if (!body.model) delete body.model;
  const optional = {
    temperature: settings.temperature,
    top_p: settings.topP,
    max_completion_tokens: settings.maxTokens,
    seed: settings.seed,
    thinking_budget: settings.thinks ? settings.budget : 0,
  };
  for (const [name, value] of Object.entries(optional)) if (value !== null) body[name] = value;
  if (settings.schema !== null) {
    const schema = { name: "answer", strict: true, schema: settings.schema };
    body.response_format = { type: "json_schema", json_schema: schema };
  }
  if (asksForPlaces(exchanges, settings)) body.kimi_vl = { grounding: true };
  return body;
}

/** The part of a body that says what the prompt costs. */
export function estimateBody(exchanges, settings, urlOf) {
  const { model, messages, max_completion_tokens } = requestBody(exchanges, settings, urlOf);
  return { model, messages, max_completion_tokens };
}

export function asksForPlaces(exchanges, settings) {
  return Boolean(settings.places || exchanges.at(-1).form) && exchanges.some(({ files }) => files.some(isPicture));
}

function messages(exchanges, settings, urlOf) {
  const found = [];
  const system = [settings.system, inForm(exchanges.at(-1).form, "").system].filter(Boolean).join("\n\n");
  if (system) found.push({ role: "system", content: system });
  exchanges.forEach((exchange, at) => {
    const last = at === exchanges.length - 1;
    found.push({ role: "user", content: content(exchange, (last ? settings : exchange.settings).reading, urlOf) });
    if (!last && exchange.answer) found.push({ role: "assistant", content: exchange.answer });
  });
  return found;
}

function content({ text, form, files }, reading, urlOf) {
  const asked = inForm(form, text).user;
  if (!files.length) return asked;
  const parts = files.map((file) => part(file, urlOf(file), reading));
  return asked ? [...parts, { type: "text", text: asked }] : parts;
}

function part(file, url, { pages, ...frames }) {
  const given = (options) => Object.fromEntries(Object.entries(options).filter(([, value]) => value !== null));
  if (file.kind === "image") return { type: "image_url", image_url: { url } };
  if (file.kind === "video") return { type: "video_url", video_url: { url }, ...given(frames) };
  return { type: "file", file: { filename: file.name, file_data: url }, ...given({ pages }) };
}
