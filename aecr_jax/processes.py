"""Runs of several processes, and signals that ask a run to stop."""

from __future__ import annotations

import hashlib
import platform
import signal
from pathlib import Path
from types import FrameType, TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

from aecr_jax.errors import UserError, first_line

# Exit status of a run that was stopped. 75 is EX_TEMPFAIL in sysexits.h: the run resumes when the same command is called again.
STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130}


def initialize(coordinator: str, processes: int = 1, process_id: int = 0) -> None:
    """Join the other processes of a run; call this before anything else asks JAX for devices.

    Args:
      coordinator: HOST:PORT of process 0; "auto" where the cluster provides it; empty for a run of one process, which has nothing to join.
      processes: number of processes, for HOST:PORT.
      process_id: number of this process, from 0, for HOST:PORT.

    Raises:
      UserError: the other processes cannot be found.
    """
    if not coordinator or jax.distributed.is_initialized():
        return
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"run.coordinator (={coordinator}): the processes cannot connect to each other: {first_line(error)}") from error


def is_main() -> bool:
    """Return whether this is process 0, the only one that writes files and prints progress."""
    return jax.process_index() == 0


def no_bar(enough: bool = True) -> bool | None:
    """Return the value for `tqdm(disable=...)`: only process 0 shows a progress bar, and only if it has a terminal and `enough` to do."""
    return None if is_main() and enough else True


def gather(rows: np.ndarray, count: int) -> np.ndarray:
    """Return the rows of all processes, `[count, K]`, in their original order.

    Args:
      rows: the rows of this process, `[share, K]`: those with the indices `range(process, count, processes)`.
      count: number of rows of all processes together.
    """
    processes = jax.process_count()
    if processes == 1:
        return rows
    share = -(-count // processes)
    padded = np.full((share, *rows.shape[1:]), np.nan, np.float32)
    padded[: len(rows)] = rows
    everyone = multihost_utils.process_allgather(padded)  # [processes, share, K]
    return np.swapaxes(np.asarray(everyone), 0, 1).reshape(-1, *rows.shape[1:])[:count]


def count_hosts() -> int:
    """Return the number of machines on which the processes of a run are, by their names. Every process must call this."""
    if jax.process_count() == 1:
        return 1
    digest = hashlib.sha256(platform.node().encode()).digest()[:8]
    return len(np.unique(multihost_utils.process_allgather(np.frombuffer(digest, np.uint32)), axis=0))


def check_shared(path: Path) -> None:
    """Raise UserError in a process that does not see the file `path`, which process 0 has just written."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(str(path))
        if not path.is_file():
            raise UserError(
                f"process {jax.process_index()} cannot find {path}: run.workdir must be a folder that all processes share, or gs://BUCKET/NAME"
            )


class StopRequest:
    """A context manager that records SIGTERM (preemption) and the first Ctrl-C; only a second Ctrl-C interrupts the program.

    In a run of several processes, all stop after the same step if one of them receives a signal: those that received Ctrl-C report SIGINT,
    and the others SIGTERM.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        # In a run of several processes, JAX itself handles SIGTERM, so that all processes stop after the same step.
        for number in STATUS if jax.process_count() == 1 else [signal.SIGINT]:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # only the main thread can set signal handlers
                return self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)  # JAX tells the other processes

    def at(self, step: int) -> signal.Signals | None:
        """Return the signal that asks the run to stop after `step`, or None; all processes of a run get the same answer."""
        if jax.process_count() == 1:
            return self._signal
        return (self._signal or signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else None
