"""Sliding windows and the guided filter, against their definitions written as loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aecr_jax.ops.guided_filter import guided_filter
from aecr_jax.ops.windows import box_mean, window_max, window_min

# Radii below and beyond the sides of the images.
SHAPES = [(1, 1), (6, 1), (16, 13)]
RADII = [0, 1, 3, 7, 50]


def by_loop(x, radius, reduce):
    """Apply `reduce` to the window around each pixel of `x`, `[N, H, W, ...]`."""
    y = np.empty_like(x)
    for i, j in np.ndindex(x.shape[1:3]):
        y[:, i, j] = reduce(x[:, max(0, i - radius) : i + radius + 1, max(0, j - radius) : j + radius + 1], (1, 2))
    return y


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_are_cut_at_the_border(shape, x64):
    x = np.random.default_rng(0).standard_normal((2, *shape, 2))
    got = jax.jit(lambda x: [(window_min(x, radius), window_max(x, radius), box_mean(x[..., 0], radius)) for radius in RADII])(x)
    for radius, (least, greatest, mean) in zip(RADII, got):
        np.testing.assert_array_equal(least, by_loop(x, radius, np.min))
        np.testing.assert_array_equal(greatest, by_loop(x, radius, np.max))
        np.testing.assert_allclose(mean, by_loop(x[..., 0], radius, np.mean), atol=1e-14)


@functools.partial(jax.jit, static_argnums=(2, 3))
def filtered(guide, image, radius, epsilon):
    return guided_filter(guide, image, radius=radius, epsilon=epsilon)


def filter_by_loop(guide, image, radius, epsilon):
    def mean(x):
        return by_loop(x, radius, np.mean)

    a = (mean(guide * image) - mean(guide) * mean(image)) / (mean(guide * guide) - mean(guide) ** 2 + epsilon)
    return mean(a) * guide + mean(mean(image) - a * mean(guide))


@pytest.mark.parametrize("shape", SHAPES)
def test_guided_filter(shape, x64):
    guide, image = np.random.default_rng(0).random((2, 2, *shape))
    for radius in (3, 50):
        np.testing.assert_allclose(filtered(guide, image, radius, 1e-3), filter_by_loop(guide, image, radius, 1e-3), atol=1e-12)


def test_a_large_image_keeps_its_digits_in_float32(x64):
    """The sums over windows of a bright image of 1 x 3000 pixels; differences of cumulative sums are off by 2e-6 here."""
    x = 0.9 + 0.1 * np.random.default_rng(0).random((1, 1, 3000))
    mean = jax.jit(lambda x: box_mean(x, 60))
    np.testing.assert_allclose(mean(x.astype(np.float32)), mean(x), rtol=3e-7)
    guide = 0.9 + 0.001 * np.random.default_rng(1).random(x.shape)  # almost flat, so that its variance is a difference of close numbers
    exact = filtered(guide, x, 60, 1e-4)
    np.testing.assert_allclose(filtered(guide.astype(np.float32), x.astype(np.float32), 60, 1e-4), exact, atol=1e-6)


def test_gradients_are_those_of_the_definition(x64):
    """By central differences in one direction; the windows of the extremes overlap in their computation."""
    guide, image, direction = np.random.default_rng(0).random((3, 1, 5, 6))

    def total(image):
        parts = guided_filter(jnp.asarray(guide), image, radius=2, epsilon=1e-2), guided_filter(image, guide, radius=2, epsilon=1e-2)
        return sum(jnp.sum(jnp.square(part)) for part in (*parts, window_max(image, 2), window_min(image, 3)))

    total = jax.jit(total)
    numeric = (total(image + 1e-6 * direction) - total(image - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(jnp.sum(jax.jit(jax.grad(total))(image) * direction), numeric, rtol=1e-6)


def test_bfloat16_images_are_filtered_in_float32():
    guide, image = jnp.asarray(np.random.default_rng(0).random((2, 1, 5, 6)), jnp.bfloat16)
    result = filtered(guide, image, 2, 1e-2)
    assert result.dtype == jnp.float32
    # The two are different programs, which may round differently.
    np.testing.assert_allclose(result, filtered(guide.astype(jnp.float32), image.astype(jnp.float32), 2, 1e-2), rtol=1e-6)
