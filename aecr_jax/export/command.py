"""The command `export`: its options and their execution."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Literal, get_args

from aecr_jax.errors import UserError
from aecr_jax.inference.command import MODEL

PACKAGES = ("onnx>=1.23.2", "onnxruntime>=1.25")
"""What ONNX needs; onnxruntime has DeformConv from 1.25 on."""

Form = Literal["onnx", "stablehlo"]
DType = Literal["float32", "float16", "int8"]
Deform = Literal["native", "grid-sample"]


def add_options(parser: Any) -> None:
    """Add the options of `export` to its parser."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--format", choices=("onnx", "stablehlo"), required=True, help="ONNX, or a program for jax.export")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write, such as photo.onnx")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "int8"), default="float32", help="of weights and arithmetic, for ONNX (default: float32)"
    )
    parser.add_argument(
        "--deform",
        choices=("native", "grid-sample"),
        default="native",
        help="ONNX operator for deformable convolutions: DeformConv, or GridSample, which more runtimes have (default: native)",
    )
    parser.add_argument("--size", type=int, default=256, metavar="N", help="measure with an image of N x N pixels (default: 256)")


def run_export(options: argparse.Namespace, rest: list[str]) -> int:
    """Export the model that the options select, and return the exit status."""
    path = Path(options.output)
    if options.size < 32:
        raise UserError(f"--size (={options.size}) must be at least 32")
    model = export_model(options.model, path, form=options.format, dtype=options.dtype, deform=options.deform, overwrite=options.overwrite)
    print(_report(model, path, options.format, options.size), flush=True)
    return 0


def export_model(
    model: str | Path,
    output: str | Path,
    *,
    form: Form = "onnx",
    dtype: DType = "float32",
    deform: Deform = "native",
    overwrite: bool = False,
) -> Any:
    """Write a model as a file that other programs run.

    Args:
      model: a name or path that `load_checkpoint` accepts.
      output: the file to write.
      form: "onnx", or "stablehlo" for a program of `jax.export`.
      dtype: see `aecr_jax.export.to_onnx.to_onnx`; "stablehlo" has only "float32".
      deform: see there.
      overwrite: replace `output` if it exists.

    Returns:
      The network.

    Raises:
      UserError: an argument is none of its choices, the model does not exist or is damaged, the network cannot be exported in this way,
        a package is missing, or the file exists or cannot be written.
    """
    from aecr_jax.files import refuse_existing, replacing
    from aecr_jax.inference.weights import load_with_info

    for option, value, kinds in (("--format", form, Form), ("--dtype", dtype, DType), ("--deform", deform, Deform)):
        if value not in get_args(kinds):
            raise UserError(f"{option} (={value}) must be one of {', '.join(get_args(kinds))}")
    output = Path(output)
    if output.is_dir():
        raise UserError(f"--output (={output}) is a folder: name a file, such as {output / 'model.onnx'}")
    refuse_existing(output, overwrite=overwrite)
    if form == "stablehlo":
        for option, value, usual in (("--dtype", dtype, "float32"), ("--deform", deform, "native")):
            if value != usual:
                raise UserError(f"{option} {value} is for --format onnx: omit it, or export to ONNX")
    else:
        check_onnx()
    network, info = load_with_info(model)
    if form == "stablehlo":
        from aecr_jax.export.to_stablehlo import to_stablehlo

        content = to_stablehlo(network)
    else:
        from aecr_jax.export.to_onnx import to_onnx

        content = to_onnx(network, describe(network, info, model) | {"dtype": dtype}, dtype=dtype, deform=deform)
    with replacing(output) as partial:
        partial.write_bytes(content)
    return network


def check_onnx() -> None:
    """Raise UserError that says what to install, unless the packages for ONNX are installed."""
    try:
        import onnx as onnx
        import onnxruntime as onnxruntime
    except ImportError as error:
        names = " ".join(f"'{package}'" for package in PACKAGES)
        raise UserError(f"ONNX files need onnx and onnxruntime ({error}): run `pip install {names}`") from error


def describe(network: Any, info: dict[str, Any], model: str | Path) -> dict[str, str]:
    """Return the metadata of an exported model. Entries whose content is not known are left out.

    Args:
      network: the network.
      info: what `load_with_info` returns with it.
      model: its name or path.
    """
    import aecr_jax
    from aecr_jax.inference.models import read_card
    from aecr_jax.inference.restore import OVERLAP, USUAL_TILE
    from aecr_jax.inference.weights import shipped_folder
    from aecr_jax.networks.arrays import count_parameters
    from aecr_jax.networks.registry import config_to_dict

    about, shipped = info.get("about", {}), shipped_folder(model)
    values = {
        "name": network.name,
        "network": network.config.NAME,
        "settings": json.dumps(config_to_dict(network.config)),
        "parameters": count_parameters(network),
        "license": read_card(shipped).license if shipped else about.get("license"),
        # Of a converted model, the file; of a trained one, the data.
        "source": about.get("source") or about.get("data") or info.get("data", {}).get("train"),
        "sha256": about.get("sha256"),
        "step": network.step,
        "tile": USUAL_TILE if network.NEEDS_TILES else 0,
        "overlap": OVERLAP if network.NEEDS_TILES else 0,
        "aecr_jax": aecr_jax.__version__,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _report(network: Any, path: Path, form: str, size: int) -> str:
    """Measure an exported file and return a description of several lines."""
    from aecr_jax.export.measure import measure
    from aecr_jax.networks.arrays import count_parameters
    from aecr_jax.networks.macs import network_macs

    if form == "stablehlo":
        from aecr_jax.export.to_stablehlo import PLATFORMS

        multiple = network.symbolic_sizes().multiple
        size += -size % multiple
        limits = f"for {', '.join(PLATFORMS)}; height and width must be multiples of {multiple}"
    else:
        limits = "for images of any size"
    found = measure(form, path, size)
    if "error" in found:
        measured = [f"  not measured   {found['error']}"]
    else:
        memory = "not known" if found["bytes"] is None else f"{found['bytes'] / 1e6:.0f} MB"
        measured = [f"  latency        {1e3 * found['seconds']:.3g} ms", f"  peak memory    {memory}"]
    lines = [
        f"{path}: {network.name} ({network.config.NAME}) as {form}, {limits}",
        f"  parameters     {count_parameters(network):,}",
        f"  multiply-adds  {network_macs(network.config, size, size) / 1e9:.3g} G at {size}x{size}",
        f"  file           {path.stat().st_size / 1e6:.3g} MB",
        *measured,
    ]
    return "\n".join(lines)
