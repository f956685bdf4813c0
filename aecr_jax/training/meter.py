"""Monitoring of a training run: values that are not finite, speed, and the time spent waiting for data."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
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


class Meter:
    """Checks the loss and norms of every step, with a short delay, and measures speed.

    Args:
      workdir: the run's folder, for messages.
      samples: the training samples, for messages.
      step: number of steps taken before the run starts or resumes.
      saved: the step of the last checkpoint; 0 if there is none.
    """

    def __init__(self, workdir: Path, samples: Sequence[Sample], step: int, saved: int):
        self.saved = saved
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

    def add(self, step: int, measurements: dict[str, jax.Array], indices: np.ndarray) -> None:
        """Record the measurements of a step and the indices of its samples.

        Raises:
          UserError: a value of an earlier step is not finite.
        """
        self._step, self._latest = step, measurements
        self._pending.append((step, measurements, indices))
        if len(self._pending) > _LATE:
            self._check(*self._pending.popleft())

    def check(self) -> None:
        """Wait for the last step and check all values not yet checked; raise UserError if one is not finite."""
        while self._pending:
            self._check(*self._pending.popleft())

    def read(self, batch: int) -> dict[str, float]:
        """Return the last step's measurements, with `images_per_second` and `waiting_for_data` (a fraction) since the last `restart`.

        This restarts the measurement of speed.

        Args:
          batch: number of images per step.

        Raises:
          UserError: a value is not finite.
        """
        self.check()
        values = {name: float(value) for name, value in jax.device_get(self._latest).items()}
        seconds = time.perf_counter() - self._since
        values["images_per_second"] = (self._step - self._since_step) * batch / seconds
        values["waiting_for_data"] = self._waited / seconds
        self.restart()
        return values

    def restart(self) -> None:
        """Start measuring speed anew, for example after an evaluation, which does not count as training time."""
        self._waited, self._since, self._since_step = 0.0, time.perf_counter(), self._step

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
