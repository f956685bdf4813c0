"""The training run, from top to bottom."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from aecr_jax.checkpoint import Checkpoints
from aecr_jax.config import Config, config_to_json
from aecr_jax.data.images import make_folder, panel, write_image
from aecr_jax.data.pipeline import cache_bytes, eval_images, split_samples, train_batches
from aecr_jax.errors import UserError
from aecr_jax.evaluate import Score, add_row, evaluate, summarize
from aecr_jax.restore import Restorer
from aecr_jax.step import TrainState, check_batch, init_state, make_mesh, make_train_step, replicate, shard_batch, state_to_model
from aecr_jax.vgg import VGG19Features, load_vgg19, random_vgg19

_PANEL_ROWS = 3


def train(config: Config, *, say: Callable[[str], None] = tqdm.write) -> dict[str, Any]:
    """Trains until `train.steps`; the same call again continues from the last checkpoint.

    Writes into `train.workdir`: `config.json`, `metrics.jsonl`, `panels/*.png` (hazy | restored | clear), `checkpoints/`.

    Args:
      config: the run's settings.
      say: takes lines for the person who waits.

    Returns:
      The last evaluation's summary: `psnr`, `ssim`, `input_psnr`, `input_ssim`, `images`, `data` (what it evaluated on), `step`.

    Raises:
      UserError: a setting, a file or a folder is wrong, or the loss is not finite.
    """
    config.validate()
    workdir = Path(config.train.workdir)

    # ---- devices, data, features: what can be wrong is found out before anything is written
    mesh = make_mesh()
    check_batch(config, mesh)
    features = _load_features(config)
    train_samples, eval_samples, evaluated_on = split_samples(config.data)
    if not eval_samples:
        raise UserError("nothing to evaluate on: set data.eval_hazy and data.eval_clear, or data.holdout")
    if config.data.cache:
        say(f"keeping {len(train_samples)} images in memory: about {cache_bytes(train_samples, config.data) / 1e9:.1f} GB")
    batches = train_batches(train_samples, config, process_index=jax.process_index(), process_count=jax.process_count())
    count = min(config.train.eval_images, len(eval_samples))
    for _ in eval_images(eval_samples, limit=count):  # reads them once: a damaged one should not stop the run at its first evaluation
        pass
    make_folder(workdir)

    # ---- state: initial values, or the last checkpoint with the input's position
    checkpoints = Checkpoints(workdir)
    state = replicate(init_state(config), mesh)
    if (restored := checkpoints.restore(config.model, state, batches, mesh)) is not None:
        state = restored
        say(f"continuing from step {int(state.step)} in {workdir}")
    first = int(state.step)
    log = _RunLog(workdir, config, first)
    step_fn = make_train_step(config, features, mesh)
    restorer = Restorer(state_to_model(config, state))
    say(f"training on {len(train_samples)} images, evaluating on {len(eval_samples)} ({evaluated_on}), {mesh.size} device(s)")

    # ---- the loop
    summary: dict[str, Any] = {}
    waited, since, measured_from = 0.0, time.perf_counter(), first
    try:
        with tqdm(total=config.train.steps, initial=first, desc="training", unit="step", smoothing=0.1) as bar:
            for step in range(first + 1, config.train.steps + 1):
                asked = time.perf_counter()
                try:
                    batch = shard_batch(next(batches), mesh)
                except UserError:  # a damaged file: keep the steps since the last checkpoint
                    if step - 1 not in (first, *checkpoints.steps()):
                        checkpoints.save(state, config, batches, psnr=-np.inf)
                    raise
                waited += time.perf_counter() - asked
                state, measurements = step_fn(state, batch)
                bar.update()
                evaluating = step % config.train.eval_every == 0 or step == config.train.steps
                if step % config.train.log_every == 0 or evaluating:
                    values = {name: float(value) for name, value in jax.device_get(measurements).items()}
                    seconds = time.perf_counter() - since
                    values["images_per_second"] = (step - measured_from) * config.train.batch / seconds
                    values["waiting_for_data"] = waited / seconds
                    log.write(step, "train", values)
                    if not np.isfinite([values["total"], values["grad_norm"], values["param_norm"]]).all():
                        raise UserError(
                            f"the loss, its gradient or the parameters are not finite between steps {measured_from + 1} and {step}"
                            f" (largest offset {values.get('offset_max', 0):.3g} pixels); the last checkpoint in {workdir} is from"
                            " before. A lower train.learning_rate, train.offset_rate or train.clip_norm may help"
                        )
                    bar.set_postfix({name: f"{values[name]:.4f}" for name in ("l1", "cr") if name in values})
                    waited, since, measured_from = 0.0, time.perf_counter(), step
                if evaluating:
                    summary = _evaluate(restorer, state, eval_samples, count, workdir / "panels" / f"step_{step:07d}.png")
                    log.write(step, "eval", summary | {"data": evaluated_on})
                    say(
                        f"step {step}: PSNR {summary['psnr']:.2f} dB, SSIM {summary['ssim']:.4f}"
                        f" (hazy input {summary['input_psnr']:.2f} dB, {summary['input_ssim']:.4f})"
                    )
                    checkpoints.save(state, config, batches, summary["psnr"])
                    since = time.perf_counter()  # evaluation is not training time
    finally:
        checkpoints.close()
    if not summary:  # the run was complete already
        summary = _evaluate(restorer, state, eval_samples, count, None)
    return summary | {"data": evaluated_on, "step": int(state.step)}


def _load_features(config: Config) -> VGG19Features | None:
    if not config.loss.cr:
        return None
    features = random_vgg19() if config.loss.features == "random" else load_vgg19(config.loss.features)
    if config.data.crop < (least := 2 ** (features.levels - 1)):
        raise UserError(f"data.crop (={config.data.crop}) must be at least {least} for the {features.levels} levels of the features")
    return features


def _evaluate(restorer: Restorer, state: TrainState, samples: list[Any], count: int, picture: Path | None) -> dict[str, Any]:
    restorer.set_arrays({**state.params, **state.stats})
    scores: list[Score] = []
    rows: list[list[np.ndarray]] = []
    for score, image, restored in evaluate(restorer, eval_images(samples, limit=count), count):
        scores.append(score)
        if len(rows) < _PANEL_ROWS:
            add_row(rows, image, restored)
    if picture is not None:
        write_image(picture, panel(rows))
    return summarize(scores)


class _RunLog:
    """`config.json` and `metrics.jsonl` in the work directory; lines from after the checkpoint that a run continues from go."""

    def __init__(self, workdir: Path, config: Config, first: int):
        self._path = workdir / "metrics.jsonl"
        try:
            lines = self._path.read_text().splitlines() if self._path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first]
            self._path.write_text("".join(line + "\n" for line in kept))
            (workdir / "config.json").write_text(config_to_json(config) + "\n")
        except (OSError, ValueError) as error:
            raise UserError(f"{workdir} cannot be written, or its metrics.jsonl is damaged: {error}") from error

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        line = json.dumps({"step": step, "kind": kind, "time": round(time.time(), 3), **values})
        try:
            with open(self._path, "a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror or error}") from error
