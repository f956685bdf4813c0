"""Read samples: in random access for training, and as whole image pairs for evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from aecr_jax.data.haze import RESIDE, HazeConfig, darken, haze_for
from aecr_jax.data.images import to_float, unique_names
from aecr_jax.data.outdoor import Window, draw_depth
from aecr_jax.data.samples import Sample
from aecr_jax.errors import UserError


class EvalImage(NamedTuple):
    """One image pair for evaluation."""

    name: str
    hazy: np.ndarray  # [H, W, 3]
    clear: np.ndarray  # [H, W, 3]


class DamagedSample(UserError):
    """Raised if a sample cannot be read or is smaller than a crop; `index` is its position among the samples."""

    index: int


class Source:
    """Random access to samples, as grain requires: the result of `Sample.read` and "index".

    Reading a sample raises UserError if it is damaged, or smaller than a crop of the size `least` (height, width). With `cache`, each is
    read only once, and one that is repeated among `samples` is kept only once.
    """

    def __init__(self, samples: Sequence[Sample], least: tuple[int, int] = (1, 1), *, cache: bool = False):
        self.samples = samples
        self._least = least
        self._cache: dict[Sample, dict[str, np.ndarray]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        index = int(index)
        sample = self.samples[index]
        images = None if self._cache is None else self._cache.get(sample)
        if images is None:
            try:
                images = self._read(sample)
            except UserError as error:
                damaged = DamagedSample(str(error))
                damaged.index = index  # not an argument, because unpickling in another process calls DamagedSample(message)
                raise damaged from error
            if self._cache is not None:
                self._cache[sample] = images
        return {**images, "index": np.asarray(index, np.int32)}

    def _read(self, sample: Sample) -> dict[str, np.ndarray]:
        images = sample.read()
        (h, w), (height, width) = images["clear"].shape[:2], self._least
        if h >= height and w >= width:
            return images
        if height == width:
            advice = f"data.crop (={height}) must be at most {min(h, w)}"
        else:
            advice = f"data.crop (={height}) must be at most {h}, and data.crop_width (={width}) at most {w}"
        raise UserError(f"{sample.origin} is {w}x{h}, smaller than a crop: {advice}")


def to_pair(read: dict[str, np.ndarray], seed: int | tuple[int, ...], haze: HazeConfig = RESIDE) -> tuple[np.ndarray, np.ndarray]:
    """Convert the result of a sample's `read` to (hazy, clear), float32 `[H, W, 3]`; if it has no haze, that is drawn from `seed`.

    The settings `clear`, `reside`, `resize` and `foreign_depth` of `haze` are ignored: they omit or replace the haze of a training crop, or
    change what it shows.
    """
    clear = to_float(read["clear"])
    if "hazy" in read:
        return to_float(read["hazy"]), clear
    rng = np.random.default_rng(seed)
    depth = read.get("depth")
    if "sky" in read:
        h, w = clear.shape[:2]
        depth = draw_depth(read["sky"], (h, w), Window(0, 0, h, w), (h, w), rng, haze.outdoor_near)
    if depth is None:
        return haze_for(clear, None, rng).hazy, clear
    clear = darken(clear, rng, haze)
    return haze_for(clear, depth, rng, dataclasses.replace(haze, clear=0.0), outdoor="sky" in read).hazy, clear


def eval_images(
    samples: Sequence[Sample],
    *,
    limit: int | None = None,
    seed: int = 0,
    haze: HazeConfig = RESIDE,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[EvalImage]:
    """Yield whole samples in order; if they have no haze, that is drawn from `seed` and the index, so that it is the same at every call.

    `haze` has the settings of that haze, as for `to_pair`. With `limit`, at most that many samples are used, evenly spread. In a run of
    several processes, each process yields its share.
    """
    source = Source(samples)
    count = len(source) if limit is None else min(limit, len(source))
    names = unique_names(sample.name for sample in samples)
    for index in (i * len(source) // count for i in range(process_index, count, process_count)):
        yield EvalImage(names[index], *to_pair(source[index], (seed, index), haze))
