import jax.numpy as jnp
import numpy as np
import pytest
from reference import load, nhwc

from aecr_jax import psnr, ssim
from aecr_jax.metrics import luma, psnr_uint8, psnr_y, ssim_valid


@pytest.mark.parametrize("i", range(3))
def test_official_values(i):
    """The official code's metrics on predictions that leave [0, 1] (tests/golden)."""
    d = load("metrics")
    prediction, target = (jnp.array(nhwc(d[f"{k}{i}"])[None]) for k in ("pred", "gt"))
    np.testing.assert_allclose(psnr(prediction, target), [d[f"psnr{i}"]], atol=1e-4)
    np.testing.assert_allclose(ssim(prediction, target), [d[f"ssim{i}"]], atol=1e-5)


def test_psnr_by_hand():
    """An error of 0.1 everywhere is 20 dB; values are clipped first; each image has its own."""
    target = jnp.full((2, 4, 4, 3), 0.5)
    np.testing.assert_allclose(psnr(target + jnp.array([0.1, 0.01]).reshape(2, 1, 1, 1), target), [20, 40], rtol=1e-4)
    np.testing.assert_allclose(psnr(jnp.full((1, 4, 4, 3), 7.0), jnp.full((1, 4, 4, 3), 0.9)), [20], rtol=1e-4)
    assert psnr(target, target)[0] == 100


def test_ssim_of_equal_images_is_one():
    x = jnp.array(np.random.default_rng(0).random((1, 16, 20, 3), np.float32))
    np.testing.assert_allclose(ssim(x, x), [1], rtol=1e-5)
    np.testing.assert_allclose(ssim_valid(x, x), [1], rtol=1e-5)


def test_scikit_image_where_the_definitions_agree():
    """Computed with scikit-image 0.26.0: peak_signal_noise_ratio, and structural_similarity with gaussian_weights, sigma 1.5,
    use_sample_covariance=False, which leaves the border out as `ssim_valid` does; data_range 1."""
    rng = np.random.default_rng(7)
    x = rng.random((24, 31, 3))
    y = np.clip(x + 0.2 * rng.standard_normal(x.shape), 0, 1)
    np.testing.assert_allclose(psnr(y[None], x[None]), [15.089111727620871], atol=1e-4)
    np.testing.assert_allclose(ssim_valid(y[None], x[None]), [0.8168184955309746], atol=1e-5)


def test_other_definitions():
    """By hand: white has luma 235; a grey step of 0.1 is 21.9 of 255 in luma; 0.001 vanishes in 8 bit."""
    np.testing.assert_allclose(luma(jnp.ones((1, 1, 1, 3))), 235 / 255, rtol=1e-6)
    a, b = jnp.full((1, 12, 12, 3), 0.4), jnp.full((1, 12, 12, 3), 0.5)
    np.testing.assert_allclose(psnr_y(a, b), [-20 * np.log10(21.9 / 255)], rtol=1e-5)
    assert psnr_uint8(a, a + 0.001)[0] == 100
    with pytest.raises(ValueError, match="must be at least 11x11"):
        ssim_valid(a[:, :8], b[:, :8])


def test_refuses_different_shapes():
    with pytest.raises(ValueError, match="must both be"):
        psnr(jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 4, 5, 3)))
