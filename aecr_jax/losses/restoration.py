"""The loss of the paper (Eq. 4): L1 between the restored and the clear image, plus contrastive regularization."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from aecr_jax.losses.contrastive import LAYER_WEIGHTS, combine_distances, contrastive_distances
from aecr_jax.losses.loss import Loss
from aecr_jax.losses.vgg import VGG19Features


class RestorationLoss(Loss):
    """`L1(restored, clear) + cr * regularization`, as a function of images `[N, H, W, 3]` in [0, 1].

    The call `loss(restored, clear, hazy)` returns the total and measurements for the log: `l1`, `cr`, and for each feature level i the
    distances `d_ap_i` to the clear and `d_an_i` to the hazy image.

    Args:
      features: the feature extractor for the regularization, or None to use only L1.
      cr: beta, the factor of the regularization.
      positives: number of clear images per restored image (Table 4).
      negatives: number of hazy images per restored image (Table 4); 0 gives CR*, which uses positives only.
      dtype: type in which the features are computed.

    Raises:
      ValueError: `cr` is not 0 and `features` is missing.
    """

    def __init__(self, features: VGG19Features | None, *, cr: float, positives: int = 1, negatives: int = 1, dtype: Any = jnp.float32):
        if cr and features is None:
            raise ValueError(f"features is None and must be a VGG19Features, because cr (={cr}) is not 0")
        self.features = features if cr else None
        self.cr, self.positives, self.negatives, self.dtype = cr, positives, negatives, jnp.dtype(dtype)

    def __call__(self, prediction: Array, clear: Array, hazy: Array) -> tuple[Array, dict[str, Array]]:
        # The mean is computed in at least float32, because the sum of millions of bfloat16 differences would be inaccurate.
        l1 = jnp.mean(jnp.abs(prediction.astype(jnp.promote_types(prediction.dtype, jnp.float32)) - clear))
        measurements = {"l1": l1}
        if self.features is None:
            return l1, measurements
        anchor, positive, negative = (images.astype(self.dtype) for images in (prediction, clear, hazy))
        d_ap, d_an = contrastive_distances(anchor, positive, negative, self.features, positives=self.positives, negatives=self.negatives)
        cr = combine_distances(d_ap, d_an, weights=LAYER_WEIGHTS, negatives=self.negatives)
        measurements["cr"] = cr
        for name, distances in (("d_ap", d_ap), ("d_an", d_an)):
            measurements |= {f"{name}_{level + 1}": distances[level] for level in range(distances.size)}
        return l1 + self.cr * cr, measurements
