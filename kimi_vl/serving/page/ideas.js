// What a new conversation can begin with. The pictures are drawn here, so that there is something to look at at once.
import { element } from "./dom.js";

const SIZE = { width: 448, height: 336 };

/** Buttons; each calls `choose` with a text and files. */
export function ideas(choose) {
  const all = [
    ["Read a sum", "What is the result?", drawSum, "sum.png"],
    ["Describe some shapes", "Describe this image in detail.", drawShapes, "shapes.png"],
    ["Ask without a picture", "What is a mixture of experts?", null, ""],
  ];
  return all.map(([label, text, draw, name]) => {
    const button = element("button", { type: "button", className: "idea" }, element("strong", {}, label), element("span", {}, text));
    button.addEventListener("click", async () => choose(text, draw ? [await drawn(draw, name)] : []));
    return button;
  });
}

async function drawn(draw, name) {
  const canvas = element("canvas", SIZE);
  const context = canvas.getContext("2d");
  context.fillStyle = "#faf8f2";
  context.fillRect(0, 0, SIZE.width, SIZE.height);
  draw(context);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new File([blob], name, { type: "image/png" });
}

const upTo = (most) => Math.floor(Math.random() * most);

function drawSum(context) {
  context.fillStyle = "#1d2433";
  context.font = "64px 'DejaVu Sans', Roboto, 'Open Sans', Arial, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(`${11 + upTo(40)} + ${11 + upTo(40)} = ?`, SIZE.width / 2, SIZE.height / 2);
}

function drawShapes(context) {
  const middle = SIZE.height / 2;
  const shapes = [["#e02b2b", drawCircle], ["#1f9d45", drawTriangle], ["#2460d8", drawSquare]];
  shapes.sort(() => Math.random() - 0.5);
  shapes.forEach(([colour, shape], at) => {
    context.fillStyle = colour;
    context.beginPath();
    shape(context, 90 + at * 134, middle + upTo(60) - 30, 44);
    context.fill();
  });
}

const drawCircle = (context, x, y, r) => context.arc(x, y, r, 0, 2 * Math.PI);
const drawSquare = (context, x, y, r) => context.rect(x - r * 0.85, y - r * 0.85, r * 1.7, r * 1.7);
function drawTriangle(context, x, y, r) {
  context.moveTo(x, y - r);
  context.lineTo(x + r, y + r * 0.8);
  context.lineTo(x - r, y + r * 0.8);
}
