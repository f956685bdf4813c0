"""KDDN: the dehazing network and the teacher of "Distilling Image Dehazing With Heterogeneous Task Imitation" (Hong et al., CVPR 2020).

The teacher is an autoencoder of clear images. The student, which is the dehazing network, is trained to have the teacher's features
(`aecr_jax.losses.distillation`). Source: the authors' code, github.com/xmuhm/KDDN, `network/Student.py` (class `Student2`) and
`network/Teachr.py` (class `endeFUINT2_1`). The paper states 5.99M parameters for the dehazing network; no network in the authors' code
has that number, and `Student2` has 6,116,419.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from aecr_jax.networks.layers import Conv, ResidualBlock, uniform_within
from aecr_jax.networks.network import Network, NetworkConfig, as_images, layer_options
from aecr_jax.networks.tiles import cut, keep, picture_mean, places
from aecr_jax.ops.conv import concatenate_channels, conv_few_inputs, conv_few_outputs
from aecr_jax.ops.resize import upsample_bilinear, upsample_nearest
from aecr_jax.settings import bounded

STAGES = 6
"""Number of feature maps that the student and the teacher return."""


@dataclass(frozen=True, kw_only=True)
class KDDNConfig(NetworkConfig):
    """The settings of KDDN's student, the dehazing network.

    Raises:
      ValueError: a field has the wrong type or a value outside its range.
    """

    NAME = "kddn"

    width: int = bounded(64, 1, 4096)
    """Number of channels of all feature maps. For distillation, it must be the teacher's."""
    blocks: int = bounded(6, 1, 1000)
    """Number of attention blocks in each of the six groups."""


@dataclass(frozen=True, kw_only=True)
class KDDNTeacherConfig(NetworkConfig):
    """The settings of KDDN's teacher.

    Raises:
      ValueError: a field has the wrong type or a value outside its range.
    """

    NAME = "kddn_teacher"

    width: int = bounded(64, 1, 4096)
    """Number of channels of all feature maps."""


class KDDN(Network):
    """Restores hazy images: `[N, H, W, 3]` in [0, 1] -> the same shape, approximately in [0, 1] (the output of a tanh, not clipped).

    The student of KDDN: an encoder with two strided convolutions, six groups of attention blocks at a quarter of the resolution, and a
    decoder with bilinear enlargement (corners aligned) that is also given the encoder's features. Images are not normalised.

    Images must be floating point, and the result has their type; other types, such as 8-bit images, raise a ValueError. H and W may have
    any value: sizes that are not multiples of 4 are padded by reflection at the bottom and the right, and the result is cropped. The
    authors' test program resizes such images instead.

    Args:
      config: the network's settings; the authors' by default.
      rngs: the source of the initial values (stream `params`).
    """

    Config = KDDNConfig
    MULTIPLE = 4

    def __init__(self, config: KDDNConfig = KDDNConfig(), *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        types, w = layer_options(config, rngs), config.width
        self.first = Conv(3, w, 3, reflect=True, conv_general_dilated=conv_few_inputs, **types)
        self.down1 = Conv(w, w, 4, stride=2, reflect=True, **types)
        self.down2 = Conv(w, w, 4, stride=2, reflect=True, **types)
        self.groups = nnx.List(
            [nnx.Sequential(*[AttentionBlock(w, **types) for _ in range(config.blocks)], Conv(w, w, 3, **types)) for _ in range(STAGES)]
        )
        self.up1 = Conv(2 * w, w, 3, reflect=True, **types)
        self.up2 = Conv(2 * w, w, 3, reflect=True, **types)
        self.last = Conv(w, 3, 3, reflect=True, conv_general_dilated=conv_few_outputs, **types)

    def __call__(self, hazy: ArrayLike) -> Array:
        return self.restore_with_features(hazy)[0]

    def restore_with_features(self, hazy: ArrayLike) -> tuple[Array, list[Array]]:
        """Return the restored images and the features after each of the six groups, `[N, ceil(H / 4), ceil(W / 4), width]` each."""
        hazy = as_images(hazy)
        h, w = hazy.shape[1:3]
        full = nnx.relu(self.first(self.pad(hazy)))
        half = nnx.relu(self.down1(full))
        y = nnx.relu(self.down2(half))
        features = []
        for group in self.groups:
            y, change = keep(y, group)
            y = y + change
            features.append(y)
        y = nnx.relu(self.up1(concatenate_channels(_double(y), half)))
        y = nnx.relu(self.up2(concatenate_channels(_double(y), full)))
        return jnp.tanh(self.last(y))[:, :h, :w].astype(hazy.dtype), features


def _double(x: Array) -> Array:
    return upsample_bilinear(x, *places(*x.shape[1:3]))


class AttentionBlock(nnx.Module):
    """The paper's spatially weighted residual channel-attention block (SWRCAB), `[N, H, W, features]` -> the same shape.

    A residual of two convolutions is scaled at each pixel and channel by factors that two more convolutions compute from it, and then
    in each channel by a factor computed from the means of all channels.
    """

    def __init__(self, features: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv1 = Conv(features, features, 3, use_bias=False, **types)
        self.conv2 = Conv(features, features, 3, use_bias=False, **types)
        self.spatial1 = Conv(features, features, 3, **types)
        self.spatial2 = Conv(features, features, 3, **types)
        init = uniform_within(features)
        self.channel1 = nnx.Linear(features, features, kernel_init=init, bias_init=init, **types)
        self.channel2 = nnx.Linear(features, features, kernel_init=init, bias_init=init, **types)

    def __call__(self, x: Array) -> Array:
        y = self.conv2(nnx.relu(self.conv1(x)))
        y, x = cut(y * nnx.sigmoid(self.spatial2(nnx.relu(self.spatial1(y)))), x)
        return x + y * nnx.sigmoid(self.channel2(nnx.relu(self.channel1(picture_mean(y)))))


class KDDNTeacher(Network):
    """Encodes and decodes clear images: `[N, H, W, 3]` in [0, 1] -> the same shape, approximately in [0, 1] (the output of a tanh).

    The teacher of KDDN, 798,147 parameters: an encoder with two strided convolutions, six residual blocks at a quarter of the
    resolution, and a decoder with nearest-neighbour enlargement. Images are not normalised. It is not a dehazing network: it is trained
    to reproduce clear images, and its features serve `DistillationLoss`. Types and sizes of images are as for `KDDN`.

    Args:
      config: the network's settings; the authors' by default.
      rngs: the source of the initial values (stream `params`).
    """

    Config = KDDNTeacherConfig
    MULTIPLE = 4

    def __init__(self, config: KDDNTeacherConfig = KDDNTeacherConfig(), *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        types, w = layer_options(config, rngs), config.width
        self.first = Conv(3, w, 7, reflect=True, conv_general_dilated=conv_few_inputs, **types)
        self.down1 = Conv(w, w, 4, stride=2, reflect=True, **types)
        self.down2 = Conv(w, w, 4, stride=2, reflect=True, **types)
        self.blocks = nnx.List([ResidualBlock(w, reflect=True, **types) for _ in range(STAGES)])
        self.up1 = Conv(w, w, 5, reflect=True, **types)
        self.up2 = Conv(w, w, 5, reflect=True, **types)
        self.last = Conv(w, 3, 7, reflect=True, conv_general_dilated=conv_few_outputs, **types)

    def __call__(self, clear: ArrayLike) -> Array:
        return self.restore_with_features(clear)[0]

    def restore_with_features(self, clear: ArrayLike) -> tuple[Array, list[Array]]:
        """Return the reproduced images and the result of `features`."""
        clear = as_images(clear, "clear")
        h, w = clear.shape[1:3]
        features = self.features(clear)
        y = nnx.relu(self.up1(upsample_nearest(features[-1])))
        y = nnx.relu(self.up2(upsample_nearest(y)))
        return jnp.tanh(self.last(y))[:, :h, :w].astype(clear.dtype), features

    def features(self, clear: ArrayLike) -> list[Array]:
        """Return the features after each of the six blocks, `[N, ceil(H / 4), ceil(W / 4), width]` each, without decoding them."""
        x = self.pad(as_images(clear, "clear"))
        y = nnx.relu(self.down2(nnx.relu(self.down1(nnx.relu(self.first(x))))))
        features = []
        for block in self.blocks:
            y = block(y)
            features.append(y)
        return features
