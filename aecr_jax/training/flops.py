"""Floating-point operations: the peak of the devices, from a table or measured, against which a run's speed is compared."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# Peak of one device in TFLOP/s, for dense bfloat16 matrix products with sums in float32, by the beginning of the name that JAX gives to
# the kind of device. NVIDIA prints most peaks for 2:4 sparsity, which are twice as high. A more special name must come first.
_PEAKS = {
    # https://docs.cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e, tpu7x: "peak compute per chip". A v3 or 7x chip is two devices.
    "TPU v3": 123 / 2,
    "TPU v4 lite": None,  # v4i, whose peak is not published there
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "TPU7x": 2307 / 2,
    # NVIDIA A100 Tensor Core GPU data sheet
    "NVIDIA A100": 312,
    # NVIDIA H100 Tensor Core GPU data sheet: PCIe (1,513 with sparsity), NVL (1,671), SXM (1,979)
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100": 989,
    # NVIDIA H200 Tensor Core GPU data sheet: NVL (1,671 with sparsity), SXM (1,979); NVIDIA GH200 data sheet (1,979)
    "NVIDIA H200 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA GH200": 989,
    # NVIDIA Blackwell architecture technical brief: HGX B200 (4,500 with sparsity), GB200 (5,000)
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    # NVIDIA L4 (242 with sparsity), L40S and A10 data sheets
    "NVIDIA L40S": 362,
    "NVIDIA L4": 121,
    "NVIDIA A10": 125,
    # NVIDIA Ada GPU architecture and NVIDIA Ampere GA102 GPU architecture white papers, appendices
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71,
}


def peak_flops(mesh: Mesh, hosts: int, dtype: str) -> float | None:
    """Return the peak of all devices in FLOP/s, or None if it is not known for this kind of device.

    For CPUs, the speed of a matrix product is measured and multiplied by the number of hosts, because all devices of a host share its
    cores. For other devices, the peak of `_PEAKS` counts, whatever `dtype` is: model FLOPs utilization is defined by it.

    Args:
      mesh: the devices.
      hosts: number of machines, which must be equal.
      dtype: type of the matrices on a CPU.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return 2e9 * matmul_peak(dtype, (1024,)) * hosts
    peak = device_peak(device.device_kind)
    return None if peak is None else 1e12 * peak * mesh.size


def device_peak(kind: str) -> float | None:
    """Return the peak of one device in TFLOP/s (see `_PEAKS`) by its `device_kind`, or None if it is not known."""

    def is_named(name: str) -> bool:
        # "NVIDIA A10" must not match "NVIDIA A100" or "NVIDIA A10G".
        return kind.startswith(name) and not kind[len(name) :][:1].isalnum()

    return next((peak for name, peak in _PEAKS.items() if is_named(name)), None)


def matmul_peak(dtype: str, sizes: Sequence[int]) -> float:
    """Return the highest speed, in GMAC/s, of square matrix products of these sizes on one device."""
    best = 0.0
    multiply = jax.jit(jnp.matmul)
    for size in sizes:
        a = jnp.ones((size, size), dtype)
        multiply(a, a).block_until_ready()
        for _ in range(8):
            start = time.perf_counter()
            multiply(a, a).block_until_ready()
            best = max(best, size**3 / (time.perf_counter() - start) / 1e9)
    return best
