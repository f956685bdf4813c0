"""VGG-19 and VGG-16 (Simonyan and Zisserman, 2015) as fixed feature extractors of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike
from safetensors import SafetensorError, safe_open

from aecr_jax.errors import MissingFileError, UserError
from aecr_jax.ops.windows import max_pool
from aecr_jax.validation import IN_0_TO_1, as_array, as_floating, check_weight

HOW_TO_GET = (
    "get torchvision's {file} (or its .safetensors from timm) and run `python -m aecr_jax convert-vgg {file} --output {name}.safetensors`"
)
# The weights of VGG-19 up to relu3_1, which are in this folder: 1.1 MB in float16, CC BY 4.0 (Simonyan and Zisserman), see NOTICE.md.
SHIPPED = "vgg19_relu3_1"

# Mean and standard deviation of ImageNet's RGB in [0, 1], with which torchvision's networks were trained.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FrozenWeight(nnx.Variable):
    """A weight that no optimizer updates."""


class VGGFeatures(nnx.Module):
    """Feature extractor: images `[N, H, W, 3]` in [0, 1] -> a list of feature maps, one for each of `layers`.

    Images must be floating point; other types raise a ValueError. The map after `relu{stage}_{number}` is
    `[N, H / 2^(stage - 1), W / 2^(stage - 1), C]`.

    Args:
      weights: `{"conv1_1.kernel": [3, 3, 3, 64], "conv1_1.bias": [64], ...}`. They may end at any layer; those after the last of `layers`
        are not kept.
      layers: names of different layers, such as `("relu1_1", "relu3_4")`; by default those of `LAYERS` that the weights reach.
      normalize: subtract the mean of ImageNet from the images and divide by its standard deviation, per channel, as in the training of
        torchvision's weights. By default, the network gets RGB in [0, 1], as in the official code.

    Raises:
      ValueError: a tensor is missing, not floating point, not finite or unknown, or has the wrong shape, or a kernel is not trained
        (all its values are equal); a layer is unknown or repeated, or the weights end before it.
    """

    TITLE: ClassVar[str]
    FILE: ClassVar[str]
    """Name of torchvision's file."""
    CONVOLUTIONS: ClassVar[tuple[str, ...]]
    """Names of the convolutions in order, `conv{stage}_{number}`. Between the stages there is a 2x2 max pooling."""
    LAYERS: ClassVar[tuple[str, ...]]
    """Names of the layers whose feature maps are taken by default, one for each stage."""

    def __init__(self, weights: Mapping[str, Any], *, layers: Sequence[str] | None = None, normalize: bool = False):
        if not isinstance(weights, Mapping):
            raise ValueError(f"weights is a {type(weights).__name__} and must be a mapping from names to arrays; load_vgg19 reads a file")
        arrays = {name: as_array(array, f"tensor {name}") for name, array in weights.items()}
        reached = self.check_weights(arrays)
        if layers is None:
            layers = [layer for layer in self.LAYERS if layer in reached] or self.LAYERS
        self.check_layers(layers)
        for layer in layers:
            if layer not in reached:
                raise ValueError(f"the weights end at {reached[-1]}, before layer {layer}")
        self.layers, self.normalize = tuple(layers), normalize
        self._used = self.CONVOLUTIONS[: 1 + max(self.CONVOLUTIONS.index(_convolution(layer)) for layer in layers)]
        self.weights = nnx.Dict(
            {f"{name}_{part}": FrozenWeight(arrays[f"{name}.{part}"]) for name in self._used for part in ("kernel", "bias")}
        )

    @property
    def levels(self) -> int:
        """The number of feature maps."""
        return len(self.layers)

    @property
    def least(self) -> int:
        """The smallest height and width of images in pixels, at which the deepest feature map has one value."""
        return 2 ** (int(self._used[-1][4]) - 1)

    @jax.named_scope("vgg")
    def __call__(self, images: ArrayLike) -> list[Array]:
        images = as_floating(images, "images", IN_0_TO_1)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images have shape {images.shape} and must be [N, H, W, 3]")
        if min(images.shape[1:3]) < self.least:
            deepest = self._used[-1].replace("conv", "relu")
            raise ValueError(f"images of {images.shape[1]}x{images.shape[2]} must be at least {self.least}x{self.least} for {deepest}")
        maps: dict[str, Array] = {}
        x = images
        if self.normalize:
            mean, std = (jnp.array(values, x.dtype)[None, None, None] for values in (_MEAN, _STD))
            x = (x - mean) / std
        for name in self._used:
            if name.endswith("_1") and maps:
                x = max_pool(x)
            x = maps[name] = nnx.relu(self._convolve(name, x))
        return [maps[_convolution(layer)] for layer in self.layers]

    def _convolve(self, name: str, x: Array) -> Array:
        kernel = self.weights[f"{name}_kernel"][...].astype(x.dtype)
        bias = self.weights[f"{name}_bias"][...].astype(x.dtype)
        y = lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + bias[None, None, None]

    @classmethod
    def check_layers(cls, layers: Sequence[str]) -> None:
        """Raise a ValueError if a layer is unknown or repeated, or there is none."""
        known = [name.replace("conv", "relu") for name in cls.CONVOLUTIONS]
        if isinstance(layers, str) or not layers:
            raise ValueError(f"layers (={layers!r}) must be a sequence of names of layers, such as {cls.LAYERS}")
        for layer in layers:
            if layer not in known:
                raise ValueError(f"layer {layer} is not one of {cls.TITLE}'s: {', '.join(known)}")
        if len(set(layers)) < len(layers):
            raise ValueError(f"layers (={','.join(layers)}) must be different from each other")

    @classmethod
    def check_weights(cls, weights: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the layers that the weights reach, such as `("relu1_1", "relu1_2")`; raise a ValueError at the first invalid tensor."""
        reached: list[str] = []
        channels = 3
        expected: dict[str, tuple[int, ...]] = {}
        for i, name in enumerate(cls.CONVOLUTIONS):
            if f"{name}.kernel" not in weights:
                if i == 0 or any(f"{later}.kernel" in weights for later in cls.CONVOLUTIONS[i:]):
                    raise ValueError(f"tensor {name}.kernel is missing")
                break
            out = (weights[f"{name}.kernel"].shape or (1,))[-1]
            expected |= {f"{name}.kernel": (3, 3, channels, out), f"{name}.bias": (out,)}
            channels = out
            reached.append(name.replace("conv", "relu"))
        for name, shape in expected.items():
            if name not in weights:
                raise ValueError(f"tensor {name} of shape {shape} is missing")
            if tuple(weights[name].shape) != shape:
                raise ValueError(f"tensor {name} has shape {tuple(weights[name].shape)} and must have {shape}")
            check_weight(weights[name], name, kernel=name.endswith(".kernel"))
        if unknown := sorted(set(weights) - set(expected)):
            raise ValueError(f"tensor {unknown[0]} is not one of {cls.TITLE}'s up to {cls.CONVOLUTIONS[-1].replace('conv', 'relu')}")
        return tuple(reached)

    @classmethod
    def metadata(cls, **about: str) -> dict[str, str]:
        """Return the header that marks a file of these weights; `about` records source, SHA-256 and licence."""
        return {"format": f"aecr_jax.{cls.TITLE.replace('-', '').lower()}", **about}

    @classmethod
    def random(cls, seed: int = 0, width: int = 8, *, layers: Sequence[str] | None = None, normalize: bool = False) -> Self:
        """Return random weights (He initialization) with `width` channels in the first layer instead of 64.

        The tests use them, because they are small. Random features still compare local structure, but they do not
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
        return cls(weights, layers=layers, normalize=normalize)

    @classmethod
    def load(cls, path: str | Path, *, layers: Sequence[str] | None = None, normalize: bool = False) -> Self:
        """Load weights from a file that `python -m aecr_jax convert-vgg` wrote, or those of `SHIPPED` by this name.

        Raises:
          UserError: there is no such file, `convert-vgg` did not write it, it holds another network, or it ends before one of `layers`.
        """
        path = Path(__file__).with_name(f"{SHIPPED}.safetensors") if str(path) == SHIPPED else Path(path)
        how = HOW_TO_GET.format(name=cls.TITLE.replace("-", "").lower(), file=cls.FILE)
        if not path.is_file():
            raise MissingFileError(f"there is no {cls.TITLE} file {path}: {how}")
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, AttributeError) as error:  # NumPy lacks some of the types of safetensors (AttributeError)
            raise UserError(f"{path} is not a readable safetensors file ({error}): {how}") from error
        if metadata.get("format") != cls.metadata()["format"]:
            if str(metadata.get("format")).startswith("aecr_jax.vgg"):
                raise UserError(f"{path} holds {metadata['format'].removeprefix('aecr_jax.')} and must hold {cls.TITLE}: {how}")
            raise UserError(f"{path} was not written by convert-vgg: run `python -m aecr_jax convert-vgg {path} --output NEW.safetensors`")
        if '"reflect"' in metadata.get("convention", ""):  # written by version 0.1.0 from the .npz packages of a narrow VGG-19
            raise UserError(f"{path} holds weights that pad by reflection, which are no longer read: {how}")
        try:
            return cls(weights, layers=layers, normalize=normalize)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error


def _convolution(layer: str) -> str:
    return layer.replace("relu", "conv")


def _convolutions(*counts: int) -> tuple[str, ...]:
    return tuple(f"conv{stage}_{i}" for stage, count in enumerate(counts, 1) for i in range(1, count + 1))


class VGG19Features(VGGFeatures):
    """Features of VGG-19; by default those of the paper's contrastive regularization: relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1.

    These have 64, 128, 256, 512 and 512 channels. See `VGGFeatures` for arguments, results and errors.
    """

    TITLE, FILE = "VGG-19", "vgg19-dcbb9e9d.pth"
    CONVOLUTIONS = _convolutions(2, 2, 4, 4, 4)
    LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")


class VGG16Features(VGGFeatures):
    """Features of VGG-16; by default those of GridDehazeNet's perceptual loss: relu1_2, relu2_2 and relu3_3.

    These have 64, 128 and 256 channels. See `VGGFeatures` for arguments, results and errors.
    """

    TITLE, FILE = "VGG-16", "vgg16-397923af.pth"
    CONVOLUTIONS = _convolutions(2, 2, 3, 3, 3)
    LAYERS = ("relu1_2", "relu2_2", "relu3_3")


def load_vgg19(path: str | Path) -> VGG19Features:
    """Load features from a file that `python -m aecr_jax convert-vgg` wrote.

    Raises:
      UserError: there is no such file, or `convert-vgg` did not write it, or it holds another network.
    """
    return VGG19Features.load(path)
