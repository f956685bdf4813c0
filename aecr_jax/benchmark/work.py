"""The work that is measured: the operator, the network or the train step, as a function without arguments, and its number of MACs."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from aecr_jax.benchmark.forms import FORMS
from aecr_jax.errors import UserError
from aecr_jax.losses.restoration import RestorationLoss
from aecr_jax.losses.vgg import VGG19Features
from aecr_jax.networks.macs import count_macs
from aecr_jax.networks.network import NetworkConfig
from aecr_jax.networks.registry import config_from_dict, has_parameters, make_network
from aecr_jax.training.config import Config, DataConfig, LossConfig, OptimConfig
from aecr_jax.training.mesh import make_mesh, replicate, shard_batch
from aecr_jax.training.step import init_state, make_train_step


@dataclass(frozen=True)
class Work:
    """Description of one piece of work, from which another framework can do the same work."""

    kind: str
    """Kind of work: "op", "model" or "train"."""
    batch: int = 1
    size: int = 64
    """Height in pixels, and width unless `columns` is set."""
    columns: int | None = None
    """Width in pixels of the images for "model"."""
    channels: int = 256
    """Channels of the operator's input and output."""
    network: str = "aecr_net"
    """Name of the network."""
    width: int | None = None
    """Width of the network, if it has one; None for its default."""
    backward: bool = False
    """Also compute the operator's gradients with respect to all arguments."""
    cr: bool = False
    """Use contrastive regularization with a full VGG-19 in the train step, instead of only L1."""
    dtype: str = "float32"
    """Data type of the arithmetic."""
    form: str = "loop"
    """Form of the operator, a name in `FORMS`."""
    remat: bool = False
    """Set `model.remat` of a network that has it in the train step."""

    def __str__(self) -> str:
        if self.kind == "op":
            what = f"deform_conv2d {'forward + backward' if self.backward else 'forward'}, {self.channels} channels"
        else:
            what = "forward" if self.kind == "model" else f"train step, {'L1 + CR' if self.cr else 'L1'}"
            what = what if self.network == "aecr_net" else f"{self.network} {what}"
        what += ", remat" if self.remat else "" if self.form == "loop" else f", {self.form}"
        return f"{what}, {self.batch} x {self.size}x{self.columns or self.size}"

    def model_config(self) -> NetworkConfig:
        """Return the config of the network that is measured.

        Raises:
          UserError: the network does not exist, or `width` is set and it has no width.
        """
        settings: dict[str, Any] = {"name": self.network, "dtype": self.dtype} | ({} if self.width is None else {"width": self.width})
        settings |= {"remat": True} if self.remat else {}
        try:
            return config_from_dict(settings)
        except ValueError as error:
            raise UserError(str(error)) from error


@dataclass
class Prepared:
    """Compiled work."""

    run: Callable[[], None]
    """Does the work once and waits until it is finished."""
    compile_s: float
    temporaries: int
    """Bytes that the compiled program allocates in addition to its arguments and results."""
    results: int
    """Bytes of the results."""
    macs: int


def prepare(work: Work) -> Prepared:
    """Compile `work` for the default device, with random inputs, because the time does not depend on their values."""
    jitted, arguments, carry = {"op": _op, "model": _model, "train": _train}[work.kind](work)
    start = time.perf_counter()
    traced = jitted.trace(*arguments)
    compiled = traced.lower().compile()
    compile_s = time.perf_counter() - start
    state = list(arguments)

    def run() -> None:
        result = compiled(*state)
        jax.block_until_ready(result)
        if carry is not None:  # the donated argument is returned as a result
            state[carry] = result[0]

    memory = compiled.memory_analysis()
    return Prepared(run, compile_s, memory.temp_size_in_bytes, memory.output_size_in_bytes, count_macs(traced.jaxpr.jaxpr))


def _op(work: Work) -> tuple[Any, tuple[Any, ...], int | None]:
    n, s, c = work.batch, work.size, work.channels
    rng, dtype = np.random.default_rng(0), jnp.dtype(work.dtype)
    x = jnp.asarray(rng.standard_normal((n, s, s, c)), dtype)
    offset = jnp.asarray(2 * rng.standard_normal((n, s, s, 18)), jnp.float32)
    mask = jnp.asarray(rng.random((n, s, s, 9)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, c, c)) / (3 * math.sqrt(c)), dtype)
    cotangent = jnp.asarray(rng.standard_normal((n, s, s, c)), dtype)

    forward = FORMS[work.form]

    def both(cotangent: Array, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
        # The gradients do not need the result. XLA would not compute it if it were not returned, but a network needs it.
        result, pullback = jax.vjp(forward, *inputs)
        return result, pullback(cotangent)

    if work.backward:
        return jax.jit(both), (cotangent, x, offset, mask, kernel), None
    return jax.jit(forward), (x, offset, mask, kernel), None


def _model(work: Work) -> tuple[Any, tuple[Any, ...], int | None]:
    model = make_network(work.model_config(), rngs=nnx.Rngs(0))
    model.eval()
    graph, state = nnx.split(model)
    x = jnp.asarray(np.random.default_rng(0).random((work.batch, work.size, work.columns or work.size, 3)), jnp.float32)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x)), (state, x), None


def _train(work: Work) -> tuple[Any, tuple[Any, ...], int | None]:
    model = work.model_config()
    if not has_parameters(model):
        raise UserError(f"--network (={work.network}) has no parameters to train")
    config = Config(
        model=model,
        data=DataConfig(crop=work.size),
        loss=LossConfig(cr=0.1 if work.cr else 0.0),
        optim=OptimConfig(batch=work.batch),
    )
    mesh = make_mesh(jax.devices()[:1])
    loss = RestorationLoss(VGG19Features.random(width=64) if work.cr else None, cr=config.loss.cr, dtype=work.dtype)
    step = make_train_step(config, loss, mesh)
    rng = np.random.default_rng(0)
    images = {key: rng.random((work.batch, work.size, work.size, 3), np.float32) for key in ("hazy", "clear")}
    assert isinstance(step, functools.partial)
    return step.func, (*step.args, replicate(init_state(config), mesh), shard_batch(images, mesh)), 1
