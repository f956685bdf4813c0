"""CoarseNet: a network of this project that estimates the haze on a coarse grid and removes it at full resolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike

from aecr_jax.networks.layers import Conv, ResidualBlock
from aecr_jax.networks.network import Network, NetworkConfig, SymbolicSizes, as_images, layer_options
from aecr_jax.ops.canvas import Corner, next_side, reflect
from aecr_jax.ops.resize import average_cells, enlarge_bilinear
from aecr_jax.settings import bounded

# Side in pixels of the cells that the first layer sees, and of the cells of the haze's maps.
STEM_CELL, MAP_CELL = 4, 8
# Side in cells of the maps of the squares over which the airlight is averaged before it is blurred.
AIRLIGHT_CELLS = 4
# The haze of images with more pixels is estimated from a reduced copy, with sides of 1/2, 1/3, ...
PIXELS = 2**20
# The least transmission, so that K is at most 49, and what is added to the network's output before the sigmoid that gives it. With it, a
# new network begins near the hazy image: K is about 0.13.
LEAST, SHIFT = 0.02, 2.0
# What is added to values and to their distances from 1, and to variances, before their logarithms are taken. Without it, the logarithms for
# black, for white and for cells of one colour would be infinite.
MARGIN, LEAST_VARIANCE = 0.02, 1e-4
# Number of values that `Moments.features` gives for each cell: eight for each of three channels.
FEATURES = 24


@dataclass(frozen=True, kw_only=True)
class CoarseNetConfig(NetworkConfig):
    """The settings of CoarseNet. The defaults give 0.93M parameters.

    Raises:
      ValueError: a field has the wrong type or a value outside its range.
    """

    NAME = "coarse_net"

    width: int = bounded(48, 2, 4096)
    """Number of channels at 1/4 and 1/8 of the resolution. There are 4/3 times as many at 1/16, and twice as many at 1/32."""
    blocks: int = bounded(2, 1, 1000)
    """Number of residual blocks at each level, both before and after the next coarser one."""


class CoarseNet(Network):
    """Restores hazy images by the scattering model, `x + K x - K A`, with K = 1 / t - 1 and the airlight A from a coarse grid.

    Haze is smooth: the true 1 / t, averaged over squares of 8x8 pixels and enlarged again, restores images of NYU Depth v2 to 40 dB. So
    all layers work at 1/4 to 1/32 of the resolution, and only the enlargement of the maps and the formula at the full one. The first
    layer sees the 48 values of squares of 4x4 pixels. It and the first layer of each coarser level also see the `Moments` of their cells.
    These include the least value in each channel, which the dark channel prior uses (He et al., CVPR 2009), and logarithms, because t is
    the sigmoid of the network's output: where something in a cell is black and the airlight is white, the least value is 1 - t, and the
    output that gives t is log t - log(1 - t). Haze also multiplies the standard deviation within a cell by t. The mean of the coarsest
    features over the whole image is added to them, because the airlight is one for all. The airlight may still vary slowly from place to
    place, as it does near the sun.

    The network maps `[N, H, W, 3]` in [0, 1] to the same shape, approximately in [0, 1], not clipped.

    Args:
      config: the settings.
      rngs: the source of the initial values (stream `params`).

    Raises:
      ValueError: an argument has the wrong type.
    """

    Config = CoarseNetConfig
    MULTIPLE = 32
    NEEDS_TILES = False

    def __init__(self, config: CoarseNetConfig = CoarseNetConfig(), *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        types = layer_options(config, rngs)
        widths = [config.width, config.width * 4 // 3, config.width * 2]

        def blocks(features: int) -> nnx.Sequential:
            return nnx.Sequential(*[ResidualBlock(features, activation=nnx.silu, identity=True, **types) for _ in range(config.blocks)])

        self.stem = Conv(3 * STEM_CELL**2 + FEATURES, config.width, 1, **types)
        self.downs = nnx.List([Conv(i, o, 3, stride=2, **types) for i, o in zip([config.width, *widths], widths)])
        self.moments = nnx.List([Conv(FEATURES, features, 1, **types) for features in widths])
        self.encoder = nnx.List([blocks(features) for features in widths])
        self.context = Conv(widths[-1], widths[-1], 1, **types)
        self.ups = nnx.List([Conv(i, o, 1, **types) for i, o in zip(widths[1:], widths)])
        self.decoder = nnx.List([blocks(features) for features in widths[:-1]])
        self.maps = Conv(config.width, 4, 3, **types)

    def __call__(self, hazy: ArrayLike) -> Array:
        return self.restore_with_haze(hazy)[0]

    @classmethod
    def estimates_haze(cls, config: NetworkConfig) -> bool:
        return True

    @classmethod
    def haze_cell(cls, height: int, width: int) -> int:
        return MAP_CELL * _reduction(height, width)

    def estimate_haze(self, hazy: ArrayLike) -> tuple[Array, Array]:
        hazy = as_images(hazy)
        reduction = _reduction(*hazy.shape[1:3])
        return self._estimate(average_cells(self.pad(hazy, self.MULTIPLE * reduction), reduction))

    def remove_haze(self, hazy: ArrayLike, gain: Array, offset: Array) -> Array:
        hazy = as_images(hazy)
        return _remove(hazy, gain, offset, self.haze_cell(*hazy.shape[1:3]))

    def canvas_size(self, height: int, width: int) -> tuple[int, int] | None:
        if height * width > PIXELS:  # a canvas would take more memory, and large images have few sizes: those of cameras
            return None
        return next_side(height), next_side(width)

    def restore_on_canvas(self, canvas: ArrayLike, height: ArrayLike, width: ArrayLike) -> Array:
        canvas = as_images(canvas, "canvas")
        h, w = jnp.asarray(height), jnp.asarray(width)
        corner = Corner(
            (canvas.shape[1] // self.MULTIPLE, canvas.shape[2] // self.MULTIPLE), (-(-h // self.MULTIPLE), -(-w // self.MULTIPLE))
        )
        return _remove(canvas, *self._estimate(reflect(reflect(canvas, 1, h), 2, w), corner), MAP_CELL)

    def symbolic_sizes(self) -> SymbolicSizes:
        return SymbolicSizes(self.MULTIPLE, pixels=PIXELS)  # above, the reduction depends on the size

    def _estimate(self, images: Array, corner: Corner | None = None) -> tuple[Array, Array]:
        """Return the maps of `estimate_haze` for images whose sides are multiples of `MULTIPLE`, or for the part of them in a corner."""
        clear, extend, mean = (corner.clear, corner.extend, corner.mean) if corner else (_same, _same, _mean)
        moments = Moments.of(images, STEM_CELL)
        x = clear(nnx.silu(self.stem(jnp.concatenate([_cells(images, STEM_CELL), moments.features()], -1))))
        levels = []
        for down, see, blocks in zip(self.downs, self.moments, self.encoder):
            moments = moments.pool(2)
            x = clear(nnx.silu(down(x) + see(moments.features())))
            for block in blocks.layers:
                x = block(x, clear)
            levels.append(x)
        x = levels.pop()
        x = clear(x + self.context(mean(x)))
        for up, blocks, finer in zip(reversed(self.ups), reversed(self.decoder), reversed(levels)):
            x = clear(finer + enlarge_bilinear(extend(up(x)), 2))
            for block in blocks.layers:
                x = block(x, clear)
        maps = extend(self.maps(x))
        maps = maps.astype(jnp.promote_types(images.dtype, jnp.float32))
        transmission = LEAST + (1 - LEAST) * nnx.sigmoid(maps[..., :1] + SHIFT)
        gain = 1 / transmission - 1
        return gain, gain * _smooth_airlight(gain, nnx.sigmoid(maps[..., 1:]), extend)


def _same(x: Array) -> Array:
    return x


def _mean(x: Array) -> Array:
    return x.mean((1, 2), keepdims=True)


def _smooth_airlight(gain: Array, airlight: Array, extend: Callable[[Array], Array]) -> Array:
    """Return the airlight's mean over the surroundings of each cell, weighted by the gain, so that it is taken from where haze is dense.

    The airlight of a scene is constant or varies slowly. Where K is 5, a difference of 0.01 between neighbouring cells would show as a
    patch that is brighter or darker by 0.05.
    """
    sums = average_cells(jnp.concatenate([gain, gain * airlight], -1), AIRLIGHT_CELLS)
    for _ in range(2):
        sums = extend(sums)
        for axis in (1, 2):
            sums = _blur(sums, axis)
    sums = enlarge_bilinear(extend(sums), AIRLIGHT_CELLS)
    return sums[..., 1:] / (sums[..., :1] + 1e-6)  # K, and with it the sum, may be 0


def _blur(x: Array, axis: int) -> Array:
    """Return the means of three values along an axis, weighted by 1, 2 and 1; the border is extended by its outermost values."""
    n = x.shape[axis]
    widened = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)], mode="edge")
    before, after = (lax.slice_in_dim(widened, start, start + n, axis=axis) for start in (0, 2))
    return (before + 2 * x + after) / 4


def _remove(hazy: Array, gain: Array, offset: Array, cell: int) -> Array:
    h, w = hazy.shape[1:3]
    factor, subtracted = (enlarge_bilinear(x, cell)[:, :h, :w] for x in (1 + gain, offset))
    return (factor * hazy - subtracted).astype(hazy.dtype)


def _reduction(height: int, width: int) -> int:
    """Return the factor by which the sides of images of this size are reduced before their haze is estimated."""
    reduction = 1
    while height * width > PIXELS * reduction**2:  # unlike a square root, this also works for sizes that are symbols
        reduction += 1
    return reduction


def _cells(images: Array, side: int) -> Array:
    """Return all values of square cells, ordered by row, column and colour: `[N, H, W, C] -> [N, H/s, W/s, C s s]`."""
    n, h, w, c = images.shape
    return images.reshape(n, h // side, side, w // side, side, c).swapaxes(2, 3).reshape(n, h // side, w // side, side * side * c)


class Moments(NamedTuple):
    """What the network sees of square cells: their extremes, means and variances in each channel, `[N, H/s, W/s, C]` each."""

    least: Array
    greatest: Array
    mean: Array
    variance: Array

    @classmethod
    def of(cls, images: Array, side: int) -> Moments:
        """Return the moments of cells of `side` x `side` pixels of images `[N, H, W, C]`, clipped to [0, 1], in at least float32.

        H and W must be multiples of `side`.
        """
        x = images.astype(jnp.promote_types(images.dtype, jnp.float32)).clip(0, 1)
        return cls(x, x, x, jnp.zeros_like(x)).pool(side)

    def pool(self, side: int) -> Moments:
        """Return the moments of cells that consist of `side` x `side` of these."""

        def cells(x: Array) -> Array:
            n, h, w, c = x.shape
            return x.reshape(n, h // side, side, w // side, side, c)

        # The mean of squares minus the square of the mean would be inexact where a cell has one colour.
        means = cells(self.mean)
        mean = means.mean((2, 4), keepdims=True)
        variance = (cells(self.variance) + (means - mean) ** 2).mean((2, 4))
        return Moments(cells(self.least).min((2, 4)), cells(self.greatest).max((2, 4)), mean.squeeze((2, 4)), variance)

    def features(self) -> Array:
        """Return `[N, H/s, W/s, 8 C]`: the extremes, and logarithms of extremes, distances from 1, means and standard deviations."""
        extremes = jnp.concatenate([self.least, self.greatest], -1)
        logarithms = [extremes + MARGIN, 1 + MARGIN - extremes, self.mean + MARGIN, jnp.sqrt(self.variance + LEAST_VARIANCE)]
        return jnp.concatenate([extremes, *map(jnp.log, logarithms)], -1)
