"""The settings of a run: dataclasses, config files in Python, and typed overrides on the command line.

The defaults are the paper's recipe as its official code runs it. A config file is a Python file that sets
`config = Config(...)`, or `configs` to a dictionary of names and configs. It is executed, so use only config files that you trust.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jax

from aecr_jax.data.haze import HazeConfig
from aecr_jax.data.sources import DataConfig
from aecr_jax.errors import UserError, first_line
from aecr_jax.networks import registry
from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.networks.network import NetworkConfig
from aecr_jax.renamed import RENAMED
from aecr_jax.settings import bounded, check_settings, parse_value
from aecr_jax.storage import as_path


@dataclass(frozen=True)
class LossConfig:
    """The loss. By default it is the paper's, Eq. 4: `L1 + cr * regularization`."""

    kind: Literal["restoration", "transmission", "distillation"] = "restoration"
    """What is compared: "restoration", the restored image with the clear one, by the settings below; "transmission", the transmission
    that DehazeNet predicts with that of the haze, which must have the airlight 1; "distillation", in addition to the restored image,
    the features of KDDN's student with those of its teacher."""
    pixel: Literal["l1", "l2", "smooth_l1"] = "l1"
    """Pixel distance between the restored and the clear image."""
    cr: float = bounded(0.1, 0)
    """Weight of contrastive regularization (beta in the paper); 0 turns it off."""
    positives: int = bounded(1, 1)
    """Number of clear images that each restored image is compared with (Table 4)."""
    negatives: int = bounded(1, 0)
    """Number of negatives that each restored image is compared with (Table 4); 0 is the paper's CR*, which uses positives only."""
    cr_form: Literal["batch_ratio", "image_ratio", "difference"] = "batch_ratio"
    """How regularization combines the distances to positives and negatives: "batch_ratio", the ratio of the whole batch's distances (the
    official code); "image_ratio", the mean of each image's ratio (Eq. 4 of the paper); "difference", without a denominator that can be
    small, as in the triplet loss (FaceNet, Schroff et al., CVPR 2015), but without its margin."""
    cr_negatives: Literal["hazy", "rehazed", "lagging"] = "hazy"
    """What the negatives are: "hazy", the image's own hazy input and then the other hazy images of the batch (the paper, Table 4);
    "rehazed", the same scene under other haze, for haze that is made on the fly (this project); "lagging", the image as restored by the
    moving average of the network that `optim.ema` keeps, and then the other ones of the batch (model contrast, "Learning from History",
    Wu et al., AAAI 2024)."""
    cr_after: int = bounded(0, 0, 2**31 - 1)
    """Number of steps before regularization begins (this project). "lagging" negatives need at least 1, better several times
    1 / (1 - `optim.ema`), because the average first equals the network, and a ratio would divide by 1e-7."""
    features: str = "vgg19.safetensors"
    """File of VGG-19 weights (or VGG-16, see `cr_network`), written by `convert-vgg`; "vgg19_relu3_1" for the levels of VGG-19 up to
    relu3_1, which ship with the package and need the first three of `cr_layers` and `cr_weights`; or "random" for a narrow network with
    random weights, to try things out."""
    cr_network: Literal["vgg19", "vgg16"] = "vgg19"
    """Network of the features that regularization compares: VGG-19 in the paper, or VGG-16 (both Simonyan and Zisserman, 2015)."""
    cr_layers: tuple[str, ...] = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
    """Layers of the network whose features are compared, as `relu{stage}_{number}`; by default those of the paper."""
    cr_weights: tuple[float, ...] = bounded((0.03125, 0.0625, 0.125, 0.25, 1.0), 0)
    """Weight of each layer; by default those of the paper, 1/32, 1/16, 1/8, 1/4 and 1."""
    cr_normalize: bool = False
    """Normalize the images by ImageNet's mean and standard deviation before VGG, as in the training of torchvision's weights; the official
    code does not."""
    haze: float = bounded(0.0, 0)
    """Weight of the loss that compares the haze that the network estimates, as gain and offset, with the true haze; 0 turns it off. The
    data must have haze that is made on the fly, because only that is known. The idea is this project's; the paper has no such loss."""
    haze_distance: Literal["l1", "l2"] = "l1"
    """The distance of `haze`: "l1", or "l2" (the mean squared error), with which a network does not jump between clear and dense haze where
    the image does not show which it is, as in a white sky."""
    perceptual: float = bounded(0.0, 0)
    """Weight of the perceptual loss, the mean squared difference of VGG-16 features (0.04 in GridDehazeNet); 0 turns it off."""
    perceptual_features: str = "vgg16.safetensors"
    """File of VGG-16 weights for the perceptual loss, written by `convert-vgg`; or "random"."""
    teacher: str = ""
    """Checkpoint of the teacher for "distillation", a network that restores clear images from themselves."""

    @property
    def rehazed(self) -> int:
        """The number of further hazy versions of each clear crop that regularization needs."""
        return self.negatives if self.cr and self.cr_negatives == "rehazed" else 0

    @property
    def needs(self) -> dict[str, Any]:
        """What the loss needs of haze that is made on the fly, as arguments of `train_batches`."""
        return {"haze_truth": bool(self.haze), "rehazed": self.rehazed}

    def validate(self) -> None:
        """Raise UserError if the settings are inconsistent."""
        if self.kind != "restoration":
            for name in ("cr", "haze", "perceptual"):
                if value := getattr(self, name):
                    raise UserError(f"loss.{name} (={value}) must be 0 if loss.kind is {self.kind}")
        if not self.cr:
            return
        if (count := len(self.cr_weights)) != (layers := len(self.cr_layers)):
            raise UserError(f"loss.cr_weights has {count} values and must have {layers}, one for each of loss.cr_layers")
        if self.cr_negatives != "hazy" and not self.negatives:
            raise UserError(f"loss.negatives (=0) must be at least 1 if loss.cr_negatives is {self.cr_negatives}")

    def lacks_average(self, step: int) -> bool:
        """Whether a ratio in the step after `step` would have no denominator if the moving average of the network began there."""
        return bool(self.cr) and self.cr_negatives == "lagging" and self.cr_form != "difference" and self.cr_after <= step


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    steps: int = bounded(500_000, 1, 2**31 - 1)
    """Number of optimizer steps. The official code calls 5000 steps an epoch and trains for 100 epochs."""
    batch: int = bounded(16, 1, 2**31 - 1)
    """Number of images per step, over all devices."""
    optimizer: Literal["adam", "muon", "sgd"] = "adam"
    """The paper uses Adam. Muon (orthogonal steps for the convolution kernels, Nesterov Adam for the rest) learns faster in short
    runs, at a learning rate such as 3e-3. SGD has a momentum of 0.9."""
    learning_rate: float = 2e-4
    """Peak learning rate: 2e-4 in the paper (Adam), 1e-4 in the official code."""
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    """Learning rate schedule: cosine annealing to 0 at the last step, a constant rate, or a rate that is multiplied by `decay_factor`
    after every `decay_every` steps."""
    decay_every: int = bounded(100_000, 1, 2**31 - 1)
    """Number of steps between the decays of the schedule "steps"."""
    decay_factor: float = bounded(0.5, 0)
    """Factor on the learning rate at each decay of the schedule "steps"."""
    weight_decay: float = bounded(0.0, 0)
    """Factor of the parameters that is added to their gradients, as PyTorch's optimizers do."""
    warmup: int = bounded(0, 0, 2**31 - 1)
    """Number of steps over which the learning rate rises linearly from 0, in addition to the schedule."""
    accumulate: int = bounded(1, 1)
    """Split each batch into this many parts and compute them one after the other, to save memory. The statistics of FastDeconv
    and the ratio of contrastive regularization are then computed per part and not over the whole batch."""
    ema: float = bounded(0.0, 0)
    """Decay of a moving average of the parameters, such as 0.999; the average is then what is evaluated. 0 keeps no average."""
    freeze_stats_after: int = bounded(-1, -1)
    """After this many steps, FastDeconv whitens with its running averages, as in evaluation, and no longer updates them, because
    the statistics of a few images are noisy. Use 0 only with `init_from`, otherwise a few hundred; -1 never freezes them, as in the
    official code."""
    offset_rate: float = bounded(1.0, 0)
    """Factor on the learning rate of the convolution that predicts the offsets of the deformable layers; use less than 1 if a high
    learning rate makes the offsets diverge."""
    clip_norm: float = bounded(0.0, 0)
    """Scale gradients down to this global norm if theirs is larger; 0 turns clipping off."""


@dataclass(frozen=True)
class RunConfig:
    """What a run writes and how often, its initial values, and its processes."""

    workdir: str = "runs/its"
    """Folder for config, metrics, pictures and checkpoints, or an address gs://BUCKET/NAME; if it already holds a run, that run resumes."""
    seed: int = bounded(0, 0, 2**63 - 1)
    """Seed of the initial values, the order of the images, the crops and the haze."""
    log_every: int = bounded(100, 1)
    """Number of steps between lines in metrics.jsonl."""
    save_every: int = bounded(1000, 1)
    """Number of steps between checkpoints; each evaluation also writes one."""
    eval_every: int = bounded(5000, 1)
    """Number of steps between evaluations; each writes scores, a panel and a checkpoint."""
    eval_images: int = bounded(100, 1)
    """Evaluate on at most this many images during training."""
    init_from: str = ""
    """For fine-tuning: a checkpoint from which a new run takes its initial parameters, but not the optimizer state or the step. A
    network with a smaller `model.width` is widened: its output stays the same, and training fills the new channels."""
    tensorboard: bool = False
    """Also write scalars and panels for TensorBoard to the work directory."""
    profile: str = ""
    """FROM:TO, two steps: write a trace of the steps from the first to the second, for xprof, to `profile` in the work directory."""
    profiler_port: int = bounded(0, 0, 65535)
    """Port on which each process serves JAX's profiler, without access control; 0 turns the server off."""
    coordinator: str = ""
    """For several processes: HOST:PORT of process 0, the same for all; or "auto" where the cluster provides it (TPU pods, Slurm, MPI)."""
    processes: int = bounded(1, 1, 2**31 - 1)
    """Number of processes, if the coordinator is given as HOST:PORT."""
    process_id: int = bounded(0, 0, 2**31 - 1)
    """Number of this process, from 0, if the coordinator is given as HOST:PORT."""

    @property
    def profiled(self) -> range:
        """The steps to trace.

        Raises:
          UserError: `profile` is not FROM:TO.
        """
        if not self.profile:
            return range(0)
        steps = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", self.profile)
        if not steps or not 1 <= int(steps[1]) <= int(steps[2]):
            raise UserError(f"run.profile (={self.profile!r}) must be FROM:TO, two steps from 1 on, such as 100:103")
        return range(int(steps[1]), int(steps[2]) + 1)


@dataclass(frozen=True)
class Config:
    """All settings of a training run."""

    model: NetworkConfig = field(default_factory=AECRNetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    haze: HazeConfig = field(default_factory=HazeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check_settings(self) -> None:
        """Raise UserError at the first setting whose value is not of the annotated type or is out of bounds."""
        for section in dataclasses.fields(self):
            settings = getattr(self, section.name)
            if not isinstance(settings, kind := get_type_hints(Config)[section.name]):
                raise UserError(f"{section.name} (={settings!r}) must be of type {kind.__name__}")
            try:
                check_settings(settings)
            except ValueError as error:
                raise UserError(f"{section.name}.{error}") from error

    def validate(self) -> None:
        """Raise UserError at the first setting that is invalid by itself or in combination with others."""
        self.check_settings()
        optim, run = self.optim, self.run
        if optim.freeze_stats_after == 0 and not run.init_from:
            raise UserError(
                "optim.freeze_stats_after (=0) requires run.init_from, because a new network has no statistics to keep: set run.init_from,"
                " or freeze the statistics after a few hundred steps"
            )
        if not optim.learning_rate > 0:
            raise UserError(f"optim.learning_rate (={optim.learning_rate}) must be positive")
        if optim.ema >= 1:
            raise UserError(f"optim.ema (={optim.ema}) must be less than 1")
        if not run.workdir:
            raise UserError("run.workdir (='') must name a folder")
        try:
            as_path(run.workdir)
        except UserError as error:
            raise UserError(f"run.workdir: {error}") from error
        if run.profiled and run.profiled[-1] > optim.steps:
            raise UserError(f"run.profile (={run.profile}) must end at optim.steps (={optim.steps}) at the latest")
        if run.process_id >= run.processes:
            raise UserError(f"run.process_id (={run.process_id}) must be less than run.processes (={run.processes})")
        address = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\s]+):(\d{1,5})", run.coordinator)
        if run.coordinator not in ("", "auto") and not (address and 0 < int(address[2]) < 65536):
            raise UserError(f"run.coordinator (={run.coordinator!r}) must be HOST:PORT of process 0, such as node0:1234, or auto")
        if run.processes > 1 and not address:
            raise UserError(f"run.coordinator (={run.coordinator!r}) must be HOST:PORT of process 0 for run.processes (={run.processes})")
        self.loss.validate()
        for name in ("positives",) if self.loss.rehazed else ("positives", "negatives"):
            count, part = getattr(self.loss, name), optim.batch // optim.accumulate
            if self.loss.cr and count > part:
                raise UserError(f"loss.{name} (={count}) must be at most optim.batch / optim.accumulate (={part})")
        if self.loss.cr and self.loss.cr_negatives == "lagging" and not optim.ema:
            raise UserError("optim.ema (=0) must be positive, such as 0.999, if loss.cr_negatives is lagging, because it keeps the average")
        if self.loss.lacks_average(0):
            raise UserError(
                "loss.cr_after (=0) must be positive if loss.cr_negatives is lagging, because the average first equals the network; several"
                " times 1 / (1 - optim.ema) is better"
            )
        if "float64" in (self.model.dtype, self.model.param_dtype) and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            raise UserError("model.dtype and model.param_dtype may only be float64 with the environment variable JAX_ENABLE_X64=1")
        self.data.validate()
        self.haze.validate()


def for_laptop(config: Config) -> Config:
    """Return a config of the same experiment for a laptop: an AECR-Net of width 16, crops of 128, a batch of 4, and 5,000 steps."""
    return dataclasses.replace(
        config,
        model=AECRNetConfig(width=16),
        data=dataclasses.replace(config.data, crop=128),
        optim=OptimConfig(batch=4, steps=5000),
        run=RunConfig(workdir=f"{config.run.workdir}_laptop", eval_every=1000),
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Run a config file and apply overrides such as `["--optim.steps", "100"]`.

    Args:
      path: a Python file that sets `config = Config(...)`, or `configs = {"name": Config(...), ...}`. `FILE:NAME` chooses one of
        several; the default is the first.
      overrides: arguments as for `override`.

    Raises:
      UserError: the file is not a config file, has no config of that name, or an override is wrong (see `override`).
    """
    file, _, variant = str(path).partition(".py:")
    path = Path(f"{file}.py" if variant else file)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(f"there is no config file {path}" + (f"; {path.parent} has {', '.join(near)}" if near else ""))
    try:
        found = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        if isinstance(error, TypeError) and (
            unknown := re.search(r"(?:(\w+)Config\.__init__\(\) got an )?unexpected keyword argument '(\w+)'", str(error))
        ):
            group = (unknown[1] or "").lower()
            name = f"{group if group in ('data', 'haze', 'loss', 'optim', 'run') else 'model'}.{unknown[2]}"
            raise UserError(f"config file {path}: unknown setting {name}{_advice(name, setting_names(Config()))}") from error
        if isinstance(error, ImportError) and "TrainConfig" in str(error):
            raise UserError(f"config file {path}: TrainConfig is now OptimConfig and RunConfig (--help lists their settings)") from error
        raise UserError(f"config file {path} fails: {type(error).__name__}: {first_line(error)}") from error
    configs = found.get("configs", {"": found.get("config")})
    if not isinstance(configs, dict) or not all(isinstance(name, str) for name in configs):
        raise UserError(f"config file {path} must set `configs` to a dict of names and configs")
    if variant and variant not in configs:
        known = f"; it has {', '.join(configs)}" if "configs" in found else "; it has one config without a name"
        raise UserError(f"config file {path} has no config {variant!r}{known}")
    config = configs[variant] if variant else next(iter(configs.values()), None)
    if not isinstance(config, Config):
        raise UserError(f"config file {path} must set `config = Config(...)`, not {type(config).__name__}")
    try:
        config.check_settings()
    except UserError as error:
        raise UserError(f"config file {path}: {error}") from error
    return override(config, overrides)


def override(config: Config, arguments: Sequence[str]) -> Config:
    """Return `config` with arguments such as `["--optim.steps", "100", "--model.dtype=bfloat16"]` applied.

    `--model.name NAME` chooses another network, with its default settings, before the other arguments are applied.

    Raises:
      UserError: a setting is unknown (the message lists the nearest names), has been renamed, or has a value of the wrong type.
    """
    given = _pair_up(arguments)
    try:
        if (name := given.pop("model.name", None)) is not None and name != config.model.NAME:
            config = dataclasses.replace(config, model=registry.find_network(name).Config())
        names = setting_names(config)
        groups: dict[str, dict[str, Any]] = {}
        for name, text in given.items():
            if name not in names:
                raise ValueError(f"unknown setting --{name}{_advice(name, names)}")
            group, _, field_name = name.partition(".")
            kind = get_type_hints(type(getattr(config, group)))[field_name]
            groups.setdefault(group, {})[field_name] = parse_value(text, kind, name)
        changed = {group: _replace(config, group, values) for group, values in groups.items()}
    except ValueError as error:
        raise UserError(str(error)) from error
    config = dataclasses.replace(config, **changed)
    config.validate()
    return config


def _replace(config: Config, group: str, values: dict[str, Any]) -> Any:
    try:
        return dataclasses.replace(getattr(config, group), **values)
    except ValueError as error:
        raise ValueError(f"{group}.{error}") from error


def _pair_up(arguments: Sequence[str]) -> dict[str, str]:
    """Return the values of `--name VALUE` and `--name=VALUE` by name; if a name is repeated, the last value counts."""
    given: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if not re.match(r"--[a-z]", argument):
            raise UserError(f"unexpected argument {argument}: settings are given as --SECTION.KEY VALUE")
        name, equals, value = argument[2:].partition("=")
        if not equals and (value := next(rest, "--")).startswith("--"):
            raise UserError(f"--{name} has no value: settings are given as --SECTION.KEY VALUE")
        given[name.replace("-", "_")] = value
    return given


def _advice(name: str, names: list[str]) -> str:
    if new := RENAMED.get(name):
        return f"; use --{new}"
    last = {n.split(".")[-1]: n for n in names}
    near = difflib.get_close_matches(name, names, 3, 0.5) or [last[n] for n in difflib.get_close_matches(name.split(".")[-1], last, 3, 0.6)]
    return f"; nearest: {', '.join('--' + n for n in near)}" if near else "; --help lists all settings"


def setting_names(config: Config) -> list[str]:
    """Return the names of all settings, such as "optim.steps"."""
    groups = ((group.name, getattr(config, group.name)) for group in dataclasses.fields(config))
    return ["model.name", *(f"{group}.{field.name}" for group, settings in groups for field in dataclasses.fields(settings))]


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return a config as JSON has it, with lists for tuples: its groups of settings, with the network's name in that of the model."""
    settings = dataclasses.asdict(config) | {"model": registry.config_to_dict(config.model)}
    return json.loads(json.dumps(settings))
