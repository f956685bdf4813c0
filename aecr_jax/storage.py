"""Object storage: the folder of a run may be an address such as `gs://bucket/run`.

etils.epath gives such an address the methods of a `pathlib.Path`, and gcsfs, which the extra `gcs` installs, transfers the objects. An
object store has no folders, no links and no appending; a name refers to the old object until the whole new one has been uploaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from aecr_jax.errors import UserError, first_line

_SCHEME = "gs://"
# The packages that transfer objects raise errors of many types, of which only some are OSErrors.
_CLIENTS = ("aiohttp", "gcsfs", "google", "requests", "urllib3")


def is_remote(path: str | Path) -> bool:
    """Return whether a path, or the text of one, is an address in object storage."""
    return str(path).startswith(_SCHEME)


def has_scheme(text: str) -> bool:
    """Return whether the text is an address such as `gs://bucket/run` rather than the path of a file or folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def as_path(path: str | Path) -> Path:
    """Return the path that a name means: of a file or folder or, for `gs://BUCKET/NAME`, of an object, with the same methods.

    Raises:
      UserError: the address is malformed or of another kind of storage, or gcsfs is not installed.
    """
    text = re.sub("^gs:/(?!/)", _SCHEME, str(path)) if isinstance(path, Path) else str(path)  # pathlib turns // into /
    if not has_scheme(text):
        return Path(path)
    if not is_remote(text):
        raise UserError(
            f"{text} cannot hold a run: orbax writes checkpoints to folders and to gs:// only; name gs://BUCKET/NAME, or a folder where the"
            " storage is mounted, for example with s3fs or gcsfuse, or on EFS"
        )
    if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+/[^/].*", text):
        raise UserError(f"{text} must be gs://BUCKET/NAME, with the name of a bucket and that of a folder in it")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text} needs the extra gcs: run `pip install 'aecr-jax[gcs]'`")
    import fsspec
    from etils import epath

    # Checkpoints are written past gcsfs, and other processes write too, so a listing that it has kept would be wrong.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    os.environ.setdefault("EPATH_USE_TF", "false")  # otherwise epath uses TensorFlow, where it is installed, instead of gcsfs
    return cast(Path, epath.Path(text.rstrip("/")))


def resolve(path: Path) -> Path:
    """Return the absolute path without links; an address already is absolute."""
    return path if is_remote(path) else path.resolve()


def check_readable(path: Path) -> None:
    """Raise UserError if a path or an address cannot be examined, for instance for lack of permission; it need not exist."""
    try:
        path.is_dir()
    except Exception as error:
        if not isinstance(error, OSError) and explain(error) is None:
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read: {reason}") from error


def explain(error: BaseException) -> str | None:
    """Return a one-line description of an error of the packages that transfer objects, or None for any other error."""
    if type(error).__module__.partition(".")[0] in _CLIENTS:
        return first_line(error)
    return None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within a `with` statement, raise UserError, which names the file or object, in place of an error of the disk or of object storage."""
    try:
        yield
    except Exception as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else explain(error)
        if reason is None:
            raise
        raise UserError(f"{path} cannot be written: {reason}") from error


class GuardedObject:
    """An object that processes create, replace and delete only as long as its generation is the one that they have seen.

    The generation is a number that changes whenever an object is written; 0 stands for an object that does not exist. All methods raise the
    errors of google-cloud-storage, which `explain` describes.
    """

    def __init__(self, path: Path):
        from google.api_core import exceptions
        from google.cloud import storage

        bucket, _, self._name = str(path).removeprefix(_SCHEME).partition("/")
        self._bucket = storage.Client().bucket(bucket)
        self._missing, self._changed = exceptions.NotFound, exceptions.PreconditionFailed

    def read(self) -> tuple[bytes, int]:
        """Return the content and the generation, or `(b"", 0)` if there is no such object."""
        while (blob := self._bucket.get_blob(self._name)) is not None:
            try:
                return blob.download_as_bytes(if_generation_match=blob.generation), blob.generation
            except (self._missing, self._changed):
                continue
        return b"", 0

    def generation(self) -> int:
        """Return the generation."""
        blob = self._bucket.get_blob(self._name)
        return 0 if blob is None else blob.generation

    def write(self, content: str, generation: int) -> int | None:
        """Replace the object of that generation, and return the new generation; return None if it no longer is of that generation."""
        blob = self._bucket.blob(self._name)
        try:
            blob.upload_from_string(content, content_type="application/json", if_generation_match=generation)
        except self._changed:
            return None
        return blob.generation

    def delete(self, generation: int) -> None:
        """Delete the object if it still is of that generation."""
        with contextlib.suppress(self._missing, self._changed):
            self._bucket.blob(self._name).delete(if_generation_match=generation)
