"""The student and the teacher of KDDN; `test_authors` compares the student with the authors' definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aecr_jax.convert import kddn
from aecr_jax.convert.kddn_teacher import FORMAT
from aecr_jax.networks.arrays import count_parameters, get_arrays
from aecr_jax.networks.kddn import KDDN, KDDNConfig, KDDNTeacher, KDDNTeacherConfig
from aecr_jax.networks.registry import abstract_network, build_network
from aecr_jax.ops.resize import upsample_bilinear, upsample_nearest


def interpolate(x, axis):
    """Expected: NumPy's interpolation at the positions p (n - 1) / (2n - 1)."""
    n = x.shape[axis]
    positions = np.arange(2 * n) * (n - 1) / (2 * n - 1)
    return np.apply_along_axis(lambda row: np.interp(positions, np.arange(n), row), axis, x)


@pytest.mark.parametrize("size", [(3, 4), (1, 2), (5, 1), (16, 7)])
def test_bilinear_enlargement_aligns_the_corners(size, x64):
    rng = np.random.default_rng(0)
    x, cotangent = rng.random((2, *size, 3)), rng.random((2, 2 * size[0], 2 * size[1], 3))
    y, vjp = jax.vjp(upsample_bilinear, jnp.asarray(x))
    np.testing.assert_allclose(y, interpolate(interpolate(x, 1), 2), atol=1e-14)
    # The operation is linear, so that its gradient gives the same inner product.
    (gradient,) = vjp(jnp.asarray(cotangent))
    np.testing.assert_allclose(np.sum(gradient * x), np.sum(cotangent * np.asarray(y)), rtol=1e-12)


def test_enlargement_keeps_the_type():
    x = jnp.asarray(np.random.default_rng(0).random((1, 3, 5, 2)), jnp.bfloat16)
    exact = np.asarray(upsample_bilinear(x.astype(jnp.float32)))
    assert upsample_bilinear(x).dtype == upsample_nearest(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(upsample_bilinear(x).astype(np.float32), exact, rtol=2**-8)  # rounded once
    np.testing.assert_array_equal(upsample_nearest(x), np.repeat(np.repeat(np.asarray(x), 2, 1), 2, 2))


def test_the_teacher_has_the_authors_parameters():
    assert count_parameters(abstract_network(KDDNTeacherConfig())) == 798_147


def test_the_teacher_is_its_pytorch_twin(x64):
    """With random weights in float64; both were written from the description of the authors' network."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from aecr_jax.benchmark.twins import kddn_teacher

    config = KDDNTeacherConfig(width=6, dtype="float64", param_dtype="float64")
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(array.shape) / 6 for name, array in get_arrays(abstract_network(config)).items()}
    model, twin = build_network(config, arrays), kddn_teacher.make(vars(config)).double()
    twin.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in FORMAT.to_theirs(arrays).items()})
    x = rng.random((2, 16, 12, 3))
    (y, features), their_features = model.restore_with_features(jnp.asarray(x)), []
    for block in range(1, 7):
        twin.get_submodule(f"res{block}").register_forward_hook(lambda _module, _input, output: their_features.append(output))
    with torch.no_grad():
        their_y = twin(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
    for ours, theirs in zip([y, *features], [their_y, *their_features], strict=True):
        np.testing.assert_allclose(ours, np.moveaxis(theirs.numpy(), 1, -1), rtol=0, atol=1e-12 * float(theirs.abs().max()))


@pytest.mark.parametrize("size", [pytest.param((8, 12), marks=pytest.mark.slow), (9, 6), (1, 1)])
def test_student_and_teacher_have_features_of_the_same_shapes(size):
    student = KDDN(KDDNConfig(width=4, blocks=1), rngs=nnx.Rngs(0))
    teacher = KDDNTeacher(KDDNTeacherConfig(width=4), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).random((2, *size, 3)), jnp.float32)
    shape = (2, -(-size[0] // 4), -(-size[1] // 4), 4)
    for model in (student, teacher):
        restored, features = model.restore_with_features(x)
        assert restored.shape == x.shape and [feature.shape for feature in features] == 6 * [shape]
        assert all(np.isfinite(array).all() for array in (restored, *features))
        np.testing.assert_array_equal(model(x), restored)
    for ours, expected in zip(teacher.features(x), features, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_padding_reflects_and_crops_back():
    model = KDDN(KDDNConfig(width=2, blocks=1), rngs=nnx.Rngs(0))
    x = jax.random.uniform(jax.random.key(0), (1, 6, 9, 3))
    padded = jnp.array(np.pad(x, ((0, 0), (0, 2), (0, 3), (0, 0)), mode="reflect"))
    np.testing.assert_allclose(model(x), model(padded)[:, :6, :9], atol=1e-6)


def test_the_unused_convolutions_of_the_authors_student1_are_ignored():
    """It is the same network with three more convolutions, `convR1` to `convR3`."""
    model = KDDN(KDDNConfig(width=2, blocks=1), rngs=nnx.Rngs(0))
    arrays = {name: np.asarray(array) for name, array in get_arrays(model).items()}
    extra = {
        f"convR{i}.{kind}": np.zeros(shape, np.float32) for i in (1, 2, 3) for kind, shape in (("weight", (64, 2, 3, 3)), ("bias", 64))
    }
    built = get_arrays(kddn.FORMAT.build(kddn.FORMAT.to_theirs(arrays) | extra))
    assert set(built) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(built[name], array)
    with pytest.raises(ValueError, match=r"tensor convR4.bias is not one of the authors' KDDN"):
        kddn.FORMAT.build(kddn.FORMAT.to_theirs(arrays) | {"convR4.bias": np.zeros(2, np.float32)})


def test_refuses_what_are_no_images():
    for model, name in (
        (KDDN(KDDNConfig(width=1, blocks=1), rngs=nnx.Rngs(0)), "hazy"),
        (KDDNTeacher(KDDNTeacherConfig(width=1), rngs=nnx.Rngs(0)), "clear"),
    ):
        with pytest.raises(ValueError, match=rf"{name} has type uint8 and must be floating point in \[0, 1\]"):
            model(np.zeros((1, 8, 8, 3), np.uint8))
        with pytest.raises(ValueError, match=rf"{name} has shape \(8, 8, 3\) and must be \[N, H, W, 3\]"):
            model(np.zeros((8, 8, 3), np.float32))
