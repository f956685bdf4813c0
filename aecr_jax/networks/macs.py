"""The number of multiply-adds (MACs) of a computation."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxprs_in_params

from aecr_jax.networks.network import NetworkConfig
from aecr_jax.networks.registry import abstract_network


def count_macs(jaxpr: Any) -> int:
    """Count the multiply-adds of the matrix products and convolutions of a jaxpr, including those in its loops and calls.

    Of the branches of a condition, the one with the most counts, and the body of a loop whose length is not known counts once.
    Operations that have no effect and whose results are not used do not count, because XLA removes them.
    """
    total = 0
    needed = {id(variable) for variable in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if not equation.effects and needed.isdisjoint(map(id, equation.outvars)):
            continue
        needed.update(map(id, equation.invars))
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
            # The zeros that dilation inserts between the inputs are not counted, because an efficient program skips them.
            total += equation.outvars[0].aval.size * math.prod(kernel) // kernel[spec[0]] // math.prod(equation.params["lhs_dilation"])
        times = equation.params["length"] if name == "scan" else 1
        inner = [count_macs(jaxpr) for jaxpr in jaxprs_in_params(equation.params)]
        if name == "cond":
            # The branches are alternatives. `lax.platform_dependent` has the usual form last, for all platforms without one of their own.
            inner = inner[-1:] if equation.params.get("branches_platforms") else [max(inner)]
        total += times * sum(inner)
    return total


@functools.lru_cache(16)  # tracing a network takes a second
def network_macs(config: NetworkConfig, height: int = 256, width: int = 256) -> int:
    """Return the multiply-adds of a network for one image of `height` x `width` pixels, in evaluation."""
    model = abstract_network(config)
    model.eval()
    graph, state = nnx.split(model)
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    return count_macs(jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, image).jaxpr)
