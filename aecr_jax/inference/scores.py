"""The metrics that evaluation knows by name, and the scores of images."""

from __future__ import annotations

import csv
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aecr_jax import metrics
from aecr_jax.devices import ImageProgram, Shared
from aecr_jax.errors import UserError
from aecr_jax.files import replacing
from aecr_jax.losses.lpips import LPIPS, VERSION
from aecr_jax.processes import gather
from aecr_jax.storage import as_path


class Metric(NamedTuple):
    """A metric of a restored and a clear image.

    `version` changes with the definition, so that scores of one version are comparable. `function` maps two batches `[N, H, W, 3]` to
    `[N]`; it is None for LPIPS, which needs weights.
    """

    title: str
    digits: int
    function: Callable[[jax.Array, jax.Array], jax.Array] | None
    definition: str
    version: str = "1"


METRICS = {
    "psnr": Metric("PSNR (dB)", 2, metrics.psnr, "PSNR in dB over all RGB values, floating point in [0, 1], as the official code"),
    "ssim": Metric("SSIM", 4, metrics.ssim, "SSIM of RGB, 11x11 Gaussian window, sigma 1.5, zero padding, as the official code"),
    "ssim_valid": Metric("SSIM valid", 4, metrics.ssim_valid, "SSIM as ssim, but without padding (Wang et al., 2004)"),
    "psnr_y": Metric("PSNR-Y (dB)", 2, metrics.psnr_y, "PSNR in dB of the luma of ITU-R BT.601, 16 to 235 of 255"),
    "ciede2000": Metric("CIEDE2000", 2, metrics.ciede2000, "mean CIEDE2000 over all pixels, sRGB, D65, 2-degree observer; lower is better"),
    "lpips": Metric("LPIPS", 4, None, "LPIPS with VGG-16 (Zhang et al., 2018); lower is better", VERSION),
}
DEFAULT_METRICS = ("psnr", "ssim")


def check_metrics(names: Sequence[str], lpips: LPIPS | str | Path | None = None) -> None:
    """Raise UserError unless `names` are different metrics of `METRICS`, and weights of LPIPS are given if and only if they are needed."""
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise UserError(f"metrics (={names!r}) must be a sequence of different names of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            raise UserError(f"there is no metric {name!r}: choose from {', '.join(METRICS)}")
    if "lpips" in names and lpips is None:
        raise UserError("the metric lpips needs weights: name the file that `python -m aecr_jax convert-lpips` wrote with --lpips FILE")
    if "lpips" not in names and lpips is not None:
        raise UserError(f"--lpips has no use for the metrics {','.join(names)}: add lpips to --metrics")


def definitions(names: Sequence[str], lpips: LPIPS | None = None) -> dict[str, dict[str, str]]:
    """Return the definition and version of each metric, and what is known of the weights of LPIPS, for `summary.json`."""
    about = {name: {"definition": METRICS[name].definition, "version": METRICS[name].version} for name in names}
    if lpips is not None:
        about["lpips"]["weights"] = lpips.source
    return about


class Measure:
    """Computes metrics of images `[H, W, 3]` against their clear images; when called, returns them by name.

    `each` measures images of one size at the same time, one on each device of this process, which must be no fewer.

    Args:
      names: names of `METRICS`.
      lpips: the network of LPIPS, if `names` contain it.

    Raises:
      UserError: when called, if the images do not fit into memory or are too small for a metric.
    """

    def __init__(self, names: Sequence[str] = DEFAULT_METRICS, lpips: LPIPS | None = None):
        check_metrics(names, lpips)
        self.names = tuple(names)
        graph, weights = (None, None) if lpips is None else nnx.split(lpips)
        self._weights = Shared(weights)
        self._apply = _program(self.names, graph)

    def __call__(self, prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
        (values,) = self.each([prediction], [target])
        return values

    def each(self, predictions: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> list[dict[str, float]]:
        try:
            values = self._apply(self._weights, predictions, targets)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error
        return [dict(zip(self.names, map(float, row))) for row in values]


@functools.lru_cache(8)
def _program(names: tuple[str, ...], graph: Any) -> ImageProgram:
    """Return a program of the weights of LPIPS and two images; it is kept, because its compiled programs are of use to later callers."""

    def scores(weights: Any, prediction: jax.Array, target: jax.Array) -> jax.Array:
        pair = prediction[None], target[None]
        functions = (METRICS[name].function or nnx.merge(graph, weights) for name in names)
        return jnp.concatenate([function(*pair) for function in functions])

    return ImageProgram(scores)


@dataclass(frozen=True)
class Score:
    """Scores of one image by metric: of the restored image, and for comparison of the hazy input."""

    image: str
    restored: Mapping[str, float]
    hazy: Mapping[str, float]

    def values(self) -> dict[str, float]:
        """Return the scores by the names of the columns of `per_image.csv`, such as `psnr` and `input_psnr`."""
        return {**self.restored, **{f"input_{name}": value for name, value in self.hazy.items()}}


def summarize(scores: Sequence[Score], count: int | None = None, *, names: Sequence[str] = DEFAULT_METRICS) -> dict[str, Any]:
    """Return the means over all images (`psnr`, `ssim`, `input_psnr` and `input_ssim`) and the number of images (`images`).

    In a run of several processes, pass the total number of images as `count`; the scores are then gathered from all processes.
    """
    keys = [*names, *(f"input_{name}" for name in names)]
    values = np.array([[score.values()[key] for key in keys] for score in scores]).reshape(-1, len(keys))
    values = values if count is None else gather(values, count)
    return {key: float(mean) for key, mean in zip(keys, values.mean(0, dtype=np.float64))} | {"images": len(values)}


def write_results(folder: str | Path, scores: Sequence[Score], summary: dict[str, Any]) -> None:
    """Write `per_image.csv` and `summary.json`; each file is written completely or not at all.

    A number that is not finite becomes null in `summary.json`, because JSON cannot represent it, and an empty field in `per_image.csv`.
    A byte of a file name that is not UTF-8, such as E9, is written as \\udce9 in both files; `json.loads` and `os.fsencode` restore it.

    Raises:
      UserError: a file cannot be written.
    """
    folder = as_path(folder)
    rows = [_without_nan({"image": score.image, **score.values()}) for score in scores]
    with (
        replacing(folder / "per_image.csv") as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with replacing(folder / "summary.json") as partial:
        partial.write_text(json.dumps(_without_nan(summary), indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity by None in a JSON value."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(means: Mapping[str, float], names: Sequence[str]) -> str:
    """Format the means over the hazy inputs and the restored images as a text table with a column for each metric."""
    columns = [["", "hazy input", "restored"]]
    for name in names:
        metric = METRICS[name]
        columns.append([metric.title, *(f"{means[prefix + name]:.{metric.digits}f}" for prefix in ("input_", ""))])
    widths = [max(map(len, column)) for column in columns]
    aligned = [[f"{cell:{'>' if i else ''}{widths[i]}}" for cell in column] for i, column in enumerate(columns)]
    return "\n".join("  ".join(row) for row in zip(*aligned))
