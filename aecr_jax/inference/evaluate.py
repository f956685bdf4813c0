"""Evaluation of a model on pairs of hazy and clear images."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from aecr_jax.data.haze import RESIDE, HazeConfig
from aecr_jax.data.images import panel, write_image
from aecr_jax.data.reader import EvalImage, eval_images
from aecr_jax.data.samples import Sample
from aecr_jax.data.sources import drawn_test_scenes, open_samples
from aecr_jax.errors import UserError
from aecr_jax.files import make_folder
from aecr_jax.inference.restore import Restorer
from aecr_jax.inference.scores import DEFAULT_METRICS, METRICS, Measure, Score, check_metrics, definitions, summarize, table, write_results
from aecr_jax.inference.weights import DEFAULT_MODEL, load_with_info
from aecr_jax.losses.lpips import LPIPS
from aecr_jax.processes import no_bar
from aecr_jax.storage import resolve

_PANEL_ROWS = 4
_FOLDERS = ("hazy", "restored", "clear")


def score_images(
    restorer: Restorer, images: Iterable[EvalImage], total: int | None = None, *, measure: Measure | None = None
) -> Iterator[tuple[Score, EvalImage, np.ndarray]]:
    """Restore each image and yield its score, the image and the restored image.

    Successive images of one size are restored and measured at the same time, one on each device of this process.

    Args:
      restorer: the model.
      images: the images.
      total: their number, for the progress bar.
      measure: the metrics; by default PSNR and SSIM.

    Raises:
      UserError: an image, its restored version or its score is not finite, or the image does not fit into memory or is too small for a
        metric; the message begins with the name of the image.
    """
    measure = measure or Measure()
    for batch in _batches(tqdm(images, "evaluating", total, leave=False, disable=no_bar())):
        hazy, clear = [image.hazy for image in batch], [image.clear for image in batch]
        with _naming(batch[0]):  # what can fail here depends on the size, which the images have in common
            restored = restorer.restore_each(hazy)
            measured = measure.each(restored, clear), measure.each(hazy, clear)
        for image, result, *values in zip(batch, restored, *measured):
            score = Score(image.name, *values)
            with _naming(image):
                restorer.check(image.hazy, result)
                if not all(map(math.isfinite, score.values().values())):
                    raise UserError("the score is not finite: check the values of the clear image")
            yield score, image, result


def _batches(images: Iterable[EvalImage]) -> Iterator[list[EvalImage]]:
    """Group successive images of one size, as many as this process has devices."""
    batch: list[EvalImage] = []
    for image in images:
        if batch and image.hazy.shape != batch[0].hazy.shape:
            yield batch
            batch = []
        batch.append(image)
        if len(batch) == jax.local_device_count():
            yield batch
            batch = []
    if batch:
        yield batch


@contextlib.contextmanager
def _naming(image: EvalImage) -> Iterator[None]:
    """Begin the message of an error with the name of the image."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{image.name}: {error}") from error


def evaluate(
    checkpoint: str | Path | None,
    data: str,
    output: str | Path | None = None,
    *,
    haze: HazeConfig | None = None,
    save_images: bool = False,
    data_dir: str = "",
    metrics: Sequence[str] = DEFAULT_METRICS,
    lpips: str | Path | None = None,
) -> dict[str, Any]:
    """Score a checkpoint on a data set, write the results and print a table.

    Args:
      checkpoint: a name or path that `load_checkpoint` accepts; None for the default one of the shipped models.
      data: the images to score on, in the notation of `DataConfig`: a folder, HAZY,CLEAR, a built data set, "scenes", or a part of a
        named split.
      output: folder for `per_image.csv`, `summary.json` and `panel.png` (hazy | restored | clear).
      haze: the settings of the haze that is made where data have none, as for `to_pair`; by default, haze is RESIDE's.
      save_images: also write `hazy/`, `restored/` and `clear/` into `output`, in place of files of the same names.
      data_dir: folder of the built data sets; `~/tensorflow_datasets` by default.
      metrics: different names of "psnr", "ssim", "ssim_valid", "psnr_y", "ciede2000" and "lpips".
      lpips: the weights of LPIPS, a file that `convert-lpips` wrote; "lpips" needs it.

    Returns:
      The summary: the mean of each metric over the restored images (`psnr`) and the hazy inputs (`input_psnr`), the number of images
      (`images`), and what was evaluated, with the definition and version of each metric (`metrics`).

    Raises:
      UserError: the checkpoint, the data, the metrics or the weights of LPIPS are missing or invalid, `haze` does not apply to the data, a
        result is not finite, or the output cannot be written or would overwrite the data.
    """
    check_metrics(metrics, lpips)
    if save_images and output is None:
        raise UserError("--save-images needs --output DIR")
    network = None if lpips is None else LPIPS.load(lpips)
    measure = Measure(metrics, network)
    checkpoint = DEFAULT_MODEL if checkpoint is None else checkpoint
    model, config = load_with_info(checkpoint)
    restorer = Restorer(model)
    if data == "scenes" and "data" in config:  # use the size that the run evaluated on, so that both scores agree
        data = drawn_test_scenes(config["data"]["train"])
    samples, name = open_samples(data, data_dir=data_dir)
    if haze and not any(sample.kind in ("depth", "outdoor") for sample in samples):
        raise UserError(f"--haze is for clear images with depth and for outdoor photographs, and {name} has neither: omit it")
    if output is not None:
        output = make_folder(output)
        if save_images:
            _check_folders(output, samples)
    shown = {i * len(samples) // _PANEL_ROWS for i in range(_PANEL_ROWS)}
    scores: list[Score] = []
    rows: list[list[np.ndarray]] = []
    for score, image, restored in score_images(restorer, eval_images(samples, haze=haze or RESIDE), len(samples), measure=measure):
        if output is not None and len(scores) in shown:
            add_row(rows, image, restored)
        if output is not None and save_images:
            for kind, picture in zip(_FOLDERS, (image.hazy, restored, image.clear)):
                write_image(output / kind / f"{image.name}.png", picture)
        scores.append(score)
    means = summarize(scores, names=metrics)
    about = {"checkpoint": str(checkpoint), "data": data, "split": name, "metrics": definitions(metrics, network)}
    about |= {key: config[key] for key in ("step", "weights") if key in config}
    if haze:
        about["haze"] = dataclasses.asdict(haze)
    # Write the files first: the reader of the table may close the pipe (`| head -1`).
    if output is not None:
        write_image(output / "panel.png", panel(rows))
        write_results(output, scores, means | about)
    print(table(means, metrics))
    official = " and ".join(METRICS[metric].title.removesuffix(" (dB)") for metric in metrics if metric in DEFAULT_METRICS)
    print(f"mean over {means['images']} images of {name}" + (f"; {official} on RGB as in the official code" if official else ""))
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
        if resolve(folder := output / kind) in inputs:
            raise UserError(f"{folder} contains images to evaluate on and would be overwritten: choose another --output")
