"""Layers that networks share.

All layers take and return NHWC arrays. Parameters have the type `param_dtype`, and arithmetic is done in `dtype`. Initial values
follow PyTorch's defaults (uniform in ±1/sqrt(fan_in)), because the paper's recipe was tuned with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from aecr_jax.networks.tiles import cut, picture_mean, sees_whole
from aecr_jax.ops.conv import conv, conv_1x1, conv_transpose, pad_by_reflection
from aecr_jax.ops.deform_conv import deform_conv2d
from aecr_jax.ops.gradients import delay

DType = Any


def uniform_within(fan_in: int) -> nnx.Initializer:
    """Return PyTorch's default initializer, uniform in ±1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: Array, shape: Any, dtype: DType = jnp.float32, out_sharding: Any = None) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Conv(nnx.Conv):
    """A square convolution, padded so that the output has the input's size divided by the stride.

    The padding is (size - 1) // 2 on each side: zeros, or the input's reflection. With an even `size`, the stride must be 2 and the
    input's height and width even. The initial values are PyTorch's, unless `kernel_init` or `bias_init` is given.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        *,
        stride: int = 1,
        reflect: bool = False,
        kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        init = uniform_within(in_features * size * size)
        self.reflected = (size - 1) // 2 if reflect else 0
        options.setdefault("conv_general_dilated", conv_1x1 if size == 1 and stride == 1 else conv)
        super().__init__(
            in_features,
            out_features,
            (size, size),
            strides=stride,
            # "SAME" would pad an even input on one side only when the stride is 2.
            padding="VALID" if reflect else (size - 1) // 2,
            kernel_init=kernel_init or init,
            bias_init=bias_init or init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            **options,
        )

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        if self.reflected:
            inputs = pad_by_reflection(inputs, self.reflected)
        return super().__call__(inputs, out_sharding)


class ConvTranspose(nnx.Module):
    """A square transposed convolution with stride 2 and PyTorch's initial values: `[N, H, W, C] -> [N, about 2H, about 2W, O]`.

    The call takes `output_padding`, the number of rows and of columns, 0 or 1 each, added at the bottom and at the right; by default it
    is what gives exactly twice the input's size, or none if the kernel alone reaches that size.
    """

    def __init__(
        self, in_features: int, out_features: int, size: int, *, padding: int = 0, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ):
        # PyTorch computes the fan-in from the second axis of [in, out, size, size].
        init = uniform_within(out_features * size * size)
        self.padding, self.dtype = padding, dtype
        self.kernel = nnx.Param(init(rngs.params(), (size, size, in_features, out_features), param_dtype))
        self.bias = nnx.Param(init(rngs.params(), (out_features,), param_dtype))

    def __call__(self, x: Array, output_padding: Sequence[int] | None = None) -> Array:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        missing = max(0, 2 * self.padding + 2 - kernel.shape[0])
        if output_padding is None:
            output_padding = (missing, missing)
        return conv_transpose(x.astype(self.dtype), kernel, padding=self.padding, output_padding=output_padding) + bias[None, None, None]


class PReLU(nnx.Module):
    """Parametric ReLU with one learned slope for all channels: `x` where x is positive, `slope * x` elsewhere."""

    def __init__(self, *, param_dtype: DType):
        self.slope = nnx.Param(jnp.array(0.25, param_dtype))

    def __call__(self, x: Array) -> Array:
        return jnp.where(x > 0, x, self.slope[...].astype(x.dtype) * x)


class FastDeconv(nnx.Module):
    """Network deconvolution (Ye et al., ICLR 2020) as used before the first layer in the official code: 3x3, 3 -> 3 channels.

    The layer whitens the 27 values of every 3x3 patch with statistics over the batch, and then convolves. In training, the patches
    for the statistics are sampled with stride 3; evaluation uses running averages (momentum 0.1) of their mean and of the whitening
    matrix. The 27 values are ordered by (row, column, channel), as in a flattened kernel.
    """

    EPSILON, NEWTON_SCHULZ_STEPS, MOMENTUM, SAMPLING_STRIDE = 1e-5, 5, 0.1, 3

    def __init__(self, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        size = 27
        init = uniform_within(size)
        self.dtype = dtype
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, 3, 3), param_dtype))
        self.bias = nnx.Param(init(rngs.params(), (3,), param_dtype))
        self.running_mean = nnx.BatchStat(jnp.zeros(size, param_dtype))
        self.running_deconv = nnx.BatchStat(jnp.eye(size, dtype=param_dtype))
        self.use_running_average = False

    def __call__(self, x: Array) -> Array:
        # bfloat16 is too imprecise for the statistics and the inverse square root.
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
        kernel, bias = self.merge(mean, deconv)
        y = lax.conv_general_dilated(
            x.astype(self.dtype), kernel.astype(self.dtype), (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + bias.astype(self.dtype)[None, None, None]

    def merge(self, mean: Array, deconv: Array) -> tuple[Array, Array]:
        """Return the kernel `[3, 3, C, C]` and bias `[C]` of the convolution that whitens by these statistics and applies the layer."""
        kernel = self.kernel[...]
        # Whitening is affine, so it can be merged into the kernel and the bias: K (D (x - mean)) = (K D) x - K D mean.
        whitened = deconv.T @ kernel.reshape(mean.size, -1)
        return whitened.reshape(kernel.shape), self.bias[...] - mean @ whitened

    def _patches(self, x: Array) -> Array:
        """Return the zero-padded 3x3 patches around every third pixel, `[samples, 27]`."""
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
    """Approximate `matrix^(-1/2)` of a symmetric positive definite matrix `[D, D]` by coupled Newton-Schulz iterations."""
    norm = jnp.linalg.norm(matrix)
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    y, z = matrix / norm, identity
    for _ in range(steps):
        t = 0.5 * (3 * identity - z @ y)
        y, z = y @ t, t @ z
    return z / jnp.sqrt(norm)


def recompute(function: Callable[..., Array], layers: Any, *arrays: Array) -> Array:
    """Return `function(layers, *arrays)`; in a program for CPUs, keep the arrays alone for the gradient, and compute the rest again.

    This is for what is quickly computed from the arrays before a convolution, whose own result its gradient does not need; without it,
    XLA leaves out the convolution when it computes the rest again.

    Args:
      function: it has no other inputs, no other result and no effects, except on one tile of a picture, which has no gradient.
      layers: a module or a tuple of modules, whose variables do not change.
      arrays: floating-point arrays.
    """
    if not sees_whole():
        return function(layers, *arrays)
    graph, state = nnx.split(layers)

    def apply(state: nnx.State, *arrays: Array) -> Array:
        return function(nnx.merge(graph, state), *arrays)

    def backward(residuals: tuple[nnx.State, tuple[Array, ...]], cotangent: Array) -> tuple[Any, ...]:
        state, arrays = residuals
        return jax.vjp(apply, state, *delay(arrays, cotangent))[1](cotangent)

    applied = jax.custom_vjp(apply)
    applied.defvjp(lambda state, *arrays: (apply(state, *arrays), (state, arrays)), backward)
    return applied(state, *arrays)


def gate(x: Array, down: Callable[[Array], Array], up: Callable[[Array], Array]) -> Array:
    """Return the factors in [0, 1], `sigmoid(up(relu(down(x))))`, by which attention scales features; `down` has few output channels."""
    return nnx.sigmoid(up(nnx.relu(down(x))))


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
        y, x = cut(recompute(lambda conv2, y, x: conv2(nnx.relu(y) + x), self.conv2, self.conv1(x), x), x)
        channels = gate(picture_mean(y), self.channel_down, self.channel_up)
        hidden = recompute(lambda pixel_down, y, channels: pixel_down(y * channels), self.pixel_down, y, channels)
        pixels = nnx.sigmoid(self.pixel_up(nnx.relu(hidden)))
        return recompute(lambda _, y, channels, pixels: y * channels * pixels, (), y, channels, pixels) + x


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions, added to their input: `[N, H, W, features]` -> the same shape.

    They pad with zeros, or by reflection if `reflect` is set. The call takes a function that is applied after each of them, such as
    `Corner.clear`.

    Args:
      features: channels of the input and of the output.
      activation: the function between the convolutions.
      identity: whether the weights and biases of the second convolution begin at zero, so that a new block returns its input.
      reflect: whether the convolutions pad by reflection.
    """

    def __init__(
        self,
        features: int,
        *,
        activation: Callable[[Array], Array] = nnx.relu,
        identity: bool = False,
        reflect: bool = False,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = dict(reflect=reflect, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        zeros = nnx.initializers.zeros_init() if identity else None
        self.activation = activation
        self.conv1 = Conv(features, features, 3, **options)
        self.conv2 = Conv(features, features, 3, kernel_init=zeros, bias_init=zeros, **options)

    def __call__(self, x: Array, after: Callable[[Array], Array] = lambda x: x) -> Array:
        return x + after(self.conv2(after(self.activation(self.conv1(x)))))


class DeformConv(nnx.Module):
    """Modulated deformable convolution (DCNv2), `[N, H, W, in_features] -> [N, H', W', out_features]`.

    A convolution whose weights are initialised to zero predicts the offsets, (dy, dx) per tap, and the logits of the mask. Initially,
    therefore, the layer is an ordinary convolution with its weights halved. The kernel's initial values follow PyTorch's default.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: one number, or height and width.
      strides: one number, or one each for height and width, as in `deform_conv2d`.
      padding: number of zeros added on each side, as in `deform_conv2d`; "SAME" is not supported.
      offset_groups: number of equal groups into which the channels are divided, each with its own offsets and mask.
      implementation: "xla" or "pallas", as in `deform_conv2d`.
      dtype: type of the arithmetic.
      param_dtype: type of the parameters.
      rngs: the source of the initial values (stream `params`).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        offset_groups: int = 1,
        implementation: Literal["xla", "pallas"] = "xla",
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        rows, columns = (padding, padding) if isinstance(padding, int) else tuple(padding)
        self.taps = offset_groups * kh * kw
        self.strides, self.padding, self.offset_groups, self.dtype = strides, (rows, columns), offset_groups, jnp.dtype(dtype)
        self.implementation = implementation
        zeros = nnx.initializers.zeros_init()
        self.offset_mask = nnx.Conv(
            in_features,
            3 * self.taps,
            (kh, kw),
            strides=strides,
            padding=((rows, rows), (columns, columns)),
            conv_general_dilated=conv,
            kernel_init=zeros,
            bias_init=zeros,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        init = uniform_within(kh * kw * in_features)
        self.kernel = nnx.Param(init(rngs.params(), (kh, kw, in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype))

    def __call__(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        offset_mask = self.offset_mask(x)
        offset, mask = offset_mask[..., : 2 * self.taps], nnx.sigmoid(offset_mask[..., 2 * self.taps :])
        if hasattr(self, "__captures__"):  # only inside nnx.capture; elsewhere, sow would store tracers in the model
            self.sow(nnx.Intermediate, "offset", offset)
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return deform_conv2d(
            x,
            offset,
            kernel,
            bias,
            mask=mask,
            strides=self.strides,
            padding=self.padding,
            offset_groups=self.offset_groups,
            implementation=self.implementation,
        )


class Mixup(nnx.Module):
    """Adaptive mixup (Eq. 2): `sigmoid(theta) * down + (1 - sigmoid(theta)) * up` with a learned scalar theta."""

    def __init__(self, theta: float, *, param_dtype: DType):
        self.theta = nnx.Param(jnp.array(theta, param_dtype))

    def __call__(self, down: Array, up: Array) -> Array:
        share = nnx.sigmoid(self.theta[...]).astype(down.dtype)
        return share * down + (1 - share) * up
