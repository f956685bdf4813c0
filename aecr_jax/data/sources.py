"""Open the data that `--data`, `--data.train` and `--data.eval` name: folders, built data sets, splits or drawn scenes, in one notation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from aecr_jax.data.folders import find_clear_images, find_dataset, find_depth_scenes, find_pairs
from aecr_jax.data.layouts import DATASETS
from aecr_jax.data.samples import DrawnScene, OutdoorImage, Pair, Sample
from aecr_jax.data.scenes import render_scene
from aecr_jax.data.splits import PARTS, apply_split
from aecr_jax.errors import MissingFileError, UserError
from aecr_jax.processes import no_bar
from aecr_jax.settings import bounded

# Drawn scenes: the first part of their seeds, their default number, and their default width and height.
_STREAMS = {"train": 0, "test": 1}
_COUNTS = {"train": 200, "test": 20}
_SIZE = (320, 240)
_SCENES = re.compile(r"scenes(?:/(?P<part>train|test))?(?::(?P<count>\d+))?(?::(?P<width>\d+)x(?P<height>\d+))?$")
_CONSTANT, _OUTDOOR, _CLEAR = "constant:", "outdoor:", "clear="
_ROLE = re.compile(r"(^|(?<=,))\s*(constant:|outdoor:|(hazy|clear|depth)=)")
_PART = re.compile(rf"(?P<data>.+)@(?P<split>\w+)/(?P<part>{'|'.join(PARTS)})$")
# Mixed data: parts with plus signs between them, each with an optional number of repetitions.
_PLUS, _TIMES = " + ", re.compile(r"(?P<times>\d+)\*(?P<data>.+)$")
NOTATION = (
    "a folder, HAZY,CLEAR, clear=FOLDER,depth=FOLDER, constant:FOLDER, clear=FOLDER, outdoor:FOLDER, a built data set such as reside/its,"
    " or scenes; append @NAME/PART for a part of a named split, and mix data as in A + 2*B"
)


@dataclass(frozen=True)
class DataConfig:
    """The data for training and evaluation, and how they are read.

    `train` and `eval` take a folder with `hazy/` and `clear/` (or `rgb/` and `depth/`), two folders `HAZY,CLEAR` or
    `clear=FOLDER,depth=FOLDER`, a data set that `prepare-data` built (`reside/its`, `reside/its:val`), or `scenes` drawn by the program
    (`scenes:COUNT:WIDTHxHEIGHT`). `@NAME/PART` at the end selects the train, validation or test part of a named split. `constant:FOLDER`
    takes clear images alone; each crop gets haze with one random transmission and airlight 1, as in DehazeNet's training. `clear=FOLDER`
    alone takes clear images as both input and target, as in the training of KDDN's teacher. `outdoor:FOLDER` takes clear outdoor
    photographs without depth, which get haze with smooth random depth. `A + 2*B` mixes data; each image of B then counts twice.
    """

    train: str = "scenes"
    """Training data."""
    eval: str = ""
    """Evaluation data; if empty, the images that `holdout` sets apart, or other drawn scenes."""
    holdout: int = bounded(0, 0)
    """Without `eval`, the number of clear images, the last by name of each part of mixed data, that are used for evaluation instead of
    training."""
    data_dir: str = ""
    """The folder of data sets built by `prepare-data`; if empty, ~/tensorflow_datasets."""
    crop: int = bounded(240, 4)
    """Side of the random training crops in pixels, or their height if `crop_width` is set."""
    crop_width: int = bounded(0, 0)
    """Width of the training crops in pixels, for training on whole frames; such crops are flipped and not turned. 0: crops are square."""
    threads: int = bounded(8, 1, 256)
    """Number of threads that read and prepare images."""
    workers: int = bounded(0, 0, 256)
    """Number of processes that read and prepare images; 0: only the threads of the training process do."""
    cache: bool = False
    """Keep decoded images in memory: 1.7 MB for each pair of RESIDE's 620x460, 2 MB with depth (NYU's 1399: 2.8 GB), times `workers`."""

    def validate(self) -> None:
        """Raise UserError if the settings are inconsistent."""
        if not self.train:
            raise UserError(f"data.train (='') must be {NOTATION}")
        if self.eval and self.holdout:
            raise UserError(
                f"data.holdout (={self.holdout}) and data.eval (={self.eval}) both select the evaluation data: set only one of them"
            )
        if 0 < self.crop_width < 4:
            raise UserError(f"data.crop_width (={self.crop_width}) must be 0 or at least 4")

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of the training crops in pixels."""
        return self.crop, self.crop_width or self.crop


class SplitSamples(NamedTuple):
    """The samples for training and evaluation; `evaluated_on` names the evaluation samples in every result."""

    train: list[Sample]
    evaluation: list[Sample]
    evaluated_on: str


def open_samples(spec: str, *, data_dir: str = "", training: bool = False, problems: list[str] | None = None) -> tuple[list[Sample], str]:
    """Open the samples that a setting or option names, without reading their images.

    Args:
      spec: the data, in the notation that `DataConfig` describes.
      data_dir: the folder of built data sets.
      training: whether to use the training part of drawn scenes if `spec` names no part.
      problems: as for `find_pairs`.

    Returns:
      The samples, and their name in results.

    Raises:
      UserError: the data do not exist, or the split does not match them.
    """
    for name, value in (("data", spec), ("data_dir", data_dir)):
        if address := re.search(r"gs://[^\s,@]*", value):
            raise UserError(
                f"{name} (={value}) must be on this machine: copy them to each host, as with"
                f" `gcloud storage rsync --recursive {address[0]} DIR`, and name DIR"
            )
    mixed = _split_sum(spec)
    if len(mixed) > 1 or mixed[0][0] > 1:
        return _mix(_open_parts(spec, data_dir, training, problems))
    part = _PART.match(spec)
    if part and not Path(spec).exists():
        samples, name = open_samples(part["data"], data_dir=data_dir, training=training, problems=problems)
        if not samples:  # there is nothing to split, and `problems` gives the reason
            return samples, name
        try:
            parts = apply_split(part["split"], samples)
            if part["part"] not in parts:
                raise UserError(f"split {part['split']} has no part {part['part']}; its parts are {', '.join(parts)}")
        except UserError as error:
            if problems is None:
                raise
            problems.append(str(error))
            return samples, name
        return parts[part["part"]], f"{part['split']}/{part['part']} of {name}"
    if scenes := _SCENES.match(spec):
        which = scenes["part"] or ("train" if training else "test")
        count = int(scenes["count"]) if scenes["count"] else _COUNTS[which]
        width, height = (int(scenes["width"]), int(scenes["height"])) if scenes["width"] else _SIZE
        if count < 1 or min(width, height) < 8:
            raise UserError(f"{spec} must have at least 1 scene of at least 8x8 pixels")
        return list(draw_scenes(_STREAMS[which], count, (height, width))), "scenes"
    if spec.partition(":")[0] in DATASETS:
        from aecr_jax.data.builders import open_dataset  # tensorflow-datasets takes a second to import, and folders do not need it

        records, name = open_dataset(spec, data_dir or None)
        return list(records), name
    # An empty name, as of a variable that is not set, would mean the current folder.
    if not spec.strip() or (not Path(spec).is_dir() and not all(name.strip() for name in _ROLE.sub("", spec).split(","))):
        raise UserError(f"data (={spec!r}) must name each folder: data must be {NOTATION}")
    if spec.startswith(_CONSTANT) and not Path(spec).is_dir():
        return list(find_clear_images(spec.removeprefix(_CONSTANT), problems)), spec
    if spec.startswith(_OUTDOOR) and not Path(spec).is_dir():
        photographs = find_clear_images(spec.removeprefix(_OUTDOOR), problems)
        return [OutdoorImage(image.clear) for image in photographs], spec
    if spec.startswith(_CLEAR) and "," not in spec and not Path(spec).is_dir():
        images = find_clear_images(spec.removeprefix(_CLEAR), problems)
        return [Pair(image.clear, image.clear) for image in images], spec
    if Path(spec).is_dir() or "," not in spec:
        if not Path(spec).is_dir():
            raise MissingFileError(f"there is no folder {spec}: data must be {NOTATION}")
        return list(find_dataset(spec, problems)), spec
    return _open_two_folders(spec, problems)


def _split_sum(spec: str) -> list[tuple[int, str]]:
    """Return the parts of mixed data with their numbers of repetitions.

    Raises:
      UserError: a number is 0.
    """
    if Path(spec).exists():
        return [(1, spec)]
    parts = []
    for text in spec.split(_PLUS):
        times = None if Path(text.strip()).exists() else _TIMES.match(text.strip())
        if times and not int(times["times"]):
            raise UserError(f"{times[0]} in data must be repeated at least once")
        parts.append((int(times["times"]), times["data"]) if times else (1, text.strip()))
    return parts


class _Part(NamedTuple):
    """A part of mixed data, or data that are not mixed."""

    times: int
    samples: list[Sample]
    name: str


def _open_parts(spec: str, data_dir: str, training: bool, problems: list[str] | None) -> list[_Part]:
    found, parts = _split_sum(spec), []
    for times, text in found:
        try:
            parts.append(_Part(times, *open_samples(text, data_dir=data_dir, training=training, problems=problems)))
        except UserError as error:
            if len(found) == 1:
                raise
            raise type(error)(f"part {text} of the mixed data: {error}") from error
    return parts


def _mix(parts: Sequence[_Part]) -> tuple[list[Sample], str]:
    name = _PLUS.join(part.name if part.times == 1 else f"{part.times}*{part.name}" for part in parts)
    return [sample for part in parts for _ in range(part.times) for sample in part.samples], name


def _open_two_folders(spec: str, problems: list[str] | None) -> tuple[list[Sample], str]:
    first, second = (text.strip() for text in spec.rsplit(",", 1))
    named = dict(text.split("=", 1) for text in (first, second) if re.match(r"(hazy|clear|depth)=", text))
    if named.keys() == {"clear", "depth"}:
        return list(find_depth_scenes(named["clear"], named["depth"], problems)), named["clear"]
    if named.keys() == {"hazy", "clear"}:
        first, second = named["hazy"], named["clear"]
    elif named:
        raise UserError(f"{spec} must name two folders: HAZY,CLEAR or clear=FOLDER,depth=FOLDER")
    return list(find_pairs(first, second, problems)), first


def split_samples(data: DataConfig, problems: list[str] | None = None) -> SplitSamples:
    """Open the training and the evaluation samples that the settings name; drawn scenes are drawn once, here.

    `problems` has the same meaning as in `find_pairs`.

    Raises:
      UserError: as for `open_samples`, or no samples are left to train on.
    """
    parts = _open_parts(data.train, data.data_dir, True, problems)
    train, where = _mix(parts)
    if problems and not train:  # there is nothing to split, and `problems` gives the reason
        return SplitSamples([], [], where)
    if data.eval:
        return SplitSamples(train, *open_samples(data.eval, data_dir=data.data_dir, problems=problems))
    if where == "scenes":
        return SplitSamples(train, *open_samples(drawn_test_scenes(data.train)))
    split = [_hold_out(data.holdout, part) for part in parts]
    kept, _ = _mix([part._replace(samples=samples) for part, (samples, _) in zip(parts, split)])
    held = [sample for _, samples in split for sample in samples]
    return SplitSamples(kept, held, f"the last {data.holdout} scenes of {' and of '.join(part.name for part in parts)}")


def _hold_out(count: int, part: _Part) -> tuple[list[Sample], list[Sample]]:
    """Split samples into those of all scenes but the last `count`, and those of the last ones."""
    # Split by clear image: the ten hazy versions of one scene must not be on both sides.
    scenes = sorted({sample.scene for sample in part.samples})
    if not scenes:  # `problems` gives the reason
        return [], []
    if count >= len(scenes):
        raise UserError(f"data.holdout (={count}) must be less than the {len(scenes)} clear images in {part.name}")
    # Hold out the last scenes instead of every n-th, because neighbours in NYU show the same room.
    held = set(scenes[len(scenes) - count :])
    return [s for s in part.samples if s.scene not in held], [s for s in part.samples if s.scene in held]


def drawn_test_scenes(spec: str) -> str:
    """Return the notation for drawn test scenes of the same size as the training scenes `spec`."""
    scenes = _SCENES.match(spec)
    return f"scenes/test:{_COUNTS['test']}:{scenes['width']}x{scenes['height']}" if scenes and scenes["width"] else "scenes/test"


def draw_scenes(stream: int, count: int, size: tuple[int, int]) -> Sequence[DrawnScene]:
    """Draw `count` scenes of `size` (height, width), two at a time."""
    with ThreadPoolExecutor(2) as pool:
        drawn = pool.map(lambda i: render_scene((stream, i), *size), range(count))
        return [
            DrawnScene(f"scene{stream}-{i:04d}", clear, depth)
            for i, (clear, depth) in enumerate(tqdm(drawn, "drawing scenes", count, leave=False, disable=no_bar(count >= 10)))
        ]
