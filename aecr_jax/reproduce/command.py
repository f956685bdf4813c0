"""The command `reproduce`: its options, and the call of `reproduce`, which is imported only when the command runs."""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `reproduce` to its parser."""
    parser.add_argument("table", metavar="TABLE", help="table2, table3 or table4")
    parser.add_argument("--data", required=True, metavar="DATA", help="training data, as eval takes them")
    parser.add_argument(
        "--scale", default="small", choices=("small", "paper"), help="a narrow network and few steps (default), or the recipe"
    )
    parser.add_argument("--test", default="", metavar="DATA", help="images to score on (default with --scale small: 50 held-out scenes)")
    parser.add_argument(
        "--features",
        metavar="FILE",
        help="VGG-19 written by convert-vgg, for rows with regularization; vgg19_relu3_1 for cr_three_levels; or random",
    )
    parser.add_argument("--weights", metavar="PATH", help="authors' file or a model's folder from which the rows of its network begin")
    parser.add_argument("--rows", metavar="A,B,...", help="names of rows (default: all); for table4 also rates such as 1:4")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="number of runs of each row (default: 2)")
    parser.add_argument("--output", default="runs/reproduce", metavar="DIR", help="folder for runs and results (default: runs/reproduce)")


def run_reproduce(options: argparse.Namespace, rest: list[str]) -> int:
    """Run the command and return its exit status."""
    from aecr_jax.reproduce.run import reproduce

    page = reproduce(
        options.table,
        data=options.data,
        scale=options.scale,
        test=options.test,
        features=options.features,
        weights=options.weights,
        rows=options.rows.split(",") if options.rows else (),
        seeds=options.seeds,
        output=options.output,
    )
    print(f"results: {page}")
    return 0
