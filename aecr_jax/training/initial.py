"""The initial state of a run: the loss with its features and, for fine-tuning, the parameters of another model."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx

from aecr_jax.errors import UserError
from aecr_jax.inference.weights import has_checkpoint, load_with_info
from aecr_jax.losses.restoration import RestorationLoss
from aecr_jax.losses.vgg import load_vgg19, random_vgg19
from aecr_jax.networks.network import Network
from aecr_jax.training.config import Config


def make_loss(config: Config) -> RestorationLoss:
    """Return the loss that the settings describe.

    Raises:
      UserError: the file of feature weights is missing or wrong, or the crops are too small for the features.
    """
    features = None
    if config.loss.cr:
        features = random_vgg19() if config.loss.features == "random" else load_vgg19(config.loss.features)
        if config.data.crop < (least := 2 ** (features.levels - 1)):
            raise UserError(f"data.crop (={config.data.crop}) must be at least {least} for the {features.levels} levels of the features")
    rates = {"positives": config.loss.positives, "negatives": config.loss.negatives}
    return RestorationLoss(features, cr=config.loss.cr, dtype=config.model.dtype, **rates)


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
