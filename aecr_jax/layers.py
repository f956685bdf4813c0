"""The parts that AECR-Net is made of.

All take and give NHWC arrays. Parameters have `param_dtype`; arithmetic is done in `dtype`. Initial values follow PyTorch's
defaults (uniform within 1/sqrt(fan_in)), because the paper's recipe was tuned with them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from aecr_jax.deform_conv import deform_conv2d

DType = Any


def uniform_within(fan_in: int) -> nnx.Initializer:
    """PyTorch's default initializer: uniform in ±1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: Array, shape: Any, dtype: DType = jnp.float32, out_sharding: Any = None) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Conv(nnx.Conv):
    """A square convolution with PyTorch's initial values and padding to the input's size over the stride."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        *,
        stride: int = 1,
        reflect: bool = False,
        zero_init: bool = False,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        init = nnx.initializers.zeros_init() if zero_init else uniform_within(in_features * size * size)
        super().__init__(
            in_features,
            out_features,
            (size, size),
            strides=stride,
            # Not "SAME": with stride 2 and an even size it would pad one side only.
            padding="REFLECT" if reflect else size // 2,
            kernel_init=init,
            bias_init=init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            **options,
        )


class UpConv(nnx.Module):
    """3x3 transposed convolution, stride 2, padding 1, output padding 1: `[N, H, W, C] -> [N, 2H, 2W, O]`.

    Each of the four output phases (even and odd rows and columns) is a convolution of its own with its share of the nine taps,
    woven together. XLA's own form (one convolution with `lhs_dilation`) has a weight gradient that runs in a naive loop on the CPU.
    """

    def __init__(self, in_features: int, out_features: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        # PyTorch takes the second axis of [in, out, 3, 3] for the fan-in.
        init = uniform_within(out_features * 9)
        self.dtype = dtype
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, in_features, out_features), param_dtype))
        self.bias = nnx.Param(init(rngs.params(), (out_features,), param_dtype))

    def __call__(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        n, h, w, _ = x.shape
        out_features = kernel.shape[3]
        padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        # Output row 2i + tap - 1 takes input row i: even rows by tap 1, odd ones by tap 2 from i and by tap 0 from i + 1.
        even, odd = slice(1, 2), slice(None, None, -2)
        even_even = _conv(x, kernel[even, even])
        even_odd = _conv(padded[:, :-1], kernel[even, odd])
        odd_even = _conv(padded[:, :, :-1], kernel[odd, even])
        odd_odd = _conv(padded, kernel[odd, odd])
        rows = [jnp.stack([even_even, even_odd], 3), jnp.stack([odd_even, odd_odd], 3)]  # [N, H, W, 2, O] each
        # Not -1 for the last axis: a batch of 0 images leaves it undefined.
        return jnp.stack(rows, 2).reshape(n, 2 * h, 2 * w, out_features) + bias[None, None, None]


def _conv(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def conv_few_inputs(x: Array, kernel: Array, strides: Any, padding: Any, **_: Any) -> Array:
    """`lax.conv_general_dilated` for stride 1, no padding and few input channels: `[N, H, W, C], [kh, kw, C, O] -> [N, H', W', O]`.

    The taps of a row become channels, which leaves a convolution along columns. It is its gradient in `x`, a convolution with few
    outputs, that profits on a CPU (see `conv_few_outputs`). Meant for `nnx.Conv(conv_general_dilated=...)`.
    """
    _check_plain(strides, padding)
    kh, kw, c, o = kernel.shape
    width = x.shape[2] - kw + 1
    shifted = jnp.concatenate([x[:, :, j : j + width] for j in range(kw)], -1)
    return _conv(shifted, kernel.reshape(kh, 1, kw * c, o))


def conv_few_outputs(x: Array, kernel: Array, strides: Any, padding: Any, **_: Any) -> Array:
    """`conv_few_inputs` for few output channels: the taps of a row become outputs, which are then shifted and added up.

    Three outputs leave most of a CPU's vector unused: a 7x7 convolution of 64 channels took half of the network's time.
    """
    _check_plain(strides, padding)
    kh, kw, c, o = kernel.shape
    width = x.shape[2] - kw + 1
    taps = _conv(x, kernel.swapaxes(1, 2).reshape(kh, 1, c, kw * o))
    # Added in float32 at least: a bfloat16 network's sums would be rounded once more at each tap.
    terms = [taps[:, :, j : j + width, j * o : (j + 1) * o].astype(jnp.promote_types(x.dtype, jnp.float32)) for j in range(kw)]
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def _check_plain(strides: Any, padding: Any) -> None:
    if tuple(strides) != (1, 1) or padding != "VALID":
        raise ValueError(f"strides (={strides}) must be (1, 1) and padding (={padding!r}) 'VALID'")


class FastDeconv(nnx.Module):
    """Network deconvolution (Ye et al., ICLR 2020) as the official code puts it before the first layer: 3x3, 3 -> 3 channels.

    Whitens the 27 values of every 3x3 patch over the batch, then convolves. In training the patches are sampled with stride 3;
    evaluation uses running averages (momentum 0.1) of their mean and of the whitening matrix. The order of the 27 is
    (row, column, channel), that of a flattened kernel.
    """

    EPSILON, NEWTON_SCHULZ_STEPS, MOMENTUM, SAMPLING_STRIDE = 1e-5, 5, 0.1, 3

    def __init__(self, features: int = 3, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        size = 9 * features
        init = uniform_within(size)
        self.dtype = dtype
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, features, features), param_dtype))
        self.bias = nnx.Param(init(rngs.params(), (features,), param_dtype))
        self.running_mean = nnx.BatchStat(jnp.zeros(size, param_dtype))
        self.running_deconv = nnx.BatchStat(jnp.eye(size, dtype=param_dtype))
        self.use_running_average = False

    def __call__(self, x: Array) -> Array:
        # Statistics and the inverse square root lose all meaning in bfloat16.
        x = x.astype(self.kernel.dtype)
        if self.use_running_average:
            mean, deconv = self.running_mean[...], self.running_deconv[...]
        else:
            if not x.size:
                raise ValueError(f"x has shape {x.shape}: without images there are no statistics to whiten by; call model.eval() first")
            patches = self._patches(x)
            mean = patches.mean(0)
            centred = patches - mean[None]
            identity = jnp.eye(mean.size, dtype=x.dtype)
            covariance = centred.T @ centred / patches.shape[0] + self.EPSILON * identity
            deconv = inverse_square_root(covariance, self.NEWTON_SCHULZ_STEPS)
            for average, now in ((self.running_mean, mean), (self.running_deconv, deconv)):
                average[...] = (1 - self.MOMENTUM) * average[...] + self.MOMENTUM * lax.stop_gradient(now)
        kernel = self.kernel[...]
        # Whitening is linear, so it goes into the kernel: K (D (x - mean)) = (K D) x - K D mean.
        whitened = deconv.T @ kernel.reshape(mean.size, -1)
        bias = self.bias[...] - mean @ whitened
        y = lax.conv_general_dilated(
            x.astype(self.dtype),
            whitened.reshape(kernel.shape).astype(self.dtype),
            (1, 1),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias.astype(self.dtype)[None, None, None]

    def _patches(self, x: Array) -> Array:
        """`[samples, 27]`: the zero-padded 3x3 patches around every third pixel."""
        stride = self.SAMPLING_STRIDE
        rows, columns = (-(-size // stride) for size in x.shape[1:3])
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [
            padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride][:, :rows, :columns]
            for i in range(3)
            for j in range(3)
        ]
        return jnp.concatenate(taps, -1).reshape(-1, 9 * x.shape[-1])


def inverse_square_root(matrix: Array, steps: int) -> Array:
    """Approximates `matrix^(-1/2)` of a symmetric positive definite matrix `[D, D]` by coupled Newton-Schulz iterations."""
    norm = jnp.linalg.norm(matrix)
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    y, z = matrix / norm, identity
    for _ in range(steps):
        t = 0.5 * (3 * identity - z @ y)
        y, z = y @ t, t @ z
    return z / jnp.sqrt(norm)


class FABlock(nnx.Module):
    """Feature-attention block (FFA-Net, Qin et al., AAAI 2020): two convolutions, channel attention, pixel attention."""

    REDUCTION = 8

    def __init__(self, features: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        hidden = max(1, features // self.REDUCTION)
        self.conv1 = Conv(features, features, 3, **types)
        self.conv2 = Conv(features, features, 3, **types)
        self.channel_down = Conv(features, hidden, 1, **types)
        self.channel_up = Conv(hidden, features, 1, **types)
        self.pixel_down = Conv(features, hidden, 1, **types)
        self.pixel_up = Conv(hidden, 1, 1, **types)

    def __call__(self, x: Array) -> Array:
        y = nnx.relu(self.conv1(x)) + x
        y = self.conv2(y)
        mean = y.mean((1, 2), keepdims=True)
        y = y * nnx.sigmoid(self.channel_up(nnx.relu(self.channel_down(mean))))
        y = y * nnx.sigmoid(self.pixel_up(nnx.relu(self.pixel_down(y))))
        return y + x


class DeformConv(nnx.Module):
    """3x3 modulated deformable layer (DCNv2); its offsets and mask come from a convolution that starts at zero."""

    def __init__(self, features: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        self.dtype = dtype
        self.offset_mask = Conv(features, 27, 3, zero_init=True, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.kernel = nnx.Param(uniform_within(9 * features)(rngs.params(), (3, 3, features, features), param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))

    def __call__(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        offset_mask = self.offset_mask(x)
        offset, mask = offset_mask[..., :18], nnx.sigmoid(offset_mask[..., 18:])
        if hasattr(self, "__captures__"):  # only inside nnx.capture: elsewhere sow would store tracers in the model
            self.sow(nnx.Intermediate, "offset", offset)
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return deform_conv2d(x, offset, kernel, bias, mask=mask, padding=1)


class Mixup(nnx.Module):
    """Adaptive mixup (Eq. 2): `sigmoid(theta) * down + (1 - sigmoid(theta)) * up` with a learned scalar theta."""

    def __init__(self, theta: float, *, param_dtype: DType):
        self.theta = nnx.Param(jnp.array(theta, param_dtype))

    def __call__(self, down: Array, up: Array) -> Array:
        share = nnx.sigmoid(self.theta[...]).astype(down.dtype)
        return share * down + (1 - share) * up
