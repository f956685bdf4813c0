"""Image quality: PSNR and SSIM as the official code measures them.

Each metric takes two batches of images `[N, H, W, C]`, the prediction first, and returns one number per image, `[N]`, in at
least float32. The same rules about types and ranges apply to all of them:

- Floating point images are in [0, 1]. Values outside this range are clipped, as in the official code. Outside `jit`, values below
  -2 or above 3 raise a ValueError, because such an image has another range (0 to 255, for instance); inside `jit`, values are not known.
- uint8 and uint16 images are divided by 255 and 65535. Other types (bool, signed integers, ...) raise a ValueError.
- An image that contains NaN scores NaN. An empty batch gives an empty result. Images of different shapes or without pixels raise a
  ValueError.

Scores from other definitions are not comparable: PSNR on luma is 2 to 5 dB higher than on RGB, and SSIM without padding differs
in the third digit. Each other definition therefore has its own name.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from aecr_jax.validation import as_array

# The values of a network's output lie in or near this range; those of images in another range (0 to 255, standardized) do not.
_LEAST, _GREATEST = -2, 3


def psnr(prediction: ArrayLike, target: ArrayLike) -> Array:
    """Return the peak signal-to-noise ratio in dB, `-10 log10(mean squared error over all channels)`, or 100 for equal images.

    This is the definition of the official code. The value 100 in place of infinity keeps a mean over images finite.

    Args:
      prediction: `[N, H, W, C]`, floating point in [0, 1] (clipped), uint8 or uint16.
      target: the same shape, in any of these types.

    Returns:
      `[N]`.

    Raises:
      ValueError: shapes differ, or an image has no pixels, another type or, outside `jit`, values below -2 or above 3.
    """
    return _psnr(*_prepare(prediction, target))


def _psnr(prediction: Array, target: Array) -> Array:
    error = jnp.mean(jnp.square(prediction - target), (1, 2, 3))
    return jnp.where(error == 0, 100.0, -10 * jnp.log10(jnp.where(error == 0, 1, error)))


def ssim(prediction: ArrayLike, target: ArrayLike) -> Array:
    """Return the structural similarity, at most 1: 11x11 Gaussian window, sigma 1.5, zero padding, mean over pixels and RGB.

    This is the definition of the official code. Arguments, result and errors are as in `psnr`: `[N, H, W, C]` in [0, 1], uint8 or
    uint16 -> `[N]`.
    """
    prediction, target = _prepare(prediction, target)
    return jnp.mean(_ssim_map(prediction, target, padding=5), (1, 2, 3))


def psnr_uint8(prediction: ArrayLike, target: ArrayLike) -> Array:
    """Return `psnr` after rounding both images to 8 bits, as if they had been written to files and read back.

    Arguments, result and errors are as in `psnr`: `[N, H, W, C]` in [0, 1], uint8 or uint16 -> `[N]`. (8-bit images need no
    rounding, so `psnr` gives the same for them.)
    """
    return _psnr(*(jnp.round(image * 255) / 255 for image in _prepare(prediction, target)))


def psnr_y(prediction: ArrayLike, target: ArrayLike) -> Array:
    """Return `psnr` of the luma only (ITU-R BT.601, 16 to 235), as is customary in super-resolution.

    Arguments, result and errors are as in `psnr`, but with 3 channels: `[N, H, W, 3]` in [0, 1], uint8 or uint16 -> `[N]`.
    """
    prediction, target = _prepare(prediction, target)
    return _psnr(_luma(prediction, "prediction"), _luma(target, "target"))


def ssim_valid(prediction: ArrayLike, target: ArrayLike) -> Array:
    """Return `ssim` without padding: the mean over the windows that lie inside the image (Wang et al., 2004).

    Arguments, result and errors are as in `psnr`: `[N, H, W, C]` in [0, 1], uint8 or uint16 -> `[N]`. In addition, images must have at
    least 11x11 pixels.
    """
    prediction, target = _prepare(prediction, target)
    if min(prediction.shape[1:3]) < 11:
        raise ValueError(f"images of {prediction.shape[1]}x{prediction.shape[2]} must be at least 11x11")
    return jnp.mean(_ssim_map(prediction, target, padding=0), (1, 2, 3))


def luma(image: ArrayLike) -> Array:
    """Convert RGB `[N, H, W, 3]` in [0, 1] (not clipped), uint8 or uint16 to Y of BT.601, `[N, H, W, 1]` in [16 / 255, 235 / 255].

    Types and errors are as in `psnr`.
    """
    array = _as_images(image, "image")
    return _luma(_scale(array, jnp.promote_types(array.dtype, jnp.float32)), "image")


def _luma(image: Array, name: str) -> Array:
    if image.ndim != 4 or image.shape[3] != 3:
        raise ValueError(f"{name} has shape {image.shape} and must be [N, H, W, 3]: luma takes the 3 channels RGB")
    weights = jnp.array([65.481, 128.553, 24.966], image.dtype) / 255
    return jnp.sum(image * weights[None, None, None], -1, keepdims=True) + 16 / 255


def _prepare(prediction: ArrayLike, target: ArrayLike) -> tuple[Array, Array]:
    prediction, target = _as_images(prediction, "prediction"), _as_images(target, "target")
    if prediction.shape != target.shape or prediction.ndim != 4:
        raise ValueError(f"prediction has shape {prediction.shape} and target {target.shape}: they must have the same shape, [N, H, W, C]")
    if 0 in prediction.shape[1:]:
        raise ValueError(f"prediction and target have shape {prediction.shape} and must have at least one pixel and channel")
    dtype = jnp.promote_types(jnp.promote_types(prediction.dtype, target.dtype), jnp.float32)
    return jnp.clip(_scale(prediction, dtype), 0, 1), jnp.clip(_scale(target, dtype), 0, 1)


def _scale(images: Array, dtype: Any) -> Array:
    """Convert images to `dtype`; unsigned integers are divided by the greatest value of their type."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(dtype)
    # The quotients come from a table, because XLA would multiply by the rounded reciprocal of 255, and the results for 8-bit images
    # would differ from NumPy's.
    greatest = jnp.iinfo(images.dtype).max
    return jnp.asarray(np.arange(greatest + 1) / greatest, dtype).at[images].get(mode="promise_in_bounds")


def _as_images(images: ArrayLike, name: str) -> Array:
    """Convert images to an array, and check that it has a type and range that the module's docstring allows."""
    array = as_array(images, name)
    if array.dtype in (jnp.uint8, jnp.uint16):
        return array
    if not jnp.issubdtype(array.dtype, jnp.floating):
        given = getattr(images, "dtype", array.dtype)  # JAX narrows 64-bit types
        raise ValueError(f"{name} has type {given} and must be floating point in [0, 1], uint8 or uint16")
    if array.size and not isinstance(array, jax.core.Tracer):
        # NaN is not an error here: it makes the score of its image NaN. If all values are NaN, both comparisons are false.
        least, greatest = float(jnp.nanmin(array)), float(jnp.nanmax(array))
        if least < _LEAST or greatest > _GREATEST:
            raise ValueError(
                f"{name} has values from {least:g} to {greatest:g} and must be in [0, 1]: divide 8-bit values by 255, or pass uint8"
            )
    return array


def _ssim_map(x: Array, y: Array, *, padding: int) -> Array:
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (_blur(image, padding) for image in (x, y, x * x, y * y, x * y))
    variance_x, variance_y = mean_xx - mean_x**2, mean_yy - mean_y**2
    covariance = mean_xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (variance_x + variance_y + c2)


def _blur(x: Array, padding: int) -> Array:
    """Blur each channel with a Gaussian window of 11 pixels, sigma 1.5, first vertically and then horizontally."""
    window = np.exp(-0.5 * (np.arange(11) - 5.0) ** 2 / 1.5**2)
    window /= window.sum()
    n, h, w, c = x.shape
    x = jnp.moveaxis(x, 3, 1).reshape(n * c, h, w, 1)
    for shape, pad in (((11, 1, 1, 1), ((padding, padding), (0, 0))), ((1, 11, 1, 1), ((0, 0), (padding, padding)))):
        kernel = jnp.asarray(window.reshape(shape), x.dtype)
        x = lax.conv_general_dilated(x, kernel, (1, 1), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest")
    return jnp.moveaxis(x.reshape(n, c, *x.shape[1:3]), 1, 3)
