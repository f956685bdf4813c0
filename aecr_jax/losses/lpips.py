"""LPIPS (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018) with VGG-16, version 0.1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from safetensors import SafetensorError, safe_open

from aecr_jax.errors import MissingFileError, UserError
from aecr_jax.losses.vgg import FrozenWeight, VGG16Features
from aecr_jax.metrics import prepare
from aecr_jax.validation import as_array, check_weight

FORMAT, VERSION = "aecr_jax.lpips_vgg", "0.1"
LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
_HOW_TO_GET = (
    "get torchvision's vgg16-397923af.pth and weights/v0.1/vgg.pth of the package lpips, and run"
    " `python -m aecr_jax convert-lpips vgg16-397923af.pth vgg.pth --output lpips.safetensors`"
)


class LPIPS(nnx.Module):
    """Perceptual distance of two batches of images `[N, H, W, 3]` in [0, 1], uint8 or uint16 -> `[N]`; 0 is best.

    The feature vectors of VGG-16 after each of `LAYERS` are scaled to length 1. Their squared differences are weighted by channel, summed
    over channels and averaged over positions, and the five results are added. Images are treated as by the metrics of
    `aecr_jax.metrics`, and must have at least 16x16 pixels. VGG-16 gets them normalized by the statistics of ImageNet, which is what the
    package `lpips` calls its scaling layer for images in [-1, 1].

    Args:
      weights: those of VGG-16 (see `VGGFeatures`), and `linear1.weight` to `linear5.weight`, `[C]`, with the channels of `LAYERS`.

    Raises:
      ValueError: a tensor is missing, unknown, not floating point or not finite, or has the wrong shape.
    """

    source: str
    """Source and SHA-256 of both files of weights, if they were loaded from a file."""

    def __init__(self, weights: Mapping[str, Any]):
        linear = {name: as_array(array, f"tensor {name}") for name, array in weights.items() if name.startswith("linear")}
        self.features = VGG16Features({k: v for k, v in weights.items() if k not in linear}, layers=LAYERS, normalize=True)
        for i, layer in enumerate(LAYERS, 1):
            name, shape = f"linear{i}.weight", self.features.weights[f"{layer.replace('relu', 'conv')}_bias"].shape
            if name not in linear:
                raise ValueError(f"tensor {name} of shape {shape} is missing")
            if linear[name].shape != shape:
                raise ValueError(f"tensor {name} has shape {linear[name].shape} and must have {shape}, as {layer} has channels")
            check_weight(linear[name], name)
        self.linear = nnx.List([FrozenWeight(linear.pop(f"linear{i}.weight")) for i in range(1, len(LAYERS) + 1)])
        if linear:
            raise ValueError(f"tensor {min(linear)} is not one of LPIPS's")
        self.source = "not known"

    def __call__(self, prediction: ArrayLike, target: ArrayLike) -> Array:
        # Accelerators would round the factors of convolutions to fewer bits by default.
        with jax.default_matmul_precision("highest"):
            maps = [self.features(images) for images in prepare(prediction, target)]
        distance = jnp.zeros(maps[0][0].shape[:1], maps[0][0].dtype)
        for x, y, weight in zip(*maps, self.linear):
            difference = jnp.square(_unit(x) - _unit(y)) * weight[...].astype(x.dtype)[None, None, None]
            distance += jnp.mean(jnp.sum(difference, -1), (1, 2))
        return distance

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load weights from a file that `python -m aecr_jax convert-lpips` wrote.

        Raises:
          UserError: there is no such file, or `convert-lpips` did not write it, or it is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"there is no LPIPS file {path}: {_HOW_TO_GET}")
        try:
            with safe_open(path, framework="np") as file:
                about = dict(file.metadata() or {})
                weights = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, AttributeError) as error:  # NumPy lacks some of the types of safetensors (AttributeError)
            raise UserError(f"{path} is not a readable safetensors file ({error}): {_HOW_TO_GET}") from error
        if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
            raise UserError(f"{path} was not written by convert-lpips: {_HOW_TO_GET}")
        try:
            lpips = cls(weights)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        lpips.source = about.get("source", lpips.source)
        return lpips


def _unit(x: Array) -> Array:
    """Scale feature vectors to length 1. The constant is that of the package `lpips`; it keeps vectors of length 0 as they are."""
    return x / (jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True)) + 1e-10)
