"""The commands `convert`, `convert-aecr`, `convert-vgg` and `convert-lpips`: their options and what they do."""

from __future__ import annotations

import argparse


def add_conversions(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the command line."""
    vgg = commands.add_parser("convert-vgg", help="convert VGG weights for the losses", allow_abbrev=False)
    vgg.add_argument("file", metavar="FILE", help="torchvision's .pth, or a .safetensors or .npz with the names of torchvision or timm")

    lpips = commands.add_parser("convert-lpips", help="convert the weights of the metric LPIPS", allow_abbrev=False)
    lpips.add_argument("vgg", metavar="VGG", help="torchvision's VGG-16, in the formats of convert-vgg")
    lpips.add_argument("linear", metavar="LINEAR", help="weights/v0.1/vgg.pth of the package lpips")

    for parser in (vgg, lpips):
        parser.add_argument("--output", required=True, metavar="FILE", help="the .safetensors to write")
        parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")

    convert = commands.add_parser("convert", help="convert checkpoints of other projects' networks, in both directions", allow_abbrev=False)
    convert.add_argument("--network", metavar="NAME", help="the network; by default it is recognized by the names of the tensors")
    aecr = commands.add_parser("convert-aecr", help="convert --network aecr_net", allow_abbrev=False)
    aecr.set_defaults(network="aecr_net")
    for parser in (convert, aecr):
        parser.add_argument(
            "file", metavar="FILE", help="authors' .pth, .pk, .safetensors or .npz; or, to convert back, a checkpoint folder"
        )
        parser.add_argument(
            "--output", required=True, metavar="PATH", help="folder to write; to convert back, a .pth, .safetensors or .npz file"
        )
        parser.add_argument(
            "--overwrite", action="store_true", help="replace --output if it exists: the file, or a model's files in the folder"
        )


def run_convert(options: argparse.Namespace, rest: list[str]) -> int:
    """Run `convert` or `convert-aecr` and return the exit status."""
    from aecr_jax.convert.networks import convert

    print(convert(options.file, options.output, network=options.network, overwrite=options.overwrite))
    return 0


def run_convert_vgg(options: argparse.Namespace, rest: list[str]) -> int:
    """Run `convert-vgg` and return the exit status."""
    from aecr_jax.convert.vgg import convert_vgg

    print(convert_vgg(options.file, options.output, overwrite=options.overwrite))
    return 0


def run_convert_lpips(options: argparse.Namespace, rest: list[str]) -> int:
    """Run `convert-lpips` and return the exit status."""
    from aecr_jax.convert.lpips import convert_lpips

    print(convert_lpips(options.vgg, options.linear, options.output, overwrite=options.overwrite))
    return 0
