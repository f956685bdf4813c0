"""onnxruntime-web, which runs the models in the browser: one version of the npm package, checked before it is used."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from aecr_jax.errors import UserError
from aecr_jax.files import replacing

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web@{VERSION}"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""The checksum of the package file as npm's registry states it, in the notation of package-lock.json."""
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
"""What the page needs of the package: JavaScript, and the operators for processors (not for GPUs)."""


def read_runtime(package: str | Path | None = None) -> dict[str, bytes]:
    """Return the content of `FILES`.

    Args:
      package: the package file that `npm pack` writes. By default, npm downloads it once, into the folder of the compilation cache.

    Raises:
      UserError: the file is missing or is not this version of the package, or npm cannot download it.
    """
    content = _download() if package is None else _read(Path(package))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {name: archive.extractfile(f"package/dist/{name}") for name in FILES}
        return {name: file.read() for name, file in files.items() if file is not None}


def _matches(content: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(content).digest()).decode() == INTEGRITY.partition("-")[2]


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--runtime (={path}) cannot be read: {error.strerror or error}") from error
    if not _matches(content):
        raise UserError(f"--runtime (={path}) is not the package {PACKAGE}: its checksum is another; write it with `npm pack {PACKAGE}`")
    return content


def _download() -> bytes:
    """Return the package from the cache folder, or let npm download it to there."""
    cached: Path | None = None
    try:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cached = Path(home).expanduser() / "aecr_jax" / f"onnxruntime-web-{VERSION}.tgz"
        if _matches(content := cached.read_bytes()):
            return content
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError):  # no home, or no permission to read
        cached = None
    content = _pack()
    if cached:
        with contextlib.suppress(UserError), replacing(cached) as partial:  # without a cache, the next call downloads it again
            partial.write_bytes(content)
    return content


def _pack() -> bytes:
    """Let npm download the package, and check it."""
    remedy = f"or run `npm pack {PACKAGE}` on another machine and add --runtime FILE"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"the page needs {PACKAGE}, which npm downloads, and npm was not found: install Node.js, {remedy}")
    print(f"downloading {PACKAGE} with npm", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [npm, "pack", PACKAGE, "--ignore-scripts", "--pack-destination", folder], cwd=folder, capture_output=True, text=True
        )
        packages = list(Path(folder).glob("*.tgz"))
        if done.returncode or not packages:
            lines = [line for line in done.stderr.splitlines() if line.startswith("npm error")] or [f"status {done.returncode}"]
            raise UserError(f"npm could not download {PACKAGE} ({lines[0]}): repeat the command, {remedy}")
        content = packages[0].read_bytes()
    if not _matches(content):
        raise UserError(f"what npm downloaded is not {PACKAGE}: its checksum is another; repeat the command, {remedy}")
    return content
