"""VGG-19 (Simonyan and Zisserman, 2015) as the fixed feature extractor of contrastive regularization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike
from safetensors import SafetensorError, safe_open

from aecr_jax.errors import MissingFileError, UserError
from aecr_jax.validation import IN_0_TO_1, as_array, as_floating, check_weight

# The convolutions up to relu5_1, the last layer that the paper uses. Between the stages there is a 2x2 max pooling.
CONVOLUTIONS = [f"conv{stage}_{i}" for stage, count in enumerate((2, 2, 4, 4, 1), 1) for i in range(1, count + 1)]
HOW_TO_GET = (
    "get torchvision's vgg19-dcbb9e9d.pth (or its .safetensors from timm) and run"
    " `python -m aecr_jax convert-vgg vgg19-dcbb9e9d.pth --output vgg19.safetensors`"
)


class FrozenWeight(nnx.Variable):
    """A weight that no optimizer updates."""


class VGG19Features(nnx.Module):
    """Feature extractor: images `[N, H, W, 3]` in [0, 1] -> feature maps after relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1.

    Images must be floating point; other types raise a ValueError. The i-th map (counted from 0) is `[N, H / 2^i, W / 2^i, C_i]`, with
    C = 64, 128, 256, 512, 512 for the full network. If the weights end at an earlier layer, only the levels up to it are returned.

    Args:
      weights: `{"conv1_1.kernel": [3, 3, 3, 64], "conv1_1.bias": [64], ...}`. Images are not normalised, because the official code
        passes RGB in [0, 1] to torchvision's weights.

    Raises:
      ValueError: a tensor is missing, not floating point, not finite or unknown, or has the wrong shape, or a kernel is not trained
        (all its values are equal).
    """

    def __init__(self, weights: Mapping[str, Any]):
        if not isinstance(weights, Mapping):
            raise ValueError(f"weights is a {type(weights).__name__} and must be a mapping from names to arrays; load_vgg19 reads a file")
        arrays = {name: as_array(array, f"tensor {name}") for name, array in weights.items()}
        self.levels = check_weights(arrays)
        self.weights = nnx.Dict({name.replace(".", "_"): FrozenWeight(array) for name, array in arrays.items()})

    def __call__(self, images: ArrayLike) -> list[Array]:
        images = as_floating(images, "images", IN_0_TO_1)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images have shape {images.shape} and must be [N, H, W, 3]")
        reach = 2 ** (self.levels - 1)
        if min(images.shape[1:3]) < reach:
            raise ValueError(f"images of {images.shape[1]}x{images.shape[2]} must be at least {reach}x{reach} for {self.levels} levels")
        features: list[Array] = []
        x = images
        for name in CONVOLUTIONS:
            stage, position = int(name[4]), int(name[6])
            if position == 1 and stage > 1:
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            x = nnx.relu(self._convolve(name, x))
            if position == 1:
                features.append(x)
                if len(features) == self.levels:
                    break
        return features

    def _convolve(self, name: str, x: Array) -> Array:
        kernel = self.weights[f"{name}_kernel"][...].astype(x.dtype)
        bias = self.weights[f"{name}_bias"][...].astype(x.dtype)
        y = lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + bias[None, None, None]


def check_weights(weights: Mapping[str, Any]) -> int:
    """Return the number of feature levels that the weights support; raise a ValueError that names the first invalid tensor."""
    levels, channels = 0, 3
    expected: dict[str, tuple[int, ...]] = {}
    for name in CONVOLUTIONS:
        if f"{name}.kernel" not in weights:
            if levels == 0 or any(f"{later}.kernel" in weights for later in CONVOLUTIONS[CONVOLUTIONS.index(name) :]):
                raise ValueError(f"tensor {name}.kernel is missing")
            break
        out = weights[f"{name}.kernel"].shape[-1]
        expected |= {f"{name}.kernel": (3, 3, channels, out), f"{name}.bias": (out,)}
        channels = out
        if name.endswith("_1"):
            levels += 1
    for name, shape in expected.items():
        if name not in weights:
            raise ValueError(f"tensor {name} of shape {shape} is missing")
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"tensor {name} has shape {tuple(weights[name].shape)} and must have {shape}")
        check_weight(weights[name], name, kernel=name.endswith(".kernel"))
    if unknown := sorted(set(weights) - set(expected)):
        raise ValueError(f"tensor {unknown[0]} is not one of VGG-19's up to relu5_1")
    return levels


def random_vgg19(seed: int = 0, width: int = 8) -> VGG19Features:
    """Return a VGG-19 with random weights (He initialization) and `width` channels in its first layer instead of 64.

    The demo and the tests use it because it needs no file. Random features still compare local structure, but they do not replace
    trained features in a run that is meant to reach good scores.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    channels = 3
    for name in CONVOLUTIONS:
        out = width * min(2 ** (int(name[4]) - 1), 8)
        kernel = rng.standard_normal((3, 3, channels, out)) * np.sqrt(2 / (9 * channels))
        weights |= {f"{name}.kernel": kernel.astype(np.float32), f"{name}.bias": np.zeros(out, np.float32)}
        channels = out
    return VGG19Features(weights)


def load_vgg19(path: str | Path) -> VGG19Features:
    """Load features from a file that `python -m aecr_jax convert-vgg` wrote.

    Raises:
      UserError: there is no such file, or `convert-vgg` did not write it.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"there is no VGG-19 file {path}: {HOW_TO_GET}")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}): {HOW_TO_GET}") from error
    if metadata.get("format") != "aecr_jax.vgg19":
        raise UserError(f"{path} was not written by convert-vgg: run `python -m aecr_jax convert-vgg {path} --output NEW.safetensors`")
    if '"reflect"' in metadata.get("convention", ""):  # written by version 0.1.0 from the .npz packages of a narrow VGG-19
        raise UserError(f"{path} holds weights that pad by reflection, which are no longer read: {HOW_TO_GET}")
    try:
        return VGG19Features(weights)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def vgg_metadata(**about: str) -> dict[str, str]:
    """Return the header that `load_vgg19` checks; `about` records source, SHA-256 and licence."""
    return {"format": "aecr_jax.vgg19", **about}
