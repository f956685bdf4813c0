"""Benchmarks of the time and memory of the operator, the network and the train step, optionally compared with PyTorch."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform as platforms
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from aecr_jax.benchmark.opponent import TURN_S, Opponent, check_opponent, count_cores, fastest
from aecr_jax.benchmark.work import Prepared, Work, prepare
from aecr_jax.errors import UserError
from aecr_jax.files import make_folder, replacing
from aecr_jax.training.flops import matmul_peak

# PyTorch's threads keep spinning for a while after their work, which would slow down the next run.
_PAUSE_S = 0.3


def benchmark(works: Sequence[Work], *, rounds: int = 15, torch_python: str | None = None, output: str | Path) -> dict[str, Any]:
    """Measure each of `works` and print a table.

    JAX and PyTorch alternate, with one turn each per round, so that a temporary slowdown of the machine affects both. In a turn, the
    work is repeated for at least `TURN_S` seconds, and the median of these runs counts.

    Args:
      works: the work to measure.
      rounds: number of measured turns, after one run that is not counted.
      torch_python: a Python interpreter with torch and torchvision, for the comparison; None for no comparison.
      output: JSON file for the figures.

    Returns:
      The figures: `machine`, `rounds`, and `rows` with one dict for each of `works`.

    Raises:
      UserError: the PyTorch side fails, or the output cannot be written.
    """
    platform = jax.devices()[0].platform
    if torch_python is not None:
        check_opponent(platform)
    check_writable(output)
    figures: dict[str, Any] = {"machine": describe_machine(), "rounds": rounds, "rows": []}
    print(headline(figures["machine"]))
    with without_cache():
        sizes = (1024, 2048) if platform == "cpu" else (4096, 8192)
        peaks = {dtype: matmul_peak(dtype, sizes) for dtype in sorted({work.dtype for work in works})}
        figures["machine"]["matmul_peak_gmacs"] = peaks
        print(", ".join(f"{peak:.0f} GMAC/s in {dtype} matrix products" for dtype, peak in peaks.items()))
        print(_HEADER, flush=True)
        for work in works:
            row: dict[str, Any] = {"work": str(work), **asdict(work)}
            prepared = prepare(work)
            first_s = first_seconds(prepared)
            peak = measure_peak(prepared)
            with contextlib.ExitStack() as stack:
                runs: list[Callable[[], Any]] = [prepared.run]
                if torch_python is not None:
                    opponent, tried = fastest(torch_python, work, platform)
                    stack.enter_context(opponent)
                    runs.append(opponent.run)
                times = take_turns(runs, rounds)
                row["jax"] = jax_row(prepared, first_s, peak, times[0], peaks[work.dtype])
                print(_line(str(work), row["jax"]), flush=True)
                if torch_python is not None:
                    row["torch"] = torch_row(opponent, tried, times[1])
                    row["ratio"] = float(np.median(times[0]) / np.median(times[1]))
                    name = f"  PyTorch {opponent.version}, {describe(opponent)}"
                    print(f"{_line(name, row['torch'])}   ratio {row['ratio']:.3f}", flush=True)
            figures["rows"].append(row)
            write_json(output, figures)
    print(f"figures: {output}")
    return figures


def jax_row(prepared: Prepared, first_s: float, peak_bytes: int | None, times: Sequence[float], peak_gmacs: float | None) -> dict[str, Any]:
    """Return the figures of one piece of work: times in seconds, memory in bytes, MACs, and the share of matrix products' speed."""
    return {
        **summary(times),
        "first_s": first_s,
        "compile_s": prepared.compile_s,
        "peak_bytes": peak_bytes,
        "temporary_bytes": prepared.temporaries,
        "macs": prepared.macs,
        "share_of_peak": prepared.macs / (np.median(times) * peak_gmacs * 1e9) if peak_gmacs else None,
    }


def torch_row(opponent: Opponent, tried: list[dict[str, Any]], times: Sequence[float]) -> dict[str, Any]:
    """Return the figures of the same work in PyTorch, with the times of all ways that were tried."""
    return {
        **summary(times),
        "first_s": opponent.first_s,
        "peak_bytes": opponent.peak(),
        "version": opponent.version,
        "how": describe(opponent),
        "tried": tried,
    }


_HEADER = f"{'':60}{'median ms':>10}{'min':>9}{'spread':>8}{'first s':>9}{'peak MB':>9}{'temp MB':>9}{'GMAC':>8}{'of peak':>9}"


def _line(name: str, row: dict[str, Any]) -> str:
    line = f"{name:60}{1e3 * row['median_s']:10.1f}{1e3 * row['min_s']:9.1f}{row['spread']:8.0%}{row['first_s']:9.1f}"
    line += megabytes(row["peak_bytes"])
    if "macs" in row:
        line += f"{row['temporary_bytes'] / 1e6:9.0f}{row['macs'] / 1e9:8.1f}{row['share_of_peak']:9.0%}"
    return line


def megabytes(count: int | None) -> str:
    """Format a number of bytes as a table column in megabytes."""
    return f"{'-' if count is None else f'{count / 1e6:.0f}':>9}"


def headline(machine: dict[str, Any]) -> str:
    """Return the first line of a table, which describes the machine."""
    return f"{machine['device']}, jax {machine['jax']}, {machine['xla_flags'] or 'no XLA flags'}"


def describe(opponent: Opponent) -> str:
    """Describe the PyTorch variant in words."""
    words = {"channels_last": "channels-last", "compile": "compiled", "autocast": "autocast"}
    return ", ".join(word for key, word in words.items() if opponent.how[key]) or "eager"


def describe_machine() -> dict[str, Any]:
    """Describe the device, the JAX version and the XLA flags, on which the figures depend."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platforms.machine())
        name = f"{count_cores()} CPU cores ({model})"
    return {"device": name, "jax": jax.__version__, "xla_flags": os.environ.get("XLA_FLAGS", "")}


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median, the minimum, the spread (interquartile range divided by the median) and the times of all runs."""
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {"median_s": float(median), "min_s": min(seconds), "spread": float((high - low) / median), "runs_s": list(seconds)}


def first_seconds(prepared: Prepared) -> float:
    """Do the first run and return its time plus the compile time, in seconds."""
    start = time.perf_counter()
    prepared.run()
    return prepared.compile_s + time.perf_counter() - start


def take_turns(runs: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Let the functions take turns, `rounds` times; return their times in seconds (see `benchmark`).

    A function that returns a number reports its own time, that of a whole turn.
    """
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, seconds in zip(runs, times):
            if len(runs) > 1:
                time.sleep(_PAUSE_S)
            seconds.append(_take_turn(run))
    return times


def _take_turn(run: Callable[[], Any]) -> float:
    times: list[float] = []
    while sum(times) < TURN_S:
        start = time.perf_counter()
        if (said := run()) is not None:
            return float(said)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Disable the persistent compilation cache, because the compile time is measured too."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decides only once whether to use a cache
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def measure_peak(prepared: Prepared) -> int | None:
    """Return the memory, in bytes, that one run needs beyond what is held before it.

    On a CPU this is the resident memory of the process (on Linux; None elsewhere). An accelerator's allocator reports only the peak of the
    whole process, so there the size requested by the compiled program is returned.
    """
    if jax.devices()[0].platform != "cpu":
        return prepared.temporaries + prepared.results
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which would hide that a run needs it again
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = _status("VmRSS")
        prepared.run()
        # At least what the program allocates: part of that may reuse memory that the process already holds.
        return max(prepared.temporaries, _status("VmHWM") - before)
    except (OSError, AttributeError, TypeError):
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def check_writable(path: str | Path) -> None:
    """Raise UserError if a file cannot be written, so that this is found before measurements that take minutes."""
    path = Path(path)
    make_folder(path.parent)
    existed = os.path.lexists(path)
    try:
        with open(path, "a"):
            pass
        if not existed:  # an empty file would look like figures if the measurement fails
            path.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def write_json(path: str | Path, figures: dict[str, Any]) -> None:
    """Write a JSON file completely or not at all; raise UserError if that fails."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(figures, indent=2) + "\n")
