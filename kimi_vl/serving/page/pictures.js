// Pictures: their size, and copies that are smaller, which are made only where that is asked for.
import { element } from "./dom.js";

export const LARGE_SIDE = 1792; // the longest side of a picture that was made smaller

/** Give a picture its `width`, `height` and `preview`, and say whether it can be read. */
export async function measure(picture) {
  Object.assign(picture, { width: 0, height: 0, smaller: false });
  let bitmap = null;
  try {
    bitmap = await createImageBitmap(picture.blob);
  } catch {
    return picture.type === "image/tiff"; // which browsers do not show, but the server reads
  }
  [picture.width, picture.height] = [bitmap.width, bitmap.height];
  bitmap.close();
  picture.preview = URL.createObjectURL(picture.blob);
  return true;
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
  return { ...picture, name, type, blob, width, height, data: null, preview: URL.createObjectURL(blob), smaller: true };
}

export const isLarge = ({ width, height }) => Math.max(width, height) > LARGE_SIDE;
