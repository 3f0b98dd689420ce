// A conversation and the settings as the body of a request. Knows no page and no network.

/**
 * `exchanges` have a `text`, `pictures` and, but for the last, an `answer`. `urlOf` gives a picture's address.
 * What is not set is left out, so that the server's own value holds.
 */
export function requestBody(exchanges, settings, urlOf) {
  const messages = [];
  if (settings.system) messages.push({ role: "system", content: settings.system });
  exchanges.forEach((exchange, at) => {
    messages.push({ role: "user", content: content(exchange, urlOf) });
    const last = at === exchanges.length - 1;
    if (!last && exchange.answer) messages.push({ role: "assistant", content: exchange.answer });
  });
  const body = { model: settings.model, messages, stream: true, stream_options: { include_usage: true } };
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
  return body;
}

function content({ text, pictures }, urlOf) {
  if (!pictures.length) return text;
  const parts = pictures.map((picture) => ({ type: "image_url", image_url: { url: urlOf(picture) } }));
  return text ? [...parts, { type: "text", text }] : parts;
}
