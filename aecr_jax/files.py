"""Folders and files: written completely or not at all, and never over something that the user did not offer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from aecr_jax.errors import UserError


def make_folder(folder: str | Path) -> Path:
    """Make a folder to write into, and its parents.

    Raises:
      UserError: it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(None, "no permission to write there")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    return folder


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; at the end it becomes `path` in one step.

    If the body raises, or the machine stops, `path` is what it was before. Missing parent folders are made.

    Raises:
      UserError: the file cannot be written (an OSError of the body included).
    """
    path = Path(path)
    make_folder(path.parent)
    # The process id keeps two writers apart. The name stays short: file systems allow 255 bytes, and a character takes up to 4.
    partial = path.with_name(f".{path.name[:60]}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def refuse_existing(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuse to replace a file that is already there, unless `overwrite` is set.

    Raises:
      UserError: `path` exists.
    """
    if not overwrite and os.path.lexists(path):
        raise UserError(f"{path} already exists: name another output, or add --overwrite to replace it")
