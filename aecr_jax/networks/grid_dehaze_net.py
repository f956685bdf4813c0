"""GridDehazeNet (Liu et al., "GridDehazeNet: Attention-Based Multi-Scale Network for Image Dehazing", ICCV 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from aecr_jax.networks.layers import Conv, ConvTranspose
from aecr_jax.networks.network import Network, NetworkConfig, SymbolicSizes, as_images, layer_options
from aecr_jax.ops.conv import concatenate_channels, conv_few_inputs, conv_few_outputs
from aecr_jax.settings import bounded

_ROWS, _COLUMNS = 3, 6


@dataclass(frozen=True, kw_only=True)
class GridDehazeNetConfig(NetworkConfig):
    """The settings of GridDehazeNet. The defaults are the authors'.

    Raises:
      ValueError: a field has the wrong type or a value outside its range.
    """

    NAME = "grid_dehaze_net"

    width: int = bounded(16, 1, 4096)
    """Number of channels in the first row of the grid, at full resolution. There are 2x and 4x as many at half and quarter resolution."""
    growth: int = bounded(16, 1, 4096)
    """Number of channels that each dense layer adds in a residual dense block."""
    dense_layers: int = bounded(4, 1, 1000)
    """Number of dense layers in a residual dense block."""


class GridDehazeNet(Network):
    """Restores hazy images: `[N, H, W, 3]` in [0, 1] -> the same shape, at least 0 and not clipped above 1, for any H and W.

    A grid of three rows (full, half and quarter resolution) and six columns. Every step along a row is a residual dense block. The first
    three columns pass features down to the next row, the last three pass them up. Where two paths meet, they are added with one learned
    factor per channel and path (`coefficient`, the paper's channel-wise attention). A convolution and a residual dense block precede
    the grid, and others follow it.

    The definition is that of the authors' code (`model.py` and `residual_dense_block.py`, as kept in github.com/JinmingZhuang/ECE2195).
    Images are scaled to [-1, 1] at the input, the output ends in a ReLU, and convolutions pad with zeros. As in the authors' code,
    `coefficient` has the shape [rows, columns, 2, 4 * width], of which only the entries of meeting paths and existing channels are used.

    Args:
      config: the network's settings; the authors' by default.
      rngs: the source of the initial values (stream `params`).

    Raises:
      ValueError: an argument has the wrong type, or `hazy` is not floating point or not `[N, H, W, 3]`.
    """

    Config = GridDehazeNetConfig

    def __init__(self, config: GridDehazeNetConfig = GridDehazeNetConfig(), *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        types = layer_options(config, rngs)
        widths = [config.width * 2**row for row in range(_ROWS)]
        half = _COLUMNS // 2

        def make_block(width: int) -> ResidualDenseBlock:
            return ResidualDenseBlock(width, growth=config.growth, layers=config.dense_layers, **types)

        self.conv_in = Conv(3, widths[0], 3, conv_general_dilated=conv_few_inputs, **types)
        self.block_in = make_block(widths[0])
        # Indexed by row and column: blocks[i][j] leads from column j to j + 1, downs[i][j] from row i to i + 1 in column j, and
        # ups[i][j] from row i + 1 to i in column half + j.
        self.blocks = nnx.List([nnx.List([make_block(width) for _ in range(_COLUMNS - 1)]) for width in widths])
        self.downs = nnx.List([nnx.List([Down(width, **types) for _ in range(half)]) for width in widths[:-1]])
        self.ups = nnx.List([nnx.List([Up(width, **types) for _ in range(half)]) for width in widths[:-1]])
        self.coefficient = nnx.Param(jnp.ones((_ROWS, _COLUMNS, 2, widths[-1]), config.param_dtype))
        self.block_out = make_block(widths[0])
        self.conv_out = Conv(widths[0], 3, 3, conv_general_dilated=conv_few_outputs, **types)

    def __call__(self, hazy: ArrayLike) -> Array:
        hazy = as_images(hazy)
        rows = [self.block_in(self.conv_in(2 * hazy.astype(self.config.dtype) - 1))]  # the features of one column
        for row in range(1, _ROWS):
            rows.append(self.downs[row - 1][0](rows[row - 1]))
        half = _COLUMNS // 2
        for column in range(1, _COLUMNS):
            along = [blocks[column - 1](x) for blocks, x in zip(self.blocks, rows)]
            if column < half:
                rows[0] = along[0]
                for row in range(1, _ROWS):
                    rows[row] = self._join(row, column, along[row], self.downs[row - 1][column](rows[row - 1]))
            else:
                rows[-1] = along[-1]
                for row in reversed(range(_ROWS - 1)):
                    up = self.ups[row][column - half](rows[row + 1], along[row].shape)
                    rows[row] = self._join(row, column, along[row], up)
        return nnx.relu(self.conv_out(self.block_out(rows[0]))).astype(hazy.dtype)

    def symbolic_sizes(self) -> SymbolicSizes:
        return SymbolicSizes(2 ** (_ROWS - 1))

    def _join(self, row: int, column: int, along: Array, across: Array) -> Array:
        factors = self.coefficient[...][row, column, :, : along.shape[-1]].astype(along.dtype)
        return factors[0][None, None, None] * along + factors[1][None, None, None] * across


class ResidualDenseBlock(nnx.Module):
    """Residual dense block, `[N, H, W, width] -> [N, H, W, width]`.

    Each of `layers` 3x3 convolutions with ReLU takes the block's input and the outputs of all earlier ones, and adds `growth` channels.
    A 1x1 convolution of all of them gives the residual.
    """

    def __init__(self, width: int, *, growth: int, layers: int, **types: Any):
        self.layers = nnx.List([Conv(width + growth * layer, growth, 3, **types) for layer in range(layers)])
        self.fuse = Conv(width + growth * layers, width, 1, **types)

    def __call__(self, x: Array) -> Array:
        features, new = x, nnx.relu(self.layers[0](x))
        for layer in self.layers[1:]:
            features = concatenate_channels(features, new)
            new = nnx.relu(layer(features))
        # The 1x1 convolution of the last concatenation, without computing the concatenation.
        assert self.fuse.bias is not None
        kernel, bias = self.fuse.kernel[0, 0].astype(x.dtype), self.fuse.bias[...].astype(x.dtype)
        known = features.shape[-1]
        return x + (features @ kernel[:known] + new @ kernel[known:] + bias[None, None, None])


class Down(nnx.Module):
    """Downsampling, `[N, H, W, width] -> [N, ceil(H / 2), ceil(W / 2), 2 width]`."""

    def __init__(self, width: int, **types: Any):
        self.shrink = Conv(width, width, 3, stride=2, **types)
        self.widen = Conv(width, 2 * width, 3, **types)

    def __call__(self, x: Array) -> Array:
        return nnx.relu(self.widen(nnx.relu(self.shrink(x))))


class Up(nnx.Module):
    """Upsampling, the reverse of `Down`: `[N, ceil(H / 2), ceil(W / 2), 2 width] -> [N, H, W, width]`."""

    def __init__(self, width: int, **types: Any):
        self.enlarge = ConvTranspose(2 * width, 2 * width, 3, padding=1, **types)
        self.narrow = Conv(2 * width, width, 3, **types)

    def __call__(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Return features with the height and width of `shape`, an NHWC shape."""
        output_padding = [shape[axis] - 2 * x.shape[axis] + 1 for axis in (1, 2)]
        return nnx.relu(self.narrow(nnx.relu(self.enlarge(x, output_padding))))
