"""Checkpoints: orbax for training runs, one safetensors file for models that travel.

A training checkpoint holds parameters, running statistics, optimizer, step and the input's position, and the config. An exported
model (what conversion writes and the package ships) is a folder of `model.safetensors` and `config.json`. Both are data alone:
reading one runs no code.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from grain.checkpoint import CheckpointRestore, CheckpointSave
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import preservation_policy
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from aecr_jax.config import Config
from aecr_jax.data.images import make_folder
from aecr_jax.errors import UserError
from aecr_jax.model import AECRNet, ModelConfig, abstract_model, build_model, get_arrays
from aecr_jax.step import TrainState

# The model that the package ships.
DEFAULT_MODEL = Path(__file__).parent / "pretrained"
_WEIGHTS, _CONFIG, _CHECKPOINTS = "model.safetensors", "config.json", "checkpoints"

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training run, in `workdir/checkpoints`: the last two and the best by validation PSNR are kept."""

    def __init__(self, workdir: str | Path, *, read_only: bool = False):
        self.folder = Path(workdir).resolve() / _CHECKPOINTS
        keep = preservation_policy.AnyPreservationPolicy(
            [preservation_policy.LatestN(2), preservation_policy.BestN(get_metric_fn=_psnr, n=1)]
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_psnr,
            best_mode="max",
            preservation_policy=None if read_only else keep,
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, config: Config, iterator: Any, psnr: float) -> None:
        """Writes in the background; a checkpoint appears whole or not at all."""
        items = {
            "model": ocp.args.StandardSave({"params": state.params, "stats": state.stats}),
            "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            "input": CheckpointSave(iterator),
            "config": ocp.args.JsonSave(dataclasses.asdict(config)),
        }
        try:
            saved = self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics={"psnr": psnr})
        except Exception as error:  # the disk's, at this save or the one before, come in many kinds
            raise UserError(f"no checkpoint can be written to {self.folder}: {first_line(error)}") from error
        if not saved:
            raise UserError(f"{self.folder} has a checkpoint after step {int(state.step)}: name another train.workdir")

    def restore(self, model: ModelConfig, state: TrainState, iterator: Any, mesh: Mesh) -> TrainState | None:
        """The last whole checkpoint, onto `mesh`, and `iterator` set to its position; None if there is none.

        One that cannot be read is moved aside with a warning, for the one before it.

        Raises:
          UserError: no checkpoint can be read, or they are of another network than `model`.
        """
        replicated = NamedSharding(mesh, PartitionSpec())
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state)
        failed: list[int] = []
        for step in reversed(self.steps()):
            items = {
                "model": ocp.args.StandardRestore({"params": target.params, "stats": target.stats}),
                "optimizer": ocp.args.StandardRestore({"step": target.step, "opt_state": target.opt_state}),
                "input": CheckpointRestore(iterator),
            }
            try:
                self._check_model(step, model)
                got = self._manager.restore(step, args=ocp.args.Composite(**items))
            except UserError:
                raise
            except Exception as error:  # orbax, tensorstore and the file system raise a dozen kinds
                log.warning("checkpoint %s cannot be read (%s), trying the one before", self.folder / str(step), first_line(error))
                failed.append(step)
                continue
            for damaged in failed:  # orbax would save nothing before the latest step
                (self.folder / str(damaged)).rename(self.folder.parent / f"damaged-checkpoint-{damaged}")
            if failed:
                self._manager.reload()
            return TrainState(**got["model"], **got["optimizer"])
        if failed:
            raise UserError(f"no checkpoint in {self.folder} can be read: delete the folder to begin anew, or name another train.workdir")
        return None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the best validation PSNR."""
        return self._manager.best_step()

    def load_model(self, step: int) -> tuple[AECRNet, dict[str, Any]]:
        """The model of one step, on the default device, and the run's config."""
        config = self._load_config(step)
        model_config = _model_config(config)
        model = abstract_model(model_config)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = {"params": get_arrays(model, nnx.Param), "stats": get_arrays(model, nnx.BatchStat)}
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), target)
        got = self._manager.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore(target)))["model"]
        return build_model(model_config, {**got["params"], **got["stats"]}), config | {"step": step}

    def _check_model(self, step: int, here: ModelConfig) -> None:
        there = _model_config(self._load_config(step))
        for name in (f.name for f in dataclasses.fields(here)):
            if getattr(there, name) != getattr(here, name):
                raise UserError(
                    f"{self.folder.parent} holds another run: model.{name} is {getattr(there, name)} there and {getattr(here, name)} here;"
                    " name another train.workdir"
                )

    def _load_config(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

    def close(self) -> None:
        """Waits until everything is written."""
        try:
            self._manager.close()
        except Exception as error:
            raise UserError(f"the last checkpoint cannot be written to {self.folder}: {first_line(error)}") from error


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
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        if step is None:
            step = checkpoints.best_step() or max(checkpoints.steps(), default=None)
        if step is None or step not in checkpoints.steps():
            raise UserError(f"{path} has no whole checkpoint: a run writes its first at its first evaluation (train.eval_every)")
        return checkpoints.load_model(step)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"checkpoint {checkpoints.folder / str(step)} is damaged or half written: {first_line(error)}") from error
    finally:
        checkpoints.close()


def export_model(model: AECRNet, path: str | Path, about: dict[str, Any] | None = None) -> None:
    """Writes a model as a folder that `load_checkpoint` reads; `about` (JSON) is kept beside the model's config.

    Raises:
      UserError: the folder cannot be written, or holds a training run.
    """
    path = Path(path)
    if (path / _CHECKPOINTS).exists():
        raise UserError(f"{path} holds a training run: name another folder for the model")
    make_folder(path)
    arrays = {name: np.asarray(array) for name, array in get_arrays(model).items()}
    try:
        save_file(arrays, path / _WEIGHTS, metadata={"format": "aecr_jax.model"})
        text = json.dumps({"model": dataclasses.asdict(model.config), "about": about or {}}, indent=2)
        (path / _CONFIG).write_text(text + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def _load_exported(path: Path) -> tuple[AECRNet, dict[str, Any]]:
    try:
        config = json.loads((path / _CONFIG).read_text())
        arrays = load_file(path / _WEIGHTS)
        model_config = _model_config(config)
        dtype = jnp.dtype(model_config.param_dtype)
        return build_model(model_config, {name: array.astype(dtype) for name, array in arrays.items()}), config
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"model {path} is damaged or half written: {first_line(error)}") from error


def _model_config(config: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**config["model"])


def _psnr(metrics: Any) -> float:
    return metrics["psnr"] if np.isfinite(metrics["psnr"]) else -np.inf


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type: libraries' messages run over many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
