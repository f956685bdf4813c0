"""Safe reading of tensor files from third parties: no such file can run code.

PyTorch pickles are read with `weights_only=True` and need PyTorch; safetensors and `.npz` files (without pickled objects) do not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from aecr_jax.errors import MissingFileError, UserError, first_line
from aecr_jax.validation import check_type

Tensors = dict[str, np.ndarray]


def read_tensors(file: Path) -> Tensors:
    """Read a file of tensors and return them by name; of a pickle, read the state dict that it contains.

    Raises:
      UserError: the file does not exist, is damaged, or is a pickle that would run code.
    """
    if not file.is_file():
        raise MissingFileError(f"there is no file {file}")
    if file.suffix not in (".npz", ".safetensors"):
        return _read_pickle(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib, NumPy and safetensors raise different types of errors
        raise UserError(f"{file} is damaged or no {file.suffix} file: {first_line(error)}") from error


def _read_pickle(file: Path) -> Tensors:
    torch = import_torch(f"reading {file}")
    try:
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the errors come from pickle, zipfile and PyTorch itself
        raise UserError(f"{file} is damaged, or a pickle that would run code and is refused: {first_line(error)}") from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(f"{file} holds no state dict: a dict of tensors, or one under the key 'model' or 'state_dict', is needed")
    try:
        # NumPy has no bfloat16. Tensors that are not floating point keep their type, so that a later check can reject them by name.
        return {str(name): (value.float() if value.is_floating_point() else value).detach().numpy() for name, value in loaded.items()}
    except Exception as error:
        raise UserError(f"{file} holds tensors that are not dense: {first_line(error)}") from error


def import_torch(purpose: str) -> Any:
    """Import PyTorch; if it is missing or too old, raise UserError that states what it is needed for."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{purpose} needs PyTorch: run `pip install 'torch>=2.6'` (.safetensors and .npz files do not)") from error
    # Before version 2.6, a crafted file could bypass weights_only (CVE-2025-32434).
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 6):
        raise UserError(f"{purpose} needs PyTorch 2.6 or newer, not {torch.__version__}: run `pip install 'torch>=2.6'`")
    return torch


def to_float32(tensor: np.ndarray, name: str) -> np.ndarray:
    """Convert a tensor to float32; raise ValueError if it is not floating point."""
    check_type(tensor, name)
    with np.errstate(over="ignore"):  # values beyond the range of float32 become infinite and are rejected later
        return tensor.astype(np.float32)


def check_output(output: str | Path) -> Path:
    """Return the output as a path; raise UserError if it is empty, which would mean the current folder."""
    if not str(output):
        raise UserError("--output is empty: name what to write")
    return Path(output)
