// What went wrong, in words for a person: a title, what can be done, and what the page should offer.

/**
 * `retry`: sending the same again may help. `wait`: seconds after which to do so by itself, or null.
 * `needsKey`: an API key has to be entered first.
 */
export function explain(error) {
  const said = sentence(error.said ?? "");
  const one = (title, detail, offers = {}) => ({ title, detail, retry: true, wait: null, needsKey: false, ...offers });
  switch (error.kind) {
    case "unreachable":
      return one("The server cannot be reached.", "It may have been stopped, or the connection is down. Your message is kept.");
    case "broken off":
      return one("The answer broke off.", "The connection ended before the answer was complete.");
    case "stream":
      return one("The answer broke off.", said || "Something went wrong on the server.");
    case "status":
      break;
    default:
      return one("Something went wrong on this page.", "Try again; if it happens again, reload the page.");
  }
  const { status, code, retryAfter } = error;
  if (status === 401) {
    return one("This server asks for an API key.", "Enter it to go on. Your message is kept.", { needsKey: true });
  }
  if (status === 403) return one("The server does not allow this.", said);
  if (status === 404 && code === "model_not_found") {
    return one("This model is not served here.", said || "Choose another one, or reload the page.");
  }
  if (status === 404) return one("Nothing answers here.", "The server has no chat at this address.");
  if (status === 413) {
    const advice = "Take a file out or make it smaller, then send it again.";
    return one("The message is too large.", `${said} ${advice}`.trim(), { retry: false });
  }
  if (status === 429) {
    return one("The server is busy.", retryAfter === null ? "Try again in a moment." : "", { wait: retryAfter });
  }
  if (status === 503) {
    return one("The server is not ready.", "It may be starting or about to stop.", { wait: retryAfter });
  }
  if (code === "context_length_exceeded" || code === "e_prompt_too_long") {
    const advice = "Begin a new chat, or edit an earlier message.";
    return one("The conversation is too long for the model.", said ? `${said} ${advice}` : advice, { retry: false });
  }
  if (status === 504) {
    return one("The request took too long.", "A smaller thinking budget, or fewer tokens at most, may help.");
  }
  if (status >= 500) {
    const id = /^[\w-]{1,80}$/.test(error.requestId ?? "") ? ` Its log knows this request as ${error.requestId}.` : "";
    return one("Something went wrong on the server.", `Your message is kept.${id}`);
  }
  return one("The server did not accept this.", said || `It answered with status ${status}.`, { retry: false });
}

/** The server's words as a sentence, of a length that a person reads. */
function sentence(text) {
  const short = text.replace(/\s+/g, " ").trim().slice(0, 400);
  return short && short[0].toUpperCase() + short.slice(1);
}
