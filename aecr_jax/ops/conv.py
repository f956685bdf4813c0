"""Transposed convolutions, and convolutions with few input or output channels, in forms that XLA compiles to fast code for CPUs.

XLA's CPU backend is slow at the usual forms. GPUs and TPUs use the usual forms, because these forms have not been measured there. The
choice is made when a program is compiled for a platform, by `lax.platform_dependent`, so that an exported program also has the right
form for each platform.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from aecr_jax.ops.gradients import delay_on_cpu, with_cpu_gradient

_FOLD = 4  # columns that `conv_few_channels` computes at a time


Form = Callable[[Array, Array], Array]


def _by_platform(cpu: Form, usual: Form, x: Array, y: Array, *, input_gradient: Form | None = None) -> Array:
    """Return `cpu(x, y)` where the program is compiled for a CPU, and `usual(x, y)`, which has the same value, elsewhere.

    All functions must be linear in each argument. The gradient chooses in the same way and keeps the arguments only; differentiating
    `lax.platform_dependent` itself would keep the intermediate results of both forms. Only reverse-mode differentiation is supported.

    Args:
      cpu: the form for CPUs.
      usual: the form for other platforms.
      x: the first argument.
      y: the second argument.
      input_gradient: a third form of the same function, whose gradient with respect to `x` is better on CPUs than that of `cpu`.
    """

    def choose(x: Array, y: Array) -> Array:
        return usual(x, y) if cpu is usual else lax.platform_dependent(x, y, cpu=cpu, default=usual)

    def forward(x: Any, y: Any) -> tuple[Array, Any]:
        # Which gradients are wanted is kept as None or an empty tuple, because residuals hold arrays and structure alone.
        wanted = tuple(() if argument.perturbed else None for argument in (x, y))
        return choose(x.value, y.value), (x.value, y.value, wanted)

    def backward(residuals: Any, cotangent: Any) -> tuple[Array | None, Array | None]:
        x, y, wanted = residuals
        if isinstance(cotangent, SymbolicZero):
            return None, None

        def gradients(of_x: Form, of_y: Form, delay: Form) -> Callable[..., list[Array]]:
            def transpose(x: Array, y: Array, cotangent: Array) -> list[Array]:
                late = delay(x, cotangent)
                maps = ((lambda x: of_x(x, y), x), (lambda y: of_y(late, y), y))
                found = [
                    jax.linear_transpose(function, argument)(cotangent)[0]
                    for (function, argument), want in zip(maps, wanted)
                    if want is not None
                ]
                # So that the kernel's gradient comes first, and the cotangent is not kept for it.
                return [delay(*found), found[1]] if len(found) == 2 else found

            return transpose

        on_cpu, elsewhere = gradients(input_gradient or cpu, cpu, delay_on_cpu), gradients(usual, usual, lambda x, _: x)
        found = iter(lax.platform_dependent(x, y, cotangent, cpu=on_cpu, default=elsewhere))
        grad_x, grad_y = (None if want is None else next(found) for want in wanted)
        return grad_x, grad_y

    function = jax.custom_vjp(choose)
    function.defvjp(forward, backward, symbolic_zeros=True)
    return function(x, y)


def conv(x: Array, kernel: Array, strides: Any, padding: Any, **options: Any) -> Array:
    """Convolve as `lax.conv_general_dilated` does, with a gradient that keeps little in memory (see `aecr_jax.ops.gradients`)."""
    usual = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    return _by_platform(usual, usual, x, kernel)


def _cpu_form(narrow: Callable[..., Array]) -> Callable[..., Array]:
    """Decorate a form of a convolution with stride 1 for CPUs; other platforms use `lax.conv_general_dilated`."""

    @functools.wraps(narrow)
    def conv(x: Array, kernel: Array, strides: Any, padding: Any, **_: Any) -> Array:
        if tuple(strides) != (1, 1):
            raise ValueError(f"strides (={strides}) must be (1, 1)")
        if isinstance(padding, str) and padding != "VALID":
            raise ValueError(f"padding (={padding!r}) must be 'VALID' or two pairs of numbers")

        def usual(x: Array, kernel: Array) -> Array:
            return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

        return _by_platform(lambda x, kernel: narrow(_pad(x, padding), kernel), usual, x, kernel)

    return conv


def conv_transpose(x: Array, kernel: Array, *, padding: int = 0, output_padding: Sequence[int] = (0, 0)) -> Array:
    """Apply a transposed convolution with stride 2, as PyTorch's `ConvTranspose2d` defines it.

    Each of the four output phases (even and odd rows and columns) is computed by a convolution with its share of the taps, and the four
    results are interleaved. If the kernel's size is even, all phases have equally many taps, and one convolution with four times as many
    outputs computes them; few outputs would leave much of a CPU's vector registers unused. The usual form, one convolution with
    `lhs_dilation`, which is used on other platforms, has a weight gradient that XLA computes in a naive loop on the CPU. Its input
    gradient is a convolution with stride 2, which takes less memory than the sum of four and is used on all platforms.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[k, k, C, O]`, k at least 2.
      padding: number of rows and columns removed from each side of the full result.
      output_padding: number of rows and of columns, 0 or 1 each, added at the bottom and at the right.

    Returns:
      `[N, 2 (H - 1) + k - 2 padding + output_padding[0], ..., O]`.
    """
    before = kernel.shape[0] - 1 - padding

    def usual(x: Array, kernel: Array) -> Array:
        pads = [(before, before + extra) for extra in output_padding]
        dilation: dict[str, Any] = {"lhs_dilation": (2, 2), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return lax.conv_general_dilated(x, kernel[::-1, ::-1], (1, 1), pads, **dilation)

    phases = functools.partial(_conv_transpose_by_phases, padding=padding, output_padding=output_padding)
    return _by_platform(phases, usual, x, kernel, input_gradient=usual)


def _conv_transpose_by_phases(x: Array, kernel: Array, *, padding: int, output_padding: Sequence[int]) -> Array:
    n, o = x.shape[0], kernel.shape[3]
    sizes = [2 * (x.shape[axis] - 1) + kernel.shape[0] - 2 * padding + output_padding[axis - 1] for axis in (1, 2)]
    rows, columns = (-(-size // 2) for size in sizes)  # of one phase
    taps, shifts, befores = [], [], []
    for phase in (0, 1):
        # Input i contributes to output 2 i + tap - padding. Output 2 j + phase thus uses the taps first, first + 2, ... on the inputs
        # j + shift, j + shift - 1, ...
        shift, first = divmod(phase + padding, 2)
        taps.append(slice(first, None, 2))
        shifts.append(shift)
        befores.append(len(range(first, kernel.shape[0], 2)) - 1 - shift)
    before = max(0, *befores)
    after = [max(0, count + max(shifts) - x.shape[axis]) for axis, count in ((1, rows), (2, columns))]
    padded = jnp.pad(x, ((0, 0), (before, after[0]), (before, after[1]), (0, 0)))

    def kernel_of(row: int, column: int) -> Array:
        return kernel[taps[row], taps[column]][::-1, ::-1]

    combined = None
    if kernel.shape[0] % 2 == 0:
        combined = _conv(padded, jnp.concatenate([kernel_of(row, column) for row in (0, 1) for column in (0, 1)], -1))

    def compute(row: int, column: int) -> Array:
        top, left = before - befores[row], before - befores[column]
        if combined is not None:
            first = (2 * row + column) * o
            return combined[:, top : top + rows, left : left + columns, first : first + o]
        window = kernel_of(row, column)
        part = padded[:, top : top + rows + window.shape[0] - 1, left : left + columns + window.shape[1] - 1]
        return _conv(part, window)

    phases = [jnp.stack([compute(row, 0), compute(row, 1)], 3) for row in (0, 1)]  # [N, rows, columns, 2, O] each
    # The last axis cannot be given as -1, because its size would be undefined for a batch of 0 images.
    return jnp.stack(phases, 2).reshape(n, 2 * rows, 2 * columns, o)[:, : sizes[0], : sizes[1]]


def _conv(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@_cpu_form
def conv_few_inputs(x: Array, kernel: Array) -> Array:
    """Convolve an input of few channels, with stride 1: `[N, H, W, C], [kh, kw, C, O] -> [N, H', W', O]`.

    The arguments are `(x, kernel, strides, padding)`, as in `lax.conv_general_dilated`; `padding` is "VALID" or the numbers of zeros
    around the image, `((top, bottom), (left, right))`. Others are ignored.

    The taps of each kernel row become input channels, so that only a convolution along columns remains. On a CPU, this speeds up
    the gradient with respect to `x`, which is a convolution with few outputs (see `conv_few_outputs`). The function replaces
    `lax.conv_general_dilated` in `nnx.Conv(conv_general_dilated=...)`.
    """
    kh, kw, c, o = kernel.shape
    width = x.shape[2] - kw + 1
    shifted = jnp.concatenate([x[:, :, j : j + width] for j in range(kw)], -1)
    return _conv(shifted, kernel.reshape(kh, 1, kw * c, o))


@_cpu_form
def conv_few_outputs(x: Array, kernel: Array) -> Array:
    """Convolve like `conv_few_inputs`, but for few output channels.

    The taps of each kernel row become output channels, which are then shifted and summed. Three output channels would leave most
    of a CPU's vector registers unused: a direct 7x7 convolution of 64 channels took half of the network's time.
    """
    kh, kw, c, o = kernel.shape
    width = x.shape[2] - kw + 1
    taps = _conv(x, kernel.swapaxes(1, 2).reshape(kh, 1, c, kw * o))
    # The sum is computed in at least float32; in bfloat16 it would be rounded again at each tap.
    terms = [taps[:, :, j : j + width, j * o : (j + 1) * o].astype(jnp.promote_types(x.dtype, jnp.float32)) for j in range(kw)]
    return functools.reduce(jnp.add, terms).astype(x.dtype)


@_cpu_form
def conv_few_channels(x: Array, kernel: Array) -> Array:
    """Convolve like `conv_few_inputs`, but for few input and few output channels.

    Four neighbouring columns become channels, which only reshapes the arrays: `[N, H, W, C] -> [N, H, W / 4, 4 C]`. The kernel becomes one
    that computes four columns at a time, with zeros where a column is outside the window of another. Although it multiplies by these
    zeros, this is faster than a direct convolution, which would leave most of a CPU's vector registers unused.
    """
    kh, kw, c, o = kernel.shape
    n, h, w = x.shape[0], x.shape[1], x.shape[2] - kw + 1
    groups, window = -(-w // _FOLD), -(-(kw + _FOLD - 1) // _FOLD)  # of four columns: in the output, and in the kernel
    width = groups + window - 1
    x = jnp.pad(x, ((0, 0), (0, 0), (0, _FOLD * width - x.shape[2]), (0, 0))).reshape(n, h, width, _FOLD * c)
    none = (0, 0)
    shifted = [jnp.pad(kernel, (none, (column, _FOLD * window - kw - column), none, none)) for column in range(_FOLD)]
    y = _conv(x, jnp.stack(shifted, 3).reshape(kh, window, _FOLD * c, _FOLD * o))
    return y.reshape(n, h - kh + 1, _FOLD * groups, o)[:, :, :w]


def concatenate_channels(x: Array, y: Array) -> Array:
    """Concatenate two arrays along the last axis: `[N, H, W, C], [N, H, W, D] -> [N, H, W, C + D]`.

    The sum of two padded arrays is twice as fast on a CPU as `jnp.concatenate`, of which XLA makes a loop that it does not vectorize.
    """

    def add(x: Array, y: Array) -> Array:
        none = ((0, 0),) * 3
        return jnp.pad(x, (*none, (0, y.shape[-1]))) + jnp.pad(y, (*none, (x.shape[-1], 0)))

    return _by_platform(add, lambda x, y: jnp.concatenate([x, y], -1), x, y)


@_cpu_form
def conv_one_output(x: Array, kernel: Array) -> Array:
    """Convolve like `conv_few_inputs`, but for a single output channel.

    One matrix product gives the term of every tap as an image of its own; these images are then shifted and summed. On a CPU,
    `conv_few_outputs` takes more than twice as long for a kernel of 6x6, and the usual form ten times as long.
    """
    kh, kw, c, _o = kernel.shape
    height, width = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    taps = jnp.einsum("ct,nhwc->tnhw", kernel.reshape(kh * kw, c).T, x, preferred_element_type=dtype)
    terms = [taps[i * kw + j, :, i : i + height, j : j + width] for i in range(kh) for j in range(kw)]
    return functools.reduce(jnp.add, terms).astype(x.dtype)[..., None]


def pad_by_reflection(x: Array, size: int) -> Array:
    """Add `size` rows and columns on each side, mirrored at the outermost ones: `[N, H, W, C] -> [N, H + 2 size, W + 2 size, C]`."""

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (size, size), (size, size), (0, 0)), mode="reflect")

    def fold(x: Array, padded: Array) -> Array:
        # In place; the usual gradient makes a copy of the image for each side.
        for axis in (1, 2):
            length = x.shape[axis]
            first, last = (lax.slice_in_dim(padded, start, start + size, axis=axis) for start in (0, length + size))
            for start, side in ((size + 1, first), (length - 1, last)):
                sums = lax.slice_in_dim(padded, start, start + size, axis=axis) + jnp.flip(side, axis)
                padded = lax.dynamic_update_slice_in_dim(padded, sums, start, axis)
        return padded[:, size : size + x.shape[1], size : size + x.shape[2]]

    mirrored_again = any(size >= length for length in x.shape[1:3])  # the image is smaller than the padding
    return pad(x) if mirrored_again else with_cpu_gradient(pad, fold, x)


def conv_1x1(x: Array, kernel: Array, strides: Any, padding: Any, **_: Any) -> Array:
    """Convolve with a 1x1 kernel: `[N, H, W, C], [1, 1, C, O] -> [N, H, W, O]`.

    This is a matrix product on every platform. XLA's CPU backend would use its convolution, which takes several times as long when C or
    O is small. The function replaces `lax.conv_general_dilated` like `conv_few_inputs`.
    """
    if kernel.shape[:2] != (1, 1) or tuple(strides) != (1, 1):
        raise ValueError(f"kernel has shape {kernel.shape} and strides are {strides}: both must be 1x1")
    return jnp.matmul(x, kernel[0, 0])


def _pad(x: Array, padding: Any) -> Array:
    return x if padding == "VALID" else jnp.pad(x, ((0, 0), *padding, (0, 0)))
