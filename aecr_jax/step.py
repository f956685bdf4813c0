"""One optimizer step: loss (Eq. 4), gradient, Adam or Muon. The same on one device, several, or a pod.

The step is a plain `jax.jit` over a mesh with one `data` axis: the batch is split over it, the state is replicated and donated.
Means over the batch (the distances of the regularization, FastDeconv's statistics) are thereby means over the whole batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers, muon

from aecr_jax.config import Config
from aecr_jax.contrastive import LAYER_WEIGHTS, combine_distances, contrastive_distances
from aecr_jax.errors import UserError
from aecr_jax.model import AECRNet, abstract_model, build_model, get_arrays, replace_arrays
from aecr_jax.vgg import VGG19Features


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "stats", "opt_state", "ema"], meta_fields=[])
@dataclass
class TrainState:
    """All that changes from step to step."""

    step: Array  # steps taken so far
    params: dict[str, Array]  # by dotted name
    stats: dict[str, Array]  # FastDeconv's running statistics
    opt_state: optax.OptState
    ema: dict[str, Array]  # moving average of the parameters, by the same names; empty without train.ema

    @property
    def eval_arrays(self) -> dict[str, Array]:
        """What is evaluated: the moving average if there is one, else the parameters; and the running statistics."""
        return {**(self.ema or self.params), **self.stats}


Batch = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def learning_rate(config: Config) -> optax.Schedule:
    """Rate by the number of steps already taken: in the official code step t, from 1, has `0.5 (1 + cos(pi t / T))` of the peak."""
    peak, total, warmup = config.train.learning_rate, config.train.steps, config.train.warmup

    def schedule(taken: Any) -> Any:
        rate = jnp.asarray(peak, jnp.result_type(float))
        if config.train.schedule == "cosine":
            rate *= 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(taken + 1, total) / total))
        return rate * jnp.minimum((taken + 1) / warmup, 1) if warmup else rate

    return schedule


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The paper's Adam (0.9, 0.999) with PyTorch's epsilon, or Muon; clipping before it and the factor for offsets after it, if set.

    Muon (Jordan et al., 2024) makes the steps of the convolutions' kernels orthogonal as matrices of all inputs by outputs, with
    the root mean square of 0.2 learning rates (Liu et al., 2025, arXiv 2502.16982). Biases, mixup factors and kernels with at most
    three rows or columns as such a matrix, which have few directions to choose from, take Adam with Nesterov's momentum at that rate.
    """
    train = config.train
    if train.optimizer == "muon":
        update = muon(learning_rate(config), muon_weight_dimension_numbers=_muon_kernels, consistent_rms=0.2)
    else:
        update = optax.adam(learning_rate(config), b1=0.9, b2=0.999, eps=1e-8)
    # The parts are always three, so that a run can go on with other values of these settings.
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity(),
        update,
        optax.masked(optax.scale(train.offset_rate), lambda params: {name: ".offset_mask." in name for name in params}),
    )


def _muon_kernels(params: dict[str, Any]) -> dict[str, MuonDimensionNumbers | None]:
    def is_wide(param: Any) -> bool:
        # What is Adam's comes as optax's MaskedNode, without a shape, the second time.
        shape: tuple[int, ...] = getattr(param, "shape", ())
        return len(shape) == 4 and min(shape[-1], math.prod(shape[:-1])) > 3

    kernel = MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    return {name: kernel if is_wide(param) else None for name, param in params.items()}


def init_state(config: Config, model: AECRNet | None = None) -> TrainState:
    """The state before the first step, from `model` or from new initial values by `train.seed`."""
    if model is None:
        model = AECRNet(config.model, rngs=nnx.Rngs(config.train.seed))
    params = get_arrays(model, nnx.Param)
    stats = get_arrays(model, nnx.BatchStat)
    # In arrays of its own: the step consumes both.
    ema = jax.tree.map(jnp.copy, params) if config.train.ema else {}
    dtype = jnp.dtype(config.model.param_dtype)
    # Muon keeps its coefficients in the state, in float64 if that is enabled.
    opt_state = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, make_optimizer(config).init(params))
    return TrainState(jnp.zeros((), jnp.int32), params, stats, opt_state, ema)


def state_to_model(config: Config, state: TrainState) -> AECRNet:
    """A model in evaluation mode with what the state evaluates."""
    return build_model(config.model, state.eval_arrays)


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices (or those given) along one axis, `data`."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicate(state: TrainState, mesh: Mesh) -> TrainState:
    """A copy of the state on every device, as the step wants it (another placement would compile the step twice)."""
    # By way of the host: what is on one device cannot go to those of other processes.
    return jax.device_put(jax.tree.map(np.asarray, state), NamedSharding(mesh, PartitionSpec()), may_alias=False)


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises UserError if the batch does not divide by the devices."""
    batch, n, parts = config.train.batch, mesh.size, config.train.accumulate
    if batch % (n * parts):
        fitting = sorted({max(batch // (n * parts), 1) * n * parts, (batch // (n * parts) + 1) * n * parts})
        by = f"{n} devices" + (f" times train.accumulate (={parts})" if parts > 1 else "")
        raise UserError(f"train.batch (={batch}) must divide by the {by}, such as {' or '.join(map(str, fitting))}")


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """This process's part of the batch, put onto its devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def make_train_step(config: Config, features: VGG19Features | None, mesh: Mesh, *, freeze_stats: bool = False) -> Step:
    """Compiles on first use a function `(state, {"hazy", "clear"}) -> (state, measurements)` that consumes its state.

    Measurements are scalars: `total, l1, cr`, the norms of gradient, update and parameters, `learning_rate`, per feature level
    `d_ap_i` and `d_an_i`, the mixup factors, and mean and largest |offset| of the deformable layers in pixels.

    Args:
      config: loss, optimizer and model.
      features: the extractor for contrastive regularization; None if `loss.cr` is 0.
      mesh: the devices.
      freeze_stats: FastDeconv whitens by its running averages, as in evaluation, and leaves them as they are.

    Raises:
      ValueError: `features` is missing.
    """
    loss_config = config.loss
    if loss_config.cr and features is None:
        raise ValueError(f"features is None and must be a VGG19Features, because loss.cr (={loss_config.cr}) is not 0")
    optimizer, schedule = make_optimizer(config), learning_rate(config)
    template = abstract_model(config.model)
    template.train()
    if freeze_stats and template.fast_deconv is not None:
        template.fast_deconv.eval()
    graph, abstract = nnx.split(template)
    # The weights are an argument of the compiled step: as constants they would make it slow to compile.
    features_graph, features_state = nnx.split(features) if features is not None else (None, None)

    def loss_fn(params: dict[str, Array], stats: dict[str, Array], features_state: Any, batch: Batch) -> tuple[Array, Any]:
        model = nnx.merge(graph, replace_arrays(abstract, {**params, **stats}))
        hazy, clear = batch["hazy"], batch["clear"]
        restored, intermediates = _call_and_capture(model, hazy)
        out_dtype = jnp.promote_types(restored.dtype, jnp.float32)
        l1 = jnp.mean(jnp.abs(restored.astype(out_dtype) - clear))
        measurements = {"l1": l1, **_offsets(intermediates), **_mixup_factors(params)}
        total = l1
        if features_graph is not None and loss_config.cr:
            extractor = nnx.merge(features_graph, features_state)
            dtype = jnp.dtype(config.model.dtype)
            anchor, positive, negative = (images.astype(dtype) for images in (restored, clear, hazy))
            d_ap, d_an = contrastive_distances(
                anchor, positive, negative, extractor, positives=loss_config.positives, negatives=loss_config.negatives
            )
            cr = combine_distances(d_ap, d_an, weights=LAYER_WEIGHTS, negatives=loss_config.negatives)
            total = l1 + loss_config.cr * cr
            measurements["cr"] = cr
            for name, distances in (("d_ap", d_ap), ("d_an", d_an)):
                measurements |= {f"{name}_{level + 1}": distances[level] for level in range(distances.size)}
        measurements["total"] = total
        return total, (get_arrays(model, nnx.BatchStat), measurements)

    grad_fn = jax.grad(loss_fn, has_aux=True)

    def accumulate(params: dict[str, Array], stats: dict[str, Array], features_state: Any, batch: Batch) -> tuple[Any, Any]:
        count = config.train.accumulate
        # Part i has images i, i + count, ...: some of every device.
        parts = {key: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for key, x in batch.items()}

        def add(carry: tuple[Any, Any], part: Batch) -> tuple[tuple[Any, Any], Any]:
            total, stats = carry
            gradients, (stats, measurements) = grad_fn(params, stats, features_state, part)
            return (jax.tree.map(jnp.add, total, gradients), stats), measurements

        # XLA's CPU backend runs convolutions inside a loop 30 to 50 times slower.
        unroll = count if mesh.devices.flat[0].platform == "cpu" else 1
        (total, stats), measurements = jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, params), stats), parts, unroll=unroll)
        merged = {name: values.max() if name == "offset_max" else values.mean() for name, values in measurements.items()}
        return jax.tree.map(lambda gradient: gradient / count, total), (stats, merged)

    def train_step(features_state: Any, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        compute = grad_fn if config.train.accumulate == 1 else accumulate
        gradients, (stats, measurements) = compute(state.params, state.stats, features_state, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        measurements |= {
            "learning_rate": jnp.asarray(schedule(state.step)),
            "grad_norm": optax.tree.norm(gradients),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
        }
        # At first the average follows closely, or it would long remember the initial values.
        decay = jnp.minimum(config.train.ema, (1 + state.step) / (10 + state.step))
        ema = {name: decay.astype(x.dtype) * x + (1 - decay).astype(x.dtype) * params[name] for name, x in state.ema.items()}
        return TrainState(state.step + 1, params, stats, opt_state, ema), measurements

    replicated, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    compiled = jax.jit(train_step, donate_argnums=1, in_shardings=(replicated, replicated, split), out_shardings=(replicated, replicated))
    if features_state is not None:
        features_state = jax.device_put(features_state, replicated)
    return functools.partial(compiled, features_state)


def _call(model: AECRNet, hazy: Array) -> Array:
    return model(hazy)


# Returns the output, and what the deformable layers sow. (Its annotation in flax lacks the decorator's form.)
_call_and_capture: Any = nnx.capture(nnx.Intermediate)(_call)


def _offsets(intermediates: Any) -> dict[str, Array]:
    offsets = [jnp.abs(jax.lax.stop_gradient(leaf)) for leaf in jax.tree.leaves(intermediates)]
    if not offsets:
        return {}
    dtype = jnp.promote_types(offsets[0].dtype, jnp.float32)
    means = jnp.stack([jnp.mean(o, dtype=dtype) for o in offsets])
    return {"offset_mean": means.mean(), "offset_max": jnp.stack([o.max() for o in offsets]).max().astype(dtype)}


def _mixup_factors(params: dict[str, Array]) -> dict[str, Array]:
    return {name: jax.nn.sigmoid(params[f"{name}.theta"]) for name in ("mix1", "mix2") if f"{name}.theta" in params}
