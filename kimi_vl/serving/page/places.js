// The places that an answer names, drawn over the pictures that were sent, each with a line in a list.
import { element } from "./dom.js";

// As in pictures that the server's package draws: colours take turns. White letters can be read on each.
const COLOURS = ["#d11442", "#1a63d8", "#1f7a1f", "#b35300", "#8a1ab0", "#00737f", "#7a6000", "#c01b70"];
const SPACE = "http://www.w3.org/2000/svg";

/** Nodes for `grounding` as the server gives it; `pictures` are those of its request, in order. */
export function places(grounding, pictures) {
  const found = (grounding?.findings ?? []).map((finding, at) => ({ ...finding, number: at + 1 })).filter(isDrawable);
  const nodes = pictures.map((picture, at) => {
    const own = found.filter(({ image }) => image === at);
    return own.length ? figure(picture, own) : null;
  });
  return nodes.filter(Boolean);
}

const isFraction = (value) => typeof value === "number" && value >= 0 && value <= 1;
const isList = (value, length) => Array.isArray(value) && value.length === length && value.every(isFraction);
const isDrawable = ({ relative_box: box, relative_points: points }) =>
  box ? isList(box, 4) : Array.isArray(points) && points.length > 0 && points.every((point) => isList(point, 2));

function figure(picture, findings) {
  const drawing = document.createElementNS(SPACE, "svg");
  const over = element("div", { className: "over" });
  if (picture.preview) {
    const { preview, name, width, height } = picture;
    drawing.setAttribute("aria-hidden", "true"); // the list says it all
    over.append(element("img", { src: preview, alt: name, width, height }), drawing);
  } else {
    over.append(element("p", { className: "note" }, `This browser does not show ${picture.name}.`));
  }
  const list = element("ol", { "aria-label": `Places in ${picture.name}` });
  const node = element("div", { className: "places" }, over, list);
  for (const finding of findings) {
    const line = item(finding);
    list.append(element("li", {}, line));
    for (const part of [line, ...(picture.preview ? drawn(finding, drawing, over) : [])]) {
      part.dataset.place = finding.number;
      part.style.setProperty("--place", COLOURS[(finding.number - 1) % COLOURS.length]);
    }
  }
  prepareMarks(node);
  return node;
}

/** Put a place over its picture; gives the nodes that were made for it. */
function drawn({ number, relative_box: box, relative_points: points }, drawing, over) {
  const shapes = [];
  if (box) {
    const [left, top, right, bottom] = box;
    shapes.push(shape("rect", { x: left, y: top, width: right - left, height: bottom - top }));
  } else {
    points.slice(1).forEach(([x2, y2], at) => shapes.push(shape("line", { x1: points[at][0], y1: points[at][1], x2, y2 })));
    shapes.push(...points.map(([cx, cy]) => shape("circle", { cx, cy }, { r: 8 })));
  }
  const outlines = shapes.map((each) => each.cloneNode()); // so that they are seen on any ground
  for (const each of outlines) each.setAttribute("class", "outline");
  drawing.append(...outlines, ...shapes);
  const [x, y] = box ?? points[0];
  const badge = element("span", { className: "badge", "aria-hidden": "true" }, String(number));
  badge.style.setProperty("--x", percent(x));
  badge.style.setProperty("--y", percent(y));
  badge.classList.toggle("beside", !box);
  over.append(badge);
  return [...outlines, ...shapes, badge];
}

const percent = (fraction) => `${100 * fraction}%`;

/** `fractions` are those of the picture's width and height, so that a drawing needs no size. */
function shape(tag, fractions, lengths = {}) {
  const node = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(fractions)) node.setAttribute(name, percent(value));
  for (const [name, value] of Object.entries(lengths)) node.setAttribute(name, value);
  return node;
}

function item({ number, label, action, box, points }) {
  const pixels = (point) => point.map((value) => Math.round(value)).join(", ");
  const name = label ?? action?.replaceAll("_", " ") ?? (box ? "box" : "point");
  const where = box ? [box.slice(0, 2), box.slice(2)] : (points ?? []);
  const line = element("button", { type: "button", "aria-pressed": "false" });
  line.append(element("span", { className: "badge" }, String(number)), " ", element("b", { dir: "auto" }, name), " ");
  line.append(element("span", { className: "where" }, `${where.map(pixels).join(" to ")} px`));
  return line;
}

/** A place stands out while its line or drawing is pointed at or in focus; a press on the line keeps it so. */
function prepareMarks(node) {
  const placeOf = ({ target }) => target.closest("[data-place]")?.dataset.place ?? null;
  let [pointed, kept] = [null, null];
  const show = () => {
    const marked = pointed ?? kept;
    node.classList.toggle("marking", marked !== null);
    for (const part of node.querySelectorAll("[data-place]")) part.classList.toggle("marked", part.dataset.place === marked);
    for (const line of node.querySelectorAll("[aria-pressed]")) line.setAttribute("aria-pressed", String(line.dataset.place === kept));
  };
  const point = (event) => {
    pointed = placeOf(event);
    show();
  };
  const leave = () => {
    pointed = null;
    show();
  };
  for (const kind of ["pointerover", "focusin"]) node.addEventListener(kind, point);
  for (const kind of ["pointerleave", "focusout"]) node.addEventListener(kind, leave);
  node.querySelector("ol").addEventListener("click", (event) => {
    const place = placeOf(event);
    kept = kept === place ? null : place;
    if (kept === null) pointed = null;
    show();
  });
}
