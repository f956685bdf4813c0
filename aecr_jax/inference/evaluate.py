"""Evaluation of a model on pairs of hazy and clear images."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aecr_jax.compilation import bounded_jit
from aecr_jax.data.images import panel, write_image
from aecr_jax.data.reader import EvalImage, eval_images
from aecr_jax.data.samples import Sample
from aecr_jax.data.sources import drawn_test_scenes, open_samples
from aecr_jax.errors import UserError
from aecr_jax.files import make_folder, replacing
from aecr_jax.inference.restore import Restorer
from aecr_jax.inference.weights import DEFAULT_MODEL, load_with_info
from aecr_jax.metrics import psnr, ssim
from aecr_jax.processes import gather, no_bar

_PANEL_ROWS = 4
_FOLDERS = ("hazy", "restored", "clear")


@dataclass(frozen=True)
class Score:
    """Scores of one image: RGB PSNR in dB and SSIM, of the restored image and, for comparison, of the hazy input."""

    image: str
    psnr: float
    ssim: float
    input_psnr: float
    input_ssim: float


@bounded_jit
def measure(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Return PSNR and SSIM of one image `[H, W, 3]`, as an array of two numbers."""
    return jnp.concatenate([psnr(prediction[None], target[None]), ssim(prediction[None], target[None])])


def score_images(
    restorer: Restorer, images: Iterable[EvalImage], total: int | None = None
) -> Iterator[tuple[Score, EvalImage, np.ndarray]]:
    """Restore each image and yield its score, the image and the restored image.

    Raises:
      UserError: an image, its restored version or its score is not finite, or the image does not fit into memory; the message begins
        with the name of the image.
    """
    for image in tqdm(images, "evaluating", total, leave=False, disable=no_bar()):
        try:
            restored = restorer(image.hazy)
            after, before = (measure(x, image.clear) for x in (restored, image.hazy))
            score = Score(image.name, float(after[0]), float(after[1]), float(before[0]), float(before[1]))
            if not all(map(math.isfinite, astuple(score)[1:])):
                raise UserError("the score is not finite: check the values of the clear image")
        except UserError as error:
            raise UserError(f"{image.name}: {error}") from error
        yield score, image, restored


def evaluate(
    checkpoint: str | Path | None,
    data: str,
    output: str | Path | None = None,
    *,
    save_images: bool = False,
    data_dir: str = "",
) -> dict[str, Any]:
    """Score a checkpoint on a data set, write the results and print a table.

    Args:
      checkpoint: a name or path that `load_checkpoint` accepts; None for the default one of the shipped models.
      data: the images to score on, in the notation of `DataConfig`: a folder, HAZY,CLEAR, a built data set, "scenes", or a part of a
        named split.
      output: folder for `per_image.csv`, `summary.json` and `panel.png` (hazy | restored | clear).
      save_images: also write `hazy/`, `restored/` and `clear/` into `output`.
      data_dir: folder of the built data sets; `~/tensorflow_datasets` by default.

    Returns:
      The summary.

    Raises:
      UserError: the checkpoint or the data are missing or invalid, a result is not finite, or the output cannot be written or would
        overwrite the data.
    """
    if save_images and output is None:
        raise UserError("--save-images needs --output DIR")
    checkpoint = DEFAULT_MODEL if checkpoint is None else checkpoint
    model, config = load_with_info(checkpoint)
    restorer = Restorer(model)
    if data == "scenes" and "data" in config:  # use the size that the run evaluated on, so that both scores agree
        data = drawn_test_scenes(config["data"]["train"])
    samples, name = open_samples(data, data_dir=data_dir)
    if output is not None:
        output = make_folder(output)
        if save_images:
            _check_folders(output, samples)
    shown = {i * len(samples) // _PANEL_ROWS for i in range(_PANEL_ROWS)}
    scores: list[Score] = []
    rows: list[list[np.ndarray]] = []
    for score, image, restored in score_images(restorer, eval_images(samples), len(samples)):
        if output is not None and len(scores) in shown:
            add_row(rows, image, restored)
        if output is not None and save_images:
            for kind, picture in zip(_FOLDERS, (image.hazy, restored, image.clear)):
                write_image(output / kind / f"{image.name}.png", picture)
        scores.append(score)
    means = summarize(scores)
    about = {"checkpoint": str(checkpoint), "data": data, "split": name, "metrics": "RGB, float, as the official code"}
    about |= {key: config[key] for key in ("step", "weights") if key in config}
    # Write the files first: the reader of the table may close the pipe (`| head -1`).
    if output is not None:
        write_image(output / "panel.png", panel(rows))
        write_results(output, scores, means | about)
    print(table([("hazy input", means["input_psnr"], means["input_ssim"]), ("restored", means["psnr"], means["ssim"])]))
    print(f"mean over {means['images']} images of {name}; PSNR and SSIM on RGB as in the official code")
    if output is not None:
        print(f"hazy | restored | clear: {output / 'panel.png'}")
    return means | about


def add_row(rows: list[list[np.ndarray]], image: EvalImage, restored: np.ndarray) -> None:
    """Add the hazy, restored and clear images to the rows of a panel, unless their size differs from that of the first row."""
    if not rows or rows[0][0].shape == restored.shape:
        rows.append([image.hazy, restored, image.clear])


def _check_folders(output: Path, samples: list[Sample]) -> None:
    inputs = {path.parent.resolve() for sample in samples for path in sample.files.values()}
    for kind in _FOLDERS:
        if (folder := output / kind).resolve() in inputs:
            raise UserError(f"{folder} contains images to evaluate on and would be overwritten: choose another --output")


def summarize(scores: list[Score], count: int | None = None) -> dict[str, Any]:
    """Return the means over all images (`psnr`, `ssim`, `input_psnr` and `input_ssim`) and the number of images (`images`).

    In a run of several processes, pass the total number of images as `count`; the scores are then gathered from all processes.
    """
    keys = ("psnr", "ssim", "input_psnr", "input_ssim")
    table = np.array([[getattr(score, key) for key in keys] for score in scores]).reshape(-1, len(keys))
    table = table if count is None else gather(table, count)
    return {key: float(mean) for key, mean in zip(keys, table.mean(0, dtype=np.float64))} | {"images": len(table)}


def write_results(folder: str | Path, scores: list[Score], summary: dict[str, Any]) -> None:
    """Write `per_image.csv` and `summary.json`; each file is written completely or not at all.

    A number that is not finite becomes null in `summary.json`, because JSON cannot represent it, and an empty field in `per_image.csv`.
    A byte of a file name that is not UTF-8, such as E9, is written as \\udce9 in both files; `json.loads` and `os.fsencode` restore it.

    Raises:
      UserError: a file cannot be written.
    """
    folder = Path(folder)
    with (
        replacing(folder / "per_image.csv") as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, list(asdict(scores[0])))
        writer.writeheader()
        writer.writerows(_without_nan(asdict(score)) for score in scores)
    with replacing(folder / "summary.json") as partial:
        partial.write_text(json.dumps(_without_nan(summary), indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity by None in a JSON value."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: list[tuple[str, float, float]]) -> str:
    """Format rows of (name, PSNR, SSIM) as a text table."""
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'':{width}}  PSNR (dB)    SSIM"]
    return "\n".join(lines + [f"{name:{width}}  {p:9.2f}  {s:6.4f}" for name, p, s in rows])
