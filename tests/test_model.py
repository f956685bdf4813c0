import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import load, nhwc, official_weights, our_arrays

from aecr_jax import AECRNet, AECRNetConfig
from aecr_jax.networks.arrays import count_parameters, get_arrays
from aecr_jax.networks.registry import abstract_network, build_network

TINY = AECRNetConfig(width=4)
# One program compiles faster than the many operations of a network one by one.
call = nnx.jit(AECRNet.__call__)

# The paper's 2.61M parameters, exactly, and the numbers with each switch of Table 2. An FA block has 1,205,089 parameters, the
# deformable layer 652,315 and FastDeconv 84.
COUNTS = [
    ({}, 2_614_229),
    ({"fast_deconv": False}, 2_614_145),
    ({"shared": False}, 2_614_229 + 5 * 1_205_089 + 652_315),
    ({"mixup": "none"}, 2_614_227),
    ({"mixup": "sum"}, 2_614_227),
    ({"dfe": "before"}, 2_614_229),
    ({"dfe": "none"}, 2_614_229 - 652_315),
    ({"dfe": "none", "mixup": "none"}, 2_614_227 - 652_315),
]


@pytest.mark.parametrize(("switches", "count"), COUNTS)
def test_parameters(switches, count):
    assert count_parameters(abstract_network(AECRNetConfig(**switches))) == count


def test_official_forward():
    """Output and feature maps equal those of the official PyTorch network with the same weights (tests/golden), in float32."""
    d = load("official_forward")
    model = build_network(AECRNetConfig(), our_arrays(official_weights(d["weight_seed"])))
    x = jnp.array(nhwc(d["x"]))
    np.testing.assert_allclose(model(x), nhwc(d["y"]), atol=2e-5)
    whitened = model.fast_deconv(x)
    np.testing.assert_allclose(whitened, nhwc(d["at_fast_deconv"]), atol=2e-5)
    down1 = nnx.relu(model.down1(whitened))
    np.testing.assert_allclose(down1[:1, :, :, ::8], nhwc(d["at_down1"]), atol=2e-5)
    down3 = nnx.relu(model.down3(nnx.relu(model.down2(down1))))
    np.testing.assert_allclose(down3[:1, :, :, ::8], nhwc(d["at_down3"]), atol=2e-5)
    y = down3
    for _ in range(6):
        y = model.blocks[0](y)
    y = model.deform[0](model.deform[0](y))
    up1 = nnx.relu(model.up1(model.mix1(down3, y)))
    np.testing.assert_allclose(up1[:1, :, :, ::8], nhwc(d["at_up1"]), atol=2e-5)


@pytest.mark.slow
def test_float64_is_float64_throughout(x64):
    d = load("official_forward")
    config = AECRNetConfig(width=64, dtype="float64", param_dtype="float64")
    arrays = {k: v.astype(np.float64) for k, v in our_arrays(official_weights(d["weight_seed"])).items()}
    y = build_network(config, arrays)(jnp.array(nhwc(d["x"])[:1], jnp.float64))
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, nhwc(d["y"])[:1], atol=2e-5)


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (9, 6), (1, 1), (2, 13)])
def test_any_size(size):
    model = AECRNet(TINY, rngs=nnx.Rngs(0))
    model.eval()
    y = call(model, jnp.full((1, *size, 3), 0.5))
    assert y.shape == (1, *size, 3) and np.isfinite(y).all()


def test_padding_reflects_and_crops_back():
    model = AECRNet(TINY, rngs=nnx.Rngs(0))
    model.eval()
    x = jax.random.uniform(jax.random.key(0), (1, 6, 9, 3))
    padded = jnp.array(np.pad(x, ((0, 0), (0, 2), (0, 3), (0, 0)), mode="reflect"))
    np.testing.assert_allclose(call(model, x), call(model, padded)[:, :6, :9], atol=1e-6)


@pytest.mark.parametrize("switches", [s for s, _ in COUNTS[1:]])
def test_every_switch_changes_the_function(switches):
    x = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3))

    def output(config):
        model = AECRNet(config, rngs=nnx.Rngs(0))
        model.train()
        if config.dfe != "none":  # at the initial offsets of zero, DFE before and after hardly differ
            model.deform[0].offset_mask.bias[...] = jnp.linspace(-2, 2, 27)
        return model(x)

    y = output(dataclasses.replace(TINY, **switches))
    assert y.shape == x.shape
    assert float(jnp.abs(y - output(TINY)).max()) > 1e-4


def test_bfloat16_is_near_float32():
    x = jax.random.uniform(jax.random.key(0), (1, 16, 16, 3))
    arrays = get_arrays(AECRNet(TINY, rngs=nnx.Rngs(0)))
    full, half = (call(build_network(dataclasses.replace(TINY, dtype=dtype), arrays), x) for dtype in ("float32", "bfloat16"))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.03)


def test_build_model_names_the_wrong_tensor():
    arrays = get_arrays(AECRNet(TINY, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"tensor down1.kernel has shape \(1, 3, 7, 4\) and must have \(7, 7, 3, 4\)"):
        build_network(TINY, arrays | {"down1.kernel": jnp.zeros((1, 3, 7, 4))})
    with pytest.raises(ValueError, match=r"tensor mix1.theta of shape \(\) is missing"):
        build_network(TINY, {k: v for k, v in arrays.items() if k != "mix1.theta"})
    with pytest.raises(ValueError, match="unknown tensor nonsense"):
        build_network(TINY, arrays | {"nonsense": jnp.zeros(())})


def test_refuses_wrong_settings_and_inputs():
    with pytest.raises(ValueError, match=r"mixup \(='mean'\) must be one of 'adaptive', 'sum', 'none'"):
        AECRNetConfig(mixup="mean")
    with pytest.raises(ValueError, match=r"width \(=0\) must be at least 1"):
        AECRNetConfig(width=0)
    with pytest.raises(ValueError, match=r"hazy has shape \(8, 8, 3\) and must be \[N, H, W, 3\]"):
        AECRNet(TINY, rngs=nnx.Rngs(0))(jnp.zeros((8, 8, 3)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.bool_, np.complex64])
def test_refuses_images_that_are_not_floats(dtype):
    """Other types are refused, because an output cast to an integer type would be zeros."""
    model = AECRNet(TINY, rngs=nnx.Rngs(0))
    message = rf"hazy has type {np.dtype(dtype)} and must be floating point in \[0, 1\], such as float32: divide 8-bit values by 255"
    with pytest.raises(ValueError, match=message):
        model(np.ones((1, 8, 8, 3), dtype))
    with pytest.raises(ValueError, match=message):
        nnx.jit(AECRNet.__call__)(model, np.ones((1, 8, 8, 3), dtype))


def test_takes_arrays_of_numpy_and_lists():
    model = drawn(TINY)
    image = np.random.default_rng(0).random((1, 8, 8, 3), "f4")
    expected = model(jnp.array(image))
    for same in (image, image.astype("f8"), image.tolist()):
        y = model(same)
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(y, expected)
    with pytest.raises(ValueError, match="hazy is a NoneType and must be an array"):
        model(None)
    with pytest.raises(ValueError, match=r"hazy has shape \(1, 0, 8, 3\) and must be \[N, H, W, 3\], H and W at least 1"):
        model(np.zeros((1, 0, 8, 3), "f4"))


@pytest.mark.parametrize("switches", [{"dfe": "none", "mixup": "sum", "fast_deconv": False}, pytest.param({}, marks=pytest.mark.slow)])
def test_no_images_give_no_images(switches):
    model = drawn(dataclasses.replace(TINY, **switches))
    for call in (model, lambda x: nnx.jit(AECRNet.__call__)(model, x)):
        y = call(jnp.zeros((0, 9, 6, 3)))
        assert y.shape == (0, 9, 6, 3) and y.dtype == jnp.float32


def test_no_images_have_no_statistics():
    """The mean over an empty batch is NaN and would stay in the running statistics."""
    model = AECRNet(TINY, rngs=nnx.Rngs(0))
    model.train()
    with pytest.raises(ValueError, match=r"x has shape \(0, 8, 8, 3\): without images there are no statistics to whiten by"):
        model(jnp.zeros((0, 8, 8, 3)))
    assert all(np.isfinite(array).all() for array in get_arrays(model).values())


def test_settings_have_types():
    for name, value, wanted in [
        ("width", "64", "an integer"),
        ("width", 2.5, "an integer"),
        ("width", True, "an integer"),
        ("blocks", None, "an integer"),
        ("shared", "False", "True or False"),
        ("remat", 1, "True or False"),
        ("dfe", None, "one of 'after', 'before', 'none'"),
    ]:
        with pytest.raises(ValueError, match=rf"{name} \(={value!r}\) must be {wanted}"):
            AECRNetConfig(**{name: value})
    with pytest.raises(ValueError, match=r"config \(=None\) must be of type AECRNetConfig"):
        AECRNet(None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"rngs \(=0\) must be an nnx.Rngs, such as nnx.Rngs\(0\)"):
        AECRNet(TINY, rngs=0)


def drawn(config):
    """Return a network in which every parameter and statistic, including offsets and masks, differs from its initial value."""
    random = np.random.default_rng(0)
    arrays = get_arrays(AECRNet(config, rngs=nnx.Rngs(0)))
    return build_network(config, {name: a + random.normal(scale=0.05, size=a.shape).astype("f4") for name, a in arrays.items()})


# From width 3 to 5, the hidden channels of the attention layers are 12 // 8 and 20 // 8.
@pytest.mark.slow
@pytest.mark.parametrize(("width", "wider", "switches"), [(4, 6, {}), (3, 5, {"shared": False})])
def test_a_wider_network_has_the_same_output(width, wider, switches):
    """Widening preserves the output up to rounding (Net2Net, Chen et al., 2016), and gradients reach the new weights."""
    narrow = drawn(AECRNetConfig(width=width, blocks=2, **switches))
    wide = narrow.widen(dataclasses.replace(narrow.config, width=wider), rngs=nnx.Rngs(1))
    assert wide.config == dataclasses.replace(narrow.config, width=wider)
    image = jnp.array(np.random.default_rng(2).random((2, 20, 24, 3), "f4"))
    graph, params, rest = nnx.split(wide, nnx.Param, ...)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def grad(params):
        restored = nnx.merge(graph, params, rest)(image)
        return jnp.abs(restored - image).mean(), restored

    gradient, restored = grad(params)
    np.testing.assert_allclose(restored, call(narrow, image), atol=1e-6)
    # Weights from new channels to old ones are zero, but their gradients are not.
    for kernel in ("blocks.0.conv1.kernel", "deform.0.kernel", "deform.0.offset_mask.kernel", "up3.kernel"):
        old, new = get_arrays(narrow)[kernel], get_arrays(wide)[kernel]
        part = np.s_[:, :, old.shape[2] :, : old.shape[3]]
        assert new[part].size and not new[part].any()
        assert np.asarray(get_arrays(nnx.merge(graph, gradient, rest), nnx.Param)[kernel])[part].any()


def test_a_network_cannot_be_made_narrower():
    with pytest.raises(ValueError, match=r"width \(=3\) must be at least the model's, 4"):
        drawn(TINY).widen(dataclasses.replace(TINY, width=3), rngs=nnx.Rngs(0))
