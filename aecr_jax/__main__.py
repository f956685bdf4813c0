"""The command line: `python -m aecr_jax COMMAND`. Exit status 0, or 2 with one line on standard error for bad usage or input."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
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
    import numpy as np

    from aecr_jax.checkpoint import DEFAULT_MODEL, load_checkpoint_with_config
    from aecr_jax.config import DataConfig
    from aecr_jax.data.images import make_folder, panel, write_image
    from aecr_jax.data.pipeline import eval_images, open_eval_data
    from aecr_jax.evaluate import Score, evaluate, summarize, table, write_results
    from aecr_jax.restore import Restorer

    if options.save_images and not options.output:
        raise UserError("--save-images needs --output DIR")
    checkpoint = options.checkpoint or DEFAULT_MODEL
    model, config = load_checkpoint_with_config(checkpoint)
    restorer = Restorer(model)
    # The embedded scenes at the size that the run evaluated on, so that the two scores agree.
    size = config.get("data", {}).get("scene_size", DataConfig.scene_size)
    samples = open_eval_data(options.data, tuple(size))
    if options.output:
        make_folder(options.output)
    shown = {i * len(samples) // 4 for i in range(4)}
    if options.save_images:
        inputs = {Path(path).parent.resolve() for sample in samples for path in sample if isinstance(path, Path)}
        for kind in ("hazy", "restored", "clear"):
            if (folder := Path(options.output) / kind).resolve() in inputs:
                raise UserError(f"{folder} holds images to evaluate on and would be overwritten: name another --output")
    scores: list[Score] = []
    rows: list[list[np.ndarray]] = []
    for score, image, restored in evaluate(restorer, eval_images(samples), len(samples)):
        scores.append(score)
        if options.output:
            pictures = {"hazy": image.hazy, "restored": restored, "clear": image.clear}
            # a few rows from all over the set, of one size
            if len(scores) - 1 in shown and (not rows or rows[0][0].shape == restored.shape):
                rows.append(list(pictures.values()))
            if options.save_images:
                for kind, picture in pictures.items():
                    write_image(Path(options.output) / kind / f"{image.name}.png", picture)
    means = summarize(scores)
    about = {"checkpoint": str(checkpoint), "data": options.data, "metrics": "RGB, float, as the official code"}
    if "step" in config:
        about["step"] = config["step"]
    if options.output:
        write_results(options.output, scores, means | about)
        write_image(Path(options.output) / "panel.png", panel(rows))
    print(table([("hazy input", means["input_psnr"], means["input_ssim"]), ("restored", means["psnr"], means["ssim"])]))
    print(f"mean over {means['images']} images; PSNR and SSIM on RGB as in the official code")
    if options.output:
        print(f"hazy | restored | clear: {Path(options.output) / 'panel.png'}")
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
