// The arithmetic around the networks, as in aecr_jax/inference/restore.py and aecr_jax/networks/coarse_net.py.
//
// A picture is { width, height, data }, where data has four bytes per pixel, RGBA, as in ImageData. Images for the networks are Float32Arrays
// of three planes, RGB in [0, 1].

/** Return the index that i stands for in a row of n pixels that is continued by reflection. */
export function mirror(i, n) {
  const period = Math.max(1, 2 * (n - 1));
  return Math.min(i % period, period - (i % period));
}

/**
 * Pad a picture by reflection and reduce it by averaging, to about `pixels` pixels at most, for the network of the haze's maps.
 * Returns { data, width, height, reduction }; width and height are multiples of `multiple`.
 */
export function reduce({ width, height, data }, { pixels, multiple }) {
  let reduction = 1;
  while (width * height > pixels * reduction ** 2) reduction++;
  const [columns, rows] = [width, height].map((size) => Math.ceil(size / (multiple * reduction)) * multiple);
  const plane = columns * rows;
  const sums = new Float32Array(3 * plane);
  const source = Int32Array.from({ length: columns * reduction }, (_, x) => 4 * mirror(x, width));
  for (let y = 0; y < rows * reduction; y++) {
    const line = 4 * width * mirror(y, height);
    const row = Math.floor(y / reduction) * columns;
    for (let x = 0; x < source.length; x++) {
      const from = line + source[x];
      const to = row + Math.floor(x / reduction);
      sums[to] += data[from];
      sums[to + plane] += data[from + 1];
      sums[to + 2 * plane] += data[from + 2];
    }
  }
  const scale = 1 / (255 * reduction ** 2);
  for (let i = 0; i < sums.length; i++) sums[i] *= scale;
  return { data: sums, width: columns, height: rows, reduction };
}

/** Return where the pixels `from` to `to` of a row that is enlarged by `factor` lie between n values: the first, the second, its share. */
function between(from, to, factor, n) {
  const share = Float32Array.from({ length: to - from }, (_, i) => Math.min(Math.max((from + i + 0.5) / factor - 0.5, 0), n - 1));
  const first = Int32Array.from(share);
  share.forEach((position, i) => (share[i] = position - first[i]));
  return { first, second: first.map((i) => Math.min(i + 1, n - 1)), share };
}

/**
 * Restore the rows `from` to `to` (exclusive) of a picture: the first map times the pixel, minus the other three.
 *
 * maps is { data, width, height }, four planes, which are enlarged bilinearly by `factor`; output receives RGBA with the picture's alpha.
 */
export function applyMaps({ width, data }, maps, factor, output, from, to) {
  const plane = maps.width * maps.height;
  const line = new Float32Array(4 * maps.width);
  const columns = between(0, width, factor, maps.width);
  const rows = between(from, to, factor, maps.height);
  for (let y = from; y < to; y++) {
    const above = rows.first[y - from] * maps.width;
    const below = rows.second[y - from] * maps.width;
    const share = rows.share[y - from];
    for (let x = 0; x < maps.width; x++) {
      for (let c = 0; c < 4; c++) {
        const first = maps.data[c * plane + above + x];
        line[4 * x + c] = first + share * (maps.data[c * plane + below + x] - first);
      }
    }
    for (let x = 0; x < width; x++) {
      const left = 4 * columns.first[x];
      const right = 4 * columns.second[x];
      const part = columns.share[x];
      const pixel = 4 * (y * width + x);
      const gain = line[left] + part * (line[right] - line[left]);
      for (let c = 0; c < 3; c++) {
        const offset = line[left + c + 1] + part * (line[right + c + 1] - line[left + c + 1]);
        output[pixel + c] = gain * data[pixel + c] - 255 * offset; // a Uint8ClampedArray rounds and clips
      }
      output[pixel + 3] = data[pixel + 3];
    }
  }
}

/** Return how a side of `size` pixels is cut: the length of the tiles and their first pixels, as by `Side.cut` in restore.py. */
export function cutSide(size, tile, overlap, multiple) {
  if (size <= tile) return [size, [0]];
  const divisor = (a, b) => (b ? divisor(b, a % b) : a);
  const unit = divisor(multiple, Math.max(1, Math.floor(overlap / 2)));
  const [total, most] = [Math.ceil(size / unit), Math.floor(tile / unit)];
  const rest = unit * total - size;
  const shared = Math.ceil((overlap + rest) / unit);
  const count = Math.ceil((total - shared) / (most - shared));
  const length = Math.ceil((total + (count - 1) * shared) / count);
  return [unit * length - rest, Array.from({ length: count }, (_, i) => unit * Math.floor((i * (total - length)) / (count - 1)))];
}

/** Return the weights of each tile along a side, which decrease over `overlap` pixels towards its ends; those of one pixel add up to 1. */
function tileWeights(size, tile, overlap, starts) {
  const ramp = Float64Array.from({ length: tile }, (_, i) => Math.min((Math.min(i, tile - 1 - i) + 1) / overlap, 1));
  const total = new Float64Array(size);
  for (const start of starts) ramp.forEach((weight, i) => (total[start + i] += weight));
  return starts.map((start) => ramp.map((weight, i) => weight / total[start + i]));
}

/**
 * Restore a picture in overlapping tiles of one size, which are blended linearly where they overlap.
 *
 * run(image, width, height) returns the promise of the restored tile; progress(done, total) is called after each tile. Pictures of at most
 * tile * tile pixels are restored as a whole, and so are all pictures if tile is 0. The memory grows with the width, not with the height.
 */
export async function restoreTiles({ width, height, data }, { tile, overlap, multiple }, run, output, progress) {
  const whole = !tile || width * height <= tile * tile;
  const [[columns, lefts], [rows, tops]] = [width, height].map((size) => cutSide(size, whole ? size : tile, overlap, multiple));
  const across = tileWeights(width, columns, overlap, lefts);
  const down = tileWeights(height, rows, overlap, tops);
  const band = new Float32Array(3 * width * rows); // the sums of the rows from `top` on
  for (const [j, top] of tops.entries()) {
    for (const [i, left] of lefts.entries()) {
      const image = cut(data, width, left, top, columns, rows);
      const restored = await run(image, columns, rows);
      for (let y = 0; y < rows; y++) {
        for (let x = 0; x < columns; x++) {
          const weight = down[j][y] * across[i][x];
          for (let c = 0; c < 3; c++) {
            const value = restored[(c * rows + y) * columns + x];
            band[3 * (y * width + left + x) + c] += weight * Math.min(Math.max(value, 0), 1);
          }
        }
      }
      progress(j * lefts.length + i + 1, tops.length * lefts.length);
    }
    const done = j + 1 < tops.length ? tops[j + 1] - top : rows; // no later tile has these rows
    for (let k = 0, p = 4 * top * width; k < done * width; k++, p += 4) {
      for (let c = 0; c < 3; c++) output[p + c] = 255 * band[3 * k + c];
      output[p + 3] = data[p + 3];
    }
    band.copyWithin(0, 3 * done * width).fill(0, 3 * (rows - done) * width);
  }
}

function cut(data, width, left, top, columns, rows) {
  const image = new Float32Array(3 * columns * rows);
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++) {
      const from = 4 * ((top + y) * width + left + x);
      for (let c = 0; c < 3; c++) image[(c * rows + y) * columns + x] = data[from + c] / 255;
    }
  }
  return image;
}

/** Return `hazy + strength * (restored - hazy)`, with alpha of `hazy`, as a new array. */
export function blend(hazy, restored, strength) {
  const result = new Uint8ClampedArray(hazy.length);
  for (let i = 0; i < hazy.length; i++) result[i] = hazy[i] + strength * (restored[i] - hazy[i]);
  return result;
}
