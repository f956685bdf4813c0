"""The guided filter (He, Sun and Tang, ECCV 2010), which smooths an image along the edges of another."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from aecr_jax.ops.windows import box_mean


def guided_filter(guide: Array, image: Array, *, radius: int, epsilon: float) -> Array:
    """Return the image that is, in each window, the linear function of `guide` closest to `image`, averaged over all windows.

    With `m` the mean over a window, `a = (m(guide image) - m(guide) m(image)) / (m(guide^2) - m(guide)^2 + epsilon)` and
    `b = m(image) - a m(guide)`; the result is `m(a) guide + m(b)`.

    Args:
      guide: grey images `[N, H, W]`.
      image: what is filtered, `[N, H, W]`.
      radius: windows have `2 radius + 1` rows and columns, and are cut at the image's border; they may be larger than the image.
      epsilon: variance of `guide`, in [0, 1]^2, below which a window counts as flat.

    Returns:
      `[N, H, W]`, of the common type of the arguments, float32 at least.
    """
    dtype = jnp.promote_types(jnp.result_type(guide, image), jnp.float32)
    guide, image = guide.astype(dtype), image.astype(dtype)
    # The result does not depend on these shifts. They keep more digits of the differences of means below.
    guide = guide - lax.stop_gradient(guide.mean((1, 2), keepdims=True))
    shift = lax.stop_gradient(image.mean((1, 2), keepdims=True))
    image = image - shift
    mean = jax.vmap(functools.partial(box_mean, radius=radius), 1, 1)
    means = mean(jnp.stack([guide, image, guide * guide, guide * image], 1))  # [N, 4, H, W]
    mean_guide, mean_image = means[:, 0], means[:, 1]
    variance = means[:, 2] - mean_guide * mean_guide
    covariance = means[:, 3] - mean_guide * mean_image
    a = covariance / (jnp.maximum(variance, 0) + epsilon)
    b = mean_image - a * mean_guide
    means = mean(jnp.stack([a, b], 1))
    return means[:, 0] * guide + means[:, 1] + shift
