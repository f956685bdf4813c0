"""The initial state of a run: the loss with its features and, for fine-tuning, the parameters of another model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from aecr_jax.errors import UserError
from aecr_jax.inference.weights import has_checkpoint, load_with_info
from aecr_jax.losses.distillation import DistillationLoss
from aecr_jax.losses.haze import HazeLoss
from aecr_jax.losses.loss import Loss
from aecr_jax.losses.restoration import RestorationLoss
from aecr_jax.losses.transmission import TransmissionLoss
from aecr_jax.losses.vgg import VGG16Features, VGG19Features, VGGFeatures
from aecr_jax.networks.kddn import KDDNConfig, KDDNTeacher
from aecr_jax.networks.network import Network
from aecr_jax.networks.registry import find_network
from aecr_jax.training.config import Config, DataConfig


def make_loss(config: Config, *, regularize: bool = True) -> Loss:
    """Return the loss that the settings describe; without `regularize`, that of the steps before contrastive regularization begins.

    Raises:
      UserError: a file of weights is missing or wrong, the crops are too small for the features, or the loss does not fit the network.
    """
    loss, dtype = config.loss, config.model.dtype
    if loss.haze and not find_network(config.model.NAME).estimates_haze(config.model):
        raise UserError(
            f"loss.haze (={loss.haze}) must be 0, because model.name (={config.model.NAME}) does not estimate the haze with these settings;"
            " aecr_net does with model.output affine or airlight"
        )
    if loss.kind == "transmission":
        return TransmissionLoss(find_network(config.model.NAME))
    if loss.kind == "distillation":
        return _make_distillation(config, _load_features(VGG19Features, loss.features, config.data))
    cr = loss.cr if regularize else 0.0
    features = _load_cr_features(config) if cr else None
    perceptual = _load_features(VGG16Features, loss.perceptual_features, config.data) if loss.perceptual else None
    restoration = RestorationLoss(
        features,
        cr=cr,
        positives=loss.positives,
        negatives=loss.negatives,
        form=loss.cr_form,
        weights=loss.cr_weights,
        negative_images=loss.cr_negatives,
        pixel=loss.pixel,
        perceptual=loss.perceptual,
        perceptual_features=perceptual,
        dtype=dtype,
    )
    if not loss.haze:
        return restoration
    return HazeLoss(restoration, loss.haze, find_network(config.model.NAME).haze_cell(*config.data.crop_size), loss.haze_distance)


def _make_distillation(config: Config, features: VGG19Features | None) -> DistillationLoss:
    if not isinstance(config.model, KDDNConfig):
        raise UserError(f"model.name (={config.model.NAME}) must be kddn, because loss.kind (=distillation) compares its features")
    if not config.loss.teacher:
        raise UserError("loss.teacher is empty and must be the checkpoint of a kddn_teacher, because loss.kind is distillation")
    teacher = load_with_info(config.loss.teacher)[0]
    if not isinstance(teacher, KDDNTeacher):
        raise UserError(f"loss.teacher (={config.loss.teacher}) is a {teacher.config.NAME} and must be a kddn_teacher")
    if teacher.config.width != config.model.width:
        raise UserError(f"model.width (={config.model.width}) must be that of loss.teacher, {teacher.config.width}")
    return DistillationLoss(teacher, features, dtype=config.model.dtype)


def _load_cr_features(config: Config) -> VGGFeatures:
    network, layers = {"vgg19": VGG19Features, "vgg16": VGG16Features}[config.loss.cr_network], config.loss.cr_layers
    try:
        network.check_layers(layers)
    except ValueError as error:
        raise UserError(f"loss.cr_layers: {error}") from error
    return _load_features(network, config.loss.features, config.data, layers=layers, normalize=config.loss.cr_normalize)


def _load_features(network: type[VGGFeatures], file: str, data: DataConfig, **options: Any) -> Any:
    features = network.random(**options) if file == "random" else network.load(file, **options)
    height, width = data.crop_size
    if min(height, width) < features.least:
        name, side = ("data.crop_width", width) if width < height else ("data.crop", height)
        raise UserError(f"{name} (={side}) must be at least {features.least} for the features of {', '.join(features.layers)}")
    return features


def load_initial(config: Config, say: Callable[[str], None]) -> Network | None:
    """Load the model that `run.init_from` names, and widen it if it is narrower than the run's network.

    Returns:
      The model; None if `run.init_from` is empty or the run already has a checkpoint.

    Raises:
      UserError: the model cannot be loaded, or is another network.
    """
    if not config.run.init_from or has_checkpoint(config.run.workdir):
        return None
    try:
        model, _ = load_with_info(config.run.init_from)
    except UserError as error:
        raise UserError(f"run.init_from: {error}") from error
    changes = model.config.changes(config.model)
    if not changes:
        return model
    try:
        wide = model.widen(config.model, rngs=nnx.Rngs(config.run.seed))
    except ValueError as error:
        name, there, here = changes[0]
        raise UserError(f"run.init_from (={config.run.init_from}) is another network: {name} is {there} there and {here} here") from error
    say(f"widening the network of {config.run.init_from}: " + ", ".join(f"{name} from {a} to {b}" for name, a, b in changes))
    return wide
