"""A mesh of devices with one `data` axis, over which the state is replicated and batches are split."""

from __future__ import annotations

from typing import TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aecr_jax.errors import UserError

Tree = TypeVar("Tree")


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Return a mesh of all devices (or those given) along one axis, `data`."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Copy a pytree of arrays to every device, as the step expects (with another placement it would be compiled twice)."""
    # Copy through the host: an array on one device cannot be copied to the devices of other processes.
    return jax.device_put(jax.tree.map(np.asarray, tree), NamedSharding(mesh, PartitionSpec()), may_alias=False)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Put this process's part of a batch onto its devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def check_batch(batch: int, accumulate: int, mesh: Mesh) -> None:
    """Raise UserError if `optim.batch` is not divisible by the number of devices times `optim.accumulate`."""
    parts = mesh.size * accumulate
    if batch % parts:
        fitting = sorted({max(batch // parts, 1) * parts, (batch // parts + 1) * parts})
        by = f"{mesh.size} devices" + (f" times optim.accumulate (={accumulate})" if accumulate > 1 else "")
        raise UserError(f"optim.batch (={batch}) must be divisible by {parts} ({by}), such as {' or '.join(map(str, fitting))}")
