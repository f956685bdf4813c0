"""The loss of networks that estimate the transmission, such as DehazeNet, against the transmission of the pair itself."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from aecr_jax.errors import UserError
from aecr_jax.losses.loss import Loss
from aecr_jax.networks.network import Network


class TransmissionLoss(Loss):
    """The mean squared error of the estimated transmission, for haze with one transmission per image and airlight 1.

    The data `constant:FOLDER` give such haze. The target follows from each pair, see `solve_transmission`. The measurement for the log is
    `mse`.

    Args:
      network: the class of the network that is trained.

    Raises:
      UserError: the network has no method `transmission`.
    """

    def __init__(self, network: type[Network]):
        if not hasattr(network, "transmission"):
            raise UserError(f"model.name (={network.Config.NAME}) must be a network that estimates the transmission, such as dehaze_net")

    def predict(self, model: Network, hazy: Array) -> Array:
        """Return the transmission that the network estimates, `[N, H, W, 1]`."""
        return model.transmission(hazy)  # type: ignore[attr-defined]  # checked by the constructor

    def __call__(self, prediction: Array, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        target = solve_transmission(batch["clear"], batch["hazy"])[:, None, None, None]
        mse = jnp.mean(jnp.square(prediction.astype(target.dtype) - target))
        return mse, {"mse": mse}


def solve_transmission(clear: Array, hazy: Array) -> Array:
    """Return the t of each image for which `t clear + (1 - t)` is closest to `hazy` in the least-squares sense, `[N]`.

    It is 1 for an image that is white everywhere, where every t gives the same.

    Args:
      clear: `[N, H, W, 3]` in [0, 1].
      hazy: the same images with haze, of the same shape.
    """
    dtype = jnp.promote_types(clear.dtype, jnp.float32)
    clear, hazy = 1 - clear.astype(dtype), 1 - hazy.astype(dtype)  # now hazy = t clear
    product, square = jnp.sum(hazy * clear, (1, 2, 3)), jnp.sum(clear * clear, (1, 2, 3))
    return jnp.where(square > 0, product / jnp.where(square > 0, square, 1), 1)
