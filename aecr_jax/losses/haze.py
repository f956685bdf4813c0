"""Supervision of the haze itself: haze that is made on the fly has a known transmission and airlight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
from jax import Array

from aecr_jax.losses.loss import Loss
from aecr_jax.losses.restoration import DISTANCES
from aecr_jax.networks.network import Network
from aecr_jax.ops.resize import average_cells


class HazeLoss(Loss):
    """`restoration + weight * (mean d(t (K - K')) + mean d(t (B - B')))`, where K and B are the network's gain and offset of the haze.

    The true K' is 1 / t - 1 and the true B' is K' A; see `Network.restore_with_haze`. Both are averaged over the blocks of pixels that
    one value of a coarse map stands for. An error of K changes the restored image by (K - K') (x - A) = (K - K') t (J - A), so the factor t
    weights errors by what they do to it; without it, thick haze would outweigh all other. The measurements for the log are those of
    `restoration`, and the two means as `gain` and `offset`.

    Where the scene has the colour of the haze, as in a white sky, the image does not show how dense the haze is. The best estimate is
    then the median of what is possible for d(x) = |x|, and the mean for d(x) = x^2. The median jumps from one cell to the next, between
    clear and dense, which shows as spots in the sky; the mean is smooth.

    Args:
      restoration: the loss of the restored images.
      weight: factor of the distances.
      cell: side of those blocks in pixels, `Network.haze_cell` for the size of the images.
      distance: d, "l1" for |x| or "l2" for x^2.
    """

    def __init__(self, restoration: Loss, weight: float, cell: int, distance: Literal["l1", "l2"] = "l1"):
        self.restoration, self.weight, self.cell, self.lagging = restoration, weight, cell, restoration.lagging
        self.distance = DISTANCES[distance]

    def predict(self, model: Network, hazy: Array) -> tuple[Array, Array, Array]:
        """Return the restored images, the gain and the offset.

        Raises:
          ValueError: the network does not estimate the haze.
        """
        return model.restore_with_haze(hazy)

    def __call__(self, prediction: tuple[Array, Array, Array], batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        restored, gain, offset = prediction
        total, measurements = self.restoration(restored, batch)
        full_gain = 1 / batch["transmission"] - 1
        true_gain, true_offset = (average_blocks(x, self.cell, *gain.shape[1:3]) for x in (full_gain, full_gain * batch["airlight"]))
        transmission = 1 / (1 + true_gain)
        pairs = {"gain": (gain, true_gain), "offset": (offset, true_offset)}
        distances = {name: jnp.mean(self.distance(transmission * (estimate - truth))) for name, (estimate, truth) in pairs.items()}
        return total + self.weight * (distances["gain"] + distances["offset"]), {**measurements, **distances}


def average_blocks(x: Array, side: int, rows: int, columns: int) -> Array:
    """Reduce maps `[N, H, W, C]` to `[N, rows, columns, C]` by the means of blocks of `side` x `side` pixels.

    As networks pad images, so are the maps padded by reflection at the bottom and right.
    """
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (0, side * rows - h), (0, side * columns - w), (0, 0)), mode="reflect")
    return average_cells(x, side)
