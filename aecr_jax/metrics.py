"""Image quality: PSNR and SSIM as the official code measures them.

All functions take float images `[N, H, W, C]` in [0, 1] (values outside are clipped), the prediction first, and give one number
per image, `[N]`, in at least float32. Scores from other definitions are not comparable: PSNR on luma reads 2 to 5 dB higher than
on RGB, and SSIM without padding differs in the third digit. So each other definition has a name of its own.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def psnr(prediction: Array, target: Array) -> Array:
    """Peak signal-to-noise ratio in dB, `-10 log10(mean squared error over all channels)`; 100 for equal images.

    The official definition. Its 100 in place of infinity keeps a mean over images finite.
    """
    prediction, target = _prepare(prediction, target)
    error = jnp.mean(jnp.square(prediction - target), (1, 2, 3))
    return jnp.where(error == 0, 100.0, -10 * jnp.log10(jnp.where(error == 0, 1, error)))


def ssim(prediction: Array, target: Array) -> Array:
    """Structural similarity: 11x11 Gaussian window, sigma 1.5, zero padding, mean over pixels and RGB (the official definition)."""
    prediction, target = _prepare(prediction, target)
    return jnp.mean(_ssim_map(prediction, target, padding=5), (1, 2, 3))


def psnr_uint8(prediction: Array, target: Array) -> Array:
    """`psnr` after rounding both images to 8 bit, as if they had been written to files and read back."""
    return psnr(*(jnp.round(image * 255) / 255 for image in _prepare(prediction, target)))


def psnr_y(prediction: Array, target: Array) -> Array:
    """`psnr` of the luma alone (ITU-R BT.601, 16 to 235), as super-resolution reports it."""
    return psnr(*(luma(image) for image in _prepare(prediction, target)))


def ssim_valid(prediction: Array, target: Array) -> Array:
    """`ssim` without padding: the mean over windows that lie inside the image (Wang et al., 2004). At least 11x11 pixels."""
    prediction, target = _prepare(prediction, target)
    if min(prediction.shape[1:3]) < 11:
        raise ValueError(f"images of {prediction.shape[1]}x{prediction.shape[2]} must be at least 11x11")
    return jnp.mean(_ssim_map(prediction, target, padding=0), (1, 2, 3))


def luma(image: Array) -> Array:
    """RGB `[N, H, W, 3]` -> Y of BT.601 in its 8-bit range, `[N, H, W, 1]` in [16 / 255, 235 / 255]."""
    weights = jnp.array([65.481, 128.553, 24.966], image.dtype) / 255
    return jnp.sum(image * weights[None, None, None], -1, keepdims=True) + 16 / 255


def _prepare(prediction: Array, target: Array) -> tuple[Array, Array]:
    prediction, target = jnp.asarray(prediction), jnp.asarray(target)
    if prediction.shape != target.shape or prediction.ndim != 4:
        raise ValueError(f"prediction {prediction.shape} and target {target.shape} must both be [N, H, W, C] and equal")
    dtype = jnp.promote_types(jnp.promote_types(prediction.dtype, target.dtype), jnp.float32)
    return jnp.clip(prediction.astype(dtype), 0, 1), jnp.clip(target.astype(dtype), 0, 1)


def _ssim_map(x: Array, y: Array, *, padding: int) -> Array:
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (_blur(image, padding) for image in (x, y, x * x, y * y, x * y))
    variance_x, variance_y = mean_xx - mean_x**2, mean_yy - mean_y**2
    covariance = mean_xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (variance_x + variance_y + c2)


def _blur(x: Array, padding: int) -> Array:
    """Gaussian window of 11 pixels, sigma 1.5, each channel by itself, rows and columns apart."""
    window = np.exp(-0.5 * (np.arange(11) - 5.0) ** 2 / 1.5**2)
    window /= window.sum()
    n, h, w, c = x.shape
    x = jnp.moveaxis(x, 3, 1).reshape(n * c, h, w, 1)
    for shape, pad in (((11, 1, 1, 1), ((padding, padding), (0, 0))), ((1, 11, 1, 1), ((0, 0), (padding, padding)))):
        kernel = jnp.asarray(window.reshape(shape), x.dtype)
        x = lax.conv_general_dilated(x, kernel, (1, 1), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest")
    return jnp.moveaxis(x.reshape(n, c, *x.shape[1:3]), 1, 3)
