"""Conversion of VGG-19 and VGG-16 weights from torchvision or timm to the files that the losses read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from aecr_jax.convert.tensors import Tensors, check_output, read_tensors, to_float32
from aecr_jax.errors import UserError
from aecr_jax.files import refuse_existing, replacing
from aecr_jax.losses.vgg import VGG16Features, VGG19Features, VGGFeatures

# Index of each convolution in torchvision's and timm's `features`.
_INDICES = {
    VGG19Features: dict(zip(VGG19Features.CONVOLUTIONS, (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34))),
    VGG16Features: dict(zip(VGG16Features.CONVOLUTIONS, (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28))),
}
_VGG16_ONLY = "features.17.weight"  # a convolution in VGG-16, but a ReLU in VGG-19
# Known files by the first digits of their SHA-256, which torchvision includes in its file names.
KNOWN = {
    "dcbb9e9d": ("torchvision VGG-19 (IMAGENET1K_V1)", "BSD-3-Clause (torchvision); trained on ImageNet"),
    "397923af": ("torchvision VGG-16 (IMAGENET1K_V1)", "BSD-3-Clause (torchvision); trained on ImageNet"),
}


def convert_vgg(file: str | Path, output: str | Path, *, overwrite: bool = False) -> str:
    """Convert VGG weights to a file that `VGG19Features.load` or `VGG16Features.load` reads, and return a line that describes them.

    The weights may be torchvision's `vgg19-*.pth` or `vgg16-*.pth` (which requires PyTorch), or a `.safetensors` or `.npz` file with the
    names of torchvision or timm. A truncated network is taken for a VGG-19 and has fewer layers. Weights may have any
    floating-point type, including bfloat16, and are converted to float32.

    Args:
      file: the file with the weights.
      output: the `.safetensors` file to write.
      overwrite: replace an existing `output`.

    Raises:
      UserError: the file is not one of these; a tensor is missing, of the wrong shape, not floating point or not finite, or is a kernel
        with a single constant value; or the output exists or cannot be written.
    """
    file, output = Path(file), check_output(output)
    if output.suffix != ".safetensors" or output.resolve() == file.resolve():
        raise UserError(f"--output {output} must be another file, and end in .safetensors")
    refuse_existing(output, overwrite=overwrite)
    tensors = read_tensors(file)
    try:
        network = VGG16Features if _VGG16_ONLY in tensors else VGG19Features
        weights = from_torchvision(tensors, network)
        reached = network.check_weights(weights)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    source, licence = KNOWN.get(digest[:8], (f"{file.name}, not a known file", "not known: see where the file came from"))
    with replacing(output) as partial:
        partial.write_bytes(save(weights, metadata=network.metadata(source=source, sha256=digest, licence=licence)))
    levels = len(set(reached) & set(network.LAYERS))
    about = f"{network.TITLE}, {levels} of {len(network.LAYERS)} levels, input RGB in [0, 1], layers up to {reached[-1]}"
    return f"{output}: {source}, {about}, SHA-256 {digest[:16]}..., licence {licence}"


def from_torchvision(tensors: Tensors, network: type[VGGFeatures]) -> Tensors:
    """Rename the tensors of torchvision or timm and transpose the kernels; raise a ValueError if one is missing or not floating point."""
    if any(name.endswith("running_mean") for name in tensors):
        raise ValueError(
            "this is a VGG with batch normalization; VGG-19 without it is needed (tensor features.1.running_mean is unexpected)"
        )
    weights: Tensors = {}
    indices = _INDICES[network]
    for name, index in indices.items():
        if weights and not any(f"features.{later}.weight" in tensors for later in indices.values() if later >= index):
            break  # a truncated network ends here
        for part, ours in (("weight", "kernel"), ("bias", "bias")):
            if (theirs := f"features.{index}.{part}") not in tensors:
                raise ValueError(f"tensor {theirs} ({name}) is missing: {network.TITLE} of torchvision or timm is needed")
            weights[f"{name}.{ours}"] = _to_hwio(tensors[theirs], theirs)
    return weights


def _to_hwio(tensor: np.ndarray, name: str) -> np.ndarray:
    if tensor.ndim not in (1, 4):
        raise ValueError(f"tensor {name} has shape {tensor.shape} and must be [O, I, kh, kw] or [O]")
    tensor = to_float32(tensor, name)
    return np.ascontiguousarray(tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor)
