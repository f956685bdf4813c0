"""The loss of the paper (Eq. 4) and its relatives: a pixel distance, perceptual loss, and contrastive regularization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from aecr_jax.losses.contrastive import LAYER_WEIGHTS, combine_distances, contrastive_distances
from aecr_jax.losses.loss import Loss
from aecr_jax.losses.vgg import VGG16Features, VGG19Features


class RestorationLoss(Loss):
    """`pixel(restored, clear) + perceptual * features' distance + cr * regularization`, for images `[N, H, W, 3]` in [0, 1].

    The paper's loss has L1 as its pixel distance and no perceptual part. The measurements for the log are the pixel distance by its
    name, `perceptual`, `cr`, and for each feature level i the distances `d_ap_i` to the clear and `d_an_i` to the hazy image.

    Args:
      features: the feature extractor for the regularization, or None without it.
      cr: beta, the factor of the regularization.
      positives: number of clear images per restored image (Table 4).
      negatives: number of hazy images per restored image (Table 4); 0 gives CR*, which uses positives only.
      pixel: the pixel distance: "l1", "l2" (the mean squared error) or "smooth_l1" (half the square below 1, as GridDehazeNet has it).
      perceptual: factor of the perceptual loss, the mean over the feature maps of their mean squared differences (GridDehazeNet).
      perceptual_features: the feature extractor for the perceptual loss, or None without it.
      dtype: type in which the features are computed.

    Raises:
      ValueError: `cr` or `perceptual` is not 0 and its features are missing.
    """

    def __init__(
        self,
        features: VGG19Features | None,
        *,
        cr: float,
        positives: int = 1,
        negatives: int = 1,
        pixel: str = "l1",
        perceptual: float = 0.0,
        perceptual_features: VGG16Features | None = None,
        dtype: Any = jnp.float32,
    ):
        if cr and features is None:
            raise ValueError(f"features is None and must be a VGG19Features, because cr (={cr}) is not 0")
        if perceptual and perceptual_features is None:
            raise ValueError(f"perceptual_features is None and must be a VGG16Features, because perceptual (={perceptual}) is not 0")
        if pixel not in _PIXEL:
            raise ValueError(f"pixel (={pixel!r}) must be one of {', '.join(_PIXEL)}")
        self.features = features if cr else None
        self.perceptual_features = perceptual_features if perceptual else None
        self.cr, self.positives, self.negatives, self.dtype = cr, positives, negatives, jnp.dtype(dtype)
        self.pixel, self.perceptual = pixel, perceptual

    def __call__(self, prediction: Array, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        clear, hazy = batch["clear"], batch["hazy"]
        # The mean is computed in at least float32, because the sum of millions of bfloat16 differences would be inaccurate.
        total = jnp.mean(_PIXEL[self.pixel](prediction.astype(jnp.promote_types(prediction.dtype, jnp.float32)) - clear))
        measurements = {self.pixel: total}
        anchor, positive, negative = (images.astype(self.dtype) for images in (prediction, clear, hazy))
        if self.perceptual_features is not None:
            distance = perceptual_distance(anchor, positive, self.perceptual_features)
            measurements["perceptual"] = distance
            total = total + self.perceptual * distance
        if self.features is not None:
            d_ap, d_an = contrastive_distances(
                anchor, positive, negative, self.features, positives=self.positives, negatives=self.negatives
            )
            cr = combine_distances(d_ap, d_an, weights=LAYER_WEIGHTS, negatives=self.negatives)
            measurements["cr"] = cr
            for name, distances in (("d_ap", d_ap), ("d_an", d_an)):
                measurements |= {f"{name}_{level + 1}": distances[level] for level in range(distances.size)}
            total = total + self.cr * cr
        return total, measurements


def _smooth_l1(difference: Array) -> Array:
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * jnp.square(difference), size - 0.5)


_PIXEL = {"l1": jnp.abs, "l2": jnp.square, "smooth_l1": _smooth_l1}


def perceptual_distance(restored: Array, clear: Array, features: VGG16Features) -> Array:
    """Return the mean over the feature maps of their mean squared differences; the gradient flows only through `restored`."""
    dtype = jnp.promote_types(restored.dtype, jnp.float32)
    pairs = zip(features(restored), features(lax.stop_gradient(clear)))
    return jnp.stack([jnp.mean(jnp.square(a - b), dtype=dtype) for a, b in pairs]).mean()
