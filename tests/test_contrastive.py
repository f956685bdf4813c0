import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import load, nhwc, vgg19

from aecr_jax import contrastive_distances, contrastive_regularization
from aecr_jax.losses.contrastive import combine_distances


@pytest.mark.parametrize("negatives", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_official_loss_and_gradient(negatives, x64):
    """Loss and gradient equal those of the official code (tests/golden; its README explains why the reference gradient is float64)."""
    d, key = load("contrastive"), "" if negatives else "_positive_only"
    anchor, positive, negative = (jnp.array(nhwc(d[k]), jnp.float64) for k in ("anchor", "positive", "negative"))
    features = vgg19(d["vgg_seed"], np.float64)
    loss, grad = jax.value_and_grad(lambda a: contrastive_regularization(a, positive, negative, features, negatives=negatives))(anchor)
    np.testing.assert_allclose(loss, d[f"loss{key}"], rtol=1e-6)
    expected = nhwc(load("contrastive_float64")[f"grad_anchor{key}"])
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-9 * abs(expected).max())
    # The float32 reference is only near, because rounding decided the signs of two values in it.
    distance = np.linalg.norm(grad - nhwc(d[f"grad_anchor{key}"])) / np.linalg.norm(expected)
    assert distance < 0.03


def identity(images):
    return [images, 2 * images]


def batch(*values):
    return jnp.array(values, jnp.float32).reshape(-1, 1, 1, 1) * jnp.ones((1, 1, 1, 3))


def test_by_hand():
    """The levels are the images and twice the images, so d_ap = 0.1, 0.2 and d_an = 0.4, 0.8; the loss is 0.5 * 0.25 + 1 * 0.25."""
    a, p, n = batch(0.5, 0.5), batch(0.6, 0.4), batch(0.9, 0.1)
    np.testing.assert_allclose(contrastive_regularization(a, p, n, identity, weights=(0.5, 1.0)), 0.375, rtol=1e-5)
    np.testing.assert_allclose(contrastive_regularization(a, p, n, identity, weights=(0.5, 1.0), negatives=0), 0.25, rtol=1e-5)


def test_rates_take_the_neighbours_in_the_batch():
    """The rates of Table 4, by hand: with 2 negatives, each anchor 0 is compared with its own hazy image and the next one, so d_an is the
    mean of |1|, |2| and |4|, each taken twice."""
    a, p, n = batch(0, 0, 0), batch(0.1, 0.2, 0.6), batch(1, 2, 4)
    d_ap, d_an = contrastive_distances(a, p, n, lambda x: [x], positives=3, negatives=2)
    np.testing.assert_allclose(d_ap, [0.3], rtol=1e-6)
    np.testing.assert_allclose(d_an, [7 / 3], rtol=1e-6)
    a = batch(1, 2, 4)
    _, d_an = contrastive_distances(a, p, batch(1, 2, 4), lambda x: [x], negatives=2)
    np.testing.assert_allclose(d_an, [(0 + 0 + 0 + 1 + 2 + 3) / 6], rtol=1e-6)


def test_the_three_forms_by_hand():
    """Images 0 and 1 have d_ap = 0.1, 0.3 and d_an = 0.2, 0.4. The batch's ratio is 0.2 / 0.3, the mean of the images' ratios is
    (1/2 + 3/4) / 2, and the difference is 0.2 - 0.3; the second level has twice the distances. Without negatives, every form is CR*."""
    a, p, n = batch(0.5, 0.5), batch(0.6, 0.2), batch(0.7, 0.9)
    for form, expected in (("batch_ratio", 1.5 * 2 / 3), ("image_ratio", 1.5 * 0.625), ("difference", -0.1 * (0.5 + 2))):
        value = contrastive_regularization(a, p, n, identity, weights=(0.5, 1.0), form=form)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        value = contrastive_regularization(a, p, n, identity, weights=(0.5, 1.0), form=form, negatives=0)
        np.testing.assert_allclose(value, 0.2 * (0.5 + 2), rtol=1e-5)
    with pytest.raises(ValueError, match=r"form \(='ratio'\) must be one of batch_ratio, image_ratio, difference"):
        contrastive_regularization(a, p, n, identity, form="ratio")


def test_distances_per_image_by_numpy():
    """Image i has its own sample and those of the next images; the definition is written out with NumPy."""
    rng = np.random.default_rng(0)
    a, p, n = (rng.random((3, 2, 4, 3), np.float32) for _ in range(3))
    d_ap, d_an = contrastive_distances(a, p, n, identity, positives=2, negatives=3, per_image=True)

    def expected(images, count):
        return [np.mean([np.abs(a[i] - images[(i + k) % 3]).mean() for k in range(count)]) for i in range(3)]

    np.testing.assert_allclose(d_ap, np.outer([1, 2], expected(p, 2)), rtol=1e-5)
    np.testing.assert_allclose(d_an, np.outer([1, 2], expected(n, 3)), rtol=1e-5)


def test_each_image_may_have_negatives_of_its_own():
    """By NumPy: the distance to K negatives is the mean over them. They share one pass over the anchor and one over the positives."""
    rng, calls = np.random.default_rng(0), []
    a, p = (rng.random((3, 2, 4, 3), np.float32) for _ in range(2))
    n = rng.random((3, 4, 2, 4, 3), np.float32)

    def features(images):
        calls.append(images.shape[0])
        return [images]

    _, d_an = contrastive_distances(a, p, n, features, negatives=4, per_image=True)
    np.testing.assert_allclose(d_an[0], np.abs(a[:, None] - n).mean((1, 2, 3, 4)), rtol=1e-5)
    assert calls == [3, 3, 12]
    with pytest.raises(ValueError, match=r"negatives \(=2\) must be 0 or 4, because negative has shape \(3, 4, 2, 4, 3\)"):
        contrastive_distances(a, p, n, features, negatives=2)


def test_the_difference_is_bounded_without_a_margin():
    """By the triangle inequality, it is at least the negative distance of positive and negative, which a restored image reaches at the
    positive and anywhere beyond it: with p = 0.6 and n = 0.9, that is -0.3 for 0.6 and 0.1, and more between p and n."""
    p, n = batch(0.6), batch(0.9)
    values = [contrastive_regularization(batch(a), p, n, lambda x: [x], weights=[1.0], form="difference") for a in (0.6, 0.1, 0.7, 0.9)]
    np.testing.assert_allclose(values, [-0.3, -0.3, -0.1, 0.3], atol=1e-6)


def test_no_gradient_through_positive_and_negative():
    a, p, n = batch(0.5), batch(0.6), batch(0.9)
    grads = jax.grad(lambda p, n: contrastive_regularization(a, p, n, identity), (0, 1))(p, n)
    assert all(not np.any(grad) for grad in grads)


def test_finite_where_the_denominator_vanishes():
    a = batch(0.5)
    value, grad = jax.value_and_grad(lambda a: contrastive_regularization(a, batch(0.6), batch(0.5), identity))(a)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_refuses_what_does_not_fit():
    a = batch(0.5, 0.6)
    with pytest.raises(ValueError, match=r"positive has shape \(1, 1, 1, 3\) and must have anchor's, \(2, 1, 1, 3\)"):
        contrastive_regularization(a, a[:1], a, identity)
    with pytest.raises(ValueError, match=r"negatives \(=3\) must be 0 to the batch size \(2\)"):
        contrastive_regularization(a, a, a, identity, negatives=3)
    with pytest.raises(ValueError, match="weights has 1 entries and must have one for each of 2 levels"):
        contrastive_regularization(a, a, a, identity, weights=(1.0,))
    with pytest.raises(ValueError, match="weights has 0 entries"):
        contrastive_regularization(a, a, a, identity, weights=())
    with pytest.raises(ValueError, match="weights has 3 entries and must have one for each of 2 levels"):
        contrastive_regularization(a, a, a, identity, weights=(0.5, 1.0, 7.0))


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("function", [contrastive_distances, contrastive_regularization])
def test_refuses_images_that_are_not_floats(function, position):
    """Integer images are refused, because their features would be zero, and so would the loss."""
    name = ("anchor", "positive", "negative")[position]
    images = [batch(0.5, 0.6)] * 3
    images[position] = np.ones((2, 1, 1, 3), np.uint8)
    with pytest.raises(ValueError, match=rf"{name} has type uint8 and must be floating point in \[0, 1\]"):
        function(*images, identity)
    images[position] = None
    with pytest.raises(ValueError, match=f"{name} is a NoneType and must be an array"):
        function(*images, identity)


def test_a_mean_over_nothing_is_refused():
    nothing = jnp.zeros((0, 1, 1, 3))
    with pytest.raises(ValueError, match=r"anchor has shape \(0, 1, 1, 3\): a mean distance takes at least one image"):
        contrastive_regularization(nothing, nothing, nothing, identity)


@pytest.mark.parametrize("value", [1.5, "1", None, True])
@pytest.mark.parametrize("name", ["positives", "negatives"])
def test_rates_are_integers(name, value):
    a = batch(0.5, 0.6)
    with pytest.raises(ValueError, match=rf"{name} \(={value!r}\) must be an integer"):
        contrastive_regularization(a, a, a, identity, **{name: value})


def test_other_kinds_of_the_same_arguments():
    """Lists and NumPy numbers are allowed and give the value of `test_by_hand`; the default weights are cut to the two levels."""
    a, p, n = ([[[[v] * 3]] for v in values] for values in ([0.5, 0.5], [0.6, 0.4], [0.9, 0.1]))
    for weights in ([0.5, 1.0], np.array([0.5, 1.0]), jnp.array([0.5, 1.0])):
        value = contrastive_regularization(a, p, n, identity, weights=weights, positives=np.int64(2), negatives=np.int64(1))
        np.testing.assert_allclose(value, 0.375, rtol=1e-5)
    np.testing.assert_allclose(contrastive_regularization(a, p, n, identity), 0.25 * (1 / 32 + 1 / 16), rtol=1e-5)


def test_refuses_wrong_weights_and_features():
    a = batch(0.5, 0.6)
    for weights, message in [
        (1.0, r"weights has shape \(\) and must be one number for each level"),
        (np.ones((2, 2)), r"weights has shape \(2, 2\)"),
        ("ab", "weights is a str and must be an array"),
        (None, "weights is a NoneType and must be an array"),
    ]:
        with pytest.raises(ValueError, match=message):
            contrastive_regularization(a, a, a, identity, weights=weights)
    for features, message in [
        (None, r"features \(=None\) must be a function of images"),
        (lambda x: x, "features must give a sequence of feature maps, not one array"),
        (lambda x: [], "features must give at least one feature map"),
    ]:
        with pytest.raises(ValueError, match=message):
            contrastive_regularization(a, a, a, features)


def test_distances_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"to_negative has shape \(1,\) and must have that of to_positive, \(5,\)"):
        combine_distances(jnp.ones(5), jnp.ones(1), negatives=1)
