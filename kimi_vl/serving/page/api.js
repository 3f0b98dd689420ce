// The server's public endpoints, relative to this page, so that they are also found behind a proxy's prefix.
import { events } from "./sse.js";

/** What went wrong, before it is put into words: `kind` is "unreachable", "status", "stream" or "broken off". */
export class RequestError extends Error {
  constructor(kind, details = {}) {
    super(details.message || kind);
    this.kind = kind;
    this.status = details.status ?? 0;
    this.code = details.code ?? "";
    this.said = details.message ?? "";
    this.retryAfter = details.retryAfter ?? null;
    this.requestId = details.requestId ?? "";
  }
}

const address = (path) => new URL(path, document.baseURI);
export const baseUrl = () => address("v1").href;

export const key = {
  get() {
    try {
      return sessionStorage.getItem("api-key") ?? "";
    } catch {
      return this.kept ?? "";
    }
  },
  set(value) {
    this.kept = value;
    try {
      if (value) sessionStorage.setItem("api-key", value);
      else sessionStorage.removeItem("api-key");
    } catch {
      // Storage may be forbidden: then the key lives as long as the page.
    }
  },
};

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(address(path), { ...options, headers, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("unreachable");
  }
  if (response.ok) return response;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // A proxy's page in HTML, for example: the status has to do.
  }
  throw new RequestError("status", {
    status: response.status,
    code: text(error.code) || text(error.type),
    message: text(error.message),
    retryAfter: seconds(response.headers.get("retry-after")),
    requestId: response.headers.get("x-request-id") ?? "",
  });
}

const text = (value) => (typeof value === "string" ? value : "");

/** Retry-After is a number of seconds or a date. */
function seconds(value) {
  if (value === null) return null;
  const wait = /^\d+$/.test(value) ? Number(value) : Math.ceil((Date.parse(value) - Date.now()) / 1000);
  return Number.isFinite(wait) ? Math.max(0, wait) : null;
}

/** The models that are served: objects with an `id`, and often `max_model_len`. */
export async function models() {
  const { data } = await (await request("v1/models")).json();
  return Array.isArray(data) ? data.filter((model) => typeof model?.id === "string") : [];
}

/** What the server says of its version, or "". */
export async function version() {
  const said = await (await request("version")).json();
  return text(said?.version);
}

/** What messages cost: {count, max_model_len, media}. */
export async function tokenize(body, signal) {
  const headers = { "Content-Type": "application/json" };
  return (await request("tokenize", { method: "POST", headers, body: JSON.stringify(body), signal })).json();
}

/** The pieces of one streamed answer: objects with some of `thinking`, `answer`, `finish`, `usage` and `extra`. */
export async function* complete(body, session, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", "x-session-id": session },
    body: JSON.stringify(body),
    signal,
  });
  let finished = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        const { message, code, type } = chunk.error;
        throw new RequestError("stream", { message: text(message), code: text(code) || text(type) });
      }
      const choice = chunk.choices?.[0];
      finished ||= Boolean(choice?.finish_reason);
      yield {
        thinking: text(choice?.delta?.reasoning_content) || text(choice?.delta?.reasoning),
        answer: text(choice?.delta?.content),
        finish: choice?.finish_reason ?? null,
        usage: chunk.usage ?? null,
        extra: choice?.kimi_vl ?? null,
      };
    }
  } catch (error) {
    if (error instanceof RequestError || error.name === "AbortError") throw error;
    throw new RequestError("broken off");
  }
  if (!finished) throw new RequestError("broken off");
}
