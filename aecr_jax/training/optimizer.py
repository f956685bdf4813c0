"""Optimizers and learning rates: the paper's Adam with a cosine schedule, or Muon."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from aecr_jax.training.config import OptimConfig


def learning_rate(optim: OptimConfig) -> optax.Schedule:
    """Return the learning rate as a function of the number of steps already taken.

    In the official code, step t (counted from 1) uses `0.5 (1 + cos(pi t / T))` times the peak, which is optax's cosine one step ahead.
    """
    if optim.schedule == "cosine":
        decay = optax.cosine_decay_schedule(optim.learning_rate, optim.steps)
    elif optim.schedule == "steps":
        # One step ahead, as for the cosine, would decay one step early.
        staircase = optax.exponential_decay(optim.learning_rate, optim.decay_every, optim.decay_factor, staircase=True)

        def decay(taken: Any) -> Any:
            return staircase(taken - 1)
    else:
        decay = optax.constant_schedule(optim.learning_rate)

    def schedule(taken: Any) -> Any:
        rate = jnp.asarray(decay(taken + 1), jnp.result_type(float))
        return rate * jnp.minimum((taken + 1) / optim.warmup, 1) if optim.warmup else rate

    return schedule


def make_optimizer(optim: OptimConfig, predicts_offsets: Callable[[str], bool]) -> optax.GradientTransformation:
    """Return the paper's Adam (0.9, 0.999) with PyTorch's epsilon, Muon, or SGD with a momentum of 0.9.

    Gradient clipping, weight decay and a factor for offsets are added if they are set.

    Muon (Jordan et al., 2024) treats each convolution kernel as a matrix of all inputs by outputs and makes its steps orthogonal, with
    a root mean square of 0.2 times the learning rate (Liu et al., 2025, arXiv 2502.16982). Biases, mixup factors, and kernels with at
    most three rows or columns as such a matrix, which have few directions to choose from, use Adam with Nesterov momentum at the same
    learning rate.

    Args:
      optim: the settings.
      predicts_offsets: called with a parameter's name; returns whether `optim.offset_rate` applies to it.
    """
    if optim.optimizer == "muon":
        update = muon(learning_rate(optim), muon_weight_dimension_numbers=_muon_kernels, consistent_rms=0.2)
    elif optim.optimizer == "sgd":
        update = optax.sgd(learning_rate(optim), momentum=0.9)
    else:
        update = optax.adam(learning_rate(optim), b1=0.9, b2=0.999, eps=1e-8)
    if optim.weight_decay:
        update = optax.chain(optax.add_decayed_weights(optim.weight_decay), update)
    # The chain always has three parts, so that a run can resume with other values of these settings.
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
        update,
        optax.masked(optax.scale(optim.offset_rate), lambda params: {name: predicts_offsets(name) for name in params}),
    )


def _muon_kernels(params: dict[str, Any]) -> dict[str, MuonDimensionNumbers | None]:
    def is_wide(param: Any) -> bool:
        # In the second call, optax replaces the parameters that Adam updates by MaskedNode objects, which have no shape.
        shape: tuple[int, ...] = getattr(param, "shape", ())
        return len(shape) == 4 and min(shape[-1], math.prod(shape[:-1])) > 3

    kernel = MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    return {name: kernel if is_wide(param) else None for name, param in params.items()}
