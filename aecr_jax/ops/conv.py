"""Transposed convolutions, and convolutions with few input or output channels, in forms that XLA compiles to fast code."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def double_conv_transpose(x: Array, kernel: Array) -> Array:
    """Apply a transposed convolution that doubles height and width: stride 2, padding 1, output padding 1.

    Each of the four output phases (even and odd rows and columns) is computed by a separate convolution with its share of the nine
    taps, and the four results are interleaved. The usual form, one convolution with `lhs_dilation`, has a weight gradient that XLA
    computes in a naive loop on the CPU.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[3, 3, C, O]`.

    Returns:
      `[N, 2H, 2W, O]`.
    """
    n, h, w, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    # Input row i contributes to output row 2i + tap - 1. Thus even output row 2i uses tap 1 on input row i, and odd output row
    # 2i + 1 uses tap 2 on input row i and tap 0 on input row i + 1.
    even, odd = slice(1, 2), slice(None, None, -2)
    even_even = _conv(x, kernel[even, even])
    even_odd = _conv(padded[:, :-1], kernel[even, odd])
    odd_even = _conv(padded[:, :, :-1], kernel[odd, even])
    odd_odd = _conv(padded, kernel[odd, odd])
    rows = [jnp.stack([even_even, even_odd], 3), jnp.stack([odd_even, odd_odd], 3)]  # [N, H, W, 2, O] each
    # The last axis cannot be given as -1, because its size would be undefined for a batch of 0 images.
    return jnp.stack(rows, 2).reshape(n, 2 * h, 2 * w, kernel.shape[3])


def _conv(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def conv_few_inputs(x: Array, kernel: Array, strides: Any, padding: Any, **_: Any) -> Array:
    """Convolve an input of few channels, with stride 1 and no padding: `[N, H, W, C], [kh, kw, C, O] -> [N, H', W', O]`.

    The taps of each kernel row become input channels, so that only a convolution along columns remains. On a CPU, this speeds up
    the gradient with respect to `x`, which is a convolution with few outputs (see `conv_few_outputs`). The function replaces
    `lax.conv_general_dilated` in `nnx.Conv(conv_general_dilated=...)`.
    """
    _check_plain(strides, padding)
    kh, kw, c, o = kernel.shape
    width = x.shape[2] - kw + 1
    shifted = jnp.concatenate([x[:, :, j : j + width] for j in range(kw)], -1)
    return _conv(shifted, kernel.reshape(kh, 1, kw * c, o))


def conv_few_outputs(x: Array, kernel: Array, strides: Any, padding: Any, **_: Any) -> Array:
    """Convolve like `conv_few_inputs`, but for few output channels.

    The taps of each kernel row become output channels, which are then shifted and summed. Three output channels would leave most
    of a CPU's vector registers unused: a direct 7x7 convolution of 64 channels took half of the network's time.
    """
    _check_plain(strides, padding)
    kh, kw, c, o = kernel.shape
    width = x.shape[2] - kw + 1
    taps = _conv(x, kernel.swapaxes(1, 2).reshape(kh, 1, c, kw * o))
    # The sum is computed in at least float32; in bfloat16 it would be rounded again at each tap.
    terms = [taps[:, :, j : j + width, j * o : (j + 1) * o].astype(jnp.promote_types(x.dtype, jnp.float32)) for j in range(kw)]
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def _check_plain(strides: Any, padding: Any) -> None:
    if tuple(strides) != (1, 1) or padding != "VALID":
        raise ValueError(f"strides (={strides}) must be (1, 1) and padding (={padding!r}) 'VALID'")
