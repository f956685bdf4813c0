"""The command line: `python -m aecr_jax COMMAND`. Exit status 0, or 2 with one line on standard error for bad usage or input.

`check-data` exits with 1 if training on the data would be a mistake, and `train` with 75 if SIGTERM stopped it and its state is saved.
`dehaze` exits with 2 if a picture was not restored, though the others were. A command whose output goes to a pipe that was closed exits
with 141, as SIGPIPE would end it.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import os
import select
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from aecr_jax import __version__
from aecr_jax.errors import Stopped, UserError, complaint, first_line


class _StoreOnce(argparse.Action):
    """Store a value, as argparse's own default action, but refuse an empty one, and to replace one that was given before.

    An empty value is most often a shell variable that is not set. As a path it would mean the current folder.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if "" in (values if isinstance(values, list) else [values]):
            raise argparse.ArgumentError(self, "must not be empty")
        seen: set[str] = vars(namespace).setdefault("_given", set())
        if option_string is not None and self.dest in seen:
            parser.error(f"{option_string} is given twice")
        seen.add(self.dest)
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.register("action", None, _StoreOnce)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name that is not UTF-8 is printed with the byte E9 as \\udce9, as it is on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    # orbax and grain report their routine at levels that a person would take for trouble, and trouble many times over.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        try:
            parser = _make_parser()
            options, rest = parser.parse_known_args(argv)
            if rest and not (options.command in ("train", "benchmark") or (options.command == "check-data" and options.config)):
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            from aecr_jax.compilation import set_up

            set_up()
            return _RUN[options.command](options, rest)
        finally:
            _flush(sys.stdout)  # not at the interpreter's exit, which would report a failure in its own way
    except UserError as error:
        print(complaint(error), file=sys.stderr, flush=True)
        if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
            os._exit(2)  # an ordinary exit would wait for the other processes, which wait for this one
        return 2
    except Stopped as stopped:
        print(complaint(stopped), file=sys.stderr)
        return stopped.status
    except (RuntimeError, AssertionError, MemoryError) as error:
        if (explanation := _explain(error)) is None:
            raise
        print(complaint(explanation), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("aecr_jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
        if not closed:  # a pipe of the command's own
            raise
        for stream in closed:
            _discard(stream)
        return 141
    except OSError as error:
        if (explanation := _explain_output(error)) is None:
            raise
        print(complaint(explanation), file=sys.stderr)
        return 2


def _flush(stream: Any) -> None:
    """Write out what was printed, or raise UserError or BrokenPipeError."""
    try:
        if stream is not None:
            stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(stream)
        raise UserError(_unwritable(error)) from error


def _unwritable(error: OSError) -> str:
    return f"standard output cannot be written: {error.strerror}"


def _explain_output(error: OSError) -> str | None:
    """Say that standard output cannot be written, if an error of the system is from there; None for any other."""
    if error.filename is not None or sys.stdout is None:
        return None
    try:
        print(flush=True)
    except OSError as again:
        _discard(sys.stdout)
        return _unwritable(again)
    return None


def _discard(stream: Any) -> None:
    """Let what is still to be written to `stream` go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _has_no_reader(stream: Any) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # asks for no event: errors are always reported
        return bool(poll.poll(0))
    except (OSError, ValueError, AttributeError):  # no stream, one without a file, or a system without poll (Windows)
        return False


def _explain(error: BaseException) -> str | None:
    """Say in one line what is wrong, if an error of JAX's is one that the user can mend; None for any other."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"out of memory: {first_line(error)}; a smaller train.batch, data.crop or model.width, or train.accumulate, needs less"
            " for training, and --tile for dehazing"
        )
    if "jax" in sys.modules:
        try:
            sys.modules["jax"].devices()
        except (RuntimeError, AssertionError) as reason:  # the latter for a platform that is known and not installed
            about = f": {first_line(reason)}" if str(reason) else ""
            return f"JAX finds no device of JAX_PLATFORMS (={os.environ.get('JAX_PLATFORMS', '')!r}){about}; unset it to use what there is"
    return None


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m aecr_jax", description="AECR-Net: single image dehazing in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"aecr-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser("train", help="train a network, or continue", allow_abbrev=False, add_help=False)
    train.add_argument("--config", metavar="FILE", help="Python file that sets `config`, such as configs/its.py")

    evaluate = commands.add_parser("eval", help="score a checkpoint", allow_abbrev=False)
    evaluate.add_argument("--checkpoint", metavar="DIR", help="work directory of a run, or a converted model (default: the shipped model)")
    evaluate.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help='folder with hazy/ and clear/ (or rgb/ and depth/), a built data set, or "scenes"',
    )
    evaluate.add_argument(
        "--split", default="", metavar="NAME/PART", help="score on that part of a named split, such as nh_haze_45_5_5/test"
    )
    evaluate.add_argument("--data-dir", default="", metavar="DIR", help="where prepare-data wrote (default: ~/tensorflow_datasets)")
    evaluate.add_argument("--output", metavar="DIR", help="write per_image.csv, summary.json and panel.png there")
    evaluate.add_argument("--save-images", action="store_true", help="write hazy/, restored/ and clear/ into --output too")

    dehaze = commands.add_parser("dehaze", help="dehaze photographs", allow_abbrev=False)
    dehaze.add_argument("input", nargs="+", metavar="INPUT", help="image files and folders")
    dehaze.add_argument("--output", required=True, metavar="DIR", help="folder for the results, NAME.png each")
    existing = dehaze.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace results that exist")
    existing.add_argument("--skip-existing", action="store_true", help="restore only the images whose results do not exist")
    dehaze.add_argument("--checkpoint", metavar="DIR", help="work directory of a run, or a converted model (default: the shipped model)")
    dehaze.add_argument(
        "--tile",
        type=int,
        default=1536,
        metavar="N",
        help="images of more than N x N pixels go in overlapping tiles (0: never); default 1536",
    )

    prepare = commands.add_parser("prepare-data", help="build a data set from its authors' archives", allow_abbrev=False)
    prepare.add_argument("name", metavar="NAME", help="reside/its, ots, sots_indoor, sots_outdoor, hsts or rtts; nh_haze, dense_haze")
    prepare.add_argument("--source", required=True, metavar="DIR", help="folder where the archives were unpacked")
    prepare.add_argument("--data-dir", metavar="DIR", help="where to write (default: ~/tensorflow_datasets)")

    check = commands.add_parser("check-data", help="look for mistakes in training data", allow_abbrev=False)
    check.add_argument("--data", metavar="DATA", help="folder or built data set to train on; or use --config")
    check.add_argument("--test", metavar="DATA", help="folder or built data set to evaluate on")
    check.add_argument("--config", metavar="FILE", help="check what this config trains and evaluates on; takes --data.* settings too")
    check.add_argument("--data-dir", default="", metavar="DIR", help="where prepare-data wrote (default: ~/tensorflow_datasets)")
    check.add_argument("--limit", type=int, metavar="N", help="read N images of each, evenly spread (default: all)")
    check.add_argument("--output", default="check-data.png", metavar="FILE", help="picture of pairs to write; default check-data.png")
    check.add_argument("--overwrite", action="store_true", help="replace --output if it exists")

    benchmark = commands.add_parser("benchmark", help="measure speed", allow_abbrev=False)
    kinds = benchmark.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=_Parser)
    data = kinds.add_parser("data", help="the input pipeline: images per second by stage and in all", allow_abbrev=False)
    data.add_argument("--config", required=True, metavar="FILE", help="takes its settings too, such as --data.cache True")
    data.add_argument("--seconds", type=float, default=5.0, metavar="S", help="how long to measure each row; default 5")
    data.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="numbers of worker processes; default 0 1 2")
    data.add_argument("--steps-per-second", type=float, default=20.0, metavar="R", help="of the accelerator to feed; default 20")
    data.add_argument("--output", metavar="FILE", help="write the figures there as JSON")
    _add_speed(kinds)

    report = commands.add_parser("report", help="one HTML page about a training run", allow_abbrev=False)
    report.add_argument("workdir", metavar="WORKDIR", help="work directory of the run; report.html is written there")

    vgg = commands.add_parser("convert-vgg", help="VGG-19 weights for contrastive regularization", allow_abbrev=False)
    vgg.add_argument("file", metavar="FILE", help="torchvision's .pth, a .safetensors of torchvision or timm, or .npz")
    vgg.add_argument("--output", required=True, metavar="FILE", help="the .safetensors to write")
    vgg.add_argument("--overwrite", action="store_true", help="replace --output if it exists")

    aecr = commands.add_parser("convert-aecr", help="official PyTorch checkpoints, both ways", allow_abbrev=False)
    aecr.add_argument("file", metavar="FILE", help="official .pk or .pth, or a checkpoint folder of ours to convert back")
    aecr.add_argument("--output", required=True, metavar="PATH", help="folder to write, or the .pth file of the way back")
    aecr.add_argument("--overwrite", action="store_true", help="replace --output if it exists: the file, or a model's files in the folder")
    return parser


def _add_speed(kinds: Any) -> None:
    """The parsers of `benchmark op`, `model`, `train` and `growth`."""
    defaults = {"op": (1, 64), "model": (1, 256), "train": (2, 240)}
    texts = {"op": "the deformable convolution", "model": "the network's forward", "train": "the train step, on L1 and with CR"}
    for what, text in texts.items():
        speed = kinds.add_parser(what, help=f"{text}: time, memory, share of the machine's peak", allow_abbrev=False)
        batch, size = defaults[what]
        speed.add_argument("--batch", type=int, default=batch, metavar="N", help=f"images; default {batch}")
        speed.add_argument("--size", type=int, default=size, metavar="N", help=f"height and width; default {size}")
        if what == "op":
            speed.add_argument("--channels", type=int, default=256, metavar="N", help="of input and output; default 256")
        else:
            speed.add_argument("--width", type=int, default=64, metavar="N", help="of the network; default 64, the paper's")
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


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.config import Config, load_config, override

    if any(help_flag in rest for help_flag in ("-h", "--help")):
        override(Config(), ["--help"])
    if not options.config:
        raise UserError("--config FILE is missing: name a config such as configs/demo.py")
    config = load_config(options.config, rest)

    from aecr_jax.trainer import train

    summary = train(config)
    from aecr_jax.distributed import is_main

    if is_main():
        print(f"done: step {summary['step']}, PSNR {summary['psnr']:.2f} dB, SSIM {summary['ssim']:.4f}, in {config.train.workdir}")
    return 0


def _eval(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.evaluate import evaluate_checkpoint

    evaluate_checkpoint(
        options.checkpoint,
        options.data,
        options.output,
        save_images=options.save_images,
        data_dir=options.data_dir,
        split=options.split,
    )
    return 0


def _dehaze(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.dehaze import Existing, dehaze

    existing: Existing = "overwrite" if options.overwrite else "skip" if options.skip_existing else "refuse"
    done = dehaze(options.input, options.output, checkpoint=options.checkpoint, tile=options.tile, existing=existing)
    return 0 if done else 2


def _prepare_data(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.data.builders import prepare

    print(prepare(options.name, options.source, options.data_dir))
    return 0


def _check_data(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.config import load_config
    from aecr_jax.data.check import check_data, draw_sheet
    from aecr_jax.data.pipeline import open_eval_data, split_samples
    from aecr_jax.files import refuse_existing

    if bool(options.data) == bool(options.config):
        raise UserError("check-data takes --data DATA or --config FILE: name one of the two")
    if options.config and (options.test or options.data_dir):
        raise UserError("--test and --data-dir go with --data; with --config use --data.eval_dataset, --data.eval_hazy or --data.data_dir")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit (={options.limit}) must be at least 1")
    refuse_existing(options.output, overwrite=options.overwrite)
    problems: list[str] = []
    if options.config:
        config = load_config(options.config, rest)
        train, test, test_name = split_samples(config.data, problems)
        crop = config.data.crop
    else:
        train, _ = open_eval_data(options.data, data_dir=options.data_dir, problems=problems)
        test, test_name = open_eval_data(options.test, data_dir=options.data_dir, problems=problems) if options.test else ([], "")
        crop = 1
    report = check_data(train, test, test_name=test_name, problems=problems, crop=crop, limit=options.limit)
    print(report, flush=True)
    if draw_sheet(report, options.output):
        print(f"pairs, hazy over clear: {options.output}")
    return int(report.mistaken)


def _benchmark(options: argparse.Namespace, rest: list[str]) -> int:
    if options.what != "data":
        return _benchmark_speed(options, rest)
    from aecr_jax.benchmark.data import benchmark_data
    from aecr_jax.config import load_config
    from aecr_jax.data.pipeline import split_samples

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


def _benchmark_speed(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError(f"unrecognized arguments: {' '.join(rest)}; see python -m aecr_jax benchmark {options.what} --help")
    for name in ("batch", "size", "channels", "width", "rounds", "sizes", "batches"):
        if name not in options:
            continue
        given = getattr(options, name)
        # The reflection before the network's first convolution takes 4 pixels, the five levels of VGG-19 take 16.
        least = {"op": 1, "train": 16}.get(options.what, 4) if name in ("size", "sizes") else 1
        if min(given if isinstance(given, Sequence) else [given]) < least:
            raise UserError(f"--{name} (={given}) must be at least {least}")
    if options.what == "growth":
        from aecr_jax.benchmark.growth import benchmark_growth

        sizes, batches = sorted(set(options.sizes)), sorted(set(options.batches))
        benchmark_growth(sizes, batches, width=options.width, rounds=options.rounds, output=options.output, plot=options.plot)
        return 0
    if options.against and options.what != "op" and options.size % 4:
        raise UserError(f"--size (={options.size}) must be a multiple of 4 with --against: PyTorch's side does not pad")
    if options.against:  # before the backend starts: JAX would take most of a GPU's memory for itself
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from aecr_jax.benchmark.speed import benchmark
    from aecr_jax.benchmark.work import Work

    common: dict[str, Any] = {name: getattr(options, name) for name in ("batch", "size", "dtype")}
    if options.what == "op":
        works = [Work("op", channels=options.channels, backward=backward, **common) for backward in (False, True)]
    elif options.what == "model":
        works = [Work("model", width=options.width, **common)]
    else:
        works = [Work("train", width=options.width, cr=cr, **common) for cr in (False, True)]
    torch_python = options.torch_python if options.against else None
    benchmark(works, rounds=options.rounds, torch_python=torch_python, output=options.output)
    return 0


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.report import write_report

    print(write_report(options.workdir))
    return 0


def _convert_vgg(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.convert import convert_vgg

    print(convert_vgg(options.file, options.output, overwrite=options.overwrite))
    return 0


def _convert_aecr(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.convert import convert_aecr

    print(convert_aecr(options.file, options.output, overwrite=options.overwrite))
    return 0


_RUN = {
    "train": _train,
    "eval": _eval,
    "dehaze": _dehaze,
    "prepare-data": _prepare_data,
    "check-data": _check_data,
    "benchmark": _benchmark,
    "report": _report,
    "convert-vgg": _convert_vgg,
    "convert-aecr": _convert_aecr,
}

if __name__ == "__main__":
    sys.exit(main())
