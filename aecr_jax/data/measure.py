"""Measure the samples of a data set, reading each only once, so that `check` can compare them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from aecr_jax.data.reader import to_pair
from aecr_jax.data.samples import Sample
from aecr_jax.errors import UserError

_FINGERPRINT = 24
# An image whose values vary by less than one 8-bit step shows nothing.
_BLANK = 1 / 255
# Depth maps: the share of pixels above which one value is no coincidence (in NYU's 1399 maps, the largest value has at most 0.004% of the
# pixels, and none has a zero), and the gaps to the next value, relative to the largest, that distinguish marks from measurements.
_MARKED, _GAP_NEAR, _GAP_FAR = 0.001, 0.03, 0.1


class Measured(NamedTuple):
    """The measurements of one sample."""

    position: int
    size: tuple[int, int]  # width, height
    psnr: float
    hazy: np.ndarray  # fingerprints
    clear: np.ndarray
    stretched: bool | None  # whether the clear image seems to have been resized; None if unknown
    blank: tuple[bool, bool]  # whether the hazy and the clear image have only one colour
    contrast: float  # log(hazy mean gradient / clear mean gradient); haze makes it negative
    dark: float  # mean dark channel, hazy minus clear; haze makes it positive
    depth: str  # a peculiarity of the depth map: "flat", "zeros", "far", or ""


class Failed(NamedTuple):
    """A sample that cannot be used, and the reason."""

    position: int
    error: str


def measure_all(samples: Sequence[Sample], label: str, limit: int | None = None) -> tuple[list[Measured], list[Failed]]:
    """Measure at most `limit` samples, evenly spread; return the measurements, and the samples that cannot be used."""
    count = len(samples) if limit is None else min(limit, len(samples))

    def measure(index: int) -> Measured | Failed:
        try:
            return _measure(samples[index], index)
        except UserError as error:
            return Failed(index, str(error))

    indices = [i * len(samples) // count for i in range(count)]
    with ThreadPoolExecutor(4) as pool:
        results = list(tqdm(pool.map(measure, indices), f"reading {label}", count, leave=False, disable=None if samples else True))
    return [r for r in results if isinstance(r, Measured)], [r for r in results if isinstance(r, Failed)]


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the correlation of every row of the fingerprints `a` with every row of `b`."""
    return (a.astype(np.float32) / 127) @ (b.astype(np.float32) / 127).T


def _measure(sample: Sample, index: int) -> Measured:
    read = sample.read()
    hazy, clear = to_pair(read, index)
    lumas = _luma(hazy), _luma(clear)
    error = float(np.mean((hazy - clear) ** 2, dtype=np.float64))
    stretched = _looks_stretched(*lumas) if "hazy" in read and clear.shape == (460, 620, 3) else None
    gradients = [_gradient(luma) for luma in lumas]
    height, width = clear.shape[:2]
    return Measured(
        position=index,
        size=(width, height),
        psnr=10 * np.log10(1 / error) if error else np.inf,
        hazy=_fingerprint(lumas[0]),
        clear=_fingerprint(lumas[1]),
        stretched=stretched,
        blank=(_is_blank(hazy), _is_blank(clear)),
        contrast=float(np.log(gradients[0] / gradients[1])) if min(gradients) > 0 else 0.0,
        dark=_dark(hazy) - _dark(clear),
        depth=_odd_depth(read["depth"]) if "depth" in read else "",
    )


def _luma(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(image @ np.array([0.299, 0.587, 0.114], np.float32) * 255).astype(np.uint8))


def _fingerprint(luma: Image.Image) -> np.ndarray:
    """Return a small grey image without its low frequencies, which haze changes; it has norm 1 and is stored as int8, 127 for 1."""
    n = _FINGERPRINT
    small = np.asarray(luma.resize((n, n), Image.Resampling.BOX), np.float32)
    around = np.pad(small, 2, mode="edge")
    small = small - sum(around[i : i + n, j : j + n] for i in range(5) for j in range(5)) / 25
    small -= small.mean()
    return np.round(small.ravel() / max(float(np.linalg.norm(small)), 1e-6) * 127).astype(np.int8)


def _gradient(luma: Image.Image) -> float:
    """Return the mean absolute difference of neighbouring pixels, which haze reduces."""
    values = np.asarray(luma).astype(np.int16)
    parts = (np.abs(np.diff(values, axis=axis)) for axis in (0, 1))
    return float(sum(part.mean() for part in parts if part.size))


def _dark(image: np.ndarray) -> float:
    """Return the mean of the darkest channel, which haze increases, over every fourth pixel in both directions."""
    return float(np.minimum.reduce([image[::4, ::4, channel] for channel in range(3)]).mean())


def _is_blank(image: np.ndarray) -> bool:
    # For most images, the first rows show that they are not blank.
    return bool(np.ptp(image[:8], axis=(0, 1)).max() < 8 * _BLANK and image.std(axis=(0, 1)).max() < _BLANK)


def _odd_depth(depth: np.ndarray) -> str:
    if float(depth.std()) < 1e-3:
        return "flat"
    low, high = float(depth.min()), float(depth.max())
    above, below = depth[depth > low], depth[depth < high]
    if low < 0.01 and above.min() - low > _GAP_NEAR and 1 - above.size / depth.size > _MARKED:
        return "zeros"
    if high - below.max() > _GAP_FAR and 1 - below.size / depth.size > _MARKED:
        return "far"
    return ""


def _looks_stretched(hazy: Image.Image, clear: Image.Image) -> bool | None:
    """Return whether this 620x460 clear image was resized from 640x480, whereas RESIDE crops 10 pixels off each side.

    If so, undoing the resizing aligns its edges with those of the hazy image. The result is None if an image has no edges.
    """
    undone = clear.resize((640, 480), Image.Resampling.BICUBIC).crop((10, 10, 630, 470))

    def edges(image: Image.Image) -> np.ndarray:
        values = np.asarray(image, np.float32)
        return np.abs(np.diff(values, axis=0))[:, :-1] + np.abs(np.diff(values, axis=1))[:-1]

    own, as_it_is, as_if_undone = (edges(image) for image in (hazy, clear, undone))
    if not min(own.std(), as_it_is.std(), as_if_undone.std()) > 0:
        return None
    before, after = (float(np.corrcoef(own.ravel(), other.ravel())[0, 1]) for other in (as_it_is, as_if_undone))
    return after > before + 0.05
