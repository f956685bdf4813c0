"""DehazeNet after its layers, which test_authors checks: airlight, removal of haze, and training by the transmission."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_authors import SHARED
from test_commands import fails, lines
from test_data import picture

from aecr_jax import UserError, load_checkpoint
from aecr_jax.__main__ import main
from aecr_jax.convert.dehaze_net import FORMAT
from aecr_jax.losses.transmission import TransmissionLoss, solve_transmission
from aecr_jax.networks.aecr_net import AECRNet
from aecr_jax.networks.dehaze_net import DehazeNet, DehazeNetConfig

WEIGHTS = SHARED.parent / "weights" / "dehaze_net_matlab.npz"


@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs the authors' weights, which are not in the repository")
def test_the_whole_pipeline_with_the_authors_weights(x64):
    """The reference was computed in float64 with PyTorch's layers and NumPy, from the authors' MATLAB code."""
    file = np.load(SHARED / "dehaze_net_real.npz")
    model = FORMAT.build(dict(np.load(WEIGHTS)))
    x = jnp.asarray(file["x"]).transpose(0, 2, 3, 1)

    @jax.jit
    def steps(x):
        transmission = model.transmission(x)
        return transmission, model.airlight(x, transmission), model.refine(x, transmission), model(x)

    transmission, airlight, refined, y = steps(x)
    np.testing.assert_allclose(transmission[0, ..., 0], file["transmission"], atol=2e-6)
    np.testing.assert_allclose(airlight[0], file["airlight"], atol=1e-6)
    np.testing.assert_allclose(refined[0, ..., 0], file["transmission_refined"], atol=2e-6)
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2), file["y"], atol=5e-6)


def make(**settings):
    model = DehazeNet(DehazeNetConfig(**settings), rngs=nnx.Rngs(0))
    model.eval()
    return model


def with_transmission(model, value):
    """Make the layers estimate `value` everywhere."""
    model.estimate.kernel[...] = jnp.zeros_like(model.estimate.kernel[...])
    model.estimate.bias[...] = jnp.full_like(model.estimate.bias[...], value)
    return model


def test_airlight_by_hand():
    """Of 200 pixels, rank 2 from below bounds the candidates: all with a transmission of at most 0.2."""
    x, t = np.full((1, 10, 20, 3), 0.5, np.float32), np.full((1, 10, 20, 1), 0.9, np.float32)
    t[0, 2, 3], t[0, 4, 5], t[0, 6, 7] = 0.1, 0.2, 0.2
    x[0, 2, 3], x[0, 4, 5], x[0, 6, 7] = (0.2, 0.3, 0.4), (0.6, 0.7, 0.8), (0.6, 0.7, 0.9)
    x[0, 9, 9] = 1.0  # brightest, but with a high transmission
    np.testing.assert_allclose(make().airlight(x, t), [[0.6, 0.7, 0.9]], rtol=1e-6)
    np.testing.assert_allclose(make().airlight(np.full_like(x, 0.5), np.zeros_like(t)), [[0.5, 0.5, 0.5]], rtol=1e-6)


def test_the_transmission_has_a_bound_in_training_only():
    """I = 0.5 and A = 0.8: the result is (0.5 - 0.8) / t + 0.8, with t = 0.01 in evaluation and 0.05 in training."""
    x = jnp.full((1, 12, 12, 3), 0.5).at[0, 0, 0].set(0.8)

    def restore(model):
        return nnx.jit(lambda model, x: model(x))(model, x)[0, 5, 5]

    model = with_transmission(make(), 0.01)
    np.testing.assert_allclose(restore(model), -0.3 / 0.01 + 0.8, rtol=1e-3)
    model.train()
    np.testing.assert_allclose(restore(model), -0.3 / 0.05 + 0.8, rtol=1e-3)
    np.testing.assert_allclose(restore(with_transmission(make(least_transmission=0.1), 0.01)), -0.3 / 0.1 + 0.8, rtol=1e-3)
    assert np.isfinite(restore(with_transmission(make(), -1))).all()  # no transmission at all


def test_gradients_in_training_are_finite():
    x = jnp.asarray(np.random.default_rng(0).random((2, 11, 9, 3)), jnp.float32)
    model = DehazeNet(rngs=nnx.Rngs(1))
    model.train()
    gradients = jax.jit(nnx.grad(lambda model: jnp.square(model(x) - x).mean()))(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 0


# ---- training by the transmission


def test_transmission_of_a_pair_by_hand():
    """hazy = t clear + (1 - t) gives t back; a white image gives 1; otherwise t is the least-squares solution."""
    clear = np.random.default_rng(0).random((3, 4, 5, 3)).astype(np.float32)
    clear[2] = 1
    t = np.float32([0.3, 0.85, 0.5])
    hazy = clear * t[:, None, None, None] + (1 - t[:, None, None, None])
    np.testing.assert_allclose(solve_transmission(clear, hazy), [0.3, 0.85, 1.0], rtol=1e-5)
    noisy = hazy[:1] + np.random.default_rng(1).normal(0, 0.05, hazy[:1].shape).astype(np.float32)
    expected, *_ = np.linalg.lstsq((1 - clear[0]).reshape(-1, 1), (1 - noisy[0]).ravel(), rcond=None)
    np.testing.assert_allclose(solve_transmission(clear[:1], noisy), expected, rtol=1e-5)


def test_loss_by_hand():
    """The estimate is 0.5 everywhere; the squared errors are 0.04 and 0.01."""
    clear = jnp.full((2, 6, 6, 3), 0.5)
    t = jnp.array([0.3, 0.6])[:, None, None, None]
    hazy = clear * t + (1 - t)
    loss, model = TransmissionLoss(DehazeNet), with_transmission(make(), 0.5)
    total, measurements = loss(loss.predict(model, hazy), {"clear": clear, "hazy": hazy})
    np.testing.assert_allclose(total, 0.025, rtol=1e-5)
    assert measurements == {"mse": total}
    with pytest.raises(UserError, match=r"model.name \(=aecr_net\) must be a network that estimates the transmission, such as dehaze_net"):
        TransmissionLoss(AECRNet)


@pytest.mark.slow
def test_training_by_the_transmission(config_file, tmp_path, capsys):
    for i in range(3):
        picture(tmp_path / "photographs" / f"{i}.png", (20, 18), seed=i)
    workdir = tmp_path / "w"
    train = ["train", "--config", config_file, "--run.workdir", workdir, "--loss.kind", "transmission", "--loss.cr", "0", "--data.train"]
    train += [
        f"constant:{tmp_path / 'photographs'}",
        "--data.eval",
        "scenes:2:40x32",
        "--optim.learning_rate",
        "1e-3",
        "--run.eval_every",
        "99",
    ]
    assert "model.name (=aecr_net) must be a network that estimates the transmission" in fails(capsys, *train)
    assert main([str(argument) for argument in (*train, "--model.name", "dehaze_net", "--optim.steps", "60")]) == 0
    errors = [entry["mse"] for entry in lines(workdir, "train")]
    assert len(errors) == 60 and np.mean(errors[-20:]) < 0.6 * np.mean(errors[:20])
    assert isinstance(load_checkpoint(workdir), DehazeNet)
    assert json.loads((workdir / "config.json").read_text())["loss"]["kind"] == "transmission"
