"""Save and restore the checkpoints of training runs with orbax, and move damaged ones aside.

A checkpoint holds the parameters and their moving average, running statistics, optimizer state, step, the position in the input, the
config, and checksums of every array and of the JSON parts.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import preservation_policy

from aecr_jax.errors import UserError, first_line
from aecr_jax.inference.weights import CHECKPOINTS, SEAL, checksums, get_psnr, json_checksum, list_steps, read_json, read_psnr, verify
from aecr_jax.networks import registry
from aecr_jax.renamed import migrate
from aecr_jax.storage import as_path, is_remote, resolve
from aecr_jax.training.config import Config, config_to_dict
from aecr_jax.training.step import TrainState

log = logging.getLogger(__name__)


class Position(NamedTuple):
    """The position in the training data."""

    images: int  # number of images read so far
    data: str  # the data that they were read from, as described by a `Fingerprint`


class Restored(NamedTuple):
    """The state from which a run resumes."""

    state: TrainState
    position: Position
    changes: list[str]  # settings that have changed, such as "optim.batch: 8 -> 16"


class Checkpoints:
    """The checkpoints of a training run in `workdir/checkpoints`; the last two and the best by validation PSNR are kept.

    On construction, checkpoints whose metrics cannot be read are moved aside with a warning.

    Args:
      workdir: the folder of the run.
      check: called immediately before a checkpoint is written; raises UserError if this run must not write.

    Raises:
      UserError: there are checkpoints, but the metrics of none can be read.
    """

    def __init__(self, workdir: str | Path, check: Callable[[], None] = lambda: None):
        self._check, self.folder = check, resolve(as_path(workdir)) / CHECKPOINTS
        # Check this first: orbax reads the metrics of every checkpoint and raises at the first that is damaged.
        failed, steps = [], list_steps(self.folder)
        for step in steps:
            try:
                read_psnr(self.folder / str(step))
            except Exception as error:
                self._warn(step, error)
                failed.append(step)
        if failed == steps != []:  # otherwise the run would start from the beginning and truncate its log
            raise self._none_is_whole()
        if jax.process_count() > 1:  # all processes must have read before process 0 renames
            multihost_utils.sync_global_devices("metrics of checkpoints read")
        self._rename(failed)
        keep = preservation_policy.AnyPreservationPolicy(
            [preservation_policy.LatestN(2), preservation_policy.BestN(get_metric_fn=get_psnr, n=1)]
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=get_psnr, best_mode="max", preservation_policy=keep, create=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def save(self, state: TrainState, config: Config, position: Position, psnr: float = -np.inf) -> None:
        """Save a checkpoint in the background; it is written completely or not at all. Every process of a run must call this.

        The caller may donate the arrays of `state` at once, because a copy is saved. Only one checkpoint is written at a time: if the
        previous one is not finished, this waits for it.

        Raises:
          UserError: there is not enough space, or the previous checkpoint could not be written. `check_written`, `wait` or `close` raises
            it if this one cannot be written.
        """
        self._join()
        self._check_space(state)
        if jax.process_count() > 1:
            # Orbax synchronizes the processes by collectives. From another thread, these could run in another order than those of the
            # step, which differs between processes, and all would wait forever. Orbax itself writes the files in the background.
            self._write(state, config, position, psnr)
            return
        copy = jax.tree.map(np.array, jax.device_get(state))  # on a CPU, `device_get` returns views
        self._saving = self._thread.submit(self._write, copy, config, position, psnr, wait=True)

    def check_written(self) -> None:
        """Raise UserError if the checkpoint that was written in the background has failed; do not wait for it."""
        if self._saving is not None and self._saving.done():
            self._join()

    def _join(self) -> None:
        """Wait until the background thread has written its checkpoint, and raise its error."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _write(self, state: TrainState, config: Config, position: Position, psnr: float, *, wait: bool = False) -> None:
        model, optimizer = _items(state)
        metrics = {"psnr": psnr}
        facts: dict[str, Any] = {
            "input": position._asdict(),
            "config": config_to_dict(config),
            "checksums": {"model": checksums(model), "optimizer": checksums(optimizer)},
        }
        facts[SEAL] = {name: json_checksum(value) for name, value in {**facts, "metrics": metrics}.items()}
        items = {
            "model": ocp.args.StandardSave(model),
            "optimizer": ocp.args.StandardSave(optimizer),
            **{name: ocp.args.JsonSave(value) for name, value in facts.items()},
        }
        self._check()
        try:
            saved = self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=metrics)
            if wait:
                self._manager.wait_until_finished()
        except Exception as error:  # disk errors, of this save or the previous one, have many types
            raise UserError(f"no checkpoint can be written to {self.folder}: {first_line(error)}") from error
        if not saved:
            raise UserError(f"{self.folder} has a checkpoint after step {int(state.step)}: choose another run.workdir")

    def _check_space(self, state: TrainState) -> None:
        if is_remote(self.folder):
            return
        # A tenth and a megabyte are added for orbax's own files, the log and the pictures.
        needed = 1.1 * sum(x.nbytes for x in jax.tree.leaves(state)) + 1e6
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise UserError(
                f"no checkpoint can be written to {self.folder}: {needed / 1e6:.1f} MB must be free, but the disk has {free / 1e6:.1f} MB"
            )

    def restore(self, config: Config, state: TrainState, mesh: Mesh, check_data: Callable[[str], str]) -> Restored | None:
        """Load the last intact checkpoint onto `mesh`, whatever the number of devices that wrote it; return None if there is none.

        A checkpoint that cannot be read, or whose values differ from those that were written, is moved aside with a warning, and the
        one before it is tried.

        Args:
          config: the settings of the resumed run.
          state: a state with the expected shapes.
          mesh: the devices.
          check_data: called with a checkpoint's description of its data; returns the description to use from now on, or raises UserError if
            the present data differ.

        Raises:
          UserError: there are checkpoints but none can be read, or the last one has another network, optimizer or seed, or other data.
        """
        failed: list[int] = []
        for step in reversed(self.steps()):
            try:
                folder = self.folder / str(step)
                saved = _with_defaults(read_json(folder, "config"))
                position = Position(**read_json(folder, "input"))
                position = position._replace(data=self._check_same_run(saved, config, position.data, check_data))
                state = self._load_state(step, state, NamedSharding(mesh, PartitionSpec()), ema=bool(saved["optim"]["ema"]))
            except UserError:
                raise
            except Exception as error:  # orbax, tensorstore and the file system raise many types
                self._warn(step, error)
                failed.append(step)
                continue
            self._move_aside(failed)
            if not state.ema and config.loss.lacks_average(step):
                raise UserError(
                    f"loss.cr_after (={config.loss.cr_after}) must be more than {step}, the step of the last checkpoint in"
                    f" {self.folder.parent}, which has no moving average for loss.cr_negatives lagging, because optim.ema was 0"
                )
            # If the checkpoint has no moving average, it starts as a copy of the parameters: the step donates the buffers of both.
            ema = (state.ema or jax.tree.map(jnp.copy, state.params)) if config.optim.ema else {}
            return Restored(dataclasses.replace(state, ema=ema), position, _changes(saved, config_to_dict(config)))
        if failed:
            raise self._none_is_whole()
        return None

    def _none_is_whole(self) -> UserError:
        return UserError(f"no checkpoint in {self.folder} can be read: move the folder away to start again, or choose another run.workdir")

    def _load_state(self, step: int, like: TrainState, sharding: NamedSharding, *, ema: bool) -> TrainState:
        like = dataclasses.replace(like, ema=like.params if ema else {})
        targets = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), _items(like))
        items = {name: ocp.args.StandardRestore(target) for name, target in zip(("model", "optimizer"), targets)}
        got = self._manager.restore(step, args=ocp.args.Composite(**items))
        verify(self.folder / str(step), {"model": got["model"], "optimizer": got["optimizer"]})
        return TrainState(**{"ema": {}, **got["model"], **got["optimizer"]})

    def _warn(self, step: int, error: Exception) -> None:
        """Warn of a damaged checkpoint; raise UserError if the error says nothing about the checkpoint itself."""
        if _is_of_the_system(error):
            raise UserError(
                f"checkpoint {self.folder / str(step)} cannot be read: {first_line(error)}; put that right, and the same command resumes"
            ) from error
        log.warning("checkpoint %s cannot be read (%s)", self.folder / str(step), first_line(error))

    def _move_aside(self, steps: list[int]) -> None:
        self._rename(steps)
        if steps:
            self._manager.reload()

    def _rename(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:  # if they stayed, orbax would refuse to save earlier steps
                aside = (self.folder.parent / f"damaged-checkpoint-{step}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
                (self.folder / str(step)).rename(next(path for path in aside if not path.exists()))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints moved aside")

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in ascending order."""
        return sorted(self._manager.all_steps())

    def _check_same_run(self, saved: dict[str, Any], config: Config, data: str, check_data: Callable[[str], str]) -> str:
        other = f"{self.folder.parent} holds another run"
        for name, there, here in registry.config_from_dict(saved["model"]).changes(config.model):
            raise UserError(f"{other}: {name} is {there} there and {here} here; choose another run.workdir")
        now = config_to_dict(config)
        for part, name in (("run", "seed"), ("optim", "optimizer"), *(("haze", name) for name in now["haze"])):
            if (there := saved[part][name]) != (here := now[part][name]):
                raise UserError(f"{other}: {part}.{name} is {there} there and {here} here; choose another run.workdir")
        # Weight decay has a part in the state of the optimizer, if there is any; its value may change.
        there, here = (settings["optim"].get("weight_decay", 0.0) for settings in (saved, now))
        if bool(there) != bool(here):
            raise UserError(f"{other}: optim.weight_decay is {there} there and {here} here, of which one is 0; choose another run.workdir")
        try:
            return check_data(data)
        except UserError as error:
            raise UserError(f"{other}: {error}; choose another run.workdir") from error

    def wait(self) -> None:
        """Wait until all checkpoints are written; raise UserError if one cannot be."""
        self._join()
        self._finish(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait until all checkpoints are written, and end the background threads; raise UserError if a checkpoint cannot be written."""
        try:
            self._join()
        finally:
            self._thread.shutdown()
            self._finish(self._manager.close)

    def _finish(self, wait: Callable[[], None]) -> None:
        try:
            wait()
        except Exception as error:
            raise UserError(f"the last checkpoint cannot be written to {self.folder}: {first_line(error)}") from error


def _is_of_the_system(error: Exception) -> bool:
    """Return whether an error, in reading a checkpoint, is one of permissions, devices or memory, under which intact files suffer too."""
    if isinstance(error, OSError):
        return error.errno in (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
    return isinstance(error, MemoryError) or any(word in str(error) for word in ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED"))


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved config with the present names; settings added since then get their defaults, which keep the earlier behaviour."""
    saved, defaults = migrate(saved), config_to_dict(Config())
    defaults["model"] = registry.config_to_dict(registry.config_from_dict(saved["model"]))
    saved = defaults | saved  # the haze has settings since after version 0.1.0
    return {part: settings | saved[part] for part, settings in defaults.items()}


def changed_settings(saved: dict[str, Any], config: Config) -> list[str]:
    """Return the settings that differ from those of a saved config, as in "optim.batch: 8 -> 16".

    Settings that only say where a run is and how it is executed and logged are left out.

    Raises:
      ValueError, KeyError, TypeError or AttributeError: `saved` is not the config of a run.
    """
    return _changes(_with_defaults(saved), config_to_dict(config))


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    model = {"params": state.params, "stats": state.stats} | ({"ema": state.ema} if state.ema else {})
    return model, {"step": state.step, "opt_state": state.opt_state}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the settings that differ, except those that only say where a run is and how it is executed and logged."""
    places = {"workdir", "coordinator", "processes", "process_id", "threads", "workers", "cache"}
    places |= {"log_every", "tensorboard", "profile", "profiler_port"}
    pairs = ((f"{part}.{name}", before[part][name], value) for part in now for name, value in now[part].items() if name not in places)
    return [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]
