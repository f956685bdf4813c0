"""Depth for outdoor photographs that have none: smooth random fields with the statistics of RESIDE's outdoor depth, and farther sky.

Depth is in the unit of RESIDE's outdoor set, for which Li et al. (TIP 2019) draw beta from [0.04, 0.2]. RESIDE took that depth from an
estimator for single images. As the haze formula recovers it from the pairs of SOTS outdoor, it is smooth: an 8x8 grid keeps 95% of its
variance. It lies between 2 and 4.3, its standard deviation within an image is 0.64, and the lowest eighth of an image is nearer (2.5) than
its middle (3.2). These figures come from RESIDE's test set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

# Longest side in pixels of the maps in which the sky is found and depth is drawn; both are smooth.
_MAP_SIDE = 128
_NEAR, _FAR, _SKY = 1.95, 4.35, 4.5  # depth of the nearest point, of the farthest, and of the sky
# The ground recedes upwards; weights of that ramp and of noise with 2x2, 4x4 and 8x8 cells.
_RAMP, _OCTAVES = (0.3, 1.7), {2: 0.8, 4: 0.7, 8: 0.35}
# Depth is a logistic curve of the field. These set how far it leans to near or far, and the spread within an image.
_LEAN, _STEEPNESS = (-0.8, 0.9), (1.2, 2.3)
# Sky: the least brightness of a blue or grey pixel, how much its red and green may exceed its blue, the brightness from which any pale
# colour counts, the largest slope of the brightness (per pixel of the map, averaged around a pixel), and the least share of the picture.
_BRIGHT, _REDDER, _PALE, _ROUGH, _LEAST_SKY = 0.35, 0.03, 0.7, 0.035, 0.03
_AROUND = 2  # how far around a pixel the slope is averaged
_COLUMNS = 15  # the lower edge of the sky in a column is the median over this many columns


class Window(NamedTuple):
    """A part of an image, in pixels of the image."""

    top: int
    left: int
    height: int
    width: int


def find_sky(pixels: np.ndarray) -> np.ndarray:
    """Find the sky: bright, blue or pale, without texture, and connected with the top of the picture.

    Its lower edge is smoothed across columns. Everything above that edge that has the colour of sky counts as sky too, such as clouds and
    the gaps between branches. This is a rule of thumb, which takes bright walls for sky and misses a sunset; it only decides which places
    get the largest depth.

    Args:
      pixels: an image `[H, W, 3]`, uint8, or floating-point in [0, 1].

    Returns:
      A small map, uint8 `[h, w]` with at most 128 pixels on its longer side: 255 for sky, 0 elsewhere.
    """
    height, width = pixels.shape[:2]
    scale = min(1, _MAP_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.fromarray(pixels if pixels.dtype == np.uint8 else np.round(pixels * 255).astype(np.uint8))
    # Channels first and contiguous, because NumPy is slow at maxima over a short last axis.
    small = np.asarray(image.resize(size, Image.Resampling.BOX)).transpose(2, 0, 1).astype(np.float32, order="C") / 255
    red, green, blue = small
    least, greatest = small.min(0), small.max(0)
    colour = (greatest > _BRIGHT) & (blue > red - _REDDER) & (blue > green - _REDDER) | (least > _PALE)
    grey = small.mean(0)
    slope = np.hypot(ndimage.sobel(grey, 0), ndimage.sobel(grey, 1)) / 8
    plain = ndimage.uniform_filter(slope, 2 * _AROUND + 1) < _ROUGH
    certain = _from_top(colour & (plain | (least > _PALE)))
    # Pixels next to an edge have a slope around them, and are not plain.
    certain = colour & ndimage.binary_dilation(certain, iterations=_AROUND + 1)
    rows = len(certain)
    ends = np.where(certain.any(0), rows - np.argmax(certain[::-1], 0), 0)
    ends = ndimage.median_filter(ends, _COLUMNS, mode="nearest")
    sky = np.pad(colour & (np.arange(rows)[:, None] < ends), 4, mode="edge")
    sky = ndimage.binary_opening(ndimage.binary_closing(sky, iterations=2))[4:-4, 4:-4]
    sky = _from_top(sky)
    return np.uint8(255) * (sky if sky.mean() > _LEAST_SKY else np.zeros_like(sky))


def _from_top(mask: np.ndarray) -> np.ndarray:
    """Return the parts of a mask `[h, w]` that touch its first row."""
    labels, _ = ndimage.label(mask)
    return mask & np.isin(labels, labels[0])


def draw_depth(
    sky: np.ndarray, size: tuple[int, int], window: Window, shape: tuple[int, int], rng: np.random.Generator, nearer: float = 0
) -> np.ndarray:
    """Draw a random depth field for an image, and return it for a part of the image.

    Args:
      sky: the map from `find_sky`, uint8 `[h, w]`, 255 for sky.
      size: height and width of the image in pixels.
      window: the part of the image.
      shape: height and width of the result, to which the window is scaled.
      rng: the source of the field; the same state gives the same field for every window.
      nearer: probability that the depth of the nearest point is drawn between 0 and RESIDE's, which is 1.95.

    Returns:
      Depth, float32 `shape`, between that of the nearest point and about 4.4 on the ground and 4.5 in the sky.
    """
    near = rng.uniform(0, _NEAR) if nearer and rng.random() < nearer else _NEAR
    rows, columns = sky.shape
    above_bottom = (np.arange(rows, 0, -1, dtype=np.float32) - 0.5) / rows
    field = np.float32(rng.uniform(*_RAMP)) * np.sqrt(above_bottom)[:, None] * np.float32(3)
    for cells, weight in _OCTAVES.items():
        noise = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
        field = field + np.float32(weight) * np.asarray(noise.resize((columns, rows), Image.Resampling.BICUBIC))
    field = (field - field.mean()) / field.std()
    field = np.float32(rng.uniform(*_STEEPNESS)) * (field + np.float32(rng.uniform(*_LEAN)))
    depth = near + (_FAR - near) / (1 + np.exp(-field))
    share = sky.astype(np.float32) / 255
    depth = (depth + (_SKY - depth) * share).astype(np.float32)
    down, right = rows / size[0], columns / size[1]  # from pixels of the image to those of the map
    box = (
        window.left * right,
        window.top * down,
        min((window.left + window.width) * right, columns),
        min((window.top + window.height) * down, rows),
    )
    # Bilinear, because other filters overshoot at the edge of the sky.
    return np.asarray(Image.fromarray(depth).resize((shape[1], shape[0]), Image.Resampling.BILINEAR, box=box))
