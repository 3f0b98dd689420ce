// Files that are to be sent: told by their content, and refused here where the server would refuse them for their size.
import { measure } from "./pictures.js";

const MIB = 2 ** 20;
export const LIMITS = {
  bytes: { image: 32 * MIB, video: 100 * MIB, document: 100 * MIB },
  pixels: 40_000_000,
  images: 64, // of a request
  files: 4, // videos and documents of a request
  body: 100 * MIB,
};
const NOUNS = { image: "an image", video: "a video", document: "a document" };
const HEAD = 1024;

const begins = (bytes, text, at = 0) => [...text].every((character, offset) => bytes[at + offset] === character.charCodeAt(0));
const contains = (bytes, text) => String.fromCharCode(...bytes).includes(text);
const isBox = (bytes, names) => names.some((name) => begins(bytes, name, 4));
const STILL_BRANDS = ["avif", "avis", "heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1"];

// The first that matches: [kind, media type, test of the file's beginning].
const FORMATS = [
  ["image", "image/png", (b) => begins(b, "\x89PNG\r\n\x1a\n")],
  ["image", "image/jpeg", (b) => begins(b, "\xff\xd8\xff")],
  ["image", "image/gif", (b) => begins(b, "GIF87a") || begins(b, "GIF89a")],
  ["image", "image/webp", (b) => begins(b, "RIFF") && begins(b, "WEBP", 8)],
  ["image", "image/bmp", (b) => begins(b, "BM")],
  ["image", "image/tiff", (b) => ["II*\0", "MM\0*", "II+\0", "MM\0+"].some((mark) => begins(b, mark))],
  [null, "", (b) => isBox(b, ["ftyp"]) && STILL_BRANDS.some((brand) => begins(b, brand, 8))],
  ["video", "video/quicktime", (b) => isBox(b, ["ftyp"]) && begins(b, "qt  ", 8)],
  ["video", "video/mp4", (b) => isBox(b, ["ftyp", "moov", "mdat", "wide", "free", "skip", "pnot"])],
  ["video", "video/webm", (b) => begins(b, "\x1aE\xdf\xa3") && contains(b, "webm")],
  ["video", "video/x-matroska", (b) => begins(b, "\x1aE\xdf\xa3")],
  ["video", "video/x-msvideo", (b) => begins(b, "RIFF") && begins(b, "AVI ", 8)],
  ["document", "application/pdf", (b) => contains(b, "%PDF-")],
];

/** What the first bytes of a file say that it is: {kind, type}, null where nothing here reads it. */
export function formatOf(bytes) {
  const head = bytes.subarray(0, HEAD);
  const [kind, type] = FORMATS.find(([, , matches]) => matches(head)) ?? [null];
  return kind && { kind, type };
}

/** Why a file cannot be sent, as a sentence; `picture` where a smaller copy of it could be. */
export class FileError extends Error {
  constructor(name, sentence, picture = null) {
    super(`${name}: ${sentence}`);
    this.picture = picture;
  }
}

/**
 * What of a file is sent and shown: {kind, name, type, blob, preview}, and of a picture its `width` and `height`.
 * `preview` is an address for this page, null where no browser shows such files. Raises FileError.
 */
export async function read(file) {
  const name = (file.name || "file").replace(/[\0-\x1f\x7f\u202a-\u202e\u2066-\u2069]/g, "");
  const begin = new Uint8Array(await file.slice(0, HEAD).arrayBuffer().catch(() => new ArrayBuffer(0)));
  const format = formatOf(begin);
  if (!format) {
    throw new FileError(name, "this is no picture (PNG, JPEG, WebP, GIF, BMP, TIFF), video (MP4, MOV, MKV, WebM, AVI) or PDF file.");
  }
  // What a browser guesses from the name is not kept.
  const made = { ...format, name, blob: file.slice(0, file.size, format.type), preview: null };
  if (made.kind === "image" && !(await measure(made))) throw new FileError(name, "it cannot be read. It may be damaged.");
  if (made.kind === "video") made.preview = URL.createObjectURL(made.blob);
  const limit = LIMITS.bytes[made.kind];
  if (file.size > limit) {
    const sentence = `${NOUNS[made.kind]} file is larger than ${Math.floor(limit / MIB)} MiB; send a smaller one.`;
    throw new FileError(name, sentence, made.width ? made : null);
  }
  if (made.width * made.height > LIMITS.pixels) {
    const sentence = `an image has more than ${Math.floor(LIMITS.pixels / 1e6)} million pixels; send a smaller one.`;
    throw new FileError(name, sentence, made);
  }
  return made;
}

export const isPicture = ({ kind }) => kind === "image";

/** The server's sentence where a request has too many files, or "". */
export function tooMany(files) {
  const images = files.filter(isPicture).length;
  if (images > LIMITS.images) return `A request may have ${LIMITS.images} images; send fewer.`;
  if (files.length - images > LIMITS.files) return `A request may have ${LIMITS.files} videos and documents; send fewer.`;
  return "";
}

/** Bytes of a file in a body. */
export const sentBytes = ({ type, blob }) => `data:${type};base64,`.length + 4 * Math.ceil(blob.size / 3);

/** The file's bytes in an address, made once. */
export async function dataUrl(file) {
  if (!file.data) {
    const bytes = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(new FileError(file.name, "it cannot be read any more. Add it again."));
      reader.readAsDataURL(file.blob);
    });
    file.data = `data:${file.type};base64,${bytes.slice(bytes.indexOf(",") + 1)}`;
  }
  return file.data;
}

/** A number of bytes for a person. */
export function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  const [unit, name] = bytes < 1e6 ? [1e3, "KB"] : [1e6, "MB"];
  return `${(bytes / unit).toLocaleString("en", { maximumSignificantDigits: bytes < 100 * unit ? 2 : 3 })} ${name}`;
}
