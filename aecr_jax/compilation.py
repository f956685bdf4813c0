"""How XLA compiles: flags that make CPUs faster, and which compiled programs are kept, on disk and in memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from filelock import FileLock

from aecr_jax.errors import UserError

# XLA's CPU backend takes a library for single convolutions that is slow for many of this network's: without it a train step takes
# 0.6 of the time (see the README). XLA ends the process at a flag that it does not know, so only measured releases get it.
_CPU_FLAG, _CPU_VALUE = "--xla_cpu_experimental_ynn_fusion_type", "-individual_convolution"
_MEASURED = ("0.10.2",)

CACHE_BYTES = 2 * 2**30
# JAX looks at each of them when it writes one.
CACHE_ENTRIES = 2000
# Programs of one function that `bounded_jit` keeps in memory, about 10 MB each.
PROGRAMS = 8
# Where Linux shows a container its own limit (control groups, version 2).
_CONTROL_GROUP = Path("/sys/fs/cgroup")


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


class NotEnoughMemory(UserError):
    """A program needs more memory than there is. `needed` and `available` are in bytes; the latter is None if it is not known."""

    def __init__(self, needed: int, available: int | None):
        there = "less is available" if available is None else f"{available / 1e9:.3g} GB are available"
        super().__init__(f"it takes {needed / 1e9:.3g} GB of memory, and {there}")
        self.needed, self.available = needed, available


def bounded_jit(function: Callable[..., jax.Array]) -> Callable[..., np.ndarray]:
    """Compile a function of arrays like `jax.jit`, for inputs of ever new sizes.

    Only the programs of the `PROGRAMS` combinations of shapes that were used last are kept, where `jax.jit` keeps all of them. On a CPU,
    the memory that XLA planned is compared with what is available before a program runs: without that, the system ends the process.

    Returns:
      A function that takes pytrees of arrays on one device, or of NumPy arrays, and returns a NumPy array.

    Raises:
      NotEnoughMemory: by the returned function, if the program does not fit into memory.
    """

    @functools.lru_cache(PROGRAMS)
    def compile_for(tree: Any, leaves: tuple[tuple[tuple[int, ...], Any], ...]) -> tuple[jax.stages.Compiled, int]:
        arguments = tree.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])

        # A new function each time: JAX's caches hold what was traced for as long as the traced function is there.
        @functools.wraps(function)
        def traced(*arrays: Any) -> jax.Array:
            return function(*arrays)

        program = jax.jit(traced).lower(*arguments).compile()
        memory = program.memory_analysis()
        return program, memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else 0

    def call(*arguments: Any) -> np.ndarray:
        leaves, tree = jax.tree.flatten(arguments)
        needed = 0
        try:
            program, needed = compile_for(tree, tuple((leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)) for leaf in leaves))
            if jax.default_backend() == "cpu" and needed > (available := available_memory()):
                raise NotEnoughMemory(needed, available)
            return np.asarray(program(*arguments))  # waits for it: errors of a computation come late
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise NotEnoughMemory(needed, None) from error

    return call


def available_memory() -> int:
    """The bytes that this process can still take: the machine's, its container's and its own limit (`ulimit -v`)."""
    available = [psutil.virtual_memory().available]
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
            available.append(limit - psutil.Process().memory_info().vms)
    with contextlib.suppress(OSError, ValueError, KeyError):  # no such file, or no limit, which is written as "max"
        statistics = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text().splitlines())
        # Not what the files in use say: they count the file cache, which gives way.
        available.append(int((_CONTROL_GROUP / "memory.max").read_text()) - int(statistics["anon"]))
    return min(available)
