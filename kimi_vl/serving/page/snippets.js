// The same request for a terminal and for a program. Files are read by their names, not written out.
import { requestBody } from "./request.js";

/** A command for a POSIX shell, with curl and base64. */
export function curl(exchanges, settings, baseUrl, hasKey) {
  const { body, places } = withPlaces(exchanges, settings);
  // In a here-document a shell reads $, ` and \ only.
  let json = JSON.stringify(body, null, 2).replace(/[\\$`]/g, "\\$&");
  for (const [place, { name, type }] of places) {
    const file = `'${name.replaceAll("'", "'\\''")}'`;
    json = json.replace(place, () => `data:${type};base64,$(base64 < ${file} | tr -d '\\n')`);
  }
  const key = hasKey ? `  -H "Authorization: Bearer $KIMI_VL_API_KEY" \\\n` : "";
  const url = `'${baseUrl.replaceAll("'", "%27")}/chat/completions'`;
  const end = freeWord(json);
  return `curl --no-buffer ${url} \\\n${key}  -H 'Content-Type: application/json' --data-binary @- <<${end}\n${json}\n${end}\n`;
}

/** A Python program that uses the openai package. */
export function python(exchanges, settings, baseUrl, hasKey) {
  const { body, places } = withPlaces(exchanges, settings);
  const { model, messages, thinking_budget, kimi_vl, ...others } = body;
  const lines = [`    model=${literal(model ?? "")},`, `    messages=${literal(messages, 1)},`];
  for (const [name, value] of Object.entries(others)) lines.push(`    ${name}=${literal(value, 1)},`);
  const extra = JSON.parse(JSON.stringify({ thinking_budget, kimi_vl })); // without what is not set
  if (Object.keys(extra).length) lines.push(`    extra_body=${literal(extra, 1)},`);
  let call = lines.join("\n");
  for (const [place, { name, type }] of places) {
    call = call.replace(JSON.stringify(place), () => `data_url(${literal(name)}, ${literal(type)})`);
  }
  const imports = [places.size && "import base64", hasKey && "import os", places.size && "from pathlib import Path"];
  const head = imports.filter(Boolean);
  const reader = places.size
    ? `\n\ndef data_url(path, kind):\n    data = base64.b64encode(Path(path).read_bytes()).decode()\n` +
      `    return f"data:{kind};base64,{data}"\n\n`
    : "";
  const key = hasKey ? `os.environ["KIMI_VL_API_KEY"]` : `"none"`;
  return `${head.length ? `${head.join("\n")}\n\n` : ""}from openai import OpenAI
${reader}
client = OpenAI(base_url=${literal(baseUrl)}, api_key=${key})
stream = client.chat.completions.create(
${call}
)
for chunk in stream:
    if chunk.choices:
        delta = chunk.choices[0].delta
        print(getattr(delta, "reasoning_content", None) or delta.content or "", end="", flush=True)
print()
`;
}

/** The body with a word in place of each file's data that no text of the user can contain. */
function withPlaces(exchanges, settings) {
  const nonce = [...crypto.getRandomValues(new Uint32Array(3))].map((part) => part.toString(36)).join("");
  const places = new Map();
  const body = requestBody(exchanges, settings, (file) => {
    const place = `file-${nonce}-${places.size}-`;
    places.set(place, file);
    return place;
  });
  return { body, places };
}

/** A word that is no line of the text. */
function freeWord(text) {
  let word = "JSON";
  while (text.split("\n").includes(word)) word += "_";
  return word;
}

/** A JSON value as Python writes it. Strings of JSON are strings of Python. */
function literal(value, depth = 0) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = "    ".repeat(depth + 1);
  const outer = "    ".repeat(depth);
  const items = Array.isArray(value)
    ? value.map((item) => literal(item, depth + 1))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, depth + 1)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const line = open + items.join(", ") + close;
  if (line.length + outer.length < 90 && !line.includes("\n")) return line;
  return `${open}\n${items.map((item) => `${inner}${item},`).join("\n")}\n${outer}${close}`;
}
