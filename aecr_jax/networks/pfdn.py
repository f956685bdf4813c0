"""PFDN: an encoder and a decoder, and between them blocks that apply the haze model to features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from aecr_jax.networks.layers import Conv, ConvTranspose, gate, uniform_within
from aecr_jax.networks.network import Network, NetworkConfig, as_images, layer_options
from aecr_jax.networks.tiles import cut, picture_mean
from aecr_jax.ops.conv import conv_few_inputs, conv_few_outputs
from aecr_jax.settings import bounded


@dataclass(frozen=True, kw_only=True)
class PFDNConfig(NetworkConfig):
    """The settings of PFDN. The defaults give the 11.27M parameters of the reproduction.

    Raises:
      ValueError: a field has the wrong type or a value outside its range.
    """

    NAME = "pfdn"

    width: int = bounded(64, 1, 4096)
    """Number of channels after the first convolution. There are 2x and 4x as many at half and quarter resolution."""
    blocks: int = bounded(9, 1, 1000)
    """Number of feature dehazing blocks."""


class FeatureDehazingUnit(nnx.Module):
    """The haze model applied to features (FDU): `[N, H, W, features]` -> the same shape.

    A clear image is `J = I / t - (1 / t - 1) A`. Here, a factor and a summand per channel, both in [0, 1] and computed from the means of
    all channels, take the places of `1 / t` and `-(1 / t - 1) A`.
    """

    REDUCTION = 16

    def __init__(self, features: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        hidden = max(1, features // self.REDUCTION)
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(features, hidden, kernel_init=uniform_within(features), **types)
        self.up = nnx.Linear(hidden, 2 * features, kernel_init=uniform_within(hidden), **types)

    def __call__(self, x: Array) -> Array:
        factor, summand = jnp.split(gate(picture_mean(x), self.down, self.up), 2, -1)
        return x * factor + summand


class FeatureDehazingBlock(nnx.Module):
    """Two convolutions and a feature dehazing unit, whose result is added to the input (PFDB): `[N, H, W, features]` -> the same shape."""

    def __init__(self, features: int, **types: Any):
        self.conv1 = Conv(features, features, 3, **types)
        self.conv2 = Conv(features, features, 3, **types)
        self.dehazing = FeatureDehazingUnit(features, **types)

    def __call__(self, x: Array) -> Array:
        y, x = cut(self.conv2(nnx.relu(self.conv1(x))), x)
        return self.dehazing(y) + x


class PFDN(Network):
    """PFDN (Dong and Pan, "Physics-Based Feature Dehazing Networks", ECCV 2020), which the paper of AECR-Net calls FDU.

    Restores hazy images: `[N, H, W, 3]` in [0, 1] -> the same shape, in [0, 1] (the output of a tanh), for any H and W. Images must be
    floating point, and the result has their type; other types, such as 8-bit images, raise a ValueError. Inside, images have the range
    [-1, 1].

    No code of the authors is known. The definition is that of the reproduction in IDKiro/gUNet (`models/baselines/pfdn`), including its
    padding: by reflection at the bottom and the right, to multiples of 16.

    Args:
      config: the network's settings; those of the reproduction by default.
      rngs: the source of the initial values (stream `params`).

    Raises:
      ValueError: an argument has the wrong type.
    """

    Config = PFDNConfig
    MULTIPLE = 16

    def __init__(self, config: PFDNConfig = PFDNConfig(), *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        types = layer_options(config, rngs)
        w = config.width
        self.down1 = Conv(3, w, 3, conv_general_dilated=conv_few_inputs, **types)
        self.down2 = Conv(w, 2 * w, 3, stride=2, **types)
        self.down3 = Conv(2 * w, 4 * w, 3, stride=2, **types)
        self.blocks = nnx.List([FeatureDehazingBlock(4 * w, **types) for _ in range(config.blocks)])
        self.up1 = ConvTranspose(4 * w, 2 * w, 2, **types)
        self.up2 = ConvTranspose(2 * w, w, 2, **types)
        self.up3 = Conv(w, 3, 3, conv_general_dilated=conv_few_outputs, **types)

    def __call__(self, hazy: ArrayLike) -> Array:
        hazy = as_images(hazy)
        h, w = hazy.shape[1:3]
        y = 2 * self.pad(hazy) - 1
        for down in (self.down1, self.down2, self.down3):
            y = nnx.relu(down(y))
        for block in self.blocks:
            y = block(y)
        for up in (self.up1, self.up2):
            y = nnx.relu(up(y))
        restored = jnp.tanh(self.up3(y)[:, :h, :w].astype(hazy.dtype))
        return (restored + 1) / 2
