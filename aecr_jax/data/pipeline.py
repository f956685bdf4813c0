"""The input pipeline of training (grain), which makes batches from a seed.

An element is a dict of NumPy arrays: `hazy` and `clear`, float32 `[H, W, 3]` in [0, 1]. Order, crops and haze depend only on the seed
and the position, not on the number of threads or workers.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Sequence

import grain
import numpy as np
from absl import flags
from PIL import Image

from aecr_jax.data.haze import RESCALING, RESIDE, Haze, HazeConfig, darken, haze_for
from aecr_jax.data.images import to_float
from aecr_jax.data.outdoor import Window, draw_depth
from aecr_jax.data.reader import Source
from aecr_jax.data.samples import Sample
from aecr_jax.data.sources import DataConfig
from aecr_jax.errors import UserError

# Number of images whose size is measured for the estimate of the cache.
_MEASURED = 8


class Augment(grain.transforms.RandomMap):
    """A random crop, horizontal flip and quarter turns, as in the paper, and random haze if the sample has none.

    Args:
      data: the settings; only those of the crop are used. Crops of a given `crop_width` are not turned.
      haze: the settings of the haze, for samples with depth and outdoor photographs.
      source: the source of the elements, for `haze.foreign_depth`; without it, every scene keeps its depth.
      haze_truth: whether the elements also have the `transmission` `[h, w, 1]` and the `airlight` of that haze, `[1, 1, 3]`, or
        `[h, w, 3]` if it varies.
      rehazed: if it is not 0, the elements also have `rehazed` `[rehazed, h, w, 3]`: the same clear crop with other haze, from the same
        depth but with a new airlight, scattering coefficient, noise and compression.
    """

    def __init__(
        self, data: DataConfig, haze: HazeConfig = RESIDE, *, source: Source | None = None, haze_truth: bool = False, rehazed: int = 0
    ):
        self._crop, self._turn, self._haze, self._source, self._haze_truth = data.crop_size, not data.crop_width, haze, source, haze_truth
        self._rehazed = rehazed
        self._scenes = [i for i, sample in enumerate(source.samples) if sample.kind == "depth"] if source and haze.foreign_depth else []

    def random_map(self, element: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Transform a sample of any size, with "index", into `{"hazy", "clear", "index"}`, images of the size of a crop."""
        has_depth = "depth" in element or "sky" in element
        settings = RESIDE if has_depth and self._haze.reside and rng.random() < self._haze.reside else self._haze
        window = self._draw_window(element["clear"].shape[:2], rng, settings.resize if has_depth else 0)
        flip, turns = rng.integers(2), int(rng.integers(4)) if self._turn else 0

        def orient(image: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(np.rot90(image[:, ::-1] if flip else image, turns))

        # Crop before anything else, because a crop is only a fraction of its image.
        images: dict[str, np.ndarray] = {
            key: to_float(orient(self._cut(element[key], window))) for key in ("hazy", "clear") if key in element
        }
        if "hazy" in element:
            return {**images, "index": element["index"]}
        clear, depth = images["clear"], None
        if has_depth:
            depth = orient(self._make_depth(element, window, rng, settings))
            clear = darken(clear, rng, settings)

        def make_haze(settings: HazeConfig) -> Haze:
            return haze_for(clear, depth, rng, settings, outdoor="sky" in element)

        haze = make_haze(settings)
        # All crops of a batch must have airlight of one shape, also those of constant haze.
        airlight = np.broadcast_to(haze.airlight, clear.shape) if self._haze.uneven else haze.airlight
        extra = {"transmission": haze.transmission, "airlight": airlight} if self._haze_truth else {}
        if self._rehazed:  # drawn last, so that everything else is as without it
            # A scene without haze is no negative: it would be the clear image.
            other = dataclasses.replace(settings, clear=0.0)
            extra["rehazed"] = np.stack([make_haze(other).hazy for _ in range(self._rehazed)])
        return {"hazy": haze.hazy, "clear": clear, "index": element["index"], **extra}

    def _draw_window(self, size: tuple[int, ...], rng: np.random.Generator, resize: float) -> Window:
        """Draw the part of an image of `size` that becomes the crop.

        With the probability `resize` the image is rescaled, and the size of that part differs from that of the crop.
        """
        height, width = self._crop
        if resize and rng.random() < resize:
            least, most = RESCALING
            factor = rng.uniform(max(least, height / size[0], width / size[1]), most)
            height, width = min(size[0], round(height / factor)), min(size[1], round(width / factor))
        return Window(int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1)), height, width)

    def _cut(self, image: np.ndarray, window: Window) -> np.ndarray:
        """Return a part of an image or depth map at the size of a crop."""
        image = image[window.top : window.top + window.height, window.left : window.left + window.width]
        return image if image.shape[:2] == self._crop else _scale(image, self._crop)

    def _make_depth(self, element: dict[str, np.ndarray], window: Window, rng: np.random.Generator, settings: HazeConfig) -> np.ndarray:
        """Return the depth of the crop: for an outdoor photograph random, for a scene its own or that of a crop of another scene."""
        if "sky" in element:
            return draw_depth(element["sky"], element["clear"].shape[:2], window, self._crop, rng, settings.outdoor_near)
        if len(self._scenes) < 2 or not rng.random() < settings.foreign_depth:
            return self._cut(element["depth"], window)
        assert self._source is not None
        place = int(rng.integers(len(self._scenes) - 1))
        other = self._source[self._scenes[place + (self._scenes[place] >= element["index"])]]["depth"]
        return self._cut(other, self._draw_window(other.shape, rng, 0))


def _scale(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Scale an image `[H, W, 3]` or a map `[H, W]`, uint8 or float32, to `shape`; values remain in their range."""
    size = shape[1], shape[0]
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    if image.ndim == 3:
        return np.stack([_scale(channel, shape) for channel in np.moveaxis(image, -1, 0)], -1)
    return np.asarray(Image.fromarray(image.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))


def _ignore_interrupts(worker: int, workers: int) -> None:
    # Ctrl-C is also sent to the workers, but only the training process must handle it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_samples(samples: Sequence[Sample], *, crop: tuple[int, int], batch: int, process_count: int = 1) -> None:
    """Read one image, so that a problem common to all of them is found before training begins; `crop` is (height, width).

    Raises:
      UserError: the image is damaged or smaller than a crop, or the batch is not divisible by the number of processes.
    """
    if batch % process_count:
        raise UserError(f"optim.batch (={batch}) must be a multiple of the number of processes ({process_count})")
    Source(samples, least=crop)[0]


def check_haze(samples: Sequence[Sample], *, haze_truth: bool, rehazed: int) -> None:
    """Check that the haze of the samples is made on the fly, if `haze_truth` or `rehazed` of `train_batches` need that.

    Raises:
      UserError: it is not.
    """
    if any(sample.kind == "pair" for sample in samples):
        if haze_truth:
            raise UserError("loss.haze must be 0 for data with hazy images, whose haze is not known; it is known for data with depth")
        if rehazed:
            raise UserError(
                "loss.cr_negatives (=rehazed) must be hazy or lagging for data with hazy images: their haze is not made on the fly"
            )


def train_batches(
    samples: Sequence[Sample],
    data: DataConfig,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    haze: HazeConfig = RESIDE,
    haze_truth: bool = False,
    rehazed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Return an endless iterator over shuffled batches `{"hazy", "clear", "index"}`, with more about the haze on request.

    Images are `[batch / process_count, *data.crop_size, 3]`; `index` holds the positions of their samples. The seed determines the order of
    images, the crops and the haze. The processes of a pod share this order: together they read the batch that a single process would
    read, and no image twice in an epoch. The first `start` images of the order are skipped, so the number of images read is all that a
    checkpoint needs to store about the input.

    Args:
      samples: the samples to train on.
      data: the settings; those of the crop, threads, workers and cache are used.
      batch: images per step, over all processes.
      seed: determines the order, crops and haze.
      start: the number of images of the order that have been read before.
      haze: the settings of the haze that is made for samples with depth and outdoor photographs.
      haze_truth: whether to add the transmission `[N, h, w, 1]` and the airlight of the haze, `[N, 1, 1, 3]`, or `[N, h, w, 3]` if it
        varies.
      rehazed: the number of further hazy versions of each clear crop to add, as `rehazed` `[N, rehazed, h, w, 3]`; see `Augment`.
      process_index: the index of this process.
      process_count: the number of processes.

    Raises:
      UserError: as for `check_samples`, or the haze of the samples is not known; or, during iteration, an image is damaged or smaller
        than a crop.
    """
    check_samples(samples, crop=data.crop_size, batch=batch, process_count=process_count)
    check_haze(samples, haze_truth=haze_truth, rehazed=rehazed)
    source = Source(samples, least=data.crop_size, cache=data.cache)
    augment = Augment(data, haze, source=source, haze_truth=haze_truth, rehazed=rehazed)
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(augment)
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
    """Return the memory in bytes that `data.cache` needs in one training process and its workers, estimated from a few images.

    Raises:
      UserError: an image is damaged, or the machine has less memory.
    """
    unique = list(dict.fromkeys(samples))  # one that is repeated is kept only once
    read = [unique[i * len(unique) // _MEASURED] for i in range(_MEASURED)] if len(unique) > _MEASURED else unique
    each = sum(array.nbytes for sample in read for array in sample.read().values()) / len(read)
    count = round(each * len(unique)) * max(1, data.workers)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if count > memory:
        raise UserError(
            f"data.cache needs about {count / 1e9:.1f} GB for {len(unique)} images"
            + (f" in {data.workers} workers" if data.workers else "")
            + f", but this machine has {memory / 1e9:.1f} GB: set data.cache to False"
        )
    return count
