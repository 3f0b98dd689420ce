// How a file looks: a picture as itself, a video as its first frame, another file as a card with its name and size.
import { size } from "./attachments.js";
import { element, icon } from "./dom.js";

/** A picture, small. What no browser shows has its name instead. */
export function thumbnail({ name, preview, width, height }) {
  if (!preview) return element("span", { className: "nameless", title: name }, name);
  return element("img", { src: preview, alt: name, title: name, width, height });
}

/** A file of which there is no picture: its name and size, and a place for a line of text, which is `card.told`. */
export function card(file) {
  const told = element("span", { className: "told" }, size(file.blob.size));
  const face = file.kind === "video" && file.preview ? firstFrame(file) : icon(file.kind);
  const node = element("span", { className: "card", title: file.name }, face, element("b", {}, file.name), told);
  return Object.assign(node, { told });
}

/** The first frame of a video, or a drawing in its place where this browser does not play it. */
function firstFrame({ preview }) {
  const video = element("video", { src: preview, muted: true, playsInline: true, preload: "metadata", tabIndex: -1, "aria-hidden": "true" });
  video.addEventListener("error", () => video.replaceWith(icon("video")));
  return video;
}

/** A file in a question. A video can be played, if this browser does; `file.player` is where. */
export function shown(file) {
  if (file.kind === "image") return thumbnail(file);
  if (file.kind === "document") return card(file);
  file.player = element("video", {
    src: file.preview, controls: true, muted: true, playsInline: true, preload: "metadata", "aria-label": file.name,
  });
  const film = element("span", { className: "film" }, file.player, element("span", {}, `${file.name} · ${size(file.blob.size)}`));
  file.player.addEventListener("error", () => film.replaceWith(card({ ...file, preview: null })));
  return film;
}
