"""DehazeNet, a small network that estimates the transmission, and the removal of haze with it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike

from aecr_jax.networks.layers import DType, uniform_within
from aecr_jax.networks.network import Network, NetworkConfig, SymbolicSizes, as_images, layer_options
from aecr_jax.networks.tiles import given_airlight
from aecr_jax.ops.conv import conv_few_inputs, conv_one_output
from aecr_jax.ops.guided_filter import guided_filter
from aecr_jax.ops.windows import window_max
from aecr_jax.settings import bounded

# MATLAB's rgb2gray with all its digits: the airlight is that of the pixels with exactly the greatest grey value.
GREY = (0.298936021293775, 0.587043074451121, 0.114020904255103)
# In training, haze is removed as if the transmission were at least this. Dividing by less would make gradients unbounded.
_LEAST_IN_TRAINING = 0.05
# In evaluation, transmissions nearer to 0 than this are replaced by it, so that no result is infinite.
SMALLEST = 1e-6


@dataclass(frozen=True, kw_only=True)
class DehazeNetConfig(NetworkConfig):
    """The settings of DehazeNet. The defaults are those of the authors' code, whose network has 8,305 parameters.

    Raises:
      ValueError: a field has the wrong type or a value outside its range.
    """

    NAME = "dehaze_net"

    least_transmission: float = bounded(0.0, 0, 1)
    """The haze is removed as if the transmission were at least this; 0 divides by the transmission as it is. In training it is at
    least 0.05."""
    radius: int = bounded(50, 1)
    """Radius of the guided filter in pixels."""
    epsilon: float = bounded(1e-3, 1e-12)
    """Variance of the grey image below which the guided filter smooths."""


class DehazeNet(Network):
    """Restores hazy images with an estimated transmission (Cai et al., "DehazeNet", TIP 2016).

    The layers and their order are those of the authors' MATLAB code (`run_cnn.m`, `guidedfilter.m`): a convolution with maxout, three
    convolutions of different sizes, a local maximum, and a convolution whose output is clamped to [0, 1] (BReLU) give the transmission.
    The guided filter refines it, and the airlight comes from the brightest of the 1% of pixels with the least transmission. The article
    describes the network for patches of 16x16 pixels, without padding; the code applies it to whole images, and every convolution pads
    by mirroring the image with its edge pixels. 0.5 is subtracted from the input.

    The network maps `[N, H, W, 3]` in [0, 1] to the same shape, approximately in [0, 1], not clipped. It is trained either by its
    transmission (`aecr_jax.losses.transmission`) or by the restored image; after `model.train()`, the transmission that divides is at
    least 0.05. bfloat16 is used for the convolutions only.

    Args:
      config: the settings.
      rngs: the source of the initial values (stream `params`).

    Raises:
      ValueError: an argument has the wrong type.
    """

    Config = DehazeNetConfig
    FINDS_AIRLIGHT = True

    def __init__(self, config: DehazeNetConfig = DehazeNetConfig(), *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        types = layer_options(config, rngs)
        self.features = MaxoutConv(3, 4, 5, **types)
        self.scales = MultiScaleConv(4, 16, (3, 5, 7), **types)
        self.local_maximum = LocalMaximum(radius=3)
        # The clamp has no gradient outside [0, 1], so the estimates start in the middle.
        self.estimate = MirroredConv(48, 1, 6, conv=conv_one_output, bias_init=nnx.initializers.constant(0.5), **types)
        self.deterministic = False  # set by `train` and `eval`

    def __call__(self, hazy: ArrayLike) -> Array:
        given = as_images(hazy)
        images = self._convert(given)
        transmission = self._estimate(images)
        airlight = given_airlight()
        airlight = (self.airlight(given, transmission) if airlight is None else airlight)[:, None, None]
        transmission = self.refine(given, transmission)
        least = self.config.least_transmission
        if not self.deterministic:
            least = max(least, _LEAST_IN_TRAINING)
        if not least:
            transmission = jnp.where(jnp.abs(transmission) < SMALLEST, SMALLEST, transmission)
        else:
            transmission = jnp.maximum(transmission, least)
        return ((images - airlight) / transmission + airlight).astype(given.dtype)

    def transmission(self, hazy: ArrayLike) -> Array:
        """Return the transmission that the layers estimate, before its refinement: `[N, H, W, 1]` in [0, 1]."""
        return self._estimate(self._convert(hazy)).astype(as_images(hazy).dtype)

    def airlight_clues(self, hazy: ArrayLike) -> Array:
        return self.transmission(hazy)

    def airlight(self, hazy: ArrayLike, clues: Array) -> Array:
        """Return the colour of the airlight of each image, `[N, 3]`: that of the brightest pixel among those with little transmission.

        Candidates are the pixels whose transmission is at most that of rank `round(N / 100)` from below, N their number. If several of
        them are the brightest, the mean of their colours is returned.

        Args:
          hazy: `[N, H, W, 3]` in [0, 1].
          clues: the transmission before its refinement, `[N, H, W, 1]`.
        """
        images = self._convert(hazy)
        n, h, w, _ = images.shape
        # The airlight is a colour of the image; which one is not differentiable.
        negated = -lax.stop_gradient(clues).reshape(n, h * w)
        least, _ = lax.top_k(negated, max((h * w + 50) // 100, 1))
        # By their minimum: XLA would merge the slice of the last one with top_k into the sort of all pixels.
        grey = jnp.where(negated >= least.min(1, keepdims=True), lax.stop_gradient(self._grey(images)).reshape(n, h * w), -jnp.inf)
        greatest, index = grey.max(1, keepdims=True), grey.argmax(1, keepdims=True)
        # The first is chosen by its index too: XLA may compute its grey value twice, with different rounding.
        chosen = (grey == greatest) | (jnp.arange(h * w)[None] == index)
        colours = jnp.moveaxis(images, -1, 1).reshape(n, 3, h * w)
        first = jnp.take_along_axis(colours, index[:, None], 2)  # [N, 3, 1]
        # The mean of the differences, as the sum of a million colours would lose digits.
        difference = jnp.where(chosen[:, None], colours - first, 0).sum(2) / chosen.sum(1, keepdims=True)
        return first[..., 0] + difference

    def symbolic_sizes(self) -> SymbolicSizes:
        return SymbolicSizes(self.MULTIPLE, least=max(32, self.config.radius + 1))

    def refine(self, hazy: ArrayLike, transmission: Array) -> Array:
        """Return the transmission `[N, H, W, 1]` filtered along the edges of the grey hazy image."""
        grey = self._grey(self._convert(hazy))
        return guided_filter(grey, transmission[..., 0], radius=self.config.radius, epsilon=self.config.epsilon)[..., None]

    def _estimate(self, images: Array) -> Array:
        x = self.features(images.astype(self.config.dtype) - 0.5)
        x = self.local_maximum(self.scales(x))
        return self.estimate(x).clip(0, 1).astype(images.dtype)

    def _grey(self, images: Array) -> Array:
        red, green, blue = jnp.moveaxis(images, -1, 0)
        return GREY[0] * red + GREY[1] * green + GREY[2] * blue

    def _convert(self, hazy: ArrayLike) -> Array:
        return as_images(hazy).astype(jnp.promote_types(self.config.dtype, jnp.float32))


class MirroredConv(nnx.Module):
    """A square convolution that keeps the image's size; the image is mirrored at its border, its edge pixels repeated.

    With an even `size`, one pixel more is padded at the bottom and the right.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        *,
        conv: Any = lax.conv_general_dilated,
        bias_init: nnx.Initializer | None = None,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
    ):
        init = uniform_within(in_features * size * size)
        self.conv, self.dtype = conv, dtype
        self.kernel = nnx.Param(init(rngs.params(), (size, size, in_features, out_features), param_dtype))
        self.bias = nnx.Param((bias_init or init)(rngs.params(), (out_features,), param_dtype))

    def __call__(self, x: Array) -> Array:
        return self._convolve(x, self.kernel[...], self.bias[...])

    def _convolve(self, x: Array, kernel: Array, bias: Array) -> Array:
        pads = ((kernel.shape[0] - 1) // 2, kernel.shape[0] // 2)
        x = jnp.pad(x.astype(self.dtype), ((0, 0), pads, pads, (0, 0)), mode="symmetric")
        y = self.conv(x, kernel.astype(self.dtype), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + bias.astype(self.dtype)[None, None, None]


class MaxoutConv(MirroredConv):
    """A mirrored convolution of an image whose results are the maxima of four consecutive output channels each (maxout)."""

    PIECES = 4

    def __init__(self, in_features: int, out_features: int, size: int, **options: Any):
        super().__init__(in_features, self.PIECES * out_features, size, conv=conv_few_inputs, **options)

    def __call__(self, x: Array) -> Array:
        # The kernels are put in another order, so that the maximum is over large slices; over single channels it is slow on CPUs.
        order = np.arange(self.bias.shape[0]).reshape(-1, self.PIECES).T.ravel()
        y = self._convolve(x, self.kernel[...][..., order], self.bias[...][order])
        return functools.reduce(jnp.maximum, jnp.split(y, self.PIECES, -1))


class MultiScaleConv(nnx.Module):
    """Parallel mirrored convolutions with kernels of several odd sizes, their outputs concatenated."""

    def __init__(self, in_features: int, out_features: int, sizes: tuple[int, ...], *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        self.convs = nnx.List(
            [MirroredConv(in_features, out_features, size, dtype=dtype, param_dtype=param_dtype, rngs=rngs) for size in sizes]
        )

    def __call__(self, x: Array) -> Array:
        return jnp.concatenate([conv(x) for conv in self.convs], -1)


class LocalMaximum(nnx.Module):
    """The maximum over the window of `2 radius + 1` rows and columns around each pixel, cut at the border."""

    def __init__(self, radius: int):
        self.radius = radius

    def __call__(self, x: Array) -> Array:
        return window_max(x, self.radius)
