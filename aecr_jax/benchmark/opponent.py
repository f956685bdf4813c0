"""The same work in PyTorch, in a separate process, so that the threads and memory of the two libraries do not interfere."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from aecr_jax.benchmark.work import Work
from aecr_jax.errors import UserError

WORKER = Path(__file__).with_name("pytorch_worker.py")
# Work that takes milliseconds is repeated for this long, because the first run after a pause finds cold caches and sleeping threads.
TURN_S = 0.2

_DEVICES = {"cpu": "cpu", "gpu": "cuda"}


class Opponent:
    """A process that does some work in PyTorch in one variant, one turn per request. A context manager that ends the process on exit.

    Args:
      python: a Python interpreter with torch and torchvision.
      request: the fields of the work, and the variant.
      seconds: end the process after this time, even while it is working; None for no limit.

    Raises:
      UserError: the process ended; the message contains the last line of its standard error.
    """

    def __init__(self, python: str, request: dict[str, Any], seconds: float | None = None):
        self.how, self.python = request, python
        self._timer: threading.Timer | None = None
        self._late = False
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        # PyTorch's cache of compiled programs would hide the compile time.
        environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        try:
            self._process = subprocess.Popen([python, str(WORKER)], env=environment, text=True, **pipes)
        except OSError as error:
            self._errors.close()
            raise UserError(f"--torch-python (={python}) cannot be run: {error.strerror}") from error
        self.limit(seconds)
        answer = self._ask(request)
        self.first_s: float = answer["first_s"]
        self.version: str = answer["torch"]

    def __enter__(self) -> Opponent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def limit(self, seconds: float | None) -> None:
        """End the process after `seconds` from now, instead of at the earlier limit; None removes the limit."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if seconds is not None:
            self._timer = threading.Timer(max(0.0, seconds), self._end)
            self._timer.daemon = True
            self._timer.start()

    def _end(self) -> None:
        self._late = True
        self._process.kill()

    def run(self) -> float:
        """Repeat the work for at least `TURN_S` seconds and return the median time of a run, in seconds."""
        return self._ask({"do": "run", "turn_s": TURN_S})["seconds"]

    def peak(self) -> int | None:
        """Return the memory, in bytes, that one run needs beyond what the process already holds, or None if it cannot be measured."""
        return self._ask({"do": "peak"})["bytes"]

    def close(self) -> None:
        """Kill the process, even while it is working."""
        self.limit(None)
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
        except BaseException:  # for instance Ctrl-C while the process is working
            self.close()
            raise
        if not line:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            self.close()
            reason = "its time was over" if self._late else said[-1] if said else "without a word"
            raise UserError(f"PyTorch, run by --torch-python (={self.python}), ended: {reason}")
        return json.loads(line)


def check_opponent(platform: str) -> None:
    """Raise UserError if the PyTorch side does not support JAX's platform or its worker program is missing."""
    if platform not in _DEVICES:
        raise UserError(f"--against torch has no device for {platform}: it works on {' and '.join(_DEVICES)}")
    if not WORKER.exists():
        raise UserError(f"--against torch needs {WORKER}: run it in a clone of the repository")


def has_twin(network: str) -> bool:
    """Return whether the PyTorch side has the network."""
    return (WORKER.parent / "twins" / f"{network}.py").exists()


def fastest(python: str, work: Work, platform: str, seconds: float | None = None) -> tuple[Opponent, list[dict[str, Any]]]:
    """Run every combination of channels-last or not and compiled or not; return the fastest process, still running, and all times.

    With bfloat16, PyTorch uses autocast; its deformable convolution then runs in float32. With `seconds`, a combination that is
    still running when this time is over is ended and counts as failed.
    """
    end = None if seconds is None else time.perf_counter() + seconds
    best: Opponent | None = None
    best_s, tried = float("inf"), []
    error: UserError | None = None
    for compile_, channels_last in product((False, True), (False, True)):  # compilation last, because it takes minutes
        how = {"channels_last": channels_last, "compile": compile_, "autocast": work.dtype == "bfloat16"}
        settings = asdict(work.model_config())
        request = {**asdict(work), **how, "work": work.kind, "settings": settings, "device": _DEVICES[platform], "threads": count_cores()}
        try:
            opponent = Opponent(python, request, None if end is None else end - time.perf_counter())
            taken = min(opponent.run() for _ in range(3))
            opponent.limit(None)
        except UserError as failed:
            error = failed
            tried.append({**how, "error": str(failed)})
            continue
        tried.append({**how, "seconds": taken})
        slower: Opponent | None = opponent
        if taken < best_s:
            slower, best, best_s = best, opponent, taken
        if slower is not None:
            slower.close()
    if best is None:
        assert error is not None
        raise error
    return best, tried


def count_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
