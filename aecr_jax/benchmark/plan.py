"""The schedule of a run that must end within a given time: steps, checkpoints, evaluations, and the commands to type."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aecr_jax.benchmark.work import Work
from aecr_jax.errors import MissingFileError, UserError, first_line
from aecr_jax.networks.macs import network_macs
from aecr_jax.training.config import Config, LossConfig

# Seconds, each rounded up from what runs took on CPUs: imports, devices and data; a checkpoint.
_OPEN_S, _SAVE_S = 30.0, 1.0
# Compilation of the step if no benchmark has measured it, and of the forward pass for evaluation.
_COMPILE_S, _COMPILE_EVALUATION_S = 90.0, 30.0
# Height and width of the images that are evaluated (RESIDE, NYU Depth v2), and the time to read and to score one.
_IMAGE, _SCORE_S = (480, 640), 0.05
# A machine that is taken away costs at most the work of this time.
_SAVE_EVERY_S = 120.0
_EVALUATIONS = 4
# The share of the time that stays free, because steps may take longer than measured.
_RESERVE = 0.05
# A schedule of fewer steps is not worth its start.
_LEAST = 100
# The largest value of optim.steps.
_MOST = 2**31 - 1
# A year, and far less than any step takes: what is beyond these is a mistake, and may not be a number of steps at all.
_MOST_MINUTES, _LEAST_MS = 525_600, 0.001


@dataclass(frozen=True)
class StepTime:
    """The time of a training step, in seconds, and that of its compilation and first run."""

    seconds: float
    compile_s: float = _COMPILE_S
    source: str = "as given"


@dataclass(frozen=True)
class Plan:
    """A run that fits into its time. Times are in seconds."""

    steps: int
    save_every: int
    eval_every: int
    training_s: float
    start_s: float
    """From the start to the first step, with compilation."""
    evaluation_s: float
    """All evaluations together."""
    saving_s: float
    macs: int
    """Multiply-adds of the whole run: three times those of the network's forward pass, without the features of the loss."""


def read_step_time(path: str | Path, config: Config) -> StepTime:
    """Find the step of a config among the figures of `benchmark accelerator`.

    Raises:
      UserError: the file cannot be read, or the same step was not measured.
    """
    try:
        parts = json.loads(Path(path).read_text())["parts"]
        rows = [row for part in ("train", "sweep") for row in parts.get(part, {}).get("rows", []) if "jax" in row]
        fields = {field.name for field in dataclasses.fields(Work)}
        source = Path(path).name
        found = [
            (Work(**{name: row[name] for name in fields}), StepTime(float(row["jax"]["median_s"]), float(row["jax"]["first_s"]), source))
            for row in rows
        ]
        if wrong := [time for _, time in found if not (0 < time.seconds < math.inf and 0 < time.compile_s < math.inf)]:
            raise ValueError(f"it has a step of {wrong[0].seconds} s that was compiled in {wrong[0].compile_s} s")
    except FileNotFoundError as error:
        raise MissingFileError(f"--benchmark (={path}) does not exist: benchmark accelerator writes it") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--benchmark (={path}) is no file of benchmark accelerator: {first_line(error)}") from error
    usual = dataclasses.replace(config.loss, cr=LossConfig.cr, features=LossConfig.features) == LossConfig()
    for work, time in found:
        same = (work.batch, (work.size, work.size), work.cr) == (config.optim.batch, config.data.crop_size, bool(config.loss.cr))
        if same and usual and config.optim.accumulate == 1 and work.model_config() == config.model:
            return time
    measured = ", ".join(dict.fromkeys(str(work) for work, _ in found)) or "no step"
    raise UserError(f"--benchmark (={path}) has no step of this config, only {measured}; give its time with --step-ms")


def make_plan(config: Config, step: StepTime, minutes: float) -> Plan:
    """Return the longest run of a config that fits into `minutes`, with its start, four evaluations and the checkpoints.

    Raises:
      UserError: the time is too short, or a setting needs more steps than it allows.
    """
    (height, width), batch = config.data.crop_size, config.optim.batch
    forward = network_macs(config.model, height, width)
    # The rate of the whole step is too low for the network alone, because it includes the loss; the evaluation will be faster.
    image_s = network_macs(config.model, *_IMAGE) * step.seconds / (3 * forward * batch) + _SCORE_S
    images = min(config.run.eval_images, config.data.holdout) if config.data.holdout and not config.data.eval else config.run.eval_images
    start_s, evaluation_s = _OPEN_S + step.compile_s, _COMPILE_EVALUATION_S + _EVALUATIONS * images * image_s
    fixed = start_s + evaluation_s + (_EVALUATIONS + 1) * _SAVE_S
    save_every = max(1, round(_SAVE_EVERY_S / step.seconds))
    step_s = step.seconds + _SAVE_S / save_every
    left = 60 * minutes * (1 - _RESERVE) - fixed
    steps = min(math.floor(left / step_s), _MOST)
    if steps < _LEAST:
        least = (fixed + _LEAST * step_s) / (1 - _RESERVE) / 60
        raise UserError(
            f"--minutes (={minutes:g}) must be at least {math.ceil(10 * least) / 10:g}: start, evaluations and the last checkpoint take"
            f" {fixed:.0f} s, and {_LEAST} steps of {1e3 * step.seconds:.3g} ms must fit beside them"
        )
    for name, value in (("optim.warmup", config.optim.warmup), ("loss.cr_after", config.loss.cr_after if config.loss.cr else 0)):
        if value >= steps:
            raise UserError(f"{name} (={value}) must be less than the {steps} steps that --minutes (={minutes:g}) allows")
    return Plan(
        steps=steps,
        save_every=min(save_every, steps),
        eval_every=math.ceil(steps / _EVALUATIONS),
        training_s=steps * step.seconds,
        start_s=start_s,
        evaluation_s=evaluation_s,
        saving_s=steps // save_every * _SAVE_S + (_EVALUATIONS + 1) * _SAVE_S,
        macs=3 * forward * batch * steps,
    )


def describe_plan(plan: Plan, config: Config, step: StepTime, minutes: float, file: str, overrides: Sequence[str]) -> str:
    """Return the plan in words, and the commands for the run and for one that continues from its weights.

    Args:
      plan: what `make_plan` returned.
      config: the config with `overrides` applied.
      step: the time of a step.
      minutes: the time that the plan fills.
      file: the config file, for the commands.
      overrides: the arguments that changed the config, for the commands.
    """
    optim, workdir = config.optim, config.run.workdir
    size = "x".join(map(str, config.data.crop_size))
    used = plan.start_s + plan.training_s + plan.evaluation_s + plan.saving_s
    common = ["python", "train.py", "--config", file, *overrides]
    schedule = ["--optim.schedule", "cosine", "--optim.steps", str(plan.steps)]
    schedule += ["--run.save_every", str(plan.save_every), "--run.eval_every", str(plan.eval_every)]
    rates = [f"{rate:.6g}" for rate in (optim.learning_rate, optim.learning_rate / 2)]
    continued = ["--run.workdir", f"{workdir}_2", "--run.init_from", workdir, "--optim.learning_rate", rates[1]]
    return "\n".join(
        [
            f"a step of {optim.batch} x {size}: {1e3 * step.seconds:.4g} ms ({step.source})",
            f"{minutes:g} minutes: start and compilation {plan.start_s:.0f} s, training {plan.training_s:.0f} s, {_EVALUATIONS} evaluations"
            f" {plan.evaluation_s:.0f} s, checkpoints {plan.saving_s:.0f} s, reserve {60 * minutes - used:.0f} s",
            f"schedule: {plan.steps} steps, one complete cosine from {rates[0]} to 0",
            f"a checkpoint every {plan.save_every} steps ({plan.save_every * step.seconds:.0f} s), an evaluation every {plan.eval_every}",
            f"multiplications: {plan.macs / 1e15:.3g} PMAC in all (three times the network's forward pass)",
            "",
            "the run:",
            shlex.join([*common, *schedule, "--optim.learning_rate", rates[0]]),
            "a later run that continues from its weights, at half the peak learning rate:",
            shlex.join([*common, *schedule, *continued]),
        ]
    )


def plan_run(file: str, overrides: Sequence[str], config: Config, *, minutes: float, benchmark: str | None, step_ms: float | None) -> str:
    """Return the text of the command `plan`; one of `benchmark` and `step_ms` must be given.

    Raises:
      UserError: not exactly one of them is given, a number is not in its range, or the run cannot be planned.
    """
    if (benchmark is None) == (step_ms is None):
        raise UserError("plan needs either --benchmark FILE, which benchmark accelerator writes, or --step-ms MS")
    if not 0 < minutes <= _MOST_MINUTES:
        raise UserError(f"--minutes (={minutes:g}) must be positive and at most {_MOST_MINUTES}")
    if step_ms is not None and not _LEAST_MS <= step_ms < math.inf:
        raise UserError(f"--step-ms (={step_ms:g}) must be finite and at least {_LEAST_MS}")
    step = read_step_time(benchmark, config) if benchmark is not None else StepTime((step_ms or 0) / 1e3)
    return describe_plan(make_plan(config, step, minutes), config, step, minutes, file, overrides)
