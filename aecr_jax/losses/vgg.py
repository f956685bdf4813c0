"""VGG-19 and VGG-16 (Simonyan and Zisserman, 2015) as fixed feature extractors of losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike
from safetensors import SafetensorError, safe_open

from aecr_jax.errors import MissingFileError, UserError
from aecr_jax.validation import IN_0_TO_1, as_array, as_floating, check_weight

HOW_TO_GET = (
    "get torchvision's {file} (or its .safetensors from timm) and run `python -m aecr_jax convert-vgg {file} --output {name}.safetensors`"
)


class FrozenWeight(nnx.Variable):
    """A weight that no optimizer updates."""


class VGGFeatures(nnx.Module):
    """Feature extractor: images `[N, H, W, 3]` in [0, 1] -> a list of feature maps, one for each of `TAPS` that the weights reach.

    Images must be floating point; other types raise a ValueError. The i-th map (counted from 0) is `[N, H / 2^i, W / 2^i, C_i]`. If the
    weights end at an earlier layer, only the levels up to it are returned. Images are not normalised, because the official code
    passes RGB in [0, 1] to torchvision's weights.

    Args:
      weights: `{"conv1_1.kernel": [3, 3, 3, 64], "conv1_1.bias": [64], ...}`.

    Raises:
      ValueError: a tensor is missing, not floating point, not finite or unknown, or has the wrong shape, or a kernel is not trained
        (all its values are equal).
    """

    TITLE: ClassVar[str]
    FILE: ClassVar[str]
    """Name of torchvision's file."""
    CONVOLUTIONS: ClassVar[tuple[str, ...]]
    """Names of the convolutions in order, `conv{stage}_{number}`. Between the stages there is a 2x2 max pooling."""
    TAPS: ClassVar[tuple[str, ...]]
    """Names of the convolutions after whose ReLU a feature map is taken, one for each stage."""

    def __init__(self, weights: Mapping[str, Any]):
        if not isinstance(weights, Mapping):
            raise ValueError(f"weights is a {type(weights).__name__} and must be a mapping from names to arrays; load_vgg19 reads a file")
        arrays = {name: as_array(array, f"tensor {name}") for name, array in weights.items()}
        self.levels = self.check_weights(arrays)
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
        for name in self.CONVOLUTIONS:
            if name.endswith("_1") and features:
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            x = nnx.relu(self._convolve(name, x))
            if name in self.TAPS:
                features.append(x)
                if len(features) == self.levels:
                    break
        return features

    def _convolve(self, name: str, x: Array) -> Array:
        kernel = self.weights[f"{name}_kernel"][...].astype(x.dtype)
        bias = self.weights[f"{name}_bias"][...].astype(x.dtype)
        y = lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + bias[None, None, None]

    @classmethod
    def check_weights(cls, weights: Mapping[str, Any]) -> int:
        """Return the number of feature levels that the weights support; raise a ValueError that names the first invalid tensor."""
        levels, channels = 0, 3
        expected: dict[str, tuple[int, ...]] = {}
        for i, name in enumerate(cls.CONVOLUTIONS):
            if f"{name}.kernel" not in weights:
                if levels == 0 or any(f"{later}.kernel" in weights for later in cls.CONVOLUTIONS[i:]):
                    raise ValueError(f"tensor {name}.kernel is missing")
                break
            out = weights[f"{name}.kernel"].shape[-1]
            expected |= {f"{name}.kernel": (3, 3, channels, out), f"{name}.bias": (out,)}
            channels = out
            levels += name in cls.TAPS
        for name, shape in expected.items():
            if name not in weights:
                raise ValueError(f"tensor {name} of shape {shape} is missing")
            if tuple(weights[name].shape) != shape:
                raise ValueError(f"tensor {name} has shape {tuple(weights[name].shape)} and must have {shape}")
            check_weight(weights[name], name, kernel=name.endswith(".kernel"))
        if unknown := sorted(set(weights) - set(expected)):
            raise ValueError(f"tensor {unknown[0]} is not one of {cls.TITLE}'s up to {cls.CONVOLUTIONS[-1].replace('conv', 'relu')}")
        return levels

    @classmethod
    def metadata(cls, **about: str) -> dict[str, str]:
        """Return the header that marks a file of these weights; `about` records source, SHA-256 and licence."""
        return {"format": f"aecr_jax.{cls.TITLE.replace('-', '').lower()}", **about}

    @classmethod
    def random(cls, seed: int = 0, width: int = 8) -> Self:
        """Return random weights (He initialization) with `width` channels in the first layer instead of 64.

        The demo and the tests use them because they need no file. Random features still compare local structure, but they do not
        replace trained features in a run that is meant to reach good scores.
        """
        rng = np.random.default_rng(seed)
        weights: dict[str, np.ndarray] = {}
        channels = 3
        for name in cls.CONVOLUTIONS:
            out = width * min(2 ** (int(name[4]) - 1), 8)
            kernel = rng.standard_normal((3, 3, channels, out)) * np.sqrt(2 / (9 * channels))
            weights |= {f"{name}.kernel": kernel.astype(np.float32), f"{name}.bias": np.zeros(out, np.float32)}
            channels = out
        return cls(weights)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load weights from a file that `python -m aecr_jax convert-vgg` wrote.

        Raises:
          UserError: there is no such file, or `convert-vgg` did not write it, or it holds another network.
        """
        path = Path(path)
        how = HOW_TO_GET.format(name=cls.TITLE.replace("-", "").lower(), file=cls.FILE)
        if not path.is_file():
            raise MissingFileError(f"there is no {cls.TITLE} file {path}: {how}")
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file ({error}): {how}") from error
        if metadata.get("format") != cls.metadata()["format"]:
            if str(metadata.get("format")).startswith("aecr_jax.vgg"):
                raise UserError(f"{path} holds {metadata['format'].removeprefix('aecr_jax.')} and must hold {cls.TITLE}: {how}")
            raise UserError(f"{path} was not written by convert-vgg: run `python -m aecr_jax convert-vgg {path} --output NEW.safetensors`")
        if '"reflect"' in metadata.get("convention", ""):  # written by version 0.1.0 from the .npz packages of a narrow VGG-19
            raise UserError(f"{path} holds weights that pad by reflection, which are no longer read: {how}")
        try:
            return cls(weights)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error


def _convolutions(*counts: int) -> tuple[str, ...]:
    return tuple(f"conv{stage}_{i}" for stage, count in enumerate(counts, 1) for i in range(1, count + 1))


class VGG19Features(VGGFeatures):
    """The features of the paper's contrastive regularization: after relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1 of VGG-19.

    They have 64, 128, 256, 512 and 512 channels. See `VGGFeatures` for arguments, results and errors.
    """

    TITLE, FILE = "VGG-19", "vgg19-dcbb9e9d.pth"
    CONVOLUTIONS = _convolutions(2, 2, 4, 4, 1)
    TAPS = ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")


class VGG16Features(VGGFeatures):
    """The features of GridDehazeNet's perceptual loss: after relu1_2, relu2_2 and relu3_3 of VGG-16, with 64, 128 and 256 channels.

    See `VGGFeatures` for arguments, results and errors.
    """

    TITLE, FILE = "VGG-16", "vgg16-397923af.pth"
    CONVOLUTIONS = _convolutions(2, 2, 3)
    TAPS = ("conv1_2", "conv2_2", "conv3_3")


def load_vgg19(path: str | Path) -> VGG19Features:
    """Load features from a file that `python -m aecr_jax convert-vgg` wrote.

    Raises:
      UserError: there is no such file, or `convert-vgg` did not write it, or it holds another network.
    """
    return VGG19Features.load(path)
