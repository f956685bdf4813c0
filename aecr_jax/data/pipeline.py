"""The input pipeline (grain): training batches by seed, and image pairs for evaluation.

An element is a dict of NumPy arrays: `hazy` and `clear`, float32 `[H, W, 3]` in [0, 1]. Order, crops and haze depend on the seed
and the position alone, whatever the number of threads or workers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import grain
import numpy as np
from absl import flags
from tqdm import tqdm

from aecr_jax.config import Config, DataConfig
from aecr_jax.data.folders import DepthScene, Pair, find_dataset, find_depth_scenes, find_pairs
from aecr_jax.data.haze import add_haze, draw_haze
from aecr_jax.data.images import to_float, unique_names
from aecr_jax.data.scenes import render_scene
from aecr_jax.data.splits import PARTS, apply_split
from aecr_jax.distributed import is_main
from aecr_jax.errors import UserError

if TYPE_CHECKING:
    from aecr_jax.data.builders import Record

# The embedded evaluation scenes: seeds apart from those of training, and how many there are.
_EVAL_SEED, _EVAL_SCENES = 1, 20


class EvalImage(NamedTuple):
    """One image to evaluate on."""

    name: str
    hazy: np.ndarray  # [H, W, 3]
    clear: np.ndarray  # [H, W, 3]


class DrawnScene(NamedTuple):
    """An embedded scene in memory."""

    name: str
    clear: np.ndarray
    depth: np.ndarray

    @property
    def origin(self) -> str:
        """What to call it in a message."""
        return self.name

    @property
    def scene(self) -> str:
        """The same as its name: every clear image is a scene."""
        return self.name

    def read(self) -> dict[str, np.ndarray]:
        """`clear` `[H, W, 3]` and `depth` `[H, W]`."""
        return {"clear": self.clear, "depth": self.depth}


Sample: TypeAlias = "Pair | DepthScene | DrawnScene | Record"


class SplitSamples(NamedTuple):
    """What to train and to evaluate on; `evaluated_on` names the latter in every result."""

    train: list[Any]
    evaluation: list[Any]
    evaluated_on: str


class DamagedSample(UserError):
    """A sample cannot be read, or is too small to crop from; `index` is its place among the samples."""

    index: int


class Source:
    """Random access to samples: `{"hazy", "clear", "index"}` from pairs, `{"clear", "depth", "index"}` from scenes (for grain).

    Reading one raises UserError if it is damaged, or smaller than `least` pixels on a side. With `cache`, each is read once.
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
            damaged.index = index  # an attribute, because arguments of an exception are not what unpickling in another process needs
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


class Augment(grain.transforms.RandomMap):
    """A random square crop, horizontal flip and quarter turns (the paper's), and haze where the sample has a depth instead."""

    def __init__(self, crop: int):
        self._crop = crop

    def random_map(self, element: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`{"hazy" or "depth", "clear", "index"}` of any size -> `{"hazy", "clear", "index"}`, images `[crop, crop, 3]`."""
        h, w = element["clear"].shape[:2]
        top, left = rng.integers(h - self._crop + 1), rng.integers(w - self._crop + 1)
        flip, turns = rng.integers(2), int(rng.integers(4))

        def cut(image: np.ndarray) -> np.ndarray:
            image = image[top : top + self._crop, left : left + self._crop]
            return np.ascontiguousarray(np.rot90(image[:, ::-1] if flip else image, turns))

        # Cut before anything else: a crop is a fraction of its image.
        images = {key: to_float(cut(element[key])) for key in ("hazy", "clear", "depth") if key in element}
        if "depth" in images:
            images["hazy"] = add_haze(images["clear"], images["depth"], *draw_haze(rng))
        return {"hazy": images["hazy"], "clear": images["clear"], "index": element["index"]}


def split_samples(data: DataConfig, problems: list[str] | None = None) -> SplitSamples:
    """The training and the evaluation samples that the settings name; embedded scenes are drawn here, once.

    `problems` is as for `find_pairs`.

    Raises:
      UserError: a folder or a built data set is not what it should be, or nothing is left to train on.
    """
    train: list[Any]
    if data.dataset:
        train, where = _open_built(data.dataset, data.data_dir)
    elif data.clear:
        train, where = (
            list(find_pairs(data.hazy, data.clear, problems) if data.hazy else find_depth_scenes(data.clear, data.depth, problems)),
            data.clear,
        )
    else:
        train, where = draw_scenes(0, data.scenes, data.scene_size), "scenes"
    if problems and not train:  # nothing to split: the problems say why
        return SplitSamples([], [], where)
    if data.split:
        try:
            parts = apply_split(data.split, train)
        except UserError as error:
            if problems is None:
                raise
            problems.append(str(error))
            return SplitSamples(train, [], where)
        part = next(part for part in PARTS[1:] if part in parts)
        return SplitSamples(parts["train"], parts[part], f"{data.split}/{part} of {where}")
    if data.eval_dataset:
        return SplitSamples(train, *_open_built(data.eval_dataset, data.data_dir))
    if data.eval_hazy:
        return SplitSamples(train, list(find_pairs(data.eval_hazy, data.eval_clear, problems)), data.eval_hazy)
    if where == "scenes":
        return SplitSamples(train, eval_scenes(data.scene_size), "scenes")
    # By clear image: the ten hazy versions of one scene must not be on both sides.
    scenes = sorted({sample.scene for sample in train})
    if data.holdout >= len(scenes):
        raise UserError(f"data.holdout (={data.holdout}) must be less than the {len(scenes)} clear images in {where}")
    # The last ones and not every n-th: neighbours in NYU show the same room.
    held = set(scenes[len(scenes) - data.holdout :])
    kept, out = [s for s in train if s.scene not in held], [s for s in train if s.scene in held]
    return SplitSamples(kept, out, f"the last {data.holdout} scenes of {where}")


def _open_built(name: str, data_dir: str) -> tuple[list[Any], str]:
    from aecr_jax.data.builders import open_dataset  # tensorflow-datasets takes a second to import, and folders do without

    return open_dataset(name, data_dir or None)


def draw_scenes(stream: int, count: int, size: tuple[int, int]) -> list[DrawnScene]:
    """Draws `count` embedded scenes of `size` (height, width), two at a time."""
    with ThreadPoolExecutor(2) as pool:
        drawn = pool.map(lambda i: render_scene((stream, i), *size), range(count))
        return [
            DrawnScene(f"scene{stream}-{i:04d}", clear, depth)
            for i, (clear, depth) in enumerate(tqdm(drawn, "drawing scenes", count, leave=False, disable=count < 10 or not is_main()))
        ]


def eval_scenes(size: tuple[int, int]) -> list[DrawnScene]:
    """The embedded evaluation scenes, none of which is trained on."""
    return draw_scenes(_EVAL_SEED, _EVAL_SCENES, size)


def _ignore_interrupts(worker: int, workers: int) -> None:
    # Ctrl-C goes to the workers too; the process that trains decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_samples(samples: Sequence[Any], config: Config, process_count: int = 1) -> None:
    """Reads one image: what is wrong with all of them should be known before training begins.

    Raises:
      UserError: it is damaged or smaller than a crop, or the batch does not divide by the processes.
    """
    if config.train.batch % process_count:
        raise UserError(f"train.batch (={config.train.batch}) must divide by the {process_count} processes")
    Source(samples, least=config.data.crop)[0]


def train_batches(
    samples: Sequence[Any], config: Config, *, start: int = 0, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless shuffled batches `{"hazy", "clear", "index"}`: images `[batch / process_count, crop, crop, 3]`, and which samples they are.

    One seed gives one order of images, crops and haze, which the processes of a pod deal out among themselves: together they read
    the batch that a single process would, and no image twice an epoch. The first `start` images of that order are passed over, so
    the number of images read is all that a checkpoint needs of the input.

    Raises:
      UserError: as `check_samples`; or, while reading, a file is damaged or smaller than a crop.
    """
    check_samples(samples, config, process_count)
    batch = config.train.batch
    source = Source(samples, least=config.data.crop, cache=config.data.cache)
    dataset = grain.MapDataset.source(source).seed(config.train.seed).shuffle().repeat().random_map(Augment(config.data.crop))
    # Every process_count-th part of a batch, so that all together read the batch of one process in its order.
    dataset = dataset[start:].batch(batch // process_count, drop_remainder=True)[process_index::process_count]
    options = grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=2 * config.data.threads)
    iterator = dataset.to_iter_dataset(options)
    if config.data.workers:
        if not flags.FLAGS.is_parsed():  # grain's worker processes read absl's flags, which only absl's own programs parse
            flags.FLAGS.mark_as_parsed()
        iterator = iterator.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.data.workers), worker_init_fn=_ignore_interrupts)
    return iter(iterator)


def cache_bytes(samples: Sequence[Any], data: DataConfig) -> int:
    """The memory that `data.cache` takes in one process, judged by the first image.

    Raises:
      UserError: that image is damaged, or the machine has less memory.
    """
    count = sum(array.nbytes for array in samples[0].read().values()) * len(samples) * max(1, data.workers)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if count > memory:
        raise UserError(
            f"data.cache needs about {count / 1e9:.1f} GB for {len(samples)} images"
            + (f" in {data.workers} workers" if data.workers else "")
            + f", and this machine has {memory / 1e9:.1f}: set data.cache False"
        )
    return count


def to_pair(read: dict[str, np.ndarray], seed: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What a sample's `read` gave as (hazy, clear), float32 `[H, W, 3]`; the haze of clear + depth is drawn from `seed`."""
    clear = to_float(read["clear"])
    if "hazy" in read:
        return to_float(read["hazy"]), clear
    return add_haze(clear, read["depth"], *draw_haze(np.random.default_rng(seed))), clear


def eval_images(
    samples: Sequence[Any], *, limit: int | None = None, seed: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[EvalImage]:
    """The samples whole, in order; clear + depth get haze that is drawn from `seed` and the index, the same at every call.

    `limit` takes that many of them, evenly spread. Each of several processes gets its share of those.
    """
    source = Source(samples)
    count = len(source) if limit is None else min(limit, len(source))
    names = unique_names(sample.name for sample in samples)
    for index in (i * len(source) // count for i in range(process_index, count, process_count)):
        yield EvalImage(names[index], *to_pair(source[index], (seed, index)))


def open_eval_data(
    data: str,
    scene_size: tuple[int, int] = DataConfig.scene_size,
    *,
    data_dir: str = "",
    split: str = "",
    problems: list[str] | None = None,
) -> tuple[list[Any], str]:
    """The samples that `eval.py --data` names, and what to call them in a result.

    Args:
      data: a folder, a built data set such as "reside/sots_indoor", or "scenes" for the embedded ones.
      scene_size: height and width of those.
      data_dir: where built data sets are.
      split: "NAME/PART" takes that part of a named split.
      problems: as for `find_pairs`.

    Raises:
      UserError: nothing of that kind is there, or the split does not fit it.
    """
    from aecr_jax.data.builders import is_dataset_name

    samples: list[Any]
    if data == "scenes":
        samples, name = eval_scenes(scene_size), "scenes"
    elif is_dataset_name(data):
        samples, name = _open_built(data, data_dir)
    else:
        samples, name = list(find_dataset(data, problems)), data
    if split:
        split_name, _, part = split.partition("/")
        parts = apply_split(split_name, samples)
        if part not in parts:
            raise UserError(f"--split {split} must be NAME/PART: {split_name} has {', '.join(f'{split_name}/{p}' for p in parts)}")
        samples, name = parts[part], f"{split} of {name}"
    return samples, name
