"""What is measured: the operator, the network, the train step, each as one function without arguments, and its MACs."""

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
from jax.extend.core import jaxprs_in_params

from aecr_jax.config import Config, DataConfig, LossConfig, TrainConfig
from aecr_jax.deform_conv import deform_conv2d
from aecr_jax.model import AECRNet, ModelConfig
from aecr_jax.step import init_state, make_mesh, make_train_step, replicate, shard_batch
from aecr_jax.vgg import random_vgg19


@dataclass(frozen=True)
class Work:
    """One piece of work, described so that another framework can do the same."""

    kind: str
    """op, model or train."""
    batch: int = 1
    size: int = 64
    """Height and width."""
    channels: int = 256
    """Of the operator's input and output."""
    width: int = 64
    """Of the network."""
    backward: bool = False
    """The operator's gradient in every argument too."""
    cr: bool = False
    """A train step with contrastive regularization and a full VGG-19, instead of L1 alone."""
    dtype: str = "float32"
    """Type of the arithmetic."""

    def __str__(self) -> str:
        if self.kind == "op":
            what = f"deform_conv2d {'forward + backward' if self.backward else 'forward'}, {self.channels} channels"
        else:
            what = "forward" if self.kind == "model" else f"train step, {'L1 + CR' if self.cr else 'L1'}"
        return f"{what}, {self.batch} x {self.size}x{self.size}"


@dataclass
class Prepared:
    """Work, compiled."""

    run: Callable[[], None]
    """Does it once and waits for it."""
    compile_s: float
    temporaries: int
    """Bytes that the compiled program allocates besides arguments and results."""
    results: int
    """Bytes of its results."""
    macs: int


def prepare(work: Work) -> Prepared:
    """Compiles `work` for the default device, with random inputs: time does not depend on values."""
    jitted, arguments, carry = {"op": _op, "model": _model, "train": _train}[work.kind](work)
    start = time.perf_counter()
    traced = jitted.trace(*arguments)
    compiled = traced.lower().compile()
    compile_s = time.perf_counter() - start
    state = list(arguments)

    def run() -> None:
        result = compiled(*state)
        jax.block_until_ready(result)
        if carry is not None:  # a donated argument comes back as a result
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

    def forward(x: Array, offset: Array, mask: Array, kernel: Array) -> Array:
        return deform_conv2d(x, offset, kernel, mask=mask, padding=1)

    def both(cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return jax.vjp(forward, *inputs)[1](cotangent)

    if work.backward:
        return jax.jit(both), (cotangent, x, offset, mask, kernel), None
    return jax.jit(forward), (x, offset, mask, kernel), None


def _model(work: Work) -> tuple[Any, tuple[Any, ...], int | None]:
    model = AECRNet(ModelConfig(width=work.width, dtype=work.dtype), rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    model.eval()
    graph, state = nnx.split(model)
    x = jnp.asarray(np.random.default_rng(0).random((work.batch, work.size, work.size, 3)), jnp.float32)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x)), (state, x), None


def _train(work: Work) -> tuple[Any, tuple[Any, ...], int | None]:
    config = Config(
        model=ModelConfig(width=work.width, dtype=work.dtype),  # type: ignore[arg-type]
        data=DataConfig(crop=work.size),
        loss=LossConfig(cr=0.1 if work.cr else 0.0),
        train=TrainConfig(batch=work.batch),
    )
    mesh = make_mesh(jax.devices()[:1])
    step = make_train_step(config, random_vgg19(width=64) if work.cr else None, mesh)
    rng = np.random.default_rng(0)
    images = {key: rng.random((work.batch, work.size, work.size, 3), np.float32) for key in ("hazy", "clear")}
    assert isinstance(step, functools.partial)
    return step.func, (*step.args, replicate(init_state(config), mesh), shard_batch(images, mesh)), 1


def count_macs(jaxpr: Any) -> int:
    """Multiply-adds of the matrix products and convolutions of a jaxpr, those in its loops and calls included."""
    total = 0
    for equation in jaxpr.eqns:
        name, out = equation.primitive.name, equation.outvars[0].aval
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += out.size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
            # Zeros that dilation puts between the inputs cost nothing in a program that knows of them.
            total += out.size * math.prod(kernel) // kernel[spec[0]] // math.prod(equation.params["lhs_dilation"])
        times = equation.params["length"] if name == "scan" else 1
        total += times * sum(count_macs(inner) for inner in jaxprs_in_params(equation.params))
    return total
