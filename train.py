"""Trains AECR-Net: `python train.py --config configs/NAME.py [--SECTION.KEY VALUE ...]`."""

import sys

from aecr_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
