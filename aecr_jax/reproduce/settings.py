"""The settings of a row's run, at the paper's scale or at a small one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aecr_jax.convert.networks import convert
from aecr_jax.errors import UserError, first_line
from aecr_jax.inference.weights import WEIGHTS, has_checkpoint, is_exported, load_checkpoint
from aecr_jax.losses.vgg import VGG19Features
from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.networks.network import NetworkConfig
from aecr_jax.reproduce.tables import PAPERS_RATE, Row
from aecr_jax.training.checkpoint import changed_settings
from aecr_jax.training.config import Config, DataConfig, LossConfig, OptimConfig, RunConfig, load_config
from aecr_jax.training.runlog import CONFIG

Scale = Literal["small", "paper"]


@dataclass(frozen=True)
class Small:
    """The small scale of a table: the same for all of its rows."""

    optim: OptimConfig
    crop: int = 128
    """Side of the crops in pixels."""
    width: int = 16
    """Width of AECR-Net. Other networks have the size of their config `:laptop`."""
    holdout: int = 50
    """Number of clear images of the training data that are held out."""


# The numbers of steps are chosen so that rows with regularization by VGG-19 take at most half an hour on two CPU cores.
_AECR_NET = Small(
    OptimConfig(
        steps=900,
        batch=8,
        optimizer="muon",
        learning_rate=3e-3,
        warmup=100,
        ema=0.99,
        freeze_stats_after=360,
        offset_rate=0.1,
        clip_norm=1,
    )
)
# The learning rate of each network is that of its config `:laptop`.
_OTHERS = Small(OptimConfig(steps=700, batch=4, warmup=20, clip_norm=1))
SMALL = {"table2": _AECR_NET, "table3": _OTHERS, "table4": _AECR_NET}
# The learning rate at which training continues from the weights of a network's authors.
FINE_TUNING_RATE = 1e-4
# The settings of a row's loss that also apply at the small scale.
_REGULARIZATION = (
    "cr",
    "positives",
    "negatives",
    "cr_form",
    "cr_negatives",
    "cr_after",
    "cr_network",
    "cr_layers",
    "cr_weights",
    "cr_normalize",
    "features",
)
# Where the data are is not part of a run's identity: a resumed run compares the images themselves.
_PLACES = ("data.train", "data.eval", "data.data_dir")


@dataclass(frozen=True)
class Start:
    """Weights from which the rows of one network begin."""

    path: str
    model: NetworkConfig


@dataclass(frozen=True)
class Inputs:
    """What the user gives for all rows."""

    data: str
    """Training data, in the notation of `DataConfig`."""
    test: str
    """Test data; empty for the images that are held out."""
    features: str
    """File of VGG-19 weights, or "random"."""
    start: Start | None = None


def largest_rate(scale: Scale) -> int:
    """Return r of Table 4: 10 in the paper, the batch at the small scale."""
    return SMALL["table4"].optim.batch if scale == "small" else PAPERS_RATE


def row_config(table: str, row: Row, scale: Scale, inputs: Inputs, *, seed: int, workdir: Path) -> Config:
    """Return the config of a row's run.

    Raises:
      UserError: the settings of the row are invalid, for example a rate that is greater than the batch.
    """
    config = load_config(row.config)
    loss = dataclasses.replace(config.loss, **row.loss)
    if loss.cr:
        loss = dataclasses.replace(loss, features=inputs.features)
    if scale == "small":
        config = _shrink(table, config, loss, inputs)
    else:
        data = dataclasses.replace(config.data, train=inputs.data, eval=inputs.test)
        # Evaluated at the end alone, so that the test images influence nothing.
        config = dataclasses.replace(config, loss=loss, data=data, run=RunConfig(eval_every=config.optim.steps))
    if inputs.start is not None and inputs.start.model.NAME == config.model.NAME:
        model = dataclasses.replace(inputs.start.model, dtype=config.model.dtype)
        optim = dataclasses.replace(config.optim, learning_rate=FINE_TUNING_RATE)
        config = dataclasses.replace(config, model=model, optim=optim, run=dataclasses.replace(config.run, init_from=inputs.start.path))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, workdir=str(workdir), seed=seed))
    try:
        config.validate()
    except UserError as error:
        raise UserError(f"row {row.name} of {table}: {error}") from error
    return config


def _shrink(table: str, config: Config, loss: LossConfig, inputs: Inputs) -> Config:
    """Return the small version of a row: a narrow network, few steps, small crops, and L1 as the only other part of the loss."""
    small = SMALL[table]
    optim = small.optim
    model: NetworkConfig
    if isinstance(config.model, AECRNetConfig):
        model = dataclasses.replace(config.model, width=small.width, dtype="float32")
    else:
        laptop = load_config(f"configs/methods.py:{config.model.NAME}:laptop")
        model, optim = laptop.model, dataclasses.replace(optim, learning_rate=laptop.optim.learning_rate)
    return Config(
        model=model,
        data=DataConfig(train=inputs.data, holdout=small.holdout, crop=small.crop, threads=2),
        loss=LossConfig(**{name: getattr(loss, name) for name in _REGULARIZATION}),
        optim=optim,
        run=RunConfig(log_every=50, save_every=150, eval_every=optim.steps, eval_images=25),
    )


def check_features(file: str | None, rows: Sequence[Row]) -> str:
    """Return the features for these rows, which are those with regularization; "" if there are none.

    Raises:
      UserError: features are needed and missing, or do not have all levels that the rows compare, by default the paper's.
    """
    if not rows:
        return ""
    if file is None:
        names = ", ".join(row.name for row in rows)
        raise UserError(f"--features FILE is missing: {names} need VGG-19, written by convert-vgg, or `random` to try things out")
    needed = max((row.loss.get("cr_layers", VGG19Features.LAYERS) for row in rows), key=len)
    if file != "random" and (levels := VGG19Features.load(file).levels) < len(needed):
        raise UserError(f"--features (={file}) has {levels} levels and must have the {len(needed)} up to {needed[-1]}")
    return file


def load_start(weights: str | None, rows: Sequence[Row], folder: Path) -> Start | None:
    """Return the weights from which rows begin; a file of a network's authors is converted into `folder` first.

    Raises:
      UserError: the weights are missing or damaged, or of a network that none of the rows has.
    """
    if weights is None:
        return None
    path = Path(weights)
    if path.is_file():
        path = folder / identify(weights)
        if not is_exported(path):  # or only a part of it, if the conversion was interrupted
            convert(weights, path, overwrite=True)
    model = load_checkpoint(path).config
    networks = {row.name: load_config(row.config).model.NAME for row in rows}
    if model.NAME not in networks.values():
        raise UserError(
            f"--weights (={weights}) are of {model.NAME}, but the rows have {', '.join(dict.fromkeys(networks.values()))}: leave it out"
        )
    return Start(str(path), model)


def identify(path: str) -> str:
    """Return what tells one file of weights from another, wherever it is: the beginning of its SHA-256.

    That of an exported model is the one of its weights. "-" stands for no weights, and other names, such as "random", for themselves.
    """
    file = Path(path) / WEIGHTS if is_exported(path) else Path(path)
    if not path or not file.is_file():
        return path or "-"
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:12]


def check_run(config: Config) -> None:
    """Check that the run's folder is empty or holds a run with these settings.

    The trainer itself accepts some other settings when it resumes; a row that has changed half-way would not be that row.

    Raises:
      UserError: the folder holds a run with other settings.
    """
    workdir = Path(config.run.workdir)
    if not has_checkpoint(workdir) or not (workdir / CONFIG).is_file():
        return
    try:
        written = json.loads((workdir / CONFIG).read_text())
        begun = written["run"]["init_from"]
        if begun and Path(begun).name == Path(config.run.init_from).name:  # the same weights, in an output folder that was moved
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, init_from=begun))
        changes = changed_settings(written, config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{workdir / CONFIG} is damaged: {first_line(error)}; move {workdir} away to start the row again") from error
    if changes := [change for change in changes if not change.startswith(_PLACES)]:
        raise UserError(f"{workdir} holds a run with other settings ({', '.join(changes)}): choose another --output, or move it away")
