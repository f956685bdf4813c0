"""Image quality: PSNR and SSIM as the official code measures them, other definitions of both, and the colour difference CIEDE2000.

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
    return _psnr(*prepare(prediction, target))


def _psnr(prediction: Array, target: Array) -> Array:
    error = jnp.mean(jnp.square(prediction - target), (1, 2, 3))
    return jnp.where(error == 0, 100.0, -10 * jnp.log10(jnp.where(error == 0, 1, error)))


def ssim(prediction: ArrayLike, target: ArrayLike) -> Array:
    """Return the structural similarity, at most 1: 11x11 Gaussian window, sigma 1.5, zero padding, mean over pixels and RGB.

    This is the definition of the official code. Arguments, result and errors are as in `psnr`: `[N, H, W, C]` in [0, 1], uint8 or
    uint16 -> `[N]`.
    """
    prediction, target = prepare(prediction, target)
    return jnp.mean(_ssim_map(prediction, target, padding=5), (1, 2, 3))


def psnr_uint8(prediction: ArrayLike, target: ArrayLike) -> Array:
    """Return `psnr` after rounding both images to 8 bits, as if they had been written to files and read back.

    Arguments, result and errors are as in `psnr`: `[N, H, W, C]` in [0, 1], uint8 or uint16 -> `[N]`. (8-bit images need no
    rounding, so `psnr` gives the same for them.)
    """
    return _psnr(*(jnp.round(image * 255) / 255 for image in prepare(prediction, target)))


def psnr_y(prediction: ArrayLike, target: ArrayLike) -> Array:
    """Return `psnr` of the luma only (ITU-R BT.601, 16 to 235), as is customary in super-resolution.

    Arguments, result and errors are as in `psnr`, but with 3 channels: `[N, H, W, 3]` in [0, 1], uint8 or uint16 -> `[N]`.
    """
    prediction, target = prepare(prediction, target)
    return _psnr(_luma(prediction, "prediction"), _luma(target, "target"))


def ssim_valid(prediction: ArrayLike, target: ArrayLike) -> Array:
    """Return `ssim` without padding: the mean over the windows that lie inside the image (Wang et al., 2004).

    Arguments, result and errors are as in `psnr`: `[N, H, W, C]` in [0, 1], uint8 or uint16 -> `[N]`. In addition, images must have at
    least 11x11 pixels.
    """
    prediction, target = prepare(prediction, target)
    if min(prediction.shape[1:3]) < 11:
        raise ValueError(f"images of {prediction.shape[1]}x{prediction.shape[2]} must be at least 11x11")
    return jnp.mean(_ssim_map(prediction, target, padding=0), (1, 2, 3))


def ciede2000(prediction: ArrayLike, target: ArrayLike) -> Array:
    """Return the mean over all pixels of the colour difference CIEDE2000 (Luo, Cui and Rigg, 2001) of two sRGB images; 0 is best.

    Colours are converted to CIELAB with the white point D65 of the 2-degree observer, as scikit-image's `rgb2lab` does. The weights kL, kC
    and kH are 1. Arguments, result and errors are as in `psnr`, but with 3 channels: `[N, H, W, 3]` in [0, 1], uint8 or uint16 -> `[N]`.
    """
    prediction, target = prepare(prediction, target)
    if prediction.shape[3] != 3:
        raise ValueError(f"prediction has shape {prediction.shape} and must be [N, H, W, 3]: CIEDE2000 takes the 3 channels RGB")
    return jnp.mean(color_difference(_lab(prediction), _lab(target)), (1, 2))


@jax.jit  # without it, each of the many small operations would be compiled
def color_difference(first: ArrayLike, second: ArrayLike) -> Array:
    """Return the difference CIEDE2000 of colours in CIELAB, `[..., 3]` (L, a, b) -> `[...]`, with kL = kC = kH = 1.

    The formula and its cases are those of Sharma, Wu and Dalal, "The CIEDE2000 Color-Difference Formula: Implementation Notes,
    Supplementary Test Data, and Mathematical Observations" (Color Research and Application 30, 2005).
    """
    (l1, a1, b1), (l2, a2, b2) = (jnp.moveaxis(jnp.asarray(lab), -1, 0) for lab in (first, second))
    g = 0.5 * (1 - _saturation((jnp.hypot(a1, b1) + jnp.hypot(a2, b2)) / 2))
    a1, a2 = (1 + g) * a1, (1 + g) * a2
    c1, c2 = jnp.hypot(a1, b1), jnp.hypot(a2, b2)
    h1, h2 = (jnp.mod(jnp.arctan2(b, a), 2 * np.pi) for a, b in ((a1, b1), (a2, b2)))
    # Hues that are more than half a turn apart are closer the other way round. Rounding must not decide the case of exactly half a turn.
    hue = h2 - h1
    around = jnp.abs(hue) > np.pi + 1e-5
    hue = jnp.where(around, hue - 2 * np.pi * jnp.sign(hue), hue)
    mean_hue = (h1 + h2) / 2 + jnp.where(around, np.pi, 0)  # the period of all terms below is a whole turn
    mean_hue = jnp.where(c1 * c2 == 0, h1 + h2, mean_hue)  # black, white and grey have no hue
    d_l, d_c, d_h = l2 - l1, c2 - c1, 2 * jnp.sqrt(c1 * c2) * jnp.sin(hue / 2)
    mean_l, mean_c = (l1 + l2) / 2, (c1 + c2) / 2
    degrees = np.pi / 180
    t = (
        1
        - 0.17 * jnp.cos(mean_hue - 30 * degrees)
        + 0.24 * jnp.cos(2 * mean_hue)
        + 0.32 * jnp.cos(3 * mean_hue + 6 * degrees)
        - 0.20 * jnp.cos(4 * mean_hue - 63 * degrees)
    )
    from_blue = (jnp.mod(mean_hue, 2 * np.pi) / degrees - 275) / 25
    rotation = -2 * _saturation(mean_c) * jnp.sin(60 * degrees * jnp.exp(-(from_blue**2)))
    lightness = d_l / (1 + 0.015 * (mean_l - 50) ** 2 / jnp.sqrt(20 + (mean_l - 50) ** 2))
    chroma = d_c / (1 + 0.045 * mean_c)
    hue = d_h / (1 + 0.015 * mean_c * t)
    return jnp.sqrt(jnp.maximum(lightness**2 + chroma**2 + hue**2 + rotation * chroma * hue, 0))


def _saturation(chroma: Array) -> Array:
    """Return `sqrt(C^7 / (C^7 + 25^7))`, which grows from 0 to 1 with the chroma C."""
    power = (chroma / 25) ** 7
    return jnp.sqrt(power / (power + 1))


@jax.jit
def _lab(rgb: Array) -> Array:
    """Convert sRGB `[..., 3]` in [0, 1] to CIELAB: IEC 61966-2-1, white point D65 of the 2-degree observer."""
    linear = jnp.where(rgb <= 0.04045, rgb / 12.92, ((jnp.maximum(rgb, 0.04045) + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    to_xyz /= np.array([[0.95047], [1.0], [1.08883]])
    xyz = jnp.einsum("...c,xc->...x", linear, jnp.asarray(to_xyz, rgb.dtype), precision="highest")
    f = jnp.where(xyz > 0.008856, jnp.cbrt(jnp.maximum(xyz, 0.008856)), 7.787 * xyz + 16 / 116)
    x, y, z = jnp.moveaxis(f, -1, 0)
    return jnp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


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


def prepare(prediction: ArrayLike, target: ArrayLike) -> tuple[Array, Array]:
    """Convert two batches of images to floating point in [0, 1] by the rules of this module, `[N, H, W, C]`, or raise a ValueError."""
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
