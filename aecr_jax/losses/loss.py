"""The interface of a loss, as the training step uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import Array

from aecr_jax.networks.network import Network


class Loss(nnx.Module):
    """Computes what is minimized from the network's prediction.

    A loss is a module and not a function, so that its weights are an argument of the compiled step: as constants, they would slow down
    compilation.
    """

    lagging: bool = False
    """Whether a batch must also have `lagging`: the hazy images as the moving average of the network restores them, without gradient."""

    def predict(self, model: Network, hazy: Array) -> Any:
        """Return what the loss needs of the network for hazy images `[N, H, W, 3]` in [0, 1]; by default the restored images."""
        return model(hazy)

    def __call__(self, prediction: Any, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Return the total, a scalar, and measurements for the log, as a mapping from names to scalars.

        Args:
          prediction: the result of `predict` for the hazy images.
          batch: `hazy` and `clear`, images `[N, H, W, 3]` in [0, 1]; for `HazeLoss` also `transmission` and `airlight`; for
            `RestorationLoss` also the negatives that it names.
        """
        raise NotImplementedError
