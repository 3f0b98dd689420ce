// What the server took of videos and documents, and what that cost, in words.
import { element } from "./dom.js";

const number = new Intl.NumberFormat("en");

/** A time in a video, in seconds. */
export function clock(time) {
  const tenths = Math.round(10 * time);
  const [hours, minutes, seconds] = [Math.floor(tenths / 36_000), Math.floor(tenths / 600) % 60, Math.floor(tenths / 10) % 60];
  const two = (value) => String(value).padStart(2, "0");
  const rest = tenths % 10 ? `.${tenths % 10}` : "";
  return `${hours ? `${hours}:${two(minutes)}` : minutes}:${two(seconds)}${rest}`;
}

/** Page numbers with neighbours joined: 1–3, 7. */
function ranges(pages) {
  const found = [];
  for (const page of pages) {
    if (found.length && page === found.at(-1)[1] + 1) found.at(-1)[1] = page;
    else found.push([page, page]);
  }
  return found.map(([first, last]) => (first === last ? `${first}` : `${first}–${last}`)).join(", ");
}

const many = (count, noun) => `${number.format(count)} ${noun}${count === 1 ? "" : "s"}`;

/** What was taken of one file: "3 frames, 0:00 to 0:02", or "pages 1–3, 7". */
export function amount({ kind, taken, wanted }) {
  if (kind === "image") return "";
  const count = taken.length < wanted ? `${number.format(taken.length)} of ${many(wanted, "frame")}` : many(taken.length, "frame");
  if (kind === "video") return taken.length > 1 ? `${count}, ${clock(taken[0])} to ${clock(taken.at(-1))}` : count;
  return `${taken.length === 1 ? "page" : "pages"} ${ranges(taken)}`;
}

export const cost = ({ tokens }) => many(tokens, "token");

/** The last of the server's `media` are those of the last message's `files`, of which pictures may not be listed. */
export function ofFiles(media, files) {
  const pictures = media?.some(({ kind }) => kind === "image");
  const listed = files.filter(({ kind }) => pictures || kind !== "image");
  const own = media?.slice(media.length - listed.length) ?? [];
  return listed.flatMap((file, at) => (own[at]?.kind === file.kind ? [[file, own[at]]] : []));
}

/** What was taken of the files of a question, as lines to unfold; a time leads to its place in the player. */
export function taken(media, files) {
  return ofFiles(media, files).map(([file, use]) => {
    const size = `${use.width} × ${use.height} pixels`;
    const inner = element("p", {}, use.kind === "video" ? `Each frame has ${size}. ` : `The largest page has ${size}.`);
    if (use.kind === "video") inner.append(element("span", { className: "times" }, ...use.taken.map((time) => moment(file, time))));
    const summary = element("summary", {}, element("b", {}, file.name), `: ${amount(use)} · ${cost(use)}`);
    return element("details", { className: "taken" }, summary, inner);
  });
}

function moment(file, time) {
  const button = element("button", { type: "button", className: "link", "aria-label": `Show ${file.name} at ${clock(time)}` }, clock(time));
  button.addEventListener("click", () => {
    if (!file.player?.isConnected) return;
    file.player.currentTime = time;
    file.player.scrollIntoView({ block: "nearest" });
  });
  return button;
}
