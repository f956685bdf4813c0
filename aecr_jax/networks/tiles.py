"""What a network is told about the whole picture when it is called on one tile of it.

Some layers depend on the whole picture: channel attention takes means over it, the airlight is one colour for all of it, and enlargement
with aligned corners depends on its size. These layers call the functions of this module. Inside `looking_at`, the functions return what is
true of the picture to which a tile belongs; elsewhere, the input of the network is the picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


@dataclass
class Tile:
    """One tile of a picture, of which a network that is being traced sees the pixels."""

    sides: tuple[int, int]
    """Rows and columns of the tile, with the network's padding to multiples."""
    place: Array
    """int32 `[2, 4]`, for rows and for columns: the tile's first pixel in the picture, the picture's size with the network's padding, and
    the first and the end (exclusive) of the tile's own part. Each pixel of a picture is in the own part of one of its tiles."""
    given: Sequence[Array]
    """What is known about the picture: its means, `[N, 1, 1, C]` each, in the order of the layers that take them, or its airlight,
    `[N, 3]`. If this is empty, each layer takes the mean over the tile's own part, and the airlight is the tile's."""
    carried: Sequence[Array] = ()
    """The features at the cut before the last of the given means, from where the network goes on; see `cut`."""
    measuring: bool = False
    """Whether the network ends at the first cut whose mean is not given, because only that mean is wanted."""
    measured: list[Array] = field(default_factory=list)
    """The means over the tile's own part, in the order of the layers; filled by the network, as the rest."""
    features: tuple[Array, ...] = ()
    """The features at the cut at which the network ended."""
    held: list[Array] = field(default_factory=list)


class _End(Exception):
    """Raised where a network ends because the rest of it is not wanted."""


_current: ContextVar[Tile | None] = ContextVar("tile", default=None)


@contextlib.contextmanager
def looking_at(tile: Tile) -> Iterator[Tile]:
    """Apply networks to one tile of a picture, within a `with` statement."""
    token = _current.set(tile)
    try:
        with contextlib.suppress(_End):
            yield tile
    finally:
        _current.reset(token)


def sees_whole() -> bool:
    """Return whether the network's input is a whole picture and not a tile."""
    return _current.get() is None


def picture_mean(x: Array) -> Array:
    """Return the means over all pixels of the picture: `[N, H, W, C] -> [N, 1, 1, C]`."""
    tile = _current.get()
    if tile is None:
        return x.mean((1, 2), keepdims=True)
    rows, columns = (_own(tile, axis, x.shape[axis + 1]) for axis in (0, 1))
    inside = (rows[:, None] & columns[None])[None, ..., None]
    total = jnp.where(inside, x, 0).sum((1, 2), keepdims=True, dtype=jnp.promote_types(x.dtype, jnp.float32))
    tile.measured.append(total / inside.sum())
    index = len(tile.measured) - 1
    if index < len(tile.given):
        return tile.given[index].astype(x.dtype)
    if tile.measuring and tile.features:
        raise _End
    return tile.measured[-1].astype(x.dtype)


def cut(*features: Array) -> tuple[Array, ...]:
    """Mark where a network can be divided, just before it takes a mean of the picture, and return the features.

    The mean must be known before the network can go on, and it depends on all tiles. So each tile is passed through the network up to
    here; when the mean is known, it goes on from here, and nothing is computed twice. `features` and the input of `keep` must be all that
    later layers take, except for what is quickly computed again from the tile's pixels.
    """
    tile = _current.get()
    if tile is None:
        return features
    if tile.carried and len(tile.measured) == len(tile.given) - 1:
        tile.held[:] = tile.carried[len(features) :]
        return tuple(tile.carried[: len(features)])
    if len(tile.measured) == len(tile.given):
        tile.features = (*features, *tile.held)
    return features


def keep(x: Array, layers: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Return `x` and `layers(x)`, where the layers may have cuts and `x` is needed after them."""
    tile = _current.get()
    if tile is None:
        return x, layers(x)
    tile.held.append(x)
    y = layers(x)
    return tile.held.pop(), y


def given_airlight() -> Array | None:
    """Return the airlight of the picture, `[N, 3]`, or None if the network must estimate it from its input."""
    tile = _current.get()
    return tile.given[0] if tile is not None and tile.given else None


def places(height: int, width: int) -> tuple[tuple[ArrayLike, ArrayLike], tuple[ArrayLike, ArrayLike]]:
    """Return where features of this height and width lie in those of the whole picture.

    Returns:
      For rows, the index of the first one in the picture, and the number of the picture's; the same for columns.
    """
    tile = _current.get()
    if tile is None:
        return (0, height), (0, width)
    (top, bottom), (left, right) = (tile.place[axis, :2] // (tile.sides[axis] // size) for axis, size in enumerate((height, width)))
    return (top, bottom), (left, right)


def _own(tile: Tile, axis: int, size: Any) -> Array:
    """Return which of `size` rows or columns of features are in the tile's own part."""
    first, end = tile.place[axis, 2:]
    index = jnp.arange(size) * (tile.sides[axis] // size)
    return (index >= first) & (index < end)
