"""How a train step scales over devices: what the compiled program sends in a step, and the time that this suggests.

The program for N devices, with the forms that operations have on TPUs, is compiled for N simulated devices of a CPU, in a process of its
own, because JAX fixes their number when it starts. Nothing is computed. XLA's CPU compiler reduces the gradients of a block that is used
several times once for each use; its compilers for GPUs have a pass that adds them first (all-reduce-reassociate), so that the figures of
the CPU are an upper bound there.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aecr_jax.benchmark.speed import write_json
from aecr_jax.errors import UserError

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
# Numbers of devices for which times are predicted.
PREDICTED = (16, 256, 2048)
# Time of one hop between neighbouring chips, https://jax-ml.github.io/scaling-book/sharding
_HOP_S = 1e-6


@dataclass(frozen=True)
class Chip:
    """A chip in a torus, as its page in https://docs.cloud.google.com/tpu/docs describes it."""

    tflops: float
    """Peak in bfloat16."""
    gbits: float
    """Bandwidth of all links together, in both directions, in Gbit/s."""
    axes: int
    """Dimensions of the torus."""
    pod: int
    """Largest number of chips of a slice."""


CHIPS = {"TPU v5e": Chip(197, 1600, 2, 256), "TPU v5p": Chip(459, 4800, 3, 8960)}


def collectives(program: str) -> dict[str, list[int]]:
    """Return, by kind, the bytes that each collective operation of a compiled program (its HLO as text) delivers to a device."""
    found: dict[str, list[int]] = {}
    for types, kind in re.findall(rf"= (.*?) ({'|'.join(_KINDS)})(?:-start)?\(", program):
        size = 0
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", types):
            size += _BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        found.setdefault(kind, []).append(size)
    return found


def compile_for(devices: int, per_device: int, file: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Compile the step of a config for simulated devices.

    Args:
      devices: their number.
      per_device: images of each.
      file: the config file.
      overrides: settings, as on the command line of `train`.

    Returns:
      `devices`, `images`, `collectives` as that function returns them, `macs` of all devices, `parameters`, `compile_s`, and
      `memory`, the peak of the process's resident memory in bytes.

    Raises:
      UserError: the config is wrong, or the step cannot be compiled.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "aecr_jax.benchmark.scaling", str(devices), str(per_device), file, *overrides]
    # The package need not be installed, and the current folder need not be that of the clone.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path, "JAX_TRACEBACK_FILTERING": "off"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["the process ended"])[-1]
        raise UserError(reason.removeprefix("aecr_jax: "))
    return json.loads(done.stdout.splitlines()[-1])


def step_seconds(chip: Chip, devices: int, flops: float, sent: dict[str, list[int]], utilization: float) -> tuple[float, float]:
    """Predict the time of computation and of all-reduces in a step on a torus of one slice, one after the other.

    An all-reduce sends its bytes twice over all links of a chip, and takes as many hops as it is around half of each axis, there and back.

    Args:
      chip: the chip.
      devices: number of chips, a power of two, in a torus whose sides are powers of two as equal as can be.
      flops: floating-point operations of one device in a step.
      sent: the collectives.
      utilization: the share of the peak that the computation reaches.

    Returns:
      Seconds of computation, and seconds of communication.
    """
    doublings = int(math.log2(devices))
    sides = [2 ** (doublings // chip.axes + (axis < doublings % chip.axes)) for axis in range(chip.axes)]
    hops = 2 * sum(side // 2 for side in sides)
    reduced = sent.get("all-reduce", [])
    transfer = 2 * sum(reduced) / (chip.gbits * 1e9 / 8) * (devices - 1) / devices
    return flops / (chip.tflops * 1e12 * utilization), transfer + len(reduced) * hops * _HOP_S


def benchmark_scaling(
    file: str,
    overrides: Sequence[str],
    *,
    devices: Sequence[int],
    per_device: int,
    utilization: float,
    output: str | Path,
) -> dict[str, Any]:
    """Print what the program sends for each number of devices, and the predicted times; write both to a JSON file and return them.

    Raises:
      UserError: a step cannot be compiled, or the file cannot be written.
    """
    programs = []
    for count in devices:
        program = compile_for(count, per_device, file, overrides)
        programs.append(program)
        sent = program["collectives"]
        about = ", ".join(f"{len(sizes)} {kind} of {sum(sizes) / 1e6:.3f} MB" for kind, sizes in sent.items()) or "no transfer"
        print(f"{count} devices, {program['images']} images: {about}; compiled in {program['compile_s']:.0f} s", flush=True)
    last = programs[-1]
    flops_per_image = 2 * last["macs"] / last["images"]
    rows = []
    for name, chip in CHIPS.items():
        for count in (count for count in PREDICTED if count <= chip.pod):
            for images in (1, 16):
                compute, communicate = step_seconds(chip, count, images * flops_per_image, last["collectives"], utilization)
                share = compute / (compute + communicate)
                row = {"chip": name, "devices": count, "images_per_device": images}
                rows.append(row | {"compute_s": compute, "communicate_s": communicate})
                print(
                    f"{count} x {name}, {images} images each: {1e3 * compute:.2f} ms + {1e3 * communicate:.2f} ms,"
                    f" {count * images / (compute + communicate):.0f} images/s, {100 * share:.0f}% of linear"
                )
    figures = {"programs": programs, "utilization": utilization, "predicted": rows}
    write_json(output, figures)
    return figures


def _compile(devices: int, per_device: int, file: str, overrides: Sequence[str]) -> dict[str, Any]:
    import dataclasses

    import jax
    import jax.numpy as jnp

    from aecr_jax.networks.arrays import count_parameters
    from aecr_jax.networks.registry import abstract_network
    from aecr_jax.training.config import load_config
    from aecr_jax.training.initial import make_loss
    from aecr_jax.training.mesh import make_mesh
    from aecr_jax.training.step import compile_train_step, init_state

    config = load_config(file, overrides)
    images = devices * per_device
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, batch=images, accumulate=1))
    batch: Any = {key: jax.ShapeDtypeStruct((images, *config.data.crop_size, 3), jnp.float32) for key in ("hazy", "clear")}
    if config.loss.haze:
        batch["transmission"] = jax.ShapeDtypeStruct((images, *config.data.crop_size, 1), jnp.float32)
        batch["airlight"] = jax.ShapeDtypeStruct((images, 1, 1, 3), jnp.float32)
    if rehazed := config.loss.rehazed:
        batch["rehazed"] = jax.ShapeDtypeStruct((images, rehazed, *config.data.crop_size, 3), jnp.float32)
    state = init_state(config)
    start = time.perf_counter()
    # In the CPU's forms, each gradient waits for another one, so that XLA cannot combine their all-reduces.
    step, macs = compile_train_step(config, make_loss(config), make_mesh(), state, batch, forms_of="tpu")
    seconds = time.perf_counter() - start
    return {
        "devices": devices,
        "images": images,
        "collectives": collectives(step.func.as_text()),  # type: ignore[attr-defined]
        "macs": macs,
        "parameters": count_parameters(abstract_network(config.model)),
        "compile_s": seconds,
        "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


if __name__ == "__main__":
    try:
        print(json.dumps(_compile(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])))
    except UserError as error:
        sys.exit(f"aecr_jax: {error}")
