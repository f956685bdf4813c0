"""Gradients that keep little in memory, and are fast, in programs for CPUs.

XLA's CPU backend orders the operations of a program with no regard to where a gradient begins. What a gradient makes of the input of a
layer alone, such as the input with its axes in another order, it computes next to the layer and keeps until the gradient needs it. For
the same reason it undoes `jax.checkpoint`. Where such an operation depends on the gradient that arrives, it has to come late. On GPUs and
TPUs, where none of this was measured, the functions of this module change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def delay(arrays: Any, cotangent: Any) -> Any:
    """Return `arrays`; in a program for CPUs, they can only be used when the first array of `cotangent` is known.

    Args:
      arrays: a tree of arrays.
      cotangent: a tree of floating-point arrays. If its first one is empty, nothing is delayed.
    """
    first = jax.tree.leaves(cotangent)[0]
    return lax.platform_dependent(arrays, first, cpu=delay_on_cpu, default=lambda arrays, _: arrays)


def delay_on_cpu(arrays: Any, known: Array) -> Any:
    """Do what `delay` does in a program for CPUs."""
    if not known.size:
        return arrays
    # Not of one element, which would be read where it is needed, so that all of `known` would be kept until then.
    never = known[..., 0, 0].max() > jnp.inf if known.ndim > 1 else known.max() > jnp.inf  # but XLA does not know that
    return jax.tree.map(lambda x: jnp.where(never, jnp.zeros((), x.dtype), x), arrays)


def with_cpu_gradient(function: Callable[[Array], Array], gradient: Callable[[Array, Array], Array], x: Array) -> Array:
    """Return `function(x)`, whose gradient is `gradient(x, cotangent)` in a program for CPUs, and the usual one elsewhere.

    For the gradient, only `x` is kept.
    """

    def usual(x: Array, cotangent: Array) -> Array:
        return jax.vjp(function, x)[1](cotangent)[0]

    def backward(x: Array, cotangent: Array) -> tuple[Array]:
        return (lax.platform_dependent(x, cotangent, cpu=gradient, default=usual),)

    applied = jax.custom_vjp(function)
    applied.defvjp(lambda x: (function(x), x), backward)
    return applied(x)
