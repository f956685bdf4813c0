"""Conversion of official AECR-Net checkpoints in both directions. Tensors are renamed and rearranged; their values do not change."""

from __future__ import annotations

import hashlib
import io
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aecr_jax.convert.tensors import Tensors, check_output, import_torch, read_tensors, to_float32
from aecr_jax.errors import UserError
from aecr_jax.files import refuse_existing, replacing
from aecr_jax.inference.weights import load_checkpoint, refuse_model, save_checkpoint
from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.networks.registry import abstract_network, build_network
from aecr_jax.validation import check_weight

_Layout = Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _conv(x: np.ndarray) -> np.ndarray:  # OIHW -> HWIO
    return x.transpose(2, 3, 1, 0)


def _conv_back(x: np.ndarray) -> np.ndarray:
    return x.transpose(3, 2, 0, 1)


def _up(x: np.ndarray) -> np.ndarray:  # IOHW -> HWIO, and back
    return x.transpose(2, 3, 0, 1)


# PyTorch's unfold orders the values of a patch by (channel, row, column), this project by (row, column, channel).
_PATCH = np.arange(27).reshape(3, 3, 3).transpose(1, 2, 0).ravel()
_PATCH_BACK = np.argsort(_PATCH)

_CONV: tuple[_Layout, _Layout] = (_conv, _conv_back)
_UP: tuple[_Layout, _Layout] = (_up, _up)
_SAME: tuple[_Layout, _Layout] = (_same, _same)
_MEAN: tuple[_Layout, _Layout] = (lambda x: x[_PATCH], lambda x: x[_PATCH_BACK])
_MATRIX: tuple[_Layout, _Layout] = (lambda x: x[np.ix_(_PATCH, _PATCH)], lambda x: x[np.ix_(_PATCH_BACK, _PATCH_BACK)])
_SCALAR: tuple[_Layout, _Layout] = (lambda x: x.reshape(()), lambda x: x.reshape(1))

# our name -> (official name, kernel layout); each entry represents a kernel and a bias
_LAYERS = {
    "down1": ("down1.1", _CONV),
    "down2": ("down2.0", _CONV),
    "down3": ("down3.0", _CONV),
    "blocks.0.conv1": ("block.conv1", _CONV),
    "blocks.0.conv2": ("block.conv2", _CONV),
    "blocks.0.channel_down": ("block.calayer.ca.0", _CONV),
    "blocks.0.channel_up": ("block.calayer.ca.2", _CONV),
    "blocks.0.pixel_down": ("block.palayer.pa.0", _CONV),
    "blocks.0.pixel_up": ("block.palayer.pa.2", _CONV),
    "up1": ("up1.0", _UP),
    "up2": ("up2.0", _UP),
    "up3": ("up3.1", _CONV),
    "deform.0": ("dcn_block.dcn", _CONV),
    "deform.0.offset_mask": ("dcn_block.dcn.conv_offset_mask", _CONV),
    "fast_deconv": ("deconv", _CONV),
}
NAMES: dict[str, tuple[str, tuple[_Layout, _Layout]]] = {
    "fast_deconv.running_mean": ("deconv.running_mean", _MEAN),
    "fast_deconv.running_deconv": ("deconv.running_deconv", _MATRIX),
    "mix1.theta": ("mix1.w", _SCALAR),
    "mix2.theta": ("mix2.w", _SCALAR),
}
for _ours, (_theirs, _layout) in _LAYERS.items():
    NAMES[f"{_ours}.kernel"] = (f"{_theirs}.weight", _layout)
    NAMES[f"{_ours}.bias"] = (f"{_theirs}.bias", _SAME)


def official_names(ours: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Map the array names of one of our models to (official name, official shape), given its arrays or their shapes."""
    return {name: (NAMES[name][0], NAMES[name][1][1](np.empty(array.shape, np.bool_)).shape) for name, array in ours.items()}


def our_arrays(official: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert official tensors, whose names have no prefix `module.`, to our names and layouts; omit unknown tensors."""
    return {ours: layout(official[theirs]) for ours, (theirs, (layout, _)) in NAMES.items() if theirs in official}


def official_arrays(ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert our arrays to the official names and layouts; the inverse of `our_arrays`."""
    return {NAMES[name][0]: NAMES[name][1][1](array) for name, array in ours.items()}


def convert_aecr(file: str | Path, output: str | Path, *, overwrite: bool = False) -> str:
    """Convert an official checkpoint to a model folder, or one of our checkpoints to a PyTorch state dict with official names.

    Args:
      file: an official `.pk` or `.pth` file (with or without the surrounding dict and the prefix `module.`), or a folder that
        `load_checkpoint` accepts.
      output: the folder to write or, for the reverse direction, the `.pth` file.
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
        return _to_official(file, output)
    refuse_model(output, overwrite=overwrite)
    tensors = {name.removeprefix("module."): tensor for name, tensor in read_tensors(file).items()}
    config = _official_config(file, tensors)
    expected = official_names(get_arrays(abstract_network(config))).values()
    for theirs, shape in expected:
        if theirs not in tensors:
            raise UserError(f"{file}: tensor {theirs} of shape {shape} is missing")
        if tensors[theirs].shape != shape:
            raise UserError(f"{file}: tensor {theirs} has shape {tensors[theirs].shape} and must have {shape}")
        try:
            tensors[theirs] = to_float32(tensors[theirs], theirs)
            # The convolution that predicts offsets and masks is initialized with zeros; no other tensor with more than one axis is.
            check_weight(tensors[theirs], theirs, kernel=len(shape) > 1 and "conv_offset_mask" not in theirs)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error
    if unknown := sorted(set(tensors) - {theirs for theirs, _ in expected}):
        raise UserError(f"{file}: tensor {unknown[0]} is not one of the official AECR-Net")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    save_checkpoint(build_network(config, our_arrays(tensors)), output, {"source": file.name, "sha256": digest})
    return f"{output}: official AECR-Net, {len(tensors)} tensors, width {config.width}, SHA-256 {digest[:16]}..."


def _official_config(file: Path, tensors: Tensors) -> AECRNetConfig:
    # Use the most frequent width, so that a single wrong tensor is reported itself and not the correct ones.
    widths = [len(tensors[name]) for name in ("down1.1.weight", "down1.1.bias", "up2.0.bias") if name in tensors and tensors[name].ndim]
    if len(widths) < 2 or not all(widths):
        raise UserError(f"{file}: tensor down1.1.weight of shape (64, 3, 7, 7) is missing: this is no official AECR-Net checkpoint")
    return AECRNetConfig(width=statistics.mode(widths), fast_deconv="deconv.weight" in tensors)


def _to_official(folder: Path, output: Path) -> str:
    torch = import_torch("writing a PyTorch file")
    model = load_checkpoint(folder)
    config = model.config
    fixed = AECRNetConfig(width=config.width, fast_deconv=config.fast_deconv, dtype=config.dtype, param_dtype=config.param_dtype)
    if config != fixed:
        raise UserError(f"{folder} is not the official network, which shares its blocks, has DFE after them and adaptive mixup: {config}")
    arrays = official_arrays({name: np.asarray(array) for name, array in get_arrays(model).items()})
    content = io.BytesIO()  # given a path, torch.save would store the name of the temporary file in the output
    torch.save({name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}, content)
    with replacing(output) as partial:
        partial.write_bytes(content.getvalue())
    return f"{output}: PyTorch state dict with the official names, {len(arrays)} tensors"
