"""Contrastive regularization (Section 3.2 of the paper): pulls the restored image towards the clear one and away from the hazy one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from aecr_jax.validation import IN_0_TO_1, as_array, as_floating, as_int

Features = Callable[[Array], Sequence[Array]]

# w_i of Eq. 4, for relu1_1, relu2_1, relu3_1, relu4_1, relu5_1.
LAYER_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
# Added to each denominator, as in the official code.
EPSILON = 1e-7


def contrastive_distances(
    anchor: ArrayLike, positive: ArrayLike, negative: ArrayLike, features: Features, *, positives: int = 1, negatives: int = 1
) -> tuple[Array, Array]:
    """Return the mean absolute feature distances of `anchor` to positives and negatives, per feature level.

    The first sample of each image is its own; the r-th additional sample is that of the r-th next image in the batch, cyclically.
    (Table 4 of the paper uses other images of the batch; in a shuffled batch, these neighbours are random.) A distance is the mean
    over the whole batch, as in the official code, so the loss later uses the ratio of the batch's distances and not the mean of
    per-image ratios. Gradients flow only through `anchor`.

    Args:
      anchor: restored images `[N, H, W, 3]` in [0, 1], floating point, at least one.
      positive: clear images of the same shape.
      negative: hazy images of the same shape.
      features: function that maps images to a sequence of feature maps, such as `VGG19Features`.
      positives: number of clear images per anchor, 1 to N.
      negatives: number of hazy images per anchor, 0 to N; if it is 0, the second result is zeros.

    Returns:
      (d_ap, d_an), each with one number per feature level, `[levels]`, in at least float32.

    Raises:
      ValueError: shapes differ, there are no images, images are not floating point, `positives` or `negatives` is not an integer in
        its range, or `features` is not a function that returns a sequence of feature maps.
    """
    anchor, positive, negative = (
        as_floating(images, name, IN_0_TO_1) for name, images in (("anchor", anchor), ("positive", positive), ("negative", negative))
    )
    if anchor.ndim != 4:
        raise ValueError(f"anchor has shape {anchor.shape} and must be [N, H, W, 3]")
    if not anchor.size:
        raise ValueError(f"anchor has shape {anchor.shape}: a mean distance takes at least one image")
    if not callable(features):
        raise ValueError(f"features (={features!r}) must be a function of images that returns feature maps, such as VGG19Features")
    for name, images in (("positive", positive), ("negative", negative)):
        if images.shape != anchor.shape:
            raise ValueError(f"{name} has shape {images.shape} and must have anchor's, {anchor.shape}")
    for name, count, least in (("positives", positives, 1), ("negatives", negatives, 0)):
        if as_int(count) is None:
            raise ValueError(f"{name} (={count!r}) must be an integer, {least} to the batch size ({anchor.shape[0]})")
        if not least <= count <= anchor.shape[0]:
            raise ValueError(f"{name} (={count}) must be {least} to the batch size ({anchor.shape[0]})")
    of_anchor = features(anchor)
    if hasattr(of_anchor, "shape"):  # the rows of a single array would be mistaken for levels
        raise ValueError("features must give a sequence of feature maps, not one array: return [x] for a single level")
    if not of_anchor:
        raise ValueError("features must give at least one feature map")

    def distances(images: Array, count: int) -> Array:
        of_images = features(lax.stop_gradient(images))
        if len(of_images) != len(of_anchor):
            raise ValueError("features must give the same number of levels for every image")
        return jnp.stack([_mean_distance(a, lax.stop_gradient(b), count) for a, b in zip(of_anchor, of_images)])

    to_positive = distances(positive, positives)
    to_negative = distances(negative, negatives) if negatives else jnp.zeros_like(to_positive)
    return to_positive, to_negative


def contrastive_regularization(
    anchor: ArrayLike,
    positive: ArrayLike,
    negative: ArrayLike,
    features: Features,
    *,
    weights: Sequence[float] | Array = LAYER_WEIGHTS,
    positives: int = 1,
    negatives: int = 1,
) -> Array:
    """Return the regularization term of Eq. 4, `sum_i w_i d_ap_i / (d_an_i + 1e-7)`; without negatives (CR*), `sum_i w_i d_ap_i`.

    Arguments and errors are as in `contrastive_distances`. In addition, `weights` has one number for each feature level, in order;
    it may have more entries than `features` returns levels.

    Returns:
      A scalar.
    """
    to_positive, to_negative = contrastive_distances(anchor, positive, negative, features, positives=positives, negatives=negatives)
    return combine_distances(to_positive, to_negative, weights=weights, negatives=negatives)


def combine_distances(to_positive: Array, to_negative: Array, *, weights: Sequence[float] | Array, negatives: int) -> Array:
    """Compute Eq. 4 from the distances per level: the sum of weighted ratios, or of weighted positive distances if `negatives` is 0."""
    weights = as_array(weights, "weights")
    if weights.ndim != 1:
        raise ValueError(f"weights has shape {weights.shape} and must be one number for each level, such as {LAYER_WEIGHTS}")
    if weights.size < to_positive.size:
        raise ValueError(f"weights has {weights.size} entries and must have one for each of {to_positive.size} levels")
    terms = to_positive / (to_negative + EPSILON) if negatives else to_positive
    return jnp.sum(weights[: to_positive.size].astype(terms.dtype) * terms)


def _mean_distance(a: Array, b: Array, count: int) -> Array:
    # Millions of bfloat16 differences must be summed in float32.
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    shifts = [b if shift == 0 else jnp.roll(b, -shift, 0) for shift in range(count)]
    return sum((jnp.mean(jnp.abs(a - shifted), dtype=dtype) for shifted in shifts), jnp.zeros((), dtype)) / count
