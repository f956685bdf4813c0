"""Functions that get, replace and count the arrays of a module by dotted name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import Array


def get_arrays(module: nnx.Module, kind: Any = nnx.Variable) -> dict[str, Array]:
    """Return the arrays of a module, `{"down1.kernel": ...}`; `kind` restricts them to `nnx.Param` or `nnx.BatchStat`."""
    flat = nnx.to_flat_state(nnx.state(module, kind))
    return {".".join(map(str, path)): variable.get_value() for path, variable in zip(flat.paths, flat.leaves)}


def replace_arrays(state: nnx.State, arrays: Mapping[str, Any]) -> nnx.State:
    """Return a copy of `state` (which may be abstract) with the values `arrays`, named as in `get_arrays`.

    Raises:
      ValueError: a name is missing or unknown, or a shape differs.
    """
    flat = nnx.to_flat_state(state)
    variables = {".".join(map(str, path)): variable for path, variable in zip(flat.paths, flat.leaves)}
    for name, variable in variables.items():
        if name not in arrays:
            raise ValueError(f"tensor {name} of shape {variable.shape} is missing")
        if arrays[name].shape != variable.shape:
            raise ValueError(f"tensor {name} has shape {arrays[name].shape} and must have {variable.shape}")
    if unknown := sorted(set(arrays) - set(variables)):
        raise ValueError(f"unknown tensor {unknown[0]}; the model has {', '.join(sorted(variables))}")
    leaves = [variable.replace(arrays[name]) for name, variable in variables.items()]
    return nnx.from_flat_state(zip(flat.paths, leaves))


def count_parameters(module: nnx.Module) -> int:
    """Return the number of learned scalars, without running statistics."""
    return sum(array.size for array in get_arrays(module, nnx.Param).values())
