"""The gradients that save memory equal those of JAX, and a block of layers keeps as few arrays as documented."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from aecr_jax.networks.layers import FABlock, recompute
from aecr_jax.ops.conv import conv, pad_by_reflection
from aecr_jax.ops.gradients import delay
from aecr_jax.ops.windows import max_pool

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def gradients(function, *arguments):
    """Return the result and the gradients of its product with made-up numbers."""
    out, vjp = jax.vjp(function, *arguments)
    return out, *vjp(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


def assert_equal_gradients(got, expected, *arguments, rtol=1e-12):
    for ours, theirs in zip(jax.jit(lambda *a: gradients(got, *a))(*arguments), gradients(expected, *arguments)):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (1, 9, 4, 2), (2, 7, 8, 1), (1, 2, 3, 1), (0, 5, 5, 2)])
@pytest.mark.parametrize("size", [1, 3])
def test_padding_by_reflection(x64, shape, size):
    """The expected values are those of `jnp.pad`, also for images smaller than the padding."""
    x = jax.random.normal(jax.random.key(0), shape, jnp.float64)
    assert_equal_gradients(
        lambda x: pad_by_reflection(x, size), lambda x: jnp.pad(x, ((0, 0), (size, size), (size, size), (0, 0)), mode="reflect"), x
    )


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 5, 7, 2), (1, 2, 3, 1), (0, 4, 4, 2)])
def test_maximum_of_2x2_pixels(x64, shape):
    """The expected values are those of `lax.reduce_window`. The values are so few that many windows have several greatest ones."""
    x = jax.random.randint(jax.random.key(1), shape, -1, 2).astype(jnp.float64)
    assert_equal_gradients(max_pool, lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), x)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution(x64, stride):
    x, kernel = (jax.random.normal(jax.random.key(i), shape, jnp.float64) for i, shape in enumerate([(2, 6, 8, 3), (3, 3, 3, 4)]))
    options = (stride, stride), ((1, 1), (1, 1))
    assert_equal_gradients(
        lambda x, kernel: conv(x, kernel, *options, dimension_numbers=DIMENSIONS),
        lambda x, kernel: lax.conv_general_dilated(x, kernel, *options, dimension_numbers=DIMENSIONS),
        x,
        kernel,
    )


def test_recomputation(x64):
    """The expected values are those of the function itself."""
    layer = nnx.Linear(3, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), (2, 3), jnp.float64)

    def function(layer, x):
        return layer(nnx.relu(x)) ** 2

    assert_equal_gradients(
        lambda kernel, x: recompute(function, nnx.merge(graph, replace(state, kernel)), x),
        lambda kernel, x: function(nnx.merge(graph, replace(state, kernel)), x),
        layer.kernel[...],
        x,
    )


def replace(state, kernel):
    return nnx.State({"bias": state["bias"], "kernel": state["kernel"].replace(kernel)})


@pytest.mark.parametrize("first", [1.0, np.inf, -np.inf, np.nan])
def test_delayed_arrays_keep_every_bit(first):
    x = {"a": jnp.array([-0.0, np.nan, np.inf, 1e-45]), "b": jnp.array([3], jnp.int32)}
    delayed = jax.jit(delay)(x, jnp.array([first, 2.0]))
    for name, array in x.items():
        assert np.asarray(delayed[name]).tobytes() == np.asarray(array).tobytes()
    assert delay(x, jnp.zeros((0, 2)))["a"] is x["a"]


def test_a_feature_attention_block_keeps_three_arrays():
    """The block keeps its input and the results of its two convolutions. Without these gradients, XLA keeps six arrays."""
    features, n, size = 16, 2, 32
    x = jnp.zeros((n, size, size, features))
    block = FABlock(features, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, state = nnx.split(block)

    def memory(count):
        def loss(state, x):
            block = nnx.merge(graph, state)
            for _ in range(count):
                x = block(x)
            return jnp.sum(x**2)

        return jax.jit(jax.grad(loss)).trace(state, x).lower().compile().memory_analysis().temp_size_in_bytes

    kept = (memory(6) - memory(2)) / (4 * x.nbytes)
    assert 2.9 < kept < 3.5
