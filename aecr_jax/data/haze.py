"""Haze by the atmospheric scattering model, with the parameters of RESIDE (Li et al., TIP 2019)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# RESIDE's indoor training set draws both uniformly.
AIRLIGHT_RANGE = (0.7, 1.0)
BETA_RANGE = (0.6, 1.8)


def add_haze(clear: np.ndarray, depth: np.ndarray, airlight: float, beta: float) -> np.ndarray:
    """Add haze by `I = J t + A (1 - t)` with `t = exp(-beta d)`, rounded to 8 bits like RESIDE's files.

    Args:
      clear: J, float32 `[H, W, 3]` in [0, 1].
      depth: d, `[H, W]`, 1 at the farthest point of the frame.
      airlight: A, one value for all channels.
      beta: scattering coefficient per unit of `depth`.

    Returns:
      The hazy image, float32 `[H, W, 3]` in [0, 1].

    Raises:
      ValueError: the sizes differ, or a depth is negative or NaN.
    """
    return _scatter(clear, _transmission(clear, depth, beta), np.float32(airlight))


def _transmission(clear: np.ndarray, depth: np.ndarray, beta: float) -> np.ndarray:
    """Return t, `[H, W, 1]`, for a depth that fits the image `clear`."""
    if clear.shape[:2] != depth.shape:
        raise ValueError(f"depth has shape {depth.shape} and must have the height and width of clear, {clear.shape[:2]}")
    if not depth.min() >= 0:  # also true for NaN
        raise ValueError(f"depth must be at least 0 everywhere, and its smallest value is {depth.min()}")
    return np.exp(-beta * depth.astype(np.float32))[..., None]


def add_constant_haze(clear: np.ndarray, transmission: float) -> np.ndarray:
    """Add haze with one transmission and airlight 1 to an image, as DehazeNet's training does; rounded to 8 bits.

    Args:
      clear: float32 `[H, W, 3]` in [0, 1].
      transmission: t in [0, 1]; 1 leaves the image clear.

    Returns:
      The hazy image, float32 `[H, W, 3]` in [0, 1].
    """
    return _scatter(clear, np.float32(transmission), np.float32(1))


def _scatter(clear: np.ndarray, transmission: np.ndarray | np.float32, airlight: np.float32) -> np.ndarray:
    hazy = clear * transmission + airlight * (1 - transmission)
    return (np.round(hazy * 255) / 255).astype(np.float32)


class Haze(NamedTuple):
    """A hazy image and what it was made with."""

    hazy: np.ndarray  # [H, W, 3]
    transmission: np.ndarray  # float32 [H, W, 1]
    airlight: np.ndarray  # float32 [3]


def haze_for(clear: np.ndarray, depth: np.ndarray | None, rng: np.random.Generator) -> Haze:
    """Add random haze to a clear image: with depth, that of RESIDE's training set; without, one transmission for the whole image.

    Args:
      clear: float32 `[H, W, 3]` in [0, 1].
      depth: `[H, W]`, as for `add_haze`, or None.
      rng: the source of airlight and beta, or of the transmission, uniform in [0, 1).

    Returns:
      The hazy image, float32 `[H, W, 3]` in [0, 1], with its transmission and airlight.
    """
    if depth is None:
        constant = rng.uniform()
        transmission = np.full((*clear.shape[:2], 1), constant, np.float32)
        return Haze(add_constant_haze(clear, constant), transmission, np.ones(3, np.float32))
    airlight, beta = draw_haze(rng)
    transmission = _transmission(clear, depth, beta)
    return Haze(_scatter(clear, transmission, np.float32(airlight)), transmission, np.full(3, airlight, np.float32))


def draw_haze(rng: np.random.Generator) -> tuple[float, float]:
    """Draw a random (airlight, beta) from the ranges of RESIDE's training set."""
    return float(rng.uniform(*AIRLIGHT_RANGE)), float(rng.uniform(*BETA_RANGE))


def depth_problem(values: np.ndarray) -> str | None:
    """Return the reason why an image's values, `[H, W]`, cannot be a depth map, or None if they can.

    Zeros are accepted: in NYU's 8-bit maps, they are the nearest points, rounded down. They may also mark missing measurements, and a
    largest value far above the others may be either the sky or such a mark; `check-data` warns of both.
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        return "its values must be finite, and some are NaN or infinite"
    if low < 0:
        return f"its values must be distances, at least 0, and the smallest is {low:g}"
    if low == high:
        return f"every value is {high:g}"
    if not ((values > 0.01 * high) & (values < high)).any():
        return f"every value is {high:g} or less than 1% of that, as in a mask or where {high:g} marks missing measurements"
    return None
