"""MSBDN-DFF: a U-Net with boosted skip connections and with feature fusion by back-projection at every scale."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from aecr_jax.networks.layers import Conv, ConvTranspose, DType, PReLU
from aecr_jax.networks.network import Network, NetworkConfig, as_images, layer_options
from aecr_jax.networks.tiles import places
from aecr_jax.ops.conv import conv_few_inputs, conv_few_outputs
from aecr_jax.settings import bounded

SCALES = 4
"""Number of times that the encoder halves the resolution."""
_BLOCKS_PER_SCALE = 3
RESIDUAL_FACTOR = 0.1


@dataclass(frozen=True, kw_only=True)
class MSBDNConfig(NetworkConfig):
    """The settings of MSBDN-DFF. The defaults are the authors', which give 31,353,061 parameters.

    Raises:
      ValueError: a field has the wrong type or a value outside its range.
    """

    NAME = "msbdn"

    width: int = bounded(16, 1, 1024)
    """Number of channels at full resolution. Each halving of the resolution doubles it."""
    blocks: int = bounded(18, 1, 1000)
    """Number of residual blocks at the lowest resolution."""


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions with a PReLU between them: `x + 0.1 * conv2(prelu(conv1(x)))`, `[N, H, W, features]` -> the same shape."""

    def __init__(self, features: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv1 = Conv(features, features, 3, reflect=True, **types)
        self.activation = PReLU(param_dtype=param_dtype)
        self.conv2 = Conv(features, features, 3, reflect=True, **types)

    def __call__(self, x: Array) -> Array:
        return x + RESIDUAL_FACTOR * self.conv2(self.activation(self.conv1(x)))


class ResidualBlocks(nnx.Module):
    """Several residual blocks in sequence."""

    def __init__(self, features: int, count: int, **types: Any):
        self.blocks = nnx.List([ResidualBlock(features, **types) for _ in range(count)])

    def __call__(self, x: Array) -> Array:
        for block in self.blocks:
            x = block(x)
        return x


class Upscale(nnx.Module):
    """A transposed 4x4 convolution and a PReLU: `[N, H, W, in_features] -> [N, 2H, 2W, out_features]`."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        self.conv = ConvTranspose(in_features, out_features, 4, padding=1, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.activation = PReLU(param_dtype=param_dtype)

    def __call__(self, x: Array) -> Array:
        return self.activation(self.conv(x))


class Downscale(nnx.Module):
    """A 4x4 convolution with stride 2 and a PReLU: `[N, 2H, 2W, in_features] -> [N, H, W, out_features]`."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        self.conv = Conv(in_features, out_features, 4, stride=2, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.activation = PReLU(param_dtype=param_dtype)

    def __call__(self, x: Array) -> Array:
        return self.activation(self.conv(x))


class Fusion(nnx.Module):
    """Dense feature fusion: corrects features by those of other scales, one after another, beginning with the farthest scale.

    For each of the other features, the current features are brought to that feature's scale, and the difference there is brought back
    and added (iterative back-projection). All of them use the same steps between neighbouring scales.

    Args:
      channels: the numbers of channels of the corrected features and then of the other scales, from the nearest to the farthest. Finer
        scales have half the channels of the next coarser one.
    """

    def __init__(self, channels: Sequence[int], **types: Any):
        self.to_finer = channels[1] < channels[0]
        steps = [(min(pair), max(pair)) for pair in itertools.pairwise(channels)]
        self.ups = nnx.List([Upscale(many, few, **types) for few, many in steps])
        self.downs = nnx.List([Downscale(few, many, **types) for few, many in steps])

    def __call__(self, x: Array, others: Sequence[Array]) -> Array:
        away, back = (self.ups, self.downs) if self.to_finer else (self.downs, self.ups)
        for i, other in enumerate(others):
            steps = len(others) - i
            error = x
            for step in list(away)[:steps]:
                error = step(error)
            error = error - other
            for step in reversed(list(back)[:steps]):
                error = step(error)
            x = x + error
        return x


class MSBDN(Network):
    """Restores hazy images: `[N, H, W, 3]` in [0, 1] -> the same shape, approximately in [0, 1], not clipped.

    This is MSBDN-DFF v1.1 of "Multi-Scale Boosted Dehazing Network with Dense Feature Fusion" (Dong et al., CVPR 2020), after the
    authors' code (`MSBDN-DFF-v1-1.py` and `base_networks.py` in BookerDeWitt/MSBDN-DFF). The images are not normalised. The authors'
    network takes multiples of 16 only; here, other sizes are padded by reflection at the bottom and the right, and the result is cropped.

    Images must be floating point, and the result has their type; other types, such as 8-bit images, raise a ValueError.

    The encoder halves the resolution four times. At each scale, residual blocks follow, and a fusion with the features of all
    finer scales. The decoder doubles the resolution four times. There, each scale is boosted: the residual blocks restore the sum of the
    upscaled features and the skip connection, from which the upscaled features are then subtracted. A fusion with the
    features of all coarser scales follows.

    Args:
      config: the network's settings; the authors' by default.
      rngs: the source of the initial values (stream `params`).

    Raises:
      ValueError: an argument has the wrong type.
    """

    Config = MSBDNConfig
    MULTIPLE = 2**SCALES

    def __init__(self, config: MSBDNConfig = MSBDNConfig(), *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        types = layer_options(config, rngs)
        features = [config.width * 2**n for n in range(SCALES + 1)]  # from full resolution to the lowest
        coarse_to_fine = features[:SCALES][::-1]
        self.conv_in = Conv(3, features[0], 11, reflect=True, conv_general_dilated=conv_few_inputs, **types)
        self.encoder = nnx.List([ResidualBlocks(f, _BLOCKS_PER_SCALE, **types) for f in features[:SCALES]])
        self.downs = nnx.List([Conv(f, 2 * f, 3, stride=2, reflect=True, **types) for f in features[:SCALES]])
        self.encoder_fusions = nnx.List([Fusion(features[n::-1], **types) for n in range(1, SCALES + 1)])
        self.bottleneck = ResidualBlocks(features[-1], config.blocks, **types)
        self.ups = nnx.List([ConvTranspose(2 * f, f, 3, **types) for f in coarse_to_fine])
        self.decoder = nnx.List([ResidualBlocks(f, _BLOCKS_PER_SCALE, **types) for f in coarse_to_fine])
        self.decoder_fusions = nnx.List([Fusion(features[n:], **types) for n in reversed(range(SCALES))])
        self.conv_out = Conv(features[0], 3, 3, reflect=True, conv_general_dilated=conv_few_outputs, **types)

    def __call__(self, hazy: ArrayLike) -> Array:
        images = as_images(hazy)
        h, w = images.shape[1:3]
        x = self.conv_in(self.pad(images))  # [n, h, w, width]
        finer, skips = [x], []
        for n in range(SCALES):
            skips.append(self.encoder[n](x) + x)
            x = self.encoder_fusions[n](self.downs[n](skips[n]), finer)  # [n, h / 2^(n + 1), w / 2^(n + 1), 2^(n + 1) width]
            finer.append(x)
        # The authors add 2 x to the result of the blocks and subtract x.
        x = self.bottleneck(2 * x) + x
        coarser = [x]
        for n, skip in enumerate(reversed(skips)):
            up = _resize_by_one(self.ups[n](x))
            # The authors add (up + skip) to the result of the blocks and subtract up. Without that, `up` can be freed before the blocks.
            x = self.decoder_fusions[n](self.decoder[n](up + skip) + skip, coarser)
            coarser.append(x)
        return self.conv_out(x)[:, :h, :w].astype(images.dtype)


def _resize_by_one(x: Array) -> Array:
    """Resize bilinearly, with half-pixel centres: `[N, H + 1, W + 1, C] -> [N, H, W, C]`.

    Output i lies at (i + 1/2) (H + 1) / H - 1/2 = i + (i + 1/2) / H, between the inputs i and i + 1. If the
    input is one tile of a picture, the share (i + 1/2) / H is that of the whole picture.
    """
    h, w = x.shape[1] - 1, x.shape[2] - 1
    # Not NumPy's arange, because an exported program has symbols for sizes; in float32 at least, as bfloat16 has too few digits.
    exact = jnp.promote_types(x.dtype, jnp.float32)
    below, right = (
        ((start + jnp.arange(size, dtype=exact) + 0.5) / whole).astype(x.dtype) for size, (start, whole) in zip((h, w), places(h, w))
    )
    below, right = jnp.reshape(below, (1, -1, 1, 1)), jnp.reshape(right, (1, 1, -1, 1))
    x = (1 - below) * x[:, :-1] + below * x[:, 1:]
    return (1 - right) * x[:, :, :-1] + right * x[:, :, 1:]
