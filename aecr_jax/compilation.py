"""XLA compilation: flags that make programs faster on CPUs, and limits on the compiled programs kept on disk and in memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aecr_jax.errors import UserError
from aecr_jax.storage import is_remote

# For single convolutions, XLA's CPU backend uses a library that is slow for many of this network's convolutions; without it, a
# training step takes 0.6 to 0.8 of the time (see docs/speed.md). XLA ends the process if it does not know a flag, so the flag is set only
# for releases with which it was measured.
_CPU_FLAG, _CPU_VALUE = "--xla_cpu_experimental_ynn_fusion_type", "-individual_convolution"
_MEASURED = ("0.10.2", "0.11.2", "0.12.0.1")

CACHE_BYTES = 2 * 2**30
# The number is limited because JAX examines every entry whenever it writes one.
CACHE_ENTRIES = 2000
# Name of the cache's folder in the work directory of a run of several processes.
COMPILED = "compiled"
# Number of programs of one function that `bounded_jit` keeps in memory; each takes about 10 MB.
PROGRAMS = 16
# The folder in which Linux shows a container's own limits (control groups, version 2).
_CONTROL_GROUP = Path("/sys/fs/cgroup")
# Whether `set_up` has been called and the user has no settings of the cache.
_automatic = False


def set_up() -> None:
    """Set XLA's flags and the persistent compilation cache. Call this function before the first computation.

    Settings of the user take precedence: the same flag in `XLA_FLAGS`, or JAX's settings of the cache (`JAX_COMPILATION_CACHE_DIR`,
    `JAX_ENABLE_COMPILATION_CACHE`). The cache is in `$XDG_CACHE_HOME/aecr_jax` (or `~/.cache/aecr_jax`). It has one folder for each
    kind of processor, limited to `CACHE_BYTES` and `CACHE_ENTRIES`. If the folder cannot be written, there is no cache.
    A run of several processes then calls `share_cache`.
    """
    global _automatic
    flags = os.environ.get("XLA_FLAGS", "").strip()
    on_cpu = "cpu" in os.environ.get("JAX_PLATFORMS", "cpu")
    # XLA interprets a value that does not begin with a dash as the name of a file that contains flags.
    extensible = not flags or flags.startswith("-")
    if on_cpu and extensible and _CPU_FLAG not in flags and platform.machine() in ("x86_64", "AMD64") and version("jaxlib") in _MEASURED:
        os.environ["XLA_FLAGS"] = f"{flags} {_CPU_FLAG}={_CPU_VALUE}".strip()
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return
    _automatic = True
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with contextlib.suppress(OSError, RuntimeError):  # there is no home, or the folder cannot be used
        # Machines with different processors may share a home directory, and programs compiled for one may crash on another.
        _keep_programs(Path(home).expanduser() / "aecr_jax" / _processor())


def share_cache(workdir: Path) -> str:
    """Move the cache to the folder `compiled` in a run's work directory, which its processes share. Every process must call this.

    Only process 0 writes JAX's cache. In a folder of its own, each of the other processes would never find a program and would compile
    everything at every start. On CPUs they do so all the same, because the key of a program differs between the processes there.
    Settings of the user (see `set_up`) take precedence.

    Returns:
      What to set if the folder cannot be used, or "".
    """
    if not _automatic:
        return ""
    folder = workdir / COMPILED
    if jax.default_backend() == "cpu":  # programs for other devices do not depend on the processor
        folder /= _processor()
    try:
        _keep_programs(folder)
    except OSError as error:
        return (
            f"compiled programs cannot be kept in {folder}: {error.strerror or error}; for fast restarts, set JAX_COMPILATION_CACHE_DIR to"
            " a folder that all processes share"
        )
    compilation_cache.reset_cache()  # JAX opens the folder only once
    return ""


def _keep_programs(folder: Path) -> None:
    """Let JAX keep its compiled programs in a folder.

    Raises:
      OSError: the folder cannot be written, the file system has no locks, or the lock is held for too long.
    """
    remote = is_remote(folder)  # an object store has no locks, without which JAX cannot limit the size
    if not remote:
        folder.mkdir(parents=True, exist_ok=True)
        if not jax.distributed.is_initialized() or jax.process_index() == 0:
            tidy(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", -1 if remote else CACHE_BYTES)
    # If a program cannot be written, for example because the disk is full, the command goes on without the cache.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
    # Together, the many small programs around the large one take seconds to compile, so they are cached too.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def tidy(folder: Path) -> None:
    """Delete incomplete entries from JAX's cache, left by a killed process or a full disk, and the least recently used entries.

    JAX would warn about an incomplete entry at each use and never replace it. An entry consists of two files; the second, `-atime`, is
    written when the first is complete, and again at each use.
    """
    with FileLock(folder / ".lockfile", timeout=1):  # the lock that JAX itself uses
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
    """A program needs more memory than is available. `needed` and `available` are in bytes; `available` is None if it is not known."""

    def __init__(self, needed: int, available: int | None):
        there = "less is available" if available is None else f"only {available / 1e9:.3g} GB are available"
        super().__init__(f"it takes {needed / 1e9:.3g} GB of memory, but {there}")
        self.needed, self.available = needed, available


def bounded_jit(function: Callable[..., Any], find_mesh: Callable[[], Mesh] | None = None) -> Callable[..., Any]:
    """Compile a function of arrays like `jax.jit`, for inputs of many different sizes.

    Only the programs for the `PROGRAMS` most recently used combinations of shapes are kept, whereas `jax.jit` keeps all of them. On a
    CPU, the memory that XLA has planned is compared with the available memory before a program runs; without this check, the operating
    system would end the process.

    Args:
      function: takes and returns pytrees of arrays.
      find_mesh: for a program of several devices, returns a mesh with the axis `data`. The first argument of `function` is then replicated
        over it, and the first axes of the others are divided among its devices.

    Returns:
      A function that takes pytrees of arrays on one device, or of NumPy arrays, and returns the function's result with NumPy arrays. With a
      mesh, arrays of the first argument are on all its devices.

    Raises:
      NotEnoughMemory: raised by the returned function if the program does not fit into memory.
    """

    @functools.lru_cache(PROGRAMS)
    def compile_for(tree: Any, leaves: tuple[tuple[tuple[int, ...], Any], ...]) -> tuple[jax.stages.Compiled, int]:
        arguments = tree.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])

        # A new function is defined each time, because JAX's caches hold a traced program for as long as the traced function exists.
        @functools.wraps(function)
        def traced(*arrays: Any) -> Any:
            return function(*arrays)

        if find_mesh is None:
            devices, jitted = 1, jax.jit(traced)
        else:
            devices = (mesh := find_mesh()).size
            whole, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
            jitted = jax.jit(traced, in_shardings=(whole, *[split] * (len(arguments) - 1)))
        program = jitted.lower(*arguments).compile()
        memory = program.memory_analysis()  # of one device; simulated ones share the memory of the machine
        return program, devices * (memory.temp_size_in_bytes + memory.output_size_in_bytes) if memory else 0

    def call(*arguments: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        needed = 0
        try:
            program, needed = compile_for(tree, tuple((leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)) for leaf in leaves))
            if jax.default_backend() == "cpu" and needed > (available := available_memory()):
                raise NotEnoughMemory(needed, available)
            # This waits for the result, because a computation raises its errors late.
            return jax.tree.map(np.asarray, program(*arguments))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise NotEnoughMemory(needed, None) from error

    return call


def available_memory() -> int:
    """Return how many bytes this process can still allocate, given the machine's, the container's and its own limit (`ulimit -v`)."""
    available = [psutil.virtual_memory().available]
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
            available.append(limit - psutil.Process().memory_info().vms)
    with contextlib.suppress(OSError, ValueError, KeyError):  # there is no such file, or the limit is "max" (none)
        statistics = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text().splitlines())
        # Only anonymous memory is subtracted: the total usage (memory.current) includes the file cache, which can be reclaimed.
        available.append(int((_CONTROL_GROUP / "memory.max").read_text()) - int(statistics["anon"]))
    return min(available)
