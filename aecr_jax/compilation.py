"""How XLA compiles for the commands: flags that make CPUs faster, and compiled programs kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax
from filelock import FileLock

# XLA's CPU backend takes a library for single convolutions that is slow for many of this network's: without it a train step takes
# 0.6 of the time (see the README). XLA ends the process at a flag that it does not know, so only measured releases get it.
_CPU_FLAG, _CPU_VALUE = "--xla_cpu_experimental_ynn_fusion_type", "-individual_convolution"
_MEASURED = ("0.10.2",)

CACHE_BYTES = 2 * 2**30
# JAX looks at each of them when it writes one.
CACHE_ENTRIES = 2000


def set_up() -> None:
    """Sets XLA's flags and the persistent compilation cache. To be called before the first computation.

    What the user has set stays: the same flag in `XLA_FLAGS`, or JAX's settings of the cache (`JAX_COMPILATION_CACHE_DIR`,
    `JAX_ENABLE_COMPILATION_CACHE`). The cache is in `$XDG_CACHE_HOME/aecr_jax` (or `~/.cache/aecr_jax`), a folder for each kind of
    processor of at most `CACHE_BYTES` and `CACHE_ENTRIES`; where it cannot be written there is none.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    on_cpu = "cpu" in os.environ.get("JAX_PLATFORMS", "cpu")
    # XLA reads a value that does not begin with a dash as the name of a file of flags.
    extensible = not flags or flags.startswith("-")
    if on_cpu and extensible and _CPU_FLAG not in flags and platform.machine() in ("x86_64", "AMD64") and version("jaxlib") in _MEASURED:
        os.environ["XLA_FLAGS"] = f"{flags} {_CPU_FLAG}={_CPU_VALUE}".strip()
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return
    try:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        # A home may be shared by machines whose processors differ, and programs for one crash on the other.
        folder = Path(home).expanduser() / "aecr_jax" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder)
    except (OSError, RuntimeError):  # no home, no right to write, no locks on this file system, or another process that holds it long
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    # The many small programs around the large one take seconds together.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def tidy(folder: Path) -> None:
    """Deletes from JAX's cache what a killed process or a full disk left half-written, and the entries that went unused the longest.

    JAX would warn of a torn entry forever and not replace it. An entry is two files; the second, `-atime`, is written when the first is
    whole, and again at each use.
    """
    with FileLock(folder / ".lockfile", timeout=1):  # the one that JAX takes
        used: list[tuple[float, Path, Path]] = []
        for entry in folder.glob("*-cache"):
            stamp = entry.with_name(entry.name.removesuffix("-cache") + "-atime")
            if stamp.exists():
                used.append((stamp.stat().st_mtime, entry, stamp))
            else:
                entry.unlink()
        for _, entry, stamp in sorted(used)[:-CACHE_ENTRIES]:
            entry.unlink()
            stamp.unlink()


def _processor() -> str:
    features = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return hashlib.sha256(features.encode()).hexdigest()[:12]
