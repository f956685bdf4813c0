import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import load, nhwc

from aecr_jax import psnr, ssim
from aecr_jax.metrics import ciede2000, color_difference, luma, psnr_uint8, psnr_y, ssim_valid


@pytest.mark.parametrize("i", range(3))
def test_official_values(i):
    """Scores equal those of the official code, also for predictions outside [0, 1] (tests/golden)."""
    d = load("metrics")
    prediction, target = (jnp.array(nhwc(d[f"{k}{i}"])[None]) for k in ("pred", "gt"))
    np.testing.assert_allclose(psnr(prediction, target), [d[f"psnr{i}"]], atol=1e-4)
    np.testing.assert_allclose(ssim(prediction, target), [d[f"ssim{i}"]], atol=1e-5)


def test_psnr_by_hand():
    """An error of 0.1 in all pixels is 20 dB. Values are clipped first, and each image has its own score."""
    target = jnp.full((2, 4, 4, 3), 0.5)
    np.testing.assert_allclose(psnr(target + jnp.array([0.1, 0.01]).reshape(2, 1, 1, 1), target), [20, 40], rtol=1e-4)
    np.testing.assert_allclose(psnr(jnp.full((1, 4, 4, 3), 3.0), jnp.full((1, 4, 4, 3), 0.9)), [20], rtol=1e-4)
    assert psnr(target, target)[0] == 100


def test_ssim_of_equal_images_is_one():
    x = jnp.array(np.random.default_rng(0).random((1, 16, 20, 3), np.float32))
    np.testing.assert_allclose(ssim(x, x), [1], rtol=1e-5)
    np.testing.assert_allclose(ssim_valid(x, x), [1], rtol=1e-5)


def test_scikit_image_where_the_definitions_agree():
    """The values were computed with scikit-image 0.26.0 and data_range 1: peak_signal_noise_ratio, and structural_similarity with
    gaussian_weights, sigma 1.5 and use_sample_covariance=False, which leaves out the border as `ssim_valid` does."""
    rng = np.random.default_rng(7)
    x = rng.random((24, 31, 3))
    y = np.clip(x + 0.2 * rng.standard_normal(x.shape), 0, 1)
    np.testing.assert_allclose(psnr(y[None], x[None]), [15.089111727620871], atol=1e-4)
    np.testing.assert_allclose(ssim_valid(y[None], x[None]), [0.8168184955309746], atol=1e-5)


def test_other_definitions():
    """White has luma 235, a grey step of 0.1 is 21.9 / 255 in luma, and a difference of 0.001 vanishes in 8 bits."""
    np.testing.assert_allclose(luma(jnp.ones((1, 1, 1, 3))), 235 / 255, rtol=1e-6)
    a, b = jnp.full((1, 12, 12, 3), 0.4), jnp.full((1, 12, 12, 3), 0.5)
    np.testing.assert_allclose(psnr_y(a, b), [-20 * np.log10(21.9 / 255)], rtol=1e-5)
    assert psnr_uint8(a, a + 0.001)[0] == 100
    with pytest.raises(ValueError, match="must be at least 11x11"):
        ssim_valid(a[:, :8], b[:, :8])


def test_refuses_different_shapes():
    with pytest.raises(ValueError, match="must have the same shape"):
        psnr(jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 4, 5, 3)))


# Gaurav Sharma, Wencheng Wu and Edul N. Dalal, "The CIEDE2000 Color-Difference Formula: Implementation Notes, Supplementary Test Data, and
# Mathematical Observations", Color Research and Application 30 (2005), Table 1: L, a, b of two colours and their difference.
SHARMA = [
    (50.0, 2.6772, -79.7751, 50.0, 0.0, -82.7485, 2.0425),
    (50.0, 3.1571, -77.2803, 50.0, 0.0, -82.7485, 2.8615),
    (50.0, 2.8361, -74.02, 50.0, 0.0, -82.7485, 3.4412),
    (50.0, -1.3802, -84.2814, 50.0, 0.0, -82.7485, 1.0),
    (50.0, -1.1848, -84.8006, 50.0, 0.0, -82.7485, 1.0),
    (50.0, -0.9009, -85.5211, 50.0, 0.0, -82.7485, 1.0),
    (50.0, 0.0, 0.0, 50.0, -1.0, 2.0, 2.3669),
    (50.0, -1.0, 2.0, 50.0, 0.0, 0.0, 2.3669),
    (50.0, 2.49, -0.001, 50.0, -2.49, 0.0009, 7.1792),
    (50.0, 2.49, -0.001, 50.0, -2.49, 0.001, 7.1792),
    (50.0, 2.49, -0.001, 50.0, -2.49, 0.0011, 7.2195),
    (50.0, 2.49, -0.001, 50.0, -2.49, 0.0012, 7.2195),
    (50.0, -0.001, 2.49, 50.0, 0.0009, -2.49, 4.8045),
    (50.0, -0.001, 2.49, 50.0, 0.001, -2.49, 4.8045),
    (50.0, -0.001, 2.49, 50.0, 0.0011, -2.49, 4.7461),
    (50.0, 2.5, 0.0, 50.0, 0.0, -2.5, 4.3065),
    (50.0, 2.5, 0.0, 73.0, 25.0, -18.0, 27.1492),
    (50.0, 2.5, 0.0, 61.0, -5.0, 29.0, 22.8977),
    (50.0, 2.5, 0.0, 56.0, -27.0, -3.0, 31.903),
    (50.0, 2.5, 0.0, 58.0, 24.0, 15.0, 19.4535),
    (50.0, 2.5, 0.0, 50.0, 3.1736, 0.5854, 1.0),
    (50.0, 2.5, 0.0, 50.0, 3.2972, 0.0, 1.0),
    (50.0, 2.5, 0.0, 50.0, 1.8634, 0.5757, 1.0),
    (50.0, 2.5, 0.0, 50.0, 3.2592, 0.335, 1.0),
    (60.2574, -34.0099, 36.2677, 60.4626, -34.1751, 39.4387, 1.2644),
    (63.0109, -31.0961, -5.8663, 62.8187, -29.7946, -4.0864, 1.263),
    (61.2901, 3.7196, -5.3901, 61.4292, 2.248, -4.962, 1.8731),
    (35.0831, -44.1164, 3.7933, 35.0232, -40.0716, 1.5901, 1.8645),
    (22.7233, 20.0904, -46.694, 23.0331, 14.973, -42.5619, 2.0373),
    (36.4612, 47.858, 18.3852, 36.2715, 50.5065, 21.2231, 1.4146),
    (90.8027, -2.0831, 1.441, 91.1528, -1.6435, 0.0447, 1.4441),
    (90.9257, -0.5406, -0.9208, 88.6381, -0.8985, -0.7239, 1.5381),
    (6.7747, -0.2908, -2.4247, 5.8714, -0.0985, -2.2286, 0.6377),
    (2.0776, 0.0795, -1.135, 0.9033, -0.0636, -0.5514, 0.9082),
]


@pytest.mark.parametrize("bits", [32, 64])
def test_ciede2000_of_the_published_pairs(bits, request):
    """The published differences have four digits. They do not depend on the order of the colours."""
    if bits == 64:
        request.getfixturevalue("x64")
    table = np.array(SHARMA, f"float{bits}")
    for first, second in ((table[:, :3], table[:, 3:6]), (table[:, 3:6], table[:, :3])):
        np.testing.assert_allclose(color_difference(first, second), table[:, 6], atol=1e-4 if bits == 32 else 5.1e-5)


def test_ciede2000_of_grey_and_equal_images():
    """White and black differ by 100 in lightness at a mean of 50, where S_L = 1, and in nothing else. Equal images differ by 0."""
    white = jnp.ones((1, 3, 4, 3))
    np.testing.assert_allclose(ciede2000(white, 0 * white), [100], atol=0.02)  # the sums of the matrix's rows differ from the white point
    x = jax.random.uniform(jax.random.key(0), (1, 8, 9, 3))
    np.testing.assert_allclose(ciede2000(x, x), [0], atol=1e-5)
    with pytest.raises(ValueError, match=r"must be \[N, H, W, 3\]: CIEDE2000 takes the 3 channels RGB"):
        ciede2000(x[..., :2], x[..., :2])


def test_ciede2000_by_scikit_image():
    """scikit-image converts and compares in float64, over the whole range of sRGB and for colours that are close to each other."""
    color = pytest.importorskip("skimage.color", reason="needs scikit-image")
    rng = np.random.default_rng(3)
    x = rng.random((2, 20, 30, 3))
    for y in (rng.random(x.shape), np.clip(x + 0.03 * rng.standard_normal(x.shape), 0, 1)):
        expected = color.deltaE_ciede2000(color.rgb2lab(x), color.rgb2lab(y)).mean((1, 2))
        np.testing.assert_allclose(ciede2000(x.astype(np.float32), y.astype(np.float32)), expected, rtol=1e-4)


METRICS = [psnr, ssim, psnr_uint8, psnr_y, ssim_valid, ciede2000]


def two_images(dtype):
    """Return two images of an integer type with values from its whole range, and the same images as floats in [0, 1]."""
    highest = np.iinfo(dtype).max
    integers = np.random.default_rng(0).integers(0, highest, (2, 1, 16, 20, 3), dtype, endpoint=True)
    return integers, (integers / highest).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("metric", METRICS)
def test_unsigned_integers_are_scaled_by_their_range(metric, dtype):
    """Integers, and mixtures of integers and floats, have the scores of the floats, inside and outside `jit`."""
    (a, b), (x, y) = two_images(dtype)
    expected = metric(x, y)
    assert abs(float(expected[0] - metric(x, x)[0])) > 0.5  # if integers were clipped at 1, the images would be equal
    for prediction, target in [(a, b), (a, y), (x, b)]:
        np.testing.assert_allclose(metric(prediction, target), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(metric)(prediction, target), expected, rtol=1e-5)


def test_every_8_bit_value_equals_its_quotient():
    """8-bit values equal their quotients by 255 without rounding, so PSNR is 100 dB, its value for equal images."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    for metric in (psnr, psnr_uint8, psnr_y):
        assert metric(values, values / 255)[0] == jax.jit(metric)(values, values / 255)[0] == 100


def test_luma_of_unsigned_integers():
    (a, _), (x, _) = two_images(np.uint8)
    np.testing.assert_allclose(luma(a), luma(x), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.int32, np.uint32, np.complex64])
@pytest.mark.parametrize("metric", METRICS)
def test_refuses_other_types(metric, dtype):
    images = np.ones((1, 16, 16, 3), np.float32)
    with pytest.raises(ValueError, match=rf"prediction has type {np.dtype(dtype)} and must be floating point in \[0, 1\], uint8 or uint16"):
        metric(images.astype(dtype), images)
    with pytest.raises(ValueError, match=rf"target has type {np.dtype(dtype)} and must be"):
        jax.jit(metric)(images, images.astype(dtype))
    with pytest.raises(ValueError, match=rf"image has type {np.dtype(dtype)} and must be"):
        luma(images.astype(dtype))


@pytest.mark.parametrize("metric", METRICS)
def test_refuses_floats_far_from_0_to_1_outside_jit(metric):
    images = jnp.full((1, 16, 16, 3), 0.5)
    for value, message in [(255.0, "0.5 to 255"), (3.01, "0.5 to 3.01"), (-2.01, "-2.01 to 0.5"), (np.inf, "0.5 to inf")]:
        odd = images.at[0, 3, 4, 1].set(value)
        with pytest.raises(ValueError, match=rf"prediction has values from {message} and must be in \[0, 1\]: divide 8-bit values by 255"):
            metric(odd, images)
        with pytest.raises(ValueError, match=f"target has values from {message}"):
            metric(images, odd)
        with pytest.raises(ValueError, match=f"image has values from {message}"):
            luma(odd)
        assert np.isfinite(jax.jit(metric)(odd, images)).all()  # inside jit, values are unknown and therefore clipped
    assert np.isfinite(metric(images.at[0, 0, 0].set(jnp.array([-2.0, 3.0, 1.5])), images)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_nan_scores_nan_in_its_own_image_alone(metric):
    images = jnp.full((2, 16, 16, 3), 0.5)
    broken = images.at[1, 3, 4, 1].set(jnp.nan)
    for scores in (metric(broken, images), metric(images, broken), metric(broken, broken), jax.jit(metric)(broken, images)):
        assert np.isfinite(scores[0]) and np.isnan(scores[1])
    assert np.isnan(metric(jnp.full((1, 16, 16, 3), jnp.nan), images[:1])).all()


@pytest.mark.parametrize("metric", METRICS)
def test_no_images_have_no_scores(metric):
    scores = metric(jnp.zeros((0, 16, 16, 3)), jnp.zeros((0, 16, 16, 3)))
    assert scores.shape == (0,) and scores.dtype == jnp.float32


@pytest.mark.parametrize("metric", [psnr, ssim, psnr_uint8, psnr_y, ciede2000])
def test_refuses_images_without_pixels(metric):
    with pytest.raises(ValueError, match=r"prediction and target have shape \(1, 0, 16, 3\) and must have at least one pixel"):
        metric(jnp.zeros((1, 0, 16, 3)), jnp.zeros((1, 0, 16, 3)))


def test_luma_takes_three_channels():
    images = jnp.zeros((1, 16, 16, 4))
    with pytest.raises(ValueError, match=r"prediction has shape .* and must be \[N, H, W, 3\]: luma takes the 3 channels RGB"):
        psnr_y(images, images)
    with pytest.raises(ValueError, match=r"image has shape \(1, 16, 16, 4\) and must be \[N, H, W, 3\]"):
        luma(images)


def test_takes_lists_and_refuses_what_is_no_array():
    """An error of 0.1 in all pixels is 20 dB."""
    x = np.full((1, 2, 2, 3), 0.5)
    np.testing.assert_allclose(psnr((x + 0.1).tolist(), x.tolist()), [20], rtol=1e-4)
    for wrong in (None, "image", [[1.0], [2.0, 3.0]]):
        with pytest.raises(ValueError, match=r"prediction .* must be an array"):
            psnr(wrong, x)
