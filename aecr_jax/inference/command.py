"""The command `dehaze`: its options and their execution."""

from __future__ import annotations

import argparse
import os
from typing import Any

from aecr_jax.errors import UserError

# What the commands that take a model say of it.
MODEL = (
    "a shipped model (see the command models), the work directory of a run, an exported or converted model, one on the Hugging Face Hub"
    " (hf://OWNER/NAME@REVISION), or a network without parameters: dcp"
)
MODEL_OR_DEFAULT = f"{MODEL} (default: the default shipped model)"


def add_options(parser: Any) -> None:
    """Add the options of `dehaze` to its parser."""
    parser.add_argument("input", nargs="+", metavar="INPUT", help="image files and folders, or one video")
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="folder for the results, one NAME.png for each image; for a video, a file whose name ends in .mp4, .m4v, .mov or .mkv",
    )
    parser.add_argument("--recursive", action="store_true", help="search sub-folders too, and write to sub-folders of the same names")
    parser.add_argument("--suffix", default="", metavar="TEXT", help="write NAME, TEXT and .png, as in --suffix=-dehazed")
    parser.add_argument(
        "--format",
        metavar="EXTENSION",
        help="format of the results: png, jpg, webp or tif, or jpeg and tiff for these extensions (default: png)",
    )
    parser.add_argument(
        "--quality", type=int, metavar="Q", help="quality from 1 to 100 of jpg and webp files (default: 95) and videos (66)"
    )
    parser.add_argument(
        "--bits", type=int, metavar="N", help="8 or 16 bits per value; 16 needs png or tif (default: 16 for images with more than 8)"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace existing results")
    existing.add_argument("--skip-existing", action="store_true", help="skip inputs whose results exist")
    parser.add_argument("--model", "--checkpoint", dest="checkpoint", metavar="NAME_OR_DIR", help=MODEL_OR_DEFAULT)
    parser.add_argument(
        "--strength", type=float, default=1.0, metavar="S", help="how much of the change to apply, from 0 (none) to 1 (default: 1)"
    )
    parser.add_argument(
        "--smoothing",
        type=float,
        metavar="SECONDS",
        help="average the estimated haze of a video over this time, against flicker; 0 turns it off (default: 0.1)",
    )
    parser.add_argument(
        "--tile",
        type=int,
        default=1536,
        metavar="N",
        help="restore images of more than N x N pixels in tiles, which overlap by at least 128 pixels and need less memory: the result is"
        " nearly that of the whole image; coarse_net models, such as photo, never need tiles; 0 turns tiling off (default: 1536)",
    )


def run_dehaze(options: argparse.Namespace, rest: list[str]) -> int:
    """Restore images or a video and return the exit status: 2 if anything was not restored."""
    from aecr_jax.inference.photographs import Existing
    from aecr_jax.inference.video import is_video

    existing: Existing = "overwrite" if options.overwrite else "skip" if options.skip_existing else "refuse"
    videos = [path for path in options.input if is_video(path) and not os.path.isdir(path)]
    return 0 if (_video if videos else _images)(options, existing) else 2


def _images(options: argparse.Namespace, existing: Any) -> bool:
    from aecr_jax.data.encode import Encoding
    from aecr_jax.data.images import EXTENSIONS
    from aecr_jax.inference.photographs import dehaze_files
    from aecr_jax.inference.video import is_video

    if options.smoothing is not None:
        raise UserError("--smoothing is for videos, and there is none among the inputs: omit it")
    if is_video(options.output) and not os.path.isdir(options.output):
        raise UserError(
            f"--output (={options.output}) names a video, but {options.input[0]} is none: name a folder for the results of images"
        )
    if options.output.lower().endswith(tuple(EXTENSIONS)) and not os.path.isdir(options.output):
        raise UserError(f"--output (={options.output}) names an image, but results are written to a folder: name a folder")
    return dehaze_files(
        options.input,
        options.output,
        checkpoint=options.checkpoint,
        tile=options.tile,
        strength=options.strength,
        existing=existing,
        encoding=Encoding(options.format or "png", options.quality, options.bits),
        suffix=options.suffix,
        recursive=options.recursive,
    )


def _video(options: argparse.Namespace, existing: Any) -> bool:
    from aecr_jax.inference.video import QUALITY, SMOOTHING, dehaze_video

    if len(options.input) > 1:
        raise UserError(f"a video must be the only input, and there are {len(options.input)}: run the command once for each video")
    for name in ("recursive", "suffix", "format", "bits"):
        if getattr(options, name):
            raise UserError(f"--{name} is for images, and {options.input[0]} is a video: omit it")
    return dehaze_video(
        options.input[0],
        options.output,
        checkpoint=options.checkpoint,
        tile=options.tile,
        strength=options.strength,
        smoothing=SMOOTHING if options.smoothing is None else options.smoothing,
        existing=existing,
        quality=QUALITY if options.quality is None else options.quality,
    )
