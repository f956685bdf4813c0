"""Modulated deformable convolution (DCNv2) by bilinear gather.

This implements Eq. 1 of Zhu et al., "Deformable ConvNets v2", CVPR 2019, with the offset layout of torchvision's `deform_conv2d`.
A loop over the kernel's taps samples the image, modulates the samples and multiplies them by the tap's kernel slice, so the im2col
matrix of all taps is never held in memory. The backward pass recomputes the samples instead of storing them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from aecr_jax.ops.gradients import delay
from aecr_jax.validation import as_floating, as_int

# Sample positions are clipped to at most two pixels outside the image. At these limits, all four neighbours are zero, and so are
# the value and the gradient.
_BORDER = 2

# On CPUs, the gradient computes at most this many positions of the output at a time.
_PART = 1024


class Geometry(NamedTuple):
    """The numbers of a deformable convolution, each for height and width; `groups` is that of the offsets."""

    strides: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def deform_conv2d(
    x: ArrayLike,
    offset: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    strides: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    offset_groups: int = 1,
    implementation: Literal["xla", "pallas"] = "xla",
) -> Array:
    """Convolve `x` with a kernel whose taps are moved by `offset` and scaled by `mask`.

    Values between pixels are interpolated bilinearly, and pixels outside the image are zero. Offsets of any size are allowed: an
    infinite offset samples zero; a NaN offset gives NaN and never reads outside `x`. The function is differentiable (reverse mode)
    with respect to every array argument. All arrays must be floating point. An empty batch gives an empty result.

    Args:
      x: input `[N, H, W, C]`.
      offset: `[N, H', W', G * kh * kw * 2]` in pixels: (dy, dx) per tap, with the taps in row-major order and the groups outermost.
      kernel: `[kh, kw, C, O]`.
      bias: `[O]`, or None.
      mask: modulation `[N, H', W', G * kh * kw]`, usually in [0, 1], or None for ones.
      strides: one number, or one each for height and width.
      padding: number of zeros added on each side, given as one number, or one each for height and width.
      dilation: distance between taps, given as one number, or one each for height and width.
      offset_groups: G; the channels of `x` are divided into G equal groups, each with its own offsets and mask.
      implementation: "xla", or "pallas" for the kernels of `pallas_deform_conv` on NVIDIA GPUs and TPUs and the same as "xla" on other
        platforms. The kernels have been run on no accelerator yet.

    Returns:
      `[N, H', W', O]` in the promoted type of `x` and `kernel`, with H' = (H + 2 padding - dilation (kh - 1) - 1) / stride + 1,
      rounded down, and likewise for W'.

    Raises:
      ValueError: a shape does not match the others, an array is not floating point, a number is not an integer in its range, or the
        implementation is unknown.
    """
    x, offset, kernel = as_floating(x, "x"), as_floating(offset, "offset"), as_floating(kernel, "kernel")
    bias = None if bias is None else as_floating(bias, "bias")
    mask = None if mask is None else as_floating(mask, "mask")
    groups = as_int(offset_groups)
    if groups is None:
        raise ValueError(f"offset_groups (={offset_groups!r}) must be an integer that divides the channels of x")
    geometry = Geometry(_pair(strides, "strides", 1), _pair(padding, "padding", 0), _pair(dilation, "dilation", 1), groups)
    out_hw = _check_shapes(x, offset, kernel, bias, mask, geometry)
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    # Positions need float32 precision even if the features have less: at 256, the resolution of bfloat16 is only 1 pixel.
    position_dtype = jnp.promote_types(offset.dtype, jnp.float32)
    n, (h_out, w_out), taps = x.shape[0], out_hw, kernel.shape[0] * kernel.shape[1]
    if mask is None:
        mask = jnp.ones((n, h_out, w_out, groups * taps), dtype)
    compute = _implementation(implementation)
    out = compute(x.astype(dtype), offset.astype(position_dtype), mask.astype(position_dtype), kernel.astype(dtype), geometry)
    return out if bias is None else out + bias.astype(dtype).reshape(1, 1, 1, -1)


def has_kernels(platform: str, count: int) -> bool:
    """Return whether the Pallas kernels run on `count` devices of `platform` ("cpu", "gpu" or "tpu"). Elsewhere XLA's form is used."""
    # libtpu does not call back what `pallas_deform_conv` registers to divide a kernel among devices.
    return platform != "cpu" and not (platform == "tpu" and count > 1)


def _implementation(name: str) -> Callable[[Array, Array, Array, Array, Geometry], Array]:
    if name == "xla":
        return by_taps
    if name == "pallas":
        from aecr_jax.ops.pallas_deform_conv import by_kernels  # importing Pallas takes a noticeable time, and few programs need it

        return by_kernels
    raise ValueError(f"implementation (={name!r}) must be 'xla' or 'pallas'")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def by_taps(x: Array, offset: Array, mask: Array, kernel: Array, geometry: Geometry) -> Array:
    """Return the output without bias, computed by XLA, one tap after another; the arguments have the types of the arithmetic."""
    image = pad_image(x, geometry.groups)
    base, steps = tap_positions(x, offset, kernel, geometry)
    n, h_out, w_out = offset.shape[:3]
    # Products of bfloat16 features are accumulated in float32.
    accumulator = jnp.promote_types(x.dtype, jnp.float32)

    def tap(total: Array, inputs: tuple[Array, ...]) -> tuple[Array, None]:
        step, tap_offset, tap_mask, tap_kernel = inputs
        modulated = _blend(_sample(image, base + step + tap_offset, x.shape), tap_mask)
        product = jnp.einsum("npgc,gco->npo", modulated, tap_kernel, preferred_element_type=accumulator)
        return total + product, None

    total = jnp.zeros((n, h_out * w_out, kernel.shape[-1]), accumulator)
    total, _ = lax.scan(tap, total, (steps, *_by_tap(offset, mask, kernel, geometry.groups)))
    # The last axis cannot be given as -1, because its size would be undefined for a batch of 0 images.
    return total.reshape(n, h_out, w_out, kernel.shape[3]).astype(x.dtype)


def _forward(x: Array, offset: Array, mask: Array, kernel: Array, geometry: Geometry) -> tuple[Array, tuple[Array, ...]]:
    return by_taps(x, offset, mask, kernel, geometry), (x, offset, mask, kernel)


def by_taps_gradient(geometry: Geometry, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
    """Return the gradients of `by_taps` with respect to its four arrays, which are the `residuals`."""
    on_cpu, elsewhere = (functools.partial(_gradient, geometry, parts) for parts in (_cpu_parts(cotangent.shape), 1))
    return lax.platform_dependent(*residuals, cotangent, cpu=on_cpu, default=elsewhere)


def _cpu_parts(shape: tuple[int, ...]) -> int:
    """Return the number of parts of an output of `shape` `[N, H', W', O]` in which a CPU's caches hold the arrays of one tap."""
    n, h, w, _ = shape
    if not (isinstance(n, int) and isinstance(h * w, int)):  # an exported program can have symbols for sizes
        return 1
    most = _PART // max(n, 1)
    return next((h * w // size for size in range(most, most // 4, -1) if h * w % size == 0), 1)


def _gradient(geometry: Geometry, parts: int, x: Array, offset: Array, mask: Array, kernel: Array, cotangent: Array) -> tuple[Array, ...]:
    """Return the gradients of `by_taps`, one tap after another, and for each tap one of `parts` equal parts of the output after another."""
    # Without the delays, XLA would make the padded image and the zeros of its gradient in the forward pass, and keep them.
    x, offset, mask, kernel = delay((x, offset, mask, kernel), cotangent)
    image = pad_image(x, geometry.groups)
    base, steps = tap_positions(x, offset, kernel, geometry)
    n, h_out, w_out, out_channels = cotangent.shape
    accumulator = jnp.promote_types(x.dtype, jnp.float32)

    def split(array: Array) -> Array:
        """Return the parts as the leading axis: `[N, P, ...] -> [parts, N, P / parts, ...]`."""
        return jnp.moveaxis(array.reshape(array.shape[0], parts, array.shape[1] // parts, *array.shape[2:]), 1, 0)

    cotangent = split(cotangent.reshape(n, h_out * w_out, out_channels))
    tap_offsets, tap_masks, tap_kernels = _by_tap(offset, mask, kernel, geometry.groups)
    # Transposing once here, instead of in the product of every tap, is faster on a CPU: twice as fast for the cotangent.
    transposed, tap_kernels = lax.optimization_barrier((cotangent.transpose(0, 3, 1, 2), tap_kernels.transpose(0, 3, 1, 2)))
    positions = split(base)

    def tap(grad_image: Array, inputs: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        step, tap_offset, tap_mask, tap_kernel = inputs

        def part(grads: tuple[Array, Array], inputs: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
            grad_image, grad_kernel = grads
            cotangent, transposed, position, offset, mask = inputs
            sample = _sample(image, position + step + offset, x.shape)
            grad_kernel += jnp.einsum("onp,npgc->ogc", transposed, _blend(sample, mask), preferred_element_type=accumulator)
            grad_modulated = jnp.einsum("npo,ogc->npgc", cotangent, tap_kernel)
            # The gradients of mask and position depend on the features only through these four sums. Their differences nearly
            # cancel, so the sums are computed in at least float32.
            exact = grad_modulated.astype(accumulator)
            sums = [_sum_channels(exact * corner.astype(accumulator)) for corner in sample.corners]
            grad_mask, grad_position = location_gradients(sample.location, sums)
            for index, share in zip(sample.indices, sample.location.shares):
                grad_image = _scatter_add(grad_image, index, grad_modulated * (share * mask)[..., None].astype(x.dtype))
            return (grad_image, grad_kernel), (grad_position * mask[..., None], grad_mask)

        zeros = jnp.zeros(tap_kernel.shape, accumulator)
        of_parts = cotangent, transposed, positions, split(tap_offset), split(tap_mask)
        (grad_image, grad_kernel), (grad_offset, grad_mask) = lax.scan(part, (grad_image, zeros), of_parts)
        return grad_image, (grad_offset, grad_mask, grad_kernel)

    # 4 * taps shares or more may be added to one pixel, so they are also accumulated in float32.
    grad_image, (grad_offset, grad_mask, grad_kernel) = lax.scan(
        tap, delay(jnp.zeros(image.shape, accumulator), cotangent), (steps, tap_offsets, tap_masks, tap_kernels)
    )
    return (
        crop_image(grad_image, x.shape).astype(x.dtype),
        # [K, parts, N, P / parts, G, 2] -> [N, P, G, K, 2], and the same without the last axis for the mask
        grad_offset.transpose(2, 1, 3, 4, 0, 5).reshape(offset.shape).astype(offset.dtype),
        grad_mask.transpose(2, 1, 3, 4, 0).reshape(mask.shape).astype(mask.dtype),
        grad_kernel.transpose(0, 2, 3, 1).reshape(kernel.shape).astype(kernel.dtype),  # [K, O, G, C / G] -> [kh, kw, C, O]
    )


by_taps.defvjp(_forward, by_taps_gradient)


class Location(NamedTuple):
    """Where samples lie in an image that is padded by `_BORDER` pixels; all arrays have the shape of the positions."""

    corner: Array
    """Flat index of the upper left neighbour."""
    shares: tuple[Array, ...]
    """Bilinear weights of the four neighbours: upper left, upper right, lower left, lower right."""
    fy: Array
    """Position between the neighbours."""
    fx: Array


def locate(position: Array, shape: tuple[int, ...]) -> Location:
    """Find the neighbours of `position` `[..., 2]` (y and x in the unpadded image), where the unpadded image has `shape` `[N, H, W, C]`."""
    h, w = shape[1:3]
    y = jnp.clip(position[..., 0], -_BORDER, h)
    x = jnp.clip(position[..., 1], -_BORDER, w)
    top, left = jnp.floor(y), jnp.floor(x)
    fy, fx = y - top, x - left  # NaN where the position is NaN, so that the result is NaN too

    def index(corner: Array) -> Array:  # converting NaN to an integer is undefined
        return jnp.where(jnp.isnan(corner), 0, corner + _BORDER).astype(jnp.int32)

    shares = ((1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx)
    return Location(index(top) * row_length(shape) + index(left), shares, fy, fx)


def row_length(shape: tuple[int, ...]) -> int:
    """Return the number of pixels in a row of the padded image."""
    return shape[2] + 2 * _BORDER


def neighbour_steps(row: int) -> tuple[int, ...]:
    """Return the distances in pixels of the four neighbours from the upper left one, in the order of `Location.shares`."""
    return 0, 1, row, row + 1


def location_gradients(location: Location, sums: Sequence[Array]) -> tuple[Array, Array]:
    """Return the gradients of the mask, and of the positions without the factor of the mask, `[..., 2]`.

    `sums` has, for each of the four neighbours, the product with the gradient of the modulated sample, summed over the channels.
    """
    d00, d01, d10, d11 = sums
    s00, s01, s10, s11 = location.shares
    grad_mask = s00 * d00 + s01 * d01 + s10 * d10 + s11 * d11
    grad_y = (1 - location.fx) * (d10 - d00) + location.fx * (d11 - d01)
    grad_x = (1 - location.fy) * (d01 - d00) + location.fy * (d11 - d10)
    return grad_mask, jnp.stack([grad_y, grad_x], -1)


class _Sample(NamedTuple):
    corners: tuple[Array, ...]  # the four neighbours, each [N, P, G, C / G], in the order of `Location.shares`
    indices: tuple[Array, ...]  # their flat positions in the padded image, each [N, P, G]
    location: Location


def _sample(image: Array, position: Array, shape: tuple[int, ...]) -> _Sample:
    """Return the neighbours, in the padded `image` `[N, pixels, G, C / G]`, of `position` `[N, P, G, 2]` in the unpadded image."""
    location = locate(position, shape)
    indices = tuple(location.corner + step for step in neighbour_steps(row_length(shape)))
    return _Sample(tuple(_gather(image, index) for index in indices), indices, location)


def _blend(sample: _Sample, mask: Array) -> Array:
    """Return the modulated samples `[N, P, G, C / G]`; `mask` is `[N, P, G]`."""
    # The shares are in at least float32; rounded to bfloat16, they would not sum to 1.
    terms = [corner * (share * mask)[..., None] for corner, share in zip(sample.corners, sample.location.shares)]
    return (terms[0] + terms[1] + terms[2] + terms[3]).astype(sample.corners[0].dtype)


def _sum_channels(x: Array) -> Array:
    """Sum over the last axis by halves, because XLA's CPU backend adds one value at a time, which took most of the gradient's time."""
    while x.shape[-1] > 16 and x.shape[-1] % 2 == 0:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.sum(-1)


@functools.partial(jax.vmap, in_axes=(0, 0))
@functools.partial(jax.vmap, in_axes=(1, 1), out_axes=1)
def _gather(image: Array, index: Array) -> Array:
    """Gather `[pixels, c], [P] -> [P, c]` for each image and group; with `vmap`, a batch sharded over devices stays sharded."""
    return image.at[index].get(mode="promise_in_bounds")


@functools.partial(jax.vmap, in_axes=(0, 0, 0))
@functools.partial(jax.vmap, in_axes=(1, 1, 1), out_axes=1)
def _scatter_add(image: Array, index: Array, value: Array) -> Array:
    return image.at[index].add(value.astype(image.dtype), mode="promise_in_bounds")


def pad_image(x: Array, groups: int) -> Array:
    """Return the image padded by `_BORDER` pixels of zeros, `[N, pixels, G, C / G]`."""
    n, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (_BORDER, _BORDER), (_BORDER, _BORDER), (0, 0)))
    return padded.reshape(n, (h + 2 * _BORDER) * (w + 2 * _BORDER), groups, c // groups)


def crop_image(image: Array, shape: tuple[int, ...]) -> Array:
    """Undo `pad_image`: return the image of `shape` `[N, H, W, C]`."""
    n, h, w, c = shape
    return image.reshape(n, h + 2 * _BORDER, w + 2 * _BORDER, c)[:, _BORDER : _BORDER + h, _BORDER : _BORDER + w]


def tap_positions(x: Array, offset: Array, kernel: Array, geometry: Geometry) -> tuple[Array, Array]:
    """Return the position of the kernel's corner for each output pixel, `[1, P, 1, 2]`, and each tap's step from it, `[K, 1, 1, 1, 2]`."""
    (kh, kw), (h_out, w_out) = kernel.shape[:2], offset.shape[1:3]

    def grid(rows: int, columns: int, scale: tuple[int, int], origin: tuple[int, int]) -> Array:
        index = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij"), -1).reshape(-1, 2)
        return (index * jnp.array(scale)[None] - jnp.array(origin)[None]).astype(offset.dtype)

    base = grid(h_out, w_out, geometry.strides, geometry.padding)[None, :, None]
    return base, grid(kh, kw, geometry.dilation, (0, 0))[:, None, None, None]


def _by_tap(offset: Array, mask: Array, kernel: Array, groups: int) -> tuple[Array, Array, Array]:
    """Return offset `[K, N, P, G, 2]`, mask `[K, N, P, G]` and kernel `[K, G, C / G, O]` with the taps as the leading axis."""
    n, h_out, w_out = offset.shape[:3]
    kh, kw, c, o = kernel.shape
    offset = offset.reshape(n, h_out * w_out, groups, kh * kw, 2)
    mask = mask.reshape(n, h_out * w_out, groups, kh * kw)
    kernel = kernel.reshape(kh * kw, groups, c // groups, o)
    return jnp.moveaxis(offset, 3, 0), jnp.moveaxis(mask, 3, 0), kernel


def _pair(value: int | Sequence[int], name: str, least: int) -> tuple[int, int]:
    one = as_int(value)
    try:
        pair = [as_int(v) for v in value] if one is None else [one, one]  # type: ignore[union-attr]
    except TypeError:  # neither an integer nor a sequence
        pair = []
    match pair:
        case [int(rows), int(columns)] if min(rows, columns) >= least:
            return rows, columns
    raise ValueError(f"{name} (={value!r}) must be one integer of at least {least}, or one for height and one for width")


def _check_shapes(x: Array, offset: Array, kernel: Array, bias: Array | None, mask: Array | None, geometry: Geometry) -> tuple[int, int]:
    """Check that all shapes match and return (H', W')."""
    for name, array, axes in (("x", x, "[N, H, W, C]"), ("offset", offset, "[N, H', W', G * kh * kw * 2]")):
        if array.ndim != 4:
            raise ValueError(f"{name} has shape {array.shape} and must be {axes}")
    if kernel.ndim != 4 or kernel.shape[2] != x.shape[3] or 0 in kernel.shape:
        raise ValueError(f"kernel has shape {kernel.shape} and must be [kh, kw, C = {x.shape[3]}, O], each at least 1")
    groups, taps, channels = geometry.groups, kernel.shape[0] * kernel.shape[1], x.shape[3]
    if groups < 1 or channels % groups:
        raise ValueError(f"offset_groups (={groups}) must divide the {channels} channels of x")
    sizes = [
        (size + 2 * pad - dilation * (k - 1) - 1) // stride + 1
        for size, k, stride, pad, dilation in zip(x.shape[1:3], kernel.shape[:2], geometry.strides, geometry.padding, geometry.dilation)
    ]
    h_out, w_out = sizes
    if h_out < 1 or w_out < 1:
        raise ValueError(f"x of {x.shape[1]}x{x.shape[2]} is smaller than the extent of the kernel: the output would be {h_out}x{w_out}")
    expected: dict[str, tuple[Array | None, tuple[int, ...]]] = {
        "offset": (offset, (x.shape[0], h_out, w_out, groups * taps * 2)),
        "mask": (mask, (x.shape[0], h_out, w_out, groups * taps)),
        "bias": (bias, (kernel.shape[3],)),
    }
    for name, (given, shape) in expected.items():
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} has shape {given.shape} and must be {shape}")
    return h_out, w_out
