"""Load the reference values in tests/golden; the rules for the weights that are too large to store there are in the package."""

from pathlib import Path

import numpy as np

from aecr_jax.benchmark.reference import official_weights, our_arrays, vgg19, vgg19_tensors

__all__ = ["load", "nhwc", "official_weights", "our_arrays", "vgg19", "vgg19_tensors"]
GOLDEN = Path(__file__).parent / "golden"


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def nhwc(x):
    return np.ascontiguousarray(np.moveaxis(x, -3, -1))
