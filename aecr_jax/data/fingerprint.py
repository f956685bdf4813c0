"""Fingerprints of training data: what a run compares when it resumes, to refuse other data than it began with."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from aecr_jax.errors import UserError

# Up to this size in all, files are hashed completely; of larger sets, blocks at the start, the middle and the end of each file. A picture
# is compressed, so a change in it changes the bytes behind it and nearly always its size.
WHOLE_BYTES = 256 * 2**20
_BLOCK = 4096
# A built data set has few and large files.
_LARGE, _STRIDE = 64 * 2**20, 4 * 2**20


def describe_samples(samples: Sequence[Any]) -> str:
    """Describe training data by their number and a hash of each kind of file, "12 images (names 0a.., hazy 1b.., clear 2c..)".

    The names count in their order. Of files, the size and the contents count, not the place or the time: the same data in another
    folder have the same description.

    Args:
      samples: what `split_samples` gives to train on.

    Raises:
      UserError: a file cannot be read.
    """
    parts = {"names": _digest(os.fsencode(sample.name) for sample in samples)}
    files = _files_by_kind(samples)
    whole = sum(_size(path) for paths in files.values() for path in paths) <= WHOLE_BYTES
    with ThreadPoolExecutor(8) as pool:  # on a network file system nearly all the time is waiting
        for kind, paths in files.items():
            parts[kind] = _digest(pool.map(lambda path: _hash_file(path, whole=whole), paths))
    if not files:
        parts["scenes"] = _digest(np.ascontiguousarray(array).tobytes() for sample in samples for array in sample.read().values())
    return f"{len(samples)} images ({', '.join(f'{name} {value}' for name, value in parts.items())})"


def same_data(saved: str, samples: Sequence[Any], now: str) -> bool:
    """Whether the description `saved` in a checkpoint is that of `samples`, which `describe_samples` describes as `now`."""
    if " (checksum " in saved:  # written by version 0.1.0, which looked at the names and the first clear image
        checksum = zlib.crc32("\n".join(sample.name for sample in samples).encode(errors="surrogateescape"))
        checksum = zlib.crc32(np.ascontiguousarray(samples[0].read()["clear"]).tobytes(), checksum)
        return saved == f"{len(samples)} images (checksum {checksum:08x})"
    return saved == now


def _files_by_kind(samples: Sequence[Any]) -> dict[str, list[Path]]:
    """The files of pairs and depth scenes as `hazy`, `clear`, `depth`, each once; of a built data set its `records`."""
    files: dict[str, dict[Path, None]] = {}
    for sample in samples:
        for kind in ("hazy", "clear", "depth"):
            if isinstance(path := getattr(sample, kind, None), Path):
                files.setdefault(kind, {})[path] = None
    if hasattr(samples[0], "source"):
        source = samples[0].source
        files["records"] = {Path(path): None for path in source.dataset_info.splits[source.split].filepaths}
    return {kind: list(paths) for kind, paths in files.items()}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _hash_file(path: Path, *, whole: bool) -> bytes:
    size = _size(path)
    digest = hashlib.sha256(str(size).encode())
    try:
        with open(path, "rb") as file:
            if whole:
                while block := file.read(2**20):
                    digest.update(block)
            else:
                middle = range(_STRIDE, size, _STRIDE) if size > _LARGE else [size // 2]
                for start in (0, *middle, max(0, size - _BLOCK)):
                    file.seek(start)
                    digest.update(file.read(_BLOCK))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.digest()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:12]
