"""The deformable convolution by kernels written in Pallas, for NVIDIA GPUs (`pallas_gpu`) and TPUs (`pallas_tpu`).

XLA computes where the samples lie, their bilinear weights times the mask, and the gradients of offsets and mask from four sums per sample.
These arrays have no channels and are small. The kernels do what has channels: they gather the neighbours, blend them and multiply the
samples by the kernel.

The choice is made when a program is compiled for a platform, so that an exported program has the right form for each; platforms without a
kernel use the form of `deform_conv`, and so do float64, sizes that are symbols, and several TPUs. No accelerator has run the kernels yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from aecr_jax.ops import pallas_gpu, pallas_tpu
from aecr_jax.ops.deform_conv import (
    Geometry,
    Location,
    by_taps,
    by_taps_gradient,
    crop_image,
    has_kernels,
    locate,
    location_gradients,
    pad_image,
    row_length,
    tap_positions,
)

_BACKENDS: dict[str, Any] = {"cuda": pallas_gpu, "tpu": pallas_tpu}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def by_kernels(x: Array, offset: Array, mask: Array, kernel: Array, geometry: Geometry, interpret: str = "") -> Array:
    """Return the output without bias. The arguments are those of `deform_conv.by_taps`.

    With `interpret`, "cuda" or "tpu", the kernels of that platform are emulated on any platform, which is slow, to test them.
    """
    forward = functools.partial(_forward, geometry)
    usual = functools.partial(by_taps, geometry=geometry)
    return _choose(forward, usual, geometry.groups, interpret, x, offset, mask, kernel)


def _by_kernels_forward(
    x: Array, offset: Array, mask: Array, kernel: Array, geometry: Geometry, interpret: str
) -> tuple[Array, tuple[Array, ...]]:
    return by_kernels(x, offset, mask, kernel, geometry, interpret), (x, offset, mask, kernel)


def _by_kernels_backward(geometry: Geometry, interpret: str, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
    def usual(x: Array, offset: Array, mask: Array, kernel: Array, cotangent: Array) -> tuple[Array, ...]:
        return by_taps_gradient(geometry, (x, offset, mask, kernel), cotangent)

    return _choose(functools.partial(_backward, geometry), usual, geometry.groups, interpret, *residuals, cotangent)


by_kernels.defvjp(_by_kernels_forward, _by_kernels_backward)


def _choose(by_backend: Callable[..., Any], usual: Callable[..., Any], groups: int, interpret: str, *arrays: Array) -> Any:
    """Call `by_backend` where there is a kernel, else `usual`; the first and the fourth array are x and the kernel."""
    x = arrays[0]
    static = all(isinstance(size, int) for array in arrays for size in array.shape)
    if not static or not x.size or x.dtype.itemsize > 4:
        return usual(*arrays)
    if interpret:
        return by_backend(_BACKENDS[interpret], True, *arrays)
    fitting = {name: backend for name, backend in _BACKENDS.items() if backend.fits(x.shape, arrays[3].shape, groups, x.dtype)}
    if jax.default_backend() == "tpu" and not has_kernels("tpu", jax.device_count()):
        fitting.pop("tpu", None)
    branches = {name: functools.partial(by_backend, backend, False) for name, backend in fitting.items()}
    return lax.platform_dependent(*arrays, **branches, default=usual)


def _forward(geometry: Geometry, backend: Any, interpret: bool, x: Array, offset: Array, mask: Array, kernel: Array) -> Array:
    image, location, mask, kernel = _prepare(geometry, x, offset, mask, kernel)
    run = functools.partial(backend.forward, row=row_length(x.shape), interpret=interpret)
    out = _split_by_images(run, "n s c, n k p, n k f p, k g o -> n p o", 3)(image, location.corner, _weights(location, mask), kernel)
    return out.reshape(*offset.shape[:3], kernel.shape[-1])


def _backward(
    geometry: Geometry, backend: Any, interpret: bool, x: Array, offset: Array, mask: Array, kernel: Array, cotangent: Array
) -> tuple[Array, ...]:
    image, location, tap_mask, tap_kernel = _prepare(geometry, x, offset, mask, kernel)
    run = functools.partial(backend.backward, row=row_length(x.shape), interpret=interpret)
    rule = "n s c, n k p, n k f p, k g o, n p o -> n s c, n k g o, n k f p"
    flat = cotangent.reshape(*tap_mask.shape[::2], cotangent.shape[-1])  # [N, P, O]
    grad_image, grad_kernel, sums = _split_by_images(run, rule, 3)(image, location.corner, _weights(location, tap_mask), tap_kernel, flat)
    grad_mask, grad_position = location_gradients(location, [sums[:, :, n] for n in range(4)])
    # The gradients of the weights are of each image alone, so that XLA adds them, across devices too.
    groups, taps = geometry.groups, kernel.shape[0] * kernel.shape[1]
    grad_kernel = grad_kernel.sum(0).reshape(groups, taps, -1, kernel.shape[3]).swapaxes(0, 1).reshape(kernel.shape)
    return (
        crop_image(grad_image, x.shape).astype(x.dtype),
        jnp.moveaxis(grad_position * tap_mask[..., None], 1, 2).reshape(offset.shape).astype(offset.dtype),
        jnp.moveaxis(grad_mask, 1, 2).reshape(mask.shape).astype(mask.dtype),
        grad_kernel.astype(kernel.dtype),
    )


def _prepare(geometry: Geometry, x: Array, offset: Array, mask: Array, kernel: Array) -> tuple[Array, Location, Array, Array]:
    """Return the padded image `[N, pixels, C]`, the samples and their mask `[N, G K, P]`, and the kernel `[G K, C / G, O]`."""
    groups, (kh, kw, c, o) = geometry.groups, kernel.shape
    n, positions, samples = offset.shape[0], offset.shape[1] * offset.shape[2], groups * kh * kw
    image = pad_image(x, groups)
    base, steps = tap_positions(x, offset, kernel, geometry)
    steps = jnp.tile(steps.reshape(1, kh * kw, 1, 2), (1, groups, 1, 1))
    position = base.reshape(1, 1, positions, 2) + steps + jnp.moveaxis(offset.reshape(n, positions, samples, 2), 1, 2)
    tap_mask = jnp.moveaxis(mask.reshape(n, positions, samples), 1, 2)
    by_group = kernel.reshape(kh * kw, groups, c // groups, o).swapaxes(0, 1).reshape(samples, c // groups, o)
    return image.reshape(n, -1, c), locate(position, x.shape), tap_mask, by_group


def _weights(location: Location, mask: Array) -> Array:
    """Return the factors of the four neighbours, `[N, G K, 4, P]`."""
    return jnp.stack([share * mask for share in location.shares], 2)


def _split_by_images(run: Callable[..., Any], rule: str, replicated: int) -> Callable[..., Any]:
    """Let each device run a kernel on its images; XLA alone would gather the batch on every device, because it cannot divide a kernel.

    Args:
      run: the function that calls the kernel.
      rule: the axes of its arguments and results in Shardy's notation; `n` is that of the images.
      replicated: position of the argument that all devices have.
    """

    def partition(mesh: Any, arguments: Any, results: Any) -> Any:
        axes = arguments[0].sharding.spec[:1]
        split, whole = NamedSharding(mesh, PartitionSpec(*axes)), NamedSharding(mesh, PartitionSpec())
        shardings = tuple(whole if n == replicated else split for n in range(len(arguments)))
        return mesh, run, jax.tree.map(lambda _: split, results), shardings

    function = custom_partitioning(lambda *arrays: run(*arrays))  # it does not take keywords, such as those bound in `run`
    names = dict.fromkeys(name for array in rule.replace("->", ",").split(",") for name in array.split())  # Shardy wants them in this order
    function.def_partition(partition, sharding_rule=rule, need_replication_factors=tuple(name for name in names if name != "n"))
    return function
