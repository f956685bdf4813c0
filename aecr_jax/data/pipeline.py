"""The input pipeline of training (grain), which makes batches from a seed.

An element is a dict of NumPy arrays: `hazy` and `clear`, float32 `[H, W, 3]` in [0, 1]. Order, crops and haze depend only on the seed
and the position, not on the number of threads or workers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import grain
import numpy as np
from absl import flags

from aecr_jax.data.haze import haze_for
from aecr_jax.data.images import to_float
from aecr_jax.data.reader import Source
from aecr_jax.data.samples import Sample
from aecr_jax.data.sources import DataConfig
from aecr_jax.errors import UserError


class Augment(grain.transforms.RandomMap):
    """A random square crop, horizontal flip and quarter turns, as in the paper, and random haze if the sample has none.

    With `haze_truth`, the elements also have the `transmission` `[crop, crop, 1]` and the `airlight` `[3]` of that haze.
    """

    def __init__(self, crop: int, *, haze_truth: bool = False):
        self._crop, self._haze_truth = crop, haze_truth

    def random_map(self, element: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Transform a sample of any size, with "index", into `{"hazy", "clear", "index"}`, images `[crop, crop, 3]`."""
        h, w = element["clear"].shape[:2]
        top, left = rng.integers(h - self._crop + 1), rng.integers(w - self._crop + 1)
        flip, turns = rng.integers(2), int(rng.integers(4))

        def cut(image: np.ndarray) -> np.ndarray:
            image = image[top : top + self._crop, left : left + self._crop]
            return np.ascontiguousarray(np.rot90(image[:, ::-1] if flip else image, turns))

        # Crop before anything else, because a crop is only a fraction of its image.
        images = {key: to_float(cut(element[key])) for key in ("hazy", "clear", "depth") if key in element}
        if "hazy" not in images:
            haze = haze_for(images["clear"], images.get("depth"), rng)
            images["hazy"] = haze.hazy
        kept = {"hazy": images["hazy"], "clear": images["clear"], "index": element["index"]}
        if self._haze_truth:
            kept |= {"transmission": haze.transmission, "airlight": haze.airlight}
        return kept


def _ignore_interrupts(worker: int, workers: int) -> None:
    # Ctrl-C is also sent to the workers, but only the training process must handle it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_samples(samples: Sequence[Sample], *, crop: int, batch: int, process_count: int = 1) -> None:
    """Read one image, so that a problem common to all of them is found before training begins.

    Raises:
      UserError: the image is damaged or smaller than a crop, or the batch is not divisible by the number of processes.
    """
    if batch % process_count:
        raise UserError(f"optim.batch (={batch}) must be a multiple of the number of processes ({process_count})")
    Source(samples, least=crop)[0]


def train_batches(
    samples: Sequence[Sample],
    data: DataConfig,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    haze_truth: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Return an endless iterator over shuffled batches `{"hazy", "clear", "index"}`, with `haze_truth` also `transmission` and `airlight`.

    Images are `[batch / process_count, crop, crop, 3]`; `index` holds the positions of their samples. The seed determines the order of
    images, the crops and the haze. The processes of a pod share this order: together they read the batch that a single process would
    read, and no image twice in an epoch. The first `start` images of the order are skipped, so the number of images read is all that a
    checkpoint needs to store about the input.

    Args:
      samples: the samples to train on.
      data: the settings; crop, threads, workers and cache are used.
      batch: images per step, over all processes.
      seed: determines the order, crops and haze.
      start: the number of images of the order that have been read before.
      haze_truth: whether to add the transmission `[N, crop, crop, 1]` and the airlight `[N, 3]` of the haze.
      process_index: the index of this process.
      process_count: the number of processes.

    Raises:
      UserError: as for `check_samples`, or the haze of the samples is not known; or, during iteration, an image is damaged or smaller
        than a crop.
    """
    check_samples(samples, crop=data.crop, batch=batch, process_count=process_count)
    if haze_truth and any(sample.kind == "pair" for sample in samples):
        raise UserError("loss.haze must be 0 for data with hazy images, whose haze is not known; it is known for data with depth")
    source = Source(samples, least=data.crop, cache=data.cache)
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(Augment(data.crop, haze_truth=haze_truth))
    # Each process takes every process_count-th part, so that all together read the batch of a single process in the same order.
    dataset = dataset[start:].batch(batch // process_count, drop_remainder=True)[process_index::process_count]
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=2 * data.threads)
    iterator = dataset.to_iter_dataset(options)
    if data.workers:
        if not flags.FLAGS.is_parsed():  # grain's worker processes read absl's flags, which only absl programs parse
            flags.FLAGS.mark_as_parsed()
        iterator = iterator.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers), worker_init_fn=_ignore_interrupts)
    return iter(iterator)


def cache_bytes(samples: Sequence[Sample], data: DataConfig) -> int:
    """Return the memory in bytes that `data.cache` needs in one training process and its workers, estimated from the first image.

    Raises:
      UserError: the image is damaged, or the machine has less memory.
    """
    count = sum(array.nbytes for array in samples[0].read().values()) * len(samples) * max(1, data.workers)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if count > memory:
        raise UserError(
            f"data.cache needs about {count / 1e9:.1f} GB for {len(samples)} images"
            + (f" in {data.workers} workers" if data.workers else "")
            + f", but this machine has {memory / 1e9:.1f} GB: set data.cache to False"
        )
    return count
