"""Settings: dataclasses, a config file in Python, and typed overrides on the command line.

The defaults are the paper's recipe as its official code runs it. A config file is a Python file with a module-level
`config = Config(...)`; it is code, so run only those that you trust.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import math
import re
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jax
import tyro

from aecr_jax.errors import UserError, first_line
from aecr_jax.model import ModelConfig
from aecr_jax.settings import check_types


@dataclass(frozen=True)
class DataConfig:
    """Images for training and evaluation: a data set that `prepare-data` built, or folders, or else the embedded scenes."""

    dataset: str = ""
    """Built data set to train on, such as reside/its or nh_haze, instead of the folders `hazy`, `clear` and `depth`."""
    eval_dataset: str = ""
    """Built data set for evaluation during training, such as reside/sots_indoor, instead of `eval_hazy` and `eval_clear`."""
    data_dir: str = ""
    """Where `prepare-data` wrote them; empty: ~/tensorflow_datasets."""
    split: str = ""
    """Named split, such as nh_haze_45_5_5: its parts train and evaluate."""
    hazy: str = ""
    """Folder of hazy training images; goes with `clear`."""
    clear: str = ""
    """Folder of clear training images; goes with `hazy`, or with `depth`."""
    depth: str = ""
    """Folder of depth maps; haze is then made on the fly from `clear`, with RESIDE's ranges."""
    eval_hazy: str = ""
    """Folder of hazy images for evaluation during training; goes with `eval_clear`."""
    eval_clear: str = ""
    """Folder of clear images for evaluation during training."""
    holdout: int = 0
    """Without a split or evaluation images: this many clear images, the last by name, leave training for evaluation."""
    scenes: int = 200
    """How many embedded scenes to train on, if no folder is named; 20 others are for evaluation."""
    scene_size: tuple[int, int] = (240, 320)
    """Height and width of the embedded scenes."""
    crop: int = 240
    """Side of the random training crops."""
    threads: int = 8
    """Threads that read and prepare images."""
    workers: int = 0
    """Processes that do so; 0: only the threads of the training process."""
    cache: bool = False
    """Keep decoded images in memory: 1.7 MB for each pair of RESIDE's 620x460, 2 MB with depth (NYU's 1399: 2.8 GB), times `workers`."""


@dataclass(frozen=True)
class LossConfig:
    """Eq. 4: `L1 + cr * regularization`."""

    cr: float = 0.1
    """Beta, the factor of contrastive regularization; 0 trains on L1 alone."""
    positives: int = 1
    """Clear images per restored one (Table 4)."""
    negatives: int = 1
    """Hazy images per restored one (Table 4); 0 is CR*, positives only."""
    features: str = "vgg19.safetensors"
    """File of VGG-19 weights, written by `convert-vgg`; or "random": a narrow network of random weights, for trying things out."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimization and what is written."""

    workdir: str = "runs/its"
    """Folder for config, metrics, pictures and checkpoints; an existing one is continued."""
    steps: int = 500_000
    """Optimizer steps. The official code calls 5000 of them an epoch and trains 100."""
    batch: int = 16
    """Images per step, over all devices."""
    optimizer: Literal["adam", "muon"] = "adam"
    """Adam is the paper's; Muon (orthogonal steps for the convolutions' kernels, Nesterov Adam for the rest) learns faster in short
    runs, at a learning rate such as 3e-3."""
    learning_rate: float = 2e-4
    """Peak learning rate; 2e-4 in the paper (Adam), 1e-4 in the official code."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Cosine annealing to 0 at the last step, or none."""
    warmup: int = 0
    """Steps over which the learning rate rises from 0 linearly, on top of the schedule."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory; FastDeconv and the ratio of contrastive
    regularization are then of a part and not of the batch."""
    ema: float = 0.0
    """Decay of a moving average of the parameters, such as 0.999, which is then what is evaluated; 0: none."""
    freeze_stats_after: int = -1
    """After this many steps FastDeconv whitens by its running averages, as in evaluation, and leaves them as they are: the
    statistics of a few images are noise. 0 only with `init_from`, else some hundred; -1: never, as in the official code."""
    offset_rate: float = 1.0
    """Factor on the learning rate of the convolution that predicts the deformable layers' offsets; less than 1 where a high
    learning rate makes them run away."""
    clip_norm: float = 0.0
    """Scale gradients down to this global norm; 0: never."""
    seed: int = 0
    """Seeds initial values, order, crops and haze."""
    log_every: int = 100
    """Steps between lines in metrics.jsonl."""
    save_every: int = 1000
    """Steps between checkpoints; each evaluation writes one too."""
    eval_every: int = 5000
    """Steps between evaluations; each writes scores, a panel and a checkpoint."""
    eval_images: int = 100
    """Evaluate on at most this many images during training."""
    init_from: str = ""
    """Fine-tuning: a checkpoint whose parameters a new run begins with; its optimizer and step are not taken. That of a smaller
    `model.width` is widened: its output stays, and training fills the new channels."""
    tensorboard: bool = False
    """Write scalars and panels for TensorBoard too, into the work directory."""
    coordinator: str = ""
    """For several processes: HOST:PORT of process 0, the same for all; or "auto" where the cluster tells (TPU pods, Slurm, MPI)."""
    processes: int = 1
    """How many processes there are; with a HOST:PORT."""
    process_id: int = 0
    """Which one this is, from 0; with a HOST:PORT."""


@dataclass(frozen=True)
class Config:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check_types(self) -> None:
        """Raise UserError at the first setting whose value has not the annotated type, whatever the other settings are."""
        for section in dataclasses.fields(self):
            settings = getattr(self, section.name)
            if not isinstance(settings, kind := get_type_hints(Config)[section.name]):
                raise UserError(f"{section.name} (={settings!r}) must be a {kind.__name__}")
            try:
                check_types(settings)
            except ValueError as error:
                raise UserError(f"{section.name}.{error}") from error

    def validate(self) -> None:
        """Raise UserError at the first setting that cannot work."""
        self.check_types()
        # The step is a 32-bit counter; JAX takes seeds of 63 bits; a thousand threads or processes would only stand in each other's way.
        bounds: dict[str, tuple[float, float, float]] = {
            "data.crop": (self.data.crop, 4, math.inf),
            "data.scene_size": (min(self.data.scene_size), 8, math.inf),
            "train.seed": (self.train.seed, 0, 2**63 - 1),
            "data.scenes": (self.data.scenes, 1, math.inf),
            "data.holdout": (self.data.holdout, 0, math.inf),
            "data.threads": (self.data.threads, 1, 256),
            "data.workers": (self.data.workers, 0, 256),
            "loss.cr": (self.loss.cr, 0, math.inf),
            "loss.positives": (self.loss.positives, 1, math.inf),
            "loss.negatives": (self.loss.negatives, 0, math.inf),
            "train.steps": (self.train.steps, 1, 2**31 - 1),
            "train.batch": (self.train.batch, 1, 2**31 - 1),
            "train.log_every": (self.train.log_every, 1, math.inf),
            "train.warmup": (self.train.warmup, 0, 2**31 - 1),
            "train.freeze_stats_after": (self.train.freeze_stats_after, -1, math.inf),
            "train.offset_rate": (self.train.offset_rate, 0, math.inf),
            "train.clip_norm": (self.train.clip_norm, 0, math.inf),
            "train.accumulate": (self.train.accumulate, 1, math.inf),
            "train.ema": (self.train.ema, 0, math.inf),
            "train.save_every": (self.train.save_every, 1, math.inf),
            "train.processes": (self.train.processes, 1, 2**31 - 1),
            "train.process_id": (self.train.process_id, 0, 2**31 - 1),
            "train.eval_every": (self.train.eval_every, 1, math.inf),
            "train.eval_images": (self.train.eval_images, 1, math.inf),
        }
        for name, (value, least, most) in bounds.items():
            if value < least:
                raise UserError(f"{name} (={value}) must be at least {least}")
            if value > most:
                raise UserError(f"{name} (={value}) must be at most {most}")
        if self.train.freeze_stats_after == 0 and self.model.fast_deconv and not self.train.init_from:
            raise UserError(
                "train.freeze_stats_after (=0) needs train.init_from: a new network has no statistics to keep; else some hundred steps"
            )
        if not self.train.learning_rate > 0:
            raise UserError(f"train.learning_rate (={self.train.learning_rate}) must be positive")
        if not self.train.workdir:
            raise UserError("train.workdir (='') must name a folder")
        if "://" in self.train.workdir:
            raise UserError(f"train.workdir (={self.train.workdir}) must be a folder; mount the bucket, or copy the run there afterwards")
        if self.train.ema >= 1:
            raise UserError(f"train.ema (={self.train.ema}) must be less than 1")
        if self.train.process_id >= self.train.processes:
            raise UserError(f"train.process_id (={self.train.process_id}) must be less than train.processes (={self.train.processes})")
        address = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\s]+):(\d{1,5})", self.train.coordinator)
        if self.train.coordinator not in ("", "auto") and not (address and 0 < int(address[2]) < 65536):
            raise UserError(f"train.coordinator (={self.train.coordinator!r}) must be HOST:PORT of process 0, such as node0:1234, or auto")
        if self.train.processes > 1 and not address:
            raise UserError(f"train.coordinator (={self.train.coordinator!r}) must be HOST:PORT of process 0, if train.processes is set")
        for name in ("positives", "negatives"):
            count, part = getattr(self.loss, name), self.train.batch // self.train.accumulate
            if self.loss.cr and count > part:
                raise UserError(f"loss.{name} (={count}) must be at most train.batch / train.accumulate (={part})")
        if "float64" in (self.model.dtype, self.model.param_dtype) and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            raise UserError("float64 needs the environment variable JAX_ENABLE_X64=1")
        data = self.data
        if data.split and (data.eval_dataset or data.eval_hazy or data.holdout):
            raise UserError(f"data.split (={data.split}) says what to evaluate on: leave data.eval_* empty and data.holdout 0")
        if data.hazy and data.depth:
            raise UserError("data.hazy and data.depth are both set: name hazy images, or depth to make haze from")
        if (data.hazy or data.depth) and not data.clear:
            raise UserError("data.clear is not set: name the folder of clear images")
        if data.clear and not (data.hazy or data.depth):
            raise UserError("data.clear is set without data.hazy or data.depth: name the folder of one of the two")
        if bool(data.eval_hazy) != bool(data.eval_clear):
            raise UserError("data.eval_hazy and data.eval_clear go together: name both or none")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Runs the config file `path` and applies overrides such as `["--train.steps", "100"]`.

    Raises:
      UserError: the file is no config, or an override is unknown (the nearest names are given) or has a value of a wrong type.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(f"there is no config file {path}" + (f"; {path.parent} has {', '.join(near)}" if near else ""))
    try:
        config = runpy.run_path(str(path)).get("config")
    except (Exception, SystemExit) as error:
        if isinstance(error, TypeError) and (unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error))):
            raise UserError(f"config file {path}: unknown setting {unknown[1]}{_nearest(unknown[1], _names(Config()))}") from error
        raise UserError(f"config file {path} fails: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(config, Config):
        raise UserError(f"config file {path} must set `config = Config(...)`, not {type(config).__name__}")
    try:
        config.check_types()
    except UserError as error:
        raise UserError(f"config file {path}: {error}") from error
    return override(config, overrides)


def override(config: Config, arguments: Sequence[str]) -> Config:
    """Returns `config` with `--section.key value` arguments applied; errors as in `load_config`."""
    names = _names(config)
    for argument in arguments:
        name = argument.lstrip("-").split("=")[0].replace("-", "_")
        if re.match(r"--?[a-z]", argument) and name not in (*names, "help", "h"):
            raise UserError(f"unknown setting --{name}{_nearest(name, names)}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(
                Config,
                default=config,
                args=list(arguments),
                prog="train.py --config FILE",
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws a box of several lines; what is wrong stands in it before its hints.
        text = " ".join(re.sub(r"[^\x20-\x7e]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue())).split())
        text = re.split(r" -+ |Argument helptext|For full helptext", text)[0].strip()
        # The first words are the title of the box, which the sentence after it repeats.
        text = re.sub(r"^(Missing argument|Invalid choice|Value error|Unrecognized options) ", "", text)
        if number := re.fullmatch(r"Error parsing --(\S+): (invalid literal for int|could not convert string).*?: (.*)", text):
            kind = "an integer" if "int" in number[2] else "a number"
            raise UserError(f"{number[1]} (={number[3]}) must be {kind}") from None
        raise UserError(re.sub(r"^Error parsing (\w+): ", r"\1.", text) or "bad settings") from None
    except ValueError as error:
        raise UserError(str(error)) from error
    config.validate()
    return config


def _nearest(name: str, names: list[str]) -> str:
    last = {n.split(".")[-1]: n for n in names}
    near = difflib.get_close_matches(name, names, 3, 0.5) or [last[n] for n in difflib.get_close_matches(name.split(".")[-1], last, 3, 0.6)]
    return f"; nearest: {', '.join('--' + n for n in near)}" if near else "; --help lists them"


def _names(config: Any, prefix: str = "") -> list[str]:
    names = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        names += _names(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else [f"{prefix}{f.name}"]
    return names


def config_to_json(config: Any) -> str:
    """A dataclass as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2)
