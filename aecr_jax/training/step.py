"""One optimizer step: loss, gradient, update. The same code runs on one device, on several, and on a pod.

The step is a plain `jax.jit` over a mesh with one `data` axis: the batch is split over it, the state is replicated and donated.
Means over the batch (the distances of the regularization, FastDeconv's statistics) are therefore taken over the whole batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aecr_jax.losses.loss import Loss
from aecr_jax.networks.arrays import get_arrays, replace_arrays
from aecr_jax.networks.macs import count_macs
from aecr_jax.networks.network import Network, NetworkConfig
from aecr_jax.networks.registry import abstract_network, build_network, find_network, make_network
from aecr_jax.training.config import Config, OptimConfig
from aecr_jax.training.optimizer import learning_rate, make_optimizer


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "stats", "opt_state", "ema"], meta_fields=[])
@dataclass
class TrainState:
    """Everything that changes from step to step."""

    step: Array  # number of steps taken so far
    params: dict[str, Array]  # by dotted name
    stats: dict[str, Array]  # running statistics
    opt_state: optax.OptState
    ema: dict[str, Array]  # moving average of the parameters, by the same names; empty without optim.ema

    @property
    def eval_arrays(self) -> dict[str, Array]:
        """The arrays for evaluation: the moving average if there is one, otherwise the parameters; and the running statistics."""
        return {**(self.ema or self.params), **self.stats}


Batch = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def init_state(config: Config, model: Network | None = None) -> TrainState:
    """Return the state before the first step, taken from `model` or newly initialized with `run.seed`."""
    if model is None:
        model = make_network(config.model, rngs=nnx.Rngs(config.run.seed))
    params = get_arrays(model, nnx.Param)
    stats = get_arrays(model, nnx.BatchStat)
    # The average needs arrays of its own: the step donates the buffers of both.
    ema = jax.tree.map(jnp.copy, params) if config.optim.ema else {}
    dtype = jnp.dtype(config.model.param_dtype)
    opt_state = make_optimizer(config.optim, type(model).predicts_offsets).init(params)
    # Muon keeps its coefficients in the state, as float64 if that is enabled.
    opt_state = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, opt_state)
    return TrainState(jnp.zeros((), jnp.int32), params, stats, opt_state, ema)


def state_to_model(config: Config, state: TrainState) -> Network:
    """Return a model in evaluation mode with the state's arrays for evaluation."""
    return build_network(config.model, state.eval_arrays)


def make_train_step(config: Config, loss: Loss, mesh: Mesh, *, freeze_stats: bool = False) -> Step:
    """Return a function `(state, {"hazy", "clear", ...}) -> (state, measurements)` that is compiled on first use and donates its state.

    Measurements are scalars: `total`, those of the loss, those of the network (`Network.diagnostics`), the norms of gradient, update
    and parameters, and `learning_rate`.

    Args:
      config: the settings; those of the optimizer and the model are used.
      loss: what is minimized, such as `RestorationLoss`.
      mesh: the devices.
      freeze_stats: use the network's running statistics as in evaluation, and do not update them.
    """
    loss_graph, loss_state = nnx.split(loss)
    x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    compiled = _jit_step(config.model, config.optim, loss_graph, loss.lagging, mesh, freeze_stats, x64)
    return functools.partial(compiled, jax.device_put(loss_state, NamedSharding(mesh, PartitionSpec())))


@functools.lru_cache(8)  # as many as `reproduce` has rows in a table
def _jit_step(
    model_config: NetworkConfig, optim: OptimConfig, loss_graph: nnx.GraphDef, lagging: bool, mesh: Mesh, freeze_stats: bool, x64: bool
) -> Callable[..., Any]:
    """Return the compiled step, whose first argument is the loss's arrays.

    Runs in one process that differ only by seed or data share it, because tracing it takes seconds.
    """
    network = find_network(model_config.NAME)
    optimizer, schedule = make_optimizer(optim, network.predicts_offsets), learning_rate(optim)
    template = abstract_network(model_config)
    template.train()
    if freeze_stats:
        template.freeze_statistics()
    graph, abstract = nnx.split(template)

    def loss_fn(params: dict[str, Array], stats: dict[str, Array], loss_state: Any, batch: Batch) -> tuple[Array, Any]:
        model = nnx.merge(graph, replace_arrays(abstract, {**params, **stats}))
        loss = nnx.merge(loss_graph, loss_state)
        prediction, intermediates = _predict_and_capture(model, loss, batch["hazy"])
        total, measurements = loss(prediction, batch)
        measurements = {"total": total, **measurements, **model.diagnostics(intermediates)}
        return total, (get_arrays(model, nnx.BatchStat), measurements)

    grad_fn = jax.grad(loss_fn, has_aux=True)

    def accumulate(params: dict[str, Array], stats: dict[str, Array], loss_state: Any, batch: Batch) -> tuple[Any, Any]:
        count = optim.accumulate
        # Part i takes images i, i + count, ..., so that it has some from every device.
        parts = {key: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for key, x in batch.items()}

        def add(carry: tuple[Any, Any], part: Batch) -> tuple[tuple[Any, Any], Any]:
            total, stats = carry
            gradients, (stats, measurements) = grad_fn(params, stats, loss_state, part)
            return (jax.tree.map(jnp.add, total, gradients), stats), measurements

        # XLA's CPU backend runs convolutions inside a loop 30 to 50 times slower.
        unroll = count if mesh.devices.flat[0].platform == "cpu" else 1
        (total, stats), measurements = jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, params), stats), parts, unroll=unroll)
        merged = {name: values.max() if name.endswith("_max") else values.mean() for name, values in measurements.items()}
        return jax.tree.map(lambda gradient: gradient / count, total), (stats, merged)

    def train_step(loss_state: Any, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        if lagging:
            # In the mode of the network that is trained, so that restorations differ by the parameters alone.
            model = nnx.merge(graph, replace_arrays(abstract, {**state.ema, **state.stats}))
            batch = {**batch, "lagging": model(batch["hazy"])}
        compute = grad_fn if optim.accumulate == 1 else accumulate
        gradients, (stats, measurements) = compute(state.params, state.stats, loss_state, batch)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        measurements |= {
            "learning_rate": jnp.asarray(schedule(state.step)),
            "grad_norm": optax.tree.norm(gradients),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
        }
        # In the first steps the average follows the parameters closely; otherwise the initial values would dominate it for long.
        decay = jnp.minimum(optim.ema, (1 + state.step) / (10 + state.step))
        ema = {name: decay.astype(x.dtype) * x + (1 - decay).astype(x.dtype) * params[name] for name, x in state.ema.items()}
        return TrainState(state.step + 1, params, stats, opt_state, ema), measurements

    replicated, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    return jax.jit(train_step, donate_argnums=1, in_shardings=(replicated, replicated, split), out_shardings=(replicated, replicated))


def _predict(model: Network, loss: Loss, hazy: Array) -> Any:
    return loss.predict(model, hazy)


def compile_train_step(
    config: Config, loss: Loss, mesh: Mesh, state: TrainState, batch: Batch, *, freeze_stats: bool = False, forms_of: str | None = None
) -> tuple[Step, int]:
    """Return the compiled step of `make_train_step` for these shapes, and its number of multiply-adds over all devices.

    The multiply-adds of all matrix products and convolutions of the step are counted, with those of the gradient, the features of the
    loss and the optimizer. What `model.remat` computes a second time does not count, as model FLOPs utilization is defined (PaLM,
    Chowdhery et al., 2022, appendix B).

    `forms_of` is the platform, "cpu", "gpu" or "tpu", whose forms of the operations are used; by default, that of the devices.
    """
    step: Any = make_train_step(config, loss, mesh, freeze_stats=freeze_stats)
    counted = step.func
    if getattr(config.model, "remat", False):
        change: Any = {"remat": False}
        without = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
        other: Any = make_train_step(without, loss, mesh, freeze_stats=freeze_stats)
        counted = other.func
    leaves, tree = jax.tree.flatten((*step.args, state, batch))
    compiled, macs = _compile(step.func, counted, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves), forms_of)
    return functools.partial(compiled, *step.args), macs


@functools.lru_cache(8)  # as `_jit_step`, whose functions these are
def _compile(
    function: Any, counted: Any, tree: jax.tree_util.PyTreeDef, leaves: tuple[tuple[tuple[int, ...], Any], ...], forms_of: str | None
) -> tuple[jax.stages.Compiled, int]:
    arguments = tree.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    traced = function.trace(*arguments)
    macs = count_macs((traced if counted is function else counted.trace(*arguments)).jaxpr.jaxpr)
    return traced.lower(lowering_platforms=(forms_of,) if forms_of else None).compile(), macs


# Returns the prediction and the values that the layers sow. It is Any because flax's annotation does not cover the use as a decorator.
_predict_and_capture: Any = nnx.capture(nnx.Intermediate)(_predict)
