"""Read samples: in random access for training, and as whole image pairs for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from aecr_jax.data.haze import haze_for
from aecr_jax.data.images import to_float, unique_names
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

    Reading a sample raises UserError if it is damaged, or smaller than `least` pixels on a side. With `cache`, each is read only once.
    """

    def __init__(self, samples: Sequence[Sample], least: int = 1, *, cache: bool = False):
        self._samples = samples
        self._least = least
        self._cache: dict[int, dict[str, np.ndarray]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        index = int(index)
        if self._cache is not None and index in self._cache:
            return dict(self._cache[index])
        try:
            element = {**self._read(self._samples[index]), "index": np.asarray(index, np.int32)}
        except UserError as error:
            damaged = DamagedSample(str(error))
            damaged.index = index  # not an argument, because unpickling in another process calls DamagedSample(message)
            raise damaged from error
        if self._cache is not None:
            self._cache[index] = element
        return dict(element)

    def _read(self, sample: Sample) -> dict[str, np.ndarray]:
        element = sample.read()
        h, w = element["clear"].shape[:2]
        if min(h, w) < self._least:
            raise UserError(f"{sample.origin} is {w}x{h}, smaller than a crop: data.crop (={self._least}) must be at most {min(h, w)}")
        return element


def to_pair(read: dict[str, np.ndarray], seed: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Convert the result of a sample's `read` to (hazy, clear), float32 `[H, W, 3]`; if it has no haze, that is drawn from `seed`."""
    clear = to_float(read["clear"])
    if "hazy" in read:
        return to_float(read["hazy"]), clear
    return haze_for(clear, read.get("depth"), np.random.default_rng(seed)).hazy, clear


def eval_images(
    samples: Sequence[Sample], *, limit: int | None = None, seed: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[EvalImage]:
    """Yield whole samples in order; if they have no haze, that is drawn from `seed` and the index, so that it is the same at every call.

    With `limit`, at most that many samples are used, evenly spread. In a run of several processes, each process yields its share.
    """
    source = Source(samples)
    count = len(source) if limit is None else min(limit, len(source))
    names = unique_names(sample.name for sample in samples)
    for index in (i * len(source) // count for i in range(process_index, count, process_count)):
        yield EvalImage(names[index], *to_pair(source[index], (seed, index)))
