"""The command line, `python -m aecr_jax COMMAND`.

A command exits with status 0, or with status 2 and one line on standard error if its usage or input is invalid. `check-data` exits with 1
if the data should not be used for training, `benchmark accelerator` with 1 if a part failed or a result is wrong, and `train` with 75 if
SIGTERM stopped it and its state has been saved. `dehaze` exits with 2 if any image or any frame of a video was not restored, even if
others were. A command whose output goes to a closed pipe exits with 141, the status of a process that SIGPIPE ends.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from aecr_jax import __version__
from aecr_jax.benchmark.command import add_kinds, add_plan_options, run_benchmark, run_plan
from aecr_jax.convert.command import add_conversions, run_convert, run_convert_lpips, run_convert_vgg
from aecr_jax.errors import Stopped, UserError, complaint, first_line
from aecr_jax.export.command import add_options as add_export_options
from aecr_jax.export.command import run_export
from aecr_jax.inference.command import MODEL_OR_DEFAULT, run_dehaze
from aecr_jax.inference.command import add_options as add_dehaze_options
from aecr_jax.inference.push import add_options as add_push_options
from aecr_jax.inference.push import run_push
from aecr_jax.reproduce.command import add_options, run_reproduce
from aecr_jax.storage import explain, has_scheme
from aecr_jax.streams import discard, explain_output, flush, has_no_reader
from aecr_jax.web.command import add_options as add_web_options
from aecr_jax.web.command import run_web


class _StoreOnce(argparse.Action):
    """Store a value like argparse's default action, but reject an empty value and a second value for the same option.

    An empty value usually comes from a shell variable that is not set. As a path, it would mean the current folder.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if "" in (values if isinstance(values, list) else [values]):
            raise argparse.ArgumentError(self, "must not be empty")
        seen: set[str] = vars(namespace).setdefault("_given", set())
        if option_string is not None and self.dest in seen:
            parser.error(f"{'/'.join(self.option_strings)} is given twice")
        seen.add(self.dest)
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.register("action", None, _StoreOnce)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # In a file name that is not UTF-8, a byte such as E9 is printed as \\udce9, as on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    # orbax and grain log routine events at levels that suggest problems, and repeat real problems many times.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable
    warnings.filterwarnings("ignore", "coroutine 'async_serialize")  # it follows from a checkpoint that could not be written
    try:
        try:
            parser = _make_parser()
            options, rest = parser.parse_known_args(argv)
            if rest and not (options.command in ("train", "benchmark", "plan") or (options.command == "check-data" and options.config)):
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            for name in ("output", "dry_run"):
                if options.command != "eval" and has_scheme(value := getattr(options, name, None) or ""):
                    parser.error(f"--{name.replace('_', '-')} (={value}) must be on this machine")
            if not {"-h", "--help"} & set(rest):
                from aecr_jax.compilation import set_up

                set_up()
            return _RUN[options.command](options, rest)
        finally:
            flush(sys.stdout)  # flush here, because the interpreter would report a failure at exit in a different format
    except UserError as error:
        print(complaint(error), file=sys.stderr, flush=True)
        if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
            os._exit(2)  # a normal exit would wait for the other processes, which wait for this one
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
        closed = [stream for stream in (sys.stdout, sys.stderr) if has_no_reader(stream)]
        if not closed:  # the error comes from a pipe that the command itself uses
            raise
        for stream in closed:
            discard(stream)
        return 141
    except Exception as error:
        explanation = explain_output(error) if isinstance(error, OSError) else None
        if explanation is None and (reason := explain(error)) is not None:
            explanation = f"object storage cannot be used: {reason}"
        if explanation is None and isinstance(error, OSError) and error.filename is not None and error.strerror:
            explanation = f"{os.fsdecode(error.filename)} cannot be used: {error.strerror}"
        if explanation is None:
            raise
        print(complaint(explanation), file=sys.stderr)
        return 2


def _report_unraisable(error: Any) -> None:
    """Report an error that no caller can receive, unless it follows from a checkpoint that could not be written.

    After one file of a checkpoint could not be written, orbax closes its event loop, and each other file that is still being written
    raises this error in a thread of tensorstore. Its traceback would be printed in the middle of the command's own message.
    """
    if not (isinstance(error.exc_value, RuntimeError) and str(error.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(error)


def _explain(error: BaseException) -> str | None:
    """Return a one-line explanation of a JAX error that the user can fix, or None for any other error."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"out of memory: {first_line(error)}; for training, reduce optim.batch, data.crop or model.width, or increase optim.accumulate;"
            " for dehazing, set a smaller --tile"
        )
    if "jax" in sys.modules:
        try:
            sys.modules["jax"].devices()
        except (RuntimeError, AssertionError) as reason:  # AssertionError occurs for a known platform that is not installed
            about = f": {first_line(reason)}" if str(reason) else ""
            platforms = os.environ.get("JAX_PLATFORMS", "")
            return f"JAX finds no device for JAX_PLATFORMS (={platforms!r}){about}; unset it to use the available devices"
    return None


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m aecr_jax", description="AECR-Net: single image dehazing in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"aecr-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser("train", help="train a network or resume a run", allow_abbrev=False, add_help=False)
    train.add_argument("--config", metavar="FILE", help="Python file that sets `config`, such as configs/its.py")

    evaluate = commands.add_parser("eval", help="score a checkpoint", allow_abbrev=False)
    evaluate.add_argument("--model", "--checkpoint", dest="checkpoint", metavar="NAME_OR_DIR", help=MODEL_OR_DEFAULT)
    evaluate.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="folder with hazy/ and clear/ (or rgb/ and depth/), HAZY,CLEAR, clear=FOLDER,depth=FOLDER, constant:FOLDER,"
        " outdoor:FOLDER, clear=FOLDER, a built data set, or scenes:COUNT:WIDTHxHEIGHT; append @NAME/PART for a part of a named split,"
        " and mix data as in A + 2*B",
    )
    evaluate.add_argument("--data-dir", default="", metavar="DIR", help="folder of built data sets (default: ~/tensorflow_datasets)")
    evaluate.add_argument(
        "--haze",
        metavar="CONFIG",
        help="config (FILE or FILE:NAME) whose haze settings are used for data without haze (default: RESIDE's haze)",
    )
    evaluate.add_argument("--output", metavar="DIR", help="folder for per_image.csv, summary.json and panel.png")
    evaluate.add_argument(
        "--metrics",
        default="psnr,ssim",
        metavar="A,B,...",
        help="what to measure: psnr, ssim, ssim_valid, psnr_y, ciede2000, lpips (default: psnr,ssim)",
    )
    evaluate.add_argument("--lpips", metavar="FILE", help="weights that convert-lpips wrote, for the metric lpips")
    evaluate.add_argument(
        "--save-images", action="store_true", help="also write hazy/, restored/ and clear/ to --output, in place of files of the same names"
    )

    add_dehaze_options(commands.add_parser("dehaze", help="dehaze photographs and videos", allow_abbrev=False))

    compare = commands.add_parser("compare", help="one sheet of pictures by several models", allow_abbrev=False)
    compare.add_argument("image", nargs="+", metavar="IMAGE", help="image files, one row each")
    compare.add_argument("--models", required=True, metavar="A,B,...", help="models as --model of eval takes them, one column each")
    compare.add_argument("--clear", metavar="PATH", help="folder of clear images, or the clear image of the only image, for scores")
    compare.add_argument("--output", required=True, metavar="FILE", help="the picture to write, such as sheet.png")
    compare.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    compare.add_argument("--width", type=int, default=320, metavar="N", help="width of a column in pixels; default 320")
    compare.add_argument("--tile", type=int, default=1536, metavar="N", help="as for dehaze; default 1536")

    commands.add_parser("models", help="list the models that ship with the package", allow_abbrev=False)

    add_export_options(commands.add_parser("export", help="write a model as ONNX or StableHLO", allow_abbrev=False))

    add_push_options(commands.add_parser("push", help="upload a model to the Hugging Face Hub", allow_abbrev=False))

    add_web_options(commands.add_parser("web", help="a page that dehazes photographs in the browser", allow_abbrev=False))

    prepare = commands.add_parser("prepare-data", help="build a data set from its authors' archives", allow_abbrev=False)
    prepare.add_argument("name", metavar="NAME", help="reside/its, ots, sots_indoor, sots_outdoor, hsts or rtts; nh_haze, dense_haze")
    prepare.add_argument("--source", required=True, metavar="DIR", help="folder where the archives were unpacked")
    prepare.add_argument("--data-dir", metavar="DIR", help="folder to write to (default: ~/tensorflow_datasets)")

    check = commands.add_parser("check-data", help="look for mistakes in training data", allow_abbrev=False)
    check.add_argument("--data", metavar="DATA", help="training data, as eval takes them; or use --config")
    check.add_argument("--test", metavar="DATA", help="evaluation data, as eval takes them")
    check.add_argument("--config", metavar="FILE", help="check the data of this config; --data.* options override its settings")
    check.add_argument("--data-dir", default="", metavar="DIR", help="folder of built data sets (default: ~/tensorflow_datasets)")
    check.add_argument("--limit", type=int, metavar="N", help="read only N evenly spaced images of each data set (default: all)")
    check.add_argument("--output", default="check-data.png", metavar="FILE", help="picture of pairs to write (default: check-data.png)")
    check.add_argument("--overwrite", action="store_true", help="replace --output if it exists")

    benchmark = commands.add_parser("benchmark", help="measure speed", allow_abbrev=False)
    add_kinds(benchmark.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=_Parser))

    add_plan_options(commands.add_parser("plan", help="the schedule of a run that must end within a time", allow_abbrev=False))

    report = commands.add_parser("report", help="write an HTML report of a training run", allow_abbrev=False)
    report.add_argument("workdir", metavar="WORKDIR", help="work directory of the run; report.html is written there")

    table = commands.add_parser("reproduce", help="train and score the rows of a table of the paper", allow_abbrev=False)
    add_options(table)

    add_conversions(commands)
    return parser


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    if any(help_flag in rest for help_flag in ("-h", "--help")):
        from aecr_jax.training.help import settings_help

        print(settings_help())
        return 0
    from aecr_jax.training.config import load_config

    if not options.config:
        raise UserError("--config FILE is missing: use a config such as configs/demo.py")
    config = load_config(options.config, rest)

    from aecr_jax.training.trainer import train

    summary = train(config)
    from aecr_jax.processes import is_main

    if is_main():
        print(f"done: step {summary['step']}, PSNR {summary['psnr']:.2f} dB, SSIM {summary['ssim']:.4f}, in {config.run.workdir}")
    return 0


def _eval(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.inference.evaluate import evaluate

    haze = None
    if options.haze:
        from aecr_jax.training.config import load_config

        haze = load_config(options.haze).haze
    evaluate(
        options.checkpoint,
        options.data,
        options.output,
        haze=haze,
        save_images=options.save_images,
        data_dir=options.data_dir,
        metrics=options.metrics.split(","),
        lpips=options.lpips,
    )
    return 0


def _prepare_data(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.data.builders import prepare

    print(prepare(options.name, options.source, options.data_dir))
    return 0


def _check_data(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.data.check import check_data, draw_sheet
    from aecr_jax.data.images import check_picture_name
    from aecr_jax.data.sources import open_samples, split_samples
    from aecr_jax.files import refuse_existing, replaces
    from aecr_jax.training.config import load_config

    if bool(options.data) == bool(options.config):
        raise UserError("check-data needs either --data DATA or --config FILE")
    if options.config and (options.test or options.data_dir):
        raise UserError("--test and --data-dir must be used with --data; with --config, use --data.eval and --data.data_dir")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit (={options.limit}) must be at least 1")
    check_picture_name(options.output)
    refuse_existing(options.output, overwrite=options.overwrite)
    problems: list[str] = []
    if options.config:
        config = load_config(options.config, rest)
        train, test, test_name = split_samples(config.data, problems)
        crop = config.data.crop_size
    else:
        train, _ = open_samples(options.data, data_dir=options.data_dir, problems=problems)
        test, test_name = open_samples(options.test, data_dir=options.data_dir, problems=problems) if options.test else ([], "")
        crop = (1, 1)
    if any(replaces(options.output, file) for sample in [*train, *test] for file in sample.files.values()):
        raise UserError(f"{options.output} belongs to the data and would be replaced: choose another --output")
    report = check_data(train, test, test_name=test_name, problems=problems, crop=crop, limit=options.limit)
    print(report, flush=True)
    if draw_sheet(report, options.output):
        print(f"picture of pairs (hazy above clear): {options.output}")
    return int(report.mistaken)


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.inference.compare import compare

    table = compare(
        options.image,
        options.models.split(","),
        options.output,
        clear=options.clear,
        width=options.width,
        tile=options.tile,
        overwrite=options.overwrite,
    )
    print((f"{table}\n" if table else "") + f"sheet: {options.output}")
    return 0


def _models(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.inference.models import table

    print(table())
    return 0


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    from aecr_jax.training.report import write_report

    print(write_report(options.workdir))
    return 0


_RUN = {
    "train": _train,
    "eval": _eval,
    "dehaze": run_dehaze,
    "export": run_export,
    "push": run_push,
    "web": run_web,
    "prepare-data": _prepare_data,
    "check-data": _check_data,
    "benchmark": run_benchmark,
    "plan": run_plan,
    "report": _report,
    "reproduce": run_reproduce,
    "compare": _compare,
    "models": _models,
    "convert": run_convert,
    "convert-aecr": run_convert,
    "convert-vgg": run_convert_vgg,
    "convert-lpips": run_convert_lpips,
}

if __name__ == "__main__":
    sys.exit(main())
