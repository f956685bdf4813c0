"""Named splits: text files beside this module that list the scenes of a data set for training, validation and testing.

A file has comment lines (its version and source) and one line per part, `train: 01 02 ...`. A split that has been used for a score never
changes; an improved split gets a new name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aecr_jax.data.samples import Sample
from aecr_jax.errors import UserError

_FOLDER = Path(__file__).parent
PARTS = ("train", "validation", "test")
# The key for scenes of the data set that are in no part; they may be missing.
OTHERS = "others"


def split_names() -> list[str]:
    """Return the names of all splits."""
    return sorted(path.stem for path in _FOLDER.glob("*.txt"))


def read_split(name: str) -> dict[str, list[str]]:
    """Return the scenes of each part of the split `name`.

    Raises:
      UserError: there is no such split.
    """
    if name not in split_names():
        raise UserError(f"there is no split {name!r}; choose one of {', '.join(split_names())}")
    lines = (_FOLDER / f"{name}.txt").read_text().splitlines()
    parts = (line.split(":") for line in lines if line and not line.startswith("#"))
    return {part: scenes.split() for part, scenes in parts}


def apply_split(name: str, samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Sort samples into the parts of the split `name` by their scene; `1`, `01` and `01_GT` are the same scene.

    Raises:
      UserError: there is no such split, it belongs to another data set, or `samples` lack a scene of the split or contain other scenes,
        so that a score on them would not be comparable.
    """
    split = read_split(name)
    others = split.pop(OTHERS, [])
    dataset = samples[0].dataset.rpartition("/")[2]
    if dataset and not name.startswith(dataset):
        raise UserError(f"split {name} is not for {dataset}; choose one of {', '.join(split_names())}")
    by_scene: dict[str, list[Sample]] = {}
    for sample in samples:
        by_scene.setdefault(_scene_number(sample.scene), []).append(sample)
    strange = set(by_scene) - {_scene_number(scene) for scenes in (*split.values(), others) for scene in scenes}
    if strange:
        raise UserError(f"split {name} does not contain {len(strange)} of the {len(by_scene)} scenes in the data, such as {min(strange)}")
    chosen = {}
    for part, scenes in split.items():
        missing = [scene for scene in scenes if _scene_number(scene) not in by_scene]
        if missing:
            raise UserError(f"split {name} has {len(scenes)} scenes for {part}, but {len(missing)} are not in the data, first {missing[0]}")
        chosen[part] = [sample for scene in scenes for sample in by_scene[_scene_number(scene)]]
    return chosen


def _scene_number(scene: str) -> str:
    return scene.lower().removesuffix("_gt").lstrip("0")
