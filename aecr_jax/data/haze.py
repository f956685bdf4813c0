"""Haze by the atmospheric scattering model, with the parameters of RESIDE (Li et al., TIP 2019)."""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from aecr_jax.errors import UserError
from aecr_jax.settings import bounded

# Ranges of the exponent that darkens a scene, of the quality of JPEG compression, and of the factor by which a scene is rescaled.
_GAMMA, _QUALITY, RESCALING = (1.0, 2.0), (50, 95), (0.5, 1.5)
_NOISE_TABLE = 2**21  # least number of values in the table of noise: 8 MB


@dataclass(frozen=True)
class HazeConfig:
    """The haze that is made on the fly for training, and what else happens to a scene before and after.

    By default, haze is that of RESIDE, and everything else is off. The settings apply to data with depth and to outdoor photographs. Hazy
    images of pairs and the constant haze of `constant:FOLDER` are left as they are. The evaluations of a run use the defaults, so that
    scores of different runs can be compared; `eval --haze` uses other settings.
    """

    airlight: tuple[float, float] = bounded((0.7, 1.0), 0, 1)
    """Range of the airlight for data with depth: RESIDE's indoor set (Li et al., TIP 2019)."""
    beta: tuple[float, float] = bounded((0.6, 1.8), 0, 10)
    """Range of the scattering coefficient for data with depth, per largest depth of the frame: RESIDE's indoor set."""
    outdoor_airlight: tuple[float, float] = bounded((0.8, 1.0), 0, 1)
    """Range of the airlight for outdoor photographs: RESIDE's outdoor set (Li et al., TIP 2019)."""
    outdoor_beta: tuple[float, float] = bounded((0.04, 0.2), 0, 10)
    """Range of the scattering coefficient for outdoor photographs, whose depth is between 2 and 4.5: RESIDE's outdoor set."""
    outdoor_near: float = bounded(0.0, 0, 1)
    """Probability that the depth of an outdoor photograph begins nearer than RESIDE's, between 0 and 2, so that haze begins behind a clear
    foreground, as in wide views. The idea is this project's."""
    cast: float = bounded(0.0, 0, 1)
    """Largest deviation of each channel of the airlight from grey, drawn uniformly; 0 is grey, as in RESIDE. RIDCP (Wu et al., CVPR 2023)
    has coloured airlight."""
    uneven: float = bounded(0.0, 0, 1)
    """Largest share by which the airlight is darker in some part of the picture than in another; the share is drawn uniformly from 0, and
    the brightness varies smoothly. Haze is often brighter near the sun and darker near the ground. The idea is this project's."""
    clear: float = bounded(0.0, 0, 1)
    """Probability that a crop gets no haze (transmission 1), so that a network learns to leave clear pictures as they are. The idea is this
    project's."""
    darken: float = bounded(0.0, 0, 1)
    """Probability that a scene is darkened by an exponent from [1, 2] before it gets haze, so that airlight is added to dark scenes too.
    RIDCP darkens the hazy image alone; here, the clear image is dark as well, as the network removes haze and does not brighten."""
    noise: float = bounded(0.0, 0, 1)
    """Largest standard deviation of Gaussian noise on the hazy image, drawn uniformly from 0, in an image in [0, 1]; as in RIDCP, but after
    the haze."""
    jpeg: float = bounded(0.0, 0, 1)
    """Probability that the hazy image is compressed as JPEG, with a quality from 50 to 95; as in RIDCP, which begins at 30."""
    resize: float = bounded(0.0, 0, 1)
    """Probability that a scene is rescaled by a factor from 0.5 to 1.5 before it gets haze. The crop keeps its size; where the image is too
    small for a small factor, the least factor is larger. The idea is this project's."""
    foreign_depth: float = bounded(0.0, 0, 1)
    """Probability that a scene with depth gets the depth of another one, as in DA-HAZE, so that a network cannot infer the haze from what
    it knows about depth."""
    reside: float = bounded(0.0, 0, 1)
    """Probability that a crop gets RESIDE's haze, as with the defaults, in place of all settings above. So the haze on which networks
    are scored stays frequent among haze of wide ranges. The idea is this project's."""

    def validate(self) -> None:
        """Raise UserError if a range begins above its end."""
        for name in ("airlight", "beta", "outdoor_airlight", "outdoor_beta"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"haze.{name} (={low:g},{high:g}) must have its lower end first: {high:g},{low:g}")


RESIDE = HazeConfig()


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


def _scatter(clear: np.ndarray, transmission: np.ndarray | np.float32, airlight: np.ndarray | np.float32) -> np.ndarray:
    hazy = np.empty_like(clear)
    t = transmission[..., 0] if isinstance(transmission, np.ndarray) else transmission
    airlight = np.broadcast_to(airlight, (*np.shape(airlight)[:-1], 3))
    for channel in range(3):  # one by one, because NumPy is slow at loops over a last axis of 3
        hazy[..., channel] = clear[..., channel] * t + airlight[..., channel] * (1 - t)
    return _round(hazy)


def _round(image: np.ndarray) -> np.ndarray:
    return (np.round(image * 255) / 255).astype(np.float32)


class Haze(NamedTuple):
    """A hazy image and what it was made with."""

    hazy: np.ndarray  # [H, W, 3]
    transmission: np.ndarray  # float32 [H, W, 1]
    airlight: np.ndarray  # float32 [1, 1, 3], or [H, W, 3] if it varies


def haze_for(
    clear: np.ndarray, depth: np.ndarray | None, rng: np.random.Generator, settings: HazeConfig = RESIDE, *, outdoor: bool = False
) -> Haze:
    """Add random haze to a clear image: with depth, that of RESIDE's training set; without, one transmission for the whole image.

    Args:
      clear: float32 `[H, W, 3]` in [0, 1].
      depth: `[H, W]`, as for `add_haze`, or as `draw_depth` returns it if `outdoor`, or None.
      rng: the source of airlight and beta, or of the transmission, uniform in [0, 1).
      settings: the ranges of airlight and beta, `cast`, `uneven`, `clear`, `noise` and `jpeg`; the others are not used, and without depth
        none is.
      outdoor: whether to use the outdoor ranges.

    Returns:
      The hazy image, float32 `[H, W, 3]` in [0, 1], with its transmission and airlight.
    """
    if depth is None:
        constant = rng.uniform()
        transmission = np.full((*clear.shape[:2], 1), constant, np.float32)
        return Haze(add_constant_haze(clear, constant), transmission, np.ones((1, 1, 3), np.float32))
    grey, beta = draw_haze(rng, settings, outdoor=outdoor)
    airlight = np.full((1, 1, 3), grey, np.float32)
    if settings.cast:
        airlight = np.clip(airlight + rng.uniform(-settings.cast, settings.cast, 3), 0, 1).astype(np.float32)
    if settings.uneven:
        airlight = airlight * (1 - np.float32(rng.uniform(0, settings.uneven)) * _draw_shade(clear.shape[:2], rng))
    if settings.clear and rng.random() < settings.clear:
        beta = 0.0
    transmission = _transmission(clear, depth, beta)
    return Haze(_degrade(_scatter(clear, transmission, airlight), rng, settings), transmission, airlight)


def _draw_shade(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw a smooth map, float32 `[H, W, 1]`, from 0 where the airlight is brightest to 1 where it is darkest."""
    cells = Image.fromarray(rng.standard_normal((3, 3), np.float32))
    shade = np.asarray(cells.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
    return ((shade - shade.min()) / max(np.ptp(shade), 1e-6))[..., None]


def draw_haze(rng: np.random.Generator, settings: HazeConfig = RESIDE, *, outdoor: bool = False) -> tuple[float, float]:
    """Draw a random (airlight, beta) from the ranges of the settings, by default those of RESIDE's training sets."""
    airlight, beta = (settings.outdoor_airlight, settings.outdoor_beta) if outdoor else (settings.airlight, settings.beta)
    return float(rng.uniform(*airlight)), float(rng.uniform(*beta))


def darken(clear: np.ndarray, rng: np.random.Generator, settings: HazeConfig) -> np.ndarray:
    """Return a scene `[H, W, 3]` in [0, 1] as it is or, with the probability `settings.darken`, darker."""
    if settings.darken and rng.random() < settings.darken:
        return clear ** np.float32(rng.uniform(*_GAMMA))
    return clear


def _degrade(hazy: np.ndarray, rng: np.random.Generator, settings: HazeConfig) -> np.ndarray:
    """Return a hazy image, float32 `[H, W, 3]` in [0, 1], with noise and compression by the settings, rounded to 8 bits."""
    if settings.noise:
        hazy = _round(np.clip(hazy + np.float32(rng.uniform(0, settings.noise)) * _draw_noise(hazy.shape, rng), 0, 1))
    if settings.jpeg and rng.random() < settings.jpeg:
        file = io.BytesIO()
        quality = int(rng.integers(_QUALITY[0], _QUALITY[1] + 1))
        Image.fromarray(np.round(hazy * 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
        hazy = np.asarray(Image.open(file), np.float32) / 255
    return hazy


@functools.lru_cache(1)
def _noise_table(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(count, np.float32)


def _draw_noise(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return normally distributed noise: a random part of a fixed table, because drawing every value takes longer than making the haze."""
    count = math.prod(shape)
    table = _noise_table(max(_NOISE_TABLE, 4 * count))
    start = int(rng.integers(len(table) - count + 1))
    return table[start : start + count].reshape(shape)


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
