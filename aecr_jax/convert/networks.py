"""The command `convert`: checkpoints of other projects' networks in both directions."""

from __future__ import annotations

import hashlib
import importlib
import io
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from aecr_jax.convert.format import Format
from aecr_jax.convert.tensors import Tensors, check_output, import_torch, read_tensors
from aecr_jax.errors import UserError
from aecr_jax.files import refuse_existing, replacing
from aecr_jax.inference.weights import load_checkpoint, refuse_model, save_checkpoint
from aecr_jax.networks.arrays import get_arrays

# Networks for which there is a module of the same name in this folder, which defines FORMAT.
NETWORKS = ("aecr_net", "dehaze_net", "aod_net", "grid_dehaze_net", "ffa_net", "pfdn", "msbdn", "kddn", "kddn_teacher")


def find_format(network: str) -> Format:
    """Return the foreign format of a network.

    Raises:
      UserError: there is none.
    """
    if network not in NETWORKS:
        raise UserError(f"--network (={network}) must be one of {', '.join(NETWORKS)}")
    return importlib.import_module(f"aecr_jax.convert.{network}").FORMAT


def convert(file: str | Path, output: str | Path, *, network: str | None = None, overwrite: bool = False) -> str:
    """Convert the authors' checkpoint of a network to a model folder, or one of our checkpoints to the authors' names.

    Args:
      file: a `.pth` or `.pk` file (with or without the surrounding dict and the prefix `module.`; reading it needs PyTorch), a
        `.safetensors` or `.npz` file with the same names, or a folder that `load_checkpoint` accepts.
      output: the folder to write or, for the reverse direction, the file, which ends in `.pth`, `.safetensors` or `.npz`.
      network: the network's name; by default it is recognized by the names of the tensors.
      overwrite: replace an existing `output`: the file, or the model's files in the folder.

    Returns:
      One line of text that describes the output.

    Raises:
      UserError: `file` is not one of these; a tensor is missing, unknown, of the wrong shape, not floating point or not finite, or is a
        kernel with a single constant value; or `output` exists, holds a training run or cannot be written.
    """
    file, output = Path(file), check_output(output)
    if file.is_dir():
        refuse_existing(output, overwrite=overwrite)
        return _to_theirs(file, output, network)
    refuse_model(output, overwrite=overwrite)
    tensors = read_tensors(file)
    form = find_format(network or _recognize(file, tensors))
    try:
        model = form.build(tensors)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    save_checkpoint(model, output, {"source": file.name, "sha256": digest})
    width = getattr(model.config, "width", None)
    about = f"{len(tensors)} tensors" + (f", width {width}" if width else "")
    return f"{output}: {model.config.NAME}, {about}, SHA-256 {digest[:16]}..."


def _recognize(file: Path, tensors: Tensors) -> str:
    found = [name for name in NETWORKS if find_format(name).recognizes(tensors)]
    if len(found) != 1:
        first = ", ".join(sorted(tensors)[:3])
        raise UserError(f"{file} is of no known network (its tensors are {first}, ...); --network names one of {', '.join(NETWORKS)}")
    return found[0]


def _to_theirs(folder: Path, output: Path, network: str | None) -> str:
    if output.suffix in (".pth", ".pk", ".pt"):
        import_torch("writing a PyTorch file")
    elif output.suffix not in (".safetensors", ".npz"):
        raise UserError(f"--output (={output}) must end in .pth, .safetensors or .npz, because {folder} is a model to convert back")
    model = load_checkpoint(folder)
    config = model.config
    if network not in (None, config.NAME):
        raise UserError(f"--network (={network}) must be {config.NAME}, which is the network in {folder}")
    if config.NAME not in NETWORKS:
        raise UserError(f"{folder} holds a {config.NAME}, for which there is no authors' format; there is one for {', '.join(NETWORKS)}")
    form = find_format(config.NAME)
    if form.fixed is not None and config != form.fixed(config):
        raise UserError(f"{folder} is not {form.title}, whose settings are {form.fixed(config)}: it has {config}")
    arrays = form.to_theirs({name: np.asarray(array) for name, array in get_arrays(model).items()})
    arrays = {name: np.array(array, order="C") for name, array in arrays.items()}
    content = _serialize(arrays, output.suffix)
    with replacing(output) as partial:
        partial.write_bytes(content)
    return f"{output}: {config.NAME} with the authors' names, {len(arrays)} tensors"


def _serialize(arrays: Tensors, suffix: str) -> bytes:
    if suffix == ".safetensors":
        return save(arrays)
    content = io.BytesIO()  # given a path, torch.save would store the name of the temporary file in the output
    if suffix == ".npz":
        np.savez(content, **arrays)  # type: ignore[arg-type]
    else:
        torch = import_torch("writing a PyTorch file")
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, content)
    return content.getvalue()
