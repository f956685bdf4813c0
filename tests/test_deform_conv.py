import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from reference import load, nhwc

from aecr_jax import deform_conv2d
from aecr_jax.ops import deform_conv as module
from aecr_jax.training.mesh import make_mesh

CASES = ["unit", "far", "zero", "stride2_dil2", "groups2", "unmodulated", "k5"]


def case(name, dtype):
    d = load(f"deform_conv2d_{name}")
    arrays = {"x": nhwc(d["x"]), "offset": nhwc(d["offset"]), "kernel": d["weight"].transpose(2, 3, 1, 0), "bias": d["bias"]}
    grads = {"x": nhwc(d["grad_x"]), "offset": nhwc(d["grad_offset"]), "kernel": d["grad_weight"].transpose(2, 3, 1, 0)}
    grads["bias"] = d["grad_bias"]
    if "grad_mask" in d:
        arrays["mask"], grads["mask"] = nhwc(d["mask"]), nhwc(d["grad_mask"])
    options = {
        "strides": int(d["stride"]),
        "padding": int(d["padding"]),
        "dilation": int(d["dilation"]),
        "offset_groups": int(d["offset_groups"]),
    }
    arrays = {key: array.astype(dtype) for key, array in arrays.items()}
    return arrays, options, nhwc(d["out"]), nhwc(d["cotangent"]).astype(dtype), grads


def assert_equals_torchvision(name, dtype, tolerance):
    arrays, options, expected, cotangent, expected_grads = case(name, dtype)

    @jax.jit
    def differentiate(arrays, cotangent):
        out, vjp = jax.vjp(lambda a: deform_conv2d(**a, **options), arrays)
        return out, *vjp(cotangent)

    out, grads = differentiate(arrays, cotangent)
    assert out.dtype == dtype
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance * abs(expected).max())
    for key, expected_grad in expected_grads.items():
        np.testing.assert_allclose(grads[key], expected_grad, rtol=0, atol=tolerance * abs(expected_grad).max(), err_msg=key)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 1e-4)])
def test_equals_torchvision(name, dtype, tolerance, x64):
    """The output and all gradients equal those of torchvision's deform_conv2d in float64 (tests/golden)."""
    assert_equals_torchvision(name, dtype, tolerance)


@pytest.mark.parametrize("name", CASES)
def test_gradients_in_parts_equal_torchvision(name, x64, monkeypatch):
    """So are those of large outputs computed on a CPU; here, parts of a few positions stand for those of a thousand."""
    monkeypatch.setattr(module, "_PART", 24)
    shape = case(name, np.float64)[2].shape
    assert module._cpu_parts(shape) > 1
    assert_equals_torchvision(name, np.float64, 1e-9)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((1, 64, 64, 8), 4),
        ((2, 60, 60, 8), 8),  # 450 positions of each image
        ((1, 15, 60, 8), 1),
        ((1, 61, 59, 8), 1),  # these numbers are prime, and 61 positions would be too few
        ((0, 64, 64, 8), 4),
    ],
)
def test_parts_hold_256_to_1024_positions(shape, parts):
    assert module._cpu_parts(shape) == parts


def test_a_gradient_with_symbols_for_sizes_is_exported():
    x, offset, kernel = some_inputs(n=1, h=4, w=5)
    gradient = jax.jit(jax.grad(lambda x, offset: deform_conv2d(x, offset, kernel, padding=1).sum()))
    symbols = jax.export.symbolic_shape("n, h, w")
    shapes = [jax.ShapeDtypeStruct((*symbols, size), np.float32) for size in (4, 18)]
    exported = jax.export.export(gradient)(*shapes)
    np.testing.assert_allclose(exported.call(x, offset), gradient(x, offset), rtol=0, atol=1e-5)


def some_inputs(n=2, h=6, w=5, c=4, o=3, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((n, h, w, c)).astype(np.float32),
        rng.standard_normal((n, h, w, 18)).astype(np.float32),
        rng.standard_normal((3, 3, c, o)).astype(np.float32),
    )


def test_zero_offsets_are_a_plain_convolution():
    x, offset, kernel = some_inputs()
    expected = lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(deform_conv2d(x, 0 * offset, kernel, padding=1), expected, atol=1e-5)


def test_by_hand():
    """A 1x1 kernel in a 2x2 image is moved by (0.25, 0.5): the weights are 0.75 and 0.25 in y, 0.5 and 0.5 in x; outside are zeros."""
    x = jnp.array([[1.0, 2.0], [3.0, 5.0]]).reshape(1, 2, 2, 1)
    offset = jnp.tile(jnp.array([0.25, 0.5]), (1, 2, 2, 1))
    out = deform_conv2d(x, offset, jnp.ones((1, 1, 1, 1)))
    expected = [[0.75 * 1.5 + 0.25 * 4, 0.75 * 1 + 0.25 * 2.5], [0.75 * 4, 0.75 * 2.5]]
    np.testing.assert_allclose(out[0, :, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("value", [1e4, -1e9, 3e38, np.inf, -np.inf])
def test_huge_offsets_sample_zero_with_finite_gradients(value):
    x, offset, kernel = some_inputs()
    offset = np.full_like(offset, value)
    out, vjp = jax.vjp(lambda *a: deform_conv2d(*a, padding=1), x, offset, kernel)
    np.testing.assert_array_equal(out, np.zeros_like(out))
    assert all(np.isfinite(grad).all() for grad in vjp(jnp.ones_like(out)))


def test_nan_offset_shows_in_its_own_pixel_alone():
    x, offset, kernel = some_inputs()
    clean = deform_conv2d(x, offset, kernel, padding=1)
    offset[1, 2, 3, 4] = np.nan
    out = np.array(deform_conv2d(x, offset, kernel, padding=1))
    assert np.isnan(out[1, 2, 3]).all()
    out[1, 2, 3] = clean[1, 2, 3]
    np.testing.assert_array_equal(out, clean)


def test_bfloat16_samples_and_gradients_of_smooth_features():
    """The features differ little from pixel to pixel, so rounding must not hide their differences."""
    rng = np.random.default_rng(0)
    ramp = 1 + np.linspace(0, 0.25, 9)[None, :, None, None] * np.ones((1, 9, 8, 16))
    x = jnp.asarray(ramp, jnp.bfloat16)  # steps of 1/32, exact in bfloat16
    offset = jnp.asarray(rng.uniform(-0.4, 0.4, (1, 9, 8, 2)), jnp.float32)
    kernel = jnp.ones((1, 1, 16, 1), jnp.bfloat16) / 16

    def inner(x, offset, kernel):
        return deform_conv2d(x, offset, kernel)[:, 1:-1, 1:-1].astype(jnp.float32)

    flat = inner(jnp.ones_like(x), offset, kernel)
    np.testing.assert_array_equal(flat, np.ones_like(flat))
    slope = jax.grad(lambda offset: inner(x, offset, kernel).sum())(offset)[:, 1:-1, 1:-1, 0]
    np.testing.assert_allclose(slope, np.full(slope.shape, 1 / 32), rtol=0.01)


def test_bfloat16_features_keep_float32_positions():
    """Positions stay float32, because bfloat16 cannot distinguish 300.25 from 300."""
    x = jnp.arange(400.0).reshape(1, 1, 400, 1) / 400
    offset = jnp.tile(jnp.array([0.0, 0.25]), (1, 1, 400, 1))
    out = deform_conv2d(x.astype(jnp.bfloat16), offset, jnp.ones((1, 1, 1, 1), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out[0, 0, :-1, 0]), (np.arange(399) + 0.25) / 400, atol=5e-3)


def test_a_split_batch_stays_split():
    """The gradient compiled for 8 devices contains no all-gather and has the values of a single device."""
    x, offset, kernel = some_inputs(n=8)
    mesh = make_mesh()
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def loss(x, offset, kernel):
        return jnp.sum(deform_conv2d(x, offset, kernel, padding=1) ** 2)

    gradient = jax.grad(loss, (0, 1, 2))
    compiled = jax.jit(gradient, in_shardings=(split, split, whole), out_shardings=(split, split, whole)).lower(x, offset, kernel).compile()
    text = compiled.as_text()
    assert "all-gather" not in text and "all-reduce" in text
    for ours, expected in zip(compiled(*jax.device_put((x, offset, kernel), (split, split, whole))), gradient(x, offset, kernel)):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": np.zeros((2, 6, 5, 17))}, r"offset has shape \(2, 6, 5, 17\) and must be \(2, 6, 5, 18\)"),
        ({"kernel": np.zeros((3, 3, 5, 3))}, r"kernel has shape .* and must be \[kh, kw, C = 4, O\]"),
        ({"bias": np.zeros(4)}, r"bias has shape \(4,\) and must be \(3,\)"),
        ({"mask": np.zeros((2, 6, 5, 3))}, r"mask has shape .* and must be \(2, 6, 5, 9\)"),
        ({"x": np.zeros((6, 5, 4))}, r"x has shape \(6, 5, 4\) and must be \[N, H, W, C\]"),
        ({"offset_groups": 3}, r"offset_groups \(=3\) must divide the 4 channels"),
        ({"strides": 0}, r"strides \(=0\) must be one integer of at least 1"),
        ({"padding": (1, 2, 3)}, r"padding \(=\(1, 2, 3\)\)"),
        ({"dilation": 9}, r"smaller than the extent of the kernel"),
        ({"strides": 1.5}, r"strides \(=1.5\) must be one integer of at least 1, or one for height and one for width"),
        ({"strides": True}, r"strides \(=True\) must be one integer"),
        ({"strides": None}, r"strides \(=None\) must be one integer"),
        ({"strides": (1, 1.0)}, r"strides \(=\(1, 1.0\)\) must be one integer"),
        ({"strides": np.array(1.5)}, r"strides \(=array\(1.5\)\) must be one integer"),
        ({"padding": -1}, r"padding \(=-1\) must be one integer of at least 0"),
        ({"padding": "same"}, r"padding \(='same'\) must be one integer of at least 0"),
        ({"dilation": 0}, r"dilation \(=0\) must be one integer of at least 1"),
        ({"offset_groups": 0}, r"offset_groups \(=0\) must divide the 4 channels"),
        ({"offset_groups": 1.5}, r"offset_groups \(=1.5\) must be an integer that divides the channels of x"),
        ({"offset_groups": True}, r"offset_groups \(=True\) must be an integer"),
        ({"offset_groups": "2"}, r"offset_groups \(='2'\) must be an integer"),
        ({"kernel": np.zeros((3, 3, 4))}, r"kernel has shape \(3, 3, 4\) and must be \[kh, kw, C = 4, O\]"),
        ({"kernel": np.zeros((0, 3, 4, 3))}, r"kernel has shape \(0, 3, 4, 3\) and must be \[kh, kw, C = 4, O\], each at least 1"),
        ({"x": np.ones((2, 6, 5, 4), np.uint8)}, "x has type uint8 and must be floating point"),
        ({"kernel": np.ones((3, 3, 4, 3), np.int32)}, "kernel has type int32 and must be floating point"),
        ({"offset": np.ones((2, 6, 5, 18), np.int64)}, "offset has type int64 and must be floating point"),
        ({"mask": np.ones((2, 6, 5, 9), bool)}, "mask has type bool and must be floating point"),
        ({"bias": [1, 2, 3]}, "bias has type int32 and must be floating point"),
        ({"x": np.ones((2, 6, 5, 4), np.complex64)}, "x has type complex64 and must be floating point"),
        ({"x": None}, "x is a NoneType and must be an array"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    x, offset, kernel = some_inputs()
    with pytest.raises(ValueError, match=message):
        deform_conv2d(**({"x": x, "offset": offset, "kernel": kernel, "padding": 1} | change))


def test_integers_of_any_kind_and_lists():
    """The same arguments in other types give the same result."""
    x, offset, kernel = some_inputs(c=4)
    offset = np.tile(offset, (1, 1, 1, 2))
    expected = deform_conv2d(x, offset, kernel, padding=1, offset_groups=2)
    numbers = {"strides": np.int64(1), "padding": np.array([1, 1]), "dilation": jnp.array(1), "offset_groups": np.uint8(2)}
    np.testing.assert_array_equal(deform_conv2d(x, offset, kernel, **numbers), expected)
    lists = (x.tolist(), offset.tolist(), kernel.tolist(), [0.0] * 3)
    np.testing.assert_array_equal(deform_conv2d(*lists, padding=[1, 1], offset_groups=2), expected)


def test_no_images_give_no_images():
    x, offset, kernel = some_inputs(n=0)
    out, vjp = jax.vjp(lambda *a: deform_conv2d(*a, padding=1, strides=2), x, offset[:, ::2, ::2], kernel)
    assert out.shape == (0, 3, 3, 3) and out.dtype == jnp.float32
    grads = vjp(out)
    assert [grad.shape for grad in grads] == [(0, 6, 5, 4), (0, 3, 3, 18), (3, 3, 4, 3)]
    assert not grads[2].any()
