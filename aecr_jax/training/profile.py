"""Profiles of a run by `jax.profiler`: a trace of some steps, and a server from which traces can be taken at any time."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from aecr_jax.errors import UserError, first_line
from aecr_jax.files import make_folder, replacing
from aecr_jax.processes import is_main
from aecr_jax.storage import is_remote

PROFILE = "profile"


class Tracer:
    """Writes a trace of some steps to `profile/` in the work directory. Only process 0 writes one, of its own devices.

    Call `begin` before each step is computed, and `end` after it.

    Args:
      steps: the steps to trace, `RunConfig.profiled`; a run that resumes among them traces the remaining ones.
      workdir: the run's folder.
    """

    def __init__(self, steps: range, workdir: Path):
        self._steps = steps if is_main() else range(0)
        self._folder = workdir / PROFILE
        self._running = False

    def begin(self, step: int, state: object) -> bool:
        """If this is the first step to trace, wait until `state` is computed and start the trace; return whether it was started.

        Raises:
          UserError: the folder cannot be made.
        """
        if step not in self._steps or self._running:
            return False
        jax.block_until_ready(state)
        # The profiler writes to the disk only, so a trace for object storage is uploaded at the end.
        self._local = Path(tempfile.mkdtemp(prefix="aecr_jax-profile-")) if is_remote(self._folder) else make_folder(self._folder)
        jax.profiler.start_trace(self._local)
        self._running = True
        return True

    def end(self, step: int, state: object) -> str:
        """If this was the last step to trace, wait until `state` is computed and write the trace.

        Returns:
          A message that names the folder, or "".

        Raises:
          UserError: the trace cannot be written.
        """
        if not self._running or step + 1 in self._steps:
            return ""
        jax.block_until_ready(state)
        self.close()
        return f"step {step}: the profile is in {self._folder}"

    def close(self) -> None:
        """Write a trace that is still running, of a run that ends early; raise UserError if it cannot be written."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            raise UserError(f"no profile can be written to {self._folder}: {first_line(error)}") from error
        if is_remote(self._folder):
            for path in sorted(path for path in self._local.rglob("*") if path.is_file()):
                with replacing(self._folder / path.relative_to(self._local)) as partial:
                    shutil.move(path, partial)
            shutil.rmtree(self._local)


@contextlib.contextmanager
def profiler_server(port: int) -> Iterator[None]:
    """Serve JAX's profiler on a port while the context is active, if `port` is not 0. The devices must have been found before.

    Raises:
      UserError: the port cannot be used.
    """
    if not port:
        yield
        return
    try:
        # The port is tried first, because the server would log a failure and go on.
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise UserError(f"run.profiler_port (={port}) cannot be used: {error.strerror or error}; choose another port") from error
    jax.profiler.start_server(port)
    try:
        yield
    finally:
        jax.profiler.stop_server()
