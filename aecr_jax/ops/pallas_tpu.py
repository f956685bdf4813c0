"""Kernels of the deformable convolution for TPUs, written in Pallas for Mosaic.

Mosaic cannot gather arbitrary rows of an array by a vector of indices, but loads a row if its index is a scalar. The whole image is
therefore held in VMEM, in float32 and with the channels of a pixel in rows of 128 lanes, and a loop over the samples loads their four
neighbours by indices in SMEM. To store the four neighbours together and load them at once would take four times the VMEM. In the backward
pass, the gradient of the image is also held in VMEM, and the same loop adds to it in a fixed order.

Images that are too large for VMEM are left to XLA; those of training, 60x60 at 256 channels, are not.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aecr_jax.ops.deform_conv import neighbour_steps

_POSITIONS = 128  # output positions of a block
_LANES = 128
_NEIGHBOURS = 4
# Bytes of VMEM in all, and for the compiler's own use. TPU v4 has 16 MiB and later ones have more, but the kind of TPU is not known when a
# program is traced.
_VMEM, _TEMPORARIES = 16 * 2**20, 2**20
_UNROLL = 4


def fits(image: tuple[int, ...], kernel: tuple[int, ...], groups: int, dtype: Any) -> bool:
    """Return whether the backward pass has room in VMEM for images `[N, H, W, C]`, a kernel `[kh, kw, C, O]` and the groups of offsets."""
    _, h, w, c = image
    kh, kw, _, o = kernel
    lanes = _round_up(c // groups, _LANES)
    pixels, weights = groups * (h + 4) * (w + 4) * lanes, groups * kh * kw * lanes * _round_up(o, _LANES)
    scratch = (_NEIGHBOURS + 2) * _POSITIONS * lanes + 4 * _POSITIONS * _round_up(o, _LANES)
    return 4 * (2 * pixels + weights + scratch) + jnp.dtype(dtype).itemsize * weights <= _VMEM - _TEMPORARIES


def forward(image: Array, index: Array, weights: Array, kernel: Array, *, row: int, interpret: bool = False) -> Array:
    """Return the output `[N, P, O]`; the arguments are those of `pallas_gpu.forward`."""
    n, positions, dtype = image.shape[0], index.shape[2], image.dtype
    image, index, weights, kernel, lanes = _arrange(image, index, weights, kernel)
    outputs = kernel.shape[2]
    return pl.pallas_call(
        functools.partial(_forward, row),
        jax.ShapeDtypeStruct((n, positions, outputs), dtype),
        grid=(n, pl.cdiv(positions, _POSITIONS)),
        in_specs=[_of_image(image), _scalars(index), _scalars(weights), _whole(kernel)],
        out_specs=_block_of_positions(outputs),
        scratch_shapes=[pltpu.VMEM((_POSITIONS, lanes, _LANES), jnp.float32), pltpu.VMEM((_POSITIONS, outputs), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM),
        interpret=interpret,
    )(image, index, weights, kernel)


def backward(
    image: Array, index: Array, weights: Array, kernel: Array, cotangent: Array, *, row: int, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """Return the gradients of image and kernel, and four sums; the arguments and results are those of `pallas_gpu.backward`."""
    n, pixels, channels = image.shape
    taps, group_channels, outputs = kernel.shape
    positions, dtype = index.shape[2], image.dtype
    image, index, weights, kernel, lanes = _arrange(image, index, weights, kernel)
    # A block that reaches beyond the last position would contain arbitrary numbers.
    cotangent = jnp.pad(cotangent, ((0, 0), (0, -positions % _POSITIONS), (0, 0))).astype(dtype)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (image.shape, (n, *kernel.shape), weights.shape)]
    rows = pltpu.VMEM((_POSITIONS, lanes, _LANES), jnp.float32)
    grad_image, grad_kernel, sums = pl.pallas_call(
        functools.partial(_backward, row),
        results,
        grid=(n, pl.cdiv(positions, _POSITIONS)),
        in_specs=[_of_image(image), _scalars(index), _scalars(weights), _whole(kernel), _block_of_positions(outputs)],
        out_specs=[
            _of_image(results[0]),
            _of_image(results[1]),
            pl.BlockSpec((None, weights.shape[1], _POSITIONS), lambda image, block: (image, 0, block)),
        ],
        scratch_shapes=[rows, rows, pltpu.VMEM((_NEIGHBOURS, *rows.shape), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM),
        interpret=interpret,
    )(image, index, weights, kernel, cotangent)
    grad_image = grad_image.reshape(n, channels // group_channels, pixels, lanes * _LANES)[..., :group_channels]
    grad_image = grad_image.swapaxes(1, 2).reshape(n, pixels, channels)
    return grad_image, grad_kernel[:, :, :group_channels], sums.reshape(n, taps, _NEIGHBOURS, -1)[..., :positions]


def _arrange(image: Array, index: Array, weights: Array, kernel: Array) -> tuple[Array, Array, Array, Array, int]:
    """Pad the channels of each group to whole rows of lanes, and the positions to whole blocks.

    Returns:
      The image `[N, G pixels, lanes, 128]` in float32; the index into it `[N, G K, P]`; the weights `[N, 4 G K, P]`; the kernel
      `[G K, 128 lanes, O]`; and the number of rows of lanes. The index and the weights of the added positions are 0.
    """
    n, pixels, channels = image.shape
    taps, group_channels, _ = kernel.shape
    groups, padded = channels // group_channels, _round_up(group_channels, _LANES)
    missing = padded - group_channels
    image = jnp.pad(image.reshape(n, pixels, groups, group_channels), ((0, 0), (0, 0), (0, 0), (0, missing)))
    image = image.swapaxes(1, 2).reshape(n, groups * pixels, padded // _LANES, _LANES).astype(jnp.float32)
    index = index + jnp.repeat(pixels * jnp.arange(groups, dtype=index.dtype), taps // groups)[None, :, None]
    tail = ((0, 0), (0, 0), (0, -index.shape[2] % _POSITIONS))
    weights = weights.reshape(n, taps * _NEIGHBOURS, -1)
    return image, jnp.pad(index, tail), jnp.pad(weights, tail), jnp.pad(kernel, ((0, 0), (0, missing), (0, 0))), padded // _LANES


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _of_image(array: Any) -> pl.BlockSpec:
    # With a second buffer, the copies of one image would overlap with the computation of another, but VMEM has no room for it.
    axes = len(array.shape) - 1
    return pl.BlockSpec((None, *array.shape[1:]), lambda image, _: (image,) + (0,) * axes, pipeline_mode=pl.Buffered(1))


def _whole(array: Array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim, pipeline_mode=pl.Buffered(1))


def _scalars(array: Array) -> pl.BlockSpec:
    return pl.BlockSpec((None, array.shape[1], _POSITIONS), lambda image, block: (image, 0, block), memory_space=pltpu.SMEM)


def _block_of_positions(outputs: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, _POSITIONS, outputs), lambda image, block: (image, block, 0))


def _forward(row: int, image: Any, index: Any, weights: Any, kernel: Any, out: Any, sample: Any, total: Any) -> None:
    total[...] = jnp.zeros_like(total)

    @pl.loop(0, kernel.shape[0])
    def _(tap: Array) -> None:
        @pl.loop(0, _POSITIONS, unroll=_UNROLL)
        def _(position: Array) -> None:
            corner = index[tap, position]
            terms = [image[corner + step] * weights[_NEIGHBOURS * tap + n, position] for n, step in enumerate(neighbour_steps(row))]
            sample[position] = terms[0] + terms[1] + terms[2] + terms[3]

        for part, lanes in _rows_of_lanes(sample):
            total[...] += _dot(sample[:, part].astype(kernel.dtype), kernel[tap, lanes])

    out[...] = total[...].astype(out.dtype)


def _backward(
    row: int,
    image: Any,
    index: Any,
    weights: Any,
    kernel: Any,
    cotangent: Any,
    grad_image: Any,
    grad_kernel: Any,
    sums: Any,
    sample: Any,
    grad_sample: Any,
    products: Any,
) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        grad_image[...] = jnp.zeros_like(grad_image)
        grad_kernel[...] = jnp.zeros_like(grad_kernel)

    @pl.loop(0, kernel.shape[0])
    def _(tap: Array) -> None:
        for part, lanes in _rows_of_lanes(sample):
            grad_sample[:, part] = _dot(cotangent[...], kernel[tap, lanes], contract=(1, 1))

        @pl.loop(0, _POSITIONS, unroll=_UNROLL)
        def _(position: Array) -> None:
            corner, gradient = index[tap, position], grad_sample[position]
            total = jnp.zeros_like(gradient)
            for n, step in enumerate(neighbour_steps(row)):
                pixel, share = image[corner + step], weights[_NEIGHBOURS * tap + n, position]
                products[n, position] = gradient * pixel
                total += pixel * share
                grad_image[corner + step] += gradient * share
            sample[position] = total

        for n in range(_NEIGHBOURS):
            # A product with ones sums over the lanes and leaves the positions along the lanes, as `sums` has them.
            partial = sum((products[n, :, part] for part, _ in _rows_of_lanes(sample)), jnp.zeros((_POSITIONS, _LANES)))
            ones = jnp.ones((8, _LANES), jnp.float32)
            sums[pl.ds(_NEIGHBOURS * tap + n, 1)] = _dot(ones, partial, contract=(1, 1), exact=True)[:1]
        for part, lanes in _rows_of_lanes(sample):
            grad_kernel[tap, lanes] += _dot(sample[:, part].astype(kernel.dtype), cotangent[...], contract=(0, 0))


def _rows_of_lanes(sample: Any) -> list[tuple[int, slice]]:
    """Return the number of each row of lanes, and its channels."""
    return [(part, slice(part * _LANES, (part + 1) * _LANES)) for part in range(sample.shape[1])]


def _dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0), exact: bool = False) -> Array:
    # Mosaic has two precisions. All that `jax_default_matmul_precision` may ask for beyond bfloat16 is computed in the higher one.
    wanted = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # its attributes are made at run time
    exact = exact or (a.dtype == jnp.float32 and wanted not in (None, "default", "fastest", "bfloat16"))
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)
