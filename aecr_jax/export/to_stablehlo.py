"""Networks as StableHLO programs that JAX runs without this package."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from aecr_jax.networks.network import Network

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(model: Network) -> bytes:
    """Return a program, serialized by `jax.export`, for CPUs, CUDA GPUs and TPUs: `[b, m h, m w, 3]` in float32 -> the same shape.

    The number m is `model.symbolic_sizes().multiple`, and b, h and w are symbols; that function also states the limits of the size.

    Args:
      model: the network, in evaluation mode.
    """
    multiple, least, pixels = model.symbolic_sizes()
    constraints = [f"{side} >= {-(-least // multiple)}" for side in "hw"]
    if pixels is not None:
        constraints.append(f"h*w <= {pixels // multiple**2}")
    graph, state = nnx.split(model)

    def restore(hazy: Array) -> Array:
        return nnx.merge(graph, state)(hazy)

    shape = jax.export.symbolic_shape(f"b, {multiple}*h, {multiple}*w, 3", constraints=constraints)
    program = jax.export.export(jax.jit(restore), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.float32))
    return bytes(program.serialize())
