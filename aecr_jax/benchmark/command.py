"""The commands `benchmark` and `plan`: their options and their execution."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from aecr_jax.errors import UserError


def add_kinds(kinds: Any) -> None:
    """Add the parsers of `benchmark data`, `scaling`, `op`, `model`, `train`, `growth` and `accelerator`."""
    data = kinds.add_parser("data", help="the input pipeline: images per second by stage and in all", allow_abbrev=False)
    data.add_argument("--config", required=True, metavar="FILE", help="takes its settings too, such as --data.cache True")
    data.add_argument("--seconds", type=float, default=5.0, metavar="S", help="how long to measure each row; default 5")
    data.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="numbers of worker processes; default 0 1 2")
    data.add_argument("--steps-per-second", type=float, default=20.0, metavar="R", help="of the accelerator to feed; default 20")
    data.add_argument("--output", metavar="FILE", help="write the figures there as JSON")
    scaling = kinds.add_parser("scaling", help="what a step sends on many devices, and predicted times", allow_abbrev=False)
    scaling.add_argument("--config", required=True, metavar="FILE", help="takes its settings too, such as --loss.features random")
    scaling.add_argument("--devices", type=int, nargs="+", default=[8, 64, 256], metavar="N", help="simulated devices; default 8 64 256")
    scaling.add_argument("--images-per-device", type=int, default=1, metavar="N", help="default 1")
    scaling.add_argument("--utilization", type=float, default=0.3, metavar="X", help="share of a chip's peak to expect; default 0.3")
    scaling.add_argument("--output", default="benchmark-scaling.json", metavar="FILE", help="default benchmark-scaling.json")
    _add_speed(kinds)


def _add_speed(kinds: Any) -> None:
    """Add the parsers of `benchmark op`, `model`, `train` and `growth`."""
    defaults = {"op": (1, 64), "model": (1, 256), "train": (2, 240)}
    texts = {"op": "the deformable convolution", "model": "the network's forward", "train": "the train step, on L1 and with CR"}
    for what, text in texts.items():
        speed = kinds.add_parser(what, help=f"{text}: time, memory, share of the machine's peak", allow_abbrev=False)
        batch, size = defaults[what]
        speed.add_argument("--batch", type=int, default=batch, metavar="N", help=f"images; default {batch}")
        speed.add_argument("--size", type=int, default=size, metavar="N", help=f"height and width; default {size}")
        if what == "model":
            speed.add_argument("--columns", type=int, metavar="N", help="width, if it is not that of --size")
        if what == "op":
            speed.add_argument("--channels", type=int, default=256, metavar="N", help="of input and output; default 256")
        else:
            speed.add_argument("--network", default="aecr_net", metavar="NAME", help="default aecr_net")
            speed.add_argument("--width", type=int, metavar="N", help="of a network that has one; default the paper's")
        speed.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic; default float32")
        speed.add_argument("--rounds", type=int, default=15, metavar="N", help="measured runs of each; default 15")
        speed.add_argument("--against", choices=("torch",), help="measure the same work in PyTorch, in turns")
        speed.add_argument(
            "--torch-python", default=sys.executable, metavar="FILE", help="Python that has torch and torchvision; default this one"
        )
        speed.add_argument("--output", default=f"benchmark-{what}.json", metavar="FILE", help=f"default benchmark-{what}.json")
    growth = kinds.add_parser("growth", help="time and memory over image area and batch", allow_abbrev=False)
    sizes, batches = (64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8, 16)
    growth.add_argument("--sizes", type=int, nargs="+", default=sizes, metavar="N", help="heights and widths; default 64 ... 2048")
    growth.add_argument("--batches", type=int, nargs="+", default=batches, metavar="N", help="at 128x128; default 1 ... 16")
    growth.add_argument("--width", type=int, default=64, metavar="N", help="of the network; default 64, the paper's")
    growth.add_argument("--rounds", type=int, default=3, metavar="N", help="measured runs of each; default 3")
    growth.add_argument("--output", default="benchmark-growth.json", metavar="FILE", help="default benchmark-growth.json")
    growth.add_argument("--plot", metavar="FILE", help="picture to draw; needs matplotlib")
    accelerator = kinds.add_parser("accelerator", help="correctness, speed and memory of a new GPU or TPU, unattended", allow_abbrev=False)
    accelerator.add_argument("--minutes", type=float, default=8.0, metavar="M", help="the time to use; default 8")
    accelerator.add_argument(
        "--torch-python", default=sys.executable, metavar="FILE", help="Python that may have torch and torchvision; default this one"
    )
    accelerator.add_argument("--output", default="benchmark-accelerator.json", metavar="FILE", help="default benchmark-accelerator.json")


def add_plan_options(plan: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    plan.add_argument("--minutes", type=float, required=True, metavar="M", help="the time that the run has, from its start to its end")
    plan.add_argument("--config", required=True, metavar="FILE", help="config of the run; takes its settings too, such as --optim.batch 32")
    plan.add_argument("--benchmark", metavar="FILE", help="figures of benchmark accelerator, for the time of a step")
    plan.add_argument("--step-ms", type=float, metavar="MS", help="the time of a step in milliseconds, instead of --benchmark")


def run_plan(options: argparse.Namespace, rest: list[str]) -> int:
    """Print the plan of a run and return the exit status; `rest` holds the settings of the config."""
    from aecr_jax.benchmark.plan import plan_run
    from aecr_jax.training.config import load_config

    config = load_config(options.config, rest)
    print(plan_run(options.config, rest, config, minutes=options.minutes, benchmark=options.benchmark, step_ms=options.step_ms))
    return 0


def run_benchmark(options: argparse.Namespace, rest: list[str]) -> int:
    """Run the benchmark that the options select and return the exit status; `rest` holds the settings of a config."""
    if options.what == "scaling":
        return _benchmark_scaling(options, rest)
    if options.what != "data":
        return _benchmark_speed(options, rest)
    from aecr_jax.benchmark.data import benchmark_data
    from aecr_jax.data.sources import split_samples
    from aecr_jax.training.config import load_config

    if not (0 < options.seconds < math.inf and 0 < options.steps_per_second < math.inf) or min(options.workers) < 0:
        raise UserError("--seconds and --steps-per-second must be positive and finite, --workers at least 0")
    config = load_config(options.config, rest)
    benchmark_data(
        split_samples(config.data).train,
        config,
        seconds=options.seconds,
        workers=options.workers,
        steps_per_second=options.steps_per_second,
        output=options.output,
    )
    return 0


def _benchmark_scaling(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.benchmark.scaling import benchmark_scaling
    from aecr_jax.benchmark.speed import check_writable
    from aecr_jax.training.config import load_config

    if min(options.devices) < 1 or options.images_per_device < 1:
        raise UserError("--devices and --images-per-device must be at least 1")
    if not 0 < options.utilization <= 1:
        raise UserError(f"--utilization (={options.utilization:g}) must be more than 0 and at most 1")
    load_config(options.config, rest)  # reports errors before the first program is compiled
    check_writable(options.output)
    benchmark_scaling(
        options.config,
        rest,
        devices=sorted(set(options.devices)),
        per_device=options.images_per_device,
        utilization=options.utilization,
        output=options.output,
    )
    return 0


def _benchmark_speed(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError(f"unrecognized arguments: {' '.join(rest)}; see python -m aecr_jax benchmark {options.what} --help")
    for name in ("batch", "size", "columns", "channels", "width", "rounds", "sizes", "batches"):
        if getattr(options, name, None) is None:
            continue
        given = getattr(options, name)
        # The reflection padding before the network's first convolution needs 4 pixels, and the five levels of VGG-19 need 16.
        least = {"op": 1, "train": 16}.get(options.what, 4) if name in ("size", "columns", "sizes") else 1
        if min(given if isinstance(given, Sequence) else [given]) < least:
            raise UserError(f"--{name} (={given}) must be at least {least}")
    if options.what == "accelerator":
        return _benchmark_accelerator(options)
    if options.what == "growth":
        from aecr_jax.benchmark.growth import benchmark_growth

        sizes, batches = sorted(set(options.sizes)), sorted(set(options.batches))
        benchmark_growth(sizes, batches, width=options.width, rounds=options.rounds, output=options.output, plot=options.plot)
        return 0
    if options.against and options.what != "op":
        _check_twin(options.network, options.size, getattr(options, "columns", None) or options.size)
    if options.against:  # set before the backend starts, because JAX would otherwise reserve most of a GPU's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from aecr_jax.benchmark.speed import benchmark
    from aecr_jax.benchmark.work import Work

    common: dict[str, Any] = {name: getattr(options, name) for name in ("batch", "size", "dtype")}
    if options.what == "op":
        works = [Work("op", channels=options.channels, backward=backward, **common) for backward in (False, True)]
    elif options.what == "model":
        works = [Work("model", network=options.network, width=options.width, columns=options.columns, **common)]
    else:
        works = [Work("train", network=options.network, width=options.width, cr=cr, **common) for cr in (False, True)]
    torch_python = options.torch_python if options.against else None
    benchmark(works, rounds=options.rounds, torch_python=torch_python, output=options.output)
    return 0


def _benchmark_accelerator(options: argparse.Namespace) -> int:
    """Return 1 if a part failed or a result differs from its reference."""
    if not 0 < options.minutes < math.inf:
        raise UserError(f"--minutes (={options.minutes:g}) must be positive and finite")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory for PyTorch
    from aecr_jax.benchmark.accelerator import benchmark_accelerator

    _, good = benchmark_accelerator(minutes=options.minutes, torch_python=options.torch_python, output=options.output)
    return int(not good)


def _check_twin(network: str, size: int, columns: int) -> None:
    """Raise UserError if the PyTorch side does not have the network or cannot process images of this size."""
    from aecr_jax.benchmark.opponent import has_twin
    from aecr_jax.networks.registry import find_network

    if not has_twin(network):
        raise UserError(f"--network (={network}) cannot be measured with --against: it is not written in PyTorch")
    try:
        multiple = find_network(network).MULTIPLE
    except ValueError as error:
        raise UserError(str(error)) from error
    if size % multiple or columns % multiple:
        raise UserError(
            f"--size (={size}) and --columns must be multiples of {multiple} with --against, because PyTorch's network does not pad"
        )
