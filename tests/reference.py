"""Load the reference values in tests/golden and regenerate the weights that are too large to store there."""

from pathlib import Path

import numpy as np

from aecr_jax.convert.aecr_net import FORMAT
from aecr_jax.losses.vgg import VGG19Features
from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.networks.registry import abstract_network

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def nhwc(x):
    return np.ascontiguousarray(np.moveaxis(x, -3, -1))


def official_weights(seed):
    """Return the official network's tensors by name. Tensor n is drawn with seed [seed, n] and scaled according to its name."""
    spec = load("official_forward")
    tensors = {}
    for n, (name, shape) in enumerate(zip(spec["names"], spec["shapes"])):
        shape = tuple(int(size) for size in str(shape).strip("[]").split(","))
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


def our_arrays(official):
    """The official network's tensors with our names and layouts."""
    return FORMAT.to_ours(official, list(get_arrays(abstract_network(AECRNetConfig()))))


def vgg19_tensors(seed):
    """Return the layers of a full VGG-19 in PyTorch's layout: [(name, weight [O, I, 3, 3], bias [O])]."""
    rng, channels, layers = np.random.default_rng(int(seed)), 3, []
    for name in VGG19Features.CONVOLUTIONS:
        out = 64 * min(2 ** (int(name[4]) - 1), 8)
        weight = rng.standard_normal((out, channels, 3, 3)).astype(np.float32) * np.float32(np.sqrt(2 / (9 * channels)))
        layers.append((name, weight, rng.standard_normal(out).astype(np.float32) * np.float32(0.05)))
        channels = out
    return layers


def vgg19(seed, dtype=np.float32):
    weights = {}
    for name, weight, bias in vgg19_tensors(seed):
        weights |= {f"{name}.kernel": weight.transpose(2, 3, 1, 0).astype(dtype), f"{name}.bias": bias.astype(dtype)}
    return VGG19Features(weights)
