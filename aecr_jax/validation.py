"""Checks that public functions share. Each raises a ValueError that names the argument or tensor, its value and what is right."""

from __future__ import annotations

import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

IN_0_TO_1 = " in [0, 1], such as float32: divide 8-bit values by 255"


def as_array(value: Any, name: str) -> Array:
    """Convert an argument (an array of any library, or nested lists of numbers) to a JAX array."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is a {type(value).__name__} and must be an array of numbers") from error


def as_floating(value: Any, name: str, wanted: str = "") -> Array:
    """Convert an argument to a JAX array of floating point numbers, and refuse every other type.

    Integers would go through casts to the input's type, by which weights and results become zero.

    Args:
      value: the argument.
      name: its name.
      wanted: what the error's text says after "must be floating point".
    """
    array = as_array(value, name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        # The value's own type: JAX narrows 64-bit types.
        raise ValueError(f"{name} has type {getattr(value, 'dtype', array.dtype)} and must be floating point{wanted}")
    return array


def as_int(value: Any) -> int | None:
    """Convert an integer of any library to an int; None for everything else, booleans included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_type(array: Any, name: str) -> None:
    """Refuse a tensor that is not floating point."""
    if not jnp.issubdtype(array.dtype, jnp.floating):  # NumPy's own function does not know bfloat16
        raise ValueError(f"tensor {name} has type {array.dtype} and must be floating point")


def check_weight(array: Any, name: str, *, kernel: bool = False) -> None:
    """Refuse a tensor that cannot be a trained one: not floating point, not finite, or (a `kernel`) one value throughout."""
    check_type(array, name)
    array = np.asarray(array)
    if not np.isfinite(array).all():
        raise ValueError(f"tensor {name} has values that are not finite")
    if kernel and array.size > 1 and (array == array.flat[0]).all():
        raise ValueError(f"tensor {name} has the value {array.flat[0]:g} throughout: these are not trained weights")
