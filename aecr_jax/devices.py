"""Programs for single images, applied to several images at the same time: one on each device of this process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aecr_jax.compilation import bounded_jit

_WHOLE, _SPLIT = PartitionSpec(), PartitionSpec("data")


@functools.cache
def local_mesh() -> Mesh:
    """Return a mesh of the devices of this process along one axis, `data`."""
    return Mesh(np.array(jax.local_devices()), ("data",))


class Shared:
    """A pytree of arrays that all images share, such as parameters; `everywhere` is a copy of it on each device of this process."""

    def __init__(self, tree: Any):
        self.tree = tree

    @functools.cached_property
    def everywhere(self) -> Any:
        return jax.device_put(self.tree, NamedSharding(local_mesh(), _WHOLE))


class ImageProgram:
    """A compiled function of shared arrays and of the arrays of one image, for one image or for as many as there are devices.

    Every device runs the program of a single image, so the result for an image does not depend on the others. A single image runs on the
    default device. If there are fewer images than devices, the last one is repeated, and the repeated results are dropped.

    Args:
      function: takes a pytree and the arrays of an image, and returns an array.

    Raises:
      NotEnoughMemory: when called, if the program does not fit into memory.
    """

    def __init__(self, function: Callable[..., jax.Array]):
        self._one = bounded_jit(function)

        @functools.wraps(function)
        def on_each_device(shared: Any, *stacks: jax.Array) -> jax.Array:
            def one(shared: Any, *stacks: jax.Array) -> jax.Array:
                return function(shared, *(stack[0] for stack in stacks))[None]

            specs = (_WHOLE, *(_SPLIT for _ in stacks))
            return jax.shard_map(one, mesh=local_mesh(), in_specs=specs, out_specs=_SPLIT, check_vma=False)(shared, *stacks)

        self._each = bounded_jit(on_each_device, local_mesh)

    def __call__(self, shared: Shared, *arrays: Sequence[np.ndarray | np.generic]) -> Sequence[np.ndarray]:
        """Return the result for each image; `arrays` are sequences over the images, of one length and of arrays of one shape each."""
        count, devices = len(arrays[0]), jax.local_device_count()
        if count > devices:
            raise ValueError(f"there are {count} images, but only {devices} devices")
        if count == 1:
            return [self._one(shared.tree, *(images[0] for images in arrays))]
        stacks = (np.stack([*images, *[images[-1]] * (devices - count)]) for images in arrays)
        return list(self._each(shared.everywhere, *stacks)[:count])
