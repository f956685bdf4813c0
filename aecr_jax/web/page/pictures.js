// Reading and writing image files. A picture is { width, height, data } as in restore.js.

const HEADER = 2 ** 20; // bytes; in a JPEG file, profiles and a preview may come before the size

/** Return [width, height] of a PNG, JPEG, WebP, GIF or BMP file without decoding it, or null if they are not found. */
export async function declaredSize(file) {
  const view = new DataView(await file.slice(0, HEADER).arrayBuffer());
  if (view.byteLength < 30) return null;
  const tag = (at) => String.fromCharCode(...[0, 1, 2, 3].map((i) => view.getUint8(at + i)));
  const u16 = (at) => view.getUint16(at, true);
  const u24 = (at) => u16(at) + 65536 * view.getUint8(at + 2);
  if (tag(0) === "\x89PNG") return [view.getUint32(16), view.getUint32(20)];
  if (tag(0) === "GIF8") return [u16(6), u16(8)];
  if (tag(0).startsWith("BM")) return [view.getInt32(18, true), Math.abs(view.getInt32(22, true))];
  if (tag(0) === "RIFF" && tag(8) === "WEBP") {
    if (tag(12) === "VP8X") return [u24(24) + 1, u24(27) + 1];
    if (tag(12) === "VP8 ") return [u16(26) & 0x3fff, u16(28) & 0x3fff];
    const bits = view.getUint32(21, true);
    return [(bits & 0x3fff) + 1, ((bits >>> 14) & 0x3fff) + 1];
  }
  return view.getUint16(0) === 0xffd8 ? jpegSize(view) : null;
}

/** Look for the frame header, one of the markers C0 to CF except those for tables (C4, CC) and extensions (C8). */
function jpegSize(view) {
  for (let at = 2; at + 9 <= view.byteLength && view.getUint8(at) === 0xff; ) {
    const marker = view.getUint8(at + 1);
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) return [view.getUint16(at + 7), view.getUint16(at + 5)];
    at += marker === 0xff ? 1 : 2 + view.getUint16(at + 2);
  }
  return null;
}

/**
 * Decode an image file as the browser shows it: in sRGB, with the EXIF orientation applied.
 *
 * Throws an Error with a message for the visitor if the file is no image, or has more than `limit` pixels; that is found before decoding
 * where declaredSize finds the size.
 */
export async function readPicture(file, limit) {
  const declared = await declaredSize(file);
  if (declared) checkSize(file.name, ...declared, limit);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new Error(`${file.name} is not an image that this browser can read. JPEG, PNG and WebP files work everywhere.`);
  }
  try {
    checkSize(file.name, bitmap.width, bitmap.height, limit);
    const context = makeCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    return context.getImageData(0, 0, bitmap.width, bitmap.height);
  } finally {
    bitmap.close();
  }
}

function checkSize(name, width, height, limit) {
  if (width * height <= limit) return;
  const size = `${width} × ${height} pixels, ${(width * height / 1e6).toFixed(0)} megapixels`;
  throw new Error(`${name} is too large (${size}): the limit is ${limit / 1e6} megapixels. Reduce it, or use the command dehaze.`);
}

function makeCanvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

function draw(picture) {
  const canvas = makeCanvas(picture.width, picture.height);
  canvas.getContext("2d").putImageData(new ImageData(picture.data, picture.width), 0, 0);
  return canvas;
}

/** Return a copy of a picture that is reduced, if necessary, to at most `pixels` pixels. */
export function makePreview(picture, pixels) {
  const scale = Math.min(1, Math.sqrt(pixels / (picture.width * picture.height)));
  if (scale === 1) return picture;
  const [width, height] = [picture.width, picture.height].map((size) => Math.max(1, Math.round(scale * size)));
  const context = makeCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(draw(picture), 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

/** Encode a picture as an image/png or image/jpeg file. JPEG has no transparency, so the picture is put on white. */
export async function encode(picture, type) {
  let canvas = draw(picture);
  if (type === "image/jpeg") {
    const opaque = makeCanvas(picture.width, picture.height);
    const context = opaque.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, picture.width, picture.height);
    context.drawImage(canvas, 0, 0);
    canvas = opaque;
  }
  const file = await new Promise((resolve) => canvas.toBlob(resolve, type, 0.92));
  if (!file) throw new Error("There is not enough memory in this browser to write the picture.");
  return file;
}
