"""The command line: `python -m aecr_jax COMMAND`. Exit status 0, or 2 with one line on standard error for bad usage or input."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from aecr_jax.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    # orbax and grain report their routine at levels that a person would take for trouble.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        parser = _make_parser()
        options, rest = parser.parse_known_args(argv)
        if options.command != "train" and rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return _RUN[options.command](options, rest)
    except UserError as error:
        print(f"aecr_jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("aecr_jax: interrupted", file=sys.stderr)
        return 130


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m aecr_jax", description="AECR-Net: single image dehazing in JAX.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser("train", help="train a network, or continue", allow_abbrev=False, add_help=False)
    train.add_argument("--config", metavar="FILE", help="Python file that sets `config`, such as configs/its.py")

    evaluate = commands.add_parser("eval", help="score a checkpoint", allow_abbrev=False)
    evaluate.add_argument("--checkpoint", metavar="DIR", help="work directory of a run, or a converted model (default: the shipped model)")
    evaluate.add_argument("--data", required=True, metavar="DIR", help='folder with hazy/ and clear/ (or rgb/ and depth/), or "scenes"')
    evaluate.add_argument("--output", metavar="DIR", help="write per_image.csv, summary.json and panel.png there")
    evaluate.add_argument("--save-images", action="store_true", help="write hazy/, restored/ and clear/ into --output too")

    dehaze = commands.add_parser("dehaze", help="dehaze photographs", allow_abbrev=False)
    dehaze.add_argument("input", nargs="+", metavar="INPUT", help="image files and folders")
    dehaze.add_argument("--output", required=True, metavar="DIR", help="folder for the results, NAME.png each")
    dehaze.add_argument("--checkpoint", metavar="DIR", help="work directory of a run, or a converted model (default: the shipped model)")
    dehaze.add_argument(
        "--tile",
        type=int,
        default=1536,
        metavar="N",
        help="images of more than N x N pixels go in overlapping tiles (0: never); default 1536",
    )

    vgg = commands.add_parser("convert-vgg", help="VGG-19 weights for contrastive regularization", allow_abbrev=False)
    vgg.add_argument("file", metavar="FILE", help="torchvision's .pth, a .safetensors of torchvision or timm, or .npz")
    vgg.add_argument("--output", required=True, metavar="FILE", help="the .safetensors to write")

    aecr = commands.add_parser("convert-aecr", help="official PyTorch checkpoints, both ways", allow_abbrev=False)
    aecr.add_argument("file", metavar="FILE", help="official .pk or .pth, or a checkpoint folder of ours to convert back")
    aecr.add_argument("--output", required=True, metavar="PATH", help="folder to write, or the .pth file of the way back")
    return parser


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.config import Config, load_config, override

    if any(help_flag in rest for help_flag in ("-h", "--help")):
        override(Config(), ["--help"])
    if not options.config:
        raise UserError("--config FILE is missing: name a config such as configs/demo.py")
    config = load_config(options.config, rest)

    from aecr_jax.trainer import train

    summary = train(config)
    print(f"done: step {summary['step']}, PSNR {summary['psnr']:.2f} dB, SSIM {summary['ssim']:.4f}, in {config.train.workdir}")
    return 0


def _eval(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.evaluate import evaluate_checkpoint

    evaluate_checkpoint(options.checkpoint, options.data, options.output, save_images=options.save_images)
    return 0


def _dehaze(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.dehaze import dehaze

    return 0 if dehaze(options.input, options.output, checkpoint=options.checkpoint, tile=options.tile) else 2


def _convert_vgg(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.convert import convert_vgg

    print(convert_vgg(options.file, options.output))
    return 0


def _convert_aecr(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.convert import convert_aecr

    print(convert_aecr(options.file, options.output))
    return 0


_RUN = {"train": _train, "eval": _eval, "dehaze": _dehaze, "convert-vgg": _convert_vgg, "convert-aecr": _convert_aecr}

if __name__ == "__main__":
    sys.exit(main())
