"""The loss of KDDN (Hong et al., CVPR 2020): the dehazing network is trained to have the features of an autoencoder of clear images.

The authors' code contains the parts of the loss, but not the program that trains the dehazing network. The sum with all weights 1 is that
of a third party's completion, github.com/hhl73/KDDN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from aecr_jax.losses.contrastive import contrastive_regularization
from aecr_jax.losses.loss import Loss
from aecr_jax.losses.vgg import FrozenWeight, VGG19Features
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.networks.kddn import KDDN, STAGES, KDDNTeacher
from aecr_jax.networks.network import Network
from aecr_jax.networks.registry import build_network
from aecr_jax.validation import as_int


class DistillationLoss(Loss):
    """`L1(restored, clear) + perceptual + distillation`, as a function of the student's output and clear images `[N, H, W, 3]` in [0, 1].

    `perceptual` is the L1 distance between VGG-19 features of the restored and the clear images, weighted by level as in contrastive
    regularization (1/32 for relu1_1 to 1 for relu5_1). `distillation` is the sum over `groups` of the L1 distances between the student's
    features of the hazy images and the teacher's features of the clear images. The call returns the total and the measurements `l1`,
    `perceptual` (only with `features`) and `distillation`.

    Args:
      teacher: the trained teacher. The loss contains a copy of its weights, which no optimizer updates.
      features: the feature extractor for the perceptual distance, or None to omit it.
      groups: the groups of the student, counted from 1, whose features are compared. Groups 2, 4 and 6 are those that a comment in the
        authors' code names; the third party's completion compares all six.
      dtype: type in which the features of the clear images and those of VGG-19 are computed.

    Raises:
      ValueError: `teacher` is no `KDDNTeacher`, or `groups` are not different numbers from 1 to 6.
    """

    def __init__(
        self, teacher: KDDNTeacher, features: VGG19Features | None, *, groups: Sequence[int] = (2, 4, 6), dtype: Any = jnp.float32
    ):
        if not isinstance(teacher, KDDNTeacher):
            raise ValueError(f"teacher (={type(teacher).__name__}) must be a KDDNTeacher")
        numbers = [as_int(group) for group in groups]
        if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(1, STAGES + 1)):
            raise ValueError(f"groups (={groups!r}) must be different numbers from 1 to {STAGES}, such as (2, 4, 6)")
        self.dtype = jnp.dtype(dtype)
        self.teacher = _frozen(teacher, self.dtype.name)
        self.features = features
        self.groups = tuple(groups)

    def predict(self, model: Network, hazy: Array) -> tuple[Array, list[Array]]:
        """Return the restored images and the features of the student's six groups.

        Raises:
          ValueError: `model` is no `KDDN`, or its width is not the teacher's.
        """
        if not isinstance(model, KDDN):
            raise ValueError(f"model (={type(model).__name__}) must be a KDDN, because the distillation loss compares its features")
        if model.config.width != (width := self.teacher.config.width):
            raise ValueError(f"width (={model.config.width}) must be the teacher's, {width}")
        return model.restore_with_features(hazy)

    def __call__(self, prediction: tuple[Array, list[Array]], batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        (restored, of_student), clear = prediction, batch["clear"]
        measurements = {"l1": _mean_distance(restored, clear)}
        if self.features is not None:
            images = (restored.astype(self.dtype), clear.astype(self.dtype))
            # With no negatives, the regularization is the weighted sum of the distances to the clear images.
            measurements["perceptual"] = contrastive_regularization(*images, images[1], self.features, negatives=0)
        of_teacher = self.teacher.features(clear)
        distances = [_mean_distance(of_student[group - 1], lax.stop_gradient(of_teacher[group - 1])) for group in self.groups]
        measurements["distillation"] = jnp.stack(distances).sum()
        return jnp.stack(list(measurements.values())).sum(), measurements


def _frozen(teacher: KDDNTeacher, dtype: str) -> KDDNTeacher:
    """Return a copy that computes in `dtype` and whose parameters are weights that no optimizer updates."""
    copy = build_network(dataclasses.replace(teacher.config, dtype=dtype), get_arrays(teacher))
    assert isinstance(copy, KDDNTeacher)
    for _, module in nnx.iter_modules(copy):
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Param):
                setattr(module, name, FrozenWeight(value[...]))
    return copy


def _mean_distance(a: Array, b: Array) -> Array:
    # The mean is computed in at least float32, because the sum of millions of bfloat16 differences would be inaccurate.
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    return jnp.mean(jnp.abs(a.astype(dtype) - b.astype(dtype)))
