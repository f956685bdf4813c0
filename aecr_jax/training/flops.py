"""Floating-point operations: the peak of the devices, from a table or measured, against which a run's speed is compared."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# Peak of one device in TFLOP/s, for dense bfloat16 matrix products with sums in float32, by a regular expression for JAX's name of the
# kind of device; the first that matches counts. NVIDIA prints most peaks for 2:4 sparsity, which are twice as high.
_PEAKS = {
    # "Peak compute per chip" in https://docs.cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e, tpu7x. A chip of v3 or 7x is two devices.
    r"TPU v3": 123 / 2,
    r"TPU v4": 275,
    r"TPU v5( lite|e)": 197,
    r"TPU v5p?": 459,
    r"TPU v6( lite|e)": 918,
    r"TPU7x": 2307 / 2,
    # NVIDIA A100 data sheet
    r"NVIDIA A100\b.*": 312,
    # NVIDIA H100 data sheet: PCIe (1,513 with sparsity), NVL (1,671), SXM (1,979)
    r"NVIDIA H100 PCIe": 756,
    r"NVIDIA H100 NVL": 835,
    r"NVIDIA H100\b.*": 989,
    # NVIDIA H200 data sheet: NVL (1,671 with sparsity), SXM (1,979); NVIDIA GH200 data sheet (1,979)
    r"NVIDIA H200 NVL": 835,
    r"NVIDIA G?H200\b.*": 989,
    # NVIDIA Blackwell architecture technical brief: HGX B200 (4,500 with sparsity), GB200 (5,000)
    r"NVIDIA B200\b.*": 2250,
    r"NVIDIA GB200\b.*": 2500,
    # NVIDIA L40S, L4 (242 with sparsity) and A10 data sheets
    r"NVIDIA L40S": 362,
    r"NVIDIA L4": 121,
    r"NVIDIA A10": 125,
    # NVIDIA Ada GPU architecture white paper, appendix A
    r"NVIDIA GeForce RTX 4090": 165.2,
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
    if "MIG" in kind:  # a part of a GPU
        return None
    return next((peak for name, peak in _PEAKS.items() if re.fullmatch(name, kind)), None)


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
