"""Scores a model on hazy images with known clear ones."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aecr_jax.data.images import make_folder
from aecr_jax.data.pipeline import EvalImage
from aecr_jax.errors import UserError
from aecr_jax.metrics import psnr, ssim
from aecr_jax.restore import Restorer


@dataclass(frozen=True)
class Score:
    """One image's result: RGB PSNR in dB and SSIM of the restored image, and of the hazy input for comparison."""

    image: str
    psnr: float
    ssim: float
    input_psnr: float
    input_ssim: float


@jax.jit
def _measure(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.concatenate([psnr(prediction[None], target[None]), ssim(prediction[None], target[None])])


def evaluate(restorer: Restorer, images: Iterable[EvalImage], total: int | None = None) -> Iterator[tuple[Score, EvalImage, np.ndarray]]:
    """Restores each image and yields its score, the image and the restored one."""
    for image in tqdm(images, "evaluating", total, leave=False):
        restored = restorer(image.hazy)
        after, before = (np.asarray(_measure(x, image.clear)) for x in (restored, image.hazy))
        yield Score(image.name, float(after[0]), float(after[1]), float(before[0]), float(before[1])), image, restored


def summarize(scores: list[Score]) -> dict[str, Any]:
    """Means over images: `psnr`, `ssim`, `input_psnr`, `input_ssim`, and `images`, their number."""
    keys = ("psnr", "ssim", "input_psnr", "input_ssim")
    return {key: float(np.mean([getattr(score, key) for score in scores])) for key in keys} | {"images": len(scores)}


def write_results(folder: str | Path, scores: list[Score], summary: dict[str, Any]) -> None:
    """Writes `per_image.csv` and `summary.json`.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = make_folder(folder)
    try:
        with open(folder / "per_image.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(scores[0])))
            writer.writeheader()
            writer.writerows(asdict(score) for score in scores)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error


def table(rows: list[tuple[str, float, float]]) -> str:
    """A text table of (name, PSNR, SSIM)."""
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'':{width}}  PSNR (dB)    SSIM"]
    return "\n".join(lines + [f"{name:{width}}  {p:9.2f}  {s:6.4f}" for name, p, s in rows])
