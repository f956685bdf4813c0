"""The training run, from top to bottom."""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from aecr_jax.checkpoint import Checkpoints, Position, check_folder_name, has_checkpoint, load_checkpoint_with_config, model_changes
from aecr_jax.config import Config
from aecr_jax.data.fingerprint import check_same_data, fingerprint, read_fingerprint, record_damaged
from aecr_jax.data.pipeline import DamagedSample, cache_bytes, check_samples, eval_images, split_samples, train_batches
from aecr_jax.distributed import STATUS, StopRequest, check_shared, initialize, is_main
from aecr_jax.errors import Stopped, UserError, first_line
from aecr_jax.evaluate import Score, add_row, evaluate, summarize
from aecr_jax.files import make_folder
from aecr_jax.lock import FolderLock
from aecr_jax.model import AECRNet, widen
from aecr_jax.restore import Restorer
from aecr_jax.runlog import CONFIG, RunLog
from aecr_jax.step import Step, TrainState, check_batch, init_state, make_mesh, make_train_step, replicate, shard_batch, state_to_model
from aecr_jax.vgg import VGG19Features, load_vgg19, random_vgg19

_PANEL_ROWS = 3
# Measurements are looked at this many steps late, so that the devices need not wait for it.
_LATE = 2


def train(config: Config, *, say: Callable[[str], None] = tqdm.write) -> dict[str, Any]:
    """Trains until `train.steps`; the same call again continues from the last checkpoint.

    Writes into `train.workdir`: `config.json`, `versions.json`, `metrics.jsonl`, `panels/*.png` (hazy | restored | clear),
    `checkpoints/`. How a run resumes:

    1. The last whole checkpoint gives parameters, their average, statistics, optimizer and step, bit by bit.
    2. The order of images, crops and haze follows from `train.seed`; the checkpoint says how many images were read of it.
    3. Nothing else is random: the initial values, which come from `train.seed` too, are replaced.

    Args:
      config: the run's settings.
      say: called with each progress message.

    Returns:
      The last evaluation's summary: `psnr`, `ssim`, `input_psnr`, `input_ssim`, `images`, `data` (what it evaluated on), `weights`
      (the parameters or their moving average), `step`.

    Raises:
      UserError: a setting, a file or a folder is wrong, another run holds the folder, or the loss is not finite.
      Stopped: SIGTERM or Ctrl-C; the state is saved.
    """
    config.validate()
    check_folder_name(config.train.workdir)
    initialize(config.train)
    if not is_main():
        say = _be_silent
    inputs = _prepare(config, say)
    workdir = make_folder(config.train.workdir)
    # One process writes for all of a run, so it alone holds the folder.
    with FolderLock(workdir, say) if is_main() else contextlib.nullcontext() as lock:
        return _run(config, inputs, workdir, lock, say)


class _Inputs(NamedTuple):
    """What a run reads before it writes anything."""

    mesh: Mesh
    features: VGG19Features | None
    train: list[Any]
    evaluation: list[Any]
    evaluated_on: str
    eval_count: int  # how many images of `evaluation` to score
    initial: AECRNet | None


def _prepare(config: Config, say: Callable[[str], None]) -> _Inputs:
    """Open data, features and initial weights: what can be wrong is found out before anything is written."""
    mesh = make_mesh()
    check_batch(config, mesh)
    features = _load_features(config)
    train_samples, eval_samples, evaluated_on = split_samples(config.data)
    if not eval_samples:
        raise UserError("nothing to evaluate on: set data.eval_hazy and data.eval_clear, or data.holdout")
    if config.data.cache:
        say(f"keeping {len(train_samples)} images in memory: about {cache_bytes(train_samples, config.data) / 1e9:.1f} GB")
    check_samples(train_samples, config, jax.process_count())
    count = min(config.train.eval_images, len(eval_samples))
    for _ in eval_images(eval_samples, limit=count, **_here()):  # reads them once: a damaged one should not stop the first evaluation
        pass
    return _Inputs(mesh, features, train_samples, eval_samples, evaluated_on, count, _load_initial(config, say))


def _here() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def _run(config: Config, inputs: _Inputs, workdir: Path, lock: FolderLock | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Restore or initialize the state, then train to the last step."""
    mesh, features, train_samples, eval_samples, evaluated_on, count, initial = inputs

    # ---- state: initial values, or the last checkpoint with the input's position
    data = fingerprint(train_samples)
    check_data = functools.partial(check_same_data, now=data, samples=train_samples, workdir=workdir)
    checkpoints = Checkpoints(workdir)
    state = replicate(init_state(config, initial), mesh)
    position = Position(0, str(data))
    if (restored := checkpoints.restore(config, state, mesh, check_data)) is not None:
        state, position = restored.state, restored.position
        say(f"continuing from step {int(state.step)} in {workdir}")
        for change in restored.changes:
            say(f"setting changed since then: {change}")
    elif config.train.init_from:
        say(f"beginning with the parameters of {config.train.init_from}")
    if is_main() and (restored is None or read_fingerprint(workdir) is None):
        data.write(workdir)
    first = int(state.step)
    batches = train_batches(train_samples, config, start=position.images, **_here())
    log = RunLog(workdir, config, first)
    check_shared(workdir / CONFIG)
    restorer = Restorer(state_to_model(config, state))
    say(f"training on {len(train_samples)} images, evaluating on {len(eval_samples)} ({evaluated_on}), {mesh.size} device(s)")

    # ---- the loop
    summary: dict[str, Any] = {}
    step_fn: Step | None = None
    frozen = False
    watch = _Watch(workdir, train_samples, saved=max(checkpoints.steps(), default=0))
    waited, since, measured_from, warned = 0.0, time.perf_counter(), first, False
    progress = tqdm(total=config.train.steps, initial=first, desc="training", unit="step", smoothing=0.1, disable=not is_main())
    try:
        with StopRequest() as stop, progress as bar:
            for step in range(first + 1, config.train.steps + 1):
                asked = time.perf_counter()
                try:
                    batch = next(batches)
                except (UserError, RuntimeError) as error:
                    # A file is damaged or gone, or a worker has ended: keep the steps since the last checkpoint.
                    watch.check_all()
                    if isinstance(error, DamagedSample):
                        record_damaged(train_samples[error.index], workdir)
                    kept = ""
                    if jax.process_count() == 1:
                        if step - 1 not in (first, *checkpoints.steps()):
                            checkpoints.save(state, config, position)
                            checkpoints.wait()
                        if step - 1 in checkpoints.steps():
                            kept = f"; the state after step {step - 1} is saved in {workdir}, and the same command continues from it"
                    if isinstance(error, UserError):
                        raise UserError(f"{error}{kept}") from error
                    if (stopping := stop.at(step)) is not None:
                        raise _stopped(stopping, step - 1, workdir) from error
                    raise UserError(
                        f"the input ended at step {step}: {first_line(error)}; if a worker was killed for its memory, lower data.workers or"
                        f" data.threads, or set data.cache False{kept}"
                    ) from error
                waited += time.perf_counter() - asked
                indices = batch.pop("index")
                freeze = config.model.fast_deconv and 0 <= config.train.freeze_stats_after < step
                if step_fn is None or freeze != frozen:
                    if freeze:
                        say(f"step {step}: FastDeconv's statistics are frozen from here on")
                    step_fn, frozen = make_train_step(config, features, mesh, freeze_stats=freeze), freeze
                state, measurements = step_fn(state, shard_batch(batch, mesh))
                position = position._replace(images=position.images + config.train.batch)
                watch.add(step, measurements, indices)
                bar.update()
                stopping = stop.at(step) if step < config.train.steps else None
                evaluating = (step % config.train.eval_every == 0 and not stopping) or step == config.train.steps
                if step % config.train.log_every == 0 or evaluating:
                    watch.check_all()
                    values = {name: float(value) for name, value in jax.device_get(measurements).items()}
                    seconds = time.perf_counter() - since
                    values["images_per_second"] = (step - measured_from) * config.train.batch / seconds
                    values["waiting_for_data"] = waited / seconds
                    log.write(step, "train", values)
                    bar.set_postfix({name: f"{values[name]:.4f}" for name in ("l1", "cr") if name in values})
                    if values.get("offset_max", 0) > config.data.crop and not warned:
                        warned = True
                        say(
                            f"warning: at step {step} the deformable layers look {values['offset_max']:.3g} pixels away, out of the crop of"
                            f" {config.data.crop}; a lower train.offset_rate or train.learning_rate, or train.clip_norm, keeps them near"
                        )
                    waited, since, measured_from = 0.0, time.perf_counter(), step
                if evaluating:
                    summary, rows = _evaluate(restorer, state, eval_samples, count)
                    summary["data"] = evaluated_on
                    log.write_panel(step, rows)
                    log.write(step, "eval", summary)
                    say(
                        f"step {step}: PSNR {summary['psnr']:.2f} dB, SSIM {summary['ssim']:.4f}"
                        f" (hazy input {summary['input_psnr']:.2f} dB, {summary['input_ssim']:.4f})"
                    )
                if evaluating or stopping or step % config.train.save_every == 0:
                    watch.check_all()
                    if lock is not None:
                        lock.check()
                    checkpoints.save(state, config, position, summary["psnr"] if evaluating else -np.inf)
                    watch.saved = step
                    if evaluating:
                        since = time.perf_counter()  # evaluation is not training time
                if stopping:
                    raise _stopped(stopping, step, workdir)
    except BaseException as error:
        log.close()
        try:
            checkpoints.close()
        except UserError:
            if isinstance(error, Stopped):  # nothing was saved after all
                raise
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            raise UserError(f"this process cannot go on, or another one of this run has ended: {first_line(error)}") from error
        raise
    log.close()
    checkpoints.close()
    if not summary:  # the run was complete already
        summary = _evaluate(restorer, state, eval_samples, count)[0] | {"data": evaluated_on}
    return summary | {"step": int(state.step)}


def _stopped(by: signal.Signals, step: int, workdir: Path) -> Stopped:
    return Stopped(f"stopped by {by.name} after step {step}; the state is saved in {workdir}: the same command goes on", STATUS[by])


def _be_silent(_: str) -> None:
    pass


def _load_features(config: Config) -> VGG19Features | None:
    if not config.loss.cr:
        return None
    features = random_vgg19() if config.loss.features == "random" else load_vgg19(config.loss.features)
    if config.data.crop < (least := 2 ** (features.levels - 1)):
        raise UserError(f"data.crop (={config.data.crop}) must be at least {least} for the {features.levels} levels of the features")
    return features


def _load_initial(config: Config, say: Callable[[str], None]) -> AECRNet | None:
    if not config.train.init_from or has_checkpoint(config.train.workdir):
        return None
    try:
        model, _ = load_checkpoint_with_config(config.train.init_from)
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from error
    if model.config.width < config.model.width:
        say(f"widening the network of {config.train.init_from} from {model.config.width} to {config.model.width}")
        model = widen(model, config.model.width, rngs=nnx.Rngs(config.train.seed))
    for name, there, here in model_changes(model.config, config.model):
        raise UserError(f"train.init_from (={config.train.init_from}) is another network: {name} is {there} there and {here} here")
    return model


class _Watch:
    """Looks at every step's loss and norms, a little late, and stops the run at the first that is not finite."""

    def __init__(self, workdir: Path, samples: Sequence[Any], saved: int):
        self._workdir = workdir
        self.saved = saved  # step of the last checkpoint, 0 before the first
        self._samples = samples
        self._pending: deque[tuple[int, dict[str, jax.Array], np.ndarray]] = deque()

    def add(self, step: int, measurements: dict[str, jax.Array], indices: np.ndarray) -> None:
        self._pending.append((step, measurements, indices))
        if len(self._pending) > _LATE:
            self._check(*self._pending.popleft())

    def check_all(self) -> None:
        """Waits for the last step."""
        while self._pending:
            self._check(*self._pending.popleft())

    def _check(self, step: int, measurements: dict[str, jax.Array], indices: np.ndarray) -> None:
        names = ("total", "grad_norm", "param_norm")
        values = {name: float(value) for name, value in jax.device_get({name: measurements[name] for name in names}).items()}
        if np.isfinite(list(values.values())).all():
            return
        last = f"the last checkpoint is that of step {self.saved}" if self.saved else "no checkpoint was written yet"
        everyone = np.asarray(multihost_utils.process_allgather(indices)).ravel()
        files = ", ".join(self._samples[i].origin for i in everyone)
        raise UserError(
            f"step {step} is not finite: loss {values['total']:.4g}, gradient norm {values['grad_norm']:.4g}, parameter norm"
            f" {values['param_norm']:.4g}, largest offset {float(measurements.get('offset_max', 0)):.4g} pixels; {last} in"
            f" {self._workdir}. A lower train.learning_rate or train.offset_rate, or train.clip_norm, may help. Its images:"
            f" {files}"
        )


def _evaluate(restorer: Restorer, state: TrainState, samples: list[Any], count: int) -> tuple[dict[str, Any], list[list[np.ndarray]]]:
    """The summary over all processes, and this process's first images as rows of a panel."""
    restorer.set_arrays(state.eval_arrays)
    scores: list[Score] = []
    rows: list[list[np.ndarray]] = []
    share = len(range(jax.process_index(), count, jax.process_count()))
    images = eval_images(samples, limit=count, process_index=jax.process_index(), process_count=jax.process_count())
    for score, image, restored in evaluate(restorer, images, share):
        scores.append(score)
        if len(rows) < _PANEL_ROWS:
            add_row(rows, image, restored)
    return summarize(scores, count) | {"weights": "ema" if state.ema else "params"}, rows
