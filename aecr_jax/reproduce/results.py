"""What `reproduce` writes: the results file, per-image scores, and the Markdown page with the table and the claims."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from aecr_jax.errors import UserError, first_line
from aecr_jax.files import replacing
from aecr_jax.reproduce.claims import Interval, judge
from aecr_jax.reproduce.tables import Claim, Row, Table


@dataclass(frozen=True)
class Result:
    """One line of the results file: a row of a table with one seed."""

    row: str
    seed: int
    psnr: float
    """Mean RGB PSNR in dB."""
    ssim: float
    input_psnr: float
    """Scores of the hazy images."""
    input_ssim: float
    images: int
    parameters: int
    macs: int
    """Multiply-adds for one image of 256x256 pixels."""
    steps: int
    minutes: float
    """Time of training, without evaluation."""
    scale: str
    data: str
    test: str
    features: str = ""
    """The features of the regularization, by `settings.identify`; empty in files of versions that did not write them."""
    weights: str = ""
    """The weights with which the run began, by `settings.identify`; empty in files of versions that did not write them."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in dataclasses.astuple(self) if isinstance(value, float)):
            raise ValueError("a number is not finite")


def read_results(path: Path) -> list[Result]:
    """Read the results file; if there is none yet, there are no results.

    Raises:
      UserError: the file is damaged.
    """
    kinds = get_type_hints(Result)
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            return [Result(**{name: kind(line[name]) for name, kind in kinds.items() if name in line}) for line in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is not a results file of reproduce ({first_line(error)}): move it away or choose another --output"
        ) from error


def add_result(path: Path, result: Result) -> list[Result]:
    """Add a line to the results file, which is written completely or not at all, and return all of its results."""
    results = [*read_results(path), result]
    with replacing(path) as partial, open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, list(dataclasses.asdict(result)))
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, results))
    return results


def read_scores(folder: Path) -> dict[str, float]:
    """Return the PSNR of each image from a folder of scores.

    Raises:
      UserError: the file is missing or damaged.
    """
    path = folder / "per_image.csv"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return {line["image"]: float(line["psnr"]) for line in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): remove its row from results.csv to score it again") from error


def page(table: Table, results: Sequence[Result], measured: Mapping[Claim, Sequence[tuple[int, Interval]]], pictures: Iterable[str]) -> str:
    """Return the Markdown page of a table.

    Args:
      table: the table.
      results: the rows that are finished.
      measured: for each claim, the seeds for which both of its rows are finished, with the interval of the difference.
      pictures: file names of pictures to show.
    """
    first = results[0]
    about = f"Scale `{first.scale}`, trained on `{first.data}`, scored on {first.images} images of `{first.test}`"
    hazy = f"hazy input: {first.input_psnr:.2f} dB, {first.input_ssim:.4f}"
    lines = [
        f"# {table.title}",
        "",
        f"{about} ({hazy}). PSNR in dB and SSIM are of RGB; multiply-adds are for 256x256 pixels; minutes are of training alone.",
        "",
        "| row | seed | PSNR | SSIM | paper, SOTS indoor | parameters | multiply-adds | steps | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table.rows:
        for result in sorted((result for result in results if result.row == row.name), key=lambda result: result.seed):
            cost = f"{result.parameters:,} | {result.macs / 1e9:.2f} G | {result.steps:,} | {result.minutes:.1f}"
            lines.append(f"| `{row.name}` | {result.seed} | {result.psnr:.2f} | {result.ssim:.4f} | {_paper(row)} | {cost} |")
    lines += [
        "",
        "## Claims",
        "",
        "The difference of PSNR between two rows, in dB, with the 95% interval of the paired differences of the images; images of one",
        "scene are one cluster. A claim is decided if the intervals of all seeds, at least two, exclude 0 on the same side.",
        "",
        "| claim | rows | paper | measured, by seed | result |",
        "|---|---|---|---|---|",
    ]
    for claim in table.claims:
        intervals = measured.get(claim, [])
        cells = "; ".join(f"{seed}: {interval}" for seed, interval in intervals) or "-"
        verdict = judge(claim.gain, [interval for _, interval in intervals]) if intervals else "not measured"
        gain = "-" if claim.gain is None else f"{claim.gain:+.2f}"
        lines.append(f"| {claim.text} | `{claim.row}` - `{claim.base}` | {gain} | {cells} | {verdict} |")
    for picture in pictures:
        lines += ["", f"![{Path(picture).stem.replace('_', ' ')}]({picture})"]
    return "\n".join([*lines, ""])


def _paper(row: Row) -> str:
    return ", ".join(form.format(score) for form, score in (("{:.2f}", row.psnr), ("{:.4f}", row.ssim)) if score is not None) or "-"
