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

# Longest side in pixels of the maps in which the sky is found and depth is drawn; both are smooth.
_MAP_SIDE = 128
NEAR, _FAR, _SKY = 1.95, 4.35, 4.5  # depth of the nearest point, of the farthest, and of the sky
# The ground recedes upwards; weights of that ramp and of noise with 2x2, 4x4 and 8x8 cells.
_RAMP, _OCTAVES = (0.3, 1.7), {2: 0.8, 4: 0.7, 8: 0.35}
# Depth is a logistic curve of the field. These set how far it leans to near or far, and the spread within an image.
_LEAN, _STEEPNESS = (-0.8, 0.9), (1.2, 2.3)
# Sky: the least brightness, the largest step between neighbours, and the largest distance from the colour at the top of the column;
# less than _LEAST_SKY of the picture is no sky.
_BRIGHT, _STEP, _CHANGE, _LEAST_SKY = 0.35, 0.06, 0.45, 0.03
_NEIGHBOURS = 9  # columns whose median decides where edges, such as those of clouds, are passed over


class Window(NamedTuple):
    """A part of an image, in pixels of the image."""

    top: int
    left: int
    height: int
    width: int


def find_sky(pixels: np.ndarray) -> np.ndarray:
    """Find the sky: bright, blue or grey, without edges, and connected with the top of the picture.

    Every column is followed from the top down to the first edge or change of colour; edges above the median of the neighbouring columns are
    passed over, as they are clouds. This is a rule of thumb, which takes bright walls for sky and misses a sunset; it only decides which
    places get the largest depth.

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
    colour = (small.max(0) > _BRIGHT) & (blue > red - 0.03) & (blue > green - 0.03) & (np.abs(small - small[:, :1]).max(0) < _CHANGE)
    smooth = np.ones_like(colour)
    smooth[1:] = np.abs(np.diff(small, axis=1)).max(0) < _STEP
    ends = np.logical_and.accumulate(colour & smooth, axis=0).sum(0)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(ends, _NEIGHBOURS // 2, mode="edge"), _NEIGHBOURS)
    passed_over = np.arange(len(colour))[:, None] < np.sort(around, axis=-1)[:, _NEIGHBOURS // 2]
    sky = np.logical_and.accumulate(colour & (smooth | passed_over), axis=0)
    return np.uint8(255) * (sky if sky.mean() > _LEAST_SKY else np.zeros_like(sky))


def draw_depth(
    sky: np.ndarray, size: tuple[int, int], window: Window, shape: tuple[int, int], rng: np.random.Generator, near: float = NEAR
) -> np.ndarray:
    """Draw a random depth field for an image, and return it for a part of the image.

    Args:
      sky: the map from `find_sky`, uint8 `[h, w]`, 255 for sky.
      size: height and width of the image in pixels.
      window: the part of the image.
      shape: height and width of the result, to which the window is scaled.
      rng: the source of the field; the same state gives the same field for every window.
      near: depth of the nearest point.

    Returns:
      Depth, float32 `shape`, between about `near` and 4.4 on the ground and 4.5 in the sky.
    """
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
