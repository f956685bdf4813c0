"""The compared methods in training: contrastive regularization with each network, and the losses that only one of them has."""

import jax
import numpy as np
import pytest
from flax import nnx
from test_networks import SMALL

from aecr_jax import UserError, save_checkpoint
from aecr_jax.data.sources import DataConfig
from aecr_jax.losses.distillation import DistillationLoss
from aecr_jax.losses.restoration import RestorationLoss
from aecr_jax.losses.transmission import TransmissionLoss
from aecr_jax.losses.vgg import VGG19Features
from aecr_jax.networks.kddn import KDDNConfig, KDDNTeacher, KDDNTeacherConfig
from aecr_jax.networks.registry import find_network, has_parameters, network_names
from aecr_jax.training.config import Config, LossConfig, OptimConfig
from aecr_jax.training.initial import make_loss
from aecr_jax.training.mesh import make_mesh, replicate, shard_batch
from aecr_jax.training.step import init_state, make_train_step

# Small networks have the same kinds of parameters, and their initial values are traced in a fraction of the time.
TRAINABLE = [name for name in network_names() if name != "toy" and has_parameters(find_network(name).Config(**SMALL.get(name, {})))]

QUICK = ("aecr_net",)  # it takes seconds to compile a step, and for some networks much longer


def small_config(name, **options):
    model = find_network(name).Config(**SMALL.get(name, {}))
    return Config(model=model, optim=OptimConfig(batch=8, steps=10, learning_rate=1e-3, schedule="constant"), **options)


def batch(seed=0):
    """Eight images with haze of the physical model: t in [0.4, 0.9] for each, airlight 0.9."""
    rng = np.random.default_rng(seed)
    clear = rng.random((8, 16, 16, 3), np.float32)
    t = rng.uniform(0.4, 0.9, (8, 1, 1, 1)).astype(np.float32)
    return {"hazy": clear * t + np.float32(0.9) * (1 - t), "clear": clear}


def train_two_steps(config, devices):
    """Return the measurements of the second step, and the parameters after it."""
    mesh = make_mesh(jax.devices()[:devices])
    step = make_train_step(config, RestorationLoss(VGG19Features.random(width=2), cr=0.1), mesh)
    state = replicate(init_state(config), mesh)
    for i in range(2):
        state, measured = step(state, shard_batch(batch(i), mesh))
        assert all(np.isfinite(value).all() for value in measured.values()), measured
        assert measured["cr"] > 0 and measured["grad_norm"] > 0
    return {key: float(value) for key, value in measured.items()}, jax.device_get(state.params)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TRAINABLE])
def test_contrastive_regularization_trains_every_network(name):
    """Two steps: all terms and gradients are finite, and the parameters change."""
    config = small_config(name)
    before, (_, after) = jax.device_get(init_state(config).params), train_two_steps(config, 1)
    assert all(np.isfinite(array).all() for array in after.values())
    assert max(np.abs(after[key] - before[key]).max() for key in before) > 1e-4


# In test_step, AECR-Net is compared in float64.
@pytest.mark.parametrize("name", [name if name == "coarse_net" else pytest.param(name, marks=pytest.mark.slow) for name in TRAINABLE])
def test_eight_devices_compute_what_one_does(name):
    config = small_config(name)
    (one, one_after), (eight, eight_after) = (train_two_steps(config, devices) for devices in (1, 8))
    for key, value in one.items():
        assert eight[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    # Adam divides by the gradient's size, so an entry whose gradient is rounding noise may move by the learning rate.
    moved = np.concatenate([np.abs(eight_after[key] - array).ravel() for key, array in one_after.items()])
    assert moved.max() < 4.1e-3 and np.mean(moved > 1e-4) < 0.02


def test_the_settings_choose_the_loss(tmp_path):
    assert isinstance(make_loss(small_config("aod_net", loss=LossConfig(cr=0))), RestorationLoss)
    assert isinstance(make_loss(small_config("dehaze_net", loss=LossConfig(kind="transmission", cr=0))), TransmissionLoss)
    save_checkpoint(KDDNTeacher(KDDNTeacherConfig(width=2), rngs=nnx.Rngs(0)), tmp_path / "teacher")
    loss = LossConfig(kind="distillation", cr=0, teacher=str(tmp_path / "teacher"), features="random")
    assert isinstance(make_loss(small_config("kddn", loss=loss)), DistillationLoss)


@pytest.mark.parametrize(
    ("name", "loss", "message"),
    [
        ("aod_net", {"kind": "transmission"}, r"model.name \(=aod_net\) must be a network that estimates the transmission"),
        ("aod_net", {"kind": "distillation"}, r"model.name \(=aod_net\) must be kddn, because loss.kind"),
        ("kddn", {"kind": "distillation"}, "loss.teacher is empty and must be the checkpoint of a kddn_teacher"),
        ("kddn", {"kind": "distillation", "teacher": "none"}, "there is no checkpoint folder none"),
        ("kddn", {"kind": "distillation", "teacher": "dcp"}, r"loss.teacher \(=dcp\) is a dcp and must be a kddn_teacher"),
    ],
)
def test_losses_that_do_not_fit_the_network_are_refused(name, loss, message):
    config = small_config(name, loss=LossConfig(cr=0, features="random", **loss), data=DataConfig(crop=16))
    with pytest.raises(UserError, match=message):
        make_loss(config)


def test_a_teacher_of_another_width_is_refused(tmp_path):
    save_checkpoint(KDDNTeacher(KDDNTeacherConfig(width=3), rngs=nnx.Rngs(0)), tmp_path / "teacher")
    loss = LossConfig(kind="distillation", cr=0, teacher=str(tmp_path / "teacher"), features="random")
    with pytest.raises(UserError, match=r"model.width \(=2\) must be that of loss.teacher, 3"):
        make_loss(Config(model=KDDNConfig(width=2, blocks=1), loss=loss))


def test_regularization_belongs_to_the_restoration_loss():
    config = small_config("dehaze_net", loss=LossConfig(kind="transmission", cr=0.1))
    with pytest.raises(UserError, match=r"loss.cr \(=0.1\) must be 0 if loss.kind is transmission"):
        config.validate()
    config = small_config("dehaze_net", loss=LossConfig(kind="transmission", cr=0, perceptual=0.04))
    with pytest.raises(UserError, match=r"loss.perceptual \(=0.04\) must be 0 if loss.kind is transmission"):
        config.validate()
