import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aecr_jax import contrastive_regularization
from aecr_jax.losses.restoration import RestorationLoss
from aecr_jax.losses.vgg import VGG16Features, VGG19Features
from aecr_jax.training.config import OptimConfig
from aecr_jax.training.optimizer import learning_rate, make_optimizer


def images(seed):
    return jax.random.uniform(jax.random.key(seed), (2, 16, 16, 3))


@pytest.mark.parametrize(
    ("pixel", "expected"),
    [("l1", (0.5 + 2 + 0.1) / 3), ("l2", (0.25 + 4 + 0.01) / 3), ("smooth_l1", (0.125 + 1.5 + 0.005) / 3)],
)
def test_pixel_distances_by_hand(pixel, expected):
    """The differences 0.5, -2 and 0.1. Smooth L1 with beta 1 is half the square below 1, and the absolute value less 0.5 above."""
    restored = jnp.array([0.5, -2.0, 0.1]).reshape(1, 1, 1, 3)
    total, measurements = RestorationLoss(None, cr=0, pixel=pixel)(restored, {"clear": jnp.zeros((1, 1, 1, 3)), "hazy": restored})
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert measurements == {pixel: total}


def test_perceptual_loss_by_numpy():
    """GridDehazeNet's: the mean over the feature maps of their mean squared differences, times its weight, added to the pixel distance."""
    features, restored, clear = VGG16Features.random(width=2), images(0), images(1)
    loss = RestorationLoss(None, cr=0, pixel="smooth_l1", perceptual=0.04, perceptual_features=features)
    total, measurements = loss(restored, {"clear": clear, "hazy": images(2)})
    distances = [np.mean((np.asarray(a) - np.asarray(b)) ** 2) for a, b in zip(features(restored), features(clear))]
    np.testing.assert_allclose(measurements["perceptual"], np.mean(distances), rtol=1e-5)
    np.testing.assert_allclose(total, measurements["smooth_l1"] + 0.04 * np.mean(distances), rtol=1e-5)


def test_all_parts_together():
    loss = RestorationLoss(
        VGG19Features.random(width=2), cr=0.1, pixel="l2", perceptual=0.5, perceptual_features=VGG16Features.random(width=2)
    )
    total, parts = loss(images(0), {"clear": images(1), "hazy": images(2)})
    np.testing.assert_allclose(total, parts["l2"] + 0.5 * parts["perceptual"] + 0.1 * parts["cr"], rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"form": "image_ratio", "negatives": 2}, {"form": "difference", "weights": (1, 2, 3, 4, 5.0)}, {"negatives": 0}]
)
def test_the_regularization_is_differentiated_once_and_its_gradients_are_measured(options):
    """Total and gradient are those of L1 + 0.3 CR differentiated by JAX; the norms are of the gradients at the restored image, by NumPy."""
    features, restored, clear, hazy = VGG19Features.random(width=2), images(0), images(1), images(2)
    loss = RestorationLoss(features, cr=0.3, **options)

    def parts(restored):
        return jnp.abs(restored - clear).mean(), 0.3 * contrastive_regularization(restored, clear, hazy, features, **options)

    (total, measured), gradient = jax.value_and_grad(loss, has_aux=True)(restored, {"clear": clear, "hazy": hazy})
    of_l1, of_cr = (jax.grad(lambda x, part=part: parts(x)[part])(restored) for part in (0, 1))
    np.testing.assert_allclose(total, sum(parts(restored)), rtol=1e-5)
    np.testing.assert_allclose(gradient, of_l1 + of_cr, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(measured["grad_norm_l1"], restored.size**-0.5, rtol=1e-5)
    np.testing.assert_allclose(measured["grad_norm_cr"], np.linalg.norm(np.asarray(of_cr).ravel()), rtol=1e-4)


@pytest.mark.parametrize(("name", "shape"), [("rehazed", (2, 3, 16, 16, 3)), ("lagging", (2, 16, 16, 3))])
def test_other_negatives_come_from_the_batch(name, shape):
    features, restored, clear = VGG19Features.random(width=2), images(0), images(1)
    other, count = jax.random.uniform(jax.random.key(3), shape), 3 if name == "rehazed" else 1
    loss = RestorationLoss(features, cr=0.1, negatives=count, negative_images=name)
    assert loss.lagging == (name == "lagging") and not RestorationLoss(features, cr=0, negative_images=name).lagging
    _, measured = loss(restored, {"clear": clear, "hazy": images(2), name: other})
    expected = contrastive_regularization(restored, clear, other, features, negatives=count)
    np.testing.assert_allclose(measured["cr"], expected, rtol=1e-6)


def test_missing_features_and_unknown_distances_are_refused():
    with pytest.raises(ValueError, match=r"perceptual_features is None and must be a VGG16Features, because perceptual \(=0.04\)"):
        RestorationLoss(None, cr=0, perceptual=0.04)
    with pytest.raises(ValueError, match=r"pixel \(='l3'\) must be one of l1, l2, smooth_l1"):
        RestorationLoss(None, cr=0, pixel="l3")
    with pytest.raises(ValueError, match=r"negative_images \(='rehased'\) must be one of hazy, rehazed, lagging"):
        RestorationLoss(None, cr=0, negative_images="rehased")


def test_the_rate_decays_in_steps():
    """By hand: 1e-3 for the steps 1 to 20, half of it for 21 to 40, and so on (PyTorch's StepLR after each epoch)."""
    rate = learning_rate(OptimConfig(steps=100, learning_rate=1e-3, schedule="steps", decay_every=20, decay_factor=0.5))
    np.testing.assert_allclose([rate(taken) for taken in (0, 19, 20, 39, 40)], [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4], rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weight_decay_and_momentum_are_pytorchs(optimizer):
    """Three steps of PyTorch's definitions, by hand: the decay is added to the gradient before the momentum or the moments."""
    optim = OptimConfig(steps=10, learning_rate=0.1, schedule="constant", optimizer=optimizer, weight_decay=0.5)
    update = make_optimizer(optim, lambda name: False)
    params, gradient = {"a": jnp.array([1.0, -2.0])}, {"a": jnp.array([0.3, 0.1])}
    state = update.init(params)
    x, first, second = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for step in range(1, 4):
        updates, state = update.update(gradient, state, params)
        params = {"a": params["a"] + updates["a"]}
        g = np.array([0.3, 0.1]) + 0.5 * x
        if optimizer == "sgd":
            first = 0.9 * first + g
            x = x - 0.1 * first
        else:
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            x = x - 0.1 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(params["a"], x, rtol=1e-5)
