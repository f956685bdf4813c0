"""Monitoring of a training run: values that are not finite, speed, the time of its start, and steps that stall."""

from __future__ import annotations

import contextlib
import faulthandler
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from aecr_jax.data.samples import Sample
from aecr_jax.errors import UserError

# Measurements are checked this many steps late, so that the devices do not have to wait for the check.
_LATE = 2
_WATCHED = ("total", "grad_norm", "param_norm")
# A step stalls if it takes this many times the median of recent steps, and at least this many seconds.
_STALLED, _STALLED_S = 20, 1.0
# Least and largest number of steps of which the median is taken.
_FEW, _MANY = 5, 101


class Meter:
    """Checks the loss and norms of every step, with a short delay, and measures speed.

    Args:
      workdir: the run's folder, for messages.
      samples: the training samples, for messages.
      step: number of steps taken before the run starts or resumes.
      saved: the step of the last checkpoint; 0 if there is none.
      peak: peak of all devices in FLOP/s, or None if it is not known.
    """

    def __init__(self, workdir: Path, samples: Sequence[Sample], step: int, saved: int, peak: float | None):
        self.saved, self._peak = saved, peak
        self._workdir, self._samples = workdir, samples
        self._pending: deque[tuple[int, dict[str, jax.Array], np.ndarray]] = deque()
        self._latest: dict[str, jax.Array] = {}
        self._step = self._since_step = step
        self.restart()

    def next(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the next batch, and count the time that this takes as waiting for data."""
        asked = time.perf_counter()
        try:
            return next(batches)
        finally:
            self._waited += time.perf_counter() - asked

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Check all values, and count the time in the `with` block, which saves the state after `step`, as saving.

        Raises:
          UserError: a value is not finite.
        """
        self.check()
        began = time.perf_counter()
        yield
        self._saved += time.perf_counter() - began
        self.saved = step

    def add(self, step: int, measurements: dict[str, jax.Array], indices: np.ndarray, macs: int) -> None:
        """Record the measurements of a step, the indices of its samples, and its number of multiply-adds.

        Raises:
          UserError: a value of an earlier step is not finite.
        """
        self._step, self._latest = step, measurements
        self._macs += macs
        self._pending.append((step, measurements, indices))
        if len(self._pending) > _LATE:
            self._check(*self._pending.popleft())

    def check(self) -> None:
        """Wait for the last step and check all values not yet checked; raise UserError if one is not finite."""
        while self._pending:
            self._check(*self._pending.popleft())

    def read(self, batch: int) -> dict[str, float]:
        """Return the last step's measurements, with the speed since the last `restart`, and restart the measurement of speed.

        The speed is `images_per_second`, `seconds_per_step`, `waiting_for_data` and `saving` (fractions of the time),
        `tflop_per_second` of all devices, and `model_flops_utilization`, the share of the devices' peak that this is, if the peak is known.
        A multiply-add counts as two operations.

        Args:
          batch: number of images per step.

        Raises:
          UserError: a value is not finite.
        """
        self.check()
        values = {name: float(value) for name, value in jax.device_get(self._latest).items()}
        seconds = time.perf_counter() - self._since
        steps = self._step - self._since_step
        values["images_per_second"] = steps * batch / seconds
        values["seconds_per_step"] = seconds / steps
        values["waiting_for_data"] = self._waited / seconds
        values["saving"] = self._saved / seconds
        values["tflop_per_second"] = 2 * self._macs / seconds / 1e12
        if self._peak:
            values["model_flops_utilization"] = 2 * self._macs / seconds / self._peak
        self.restart()
        return values

    def restart(self) -> None:
        """Start measuring speed anew, for example after an evaluation or a compilation, which do not count as training time."""
        self._waited = self._saved = 0.0
        self._since, self._since_step, self._macs = time.perf_counter(), self._step, 0

    def _check(self, step: int, measurements: dict[str, jax.Array], indices: np.ndarray) -> None:
        values = {name: float(value) for name, value in jax.device_get({name: measurements[name] for name in _WATCHED}).items()}
        if np.isfinite(list(values.values())).all():
            return
        last = f"the last checkpoint is that of step {self.saved}" if self.saved else "no checkpoint has been written yet"
        everyone = np.asarray(multihost_utils.process_allgather(indices)).ravel()
        files = ", ".join(self._samples[i].origin for i in everyone)
        offset = f", largest offset {float(measurements['offset_max']):.4g} pixels" if "offset_max" in measurements else ""
        raise UserError(
            f"step {step} is not finite: loss {values['total']:.4g}, gradient norm {values['grad_norm']:.4g}, parameter norm"
            f" {values['param_norm']:.4g}{offset}; {last} in {self._workdir}. A lower optim.learning_rate or optim.offset_rate,"
            f" or gradient clipping (optim.clip_norm), may help. Images of this step: {files}"
        )


# The parts of the losses, of which a run has some.
_SHOWN = ("l1", "l2", "smooth_l1", "mse", "perceptual", "distillation", "cr")


def describe(values: dict[str, Any]) -> str:
    """Return the measurements to show as progress, such as "l1 0.1234, cr 0.9876"."""
    return ", ".join(f"{name} {values[name]:.4f}" for name in _SHOWN if name in values)


def describe_speed(values: dict[str, float]) -> str:
    """Return the speed to show as progress, such as "12.3 images/s, 1.3 s/step, 0.987 TFLOP/s, 45.6% of peak"."""
    share = values.get("model_flops_utilization")
    speed = f"{values['images_per_second']:.1f} images/s, {values['seconds_per_step']:.3g} s/step, {values['tflop_per_second']:.3g} TFLOP/s"
    return speed if share is None else f"{speed}, {share:.1%} of peak"


class Stopwatch:
    """Divides the time since its creation among named parts."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        """Seconds of each part."""
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the previous call, or since the creation, to a part."""
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._since
        self._since = now


class StallWatch:
    """Writes the stacks of all threads to standard error, once, if a step takes 20 times the median of recent steps.

    A thread of `faulthandler`, which does not need Python's lock, writes them while the step still hangs. They do not go to a file, because
    the file system may be what hangs. Every process of a run watches its own steps.

    Call `begin` before each step and `end` after it, or `skip` if the step also does other work, such as compilation.

    Args:
      say: called with a message when the stalled step has ended.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._seconds: deque[float] = deque(maxlen=_MANY)
        self._since: float | None = None
        self._limit: float | None = None
        self._told = False

    def begin(self) -> None:
        """Start to watch a step."""
        self._since = time.perf_counter()
        if len(self._seconds) >= _FEW and not self._told and sys.__stderr__ is not None:
            self._limit = max(_STALLED_S, _STALLED * statistics.median(self._seconds))
            faulthandler.dump_traceback_later(self._limit, file=sys.__stderr__)

    def end(self, step: int) -> None:
        """Stop watching, and let the step count in the median of later ones."""
        since, limit = self._since, self._limit
        self.skip()
        if since is None:
            return
        seconds = time.perf_counter() - since
        if limit is not None and seconds > limit:
            self._told = True
            median = statistics.median(self._seconds)
            self._say(f"warning: step {step} took {seconds:.1f} s, the median {median:.2g} s; standard error has the stacks of all threads")
        self._seconds.append(seconds)

    def skip(self) -> None:
        """Stop watching the present step."""
        if self._limit is not None:
            faulthandler.cancel_dump_traceback_later()
        self._since = self._limit = None
