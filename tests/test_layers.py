import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from aecr_jax.networks.layers import Conv, ConvTranspose, DeformConv, FastDeconv, Mixup, PReLU, inverse_square_root
from aecr_jax.ops.conv import (
    concatenate_channels,
    conv_1x1,
    conv_few_channels,
    conv_few_inputs,
    conv_few_outputs,
    conv_one_output,
    conv_transpose,
)

TYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}


@pytest.mark.parametrize(
    ("size", "padding", "output_padding"), [(3, 1, (1, 1)), (3, 1, (0, 1)), (3, 1, (0, 0)), (3, 0, (0, 0)), (4, 1, (0, 0)), (2, 0, (0, 0))]
)
def test_conv_transpose_is_an_input_dilated_convolution(size, padding, output_padding):
    """PyTorch's ConvTranspose2d(k, stride=2, padding=p, output_padding=q) pads the dilated input by k - 1 - p and k - 1 - p + q."""
    layer = ConvTranspose(5, 4, size, padding=padding, **TYPES, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 6, 5))
    pads = [(size - 1 - padding, size - 1 - padding + extra) for extra in output_padding]

    def xla(kernel):
        y = lax.conv_general_dilated(x, kernel[::-1, ::-1], (1, 1), pads, lhs_dilation=(2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + layer.bias[...].reshape(1, 1, 1, -1)

    np.testing.assert_allclose(layer(x, output_padding), xla(layer.kernel[...]), atol=1e-5)


def test_conv_transpose_doubles_the_size_by_default():
    x = jnp.ones((1, 3, 6, 2))
    for size, padding, expected in ((3, 1, (6, 12)), (4, 1, (6, 12)), (2, 0, (6, 12)), (3, 0, (7, 13))):
        assert ConvTranspose(2, 2, size, padding=padding, **TYPES, rngs=nnx.Rngs(0))(x).shape[1:3] == expected


@pytest.mark.parametrize("reflect", [False, True])
def test_a_convolution_with_an_even_kernel_halves_the_size(reflect):
    """Expected: the input padded by 1 on each side (by NumPy), then XLA's convolution without padding."""
    layer = Conv(2, 3, 4, stride=2, reflect=reflect, **TYPES, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 6, 8, 2))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect" if reflect else "constant")
    y = lax.conv_general_dilated(padded, layer.kernel[...], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(layer(x), y + layer.bias[...][None, None, None], atol=1e-5)


@pytest.mark.parametrize("padding", ["VALID", ((3, 3), (2, 1))])
@pytest.mark.parametrize(("conv", "channels"), [(conv_few_inputs, (2, 5)), (conv_few_outputs, (5, 2)), (conv_few_channels, (2, 3))])
def test_narrow_convolutions_are_xla_convolutions(conv, channels, padding):
    x = jax.random.normal(jax.random.key(0), (2, 11, 9, channels[0]))
    kernel = jax.random.normal(jax.random.key(1), (7, 5, *channels))

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def ours(x, kernel):
        return conv(x, kernel, (1, 1), padding)

    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), atol=1e-4)
    cotangent = jax.random.normal(jax.random.key(2), plain(x, kernel).shape)
    for got, expected in zip(jax.vjp(ours, x, kernel)[1](cotangent), jax.vjp(plain, x, kernel)[1](cotangent)):
        np.testing.assert_allclose(got, expected, atol=1e-3)


NARROW = {
    "transpose": (lambda x, y: conv_transpose(x, y, padding=1, output_padding=(1, 1)), (3, 3, 6, 3)),
    "few_inputs": (lambda x, y: conv_few_inputs(x, y, (1, 1), "VALID"), (3, 3, 6, 3)),
    "few_outputs": (lambda x, y: conv_few_outputs(x, y, (1, 1), "VALID"), (3, 3, 6, 3)),
    "few_channels": (lambda x, y: conv_few_channels(x, y, (1, 1), "VALID"), (3, 3, 6, 3)),
    "one_output": (lambda x, y: conv_one_output(x, y, (1, 1), "VALID"), (3, 3, 6, 1)),
    "concatenate": (concatenate_channels, (2, 8, 7, 3)),
}


@pytest.mark.parametrize("name", NARROW)
def test_forms_for_cpus_are_used_on_cpus_alone(name):
    """The operations in the program show which form it has.

    The usual forms have three convolutions (values and two gradients), one of them dilated if it is a transposed one, or a concatenation.
    The forms for CPUs reshape kernels or multiply matrices, have no dilated transposed convolution, and add padded arrays.
    """
    function, shape = NARROW[name]
    x, y = jnp.ones((2, 8, 7, 6)), jnp.ones(shape)

    @jax.jit
    def both(x, y):
        out, vjp = jax.vjp(function, x, y)
        return out, vjp(out)

    text = {platform: both.trace(x, y).lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")}
    for platform, program in text.items():
        cpu = platform == "cpu"
        if name == "concatenate":
            assert ("stablehlo.concatenate" in program) is not cpu and ("stablehlo.pad" in program) is cpu
        elif name == "transpose":
            assert ("lhs_dilate = [2, 2]" in program) is not cpu
        else:
            assert ("stablehlo.reshape" in program or "stablehlo.dot_general" in program) is cpu
            assert program.count("stablehlo.convolution") == 3 or cpu
    exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(x, y)
    np.testing.assert_allclose(exported.call(x, y), function(x, y), rtol=1e-6)


def test_forms_for_cpus_keep_their_arguments_alone_for_the_gradient():
    """The residuals are x and the kernel, and not the shifted copies of x; rematerialization and a second derivative work."""
    x, kernel = jax.random.normal(jax.random.key(0), (1, 6, 6, 3)), jax.random.normal(jax.random.key(1), (3, 3, 3, 4))

    def square(x, kernel):
        return jnp.sum(conv_few_inputs(x, kernel, (1, 1), "VALID") ** 2)

    residuals = jax.tree.leaves(jax.vjp(lambda x: conv_few_inputs(x, kernel, (1, 1), "VALID"), x)[1])
    assert sorted(leaf.shape for leaf in residuals if leaf.ndim == 4) == [(1, 6, 6, 3), (3, 3, 3, 4)]
    gradient = jax.jit(jax.grad(square))(x, kernel)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.checkpoint(square)))(x, kernel), gradient, rtol=1e-6)
    # The function is quadratic in x, so that its second derivative along x is its first one.
    second = jax.grad(lambda x: jnp.sum(jax.grad(square)(x, kernel) * x))(x)
    np.testing.assert_allclose(second, 2 * gradient, rtol=1e-4, atol=1e-4)


def test_concatenation_of_channels():
    x, y = (jax.random.normal(jax.random.key(c), (2, 3, 4, c)) for c in (2, 5))
    np.testing.assert_array_equal(concatenate_channels(x, y), jnp.concatenate([x, y], -1))


def test_a_1x1_convolution_is_an_xla_convolution():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 5, 4, 6)), jax.random.normal(jax.random.key(1), (1, 1, 6, 1))
    expected = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(conv_1x1(x, kernel, (1, 1), "VALID"), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"kernel has shape \(1, 1, 6, 1\) and strides are \(2, 2\): both must be 1x1"):
        conv_1x1(x, kernel, (2, 2), "VALID")


def test_inverse_square_root_of_a_diagonal_matrix():
    diagonal = np.array([1.0, 2.0, 4.0], np.float32)
    got = inverse_square_root(jnp.diag(diagonal), 12)
    np.testing.assert_allclose(got, np.diag(diagonal**-0.5), atol=1e-4)


def test_fast_deconv_averages_the_patches_and_uses_the_averages():
    """After one batch, the running mean is 0.1 times the mean, computed with NumPy, of the patches around every third pixel."""
    layer = FastDeconv(**TYPES, rngs=nnx.Rngs(0))
    x = jax.random.uniform(jax.random.key(0), (2, 8, 7, 3))
    before = layer.running_deconv[...]
    layer.train()
    trained = layer(x)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[n, i : i + 3, j : j + 3].ravel() for n in range(2) for i in range(0, 8, 3) for j in range(0, 7, 3)]
    np.testing.assert_allclose(layer.running_mean[...], 0.1 * np.mean(patches, 0), rtol=1e-4)
    assert not np.allclose(layer.running_deconv[...], before)
    layer.eval()
    mean = layer.running_mean[...]
    evaluated = layer(x)
    assert not np.allclose(trained, evaluated)
    np.testing.assert_array_equal(layer.running_mean[...], mean)


def test_prelu_scales_what_is_negative():
    """By hand. PyTorch's initial slope is 0.25; the gradient with respect to the slope is the sum of the negative inputs."""
    layer, x = PReLU(param_dtype=jnp.float32), jnp.array([-2.0, -1.0, 0.0, 3.0])
    np.testing.assert_array_equal(layer(x), [-0.5, -0.25, 0, 3])
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert nnx.grad(lambda layer: layer(x).sum())(layer).slope.get_value() == -3


def test_mixup_starts_at_its_theta():
    """By Eq. 2 with theta = -1, the encoder's feature has the weight sigmoid(-1) = 0.268941."""
    mixed = Mixup(-1.0, param_dtype=jnp.float32)(jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)))
    np.testing.assert_allclose(mixed.item(), 0.26894142, rtol=1e-6)


def test_deform_conv_begins_as_half_a_convolution():
    """Offsets start at zero and the mask at sigmoid(0) = 0.5, for any kernel size, stride, padding and number of groups."""
    options = {"strides": 2, "padding": (2, 1)}
    layer = DeformConv(4, 6, (5, 3), offset_groups=2, **options, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(6.0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 8, 4)), jnp.float32)
    expected = lax.conv_general_dilated(x, 0.5 * layer.kernel[...], (2, 2), ((2, 2), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(layer(x), expected + jnp.arange(6.0)[None, None, None], atol=1e-5)
    assert layer.offset_mask.kernel.shape == (5, 3, 4, 3 * 2 * 15)


def test_deform_conv_moves_its_taps():
    """If all taps have an offset of one pixel downwards, the output is that of the image one row further down."""
    layer = DeformConv(3, 3, 3, padding=1, rngs=nnx.Rngs(1))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 8, 8, 3)), jnp.float32)
    still = layer(x)
    bias = np.zeros(27, np.float32)
    bias[:18:2] = 1  # dy of each tap
    layer.offset_mask.bias[...] = jnp.asarray(bias)
    np.testing.assert_allclose(layer(x)[:, :-2], still[:, 1:-1], atol=1e-5)
