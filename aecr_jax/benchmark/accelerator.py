"""Everything that is to be measured on a new GPU or TPU, in one command that runs unattended within a given time.

The parts are independent: a part that fails is recorded as failed, and the next one begins. Each part has a share of the time; what a part
does not use is left to the next ones. After each part the JSON file is replaced, so that a machine that is taken away leaves the figures
of the parts before. On a CPU, the parts run with tiny shapes, as a trial of the command and not as a measurement.
"""

from __future__ import annotations

import gc
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from aecr_jax.benchmark.checks import check_device
from aecr_jax.benchmark.data import benchmark_data
from aecr_jax.benchmark.forms import FORMS
from aecr_jax.benchmark.opponent import check_opponent, fastest
from aecr_jax.benchmark.speed import (
    check_writable,
    describe_machine,
    first_seconds,
    jax_row,
    measure_peak,
    take_turns,
    torch_row,
    without_cache,
    write_json,
)
from aecr_jax.benchmark.work import Prepared, Work, prepare
from aecr_jax.data.images import write_image
from aecr_jax.data.scenes import render_scene
from aecr_jax.data.sources import DataConfig, open_samples
from aecr_jax.errors import UserError, first_line
from aecr_jax.ops.deform_conv import has_kernels
from aecr_jax.training.config import Config, OptimConfig
from aecr_jax.training.flops import device_peak, matmul_peak

_TRACED_STEPS = 3
_PICTURES = 32


@dataclass(frozen=True)
class Shapes:
    """The sizes of what is measured."""

    op_batches: tuple[int, ...] = (16, 1)
    op_size: int = 60
    channels: int = 256
    batch: int = 16
    crop: int = 240
    width: int | None = None
    """Width of the network; None for the paper's."""
    largest_batch: int = 1024
    matrices: tuple[int, ...] = (4096, 8192)
    rounds: int = 5
    """Turns of each row, of at least `TURN_S` seconds each."""
    picture: tuple[int, int] = (480, 640)
    """Height and width of the images of the input pipeline, by default those of NYU Depth v2."""


TINY = Shapes(
    op_batches=(2, 1), op_size=8, channels=8, batch=2, crop=16, width=4, largest_batch=4, matrices=(256,), rounds=1, picture=(24, 32)
)


@dataclass
class _Bench:
    """What the parts share."""

    shapes: Shapes
    torch_python: str
    trace: Path
    """Folder for the trace."""
    peaks: dict[str, float] = field(default_factory=dict)
    """Measured speed of matrix products in GMAC/s by type."""
    step: Prepared | None = None
    """The compiled train step with CR."""
    step_row: dict[str, Any] | None = None
    """Its figures."""
    deadline: float = 0.0
    """When the part that runs must end, by `time.perf_counter`."""

    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def train_work(self, batch: int, *, cr: bool = True, remat: bool = False) -> Work:
        return Work("train", batch=batch, size=self.shapes.crop, width=self.shapes.width, dtype="bfloat16", cr=cr, remat=remat)

    def measure(self, work: Work) -> tuple[dict[str, Any], Prepared | None]:
        """Measure a piece of work; if that fails, the row has the error, and `fits` is False if memory was the reason."""
        row: dict[str, Any] = {"work": str(work), **asdict(work)}
        gc.collect()  # frees the arrays of a row that failed
        try:
            prepared = prepare(work)
            first_s = first_seconds(prepared)
            times = take_turns([prepared.run], self.shapes.rounds)[0]
            row["jax"] = jax_row(prepared, first_s, measure_peak(prepared), times, self.peaks.get(work.dtype))
            row["images_per_second"] = work.batch / row["jax"]["median_s"]
            print(f"  {work}, {work.dtype}: {1e3 * row['jax']['median_s']:.2f} ms, first run after {first_s:.1f} s", flush=True)
            return row, prepared
        except Exception as error:  # an unattended run goes on with the next row
            fits = "RESOURCE_EXHAUSTED" not in str(error)
            print(f"  {work}, {work.dtype}: {'failed' if fits else 'does not fit into memory'}: {first_line(error)}", flush=True)
            return row | {"error": _describe(error), "fits": fits}, None


def benchmark_accelerator(
    *, minutes: float = 8.0, torch_python: str, output: str | Path, shapes: Shapes | None = None
) -> tuple[dict[str, Any], bool]:
    """Measure the default device and write the figures to a JSON file and a trace to a folder beside it.

    Args:
      minutes: the time to use. A compilation that runs when the time is over is not interrupted.
      torch_python: a Python interpreter; if it has torch and torchvision, PyTorch's train step is measured too.
      output: the JSON file, which is replaced after each part. The trace is written to the folder of the same name with `-trace`.
      shapes: the sizes; by default the paper's, and tiny ones on a CPU.

    Returns:
      The figures: `machine`, `minutes`, `tiny` and `parts`, by name; each part has `seconds` and its rows, and `skipped`, `unfinished` or
      `error` with the reason. And whether all parts that ran succeeded and all results agree with the references.

    Raises:
      UserError: the output cannot be written.
    """
    check_writable(output)
    tiny = jax.devices()[0].platform == "cpu"
    output = Path(output)
    bench = _Bench(shapes or (TINY if tiny else Shapes()), torch_python, output.with_name(f"{output.stem}-trace"))
    figures: dict[str, Any] = {"machine": describe_machine(), "minutes": minutes, "tiny": tiny, "parts": {}}
    print(f"{figures['machine']['device']}, jax {figures['machine']['jax']}{', tiny shapes' if tiny else ''}", flush=True)
    start, share, good = time.perf_counter(), 0.0, True
    with without_cache():
        for name, (part, part_share) in PARTS.items():
            share += part_share
            begin, bench.deadline = time.perf_counter(), start + 60 * minutes * share
            result: dict[str, Any] = {}
            figures["parts"][name] = result
            print(f"{name}:", flush=True)
            if bench.late():
                result["skipped"] = f"began {begin - bench.deadline:.0f} s after its time"
            else:
                try:
                    part(bench, result)
                except Exception as error:  # whatever goes wrong in one part, the next one may work
                    result["error"] = _describe(error)
            result["seconds"] = time.perf_counter() - begin
            reasons = [f"  {key}: {result[key]}" for key in ("skipped", "unfinished", "error") if key in result]
            print("\n".join([*reasons, f"  {result['seconds']:.1f} s"]), flush=True)
            good &= "error" not in result and all(row.get("ok", row.get("fits") is not True) for row in result.get("rows", []))
            write_json(output, figures)
    print(f"figures: {output}")
    return figures, good


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _device(bench: _Bench, result: dict[str, Any]) -> None:
    """Measure the speed of matrix products, and record the memory that JAX may use."""
    device = jax.devices()[0]
    result |= {"platform": device.platform, "kind": device.device_kind, "devices": jax.device_count(), "cpu_cores": os.cpu_count()}
    result["published_peak_tflops"] = device_peak(device.device_kind)
    result["memory_bytes"] = (device.memory_stats() or {}).get("bytes_limit")
    for dtype in ("bfloat16", "float32"):
        bench.peaks[dtype] = matmul_peak(dtype, bench.shapes.matrices)
        print(f"  {bench.peaks[dtype]:.0f} GMAC/s in {dtype} matrix products", flush=True)
    result["matmul_peak_gmacs"] = bench.peaks


def _correctness(bench: _Bench, result: dict[str, Any], implementation: Literal["xla", "pallas"] = "xla") -> None:
    """Compare the operator, the network and a train step with PyTorch's numbers and with JAX on the CPU; of the kernels, the operator."""
    rows = result["rows"] = []
    sizes = {"size": bench.shapes.op_size, "channels": bench.shapes.channels}
    for row in check_device(jax.devices()[0], **sizes, implementation=implementation):
        rows.append(row)
        about = "agrees" if row["ok"] else "DIFFERS"
        errors = row["errors"].values()
        worst = "not finite" if None in errors else f"{max(errors):.1e}"
        print(f"  {row['case']}, {row['arithmetic']}: {about} with {row['against']}, error {worst} of {row['tolerance']:g}", flush=True)
        if bench.late():
            result["unfinished"] = "the time was over"
            return


def _operator(bench: _Bench, result: dict[str, Any]) -> None:
    """Measure the forms of the deformable convolution that XLA computes, forward alone and with the gradients."""
    _measure_forms(bench, result, [form for form in FORMS if form != "pallas"])


def _kernels(bench: _Bench, result: dict[str, Any]) -> None:
    """Check and measure the Pallas kernels of the deformable convolution.

    No device has run them yet. They come last, so that a kernel that ends the process or does not end spoils no other figure.
    """
    platform = jax.devices()[0].platform
    if not has_kernels(platform, jax.device_count()):
        result["note"] = f"there are no kernels for {'CPUs' if platform == 'cpu' else 'several TPUs'}"
        print(f"  {result['note']}", flush=True)
        return
    _correctness(bench, result, implementation="pallas")
    _measure_forms(bench, result, ["pallas"])


def _measure_forms(bench: _Bench, result: dict[str, Any], forms: list[str]) -> None:
    rows, shapes = result.setdefault("rows", []), bench.shapes
    for batch in shapes.op_batches:
        for dtype in ("bfloat16", "float32"):
            for form in forms:
                for backward in (True, False):
                    if bench.late():
                        result["unfinished"] = "the time was over"
                        return
                    common: dict[str, Any] = {"batch": batch, "size": shapes.op_size, "channels": shapes.channels, "dtype": dtype}
                    rows.append(bench.measure(Work("op", form=form, backward=backward, **common))[0])


def _train(bench: _Bench, result: dict[str, Any]) -> None:
    """Measure the train step with CR and on L1 alone, and then the same in PyTorch if it is there."""
    rows = result.setdefault("rows", [])
    works = [bench.train_work(bench.shapes.batch, cr=cr) for cr in (True, False)]
    for work in works:
        row, prepared = bench.measure(work)
        rows.append(row)
        if work.cr and prepared is not None:
            bench.step, bench.step_row = prepared, row
    if "error" in rows[0]:
        raise RuntimeError(rows[0]["error"])
    platform = jax.devices()[0].platform
    try:
        check_opponent(platform)
        subprocess.run([bench.torch_python, "-c", "import torch, torchvision"], check=True, capture_output=True, timeout=60)
    except (UserError, OSError, subprocess.SubprocessError) as error:
        reason = str(error) if isinstance(error, UserError) else "--torch-python cannot import torch and torchvision"
        result["torch"] = f"not measured: {reason}"
        print(f"  PyTorch {result['torch']}", flush=True)
        return
    for left, work, row in zip((2, 1), works, rows):
        try:
            opponent, tried = fastest(bench.torch_python, work, platform, (bench.deadline - time.perf_counter()) / left)
            with opponent:
                row["torch"] = torch_row(opponent, tried, [opponent.run() for _ in range(bench.shapes.rounds)])
            row["ratio"] = row["jax"]["median_s"] / row["torch"]["median_s"]
            print(f"  {work} in PyTorch {opponent.version}, {row['torch']['how']}: {1e3 * row['torch']['median_s']:.2f} ms", flush=True)
        except (UserError, KeyError) as error:  # KeyError: the step itself could not be measured
            row["torch"] = {"error": first_line(error)}
            print(f"  {work} in PyTorch: {first_line(error)}", flush=True)


def _sweep(bench: _Bench, result: dict[str, Any]) -> None:
    """Double the batch until the step does not fit into memory, and measure what rematerialization saves."""
    rows, batch = result.setdefault("rows", []), bench.shapes.batch
    rows.append(bench.step_row or bench.measure(bench.train_work(batch))[0])
    rows.append(bench.measure(bench.train_work(batch, remat=True))[0])
    for remat in (False, True):
        while (batch := 2 * batch) <= bench.shapes.largest_batch:
            if bench.late():
                result["unfinished"] = f"the time was over before a batch of {batch}"
                break
            rows.append(bench.measure(bench.train_work(batch, remat=remat))[0])
            if "error" in rows[-1]:
                break
        batch //= 2  # rematerialization goes on with the batch that did not fit without it
    for remat in (False, True):
        # What fits without rematerialization fits with it.
        fitting = [row["batch"] for row in rows if row["remat"] <= remat and "jax" in row]
        result["largest_batch_remat" if remat else "largest_batch"] = max(fitting, default=None)


def _trace(bench: _Bench, result: dict[str, Any]) -> None:
    """Write a trace of train steps, for xprof or Perfetto."""
    prepared = bench.step or prepare(bench.train_work(bench.shapes.batch))
    prepared.run()
    with jax.profiler.trace(str(bench.trace)):
        for step in range(_TRACED_STEPS):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                prepared.run()
    files = [path for path in sorted(bench.trace.rglob("*")) if path.is_file()]
    result |= {"folder": str(bench.trace), "steps": _TRACED_STEPS, "bytes": sum(path.stat().st_size for path in files)}
    bench.step = None


def _input(bench: _Bench, result: dict[str, Any]) -> None:
    """Measure whether threads of this machine prepare crops as fast as the step needs them: images of NYU's size, haze on the fly."""
    height, width = bench.shapes.picture
    rate = 20.0 if bench.step_row is None else 1 / bench.step_row["jax"]["median_s"]
    with tempfile.TemporaryDirectory(prefix="aecr_jax-input-") as folder:
        image, depth = render_scene(0, height, width)
        for i in range(_PICTURES):
            write_image(Path(folder) / f"rgb/{i}.png", image)
            write_image(Path(folder) / f"depth/{i}.png", np.repeat(depth[..., None], 3, -1))
        samples = open_samples(folder)[0]
        result |= {"steps_per_second": rate, "pipelines": {}}
        for cache in (False, True):
            data = DataConfig(train=folder, crop=bench.shapes.crop, cache=cache, threads=max(8, os.cpu_count() or 8))
            config = Config(data=data, optim=OptimConfig(batch=bench.shapes.batch))
            seconds = min(3.0, max(0.2, (bench.deadline - time.perf_counter()) / 8))
            found = benchmark_data(samples, config, seconds=seconds, workers=(0,), steps_per_second=rate)
            result["pipelines"]["cached" if cache else "read"] = found
    waiting = {name: found["pipelines"][0]["waiting"] for name, found in result["pipelines"].items()}
    result["keeps_up"] = {name: share < 0.02 for name, share in waiting.items()}


# The parts in their order, each with its share of the time.
PARTS: dict[str, tuple[Callable[[_Bench, dict[str, Any]], None], float]] = {
    "device": (_device, 0.03),
    "correctness": (_correctness, 0.19),
    "operator": (_operator, 0.13),
    "train": (_train, 0.28),
    "sweep": (_sweep, 0.19),
    "trace": (_trace, 0.04),
    "input": (_input, 0.08),
    "kernels": (_kernels, 0.06),
}
