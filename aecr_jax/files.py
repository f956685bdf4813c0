"""Output folders and files: written completely or not at all, and never replacing a file without the user's consent."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from aecr_jax.errors import UserError
from aecr_jax.storage import as_path, is_remote, writing


def make_folder(folder: str | Path) -> Path:
    """Create an output folder and its parents if they do not exist, and return its path.

    An address in object storage is returned as it is, because an object store has no folders.

    Raises:
      UserError: the folder cannot be created or written, or the address is malformed.
    """
    folder = as_path(folder)
    if is_remote(folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(None, "no permission to write there")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    return folder


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; at the end of the body it is renamed to `path` in one step.

    If the body raises or the machine stops, `path` is unchanged. Missing parent folders are created. If `path` is an address in object
    storage, the temporary file is a local one, and is uploaded at the end.

    Raises:
      UserError: the file cannot be written, or the body raises an OSError.
    """
    path = as_path(path)
    if is_remote(path):
        with _uploading(path) as partial:
            yield partial
        return
    make_folder(path.parent)
    # The process id separates concurrent writers. The name is cut because file systems allow 255 bytes, and a character takes up to 4.
    partial = path.with_name(f".{path.name[:60]}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _uploading(path: Path) -> Iterator[Path]:
    with writing(path), tempfile.TemporaryDirectory(prefix="aecr_jax-") as folder:
        partial = Path(folder) / path.name
        yield partial
        path.write_bytes(partial.read_bytes())


def replaces(output: str | Path, source: str | Path) -> bool:
    """Return whether `source` exists and would be replaced by writing to `output`, also under another name or by a link."""
    return os.path.exists(output) and os.path.exists(source) and os.path.samefile(output, source)


def refuse_existing(path: str | Path, *, overwrite: bool = False) -> None:
    """Raise an error if the output file already exists, unless `overwrite` is set.

    Raises:
      UserError: `path` exists and `overwrite` is not set.
    """
    path = as_path(path)
    if not overwrite and (path.exists() if is_remote(path) else os.path.lexists(path)):
        raise UserError(f"{path} already exists: choose another output, or add --overwrite to replace it")
