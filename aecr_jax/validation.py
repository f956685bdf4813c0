"""Checks that public functions share. Each error is a ValueError that names the argument or tensor and describes the problem."""

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
    """Convert an argument to a JAX array of floating point numbers, and reject every other type.

    With an integer input, later casts to the input's type would turn weights and results into zeros.

    Args:
      value: the argument.
      name: its name.
      wanted: text that follows "must be floating point" in the error message.
    """
    array = as_array(value, name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        # The message gives the value's own type, because JAX converts 64-bit types to 32 bits.
        raise ValueError(f"{name} has type {getattr(value, 'dtype', array.dtype)} and must be floating point{wanted}")
    return array


def as_int(value: Any) -> int | None:
    """Convert an integer of any library to an int, and return None for everything else, including booleans."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_type(array: Any, name: str) -> None:
    """Reject a tensor that is not floating point."""
    if not jnp.issubdtype(array.dtype, jnp.floating):  # np.issubdtype does not know bfloat16
        raise ValueError(f"tensor {name} has type {array.dtype} and must be floating point")


def check_weight(array: Any, name: str, *, kernel: bool = False) -> None:
    """Reject a tensor that cannot be a trained weight: not floating point, not finite or, for a `kernel`, with all values equal."""
    check_type(array, name)
    array = np.asarray(array)
    if not np.isfinite(array).all():
        raise ValueError(f"tensor {name} has values that are not finite")
    if kernel and array.size > 1 and (array == array.flat[0]).all():
        raise ValueError(f"tensor {name} has the value {array.flat[0]:g} throughout: these are not trained weights")
