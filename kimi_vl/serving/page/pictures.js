// Pictures that are to be sent: checked by their content, kept as they are, made smaller only where that is asked for.
import { element } from "./dom.js";

export const LIMITS = { pictures: 64, bytes: 32 * 2 ** 20, pixels: 40_000_000, body: 95 * 2 ** 20 };
export const LARGE_SIDE = 1792; // the longest side of a picture that was made smaller

const FORMATS = [
  ["image/png", (b) => begins(b, "\x89PNG\r\n\x1a\n")],
  ["image/jpeg", (b) => begins(b, "\xff\xd8\xff")],
  ["image/gif", (b) => begins(b, "GIF87a") || begins(b, "GIF89a")],
  ["image/webp", (b) => begins(b, "RIFF") && begins(b.subarray(8), "WEBP")],
  ["image/bmp", (b) => begins(b, "BM")],
  ["image/tiff", (b) => begins(b, "II*\0") || begins(b, "MM\0*")],
];

const begins = (bytes, text) => [...text].every((character, at) => bytes[at] === character.charCodeAt(0));

/** Why a file cannot be sent, as a sentence; `picture` where a smaller copy of it could be. */
export class PictureError extends Error {
  constructor(message, picture = null) {
    super(message);
    this.picture = picture;
  }
}

/** A picture of a file: {name, type, blob, url, preview, width, height}. Raises PictureError. */
export async function read(file) {
  const name = fileName(file);
  const begin = new Uint8Array(await file.slice(0, 16).arrayBuffer().catch(() => new ArrayBuffer(0)));
  const type = FORMATS.find(([, matches]) => matches(begin))?.[0];
  if (!type) throw new PictureError(`${name} is no picture of a known kind. PNG, JPEG, WebP, GIF, BMP and TIFF are.`);
  const blob = file.slice(0, file.size, type); // what a browser guesses from the name is not kept
  const picture = { name, type, blob, width: 0, height: 0, preview: null, smaller: false };
  let bitmap = null;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    // Browsers do not show TIFF, but the server reads it.
    if (type !== "image/tiff") throw new PictureError(`${name} cannot be read. It may be damaged.`);
  }
  if (bitmap) {
    [picture.width, picture.height] = [bitmap.width, bitmap.height];
    bitmap.close();
    picture.preview = URL.createObjectURL(blob);
  }
  if (file.size > LIMITS.bytes) {
    const size = `${megabytes(file.size)} MB`;
    throw new PictureError(`${name} is too large: ${size}, and ${megabytes(LIMITS.bytes)} are allowed.`, bitmap && picture);
  }
  if (picture.width * picture.height > LIMITS.pixels) {
    throw new PictureError(`${name} has too many pixels: 40 million are allowed.`, picture);
  }
  return picture;
}

/** A copy whose longest side has LARGE_SIDE pixels at most. */
export async function smaller(picture) {
  const scale = Math.min(1, LARGE_SIDE / Math.max(picture.width, picture.height));
  const [width, height] = [picture.width, picture.height].map((side) => Math.max(1, Math.round(side * scale)));
  const options = { resizeWidth: width, resizeHeight: height, resizeQuality: "high" };
  const bitmap = await createImageBitmap(picture.blob, options);
  const canvas = element("canvas", { width, height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
  const type = picture.type === "image/jpeg" ? "image/jpeg" : "image/png";
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, type, 0.92));
  const name = type === picture.type ? picture.name : `${picture.name.replace(/\.\w+$/, "")}.png`;
  return { ...picture, name, type, blob, width, height, preview: URL.createObjectURL(blob), smaller: true };
}

export const isLarge = ({ width, height }) => Math.max(width, height) > LARGE_SIDE;

/** A picture, small. What no browser shows has its name instead. */
export function thumbnail({ name, preview, width, height }) {
  if (!preview) return element("span", { className: "nameless", title: name }, name);
  return element("img", { src: preview, alt: name, title: name, width, height });
}

/** The picture's bytes in an address, made once. */
export async function dataUrl(picture) {
  if (!picture.data) {
    const bytes = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(new PictureError(`${picture.name} cannot be read any more. Add it again.`));
      reader.readAsDataURL(picture.blob);
    });
    picture.data = `data:${picture.type};base64,${bytes.slice(bytes.indexOf(",") + 1)}`;
  }
  return picture.data;
}

export const megabytes = (bytes) => Math.max(0.1, bytes / 2 ** 20).toLocaleString("en", { maximumFractionDigits: 1 });

function fileName(file) {
  return (file.name || "picture").replace(/[\0-\x1f\x7f\u202a-\u202e\u2066-\u2069]/g, "");
}
