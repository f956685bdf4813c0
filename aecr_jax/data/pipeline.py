"""The input pipeline (grain): training batches by seed, and image pairs for evaluation.

An element is a dict of NumPy arrays: `hazy` and `clear`, float32 `[H, W, 3]` in [0, 1]. Order, crops and haze depend on the seed
and the position alone, whatever the number of threads or workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from tqdm import tqdm

from aecr_jax.config import Config, DataConfig
from aecr_jax.data.folders import DepthScene, Pair, find_dataset, find_depth_scenes, find_pairs, read_depth_scene, read_pair
from aecr_jax.data.haze import add_haze, draw_haze
from aecr_jax.data.images import unique_names
from aecr_jax.data.scenes import render_scene
from aecr_jax.errors import UserError

# The embedded evaluation scenes: seeds apart from those of training, and how many there are.
_EVAL_SEED, _EVAL_SCENES = 1, 20


class EvalImage(NamedTuple):
    """One image to evaluate on."""

    name: str
    hazy: np.ndarray  # [H, W, 3]
    clear: np.ndarray  # [H, W, 3]


class _Scene(NamedTuple):
    """A drawn scene in memory."""

    name: str
    clear: np.ndarray
    depth: np.ndarray


Sample = Pair | DepthScene | _Scene


class Source:
    """Random access to samples: `{"hazy", "clear"}` from pairs, `{"clear", "depth"}` from scenes (for grain).

    Reading one raises UserError if it is damaged, or smaller than `least` pixels on a side.
    """

    def __init__(self, samples: Sequence[Sample], least: int = 1):
        self._samples = samples
        self._least = least

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        sample = self._samples[int(index)]
        if isinstance(sample, Pair):
            hazy, clear = read_pair(sample)
            element = {"hazy": hazy, "clear": clear}
        else:
            clear, depth = read_depth_scene(sample) if isinstance(sample, DepthScene) else (sample.clear, sample.depth)
            element = {"clear": clear, "depth": depth}
        h, w = clear.shape[:2]
        if min(h, w) < self._least:
            name = self.name(int(index))
            raise UserError(f"{name} is {w}x{h}, smaller than a crop: data.crop (={self._least}) must be at most {min(h, w)}")
        return element

    def name(self, index: int) -> str:
        """What to call sample `index` in a message."""
        sample = self._samples[index]
        return sample.name if isinstance(sample, _Scene) else str(sample[0])


class Augment(grain.transforms.RandomMap):
    """A random square crop, horizontal flip and quarter turns (the paper's), and haze where the sample has a depth instead."""

    def __init__(self, crop: int):
        self._crop = crop

    def random_map(self, element: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`{"hazy" or "depth", "clear"}` of any size -> `{"hazy", "clear"}`, `[crop, crop, 3]`."""
        h, w = element["clear"].shape[:2]
        top, left = rng.integers(h - self._crop + 1), rng.integers(w - self._crop + 1)
        flip, turns = rng.integers(2), int(rng.integers(4))

        def cut(image: np.ndarray) -> np.ndarray:
            image = image[top : top + self._crop, left : left + self._crop]
            return np.ascontiguousarray(np.rot90(image[:, ::-1] if flip else image, turns))

        element = {key: cut(image) for key, image in element.items()}
        if "depth" in element:
            element["hazy"] = add_haze(element["clear"], element["depth"], *draw_haze(rng))
        return {"hazy": element["hazy"], "clear": element["clear"]}


def split_samples(data: DataConfig) -> tuple[list[Any], list[Any]]:
    """The training and the evaluation samples that the settings name; embedded scenes are drawn here, once.

    Raises:
      UserError: a folder is not what it should be, or `holdout` leaves nothing to train on.
    """
    if data.clear:
        train: list[Any] = list(find_pairs(data.hazy, data.clear) if data.hazy else find_depth_scenes(data.clear, data.depth))
    else:
        train = draw_scenes(0, data.scenes, data.scene_size)
    if data.eval_hazy:
        return train, list(find_pairs(data.eval_hazy, data.eval_clear))
    if not data.clear:
        return train, eval_scenes(data.scene_size)
    # By clear image: the ten hazy versions of one scene must not be on both sides.
    scenes = sorted({sample.clear for sample in train})
    if data.holdout >= len(scenes):
        raise UserError(f"data.holdout (={data.holdout}) must be less than the {len(scenes)} clear images in {data.clear}")
    # The last ones and not every n-th: neighbours in NYU show the same room.
    held = set(scenes[len(scenes) - data.holdout :])
    return [s for s in train if s.clear not in held], [s for s in train if s.clear in held]


def draw_scenes(stream: int, count: int, size: tuple[int, int]) -> list[_Scene]:
    """Draws `count` embedded scenes of `size` (height, width), two at a time."""
    with ThreadPoolExecutor(2) as pool:
        drawn = pool.map(lambda i: render_scene((stream, i), *size), range(count))
        return [
            _Scene(f"scene{stream}-{i:04d}", clear, depth)
            for i, (clear, depth) in enumerate(tqdm(drawn, "drawing scenes", count, leave=False, disable=count < 10))
        ]


def eval_scenes(size: tuple[int, int]) -> list[_Scene]:
    """The embedded evaluation scenes, none of which is trained on."""
    return draw_scenes(_EVAL_SEED, _EVAL_SCENES, size)


def train_batches(samples: Sequence[Any], config: Config, *, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
    """Endless shuffled batches `{"hazy", "clear"}`, `[batch / process_count, crop, crop, 3]`; its position can be checkpointed.

    Each process of a pod reads its own part of every epoch's order.

    Raises:
      UserError: the batch does not divide by the processes, or, here or while reading, a file is damaged or smaller than a crop.
    """
    batch = config.train.batch
    if batch % process_count:
        raise UserError(f"train.batch (={batch}) must divide by the {process_count} processes")
    if len(samples) < process_count:
        raise UserError(f"{len(samples)} training images are too few for {process_count} processes")
    source = Source(samples, least=config.data.crop)
    source[0]  # what is wrong with all of them should be known before training begins
    dataset = grain.MapDataset.source(source).seed(config.train.seed).shuffle()
    dataset = dataset[process_index::process_count].repeat()
    dataset = dataset.random_map(Augment(config.data.crop)).batch(batch // process_count, drop_remainder=True)
    options = grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=2 * config.data.threads)
    iterator = dataset.to_iter_dataset(options)
    if config.data.workers:
        if not flags.FLAGS.is_parsed():  # grain's worker processes read absl's flags, which only absl's own programs parse
            flags.FLAGS.mark_as_parsed()
        iterator = iterator.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.data.workers))
    return iter(iterator)


def eval_images(samples: Sequence[Any], *, limit: int | None = None, seed: int = 0) -> Iterator[EvalImage]:
    """The samples whole, in order; clear + depth get haze that is drawn from `seed` and the index, the same at every call.

    `limit` takes that many of them, evenly spread.
    """
    source = Source(samples)
    count = len(source) if limit is None else min(limit, len(source))
    names = unique_names(Path(source.name(i)).stem for i in range(len(source)))
    for index in (i * len(source) // count for i in range(count)):
        element = source[index]
        if "hazy" not in element:
            element["hazy"] = add_haze(element["clear"], element["depth"], *draw_haze(np.random.default_rng((seed, index))))
        yield EvalImage(names[index], element["hazy"], element["clear"])


def open_eval_data(data: str, scene_size: tuple[int, int] = DataConfig.scene_size) -> list[Any]:
    """The samples that `eval.py --data` names: a folder, or "scenes" for the embedded ones of `scene_size` (height, width).

    Raises:
      UserError: nothing of that kind is there.
    """
    return eval_scenes(scene_size) if data == "scenes" else list(find_dataset(data))
