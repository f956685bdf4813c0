"""Saved models: loading them from any folder written by training, conversion or export, and exporting them.

An exported model is a folder with `model.safetensors` and `config.json`; the latter holds a checksum of both. A training checkpoint is a
folder written by orbax, with checksums of every array and of its JSON parts. Both contain only data, so that reading them runs no code.
This module does not need the training code, and it needs orbax only to read a training checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save

from aecr_jax.errors import MissingFileError, UserError, first_line
from aecr_jax.files import refuse_existing, replacing
from aecr_jax.inference.hub import hub_folder, is_address
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.networks.network import Network
from aecr_jax.networks.registry import (
    abstract_network,
    build_network,
    config_from_dict,
    config_to_dict,
    find_network,
    has_parameters,
    network_names,
)
from aecr_jax.renamed import migrate
from aecr_jax.storage import as_path, check_readable, is_remote, resolve
from aecr_jax.validation import as_int, check_weight

# The models that are shipped with the package, one folder for each, and the folder of the one that is used by default.
SHIPPED = Path(__file__).parents[1] / "pretrained"
DEFAULT_MODEL = SHIPPED / "photo"
CHECKPOINTS = "checkpoints"
# The item of a training checkpoint that holds the checksums of its JSON items.
SEAL = "json_checksums"
WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_COMPLETE = "commit_success.txt"

log = logging.getLogger(__name__)


def load_checkpoint(path: str | Path = DEFAULT_MODEL) -> Network:
    """Load a model in evaluation mode, ready to be called.

    `model.name`, `model.config` and `model.step` describe the model. `model.step` is None if it is not known; for a shipped model that was
    trained in several runs, it is the total number of steps.

    Args:
      path: the work directory of a training run or its `checkpoints` folder (the checkpoint with the best validation PSNR is loaded),
        a single checkpoint in that folder, or an exported model; any of these in object storage, `gs://BUCKET/NAME` (this needs the extra
        `gcs`); the address of an exported model on the Hugging Face Hub,
        `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`, which is downloaded (this needs the extra `hub`); or, if there is no folder of
        that name, the name of a model that is shipped with the package, such as "aecr_net_tiny", or of a network without parameters,
        such as "dcp", which gets its default settings. By default, the default one of the shipped models.

    Raises:
      UserError: `path` is none of these, is damaged or incomplete, or cannot be downloaded.
    """
    return load_with_info(path)[0]


def load_with_info(path: str | Path) -> tuple[Network, dict[str, Any]]:
    """Load a model as `load_checkpoint` does, and the JSON saved with it: the config of a run, or `config.json` of an exported model."""
    name, path = str(path), model_folder(path)
    check_readable(path)
    if not path.is_dir():
        if name in network_names() and not has_parameters(model_config := find_network(name).Config()):
            model = build_network(model_config, {})
            model.name = name
            return model, {"model": config_to_dict(model_config), "about": {"name": name}}
        raise MissingFileError(f"there is no checkpoint folder {path}; the shipped models are {', '.join(shipped_names())}")
    if (path / WEIGHTS).is_file():
        model, info = _load_exported(path)
        if is_address(name) and "name" not in info.get("about", {}):
            model.name = name.partition("@")[0].rpartition("/")[2]  # the folder in the cache is named after the commit
        return model, info
    path = resolve(path)
    if (path / CHECKPOINTS).is_dir():
        workdir, step = path, None
    elif path.name == CHECKPOINTS:
        workdir, step = path.parent, None
    elif path.name.isdigit() and path.parent.name == CHECKPOINTS:
        workdir, step = path.parent.parent, int(path.name)
    else:
        raise UserError(
            f"{path} is not a checkpoint: looked for {WEIGHTS}, for a folder {CHECKPOINTS}, and for a folder such as {CHECKPOINTS}/1000"
        )
    folder = workdir / CHECKPOINTS
    check_folder_name(workdir)
    jax.local_devices()  # initialize JAX here: below, a failure would be reported as a damaged checkpoint
    if step is None and (step := _best_step(folder)) is None and list_steps(folder):
        raise UserError(f"no checkpoint in {folder} can be read")
    if step is None or step not in list_steps(folder):
        raise UserError(f"{path} has no complete checkpoint: a run writes its first one after run.save_every or run.eval_every steps")
    try:
        return _load_trained(folder / str(step))
    except Exception as error:  # orbax, tensorstore and the file system raise many types of errors
        raise UserError(
            f"checkpoint {folder / str(step)} is damaged or half written, or of another version of its network: {first_line(error)}"
        ) from error


def shipped_names() -> list[str]:
    """Return the names of the models that are shipped with the package, in alphabetical order."""
    return sorted(path.name for path in SHIPPED.iterdir() if (path / _CONFIG).is_file())


def shipped_folder(name: str | Path) -> Path | None:
    """Return the folder of the shipped model `name`, or None if there is no such model or the user has a folder of that name."""
    return SHIPPED / name if str(name) in shipped_names() and not Path(name).is_dir() else None


def model_folder(path: str | Path) -> Path:
    """Return the folder that a name or path means, which may not exist; a model on the Hugging Face Hub is downloaded.

    Raises:
      UserError: the model cannot be downloaded.
    """
    return hub_folder(path) if is_address(path) else shipped_folder(path) or as_path(path)


def save_checkpoint(model: Network, path: str | Path, about: dict[str, Any] | None = None) -> None:
    """Write a model as a folder that `load_checkpoint` can read; `about` (JSON) is stored next to the model's config.

    If `about` has no `step`, `model.step` is stored as such, unless it is None.

    An existing model in the folder is replaced only after the new one has been written completely.

    Raises:
      UserError: the folder cannot be written, or holds a training run, or a weight is not finite.
    """
    path = as_path(path)
    refuse_model(path, overwrite=True)
    arrays = {name: np.asarray(array, order="C") for name, array in get_arrays(model).items()}
    try:
        _check_arrays(arrays)
    except ValueError as error:
        raise UserError(f"model {path} was not written: {error}") from error
    config = config_to_dict(model.config)
    about = ({} if model.step is None else {"step": model.step}) | (about or {})
    text = json.dumps({"model": config, "about": about, "sha256": _sha256(arrays, config)}, indent=2)
    with replacing(path / WEIGHTS) as weights_file, replacing(path / _CONFIG) as config_file:
        weights_file.write_bytes(save(arrays, metadata={"format": "aecr_jax.model"}))
        config_file.write_text(text + "\n")


def is_exported(path: str | Path) -> bool:
    """Return whether a folder holds all files of an exported model."""
    return all((as_path(path) / name).is_file() for name in (WEIGHTS, _CONFIG))


def refuse_model(path: str | Path, *, overwrite: bool = False) -> None:
    """Check that a model can be exported to a folder.

    Raises:
      UserError: `path` is a file, holds a training run, or holds the files of a model and `overwrite` is not set.
    """
    path = as_path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: choose a folder for the model")
    if (path / CHECKPOINTS).exists():
        raise UserError(f"{path} holds a training run: choose another folder for the model")
    for name in (WEIGHTS, _CONFIG):
        refuse_existing(path / name, overwrite=overwrite)


def refuse_run(path: str | Path) -> None:
    """Check that a folder may hold a training run, which replaces the folder's `config.json`.

    Raises:
      UserError: `path` has no checkpoints, but a model or a `config.json` that is not of a run.
    """
    path = as_path(path)
    if (path / CHECKPOINTS).is_dir():
        return
    if (path / WEIGHTS).is_file():
        raise UserError(f"run.workdir (={path}) holds a model: choose another folder")
    if not (path / _CONFIG).is_file():
        return
    try:
        config = json.loads((path / _CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not {"optim", "train"} & set(config):  # version 0.1.0 had `train`
        raise UserError(f"run.workdir (={path}) has a {_CONFIG} that is not of a run and would be replaced: choose another folder")


def check_folder_name(folder: str | Path) -> None:
    """Check that the full path of a folder is valid UTF-8, because orbax cannot write or read checkpoints in other folders.

    Raises:
      UserError: the path is not valid UTF-8.
    """
    try:
        str(resolve(as_path(folder))).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{folder} cannot hold checkpoints: its full path must be valid UTF-8") from error


def list_steps(folder: str | Path) -> list[int]:
    """Return the steps that have a complete checkpoint in the `checkpoints` folder of a run, in ascending order."""
    folder = as_path(folder)
    check_readable(folder)
    if not folder.is_dir():
        return []
    steps = [path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()]
    if is_remote(folder):  # orbax writes objects under their final names, and this one last; on a disk, it renames the complete folder
        steps = [path for path in steps if (path / _COMPLETE).exists()]
    return sorted(int(path.name) for path in steps)


def has_checkpoint(workdir: str | Path) -> bool:
    """Return whether a run has saved a checkpoint."""
    return bool(list_steps(as_path(workdir) / CHECKPOINTS))


def _best_step(folder: Path) -> int | None:
    """Return the step with the best validation PSNR, or the last step if none was evaluated; unreadable scores are ignored."""
    scores: dict[int, float] = {}
    for step in list_steps(folder):
        try:
            scores[step] = read_psnr(folder / str(step))
        except Exception as error:
            log.warning("checkpoint %s is ignored: its score cannot be read (%s)", folder / str(step), first_line(error))
    return max(scores, key=lambda step: (scores[step], step), default=None)


def _load_trained(folder: Path) -> tuple[Network, dict[str, Any]]:
    """Load one checkpoint to the default device and return its model and the run's config.

    If the checkpoint has a moving average of the parameters, the model gets that.
    """
    import orbax.checkpoint as ocp  # imported here, because an exported model can be loaded without orbax

    config = migrate(read_json(folder, "config"))
    model_config = config_from_dict(config["model"])
    model = abstract_network(model_config)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = get_arrays(model, nnx.Param)
    averaged = any(name.startswith("['ema']") for name in read_json(folder, "checksums")["model"])
    target = {"params": params, "stats": get_arrays(model, nnx.BatchStat)} | ({"ema": params} if averaged else {})
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), target)
    with ocp.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(folder / "model", target)
    verify(folder, {"model": got})
    weights = "ema" if averaged else "params"
    arrays = {**got[weights], **got["stats"]}
    _check_arrays(arrays)
    model = build_network(model_config, arrays)
    model.name, model.step = folder.parents[1].name, int(folder.name)
    return model, config | {"step": model.step, "weights": weights}


def _load_exported(path: Path) -> tuple[Network, dict[str, Any]]:
    try:
        config = json.loads((path / _CONFIG).read_text())
        if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
            raise ValueError(f"{_CONFIG} has no settings under 'model'")
        if not isinstance(about := config.get("about", {}), dict):
            raise ValueError(f"{_CONFIG} has {about!r} under 'about', which must be an object")
        if not isinstance(data := config.get("data", {}), dict) or not isinstance(data.get("train", ""), str):
            raise ValueError(f"{_CONFIG} has {data!r} under 'data', which must be an object with the text 'train'")
        step = about.get("step")
        if step is not None and as_int(step) is None:
            raise ValueError(f"{_CONFIG} has the step {step!r}, which must be an integer")
        arrays = load((path / WEIGHTS).read_bytes()) if is_remote(path) else load_file(path / WEIGHTS)
        # Models that were exported before checksums were introduced have none.
        if config.get("sha256", expected := _sha256(arrays, config["model"])) != expected:
            raise ValueError("its weights or settings differ from what was written")
        model_config = config_from_dict(config["model"])
        if "float64" in (model_config.dtype, model_config.param_dtype) and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            raise UserError(f"model {path} cannot be used: it has the type float64, for which JAX_ENABLE_X64=1 must be set")
        try:
            _check_arrays(arrays)
        except ValueError as error:
            raise UserError(f"model {path} cannot be used: {error}") from error
        dtype = jnp.dtype(model_config.param_dtype)
        try:
            model = build_network(model_config, {name: array.astype(dtype) for name, array in arrays.items()})
        except ValueError as error:
            if "sha256" not in config:
                raise
            version = f"the network {model_config.NAME} of this version of aecr_jax"
            raise UserError(f"model {path} cannot be used: its weights do not fit {version}: {first_line(error)}") from error
        model.name, model.step = str(about.get("name", resolve(path).name)), step
        return model, config
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, SafetensorError) as error:
        # NumPy lacks some of the types of safetensors (AttributeError), and JSON may be nested too deeply (RecursionError).
        raise UserError(f"model {path} is damaged or half written: {first_line(error)}") from error


def _check_arrays(arrays: Mapping[str, Any]) -> None:
    for name, array in arrays.items():
        check_weight(array, name)


def _sha256(arrays: dict[str, np.ndarray], config: dict[str, Any]) -> str:
    """Return the SHA-256 of an exported model, over its settings and the names, types, shapes and bytes of its arrays."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\n{name} {array.dtype.name} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def read_json(folder: Path, item: str) -> dict[str, Any]:
    """Read a JSON part of the checkpoint `folder` and verify its checksum (checkpoints of version 0.1.0 have none)."""

    def read(name: str) -> dict[str, Any]:
        value = json.loads((folder / name / ("metrics" if name == "metrics" else "metadata")).read_text())
        if not isinstance(value, dict):
            raise ValueError(f"{name} is not a JSON object")
        return value

    value = read(item)
    if (folder / SEAL).is_dir() and read(SEAL)[item] != json_checksum(value):
        raise ValueError(f"{item} differs from what was written")
    return value


def read_psnr(folder: Path) -> float:
    """Return the validation PSNR of the checkpoint `folder`, or -inf if the checkpoint was not evaluated."""
    value = get_psnr(read_json(folder, "metrics"))
    if not isinstance(value, float | int):
        raise ValueError(f"psnr (={value!r}) must be a number")
    return value


def verify(folder: Path, items: dict[str, Any]) -> None:
    """Raise ValueError if an array of a checkpoint differs from the one that was written."""
    # tensorstore reads values with flipped bits without reporting an error.
    written = read_json(folder, "checksums")
    for item, tree in items.items():
        for name, checksum in checksums(tree).items():
            if written[item][name] != checksum:
                raise ValueError(f"{name} differs from what was written")


def json_checksum(value: Any) -> int:
    """Return a checksum of a JSON value that does not depend on its spacing or the order of its keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def checksums(tree: Any) -> dict[str, int]:
    """Return the checksums of the arrays of a pytree by their paths."""
    return {jax.tree_util.keystr(path): zlib.crc32(np.asarray(leaf).tobytes()) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def get_psnr(metrics: Any) -> float:
    """Return the PSNR in a checkpoint's metrics, which ranks the checkpoints; -inf if it is not finite."""
    return metrics["psnr"] if np.isfinite(metrics["psnr"]) else -np.inf
