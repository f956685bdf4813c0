"""FFA-Net: groups of feature-attention blocks at full resolution, whose outputs are fused by attention."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from aecr_jax.networks.layers import Conv, FABlock, gate
from aecr_jax.networks.network import Network, NetworkConfig, as_images, layer_options
from aecr_jax.networks.tiles import keep, picture_mean
from aecr_jax.ops.conv import conv_few_inputs, conv_few_outputs
from aecr_jax.settings import bounded

# Mean and standard deviation per channel by which the authors normalise hazy images. They are not those of ImageNet.
MEAN, STD = (0.64, 0.60, 0.58), (0.14, 0.15, 0.152)
_GROUPS = 3


@dataclass(frozen=True, kw_only=True)
class FFANetConfig(NetworkConfig):
    """The settings of FFA-Net. The defaults are those of the authors' released weights, which have 4.46M parameters.

    Raises:
      ValueError: a field has the wrong type or a value outside its range.
    """

    NAME = "ffa_net"

    width: int = bounded(64, 1, 4096)
    """Number of channels."""
    blocks: int = bounded(19, 1, 1000)
    """Number of feature-attention blocks in each of the three groups. The paper's 4.68M parameters are those of 20 blocks."""


class Group(nnx.Module):
    """Feature-attention blocks and a convolution, whose result is added to the input: `[N, H, W, features]` -> the same shape."""

    def __init__(self, features: int, blocks: int, **types: Any):
        self.layers = nnx.List([*(FABlock(features, **types) for _ in range(blocks)), Conv(features, features, 3, **types)])

    def __call__(self, x: Array) -> Array:
        x, y = keep(x, self._apply_layers)
        return y + x

    def _apply_layers(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x


class GroupAttention(nnx.Module):
    """Computes a weight for each channel of each group from the means of all: G arrays `[N, H, W, C]` -> `[N, 1, 1, G C]`."""

    REDUCTION = 16

    def __init__(self, features: int, groups: int, **types: Any):
        hidden = max(1, features // self.REDUCTION)
        self.down = Conv(groups * features, hidden, 1, **types)
        self.up = Conv(hidden, groups * features, 1, **types)

    def __call__(self, groups: Sequence[Array]) -> Array:
        means = jnp.concatenate([picture_mean(group) for group in groups], -1)
        return gate(means, self.down, self.up)


class FFANet(Network):
    """FFA-Net (Qin et al., "FFA-Net: Feature Fusion Attention Network for Single Image Dehazing", AAAI 2020).

    Restores hazy images: `[N, H, W, 3]` in [0, 1] -> the same shape, approximately in [0, 1], not clipped, for any H and W. Images must
    be floating point, and the result has their type; other types, such as 8-bit images, raise a ValueError.

    The definition is that of the authors' code, `net/models/FFA.py` in zhilin007/FFA-Net. The network normalises the image and adds the
    result of its last convolution to the normalised image, which gives the restored image in [0, 1]. All layers work at full
    resolution; 256x256 pixels take 287 billion multiply-adds, seven times as many as with AECR-Net. The code has 20 blocks per group
    by default, as the paper; the authors' commands and released weights have 19.

    Args:
      config: the network's settings; those of the released weights by default.
      rngs: the source of the initial values (stream `params`).

    Raises:
      ValueError: an argument has the wrong type.
    """

    Config = FFANetConfig

    def __init__(self, config: FFANetConfig = FFANetConfig(), *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        types = layer_options(config, rngs)
        w = config.width
        hidden = max(1, w // FABlock.REDUCTION)
        self.first = Conv(3, w, 3, conv_general_dilated=conv_few_inputs, **types)
        self.groups = nnx.List([Group(w, config.blocks, **types) for _ in range(_GROUPS)])
        self.group_attention = GroupAttention(w, _GROUPS, **types)
        self.pixel_down = Conv(w, hidden, 1, **types)
        self.pixel_up = Conv(hidden, 1, 1, **types)
        self.last1 = Conv(w, w, 3, **types)
        self.last2 = Conv(w, 3, 3, conv_general_dilated=conv_few_outputs, **types)

    def __call__(self, hazy: ArrayLike) -> Array:
        hazy = as_images(hazy)
        mean, std = (jnp.array(values, hazy.dtype)[None, None, None] for values in (MEAN, STD))
        x = (hazy - mean) / std
        y = self.first(x)
        groups = []
        for group in self.groups:
            y = group(y)
            groups.append(y)
        weights = jnp.split(self.group_attention(groups), _GROUPS, -1)
        y = functools.reduce(jnp.add, (weight * group for weight, group in zip(weights, groups)))
        y = y * gate(y, self.pixel_down, self.pixel_up)
        return self.last2(self.last1(y)).astype(x.dtype) + x
