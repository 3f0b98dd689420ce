// Server-sent events, as the HTML standard has them, from bytes that come in pieces of any size.

/** Takes pieces of text and gives the data of the events that are complete. */
export class EventParser {
  #rest = "";
  #data = [];

  push(text) {
    const found = [];
    // A carriage return at the end may be the first half of a line's end.
    this.#rest += text;
    const held = this.#rest.endsWith("\r") ? "\r" : "";
    const lines = this.#rest.slice(0, this.#rest.length - held.length).split(/\r\n|\n|\r/);
    this.#rest = lines.pop() + held;
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) found.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line === "data" || line.startsWith("data:")) {
        this.#data.push(line.slice(5).replace(/^ /, ""));
      } // comments and other fields have no meaning here
    }
    return found;
  }
}

/** The data of each event of a body, as they come. */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      yield* parser.push(done ? decoder.decode() : decoder.decode(value, { stream: true }));
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
