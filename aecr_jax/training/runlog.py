"""The readable output of a run: config, versions, metrics, panels, TensorBoard. Only process 0 writes it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aecr_jax.data.images import panel, write_image
from aecr_jax.errors import UserError, first_line
from aecr_jax.files import make_folder, replacing
from aecr_jax.processes import is_main
from aecr_jax.storage import is_remote
from aecr_jax.training.config import Config, config_to_dict

CONFIG, METRICS, VERSIONS, PANELS = "config.json", "metrics.jsonl", "versions.json", "panels"
_PACKAGES = ("aecr-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


class RunLog:
    """Writes `config.json`, `versions.json`, `metrics.jsonl`, `panels/*.png` and, if set, `tensorboard/`.

    When a run resumes at step `first`, later entries of `metrics.jsonl` are removed. In object storage, which cannot append, each entry
    uploads the whole file.

    Args:
      workdir: the run's folder.
      config: the settings.
      first: number of steps taken before the run starts or resumes.
      hosts: number of machines, see `versions`.

    Raises:
      UserError: the folder cannot be written, or its `metrics.jsonl` is damaged.
    """

    def __init__(self, workdir: Path, config: Config, first: int, hosts: int):
        self._workdir = workdir
        self._board: Any = None
        self._lines: list[str] = []
        self.evaluated: set[int] = set()
        """The steps at which the run was evaluated before it starts or resumes; known to process 0."""
        if not is_main():
            return
        path = workdir / METRICS
        try:
            lines = path.read_text().splitlines() if path.exists() else []
            entries = [(line, json.loads(line)) for line in lines if line.endswith("}")]
            kept = [(line, entry["step"], entry["kind"]) for line, entry in entries if entry["step"] <= first]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {first_line(error)}; move it away to continue without the earlier entries") from error
        self._lines = [line + "\n" for line, *_ in kept]
        self.evaluated = {step for _, step, kind in kept if kind == "eval"}
        _write(path, "".join(self._lines))
        _write(workdir / CONFIG, json.dumps(config_to_dict(config), indent=2) + "\n")
        _write(workdir / VERSIONS, json.dumps(versions(hosts), indent=2) + "\n")
        if config.run.tensorboard:
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(str(make_folder(workdir / "tensorboard")), purge_step=first + 1)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`, and write its numbers to TensorBoard if that is set.

        Raises:
          UserError: the file cannot be written.
        """
        if not is_main():
            return
        path = self._workdir / METRICS
        line = json.dumps({"step": step, "kind": kind, "time": round(time.time(), 3), **values})
        if is_remote(path):
            self._lines.append(line + "\n")
            _write(path, "".join(self._lines))
        else:
            _append(path, line + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
            self._board.flush()

    def write_panel(self, step: int, rows: Sequence[Sequence[np.ndarray]]) -> None:
        """Write rows of images (hazy, restored, clear) to `panels/step_N.png`."""
        if not is_main() or not rows:
            return
        picture = panel(rows)
        write_image(self._workdir / PANELS / f"step_{step:07d}.png", picture)
        if self._board is not None:
            self._board.add_image("hazy_restored_clear", picture, step, dataformats="HWC")
            self._board.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text)


def _append(path: Path, text: str) -> None:
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def versions(hosts: int) -> dict[str, Any]:
    """Return a description of the machine, its compiler flags, and the versions of the packages.

    Args:
      hosts: number of machines, which cannot be found in one process.
    """
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed as a package"
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": f"{len(devices)} {devices[0].device_kind}",
        "device_kind": devices[0].device_kind,
        "topology": topology(devices),
        "hosts": hosts,
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "packages": packages,
    }


def topology(devices: Sequence[Any]) -> str:
    """Return the arrangement of the devices of all processes.

    For TPUs, this is the number of chips along each axis, such as "4x4x1", with the number of slices if there are several, as in
    "2 slices of 4x4x1". For other devices, it is their number per process, such as "4 processes of 8".
    """
    if devices[0].platform != "tpu":
        processes = len({device.process_index for device in devices})
        return f"{processes} process{'es' if processes > 1 else ''} of {len(devices) // processes}"
    shape = "x".join(str(max(axis) - min(axis) + 1) for axis in zip(*(device.coords for device in devices)))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return f"{slices} slices of {shape}" if slices > 1 else shape
