"""The loss of the paper (Eq. 4) and its relatives: a pixel distance, perceptual loss, and contrastive regularization."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from aecr_jax.losses.contrastive import LAYER_WEIGHTS, Form, combine_distances, contrastive_distances
from aecr_jax.losses.loss import Loss
from aecr_jax.losses.vgg import VGG16Features, VGGFeatures


class RestorationLoss(Loss):
    """`pixel(restored, clear) + perceptual * features' distance + cr * regularization`, for images `[N, H, W, 3]` in [0, 1].

    The paper's loss has L1 as its pixel distance and no perceptual part. The measurements for the log are the pixel distance by its
    name, `perceptual`, `cr`, and for each feature level i the distances `d_ap_i` to the positive and `d_an_i` to the negative images. With
    regularization, they also include the norms of two gradients with respect to the restored images, which show how much each part drives
    training: `grad_norm_cr`, of `cr * regularization`, and that of the pixel distance, such as `grad_norm_l1`. The latter is
    1 / sqrt(number of values) for L1.

    Args:
      features: the feature extractor for the regularization, or None without it.
      cr: beta, the factor of the regularization.
      positives: number of clear images per restored image (Table 4).
      negatives: number of negatives per restored image (Table 4); 0 gives CR*, which uses positives only.
      form: how the distances become one number, see `combine_distances`.
      weights: the weight of each feature level; by default those of the paper.
      negative_images: the images of the batch that are the negatives: "hazy"; "rehazed", `[N, negatives, H, W, 3]`, the same scenes under
        other haze; or "lagging", `[N, H, W, 3]`, restored by a moving average of the network.
      pixel: the pixel distance: "l1", "l2" (the mean squared error) or "smooth_l1" (half the square below 1, as GridDehazeNet has it).
      perceptual: factor of the perceptual loss, the mean over the feature maps of their mean squared differences (GridDehazeNet).
      perceptual_features: the feature extractor for the perceptual loss, or None without it.
      dtype: type in which the features are computed.

    Raises:
      ValueError: `cr` or `perceptual` is not 0 and its features are missing, or `pixel` or `negative_images` is none of these.
    """

    def __init__(
        self,
        features: VGGFeatures | None,
        *,
        cr: float,
        positives: int = 1,
        negatives: int = 1,
        form: Form = "batch_ratio",
        weights: Sequence[float] = LAYER_WEIGHTS,
        negative_images: str = "hazy",
        pixel: str = "l1",
        perceptual: float = 0.0,
        perceptual_features: VGG16Features | None = None,
        dtype: Any = jnp.float32,
    ):
        if cr and features is None:
            raise ValueError(f"features is None and must be a VGG19Features, because cr (={cr}) is not 0")
        if perceptual and perceptual_features is None:
            raise ValueError(f"perceptual_features is None and must be a VGG16Features, because perceptual (={perceptual}) is not 0")
        if pixel not in DISTANCES:
            raise ValueError(f"pixel (={pixel!r}) must be one of {', '.join(DISTANCES)}")
        if negative_images not in _NEGATIVES:
            raise ValueError(f"negative_images (={negative_images!r}) must be one of {', '.join(_NEGATIVES)}")
        self.features = features if cr else None
        self.perceptual_features = perceptual_features if perceptual else None
        self.cr, self.positives, self.negatives, self.dtype = cr, positives, negatives, jnp.dtype(dtype)
        self.form, self.weights, self.negative_images = form, weights, negative_images
        self.lagging = bool(cr) and negative_images == "lagging"
        self.pixel, self.perceptual = pixel, perceptual

    def __call__(self, prediction: Array, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        clear = batch["clear"]

        def pixel_distance(restored: Array) -> Array:
            # The mean is computed in at least float32, because the sum of millions of bfloat16 differences would be inaccurate.
            return jnp.mean(DISTANCES[self.pixel](restored.astype(jnp.promote_types(restored.dtype, jnp.float32)) - clear))

        total = pixel_distance(prediction)
        measurements = {self.pixel: total}
        if self.perceptual_features is not None:
            distance = perceptual_distance(prediction.astype(self.dtype), clear.astype(self.dtype), self.perceptual_features)
            measurements["perceptual"] = distance
            total = total + self.perceptual * distance
        if self.features is not None:
            weighted, gradient, regularization = _differentiate(lambda restored: self._regularize(restored, batch), prediction)
            measurements |= regularization
            measurements["grad_norm_cr"] = _norm(gradient)
            measurements[f"grad_norm_{self.pixel}"] = _norm(jax.grad(pixel_distance)(lax.stop_gradient(prediction)))
            total = total + weighted
        return total, measurements

    def _regularize(self, restored: Array, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Return the weighted regularization and the measurements."""
        anchor, positive, negative = (images.astype(self.dtype) for images in (restored, batch["clear"], batch[self.negative_images]))
        assert self.features is not None
        d_ap, d_an = contrastive_distances(
            anchor,
            positive,
            negative,
            self.features,
            positives=self.positives,
            negatives=self.negatives,
            per_image=self.form == "image_ratio",
        )
        cr = combine_distances(d_ap, d_an, weights=self.weights, negatives=self.negatives, form=self.form)
        measurements = {"cr": cr}
        for name, distances in (("d_ap", d_ap), ("d_an", d_an)):
            measurements |= {f"{name}_{level}": distance.mean() for level, distance in enumerate(distances, 1)}
        return self.cr * cr, measurements


def _differentiate(function: Callable[[Array], tuple[Array, Any]], x: Array) -> tuple[Array, Array, Any]:
    """Return a function's value, its gradient, and its second result.

    The value has this gradient in `x`, so that whoever differentiates it does not differentiate the function a second time.
    A second derivative of it is 0, because the gradient is a constant.
    """
    (value, rest), gradient = jax.value_and_grad(function, has_aux=True)(lax.stop_gradient(x))
    return _attach_gradient(x, value, gradient), gradient, rest


@jax.custom_vjp
def _attach_gradient(x: Array, value: Array, gradient: Array) -> Array:
    """Return `value`, whose gradient with respect to `x` is `gradient`."""
    return value


def _attach_forward(x: Array, value: Array, gradient: Array) -> tuple[Array, Array]:
    return value, gradient


def _attach_backward(gradient: Array, cotangent: Array) -> tuple[Array, None, None]:
    return (cotangent * gradient).astype(gradient.dtype), None, None


_attach_gradient.defvjp(_attach_forward, _attach_backward)


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))))


def _smooth_l1(difference: Array) -> Array:
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * jnp.square(difference), size - 0.5)


_NEGATIVES = ("hazy", "rehazed", "lagging")
DISTANCES = {"l1": jnp.abs, "l2": jnp.square, "smooth_l1": _smooth_l1}


def perceptual_distance(restored: Array, clear: Array, features: VGG16Features) -> Array:
    """Return the mean over the feature maps of their mean squared differences; the gradient flows only through `restored`."""
    dtype = jnp.promote_types(restored.dtype, jnp.float32)
    pairs = zip(features(restored), features(lax.stop_gradient(clear)))
    return jnp.stack([jnp.mean(jnp.square(a - b), dtype=dtype) for a, b in pairs]).mean()
