// What a message with files would cost, by the server's own count, before it is sent.
import { RequestError, tokenize } from "./api.js";
import { explain } from "./errors.js";

const WAIT = 400; // milliseconds in which several changes are one
const FREELY = 24 * 2 ** 20; // bytes that are sent for an estimate without being asked for

export class Estimate {
  #timer = 0;
  #controller = null;
  #offered = true; // until the server says that it has no such route

  /** `tell` is called with {text, problem, media, ask}: `ask` is a function where an estimate has to be asked for. */
  constructor(tell) {
    this.tell = tell;
  }

  /** The message has changed: `bytes` are those of its request, `body` a function that makes it. */
  renew(bytes, body) {
    this.drop();
    if (!this.#offered) return;
    if (bytes > FREELY) this.tell({ ask: () => this.#run(body) });
    else this.#timer = setTimeout(() => this.#run(body), WAIT);
  }

  /** There is nothing to estimate any more. */
  drop() {
    clearTimeout(this.#timer);
    this.#controller?.abort();
    this.tell({});
  }

  async #run(body) {
    this.#controller = new AbortController();
    const { signal } = this.#controller;
    this.tell({ text: "Counting the tokens …" });
    let told = {};
    try {
      const { count, max_model_len: context, media } = await tokenize(await body(), signal);
      const parts = [count, context].map((value) => value?.toLocaleString("en"));
      if (count) told = { text: `${parts[0]} tokens${context ? ` of ${parts[1]}` : ""} with this message`, media };
    } catch (error) {
      this.#offered = !(error.status === 404 || error.status === 405);
      // What is wrong with the message is said now; what may be over when it is sent is not.
      if (error instanceof RequestError && error.status === 400) told = { problem: explain(error).detail };
    }
    if (!signal.aborted) this.tell(told);
  }
}
