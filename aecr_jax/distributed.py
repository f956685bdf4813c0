"""Several processes as one run, and what the machine asks of a run: to stop."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

from aecr_jax.config import TrainConfig
from aecr_jax.errors import UserError, first_line

# What a run that was stopped exits with. 75 is EX_TEMPFAIL of sysexits.h: the same command, called again, goes on.
STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130}


def initialize(config: TrainConfig) -> None:
    """Joins the other processes, if the settings say that there are some; before anything else asks JAX for devices.

    Raises:
      UserError: the others cannot be found.
    """
    if not config.coordinator or jax.distributed.is_initialized():
        return
    try:
        if config.coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(config.coordinator, config.processes, config.process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"train.coordinator (={config.coordinator}): the processes do not find each other: {first_line(error)}") from error


def is_main() -> bool:
    """Whether this is the process that writes logs and pictures and speaks."""
    return jax.process_index() == 0


def gather(rows: np.ndarray, count: int) -> np.ndarray:
    """The rows `[share, K]` of all processes, in the order in which `rows[process::processes]` were dealt out: `[count, K]`."""
    processes = jax.process_count()
    if processes == 1:
        return rows
    share = -(-count // processes)
    padded = np.full((share, *rows.shape[1:]), np.nan, np.float32)
    padded[: len(rows)] = rows
    everyone = multihost_utils.process_allgather(padded)  # [processes, share, K]
    return np.swapaxes(np.asarray(everyone), 0, 1).reshape(-1, *rows.shape[1:])[:count]


def check_shared(path: Path) -> None:
    """Raises UserError in a process that does not see the file `path`, which process 0 has just written."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(str(path))
        if not path.is_file():
            raise UserError(f"process {jax.process_index()} does not see {path}: train.workdir must be a folder that all processes share")


class StopRequest:
    """Inside `with`, SIGTERM (preemption) and the first Ctrl-C are noted instead of obeyed; a second Ctrl-C is obeyed.

    Of several processes, SIGTERM to any is noted by all; Ctrl-C ends the process.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if jax.process_count() > 1:  # JAX itself listens for SIGTERM there, to agree with the others on a step
            return self
        for number in STATUS:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread, which has the signals
                return self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)

    def at(self, step: int) -> signal.Signals | None:
        """The signal to stop for after `step`; in a run of several processes all of them get the same answer."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return self._signal
