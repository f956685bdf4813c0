"""Fingerprints of training data. A run compares them when it resumes, and refuses data other than those that it began with."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aecr_jax.data.samples import Sample
from aecr_jax.errors import UserError
from aecr_jax.files import replacing

# Files beside a run's checkpoints: the fingerprint of the data that the run began with, and the list of files that it has found damaged.
DATA, DAMAGED = "data.json", "damaged_files.json"
# Up to this total size, files are hashed completely; in larger sets, only blocks at the start, the middle and the end of each file are.
# Images are compressed, so a change in one changes the bytes that follow it and nearly always the size.
WHOLE_BYTES = 256 * 2**20
_BLOCK = 4096
# A built data set has few, large files: in files above the first size, a block is hashed at every multiple of the second.
_LARGE, _STRIDE = 64 * 2**20, 4 * 2**20
_LISTED = 3


class Fingerprint(NamedTuple):
    """The identity of training data: the number of images, a hash of their names in order, and a hash of each file or drawn scene.

    A hash depends on the size and the contents of a file, not on its folder or modification time.
    """

    images: int
    names: str
    files: dict[str, list[tuple[str, str]]]  # by kind (hazy, clear, depth, records, scenes): (file name, hash) each

    def __str__(self) -> str:
        """Return a line such as "12 images (names 0a.., hazy 1b.., clear 2c..)"."""
        hashes = {"names": self.names}
        for kind, files in self.files.items():
            hashes[kind] = _digest(f"{name} {value}".encode(errors="surrogateescape") for name, value in files)
        return f"{self.images} images ({', '.join(f'{kind} {value}' for kind, value in hashes.items())})"

    def write(self, workdir: Path) -> None:
        """Write the fingerprint to `data.json` in `workdir`."""
        with replacing(workdir / DATA) as partial:
            partial.write_text(json.dumps(self._asdict()) + "\n")


def read_fingerprint(workdir: Path) -> Fingerprint | None:
    """Return the fingerprint of the data that the run in `workdir` began with; None if it is missing or cannot be read."""
    try:
        value = json.loads((workdir / DATA).read_text())
        files = {kind: [(str(name), str(digest)) for name, digest in entries] for kind, entries in value["files"].items()}
        return Fingerprint(int(value["images"]), str(value["names"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def fingerprint(samples: Sequence[Sample]) -> Fingerprint:
    """Compute the fingerprint of training data.

    Args:
      samples: the training samples from `split_samples`.

    Raises:
      UserError: a file cannot be read.
    """
    names = _digest(os.fsencode(sample.name) + (b" outdoors" if sample.kind == "outdoor" else b"") for sample in samples)
    paths = _files_by_kind(samples)
    drawn = [sample for sample in dict.fromkeys(samples) if not sample.files]
    scenes = {"scenes": [(sample.name, _digest(array.tobytes() for array in sample.read().values())) for sample in drawn]} if drawn else {}
    whole = sum(_size(path) for kind in paths.values() for path in kind) <= WHOLE_BYTES
    with ThreadPoolExecutor(8) as pool:  # on a network file system, nearly all of the time is spent waiting
        files = {kind: list(pool.map(lambda path: (path.name, _hash_file(path, whole=whole)), found)) for kind, found in paths.items()}
    return Fingerprint(len(samples), names, files | scenes)


def check_same_data(saved: str, now: Fingerprint, samples: Sequence[Sample], workdir: Path) -> str:
    """Check that a run may resume with the current data.

    They must be the data that the run began with, except that files which the run found damaged may have been repaired.

    Args:
      saved: the description of the data in a checkpoint.
      now: the fingerprint of `samples`.
      samples: the samples that the run would train on.
      workdir: the run's folder.

    Returns:
      The description of the data for later checkpoints of the run.

    Raises:
      UserError: the data are different; the message names the files that have changed, if they are known.
    """
    if saved == str(now):
        return saved
    if " (checksum " in saved and saved == _describe_as_0_1_0(samples):
        return str(now)
    then = read_fingerprint(workdir)
    if then is None or str(then) != saved or then.names != now.names or _names(then) != _names(now):
        raise UserError(f"it was trained on {saved}, but the data are now {now}")
    changed = [
        f"{kind} {name}" for kind in then.files for (name, before), (_, after) in zip(then.files[kind], now.files[kind]) if before != after
    ]
    if unexplained := [file for file in changed if file not in read_damaged(workdir)]:
        more = f" and {len(unexplained) - _LISTED} more" if len(unexplained) > _LISTED else ""
        raise UserError(f"it was trained on {saved}, of which {', '.join(unexplained[:_LISTED])}{more} have changed since")
    return saved


def _names(fingerprint: Fingerprint) -> dict[str, list[str]]:
    """Return the names of the files of each kind, without their hashes."""
    return {kind: [name for name, _ in files] for kind, files in fingerprint.files.items()}


def record_damaged(sample: Sample, workdir: Path) -> None:
    """Record that the files of a sample could not be read, so that the run may resume after they have been repaired."""
    files = {f"{kind} {path.name}" for kind, paths in _files_by_kind([sample]).items() for path in paths}
    with replacing(workdir / DAMAGED) as partial:
        partial.write_text(json.dumps(sorted(files | read_damaged(workdir))) + "\n")


def read_damaged(workdir: Path) -> set[str]:
    """Return the files that `record_damaged` has recorded."""
    try:
        return set(map(str, json.loads((workdir / DAMAGED).read_text())))
    except (OSError, ValueError, TypeError):
        return set()


def _describe_as_0_1_0(samples: Sequence[Sample]) -> str:
    """Return the description that version 0.1.0 made from the names and the first clear image."""
    checksum = zlib.crc32("\n".join(sample.name for sample in samples).encode(errors="surrogateescape"))
    checksum = zlib.crc32(np.ascontiguousarray(samples[0].read()["clear"]).tobytes(), checksum)
    return f"{len(samples)} images (checksum {checksum:08x})"


def _files_by_kind(samples: Sequence[Sample]) -> dict[str, list[Path]]:
    """Return the files of the samples by kind (`hazy`, `clear`, `depth`, `records`), each file once."""
    files: dict[str, dict[Path, None]] = {}
    for sample in samples:
        for kind, path in sample.files.items():
            files.setdefault(kind, {})[path] = None
    return {kind: list(paths) for kind, paths in files.items()}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _hash_file(path: Path, *, whole: bool) -> str:
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
    return digest.hexdigest()[:12]


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:12]
