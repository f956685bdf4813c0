"""Networks as StableHLO programs that JAX runs without this package."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from aecr_jax.networks import coarse_net
from aecr_jax.networks.network import Network

PLATFORMS = ("cpu", "cuda", "tpu")
# The least height and width. Padding by reflection must be smaller than the image, at every resolution inside the network.
_LEAST = 32


def multiple_of(model: Network) -> int:
    """Return the number of which height and width of the program's images must be multiples.

    Sizes are symbols when the program is exported, and JAX cannot round those. So the caller must pad, and sizes that are halved within
    a network must be even.
    """
    if model.config.NAME == "grid_dehaze_net":
        return 4
    return model.MULTIPLE << getattr(model.config, "coarse_levels", 0)


def to_stablehlo(model: Network) -> bytes:
    """Return a program, serialized by `jax.export`, for CPUs, CUDA GPUs and TPUs: `[b, m h, m w, 3]` in float32 -> the same shape.

    The number m is that of `multiple_of`, and b, h and w are symbols. Height and width must be at least 32 pixels and larger than the
    radius of a guided filter; images for a CoarseNet must have at most 1,048,576 pixels.

    Args:
      model: the network, in evaluation mode.
    """
    multiple = multiple_of(model)
    least = -(-max(_LEAST, getattr(model.config, "radius", 0) + 1) // multiple)
    constraints = [f"h >= {least}", f"w >= {least}"]
    if isinstance(model, coarse_net.CoarseNet):
        constraints.append(f"h*w <= {coarse_net.PIXELS // multiple**2}")
    graph, state = nnx.split(model)

    def restore(hazy: Array) -> Array:
        return nnx.merge(graph, state)(hazy)

    shape = jax.export.symbolic_shape(f"b, {multiple}*h, {multiple}*w, 3", constraints=constraints)
    program = jax.export.export(jax.jit(restore), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.float32))
    return bytes(program.serialize())
