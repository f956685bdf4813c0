"""The training run: opening its inputs, resuming, the training loop, evaluation."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from aecr_jax.compilation import share_cache
from aecr_jax.data.fingerprint import check_same_data, fingerprint, read_fingerprint, record_damaged
from aecr_jax.data.pipeline import cache_bytes, check_samples, train_batches
from aecr_jax.data.reader import DamagedSample, eval_images
from aecr_jax.data.samples import Sample
from aecr_jax.data.sources import split_samples
from aecr_jax.errors import Stopped, UserError, first_line
from aecr_jax.files import make_folder
from aecr_jax.inference.evaluate import add_row, score_images
from aecr_jax.inference.restore import Restorer
from aecr_jax.inference.scores import Score, summarize
from aecr_jax.inference.weights import check_folder_name, refuse_run
from aecr_jax.losses.loss import Loss
from aecr_jax.networks.network import Network
from aecr_jax.networks.registry import abstract_network, find_network, has_parameters
from aecr_jax.processes import STATUS, StopRequest, check_shared, count_hosts, initialize, is_main, no_bar
from aecr_jax.training.checkpoint import Checkpoints, Position
from aecr_jax.training.config import Config
from aecr_jax.training.flops import peak_flops
from aecr_jax.training.initial import load_initial, make_loss
from aecr_jax.training.lock import FolderLock
from aecr_jax.training.mesh import check_batch, make_mesh, replicate, shard_batch
from aecr_jax.training.meter import Meter, StallWatch, Stopwatch, describe, describe_speed
from aecr_jax.training.profile import Tracer, profiler_server
from aecr_jax.training.runlog import CONFIG, RunLog
from aecr_jax.training.step import Batch, Step, compile_train_step, init_state, state_to_model

_PANEL_ROWS = 3
Say = Callable[[str], None]


def train(config: Config, *, say: Say = tqdm.write) -> dict[str, Any]:
    """Train until step `optim.steps`; if the work directory already holds the run, it resumes from the last checkpoint.

    These are written to `run.workdir`: `config.json`, `versions.json`, `data.json`, `metrics.jsonl`, `panels/*.png` (hazy | restored |
    clear), `checkpoints/`, with `run.profile` also `profile/`, and by several processes `compiled/`. A run resumes as follows:

    1. Parameters, their average, running statistics, optimizer state and step are restored bit for bit from the last intact checkpoint.
    2. The order of the images, the crops and the haze follow from `run.seed`; the checkpoint records how many images have been read.
    3. Nothing else is random: the initial values, which also come from `run.seed`, are replaced by those of the checkpoint.

    Args:
      config: the run's settings.
      say: called with each progress message.

    Returns:
      The last evaluation's summary: `psnr`, `ssim`, `input_psnr`, `input_ssim`, `images`, `data` (what was evaluated on), `weights`
      (the parameters or their moving average), `step`.

    Raises:
      UserError: a setting, a file or a folder is wrong, another run holds the folder, or the loss is not finite.
      Stopped: the run received SIGTERM or Ctrl-C; its state has been saved.
    """
    config.validate()
    if not has_parameters(config.model):
        raise UserError(f"model.name (={config.model.NAME}) has no parameters to train; eval and dehaze take it with --checkpoint")
    check_folder_name(config.run.workdir)
    refuse_run(config.run.workdir)
    watch = Stopwatch()
    initialize(config.run.coordinator, config.run.processes, config.run.process_id)
    if not is_main():
        say = _be_silent
    watch.lap("devices")
    with profiler_server(config.run.profiler_port):
        inputs = _open_inputs(config, say)
        watch.lap("data")
        workdir = make_folder(config.run.workdir)
        if jax.process_count() > 1 and (advice := share_cache(workdir)):
            say(advice)
        # Only process 0 writes files, so only it holds the lock on the folder.
        holding = FolderLock(workdir, say) if is_main() else contextlib.nullcontext()
        with holding as lock, _Run(config, inputs, workdir, lock, say, watch) as run:
            run.restore()
            run.loop()
            return run.result()


class _Inputs(NamedTuple):
    """The inputs of a run, opened before anything is written."""

    mesh: Mesh
    loss: Loss
    train: list[Sample]
    evaluation: list[Sample]
    evaluated_on: str
    eval_count: int  # how many images of `evaluation` to score
    initial: Network | None


def _open_inputs(config: Config, say: Say) -> _Inputs:
    """Open data, features and initial weights, so that errors in them are found before anything is written."""
    mesh = make_mesh()
    config.model.check_devices(mesh.devices.flat[0].platform, mesh.size)
    check_batch(config.optim.batch, config.optim.accumulate, mesh)
    loss = make_loss(config)
    train_samples, eval_samples, evaluated_on = split_samples(config.data)
    if not eval_samples:
        raise UserError("there are no evaluation data: set data.eval or data.holdout")
    if config.data.cache:
        say(f"keeping {len(train_samples)} images in memory: about {cache_bytes(train_samples, config.data) / 1e9:.1f} GB")
    check_samples(train_samples, crop=config.data.crop_size, batch=config.optim.batch, process_count=jax.process_count())
    count = min(config.run.eval_images, len(eval_samples))
    for _ in eval_images(eval_samples, limit=count, **_share()):  # read each once now: a damaged one should not stop the first evaluation
        pass
    return _Inputs(mesh, loss, train_samples, eval_samples, evaluated_on, count, load_initial(config, say))


class _Run:
    """A run that holds the lock on its folder: call `restore`, `loop` and `result`. Leaving the `with` block finishes all writing."""

    def __init__(self, config: Config, inputs: _Inputs, workdir: Path, lock: FolderLock | None, say: Say, watch: Stopwatch):
        self.config, self.inputs, self.workdir, self.lock, self.say, self.watch = config, inputs, workdir, lock, say, watch
        self.network = find_network(config.model.NAME)
        self.has_statistics = abstract_network(config.model).freeze_statistics()
        self.checkpoints = Checkpoints(workdir, *([lock.check] if lock is not None else []))
        self.log: RunLog | None = None
        self.tracer, self.stalls = Tracer(config.run.profiled, workdir), StallWatch(say)
        self.summary: dict[str, Any] = {}
        self._compiled: tuple[tuple[bool, bool], Step, int] | None = None
        self._warned = False

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.stalls.skip()
        if self.log is not None:
            self.log.close()
        try:
            with contextlib.closing(self.checkpoints):
                self.tracer.close()
        except UserError:
            if error is None or isinstance(error, Stopped):  # the state was not saved after all
                raise
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            raise UserError(f"this process cannot continue, or another one of this run has ended: {first_line(error)}") from error

    # ---- set-up

    def restore(self) -> None:
        """Restore the last checkpoint or take the initial values; then open the log, and the training data at the right position."""
        config, samples, workdir = self.config, self.inputs.train, self.workdir
        self.watch.lap("restore")
        data = fingerprint(samples)
        self.watch.lap("data")
        check_data = functools.partial(check_same_data, now=data, samples=samples, workdir=workdir)
        self.state = replicate(init_state(config, self.inputs.initial), self.inputs.mesh)
        self.position = Position(0, str(data))
        restored = self.checkpoints.restore(config, self.state, self.inputs.mesh, check_data)
        if restored is not None:
            self.state, self.position = restored.state, restored.position
            self.say(f"continuing from step {int(self.state.step)} in {workdir}")
            for change in restored.changes:
                self.say(f"setting changed since then: {change}")
        elif config.run.init_from:
            self.say(f"beginning with the parameters of {config.run.init_from}")
        if is_main() and (restored is None or read_fingerprint(workdir) is None):
            data.write(workdir)
        self.first = int(self.state.step)
        self.watch.lap("restore")
        self.batches = train_batches(
            samples,
            config.data,
            batch=config.optim.batch,
            seed=config.run.seed,
            start=self.position.images,
            haze=config.haze,
            **config.loss.needs,
            **_share(),
        )
        self.watch.lap("data")
        hosts = count_hosts()
        peak = peak_flops(self.inputs.mesh, hosts, config.model.dtype) if is_main() else None
        self.watch.lap("devices")
        self.log = RunLog(workdir, config, self.first, hosts)
        check_shared(workdir / CONFIG)
        self.restorer = Restorer(state_to_model(config, self.state))
        self.meter = Meter(workdir, samples, self.first, saved=max(self.checkpoints.steps(), default=0), peak=peak)
        evaluated = f"{len(self.inputs.evaluation)} ({self.inputs.evaluated_on})"
        self.say(f"training on {len(samples)} images, evaluating on {evaluated}, {self.inputs.mesh.size} device(s)")

    # ---- the loop

    def loop(self) -> None:
        """Train to the last step; log, evaluate and save when due.

        Raises:
          UserError: the input fails, a value is not finite, or something cannot be written.
          Stopped: a signal asked the run to stop.
        """
        optim, run, meter = self.config.optim, self.config.run, self.meter
        progress = tqdm(total=optim.steps, initial=self.first, desc="training", unit="step", smoothing=0.1, disable=no_bar())
        with StopRequest() as stop, progress as bar:
            for step in range(self.first + 1, optim.steps + 1):
                self.stalls.begin()
                arrays = self._next_batch(step, stop)
                indices = arrays.pop("index")
                batch = shard_batch(arrays, self.inputs.mesh)
                take_step, macs = self._compile(step, batch)
                if self.tracer.begin(step, self.state):
                    self.stalls.skip()
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    self.state, measurements = take_step(self.state, batch)
                self.position = self.position._replace(images=self.position.images + optim.batch)
                meter.add(step, measurements, indices, macs)
                self.checkpoints.check_written()
                if step == self.first + 1:
                    self._log_start()
                bar.update()
                last, stopping = step == optim.steps, stop.at(step) if step < optim.steps else None
                evaluating = last or (step % run.eval_every == 0 and not stopping)
                if evaluating or step % run.log_every == 0:
                    bar.set_postfix_str(self._write_log(step))
                self.stalls.end(step)
                if written := self.tracer.end(step, self.state):
                    self.say(written)
                    meter.restart()
                if evaluating:
                    try:
                        self._evaluate(step)
                    except UserError as error:  # for example, a whole image does not fit into memory
                        raise UserError(f"{error}{self._keep(step)}") from error
                if evaluating or stopping or step % run.save_every == 0:
                    self._save(step, self.summary["psnr"] if evaluating else -np.inf)
                if stopping:
                    self.checkpoints.wait()  # here, where a second signal does not end the process
                    raise _stopped(stopping, step, self.workdir)
            self.checkpoints.wait()

    def result(self) -> dict[str, Any]:
        """Return the last evaluation's summary; a run that was already complete is evaluated first."""
        if not self.summary:
            step, (self.summary, rows) = int(self.state.step), self._score()
            assert self.log is not None
            if step not in self.log.evaluated:  # the evaluation after the last step had failed
                self._log_evaluation(step, rows)
        return self.summary | {"step": int(self.state.step)}

    # ---- parts of a step

    def _next_batch(self, step: int, stop: StopRequest) -> dict[str, np.ndarray]:
        try:
            return self.meter.next(self.batches)
        except (UserError, RuntimeError) as error:
            # A file is damaged or missing, or a worker has ended: save the steps taken since the last checkpoint.
            self.meter.check()
            if isinstance(error, DamagedSample):
                record_damaged(self.inputs.train[error.index], self.workdir)
            kept = self._keep(step - 1)
            if isinstance(error, UserError):
                raise UserError(f"{error}{kept}") from error
            if (stopping := stop.at(step)) is not None:
                if kept:
                    raise _stopped(stopping, step - 1, self.workdir) from error
                lost = f"stopped by {stopping.name} after step {step - 1}; the steps since the last checkpoint are lost"
                raise Stopped(lost, STATUS[stopping]) from error
            raise UserError(
                f"the input ended at step {step}: {first_line(error)}; if a worker was killed because memory ran out, reduce"
                f" data.workers or data.threads, or set data.cache to False{kept}"
            ) from error

    def _keep(self, step: int) -> str:
        """Save the state after `step`, unless it is already saved or several processes would be needed; return the end of a message."""
        if jax.process_count() > 1:
            return ""
        self.checkpoints.wait()
        if step not in (self.first, *self.checkpoints.steps()):
            self.checkpoints.save(self.state, self.config, self.position)
            self.checkpoints.wait()
        if step not in self.checkpoints.steps():
            return ""
        return f"; the state after step {step} is saved in {self.workdir}, and the same command resumes from it"

    def _compile(self, step: int, batch: Batch) -> tuple[Step, int]:
        """Return the compiled step, which depends on `optim.freeze_stats_after` and `loss.cr_after`, and its number of multiply-adds."""
        frozen = self.has_statistics and 0 <= self.config.optim.freeze_stats_after < step
        regularized = not self.config.loss.cr or self.config.loss.cr_after < step
        if self._compiled is None or (frozen, regularized) != self._compiled[0]:
            before = self._compiled[0] if self._compiled else (False, True)
            if frozen and not before[0]:
                self.say(f"step {step}: the network's running statistics are frozen from here on")
            if regularized and not before[1]:
                self.say(f"step {step}: contrastive regularization begins")
            self.stalls.skip()
            self.watch.lap("data")
            loss = self.inputs.loss if regularized else make_loss(self.config, regularize=False)
            compiled = compile_train_step(self.config, loss, self.inputs.mesh, self.state, batch, freeze_stats=frozen)
            self._compiled = (frozen, regularized), *compiled
            self.watch.lap("compile")
            self.meter.restart()
        return self._compiled[1:]

    def _log_start(self) -> None:
        """Log how long it took from the start to the end of the first step, by part."""
        assert self.log is not None
        jax.block_until_ready(self.state)
        self.watch.lap("first_step")
        total = sum(self.watch.parts.values())
        parts = {f"{part}_seconds": seconds for part, seconds in self.watch.parts.items()}
        self.log.write(self.first, "start", {**parts, "total_seconds": total})
        self.say(
            f"first step after {total:.1f} s: " + ", ".join(f"{name.replace('_', ' ')} {s:.1f} s" for name, s in self.watch.parts.items())
        )

    def _write_log(self, step: int) -> str:
        assert self.log is not None
        values = self.meter.read(self.config.optim.batch)
        self.log.write(step, "train", values)
        if not self._warned and (warning := self.network.explain(values, min(self.config.data.crop_size))):
            self._warned = True
            self.say(f"warning: at step {step} {warning}")
        if not sys.stderr.isatty():  # where there is no progress bar
            self.say(f"step {step} of {self.config.optim.steps}: {describe(values)}, {describe_speed(values)}")
        return describe(values)

    def _evaluate(self, step: int) -> None:
        self.summary, rows = self._score()
        self._log_evaluation(step, rows)
        self.meter.restart()

    def _log_evaluation(self, step: int, rows: list[list[np.ndarray]]) -> None:
        assert self.log is not None
        self.log.write_panel(step, rows)
        self.log.write(step, "eval", self.summary)
        self.say(
            f"step {step}: PSNR {self.summary['psnr']:.2f} dB, SSIM {self.summary['ssim']:.4f}"
            f" (hazy input {self.summary['input_psnr']:.2f} dB, {self.summary['input_ssim']:.4f})"
        )

    def _score(self) -> tuple[dict[str, Any], list[list[np.ndarray]]]:
        """Return the summary over all processes, and the first images of this process as rows of a panel."""
        self.restorer.set_arrays(self.state.eval_arrays)
        scores: list[Score] = []
        rows: list[list[np.ndarray]] = []
        count = self.inputs.eval_count
        share = len(range(jax.process_index(), count, jax.process_count()))
        images = eval_images(self.inputs.evaluation, limit=count, **_share())
        for score, image, restored in score_images(self.restorer, images, share):
            scores.append(score)
            if len(rows) < _PANEL_ROWS:
                add_row(rows, image, restored)
        about = {"weights": "ema" if self.state.ema else "params", "data": self.inputs.evaluated_on}
        return summarize(scores, count) | about, rows

    def _save(self, step: int, psnr: float) -> None:
        with self.meter.saving(step):
            self.checkpoints.save(self.state, self.config, self.position, psnr)


class _Share(TypedDict):
    """The arguments that select the share of this process in the evaluation images."""

    process_index: int
    process_count: int


def _share() -> _Share:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def _stopped(by: signal.Signals, step: int, workdir: Path) -> Stopped:
    message = f"stopped by {by.name} after step {step}; the state is saved in {workdir}, and the same command resumes the run"
    return Stopped(message, STATUS[by])


def _be_silent(_: str) -> None:
    pass
