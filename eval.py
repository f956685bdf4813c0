"""Scores a checkpoint: `python eval.py --checkpoint DIR --data DIR_OR_DATASET [--output DIR]`."""

import sys

from aecr_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
