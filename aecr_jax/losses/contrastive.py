"""Contrastive regularization (Section 3.2 of the paper): pulls the restored image towards the clear one and away from negatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from aecr_jax.validation import IN_0_TO_1, as_array, as_floating, as_int

Features = Callable[[Array], Sequence[Array]]

Form = Literal["batch_ratio", "image_ratio", "difference"]

# w_i of Eq. 4, for relu1_1, relu2_1, relu3_1, relu4_1, relu5_1.
LAYER_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
# Added to each denominator, as in the official code.
EPSILON = 1e-7


def contrastive_distances(
    anchor: ArrayLike,
    positive: ArrayLike,
    negative: ArrayLike,
    features: Features,
    *,
    positives: int = 1,
    negatives: int = 1,
    per_image: bool = False,
) -> tuple[Array, Array]:
    """Return the mean absolute feature distances of `anchor` to positives and negatives, per feature level.

    The first sample of each image is its own; the r-th additional sample is that of the r-th next image in the batch, cyclically.
    (Table 4 of the paper uses other images of the batch; in a shuffled batch, these neighbours are random.) A distance is the mean
    over the whole batch, as in the official code, or with `per_image` over one image. Gradients flow only through `anchor`. The features
    of positives and negatives are computed once, whatever their rates are.

    Args:
      anchor: restored images `[N, H, W, 3]` in [0, 1], floating point, at least one.
      positive: clear images of the same shape.
      negative: hazy images of the same shape; or `[N, K, H, W, 3]`, K negatives of its own for each image.
      features: function that maps images to a sequence of feature maps, such as `VGG19Features`.
      positives: number of clear images per anchor, 1 to N.
      negatives: number of negatives per anchor, 0 to N; if it is 0, the second result is zeros. If each image has K of its own, 0 or K.
      per_image: whether to return one distance for each image.

    Returns:
      (d_ap, d_an), each with one number per feature level, `[levels]`, with `per_image` `[levels, N]`, in at least float32.

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
    own = negative.shape[1] if negative.ndim == 5 else 0
    for name, shape in (("positive", positive.shape), ("negative", negative.shape[:1] + negative.shape[2:] if own else negative.shape)):
        if shape != anchor.shape:
            raise ValueError(f"{name} has shape {shape} and must have anchor's, {anchor.shape}")
    for name, count, least in (("positives", positives, 1), ("negatives", negatives, 0)):
        if as_int(count) is None:
            raise ValueError(f"{name} (={count!r}) must be an integer, {least} to the batch size ({anchor.shape[0]})")
        if name == "negatives" and own:
            if count not in (0, own):
                raise ValueError(f"negatives (={count}) must be 0 or {own}, because negative has shape {negative.shape}")
        elif not least <= count <= anchor.shape[0]:
            raise ValueError(f"{name} (={count}) must be {least} to the batch size ({anchor.shape[0]})")
    of_anchor = features(anchor)
    if hasattr(of_anchor, "shape"):  # the rows of a single array would be mistaken for levels
        raise ValueError("features must give a sequence of feature maps, not one array: return [x] for a single level")
    if not of_anchor:
        raise ValueError("features must give at least one feature map")

    def distances(images: Array, count: int) -> Array:
        images = lax.stop_gradient(images)
        of_images = features(images.reshape(-1, *anchor.shape[1:]) if images.ndim == 5 else images)
        if len(of_images) != len(of_anchor):
            raise ValueError("features must give the same number of levels for every image")
        levels = []
        for a, b in zip(of_anchor, of_images):
            b = lax.stop_gradient(b)
            if images.ndim == 5:
                samples = [b.reshape(*images.shape[:2], *b.shape[1:])[:, i] for i in range(count)]
            else:
                samples = [b if shift == 0 else jnp.roll(b, -shift, 0) for shift in range(count)]
            levels.append(_mean_distance(a, samples, per_image))
        return jnp.stack(levels)

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
    form: Form = "batch_ratio",
) -> Array:
    """Return the regularization of Eq. 4, by default `sum_i w_i d_ap_i / (d_an_i + 1e-7)`; without negatives (CR*), `sum_i w_i d_ap_i`.

    Arguments and errors are as in `contrastive_distances` and `combine_distances`. In particular, `weights` has one number for each feature
    level, in order; only the default is cut if `features` returns fewer levels.

    Returns:
      A scalar.
    """
    to_positive, to_negative = contrastive_distances(
        anchor, positive, negative, features, positives=positives, negatives=negatives, per_image=form == "image_ratio"
    )
    return combine_distances(to_positive, to_negative, weights=weights, negatives=negatives, form=form)


def combine_distances(
    to_positive: Array,
    to_negative: Array,
    *,
    weights: Sequence[float] | Array = LAYER_WEIGHTS,
    negatives: int,
    form: Form = "batch_ratio",
) -> Array:
    """Combine the distances d_ap and d_an per level to one number; without negatives, the sum of weighted d_ap.

    Args:
      to_positive: d_ap, `[levels]`, or `[levels, N]` for "image_ratio".
      to_negative: d_an, of the same shape.
      weights: one number w_i for each level; the default is cut to their number.
      negatives: the number of negatives; 0 gives the paper's CR*.
      form: "batch_ratio", `sum_i w_i d_ap_i / (d_an_i + 1e-7)` with the distances of the whole batch, as in the official code;
        "image_ratio", the mean of this over the images, each with its own distances, as Eq. 4 of the paper has it; "difference",
        `sum_i w_i (d_ap_i - d_an_i)`, as in the triplet loss (Schroff et al., CVPR 2015), whose margin it does not need: by the triangle
        inequality, a difference is at least the negative distance between positive and negative.

    Raises:
      ValueError: `weights` has another shape or number of entries, the form is unknown, or the shape of the distances does not fit it.
    """
    if form not in get_args(Form):
        raise ValueError(f"form (={form!r}) must be one of {', '.join(get_args(Form))}")
    if to_positive.ndim != (axes := 2 if form == "image_ratio" else 1):
        raise ValueError(f"to_positive has shape {to_positive.shape} and must have {axes} axes for the form {form}")
    if negatives and to_negative.shape != to_positive.shape:
        raise ValueError(f"to_negative has shape {to_negative.shape} and must have that of to_positive, {to_positive.shape}")
    levels = len(to_positive)
    if weights is LAYER_WEIGHTS:
        weights = LAYER_WEIGHTS[:levels]
    weights = as_array(weights, "weights")
    if weights.ndim != 1:
        raise ValueError(f"weights has shape {weights.shape} and must be one number for each level, such as {LAYER_WEIGHTS}")
    if weights.size != levels:
        raise ValueError(f"weights has {weights.size} entries and must have one for each of {levels} levels")
    if not negatives:
        terms = to_positive
    elif form == "difference":
        terms = to_positive - to_negative
    else:
        terms = to_positive / (to_negative + EPSILON)
    if form == "image_ratio":
        terms = terms.mean(1)
    return jnp.sum(weights.astype(terms.dtype) * terms)


def _mean_distance(a: Array, samples: Sequence[Array], per_image: bool) -> Array:
    # Millions of bfloat16 differences must be summed in float32.
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    axes = tuple(range(1, a.ndim)) if per_image else None
    zero = jnp.zeros(a.shape[:1] if per_image else (), dtype)
    return sum((jnp.mean(jnp.abs(a - sample), axes, dtype=dtype) for sample in samples), zero) / len(samples)
