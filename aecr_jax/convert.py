"""Converts weights of others into files of ours: VGG-19 for the regularization, and official AECR-Net checkpoints both ways.

PyTorch's pickles are read with `weights_only=True`, safetensors and `.npz` (without pickled objects) need no PyTorch. None of them
can run code.
"""

from __future__ import annotations

import hashlib
import io
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from aecr_jax.checkpoint import export_model, load_checkpoint, refuse_model
from aecr_jax.errors import UserError, first_line
from aecr_jax.files import refuse_existing, replacing
from aecr_jax.model import ModelConfig, abstract_model, build_model, get_arrays
from aecr_jax.official import official_arrays, official_names, our_arrays
from aecr_jax.validation import check_type, check_weight
from aecr_jax.vgg import CONVOLUTIONS, VGGConvention, check_weights, vgg_metadata

# Index of each convolution in torchvision's and timm's `features`.
_TORCHVISION = dict(zip(CONVOLUTIONS, (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28)))
_VGG16_ONLY = "features.17.weight"  # a convolution there, where VGG-19 has a ReLU
# By the first digits of the file's SHA-256, as torchvision puts them into its file names.
_KNOWN = {
    "dcbb9e9d": ("torchvision VGG-19 (IMAGENET1K_V1)", "BSD-3-Clause (torchvision); trained on ImageNet"),
    "1c32a882": ("VGG-19 distilled 16x, Collaborative Distillation (CVPR 2020)", "MIT"),
    "289c2780": ("VGG-19 (Caffe), activations normalised, up to conv3_1", "CC BY 4.0 (Simonyan and Zisserman), packaged under Apache-2.0"),
}

Tensors = dict[str, np.ndarray]


def convert_vgg(file: str | Path, output: str | Path, *, overwrite: bool = False) -> str:
    """Converts VGG-19 weights into the file that `load_vgg19` reads, and returns a line that says what it was.

    Takes torchvision's `vgg19-*.pth` (with PyTorch installed), a `.safetensors` of torchvision or timm, and an `.npz` with
    `convX_Y_w` `[O, I, 3, 3]`, `convX_Y_b`, an input layer `conv1_1_rgb01_*` for RGB in [0, 1], reflection padding, and optionally
    `auxK_1_*`, 1x1 maps of the features to those of a wider network. A network that ends early serves fewer levels. Weights may be of
    any floating point type, bfloat16 included, and become float32.

    Args:
      file: the weights.
      output: the `.safetensors` to write.
      overwrite: replace an `output` that exists.

    Raises:
      UserError: the file is not one of these, a tensor is missing, misshapen, not floating point, not finite or (a kernel) one value
        throughout, or the output exists or cannot be written.
    """
    file, output = Path(file), _check_output(output)
    if output.suffix != ".safetensors" or output.resolve() == file.resolve():
        raise UserError(f"--output {output} must be another file, and end in .safetensors")
    refuse_existing(output, overwrite=overwrite)
    tensors = _read_tensors(file)
    try:
        if file.suffix == ".npz":
            weights, convention = _from_npz(tensors), VGGConvention(padding="reflect")
        else:
            weights, convention = _from_torchvision(tensors), VGGConvention()
        levels = check_weights(weights)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    source, licence = _KNOWN.get(digest[:8], (f"{file.name}, not a known file", "not known: see where the file came from"))
    with replacing(output) as partial:
        partial.write_bytes(save(weights, metadata=vgg_metadata(convention, source=source, sha256=digest, licence=licence)))
    about = f"{levels} of 5 levels, {convention.padding} padding, input RGB in [0, 1]"
    return f"{output}: {source}, {about}, SHA-256 {digest[:16]}..., licence {licence}"


def convert_aecr(file: str | Path, output: str | Path, *, overwrite: bool = False) -> str:
    """Converts an official checkpoint into a model folder, or a checkpoint of ours into a PyTorch state dict with official names.

    Args:
      file: an official `.pk` or `.pth` (with or without the surrounding dict and the prefix `module.`), or a folder that
        `load_checkpoint` takes.
      output: the folder to write, or the `.pth` file.
      overwrite: replace an `output` that exists: the file, or the model's files in the folder.

    Returns:
      A line that says what was written.

    Raises:
      UserError: `file` is not one of these, a tensor is missing, unknown, misshapen, not floating point, not finite or (a kernel) one
        value throughout, or `output` exists, holds a training run or cannot be written.
    """
    file, output = Path(file), _check_output(output)
    if file.is_dir():
        refuse_existing(output, overwrite=overwrite)
        return _to_official(file, output)
    refuse_model(output, overwrite=overwrite)
    tensors = {name.removeprefix("module."): tensor for name, tensor in _read_tensors(file).items()}
    config = _official_config(file, tensors)
    expected = official_names(get_arrays(abstract_model(config))).values()
    for theirs, shape in expected:
        if theirs not in tensors:
            raise UserError(f"{file}: tensor {theirs} of shape {shape} is missing")
        if tensors[theirs].shape != shape:
            raise UserError(f"{file}: tensor {theirs} has shape {tensors[theirs].shape} and must have {shape}")
        try:
            tensors[theirs] = _to_float32(tensors[theirs], theirs)
            # The convolution that predicts offsets and masks starts at zero; nothing else of more than one axis does.
            check_weight(tensors[theirs], theirs, kernel=len(shape) > 1 and "conv_offset_mask" not in theirs)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error
    if unknown := sorted(set(tensors) - {theirs for theirs, _ in expected}):
        raise UserError(f"{file}: tensor {unknown[0]} is not one of the official AECR-Net")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    export_model(build_model(config, our_arrays(tensors)), output, {"source": file.name, "sha256": digest})
    return f"{output}: official AECR-Net, {len(tensors)} tensors, width {config.width}, SHA-256 {digest[:16]}..."


def _check_output(output: str | Path) -> Path:
    if not str(output):
        raise UserError("--output is empty: name what to write")
    return Path(output)


def _official_config(file: Path, tensors: Tensors) -> ModelConfig:
    # The width that most of these agree on, so that one wrong tensor is not blamed on the others.
    widths = [len(tensors[name]) for name in ("down1.1.weight", "down1.1.bias", "up2.0.bias") if name in tensors and tensors[name].ndim]
    if len(widths) < 2 or not all(widths):
        raise UserError(f"{file}: tensor down1.1.weight of shape (64, 3, 7, 7) is missing: this is no official AECR-Net checkpoint")
    return ModelConfig(width=statistics.mode(widths), fast_deconv="deconv.weight" in tensors)


def _to_official(folder: Path, output: Path) -> str:
    torch = _import_torch("writing a PyTorch file")
    model = load_checkpoint(folder)
    config = model.config
    fixed = ModelConfig(width=config.width, fast_deconv=config.fast_deconv, dtype=config.dtype, param_dtype=config.param_dtype)
    if config != fixed:
        raise UserError(f"{folder} is not the official network, which shares its blocks, has DFE after them and adaptive mixup: {config}")
    arrays = official_arrays({name: np.asarray(array) for name, array in get_arrays(model).items()})
    content = io.BytesIO()  # torch's own writer would put the temporary file's name into the file
    torch.save({name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}, content)
    with replacing(output) as partial:
        partial.write_bytes(content.getvalue())
    return f"{output}: PyTorch state dict with the official names, {len(arrays)} tensors"


def _from_torchvision(tensors: Tensors) -> Tensors:
    if any(name.endswith("running_mean") for name in tensors):
        raise ValueError(
            "this is a VGG with batch normalization; VGG-19 without it is needed (tensor features.1.running_mean is unexpected)"
        )
    if _VGG16_ONLY in tensors:
        raise ValueError(f"this is a VGG-16, VGG-19 is needed (tensor {_VGG16_ONLY} is unexpected)")
    weights: Tensors = {}
    for name, index in _TORCHVISION.items():
        for part, ours in (("weight", "kernel"), ("bias", "bias")):
            if f"features.{index}.{part}" not in tensors:
                raise ValueError(f"tensor features.{index}.{part} ({name}) is missing: VGG-19 of torchvision or timm is needed")
            weights[f"{name}.{ours}"] = _to_hwio(tensors[f"features.{index}.{part}"], f"features.{index}.{part}")
    return weights


def _from_npz(tensors: Tensors) -> Tensors:
    if "conv1_1_rgb01_w" not in tensors:
        raise ValueError("tensor conv1_1_rgb01_w (first convolution for RGB in [0, 1]) is missing")
    weights: Tensors = {}
    names = {"conv1_1": "conv1_1_rgb01"} | {name: name for name in CONVOLUTIONS[1:]} | {f"aux{i}": f"aux{i}_1" for i in range(1, 6)}
    for ours, theirs in names.items():
        if f"{theirs}_w" in tensors:
            for part, short in (("kernel", "w"), ("bias", "b")):
                if f"{theirs}_{short}" not in tensors:
                    raise ValueError(f"tensor {theirs}_{short} is missing")
                weights[f"{ours}.{part}"] = _to_hwio(tensors[f"{theirs}_{short}"], f"{theirs}_{short}")
    return weights


def _to_hwio(tensor: np.ndarray, name: str) -> np.ndarray:
    if tensor.ndim not in (1, 4):
        raise ValueError(f"tensor {name} has shape {tensor.shape} and must be [O, I, kh, kw] or [O]")
    tensor = _to_float32(tensor, name)
    return np.ascontiguousarray(tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor)


def _to_float32(tensor: np.ndarray, name: str) -> np.ndarray:
    check_type(tensor, name)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
        return tensor.astype(np.float32)


def _read_tensors(file: Path) -> Tensors:
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    if file.suffix not in (".npz", ".safetensors"):
        return _read_pickle(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zip, zlib, NumPy and safetensors each raise kinds of their own
        raise UserError(f"{file} is damaged or no {file.suffix} file: {first_line(error)}") from error


def _read_pickle(file: Path) -> Tensors:
    torch = _import_torch(f"reading {file}")
    try:
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises from pickle, zipfile and its own reader
        raise UserError(f"{file} is damaged, or a pickle that would run code and is refused: {first_line(error)}") from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(f"{file} holds no state dict: a dict of tensors, or one under the key 'model' or 'state_dict', is needed")
    try:
        # NumPy knows no bfloat16. Other kinds of numbers keep their types, to be refused by name where a weight is needed.
        return {str(name): (value.float() if value.is_floating_point() else value).detach().numpy() for name, value in loaded.items()}
    except Exception as error:
        raise UserError(f"{file} holds tensors that are not dense: {first_line(error)}") from error


def _import_torch(purpose: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{purpose} needs PyTorch: run `pip install 'torch>=2.6'` (.safetensors and .npz files do not)") from error
    # Before 2.6 a crafted file got past weights_only (CVE-2025-32434).
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 6):
        raise UserError(f"{purpose} needs PyTorch 2.6 or newer, not {torch.__version__}: run `pip install 'torch>=2.6'`")
    return torch
