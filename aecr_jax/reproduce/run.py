"""Runs the rows of a table of the paper one after another, scores each once, and writes what was measured beside the paper's numbers."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from aecr_jax.data.images import read_image, unique_names, write_image
from aecr_jax.data.pipeline import check_haze
from aecr_jax.data.reader import eval_images
from aecr_jax.data.samples import Sample
from aecr_jax.data.sources import SplitSamples, open_samples, split_samples
from aecr_jax.errors import UserError
from aecr_jax.files import replacing
from aecr_jax.inference.compare import draw_sheet, make_cell
from aecr_jax.inference.evaluate import score_images
from aecr_jax.inference.restore import Restorer
from aecr_jax.inference.scores import Score, summarize, write_results
from aecr_jax.inference.weights import CHECKPOINTS, load_checkpoint
from aecr_jax.networks.arrays import count_parameters
from aecr_jax.networks.macs import network_macs
from aecr_jax.networks.network import Network
from aecr_jax.reproduce.claims import Interval, paired_interval
from aecr_jax.reproduce.figure import draw_figure
from aecr_jax.reproduce.results import Result, add_result, page, read_results, read_scores
from aecr_jax.reproduce.settings import Inputs, Scale, check_features, check_run, identify, largest_rate, load_start, row_config
from aecr_jax.reproduce.tables import Claim, Row, Table, choose_rows, find_table
from aecr_jax.training.config import Config, load_config
from aecr_jax.training.runlog import METRICS
from aecr_jax.training.trainer import train

_SCENES, _CELL_WIDTH = 3, 240
_FIGURE, _PANEL = "psnr_over_parameters.svg", "panel.png"


class _Job(NamedTuple):
    """A row with one seed."""

    row: Row
    seed: int
    config: Config
    features: str
    """The features of its regularization, by `identify`."""
    weights: str
    """The weights with which it begins, by `identify`."""


@dataclass(frozen=True)
class _Output:
    """The files of a table."""

    folder: Path

    @property
    def results(self) -> Path:
        return self.folder / "results.csv"

    @property
    def page(self) -> Path:
        return self.folder / "results.md"

    def scores(self, row: Row, seed: int) -> Path:
        return self.folder / "scores" / f"{row.name.replace(':', '_')}_seed{seed}"


class _Test(NamedTuple):
    """The images that every row is scored on."""

    samples: list[Sample]
    name: str

    def scenes(self) -> dict[str, str]:
        """Return the scene of each image, by the image's name as it is written to `per_image.csv`."""
        names = unique_names(sample.name for sample in self.samples)
        return {name.encode(errors="backslashreplace").decode(): sample.scene for name, sample in zip(names, self.samples)}


def reproduce(
    name: str,
    *,
    data: str,
    scale: Scale = "small",
    test: str = "",
    features: str | None = None,
    weights: str | None = None,
    rows: Sequence[str] = (),
    seeds: int = 2,
    output: str | Path = "runs/reproduce",
) -> Path:
    """Train and score the rows of a table of the paper; rows that are in the results file already are skipped.

    Each row is an ordinary run, in `output/runs/ROW_seedN`, which continues if it was interrupted. These are written to `output/NAME`:
    `results.csv`; `results.md` with the table and the claims; `psnr_over_parameters.svg`; `panel.png`, some scenes restored by each
    row with the first seed; and `scores/ROW_seedN/`, the scores of each image.

    Args:
      name: "table2", "table3" or "table4".
      data: training data, in the notation of `DataConfig`.
      scale: "paper", the paper's recipe, or "small", a narrow network with fewer steps and smaller crops.
      test: test data, on which each row is scored once, at its end; at the small scale, the images that are held out by default.
      features: file of VGG-19 weights for the rows with regularization, or "random".
      weights: weights from which the rows of one network begin (Table 3): a file of its authors, or a model's folder.
      rows: names of rows; all by default. Table 4 also takes other rates, POSITIVES:NEGATIVES.
      seeds: number of runs of each row, with the seeds 0, 1, ...
      output: folder for all files.

    Returns:
      The path of `results.md`.

    Raises:
      UserError: an argument is wrong, a folder holds another run, or as for `train`.
      Stopped: as for `train`; the same command continues.
    """
    out, runs = _Output(Path(output) / name), Path(output) / "runs"
    results = read_results(out.results)
    table = find_table(name, r=largest_rate(scale), rows=[*rows, *(result.row for result in results)])
    chosen = choose_rows(table, rows)
    if unknown := {result.row for result in results} - {row.name for row in table.rows}:
        raise UserError(f"{out.results} has rows that {name} does not have ({', '.join(sorted(unknown))}): choose another --output")
    if not 1 <= seeds <= 1000:
        raise UserError(f"--seeds (={seeds}) must be from 1 to 1000")
    if scale == "paper" and not test:
        raise UserError("--test DATA is missing: --scale paper trains on all of --data and needs other images to score on")
    for row in chosen:
        if scale == "paper" and row.loss.get("cr_negatives") == "lagging":
            raise UserError(f"row {row.name} of {name} needs the moving average of the weights, so --scale (=paper) must be small")
    with_cr = [row for row in chosen if row.loss.get("cr", load_config(row.config).loss.cr)]
    inputs = Inputs(data, test, check_features(features, with_cr), load_start(weights, chosen, Path(output) / "weights"))
    # All rows with one seed come first, so that a table is complete early.
    digests = {path: identify(path) for path in ("", inputs.features, inputs.start.path if inputs.start else "")}
    jobs = []
    for seed in range(seeds):
        for row in chosen:
            config = row_config(name, row, scale, inputs, seed=seed, workdir=runs / f"{row.run}_seed{seed}")
            jobs.append(_Job(row, seed, config, digests[config.loss.features if config.loss.cr else ""], digests[config.run.init_from]))
    split = split_samples(jobs[0].config.data)
    images = _open_test(split, test)
    for job in jobs:  # each row's training would say so too, but after the rows before it
        try:
            check_haze(split.train, haze_truth=bool(job.config.loss.haze), rehazed=job.config.loss.rehazed)
        except UserError as error:
            raise UserError(f"row {job.row.name} of {name}: {error}") from error
    here = f"scale {scale}, data {data}, {len(images.samples)} images of {images.name}"
    for result in results:
        there = f"scale {result.scale}, data {result.data}, {result.images} images of {result.test}"
        if there != here:
            raise UserError(f"{out.results} has results of {there}, not of {here}: choose another --output")
    _check_weights(table, results, jobs, out)
    for job in jobs:
        check_run(job.config)
    if results:  # problems with the files of finished rows are found here, and not after hours of training
        _write(table, results, images, out)
    done = {(result.row, result.seed) for result in results}
    for number, job in enumerate(jobs, 1):
        what = f"row {job.row.name}, seed {job.seed} ({number} of {len(jobs)})"
        if (job.row.name, job.seed) in done:
            tqdm.write(f"{what}: already in {out.results}")
            continue
        tqdm.write(f"{what}: {job.config.run.workdir}")
        result = _run(job, images, out, scale)
        results = add_result(out.results, result)
        tqdm.write(f"{what}: {result.psnr:.2f} dB, {result.ssim:.4f} on {result.images} images of {result.test}")
        _write(table, results, images, out)
        # The next row does not need the programs and arrays of this one.
        jax.clear_caches()
        gc.collect()
    return out.page


def _check_weights(table: Table, results: Sequence[Result], jobs: Sequence[_Job], out: _Output) -> None:
    """Check that finished rows had the features and the initial weights of those to be run, because claims compare them."""
    networks = {row.name: load_config(row.config).model.NAME for row in table.rows}
    for result in results:
        for job in jobs:
            other = f"row {job.row.name} of {table.name}: {out.results} has {result.row} with"
            if result.features not in ("", "-", job.features) and job.features != "-":
                raise UserError(f"{other} the features {result.features}, not {job.features}: choose another --output")
            if networks[result.row] == networks[job.row.name] and result.weights not in ("", job.weights):
                raise UserError(f"{other} the initial weights {result.weights}, not {job.weights}: choose another --output")


def _open_test(split: SplitSamples, test: str) -> _Test:
    if test:
        return _Test(*open_samples(test))
    if not split.evaluation:
        raise UserError("--test DATA is missing: nothing of --data is held out")
    return _Test(split.evaluation, split.evaluated_on)


def _run(job: _Job, images: _Test, out: _Output, scale: Scale) -> Result:
    """Train a row to its last step, or continue it, and score its last checkpoint."""
    config = job.config
    train(config)
    workdir = Path(config.run.workdir)
    # The last checkpoint, and not the best one, so that no images choose the step.
    model = load_checkpoint(workdir / CHECKPOINTS / str(config.optim.steps))
    means = _score(model, images, out.scores(job.row, job.seed))
    return Result(
        row=job.row.name,
        seed=job.seed,
        psnr=means["psnr"],
        ssim=means["ssim"],
        input_psnr=means["input_psnr"],
        input_ssim=means["input_ssim"],
        images=means["images"],
        parameters=count_parameters(model),
        macs=network_macs(config.model),
        steps=config.optim.steps,
        minutes=round(training_minutes(workdir, config.optim.batch), 2),
        scale=scale,
        data=config.data.train,
        test=images.name,
        features=job.features,
        weights=job.weights,
    )


def _score(model: Network, images: _Test, folder: Path) -> dict[str, Any]:
    """Score a model, write the scores and the restored images of the scenes to show, and return the means."""
    shown = _shown(len(images.samples))
    scores: list[Score] = []
    for score, _, restored in score_images(Restorer(model), eval_images(images.samples), len(images.samples)):
        if len(scores) in shown:
            write_image(folder / _restored(shown.index(len(scores))), restored)
        scores.append(score)
    means = summarize(scores)
    write_results(folder, scores, means | {"data": images.name})
    return means


def _shown(count: int) -> list[int]:
    """Return the indices of the images to show, as `eval_images` chooses them."""
    shown = min(_SCENES, count)
    return [i * count // shown for i in range(shown)]


def _restored(number: int) -> str:
    return f"restored_{number}.png"


def training_minutes(workdir: Path, batch: int) -> float:
    """Return the time that a run has trained, without compilation, evaluation and interruptions, from the speeds in its `metrics.jsonl`.

    Args:
      workdir: the run's folder.
      batch: number of images per step.
    """
    lines = map(json.loads, (workdir / METRICS).read_text().splitlines())
    seconds, before = 0.0, 0
    for line in lines:
        if line["kind"] == "train":
            seconds += (line["step"] - before) * batch / line["images_per_second"]
            before = line["step"]
    return seconds / 60


def _write(table: Table, results: Sequence[Result], images: _Test, out: _Output) -> None:
    """Write the page, the figure and the panel of the rows that are finished."""
    by_row = {row.name: [result for result in results if result.row == row.name] for row in table.rows}
    finished = {name: found for name, found in by_row.items() if found}
    measured = _measure_claims(table, finished, images, out)
    with replacing(out.folder / _FIGURE) as partial:
        partial.write_text(draw_figure(finished))
    write_image(out.folder / _PANEL, _draw_panel([row for row in table.rows if row.name in finished], finished, images, out))
    with replacing(out.page) as partial:
        partial.write_text(page(table, results, measured, [_FIGURE, _PANEL]), errors="backslashreplace")


def _measure_claims(
    table: Table, finished: Mapping[str, Sequence[Result]], images: _Test, out: _Output
) -> dict[Claim, list[tuple[int, Interval]]]:
    """Return, for each claim, the interval of each seed for which both rows are finished."""
    rows = {row.name: row for row in table.rows}
    scenes = images.scenes()
    measured: dict[Claim, list[tuple[int, Interval]]] = {}
    for claim in table.claims:
        seeds = [{result.seed for result in finished.get(name, [])} for name in (claim.row, claim.base)]
        for seed in sorted(seeds[0] & seeds[1]):
            scores, base = (read_scores(out.scores(rows[name], seed)) for name in (claim.row, claim.base))
            try:
                interval = paired_interval(scores, base, scenes)
            except ValueError as error:
                raise UserError(f"rows {claim.row} and {claim.base} of seed {seed} in {out.folder / 'scores'}: {error}") from error
            measured.setdefault(claim, []).append((seed, interval))
    return measured


def _draw_panel(rows: Sequence[Row], finished: Mapping[str, Sequence[Result]], images: _Test, out: _Output) -> np.ndarray:
    """Draw hazy | each row's result | clear for a few scenes, each row with its lowest seed."""
    pairs = list(eval_images(images.samples, limit=_SCENES))
    columns = [[make_cell(pair.hazy, pair.clear, _CELL_WIDTH) for pair in pairs]]
    for row in rows:
        folder = out.scores(row, min(result.seed for result in finished[row.name]))
        columns.append([make_cell(read_image(folder / _restored(i)), pair.clear, _CELL_WIDTH) for i, pair in enumerate(pairs)])
    columns.append([make_cell(pair.clear, None, _CELL_WIDTH) for pair in pairs])
    return draw_sheet(["hazy", *(row.name for row in rows), "clear"], columns)
