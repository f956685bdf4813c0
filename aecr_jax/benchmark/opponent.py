"""The same work in PyTorch, in a process of its own: no library's threads or memory are in the other's way."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from aecr_jax.benchmark.work import Work
from aecr_jax.errors import UserError

WORKER = Path(__file__).parents[2] / "benchmarks" / "pytorch_worker.py"


class Opponent:
    """One way to do some work in PyTorch: a process that does it once when asked.

    Args:
      python: an interpreter with torch and torchvision.
      request: the fields of the work, and how to do it.

    Raises:
      UserError: the process ends, with its last line.
    """

    def __init__(self, python: str, request: dict[str, Any]):
        self.how, self.python = request, python
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(
                [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )
        except OSError as error:
            self._errors.close()
            raise UserError(f"--torch-python (={python}) cannot be run: {error.strerror}") from error
        answer = self._ask(request)
        self.first_s: float = answer["first_s"]
        self.version: str = answer["torch"]

    def run(self) -> float:
        """Seconds of one run."""
        return self._ask({"do": "run"})["seconds"]

    def peak(self) -> int:
        """Bytes that one run needs above what the process holds."""
        return self._ask({"do": "peak"})["bytes"]

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()
        self._errors.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            self.close()
            raise UserError(f"PyTorch, run by --torch-python (={self.python}), ended: {said[-1] if said else 'without a word'}")
        return json.loads(line)


def fastest(python: str, work: Work, device: str) -> tuple[Opponent, list[dict[str, Any]]]:
    """Tries channels-last or not, compiled or not, and keeps the fastest running; and what each took.

    In bfloat16 autocast is PyTorch's way; its deformable convolution then runs in float32.
    """
    best: Opponent | None = None
    opponent: Opponent | None
    best_s, tried = float("inf"), []
    error: UserError | None = None
    for channels_last, compile_ in product((False, True), (False, True)):
        how = {"channels_last": channels_last, "compile": compile_, "autocast": work.dtype == "bfloat16"}
        request = {**asdict(work), **how, "work": work.kind, "device": device, "threads": os.cpu_count() or 1}
        try:
            opponent = Opponent(python, request)
        except UserError as failed:
            error = failed
            tried.append({**how, "error": str(failed)})
            continue
        seconds = min(opponent.run() for _ in range(3))
        tried.append({**how, "seconds": seconds})
        if seconds < best_s:
            opponent, best, best_s = best, opponent, seconds
        if opponent is not None:
            opponent.close()
    if best is None:
        assert error is not None
        raise error
    return best, tried
