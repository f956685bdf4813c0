"""Comparison of a device's results with PyTorch's numbers and with JAX on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from aecr_jax.benchmark.reference import load_reference, official_weights, our_arrays, vgg19
from aecr_jax.losses.restoration import RestorationLoss
from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.networks.registry import build_network
from aecr_jax.ops.deform_conv import deform_conv2d
from aecr_jax.training.config import Config, OptimConfig
from aecr_jax.training.mesh import make_mesh, replicate, shard_batch
from aecr_jax.training.step import init_state, make_train_step

# Name -> type, precision of matrix products and convolutions, and the largest relative error that is accepted. NVIDIA's GPUs compute
# "tensorfloat32" with 10 bits of mantissa, bfloat16 has 7.
ARITHMETIC = {"float32": ("float32", "highest", 1e-3), "tf32": ("float32", "tensorfloat32", 2e-2), "bfloat16": ("bfloat16", "default", 0.1)}
Results = dict[str, Any]  # arrays by name


def check_device(
    device: jax.Device, *, size: int, channels: int, implementation: Literal["xla", "pallas"] = "xla"
) -> Iterator[dict[str, Any]]:
    """Compute each case on a device in each arithmetic, and compare the results with PyTorch's and with those of the CPU in float32.

    The relative error of an array is the norm of its difference from the reference, divided by the norm of the reference.

    Args:
      device: the device to check. On a CPU, which has no TF32 and is itself the CPU to compare with, only PyTorch's numbers count.
      size: height and width of the large case of the operator.
      channels: its channels.
      implementation: that of the deformable convolution; with "pallas", only the cases of the operator are computed.

    Yields:
      A dict for each case and arithmetic: `case`, `arithmetic`, `against` ("PyTorch" or "the CPU"), `errors` by the name of the result
      (None if a value is not finite), `tolerance`, and `ok`, whether all errors are within it.
    """
    reference = load_reference()
    try:
        cpu = None if device.platform == "cpu" else jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        cpu = None
    expected_of = {
        "operator": {name.removeprefix("op_"): reference[name] for name in reference if name.startswith(("op_out", "op_grad"))},
        "network": {"restored": reference["network_restored"]},
        "step": {name: reference[f"step_{name}"] for name in ("l1", "cr", "total", "grad_norm")},
        "large operator": None,
    }
    weights = functools.cache(lambda: our_arrays(official_weights(int(reference["weight_seed"]))))
    features = functools.cache(lambda: vgg19(int(reference["vgg_seed"])))
    cases: dict[str, Callable[[str, jax.Device], Results]] = {
        "operator": functools.partial(_operator, reference, implementation),
        "large operator": functools.partial(_large_operator, size, channels, implementation),
    }
    if implementation == "xla":
        cases["network"] = functools.partial(_network, reference, weights)
        cases["step"] = functools.partial(_step, reference, weights, features)
    for case, compute in cases.items():
        expected = {"PyTorch": expected_of[case]}
        if cpu is not None:
            expected["the CPU"] = _compute(compute, "float32", cpu)
        for arithmetic, (_, _, tolerance) in ARITHMETIC.items():
            if device.platform == "cpu" and arithmetic == "tf32":
                continue
            got = _compute(compute, arithmetic, device)
            for against, values in expected.items():
                if values is not None:
                    errors = {name: relative_error(got[name], value) for name, value in values.items()}
                    about = {"case": case, "arithmetic": arithmetic, "against": against, "errors": errors, "tolerance": tolerance}
                    yield about | {"ok": all(error is not None and error <= tolerance for error in errors.values())}


def relative_error(got: Any, expected: Any) -> float | None:
    """Return the norm of the difference divided by the norm of what is expected; None if a value is not finite."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    error = float(np.linalg.norm((got - expected).ravel()) / np.linalg.norm(expected.ravel()))
    return error if np.isfinite(error) else None


def _compute(compute: Callable[[str, jax.Device], Results], arithmetic: str, device: jax.Device) -> Results:
    dtype, precision, _ = ARITHMETIC[arithmetic]
    with jax.default_matmul_precision(precision), jax.default_device(device):
        return jax.device_get(compute(dtype, device))


def _operator(reference: Results, implementation: str, dtype: str, device: jax.Device) -> Results:
    arguments = {name: reference[f"op_{name}"] for name in ("x", "offset", "mask", "kernel", "bias")}
    return _differentiate(arguments, reference["op_cotangent"], implementation, dtype)


def _large_operator(size: int, channels: int, implementation: str, dtype: str, device: jax.Device) -> Results:
    rng = np.random.default_rng(0)
    shapes = {"x": (1, size, size, channels), "offset": (1, size, size, 18), "mask": (1, size, size, 9)}
    arguments = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arguments["kernel"] = rng.standard_normal((3, 3, channels, channels)) / (3 * channels**0.5)
    return _differentiate(arguments, rng.standard_normal((1, size, size, channels)), implementation, dtype)


def _differentiate(arguments: Results, cotangent: np.ndarray, implementation: Any, dtype: str) -> Results:
    # Positions stay in float32, as in the network.
    cast = {name: jnp.asarray(array, "float32" if name in ("offset", "mask") else dtype) for name, array in arguments.items()}

    @jax.jit
    def both(arguments: dict[str, jax.Array], cotangent: jax.Array) -> tuple[Any, Any]:
        out, vjp = jax.vjp(lambda arguments: deform_conv2d(**arguments, padding=1, implementation=implementation), arguments)
        return out, vjp(cotangent)[0]

    out, gradients = both(cast, jnp.asarray(cotangent, dtype))
    return {"out": out, **{f"grad_{name}": gradient for name, gradient in gradients.items()}}


def _config(dtype: Any) -> AECRNetConfig:
    return AECRNetConfig(dtype=dtype)


def _network(reference: Results, weights: Callable[[], Results], dtype: str, device: jax.Device) -> Results:
    model = build_network(_config(dtype), weights())
    return {"restored": jax.jit(lambda x: model(x))(jnp.asarray(reference["network_hazy"]))}


def _step(reference: Results, weights: Callable[[], Results], features: Callable[[], Any], dtype: str, device: jax.Device) -> Results:
    config, mesh = Config(model=_config(dtype), optim=OptimConfig(steps=10, batch=2)), make_mesh([device])
    step = make_train_step(config, RestorationLoss(features(), cr=0.1, dtype=dtype), mesh)
    state = replicate(init_state(config, build_network(config.model, weights())), mesh)
    _, measured = step(state, shard_batch({name: reference[f"step_{name}"] for name in ("hazy", "clear")}, mesh))
    return {name: measured[name] for name in ("l1", "cr", "total", "grad_norm")}
