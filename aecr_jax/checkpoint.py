"""Checkpoints: orbax for training runs, one safetensors file for models that travel.

A training checkpoint holds parameters and their moving average, running statistics, optimizer, step, the input's position, the config,
and a checksum of every array. An exported model (what conversion writes and the package ships) is a folder of `model.safetensors` and
`config.json`, which has a checksum of both. Both are data alone: reading one runs no code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import preservation_policy
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from aecr_jax.config import Config
from aecr_jax.errors import UserError, first_line
from aecr_jax.files import refuse_existing, replacing
from aecr_jax.model import AECRNet, ModelConfig, abstract_model, build_model, get_arrays
from aecr_jax.step import TrainState
from aecr_jax.validation import check_weight

# The model that the package ships.
DEFAULT_MODEL = Path(__file__).parent / "pretrained"
_WEIGHTS, _CONFIG, _CHECKPOINTS = "model.safetensors", "config.json", "checkpoints"
# The item of a training checkpoint that has the checksums of its JSON items.
_SEAL = "json_checksums"

log = logging.getLogger(__name__)


class Position(NamedTuple):
    """Where the input stands."""

    images: int  # read so far
    data: str  # what from, as a `Fingerprint` describes it


class Restored(NamedTuple):
    """What a run goes on from."""

    state: TrainState
    position: Position
    changes: list[str]  # settings that are not what they were, "train.batch: 8 -> 16"


class Checkpoints:
    """The checkpoints that a training run writes to `workdir/checkpoints`: the last two and the best by validation PSNR are kept.

    A checkpoint whose metrics cannot be read is moved aside at once, with a warning.

    Raises:
      UserError: that is so of all of them.
    """

    def __init__(self, workdir: str | Path):
        self.folder = Path(workdir).resolve() / _CHECKPOINTS
        # Before orbax reads the metrics of every checkpoint, and raises at the first that is damaged.
        failed, steps = [], list_steps(self.folder)
        for step in steps:
            try:
                _read_psnr(self.folder / str(step))
            except Exception as error:
                self._warn(step, error)
                failed.append(step)
        if failed == steps != []:  # without them the run would begin anew, and cut its log
            raise self._none_is_whole()
        if jax.process_count() > 1:  # all have looked before one of them renames
            multihost_utils.sync_global_devices("metrics of checkpoints read")
        self._rename(failed)
        keep = preservation_policy.AnyPreservationPolicy(
            [preservation_policy.LatestN(2), preservation_policy.BestN(get_metric_fn=_psnr, n=1)]
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_psnr, best_mode="max", preservation_policy=keep, create=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, config: Config, position: Position, psnr: float = -np.inf) -> None:
        """Writes in the background; a checkpoint appears whole or not at all. Every process of a pod calls it.

        Raises:
          UserError: this checkpoint, or the one before, cannot be written.
        """
        model, optimizer = _items(state)
        # With a tenth and a megabyte to spare: for orbax's own files, and for the log and the pictures.
        needed = 1.1 * sum(x.nbytes for x in jax.tree.leaves(state)) + 1e6
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise UserError(
                f"no checkpoint can be written to {self.folder}: {needed / 1e6:.1f} MB must be free and the disk has {free / 1e6:.1f} MB"
            )
        metrics = {"psnr": psnr}
        facts: dict[str, Any] = {
            "input": position._asdict(),
            "config": dataclasses.asdict(config),
            "checksums": {"model": _checksums(model), "optimizer": _checksums(optimizer)},
        }
        facts[_SEAL] = {name: _json_checksum(value) for name, value in {**facts, "metrics": metrics}.items()}
        items = {
            "model": ocp.args.StandardSave(model),
            "optimizer": ocp.args.StandardSave(optimizer),
            **{name: ocp.args.JsonSave(value) for name, value in facts.items()},
        }
        try:
            saved = self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=metrics)
        except Exception as error:  # the disk's, at this save or the one before, come in many kinds
            raise UserError(f"no checkpoint can be written to {self.folder}: {first_line(error)}") from error
        if not saved:
            raise UserError(f"{self.folder} has a checkpoint after step {int(state.step)}: name another train.workdir")

    def restore(self, config: Config, state: TrainState, mesh: Mesh, check_data: Callable[[str], str]) -> Restored | None:
        """The last whole checkpoint, onto `mesh`, whatever the number of devices was; None if there is none.

        One that cannot be read, or has other values than were written, is moved aside with a warning, for the one before it.

        Args:
          config: the settings to go on with.
          state: a state of the right shapes.
          mesh: the devices.
          check_data: takes a checkpoint's description of its data and returns the one to go on with, or raises UserError if the data are
            not those that are there now.

        Raises:
          UserError: no checkpoint can be read, or they are of another network, optimizer or seed, or of other data.
        """
        failed: list[int] = []
        for step in reversed(self.steps()):
            try:
                folder = self.folder / str(step)
                saved = _with_defaults(_read_json(folder, "config"))
                position = Position(**_read_json(folder, "input"))
                position = position._replace(data=self._check_same_run(saved, config, position.data, check_data))
                state = self._load_state(step, state, NamedSharding(mesh, PartitionSpec()), ema=bool(saved["train"]["ema"]))
            except UserError:
                raise
            except Exception as error:  # orbax, tensorstore and the file system raise a dozen kinds
                self._warn(step, error)
                failed.append(step)
                continue
            self._move_aside(failed)
            # A moving average that was not kept begins with the parameters, in arrays of its own: the step consumes both.
            ema = (state.ema or jax.tree.map(jnp.copy, state.params)) if config.train.ema else {}
            return Restored(dataclasses.replace(state, ema=ema), position, _changes(saved, dataclasses.asdict(config)))
        if failed:
            raise self._none_is_whole()
        return None

    def _none_is_whole(self) -> UserError:
        return UserError(f"no checkpoint in {self.folder} can be read: delete the folder to begin anew, or name another train.workdir")

    def _load_state(self, step: int, like: TrainState, sharding: NamedSharding, *, ema: bool) -> TrainState:
        like = dataclasses.replace(like, ema=like.params if ema else {})
        targets = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), _items(like))
        items = {name: ocp.args.StandardRestore(target) for name, target in zip(("model", "optimizer"), targets)}
        got = self._manager.restore(step, args=ocp.args.Composite(**items))
        _verify(self.folder / str(step), {"model": got["model"], "optimizer": got["optimizer"]})
        return TrainState(**{"ema": {}, **got["model"], **got["optimizer"]})

    def _warn(self, step: int, error: Exception) -> None:
        log.warning("checkpoint %s cannot be read (%s)", self.folder / str(step), first_line(error))

    def _move_aside(self, steps: list[int]) -> None:
        self._rename(steps)
        if steps:
            self._manager.reload()

    def _rename(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:  # orbax would save nothing before the latest step
                aside = (self.folder.parent / f"damaged-checkpoint-{step}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
                (self.folder / str(step)).rename(next(path for path in aside if not path.exists()))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints moved aside")

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def _check_same_run(self, saved: dict[str, Any], config: Config, data: str, check_data: Callable[[str], str]) -> str:
        other = f"{self.folder.parent} holds another run"
        for name, there, here in model_changes(_model_config(saved), config.model):
            raise UserError(f"{other}: {name} is {there} there and {here} here; name another train.workdir")
        for name in ("seed", "optimizer"):
            if (there := saved["train"][name]) != (here := getattr(config.train, name)):
                raise UserError(f"{other}: train.{name} is {there} there and {here} here; name another train.workdir")
        try:
            return check_data(data)
        except UserError as error:
            raise UserError(f"{other}: {error}; name another train.workdir") from error

    def wait(self) -> None:
        """Wait until everything is written."""
        self._finish(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait until everything is written, and end the background threads."""
        self._finish(self._manager.close)

    def _finish(self, wait: Callable[[], None]) -> None:
        try:
            wait()
        except Exception as error:
            raise UserError(f"the last checkpoint cannot be written to {self.folder}: {first_line(error)}") from error


def check_folder_name(folder: str | Path) -> None:
    """Refuse a folder whose full name is not UTF-8: orbax can neither write nor read checkpoints there.

    Raises:
      UserError: so it is.
    """
    try:
        str(Path(folder).resolve()).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{folder} cannot hold checkpoints: its name, with those of the folders above, must be UTF-8") from error


def list_steps(folder: str | Path) -> list[int]:
    """The steps that have a complete checkpoint in a run's `checkpoints` folder, ascending."""
    folder = Path(folder)
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and path.is_dir()) if folder.is_dir() else []


def has_checkpoint(workdir: str | Path) -> bool:
    """Whether a run has saved one."""
    return bool(list_steps(Path(workdir) / _CHECKPOINTS))


def model_changes(before: ModelConfig, now: ModelConfig) -> list[tuple[str, Any, Any]]:
    """The settings by which two networks differ, as (name, before, now); not those that say how one is computed."""
    names = (f.name for f in dataclasses.fields(before) if f.name not in ("dtype", "remat"))
    pairs = ((f"model.{name}", getattr(before, name), getattr(now, name)) for name in names)
    return [change for change in pairs if change[1] != change[2]]


def load_checkpoint(path: str | Path = DEFAULT_MODEL) -> AECRNet:
    """Loads a model, ready to call, in evaluation mode.

    Args:
      path: a training run's work directory (its best checkpoint by validation PSNR), its `checkpoints` folder, one checkpoint in
        there, or an exported model; the model that the package ships by default.

    Raises:
      UserError: `path` is none of these, or is damaged or half written.
    """
    return load_checkpoint_with_config(path)[0]


def load_checkpoint_with_config(path: str | Path) -> tuple[AECRNet, dict[str, Any]]:
    """As `load_checkpoint`, and the JSON config that was saved with the model."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no checkpoint folder {path}")
    if (path / _WEIGHTS).is_file():
        return _load_exported(path)
    path = path.resolve()
    if (path / _CHECKPOINTS).is_dir():
        workdir, step = path, None
    elif path.name == _CHECKPOINTS:
        workdir, step = path.parent, None
    elif path.name.isdigit() and path.parent.name == _CHECKPOINTS:
        workdir, step = path.parent.parent, int(path.name)
    else:
        raise UserError(
            f"{path} is no checkpoint: looked for {_WEIGHTS}, for a folder {_CHECKPOINTS}, and for a folder such as {_CHECKPOINTS}/1000"
        )
    folder = workdir / _CHECKPOINTS
    check_folder_name(workdir)
    jax.local_devices()  # here, and not where an error is taken for the checkpoint's
    if step is None and (step := _best_step(folder)) is None and list_steps(folder):
        raise UserError(f"no checkpoint in {folder} can be read")
    if step is None or step not in list_steps(folder):
        raise UserError(f"{path} has no whole checkpoint: a run writes its first at its first evaluation (train.eval_every)")
    try:
        return _load_trained(folder / str(step))
    except Exception as error:  # orbax, tensorstore and the file system raise a dozen kinds
        raise UserError(f"checkpoint {folder / str(step)} is damaged or half written: {first_line(error)}") from error


def _best_step(folder: Path) -> int | None:
    """The step with the best validation PSNR, or the last if none was evaluated; without those whose score cannot be read."""
    scores: dict[int, float] = {}
    for step in list_steps(folder):
        try:
            scores[step] = _read_psnr(folder / str(step))
        except Exception as error:
            log.warning("checkpoint %s is left out: its score cannot be read (%s)", folder / str(step), first_line(error))
    return max(scores, key=lambda step: (scores[step], step), default=None)


def _load_trained(folder: Path) -> tuple[AECRNet, dict[str, Any]]:
    """The model of one checkpoint, on the default device, and the run's config; the moving average of its parameters if it has one."""
    config = _read_json(folder, "config")
    model_config = _model_config(config)
    model = abstract_model(model_config)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = get_arrays(model, nnx.Param)
    target = {"params": params, "stats": get_arrays(model, nnx.BatchStat)} | ({"ema": params} if config["train"]["ema"] else {})
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), target)
    with ocp.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(folder / "model", target)
    _verify(folder, {"model": got})
    weights = "ema" if "ema" in got else "params"
    arrays = {**got[weights], **got["stats"]}
    _check_arrays(arrays)
    return build_model(model_config, arrays), config | {"step": int(folder.name), "weights": weights}


def refuse_model(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that is not for a model to export: one of a training run, or with a model's files unless `overwrite` is set.

    Raises:
      UserError: the folder is one of these.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise UserError(f"{path} is a file: name a folder for the model")
    if (Path(path) / _CHECKPOINTS).exists():
        raise UserError(f"{path} holds a training run: name another folder for the model")
    for name in (_WEIGHTS, _CONFIG):
        refuse_existing(Path(path) / name, overwrite=overwrite)


def export_model(model: AECRNet, path: str | Path, about: dict[str, Any] | None = None) -> None:
    """Writes a model as a folder that `load_checkpoint` reads; `about` (JSON) is kept beside the model's config.

    A model that is there already is replaced once the new one is on the disk as a whole.

    Raises:
      UserError: the folder cannot be written, or holds a training run, or a weight is not finite.
    """
    path = Path(path)
    refuse_model(path, overwrite=True)
    arrays = {name: np.asarray(array, order="C") for name, array in get_arrays(model).items()}
    try:
        _check_arrays(arrays)
    except ValueError as error:
        raise UserError(f"model {path} is not written: {error}") from error
    config = dataclasses.asdict(model.config)
    text = json.dumps({"model": config, "about": about or {}, "sha256": _sha256(arrays, config)}, indent=2)
    with replacing(path / _WEIGHTS) as weights_file, replacing(path / _CONFIG) as config_file:
        weights_file.write_bytes(save(arrays, metadata={"format": "aecr_jax.model"}))
        config_file.write_text(text + "\n")


def _load_exported(path: Path) -> tuple[AECRNet, dict[str, Any]]:
    try:
        config = json.loads((path / _CONFIG).read_text())
        if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
            raise ValueError(f"{_CONFIG} has no settings under 'model'")
        arrays = load_file(path / _WEIGHTS)
        # Models of the time before checksums have none.
        if config.get("sha256", expected := _sha256(arrays, config["model"])) != expected:
            raise ValueError("its weights or settings are not what was written")
        model_config = _model_config(config)
        try:
            _check_arrays(arrays)
        except ValueError as error:
            raise UserError(f"model {path} cannot be used: {error}") from error
        dtype = jnp.dtype(model_config.param_dtype)
        return build_model(model_config, {name: array.astype(dtype) for name, array in arrays.items()}), config
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"model {path} is damaged or half written: {first_line(error)}") from error


def _check_arrays(arrays: Mapping[str, Any]) -> None:
    for name, array in arrays.items():
        check_weight(array, name)


def _sha256(arrays: dict[str, np.ndarray], config: dict[str, Any]) -> str:
    """The SHA-256 of an exported model: its settings, and names, types, shapes and bytes of its arrays."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\n{name} {array.dtype.name} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def _model_config(config: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**config["model"])


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the settings that came after it, at what the program did before they were there."""
    return {part: settings | saved[part] for part, settings in dataclasses.asdict(Config()).items()}


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    model = {"params": state.params, "stats": state.stats} | ({"ema": state.ema} if state.ema else {})
    return model, {"step": state.step, "opt_state": state.opt_state}


def _read_json(folder: Path, item: str) -> dict[str, Any]:
    """A JSON part of the checkpoint `folder`, compared with its checksum (checkpoints of version 0.1.0 have none)."""

    def read(name: str) -> dict[str, Any]:
        value = json.loads((folder / name / ("metrics" if name == "metrics" else "metadata")).read_text())
        if not isinstance(value, dict):
            raise ValueError(f"{name} is no JSON object")
        return value

    value = read(item)
    if (folder / _SEAL).is_dir() and read(_SEAL)[item] != _json_checksum(value):
        raise ValueError(f"{item} is not what was written")
    return value


def _read_psnr(folder: Path) -> float:
    value = _psnr(_read_json(folder, "metrics"))
    if not isinstance(value, float | int):
        raise ValueError(f"psnr (={value!r}) must be a number")
    return value


def _verify(folder: Path, items: dict[str, Any]) -> None:
    # tensorstore reads values of which single bits were changed without a word.
    written = _read_json(folder, "checksums")
    for item, tree in items.items():
        for name, checksum in _checksums(tree).items():
            if written[item][name] != checksum:
                raise ValueError(f"{name} is not what was written")


def _json_checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _checksums(tree: Any) -> dict[str, int]:
    return {jax.tree_util.keystr(path): zlib.crc32(np.asarray(leaf).tobytes()) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ; names and places of a run are left out."""
    places = {"workdir", "coordinator", "processes", "process_id", "log_every", "tensorboard", "threads", "workers", "cache"}
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))  # tuples are lists there
    pairs = ((f"{part}.{name}", before[part][name], value) for part in now for name, value in now[part].items() if name not in places)
    return [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]


def _psnr(metrics: Any) -> float:
    return metrics["psnr"] if np.isfinite(metrics["psnr"]) else -np.inf
