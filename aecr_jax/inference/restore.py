"""Application of a model to single images of any size."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from aecr_jax.compilation import bounded_jit
from aecr_jax.devices import ImageProgram, Shared
from aecr_jax.errors import UserError
from aecr_jax.networks.arrays import get_arrays, replace_arrays
from aecr_jax.networks.network import Network
from aecr_jax.networks.tiles import Tile, looking_at
from aecr_jax.validation import as_int, check_weight

# Neighbouring tiles overlap by this many pixels and are blended there.
OVERLAP = 128
LEAST_TILE, USUAL_TILE = 2 * OVERLAP, 1536


def check_tile(tile: int) -> None:
    """Raise UserError unless `tile` is 0 (no tiles) or an integer large enough to overlap."""
    if (side := as_int(tile)) is None or side < 0 or 0 < side < LEAST_TILE:
        raise UserError(f"tile (={tile!r}) must be 0 or an integer of at least {LEAST_TILE}")


def check_strength(strength: float) -> None:
    """Raise UserError unless `strength` is a number from 0 to 1."""
    if not isinstance(strength, numbers.Real) or not 0 <= strength <= 1:
        raise UserError(f"strength (={strength!r}) must be a number from 0 to 1")


def blend(hazy: np.ndarray, restored: np.ndarray, strength: float) -> np.ndarray:
    """Return `hazy + strength * (restored - hazy)`, where a strength of 0 gives exactly `hazy` and 1 exactly `restored`."""
    return restored if strength == 1 else hazy + strength * (restored - hazy)  # the formula gives `restored` only up to rounding


class Restorer:
    """A compiled model that maps a hazy image `[H, W, 3]` in [0, 1] to the restored image of the same shape, clipped to [0, 1].

    The model is compiled for each new image size, or for each new size of a canvas if the network has one (`Network.canvas_size`). The
    programs of the last few sizes are kept (see `bounded_jit`).

    Args:
      model: the network; it is used in evaluation mode.

    Raises:
      UserError: the model's arrays are not finite or, when the restorer is called, the image or its result is not finite.
      NotEnoughMemory: when the restorer is called, the image is too large.
    """

    def __init__(self, model: Network):
        arrays = get_arrays(model)
        self.needs_tiles, self.finds_airlight = model.NEEDS_TILES, model.FINDS_AIRLIGHT
        model = nnx.clone(model)  # leave the mode of the caller's network unchanged
        model.eval()
        self._graph, self._state = nnx.split(model)
        self.set_arrays(arrays)

        def apply(state: nnx.State, hazy: Array) -> Array:
            return nnx.merge(self._graph, state)(hazy[None])[0].clip(0, 1)

        def apply_on_canvas(state: nnx.State, canvas: Array, height: Array, width: Array) -> Array:
            return nnx.merge(self._graph, state).restore_on_canvas(canvas[None], height, width)[0].clip(0, 1)

        def restore_tile(state: nnx.State, hazy: Array, place: Array, given: tuple[Array, ...], carried: tuple[Array, ...]) -> Array:
            with looking_at(Tile(self._padded_sides(hazy), place, given, carried)):
                return apply(state, hazy)

        def measure_tile(
            state: nnx.State, hazy: Array, place: Array, given: tuple[Array, ...], carried: tuple[Array, ...]
        ) -> tuple[list[Array], tuple[Array, ...]]:
            tile = Tile(self._padded_sides(hazy), place, given, carried, measuring=True)
            with looking_at(tile):
                apply(state, hazy)
            return tile.measured[len(tile.given) :], tile.features  # XLA leaves out what they do not depend on

        def airlight_clues(state: nnx.State, hazy: Array) -> Array:
            return nnx.merge(self._graph, state).airlight_clues(hazy[None])[0]

        def airlight(state: nnx.State, hazy: Array, clues: Array) -> Array:
            return nnx.merge(self._graph, state).airlight(hazy[None], clues[None])

        self._apply, self._apply_on_canvas = ImageProgram(apply), ImageProgram(apply_on_canvas)
        self._restore_tile, self._measure_tile = bounded_jit(restore_tile), bounded_jit(measure_tile)
        self._airlight_clues, self._airlight = bounded_jit(airlight_clues), bounded_jit(airlight)
        self._padding, self._multiple = model.MULTIPLE, model.symbolic_sizes().multiple
        self._canvas_size = model.canvas_size

    def set_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Replace the parameters and statistics by others of the same model, named as by `get_arrays`, without compiling again.

        Raises:
          UserError: the new values are not finite.
        """
        for name, array in arrays.items():
            try:
                check_weight(array, name)
            except ValueError as error:
                raise UserError(f"the model cannot be used: {error}") from error
        local = {name: jnp.asarray(np.asarray(array)) for name, array in arrays.items()}  # move them from the mesh to one device
        self._state = replace_arrays(self._state, local)
        self._shared = Shared(self._state)

    def splits(self, height: int, width: int, tile: int) -> bool:
        """Return whether an image of this size is to be restored in tiles of side `tile`; 0 means no tiles."""
        return self.needs_tiles and tile > 0 and height * width > tile * tile

    def __call__(self, hazy: np.ndarray) -> np.ndarray:
        (restored,) = self.restore_each([hazy])
        self.check(hazy, restored)
        return restored

    def restore_each(self, images: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Restore images of one size at the same time, one on each device of this process; the results are not checked.

        Args:
          images: hazy images `[H, W, 3]`, no more than there are devices (`jax.local_device_count`).

        Returns:
          The restored images, `[H, W, 3]`.

        Raises:
          NotEnoughMemory: the images are too large.
        """
        height, width = images[0].shape[:2]
        if not (size := self._canvas_size(height, width)):
            return self._apply(self._shared, images)
        canvases = np.zeros((len(images), *size, 3), images[0].dtype)
        canvases[:, :height, :width] = images
        sides = ([np.int32(side)] * len(images) for side in (height, width))
        return [restored[:height, :width] for restored in self._apply_on_canvas(self._shared, list(canvases), *sides)]

    def restore_tile(
        self, hazy: np.ndarray, place: np.ndarray, given: Sequence[np.ndarray], carried: Sequence[np.ndarray] = ()
    ) -> np.ndarray:
        """Restore one tile `[h, w, 3]` of an image; the other arguments are the fields of `Tile`."""
        restored = self._restore_tile(self._state, hazy, place, tuple(given), tuple(carried))
        self.check(hazy, restored)
        return restored

    def measure_tile(
        self, hazy: np.ndarray, place: np.ndarray, given: Sequence[np.ndarray], carried: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], tuple[np.ndarray, ...]]:
        """Return the means over a tile's own part that follow the given ones, and `Tile.features`.

        There is one mean if the network has cuts, and otherwise all. There is none if all are given.
        """
        return self._measure_tile(self._state, hazy, place, tuple(given), tuple(carried))

    def airlight_clues(self, hazy: np.ndarray) -> np.ndarray:
        """Return the map `[h, w, 1]` of `Network.airlight_clues` for an image or one tile of it."""
        return self._airlight_clues(self._state, hazy)

    def airlight(self, hazy: np.ndarray, clues: np.ndarray) -> np.ndarray:
        """Return the airlight of an image, `[1, 3]`, found from its map of `airlight_clues`."""
        return self._airlight(self._state, hazy, clues)

    def cut(self, height: int, width: int, tile: int, overlap: int) -> tuple[Side, Side]:
        """Return how an image of this size is cut into tiles of at most `tile` pixels per side."""
        return Side.cut(height, tile, overlap, self._multiple), Side.cut(width, tile, overlap, self._multiple)

    def places(self, rows: Side, columns: Side) -> list[list[np.ndarray]]:
        """Return the place of each tile, as in `Tile.place`."""
        across, down = (side.places(self._padding, self._padded(side.size)) for side in (columns, rows))
        return [[np.array([row, column], np.int32) for column in across] for row in down]

    def _padded_sides(self, hazy: Array) -> tuple[int, int]:
        return self._padded(hazy.shape[0]), self._padded(hazy.shape[1])

    def _padded(self, size: int) -> int:
        return -(-size // self._padding) * self._padding

    def check(self, hazy: np.ndarray, restored: np.ndarray) -> None:
        """Raise UserError if an image or the restored image is not finite."""
        if not np.isfinite(restored).all():
            whose = "restored image" if np.isfinite(hazy).all() else "hazy image"
            raise UserError(f"the {whose} has values that are not finite")


class Side(NamedTuple):
    """How a side of an image is cut into overlapping tiles of equal length."""

    size: int
    length: int
    starts: tuple[int, ...]

    @classmethod
    def cut(cls, size: int, tile: int, overlap: int, multiple: int = 1) -> Side:
        """Cut `size` pixels into as few tiles as possible, of at most `tile` pixels, which overlap by at least `overlap`.

        The tiles begin at multiples of a divisor of `multiple`, or of `multiple` itself if that is small. A network that halves the
        resolution then sees the same pixels together as in the whole image.
        """
        if size <= tile:
            return cls(size, size, (0,))
        unit = math.gcd(multiple, max(1, overlap // 2))
        rest = -size % unit
        total, most, shared = -(-size // unit), tile // unit, -(-(overlap + rest) // unit)
        count = -(-(total - shared) // (most - shared))
        length = -(-(total + (count - 1) * shared) // count)
        return cls(size, unit * length - rest, tuple(unit * (i * (total - length) // (count - 1)) for i in range(count)))

    def part(self, index: int) -> slice:
        """Return the pixels of a tile."""
        return slice(self.starts[index], self.starts[index] + self.length)

    def weights(self, overlap: int, margin: int = 0) -> list[np.ndarray]:
        """Return each tile's weights, which add up to 1 at each pixel; `overlap` and `margin` are those of `blend_tiles`."""
        ramp, total = _ramp(self.length, overlap, margin), np.zeros(self.size)
        tiles = [self.part(index) for index in range(len(self.starts))]
        for tile in tiles:
            total[tile] += ramp
        return [(ramp / total[tile]).astype(np.float32) for tile in tiles]

    def places(self, multiple: int, padded: int) -> list[tuple[int, int, int, int]]:
        """Return what `Tile.place` contains for each tile: its start, the padded size, and its own part, which ends amid the overlaps.

        Args:
          multiple: own parts begin and end at multiples of this number in the image; features have at least one row for so many pixels.
          padded: the image's size with the network's padding.
        """
        middles = (start + before + self.length for before, start in zip(self.starts, self.starts[1:]))  # twice the middle
        bounds = [0, *(middle // (2 * multiple) * multiple for middle in middles), padded]
        return [(start, padded, first - start, end - start) for start, first, end in zip(self.starts, bounds, bounds[1:])]


Restore = Callable[[int, int, np.ndarray], np.ndarray]


def restore_tiled(restorer: Restorer, hazy: np.ndarray, tile: int, overlap: int) -> np.ndarray:
    """Restore a large image in overlapping tiles of one size, which are blended linearly where they overlap.

    What networks take from the whole image, the means of channel attention or the airlight, is measured on all tiles first, so the result
    is nearly that of restoring the whole image. The memory grows with the tile; with the image grow the image itself, its result, and the
    features that a network with channel attention keeps of each tile, for AECR-Net those of two layers at a quarter of the resolution.

    Args:
      restorer: the model.
      hazy: `[H, W, 3]` in [0, 1].
      tile: largest side length of a tile, at least twice `overlap`; if a side of the image is shorter, so is that side of the tiles.
      overlap: minimum number of pixels by which neighbouring tiles overlap.

    Returns:
      The restored image, `[H, W, 3]`.
    """
    height, width = hazy.shape[:2]
    rows, columns = restorer.cut(height, width, tile, overlap)
    places = restorer.places(rows, columns)
    carried: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}
    # Zeros that layers see beyond the ends of a tile change the result there, so tiles are blended in the middle of the overlap only.
    margin = 3 * overlap // 8
    if restorer.finds_airlight:
        clues = blend_tiles(lambda i, j, pixels: restorer.airlight_clues(pixels), hazy, rows, columns, overlap, margin=margin, channels=1)
        given = [restorer.airlight(hazy, clues)]
    else:
        given = _measure_means(restorer, hazy, rows, columns, places, carried)

    def restore(i: int, j: int, pixels: np.ndarray) -> np.ndarray:
        return restorer.restore_tile(pixels, places[i][j], given, carried.pop((i, j), ()))

    return blend_tiles(restore, hazy, rows, columns, overlap, margin=margin)


def blend_tiles(
    restore: Restore, hazy: np.ndarray, rows: Side, columns: Side, overlap: int, *, margin: int = 0, channels: int = 3
) -> np.ndarray:
    """Apply `restore` to the tiles of an image and blend the results linearly where they overlap.

    Args:
      restore: takes the indices of a tile's row and column and its pixels `[h, w, 3]`, and returns `[h, w, channels]`.
      hazy: the image, `[H, W, 3]`.
      rows, columns: how its sides are cut.
      overlap: minimum number of pixels by which neighbouring tiles overlap.
      margin: number of pixels at the ends of tiles that do not count where there is another tile, less than half of `overlap`.
      channels: of the result.

    Returns:
      `[H, W, channels]`, float32.
    """
    result = np.zeros((*hazy.shape[:2], channels), np.float32)
    for i, down in enumerate(rows.weights(overlap, margin)):
        for j, across in enumerate(columns.weights(overlap, margin)):
            here = rows.part(i), columns.part(j)
            result[here] += np.outer(down, across)[..., None] * restore(i, j, hazy[here])
    return result


def _measure_means(
    restorer: Restorer,
    hazy: np.ndarray,
    rows: Side,
    columns: Side,
    places: list[list[np.ndarray]],
    carried: dict[tuple[int, int], tuple[np.ndarray, ...]],
) -> list[np.ndarray]:
    """Return the means over the image for each layer that takes means; `carried` receives the features of each tile at the last cut.

    A mean depends on those of earlier layers. In a network with cuts, all tiles are passed from one cut to the next, so means are exact. In
    a network without cuts, all means are measured at once, while the layers of a tile use those of its own part.
    """
    means: list[np.ndarray] = []
    while True:
        totals: list[np.ndarray] = []
        for i, j in itertools.product(range(len(rows.starts)), range(len(columns.starts))):
            pixels, place = hazy[rows.part(i), columns.part(j)], places[i][j]
            measured, features = restorer.measure_tile(pixels, place, means, carried.get((i, j), ()))
            if not measured:
                return means
            carried[i, j] = features
            area = np.diff(place[:, 2:]).prod() / place[:, 1].prod(dtype=np.float64)
            parts = [area * mean for mean in measured]
            totals = [total + part for total, part in zip(totals, parts)] if totals else parts
        means += [total.astype(np.float32) for total in totals]


def _ramp(tile: int, overlap: int, margin: int) -> np.ndarray:
    """Return weights that decrease towards both ends without reaching 0: at the border of the image, there is no other tile."""
    distance = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 1
    return ((distance - margin) / (overlap - 2 * margin)).clip(1e-6, 1)
