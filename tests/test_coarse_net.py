"""CoarseNet: the formula with its estimates, large images from a reduced copy, and its limits of size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aecr_jax import dehaze
from aecr_jax.inference import restore
from aecr_jax.networks.arrays import get_arrays, replace_arrays
from aecr_jax.networks.coarse_net import CoarseNet, CoarseNetConfig, Moments
from aecr_jax.networks.macs import network_macs
from aecr_jax.ops.resize import average_cells


def network(**settings):
    model = CoarseNet(CoarseNetConfig(**({"width": 6, "blocks": 1} | settings)), rngs=nnx.Rngs(0))
    model.eval()
    return model


def with_arrays(model, arrays):
    graph, state = nnx.split(model)
    return nnx.merge(graph, replace_arrays(state, {**get_arrays(model), **arrays}))


def trained(**settings):
    """Return a network whose residual blocks change their input, unlike those of a new one."""
    model, rng = network(**settings), np.random.default_rng(9)
    zeros = {name: array for name, array in get_arrays(model).items() if ".conv2." in name}
    assert zeros and not any(array.any() for array in zeros.values())
    return with_arrays(model, {name: jnp.asarray(0.1 * rng.standard_normal(array.shape), jnp.float32) for name, array in zeros.items()})


def logit(x):
    return np.log(x / (1 - x))


def with_constant_maps(model, maps):
    """Return the model with a last layer that gives the same four values everywhere."""
    return with_arrays(model, {"maps.kernel": jnp.zeros_like(model.maps.kernel[...]), "maps.bias": jnp.asarray(maps, jnp.float32)})


def test_the_network_has_fewer_than_a_million_parameters_and_8_gmacs():
    """Expected: the aims for a network that is fast enough to watch, at 640x480."""
    model = network(width=48, blocks=2)
    assert sum(x.size for x in get_arrays(model, nnx.Param).values()) == 926_820
    assert 1e9 < network_macs(model.config, 480, 640) < 8e9


def test_haze_of_the_scattering_model_is_removed_exactly_if_it_is_estimated_exactly():
    """Expected: J, for I = J t + A (1 - t) with t = exp(-0.7) and the airlight A = (0.9, 0.8, 0.7)."""
    clear = np.random.default_rng(0).random((2, 21, 26, 3))
    depth, airlight = 0.7, np.array([0.9, 0.8, 0.7])
    t = np.exp(-depth)
    hazy = jnp.asarray(clear * t + airlight * (1 - t), jnp.float32)
    maps = [logit((t - 0.02) / 0.98) - 2, *logit(airlight)]  # t = 0.02 + 0.98 sigmoid(y + 2)
    restored, gain, offset = with_constant_maps(network(), maps).restore_with_haze(hazy)
    np.testing.assert_allclose(restored, clear, atol=2e-6)
    assert gain.shape == (2, 4, 4, 1) and offset.shape == (2, 4, 4, 3)  # cells of 8 pixels of the image padded to 32x32
    np.testing.assert_allclose(gain, np.full(gain.shape, 1 / t - 1), rtol=1e-5)
    np.testing.assert_allclose(offset / gain, np.broadcast_to(airlight, offset.shape), rtol=1e-5)


def test_the_airlight_varies_slowly():
    """From cell to cell of 8 pixels, the airlight of a network with random weights differs by less than it would if each had its own."""
    model = trained(width=12)
    model = with_arrays(model, {"maps.kernel": 5 * model.maps.kernel[...], "maps.bias": jnp.asarray([-2.0, 0, 0, 0])})
    hazy = jnp.asarray(np.random.default_rng(8).random((1, 16, 24, 3)).repeat(8, 1).repeat(8, 2), jnp.float32)
    gain, offset = model.estimate_haze(hazy)
    airlight = np.asarray(offset / gain)
    assert np.abs(np.diff(airlight, axis=1)).max() < 0.05 and np.abs(np.diff(airlight, axis=2)).max() < 0.05
    assert airlight.std((1, 2)).min() > 1e-3  # not one value for the whole image
    assert np.abs(np.diff(np.asarray(jnp.log1p(gain)), axis=1)).max() > 0.3  # the gain may differ between neighbours


def test_a_new_network_begins_near_the_hazy_image():
    hazy = jnp.asarray(np.random.default_rng(1).random((1, 64, 64, 3)), jnp.float32)
    assert jnp.abs(network(width=48, blocks=2)(hazy) - hazy).max() < 0.25


def test_the_features_of_cells_are_their_extremes_and_logarithms():
    """Expected: NumPy's values, in float64, for cells of 4x4 pixels and of 8x8, which consist of four of them; values are clipped."""
    x = 1.2 * np.random.default_rng(2).random((2, 8, 32, 3)).astype(np.float32) - np.float32(0.1)
    for start, colour in ((8, 0), (16, 1), (24, 0.83)):  # cells of one colour
        x[1, :, start : start + 8] = colour
    moments = Moments.of(jnp.asarray(x), 4)
    for side, features in ((4, moments.features()), (8, moments.pool(2).features())):
        cells = x[1, :side].astype(np.float64).clip(0, 1).reshape(side, 32 // side, side, 3).swapaxes(0, 1).reshape(-1, side * side, 3)
        ends = np.concatenate([cells.min(1), cells.max(1)], -1)
        logarithms = [np.log(ends + 0.02), np.log(1.02 - ends), np.log(cells.mean(1) + 0.02), np.log(cells.var(1) + 1e-4) / 2]
        np.testing.assert_allclose(features[1, 0], np.concatenate([ends, *logarithms], -1), rtol=1e-5, atol=1e-5)


def test_cells_of_one_colour_have_finite_gradients():
    for colour in (0.0, 1.0, 0.83):
        gradient = jax.grad(lambda x: Moments.of(x, 4).pool(2).features().sum())(jnp.full((1, 8, 8, 3), colour))
        assert jnp.isfinite(gradient).all()


def test_the_haze_of_a_large_image_is_estimated_from_a_reduced_copy():
    """Expected: an image with every pixel doubled has the estimates of the image itself, in cells twice as large."""
    model = trained()
    small = jnp.asarray(np.random.default_rng(3).random((1, 544, 1056, 3)), jnp.float32)
    large = small.repeat(2, 1).repeat(2, 2)
    assert small.shape[1] * small.shape[2] < 2**20 < large.shape[1] * large.shape[2]
    np.testing.assert_allclose(average_cells(large, 2), small, atol=1e-6)
    expected, actual = model.restore_with_haze(small), model.restore_with_haze(large)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-4)
    np.testing.assert_allclose(actual[2], expected[2], rtol=1e-4)
    # The restored images differ only by the interpolation of the maps.
    np.testing.assert_allclose(average_cells(actual[0], 2), expected[0], atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (45, 33), (2, 70), (96, 128), (130, 100)])
def test_on_a_canvas_an_image_is_restored_as_if_alone(size):
    """Expected: the network's result for the image itself, whatever the canvas has elsewhere."""
    rng = np.random.default_rng(6)
    model = trained(width=12)
    hazy = rng.random((2, *size, 3)).astype(np.float32)
    canvas = 1000 * rng.random((2, *model.canvas_size(*size), 3)).astype(np.float32)
    canvas[:, : size[0], : size[1]] = hazy
    restored = model.restore_on_canvas(canvas, *size)[:, : size[0], : size[1]]
    np.testing.assert_allclose(restored, model(hazy), atol=2e-6)


def test_images_of_many_sizes_need_few_programs(monkeypatch):
    """Expected: sides from 300 to 1000 are 384, 512, 768 or 1024 on the canvas; the programs themselves are not compiled here."""
    called = set()
    monkeypatch.setattr(restore, "ImageProgram", lambda function: lambda _, canvases, *sides: called.add(canvases[0].shape) or canvases)
    restorer = restore.Restorer(network())
    rng = np.random.default_rng(7)
    for size in rng.integers(300, 1001, (60, 2)):
        assert restorer(np.zeros((*size, 3), np.float32)).shape == (*size, 3)
    sides = [384, 512, 768, 1024]
    assert called <= {(h, w, 3) for h in sides for w in sides}
    assert network().canvas_size(1024, 1024) == (1024, 1024) and network().canvas_size(1024, 1025) is None


def test_large_images_are_never_split_into_tiles():
    image = np.random.default_rng(4).integers(0, 256, (300, 400, 3), np.uint8)
    model = trained()
    np.testing.assert_array_equal(dehaze(image, model, tile=256), dehaze(image, model, tile=0))


@pytest.mark.parametrize("settings, message", [({"width": 1}, r"width \(=1\)"), ({"blocks": 0}, r"blocks \(=0\)")])
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CoarseNetConfig(**settings)


@pytest.mark.parametrize("shape", [(1, 45, 70, 3), pytest.param((2, 64, 96, 3), marks=pytest.mark.slow)])
def test_pytorch_computes_the_same(shape):
    """Output and gradient of the same weights in PyTorch; both are float32."""
    torch = pytest.importorskip("torch", reason="needs PyTorch: requirements-test.txt")
    from aecr_jax.benchmark.twins.coarse_net import make

    model = trained(width=12)
    twin = make(vars(model.config))
    arrays = {name.replace(".layers.", "."): np.asarray(array) for name, array in get_arrays(model).items()}
    theirs = {
        name.replace(".kernel", ".weight"): array.transpose(3, 2, 0, 1) if array.ndim == 4 else array for name, array in arrays.items()
    }
    twin.load_state_dict({name: torch.tensor(array) for name, array in theirs.items()})
    x = np.random.default_rng(5).random(shape).astype(np.float32)
    given = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = twin(given)

    @jax.jit  # one program compiles faster than the many operations one by one
    @functools.partial(jax.grad, has_aux=True)
    def grad(x):
        restored = model(x)
        return (restored**2).sum(), restored

    beyond = np.float32(1.2) * x - np.float32(0.1)  # values below 0 and above 1, and a part of one colour
    beyond[:, :16, :16] = 0.83
    # Gradients are not compared here: they are not unique where values are clipped or equal, and PyTorch returns other ones.
    np.testing.assert_allclose(
        jax.jit(model)(beyond), twin(torch.tensor(beyond.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1), atol=4e-6
    )
    gradient, restored = grad(x)
    np.testing.assert_allclose(restored, expected.detach().numpy().transpose(0, 2, 3, 1), atol=2e-6)
    expected.square().sum().backward()
    np.testing.assert_allclose(gradient, given.grad.numpy().transpose(0, 2, 3, 1), atol=2e-4)


def test_half_precision_is_near():
    """The features of cells are computed in float32 and then rounded; the haze is at most 0.02 off."""
    hazy = jnp.asarray(np.random.default_rng(10).random((1, 64, 96, 3)), jnp.float32)
    model = trained(width=12)
    half = with_arrays(network(width=12, dtype="bfloat16"), get_arrays(model))
    difference = np.abs(np.asarray(jax.jit(half)(hazy)) - np.asarray(jax.jit(model)(hazy)))
    assert 0 < difference.max() < 0.02


def test_the_estimates_are_bounded():
    """However large the last layer's output is, the transmission is between 0.02 and 1, and the result finite."""
    hazy = jnp.full((1, 32, 32, 3), 0.5)
    for sign, least, greatest in ((1, 0, 1e-6), (-1, 48.9, 49.1)):
        restored, gain, _ = with_constant_maps(network(), sign * np.full(4, 1e4)).restore_with_haze(hazy)
        assert least <= float(gain.min()) <= float(gain.max()) <= greatest
        assert np.isfinite(restored).all()
