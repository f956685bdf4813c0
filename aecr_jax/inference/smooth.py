"""Restoration of consecutive frames, with the estimated haze averaged over time.

Noise and small movements change the estimate of each frame a little, so that a video whose frames are restored one by one flickers.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from flax import nnx
from jax import Array

from aecr_jax.compilation import bounded_jit
from aecr_jax.inference.restore import Restorer
from aecr_jax.networks.network import Network

# Two frames belong to different scenes if their histograms differ by more than this; see `histogram_distance`. Drawn scenes with the same
# haze differ by 0.17 or more. A lower limit is harmless: it makes the average begin anew when the camera moves fast.
CUT = 0.15
_CELLS, _LEVELS = 64, 16


class SmoothRestorer(Restorer):
    """A compiled model for the frames of a video, which it restores with exponential averages of the maps of `Network.estimate_haze`.

    The average begins anew at a scene cut: where the histograms of consecutive frames differ by more than `CUT`.

    Args:
      model: a network that `is_suited`; it is used in evaluation mode.
      length: time constant of the average in seconds, greater than 0. A frame that is `length` older has 1 / e of the weight.

    Raises:
      UserError: as for `Restorer`.
      NotEnoughMemory: as for `Restorer`.
    """

    def __init__(self, model: Network, length: float):
        super().__init__(model)
        self._length = length
        self._maps: tuple[np.ndarray, ...] = ()
        self._histogram = np.zeros(0)

        def estimate(state: nnx.State, hazy: Array) -> tuple[Array, Array]:
            return nnx.merge(self._graph, state).estimate_haze(hazy[None])

        def remove(state: nnx.State, hazy: Array, maps: tuple[Array, Array]) -> Array:
            return nnx.merge(self._graph, state).remove_haze(hazy[None], *maps)[0].clip(0, 1)

        self._estimate, self._remove = bounded_jit(estimate), bounded_jit(remove)

    @staticmethod
    def is_suited(model: Network) -> bool:
        """Return whether a network estimates the haze of whole images.

        Networks that need tiles estimate it for each pixel. Averages of such maps would show the outlines of objects that have moved on.
        """
        return model.estimates_haze(model.config) and not model.NEEDS_TILES

    def restore_next(self, hazy: np.ndarray, seconds: float) -> np.ndarray:
        """Restore the next frame of the video.

        Args:
          hazy: `[H, W, 3]` in [0, 1], of the same size as the frames before.
          seconds: the time since the frame before; ignored for the first frame.

        Returns:
          The restored frame, `[H, W, 3]` in [0, 1].
        """
        maps = self._estimate(self._state, hazy)
        histogram = colour_histogram(hazy)
        if self._maps and histogram_distance(histogram, self._histogram) <= CUT:
            kept = math.exp(-seconds / self._length)
            maps = jax.tree.map(lambda new, old: new + np.float32(kept) * (old - new), maps, self._maps)
        self._maps, self._histogram = maps, histogram
        restored = self._remove(self._state, hazy, maps)
        self.check(hazy, restored)
        return restored


def colour_histogram(image: np.ndarray) -> np.ndarray:
    """Return the histogram of each colour channel, `[3, 16]` with rows that sum to 1.

    Cells of the image, about 64 along its shorter side, are averaged first, which removes most of the noise. A value is divided between
    the two nearest levels, so that a slight change of brightness changes the histogram slightly, even that of a frame full of fog.

    Args:
      image: `[H, W, 3]` in [0, 1].
    """
    side = max(1, min(image.shape[:2]) // _CELLS)
    h, w = (size // side for size in image.shape[:2])
    cells = image[: h * side, : w * side].reshape(h, side, w, side, 3).mean((1, 3)).reshape(-1, 3)
    position = cells.clip(0, 1) * (_LEVELS - 1)
    low = np.minimum(position.astype(int), _LEVELS - 2)
    share = position - low
    rows = [
        np.bincount(i, 1 - s, minlength=_LEVELS) + np.bincount(i + 1, s, minlength=_LEVELS) for i, s in zip(low.T, share.T, strict=True)
    ]
    return np.stack(rows) / len(cells)


def histogram_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of the pixels that have other colours, averaged over the channels: 0 for equal histograms, 1 for disjoint ones."""
    return float(np.abs(a - b).sum(-1).mean() / 2)
