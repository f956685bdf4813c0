"""Measures an exported file in a process of its own: `python -m aecr_jax.export.measure FORMAT FILE SIZE` prints JSON."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_RUNS, _SECONDS = 15, 10.0


def measure(form: str, path: str | Path, size: int) -> dict[str, Any]:
    """Return `seconds`, the median time of a run on one image of `size` x `size` pixels after the first, and `bytes`, the peak memory.

    The memory is that which the program and its runs add to a process with the runtime; it is None where Linux does not report it. If
    the process fails, the result is only its `error`.
    """
    command = [sys.executable, "-m", "aecr_jax.export.measure", form, str(path), str(size)]
    environment = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}  # with the filter, the last line is not the error
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def _load(form: str, path: Path, size: int) -> tuple[Callable[[], Any], int | None]:
    """Return a function that runs the file on an image, and the resident memory before the file was loaded."""
    image = np.random.default_rng(0).random((1, size, size, 3), np.float32)
    if form == "onnx":
        import onnxruntime

        before = _memory("VmRSS")
        session = onnxruntime.InferenceSession(path)
        image = np.ascontiguousarray(image.transpose(0, 3, 1, 2))
        return lambda: session.run(None, {session.get_inputs()[0].name: image}), before
    import jax

    from aecr_jax.compilation import set_up

    set_up()
    jax.local_devices()
    before = _memory("VmRSS")
    program = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)
    return lambda: np.asarray(program(image)), before


def _memory(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return None


def _main(form: str, path: str, size: str) -> None:
    run, before = _load(form, Path(path), int(size))
    run()  # compiles, or allocates
    times: list[float] = []
    while len(times) < _RUNS and (len(times) < 3 or sum(times) < _SECONDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    peak = _memory("VmHWM")
    print(json.dumps({"seconds": statistics.median(times), "bytes": None if before is None or peak is None else peak - before}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
