"""Kernels of the deformable convolution for NVIDIA GPUs, written in Pallas for Triton.

The forward pass has one program for each block of output positions and output channels. It loops over the taps: it gathers the four
neighbours of each position, blends them in float32, and multiplies the samples by the tap's kernel slice, so that samples are never
stored in memory. The backward pass has two kernels that gather the neighbours again: one for the image and for the sums from which the
gradients of offsets and mask follow, the other for the weights.

Gradients of the image are added atomically, because several positions share a neighbour. Collecting them for a scatter by XLA would write
a gradient for every tap of every position to memory first. The order of the additions varies, so the last bits of the sum do too, as in
XLA's own scatter on GPUs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from aecr_jax.ops.deform_conv import neighbour_steps

# Numbers of positions and output channels of a block, and bytes of its input channels. Triton requires powers of two, and at least 16 in
# matrix products. In float32, 64 channels would take more shared memory than the 99 KiB of GPUs other than those for data centres.
_POSITIONS, _OUTPUTS, _CHANNEL_BYTES, _LEAST = 64, 256, 128, 16


class _Sizes(NamedTuple):
    positions: int
    """Output positions of an image."""
    channels: int
    """Channels of a group."""
    outputs: int
    taps: int
    """Taps of a group."""
    row: int
    """Pixels in a row of the padded image."""
    channel_block: int
    output_block: int

    @property
    def channel_blocks(self) -> int:
        """Blocks of channels in a group."""
        return pl.cdiv(self.channels, self.channel_block)


def forward(image: Array, index: Array, weights: Array, kernel: Array, *, row: int, interpret: bool = False) -> Array:
    """Return the output `[N, P, O]` for P positions in each image, in the type of `image`.

    Args:
      image: padded image `[N, pixels, C]`.
      index: upper left neighbour of every sample, int32 `[N, G K, P]`; the G groups are outermost.
      weights: factors of the four neighbours, float32 `[N, G K, 4, P]`: upper left, upper right, lower left, lower right.
      kernel: `[G K, C / G, O]` in the type of `image`.
      row: number of pixels in a row of the padded image.
      interpret: emulate the kernel on any platform, which is slow, to test it.
    """
    sizes = _sizes(image, index, kernel, row)
    index, weights = _pad_positions(index), _pad_positions(weights)
    n = image.shape[0]
    return pl.pallas_call(
        functools.partial(_forward, sizes),
        jax.ShapeDtypeStruct((n, sizes.positions, sizes.outputs), image.dtype),
        grid=(n, pl.cdiv(sizes.positions, _POSITIONS), pl.cdiv(sizes.outputs, sizes.output_block)),
        in_specs=[*map(_of_image, (image, index, weights)), _whole(kernel)],
        out_specs=_of_image(jax.ShapeDtypeStruct((n, sizes.positions, sizes.outputs), image.dtype)),
        compiler_params=plgpu.CompilerParams(num_warps=8 if sizes.output_block > 128 else 4, num_stages=2),
        interpret=interpret,
    )(image, index, weights, kernel)


def backward(
    image: Array, index: Array, weights: Array, kernel: Array, cotangent: Array, *, row: int, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """Return the gradient of the image, that of the kernel, and the sums over channels that the gradients of the weights consist of.

    Args:
      image: as for `forward`, like the next three.
      index: see there.
      weights: see there.
      kernel: see there.
      cotangent: `[N, P, O]` in the type of `image`.
      row: see there.
      interpret: see there.

    Returns:
      In float32: `[N, pixels, C]`; `[N, G K, C / G, O]`, for each image alone; and `[N, G K, 4, P]`, the products of the samples' gradients
      with the four neighbours, summed over the channels.
    """
    sizes = _sizes(image, index, kernel, row)
    index, weights = _pad_positions(index), _pad_positions(weights)
    n, taps = index.shape[:2]
    arrays = (image, index, weights, kernel, cotangent)
    specs = [_whole(array) if array is kernel else _of_image(array) for array in arrays]
    grad_image, sums = jnp.zeros(image.shape, jnp.float32), jax.ShapeDtypeStruct(weights.shape, jnp.float32)
    grad_image, sums = pl.pallas_call(
        functools.partial(_backward_samples, sizes, interpret),
        (jax.ShapeDtypeStruct(image.shape, jnp.float32), sums),
        grid=(n, pl.cdiv(sizes.positions, _POSITIONS), taps),
        in_specs=[*specs, _of_image(grad_image)],
        out_specs=(_of_image(grad_image), _of_image(sums)),
        input_output_aliases={len(arrays): 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(*arrays, grad_image)
    result = jax.ShapeDtypeStruct((n, *kernel.shape), jnp.float32)
    grad_kernel = pl.pallas_call(
        functools.partial(_backward_kernel, sizes),
        result,
        grid=(n, taps * sizes.channel_blocks, pl.cdiv(sizes.outputs, sizes.output_block)),
        in_specs=[spec for spec, array in zip(specs, arrays) if array is not kernel],
        out_specs=_of_image(result),
        compiler_params=plgpu.CompilerParams(num_warps=8 if sizes.output_block > 128 else 4, num_stages=2),
        interpret=interpret,
    )(image, index, weights, cotangent)
    return grad_image, grad_kernel, sums[..., : sizes.positions]


def _sizes(image: Array, index: Array, kernel: Array, row: int) -> _Sizes:
    taps, channels, outputs = kernel.shape
    limits = ((_CHANNEL_BYTES // image.dtype.itemsize, channels), (_OUTPUTS, outputs))
    blocks = [min(most, max(_LEAST, pl.next_power_of_2(size))) for most, size in limits]
    return _Sizes(index.shape[2], channels, outputs, taps * channels // image.shape[2], row, *blocks)


def _pad_positions(x: Array) -> Array:
    """Add positions to fill the last block; their index is 0 and their weights are 0, so that they contribute zeros."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _POSITIONS)])


def _of_image(array: Any) -> pl.BlockSpec:
    return pl.BlockSpec((None, *array.shape[1:]), lambda image, *_: (image,) + (0,) * (len(array.shape) - 1))


def _whole(array: Array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def _forward(sizes: _Sizes, image: Any, index: Any, weights: Any, kernel: Any, out: Any) -> None:
    start = pl.program_id(1) * _POSITIONS
    outputs = pl.program_id(2) * sizes.output_block + jnp.arange(sizes.output_block)

    def step(i: Array, total: Array) -> Array:
        tap, channels = lax.div(i, sizes.channel_blocks), _channels(sizes, lax.rem(i, sizes.channel_blocks))
        sample = _sample(sizes, image, index, weights, tap, start, channels)
        return total + _dot(sample, _load_kernel(sizes, kernel, tap, channels, outputs))

    zeros = jnp.zeros((_POSITIONS, sizes.output_block), jnp.float32)
    total = lax.fori_loop(0, kernel.shape[0] * sizes.channel_blocks, step, zeros)
    positions = start + jnp.arange(_POSITIONS)
    mask = (positions < sizes.positions)[:, None] & (outputs < sizes.outputs)[None]
    plgpu.store(out.at[positions[:, None], outputs[None]], total.astype(out.dtype), mask=mask)


def _backward_samples(
    sizes: _Sizes,
    interpret: bool,
    image: Any,
    index: Any,
    weights: Any,
    kernel: Any,
    cotangent: Any,
    _zeros: Any,
    grad_image: Any,
    sums: Any,
) -> None:
    start, tap = pl.program_id(1) * _POSITIONS, pl.program_id(2)
    block = min(sizes.output_block, _CHANNEL_BYTES // cotangent.dtype.itemsize)

    def step(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        channels = _channels(sizes, i)

        def product(j: Array, total: Array) -> Array:
            outputs = j * block + jnp.arange(block)
            factor = _load_kernel(sizes, kernel, tap, channels, outputs)
            return total + _dot(_load_cotangent(sizes, cotangent, start, outputs), factor, transpose=(False, True))

        zeros = jnp.zeros((_POSITIONS, sizes.channel_block), jnp.float32)
        grad_sample = lax.fori_loop(0, pl.cdiv(sizes.outputs, block), product, zeros)
        results = []
        for n, (pixels, mask) in enumerate(_neighbours(sizes, index, tap, start, channels)):
            corner = _load(image, pixels, mask).astype(jnp.float32)
            results.append(totals[n] + jnp.sum(grad_sample * corner, 1))
            share = weights[tap, n, pl.ds(start, _POSITIONS)]
            _add(grad_image, pixels, grad_sample * share[:, None], mask, interpret)
        return tuple(results)

    totals = lax.fori_loop(0, sizes.channel_blocks, step, (jnp.zeros(_POSITIONS, jnp.float32),) * 4)
    for n, total in enumerate(totals):
        sums[tap, n, pl.ds(start, _POSITIONS)] = total


def _backward_kernel(sizes: _Sizes, image: Any, index: Any, weights: Any, cotangent: Any, grad_kernel: Any) -> None:
    tap, channels = lax.div(pl.program_id(1), sizes.channel_blocks), _channels(sizes, lax.rem(pl.program_id(1), sizes.channel_blocks))
    outputs = pl.program_id(2) * sizes.output_block + jnp.arange(sizes.output_block)

    def step(i: Array, total: Array) -> Array:
        start = i * _POSITIONS
        sample = _sample(sizes, image, index, weights, tap, start, channels)
        return total + _dot(sample, _load_cotangent(sizes, cotangent, start, outputs), transpose=(True, False))

    zeros = jnp.zeros((sizes.channel_block, sizes.output_block), jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(sizes.positions, _POSITIONS), step, zeros)
    mask = (channels < sizes.channels)[:, None] & (outputs < sizes.outputs)[None]
    plgpu.store(grad_kernel.at[tap, channels[:, None], outputs[None]], total, mask=mask)


def _channels(sizes: _Sizes, block: Array) -> Array:
    """Return the channels of a block, counted within their group."""
    return block * sizes.channel_block + jnp.arange(sizes.channel_block)


def _neighbours(sizes: _Sizes, index: Any, tap: Array, start: Array, channels: Array) -> list[tuple[tuple[Array, Array], Array]]:
    """Return indices into the image, each of a block of positions and channels, of the four neighbours, and which of them exist."""
    corner = index[tap, pl.ds(start, _POSITIONS)][:, None]
    group = lax.div(tap, sizes.taps)
    columns = (group * sizes.channels + channels)[None]
    mask = jnp.broadcast_to((channels < sizes.channels)[None], (_POSITIONS, sizes.channel_block))
    return [((corner + step, columns), mask) for step in neighbour_steps(sizes.row)]


def _sample(sizes: _Sizes, image: Any, index: Any, weights: Any, tap: Array, start: Array, channels: Array) -> Array:
    """Return the modulated samples of a block of positions and channels."""
    total = jnp.zeros((_POSITIONS, sizes.channel_block), jnp.float32)
    for n, (pixels, mask) in enumerate(_neighbours(sizes, index, tap, start, channels)):
        share = weights[tap, n, pl.ds(start, _POSITIONS)]
        total += _load(image, pixels, mask).astype(jnp.float32) * share[:, None]
    return total.astype(image.dtype)


def _load(image: Any, pixels: tuple[Array, Array], mask: Array) -> Array:
    return plgpu.load(image.at[pixels], mask=mask, other=0)


def _load_kernel(sizes: _Sizes, kernel: Any, tap: Array, channels: Array, outputs: Array) -> Array:
    mask = (channels < sizes.channels)[:, None] & (outputs < sizes.outputs)[None]
    return plgpu.load(kernel.at[tap, channels[:, None], outputs[None]], mask=mask, other=0)


def _load_cotangent(sizes: _Sizes, cotangent: Any, start: Array, outputs: Array) -> Array:
    positions = start + jnp.arange(_POSITIONS)
    mask = (positions < sizes.positions)[:, None] & (outputs < sizes.outputs)[None]
    return plgpu.load(cotangent.at[positions[:, None], outputs[None]], mask=mask, other=0)


def _dot(a: Array, b: Array, transpose: tuple[bool, bool] = (False, False)) -> Array:
    # Float32 uses TF32 unless `jax_default_matmul_precision` asks for more, as in XLA's products on GPUs.
    contracted = ((int(not transpose[0]),), (int(transpose[1]),))
    return lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _add(image: Any, pixels: tuple[Array, Array], value: Array, mask: Array, interpret: bool) -> None:
    if interpret:  # the emulation of `atomic_add` takes no mask and loses all but one addition to an element
        image[...] = image[...].at[pixels].add(jnp.where(mask, value, 0))
    else:
        plgpu.atomic_add(image, pixels, value, mask=mask)


def fits(image: tuple[int, ...], kernel: tuple[int, ...], groups: int, dtype: Any) -> bool:
    """Return True: there is a kernel for all images `[N, H, W, C]`, kernels `[kh, kw, C, O]` and groups of offsets."""
    return True
