"""Conversion of the weights of LPIPS from torchvision's VGG-16 and the package lpips to one file that `LPIPS.load` reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors.numpy import save

from aecr_jax.convert.tensors import check_output, read_tensors, to_float32
from aecr_jax.convert.vgg import KNOWN, from_torchvision
from aecr_jax.errors import UserError
from aecr_jax.files import refuse_existing, replacing
from aecr_jax.losses.lpips import FORMAT, LAYERS, LPIPS, VERSION
from aecr_jax.losses.vgg import VGG16Features

# weights/v0.1/vgg.pth and weights/v0.0/vgg.pth of the package lpips 0.1.4, by the first digits of their SHA-256. They hold tensors of the
# same names and shapes, but those of version 0.0 belong to images that are not normalized.
_VERSION_0_1, _VERSION_0_0 = "a78928a0", "b9e42362"


def convert_lpips(vgg: str | Path, linear: str | Path, output: str | Path, *, overwrite: bool = False) -> str:
    """Convert the weights of LPIPS to a file that `LPIPS.load` reads, and return a line that describes them.

    Args:
      vgg: the weights of VGG-16, as `convert_vgg` takes them; all 13 convolutions are needed.
      linear: `weights/v0.1/vgg.pth` of the package lpips (which requires PyTorch), or a `.safetensors` or `.npz` file with its tensors.
      output: the `.safetensors` file to write.
      overwrite: replace an existing `output`.

    Raises:
      UserError: a file is not one of these, or has tensors that are missing, of the wrong shape, not floating point or not finite; or the
        output exists or cannot be written.
    """
    vgg, linear, output = Path(vgg), Path(linear), check_output(output)
    if output.suffix != ".safetensors" or output.resolve() in (vgg.resolve(), linear.resolve()):
        raise UserError(f"--output {output} must be another file, and end in .safetensors")
    refuse_existing(output, overwrite=overwrite)
    tensors = read_tensors(vgg)
    try:
        weights = from_torchvision(tensors, VGG16Features)
        VGG16Features(weights, layers=LAYERS)
    except ValueError as error:
        raise UserError(f"{vgg}: {error}") from error
    tensors = read_tensors(linear)
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in (("vgg", vgg), ("linear", linear))}
    if digests["linear"].startswith(_VERSION_0_0):
        raise UserError(f"{linear} holds the weights of LPIPS 0.0: use weights/v{VERSION}/vgg.pth of the package lpips")
    try:
        for i in range(len(LAYERS)):
            name = f"lin{i}.model.1.weight"
            if name not in tensors:
                raise ValueError(f"tensor {name} is missing: weights/v{VERSION}/vgg.pth of the package lpips is needed")
            weights[f"linear{i + 1}.weight"] = to_float32(tensors[name], name).reshape(-1)
        LPIPS(weights)
    except ValueError as error:
        raise UserError(f"{linear}: {error}") from error
    known = digests["linear"].startswith(_VERSION_0_1)
    network, network_licence = KNOWN.get(digests["vgg"][:8], (f"{vgg.name}, not a known file", "not known"))
    source = (
        f"{network}, SHA-256 {digests['vgg']}; {'linear weights of lpips 0.1.4' if known else f'{linear.name}, not a known file'}, SHA-256"
        f" {digests['linear']}"
    )
    licence = f"VGG-16: {network_licence}; linear weights: {'BSD-2-Clause (lpips)' if known else 'not known'}"
    with replacing(output) as partial:
        partial.write_bytes(save(weights, metadata={"format": FORMAT, "version": VERSION, "source": source, "licence": licence}))
    return f"{output}: LPIPS {VERSION} with VGG-16: {source}; licence {licence}"
