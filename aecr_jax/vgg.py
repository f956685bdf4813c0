"""VGG-19 (Simonyan and Zisserman, 2015) as the fixed feature extractor of contrastive regularization."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike
from safetensors import SafetensorError, safe_open

from aecr_jax.errors import UserError
from aecr_jax.validation import IN_0_TO_1, as_array, as_floating, check_weight

# Convolutions up to relu5_1, which is all that the paper uses; a 2x2 max pooling stands between the stages.
CONVOLUTIONS = [f"conv{stage}_{i}" for stage, count in enumerate((2, 2, 4, 4, 1), 1) for i in range(1, count + 1)]
HOW_TO_GET = (
    "get torchvision's vgg19-dcbb9e9d.pth (or its .safetensors from timm) and run"
    " `python -m aecr_jax convert-vgg vgg19-dcbb9e9d.pth --output vgg19.safetensors`"
)


@dataclass(frozen=True)
class VGGConvention:
    """How a set of VGG-19 weights wants its images."""

    padding: Literal["zeros", "reflect"] = "zeros"
    """How the 3x3 convolutions pad."""
    input: Literal["rgb01"] = "rgb01"
    """Images as they come, RGB in [0, 1]: the official code feeds torchvision's weights without ImageNet normalisation."""

    def __post_init__(self) -> None:
        if self.padding not in ("zeros", "reflect"):
            raise ValueError(f"padding (={self.padding!r}) must be 'zeros' or 'reflect'")
        if self.input != "rgb01":
            raise ValueError(f"input (={self.input!r}) must be 'rgb01'")


class FrozenWeight(nnx.Variable):
    """A weight that no optimizer touches."""


class VGG19Features(nnx.Module):
    """Images `[N, H, W, 3]` in [0, 1] -> feature maps after relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1.

    Images are floating point; those of other types raise a ValueError.
    The i-th map (from 0) is `[N, H / 2^i, W / 2^i, C_i]`, C = 64, 128, 256, 512, 512 for the full network. Weights that end
    earlier give the levels that they have.

    Args:
      weights: `{"conv1_1.kernel": [3, 3, 3, 64], "conv1_1.bias": [64], ...}`, optionally with `aux1.kernel` `[1, 1, c, C_1]` and
        `aux1.bias`, ...: linear maps of a narrow network's features to the full one's.
      convention: padding and input of these weights.

    Raises:
      ValueError: a tensor is missing, misshapen, not floating point, non-finite or unknown, or a kernel is not trained (one value
        throughout).
    """

    def __init__(self, weights: Mapping[str, Any], convention: VGGConvention = VGGConvention()):
        if not isinstance(weights, Mapping):
            raise ValueError(f"weights is a {type(weights).__name__} and must be a mapping from names to arrays; load_vgg19 reads a file")
        arrays = {name: as_array(array, f"tensor {name}") for name, array in weights.items()}
        self.convention = convention
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
                features.append(self._convolve(f"aux{stage}", x) if f"aux{stage}_kernel" in self.weights else x)
                if len(features) == self.levels:
                    break
        return features

    def _convolve(self, name: str, x: Array) -> Array:
        kernel = self.weights[f"{name}_kernel"][...].astype(x.dtype)
        bias = self.weights[f"{name}_bias"][...].astype(x.dtype)
        pad = kernel.shape[0] // 2
        if pad and self.convention.padding == "reflect":
            x, pad = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect"), 0
        y = lax.conv_general_dilated(x, kernel, (1, 1), ((pad, pad), (pad, pad)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + bias[None, None, None]


def check_weights(weights: Mapping[str, Any]) -> int:
    """Returns how many levels a set of weights serves; raises ValueError naming the first tensor that is wrong."""
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
            if f"aux{levels}.kernel" in weights:
                wide = weights[f"aux{levels}.kernel"].shape[-1]
                expected |= {f"aux{levels}.kernel": (1, 1, out, wide), f"aux{levels}.bias": (wide,)}
    for name, shape in expected.items():
        if name not in weights:
            raise ValueError(f"tensor {name} of shape {shape} is missing")
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"tensor {name} has shape {tuple(weights[name].shape)} and must have {shape}")
        # An auxiliary map of ones adds features up, which is allowed; of zeros, it removes them.
        is_kernel = name.endswith(".kernel") and (name.startswith("conv") or not np.any(weights[name]))
        check_weight(weights[name], name, kernel=is_kernel)
    if unknown := sorted(set(weights) - set(expected)):
        raise ValueError(f"tensor {unknown[0]} is not one of VGG-19's up to relu5_1")
    return levels


def random_vgg19(seed: int = 0, width: int = 8) -> VGG19Features:
    """A VGG-19 with random weights (He initialization), `width` channels in its first layer instead of 64.

    It needs no file, so the demo and tests use it. Random features still compare local structure, but they are no substitute
    for trained ones in a run that should score.
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
    """Loads features from a file that `python -m aecr_jax convert-vgg` wrote.

    Raises:
      UserError: there is no such file, or it is not one of these.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no VGG-19 file {path}: {HOW_TO_GET}")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}): {HOW_TO_GET}") from error
    if metadata.get("format") != "aecr_jax.vgg19":
        raise UserError(f"{path} was not written by convert-vgg: run `python -m aecr_jax convert-vgg {path} --output NEW.safetensors`")
    try:
        convention = VGGConvention(**json.loads(metadata["convention"]))
        return VGG19Features(weights, convention)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error


def vgg_metadata(convention: VGGConvention, **about: str) -> dict[str, str]:
    """The header that `load_vgg19` reads; `about` records source, SHA-256 and licence."""
    return {"format": "aecr_jax.vgg19", "convention": json.dumps(asdict(convention)), **about}
