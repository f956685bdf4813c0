"""Numbers of the official PyTorch code that ship with the package, so that a device can be checked where there is no PyTorch.

`reference.npz` holds inputs and results of three computations with PyTorch on a CPU, in the layouts of this project: the deformable
convolution with its gradients (float64), the network (float32), and the loss and gradient norm of a training step (float64). The weights
are not stored, because NumPy draws them again from their seeds. `tests/golden/README.md` describes how the numbers were made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aecr_jax.convert.aecr_net import FORMAT
from aecr_jax.losses.vgg import VGG19Features
from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.networks.registry import abstract_network

FILE = Path(__file__).with_name("reference.npz")


def load_reference() -> dict[str, np.ndarray]:
    """Return the arrays of `reference.npz`.

    - `op_x`, `op_offset`, `op_mask`, `op_kernel`, `op_bias`, `op_cotangent`: arguments of `deform_conv2d` with padding 1; `op_out`, and
      `op_grad_x` and so on: its result and gradients.
    - `network_hazy`, `network_restored`: an image `[1, 48, 64, 3]` and what the network makes of it.
    - `step_hazy`, `step_clear`: a batch `[2, 48, 48, 3]`; `step_l1`, `step_cr`, `step_total`, `step_grad_norm`: numbers of its first step.
    - `weight_seed`, `vgg_seed`: for `official_weights` and `vgg19`; `names`, `shapes`: of the official network's tensors.
    """
    with np.load(FILE) as file:
        return dict(file)


def official_weights(seed: int) -> dict[str, np.ndarray]:
    """Return the official network's tensors by name. Tensor n is drawn with seed [seed, n] and scaled according to its name."""
    reference = load_reference()
    tensors = {}
    for n, (name, sizes) in enumerate(zip(reference["names"], reference["shapes"])):
        shape = tuple(int(size) for size in str(sizes).strip("[]").split(","))
        z = np.random.default_rng([int(seed), n]).standard_normal(shape).astype(np.float32)
        name = str(name)
        if name.endswith("running_mean"):
            z = abs(z) * np.float32(0.1) + np.float32(0.4)
        elif name.endswith("running_deconv"):
            z = np.float32(2) * np.eye(len(z), dtype=np.float32) + (z + z.T) * np.float32(0.05)
        elif name.endswith(".w"):
            z = z * np.float32(0.5)
        elif name.endswith("conv_offset_mask.bias"):
            z = z * np.float32(0.7)
        elif name.endswith("bias"):
            z = z * np.float32(0.05)
        else:
            fan_in = shape[0] * 9 / 4 if name.startswith(("up1.", "up2.")) else np.prod(shape[1:])
            z = z * np.float32((0.3 if "conv_offset_mask" in name else 1.2) / np.sqrt(fan_in))
        tensors[name] = z
    return tensors


def our_arrays(official: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the official network's tensors with this project's names and layouts."""
    return FORMAT.to_ours(official, list(get_arrays(abstract_network(AECRNetConfig()))))


def vgg19_tensors(seed: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return the layers of a full VGG-19 in PyTorch's layout: name, weight `[O, I, 3, 3]` and bias `[O]`."""
    rng, channels, layers = np.random.default_rng(int(seed)), 3, []
    for name in VGG19Features.CONVOLUTIONS:
        out = 64 * min(2 ** (int(name[4]) - 1), 8)
        weight = rng.standard_normal((out, channels, 3, 3)).astype(np.float32) * np.float32(np.sqrt(2 / (9 * channels)))
        layers.append((name, weight, rng.standard_normal(out).astype(np.float32) * np.float32(0.05)))
        channels = out
    return layers


def vgg19(seed: int, dtype: Any = np.float32) -> VGG19Features:
    """Return the features of a full VGG-19 with the weights of `vgg19_tensors`."""
    weights: dict[str, np.ndarray] = {}
    for name, weight, bias in vgg19_tensors(seed):
        weights |= {f"{name}.kernel": weight.transpose(2, 3, 1, 0).astype(dtype), f"{name}.bias": bias.astype(dtype)}
    return VGG19Features(weights)
