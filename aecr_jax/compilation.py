"""How XLA compiles for the commands: flags that make CPUs faster, and compiled programs kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax
from filelock import FileLock, Timeout

# XLA's CPU backend takes a library for single convolutions that is slow for many of this network's: without it a train step takes
# 0.7 of the time (see `benchmark train`). Another release may not know the flag, and XLA ends the process at one that it does not know.
_CPU_FLAG, _CPU_VALUE = "--xla_cpu_experimental_ynn_fusion_type", "-individual_convolution"
_KNOWN_BY = "0.10."

CACHE_BYTES = 2 * 2**30


def set_up() -> None:
    """Sets XLA's flags and the persistent compilation cache. To be called before the first computation.

    What the user has set stays: the same flag in `XLA_FLAGS`, or `JAX_COMPILATION_CACHE_DIR`. The cache is in
    `$XDG_CACHE_HOME/aecr_jax` (or `~/.cache/aecr_jax`), of at most `CACHE_BYTES`; where it cannot be written there is none.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    measured = platform.machine() in ("x86_64", "AMD64") and version("jaxlib").startswith(_KNOWN_BY)
    if measured and _CPU_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_CPU_FLAG}={_CPU_VALUE}".strip()
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    # A home may be shared by machines whose processors differ, and programs for one crash on the other.
    folder = Path(home).expanduser() / "aecr_jax" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
    except (OSError, Timeout):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    # The many small programs around the large one take seconds together.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def remove_unfinished(folder: Path) -> None:
    """Deletes what a killed process or a full disk left half-written in JAX's cache: JAX would warn of it forever and not replace it.

    An entry is two files, and the second (`-atime`) is written when the first is whole.
    """
    with FileLock(folder / ".lockfile", timeout=10):  # the one that JAX takes
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()


def _processor() -> str:
    features = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return hashlib.sha256(features.encode()).hexdigest()[:12]
