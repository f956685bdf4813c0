"""Named splits: text files beside this one that say which scenes of a data set train, validate and test.

A file has comment lines (its version and where it comes from) and a line per part, `train: 01 02 ...`. A split that has been used for a
score never changes: a better one gets a new name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from aecr_jax.errors import UserError

_FOLDER = Path(__file__).parent
PARTS = ("train", "validation", "test")


class _HasScene(Protocol):
    @property
    def scene(self) -> str: ...


Sample = TypeVar("Sample", bound=_HasScene)


def split_names() -> list[str]:
    """The names of all splits."""
    return sorted(path.stem for path in _FOLDER.glob("*.txt"))


def read_split(name: str) -> dict[str, list[str]]:
    """The scenes of each part of the split `name`.

    Raises:
      UserError: there is no such split.
    """
    if name not in split_names():
        raise UserError(f"there is no split {name!r}; there are {', '.join(split_names())}")
    lines = (_FOLDER / f"{name}.txt").read_text().splitlines()
    parts = (line.split(":") for line in lines if line and not line.startswith("#"))
    return {part: scenes.split() for part, scenes in parts}


def apply_split(name: str, samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Sorts samples into the parts of the split `name` by their scene: `1`, `01` and `01_GT` are one scene.

    Raises:
      UserError: there is no such split, it is of another data set, or `samples` lack a scene of it or have others: a score on them
        would not be the split's.
    """
    split = read_split(name)
    dataset = getattr(samples[0], "dataset", None)
    if dataset is not None and not name.startswith(dataset):
        raise UserError(f"split {name} is not of {dataset}; there are {', '.join(split_names())}")
    by_scene: dict[str, list[Sample]] = {}
    for sample in samples:
        by_scene.setdefault(_scene_number(sample.scene), []).append(sample)
    strange = set(by_scene) - {_scene_number(scene) for scenes in split.values() for scene in scenes}
    if strange:
        raise UserError(f"split {name} does not know {len(strange)} of the {len(by_scene)} scenes of the data, such as {min(strange)}")
    chosen = {}
    for part, scenes in split.items():
        missing = [scene for scene in scenes if _scene_number(scene) not in by_scene]
        if missing:
            raise UserError(f"split {name} has {len(scenes)} scenes for {part}, and the data lack {len(missing)}, first {missing[0]}")
        chosen[part] = [sample for scene in scenes for sample in by_scene[_scene_number(scene)]]
    return chosen


def _scene_number(scene: str) -> str:
    return scene.lower().removesuffix("_gt").lstrip("0")
