"""The estimate of the haze: AECR-Net's output forms, and the loss that supervises them with haze made on the fly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from aecr_jax.data.haze import haze_for
from aecr_jax.data.pipeline import train_batches
from aecr_jax.data.sources import DataConfig, draw_scenes, open_samples
from aecr_jax.errors import UserError
from aecr_jax.losses.haze import HazeLoss, average_blocks
from aecr_jax.losses.restoration import RestorationLoss
from aecr_jax.networks.aecr_net import AECRNet, AECRNetConfig
from aecr_jax.networks.arrays import get_arrays, replace_arrays
from aecr_jax.networks.coarse_net import CoarseNet, CoarseNetConfig
from aecr_jax.ops.resize import enlarge_bilinear
from aecr_jax.training.config import Config, LossConfig
from aecr_jax.training.initial import make_loss

HAZY = jnp.asarray(np.random.default_rng(0).random((2, 21, 26, 3)), jnp.float32)


def network(output, **settings):
    model = AECRNet(AECRNetConfig(width=2, blocks=1, output=output, **settings), rngs=nnx.Rngs(0))
    model.eval()
    return model


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_bilinear_enlargement_is_that_of_jax_image(factor):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 7, 3)), jnp.float32)
    expected = jax.image.resize(x, (2, 5 * factor, 7 * factor, 3), "bilinear")
    np.testing.assert_allclose(enlarge_bilinear(x, factor), expected, atol=5e-6)


@pytest.mark.parametrize("output", ["airlight", pytest.param("affine", marks=pytest.mark.slow)])
def test_the_restored_image_follows_from_gain_and_offset(output):
    """Expected: the definition, restored = x + K x - B; in the scattering model K > 0 and the airlight B / K is in [0, 1]."""
    model = network(output)
    restored, gain, offset = model.restore_with_haze(HAZY)
    assert gain.shape == (2, 21, 26, 1)
    assert offset.shape == HAZY.shape
    np.testing.assert_allclose(restored, HAZY + gain * HAZY - offset, atol=1e-6)
    np.testing.assert_array_equal(model(HAZY), restored)
    if output == "airlight":
        assert gain.min() > 0
        assert 0 <= (offset / gain).min() <= (offset / gain).max() <= 1


def test_the_residual_form_adds_to_the_hazy_image_what_the_last_layer_gives():
    """Expected: with zeros as the last layer, the input; in the paper's form, tanh(0) = 0."""

    def without_last_layer(output):
        model = network(output)
        zeros = {name: jnp.zeros_like(x) for name, x in get_arrays(model).items() if name.startswith("up3.")}
        graph, state = nnx.split(model)
        return nnx.merge(graph, replace_arrays(state, {**get_arrays(model), **zeros}))

    np.testing.assert_array_equal(without_last_layer("residual")(HAZY), HAZY)
    assert not without_last_layer("direct")(HAZY).any()


def test_other_forms_do_not_estimate_the_haze():
    with pytest.raises(ValueError, match="does not estimate the haze"):
        network("direct").restore_with_haze(HAZY)


def test_coarse_levels_look_farther():
    """The four convolutions of a level reach four of its columns: about 10 columns of the input at half its resolution, 40 at an eighth."""

    def reach(levels):
        model, x = network("residual", coarse_levels=levels), jnp.zeros((1, 8, 40, 8))
        return float(jnp.abs(model.coarse(x.at[0, 0, 0].set(1)) - model.coarse(x))[0, 0, 20:].max())

    assert reach(1) == 0
    assert reach(3) > 0


@pytest.mark.parametrize(("name", "distance"), [("l1", np.abs), ("l2", np.square)])
def test_the_loss_of_the_haze(name, distance):
    """Expected: computed with NumPy from the definition, for maps at half the resolution."""
    rng = np.random.default_rng(2)
    t, airlight = rng.uniform(0.2, 1, (2, 4, 6, 1)), rng.uniform(0.5, 1, (2, 1, 1, 3))
    gain, offset, restored, clear = (rng.uniform(size=shape) for shape in ((2, 2, 3, 1), (2, 2, 3, 3), (2, 4, 6, 3), (2, 4, 6, 3)))
    batch = {"hazy": clear, "clear": clear, "transmission": t, "airlight": airlight}
    loss = HazeLoss(RestorationLoss(None, cr=0), 0.5, 2, name)
    total, measured = loss((jnp.asarray(restored), jnp.asarray(gain), jnp.asarray(offset)), {k: jnp.asarray(v) for k, v in batch.items()})
    k = (1 / t - 1).reshape(2, 2, 2, 3, 2, 1).mean((2, 4))
    expected = {
        "l1": abs(restored - clear).mean(),
        "gain": distance((gain - k) / (1 + k)).mean(),
        "offset": distance((offset - k * airlight) / (1 + k)).mean(),
    }
    assert {name: float(value) for name, value in measured.items()} == pytest.approx(expected, rel=1e-5)
    assert float(total) == pytest.approx(expected["l1"] + 0.5 * (expected["gain"] + expected["offset"]), rel=1e-5)


def test_blocks_of_padded_maps():
    """Five rows in blocks of two: the last block has row 4 and, by reflection, row 3."""
    x = jnp.arange(5.0).reshape(1, 5, 1, 1) * jnp.ones((1, 5, 4, 1))
    np.testing.assert_allclose(average_blocks(x, 2, 3, 2)[0, :, 0, 0], [0.5, 2.5, 3.5])


@pytest.mark.parametrize("crop", [(112, 112), (100, 250)])
def test_the_truth_has_the_cells_of_the_network(crop):
    """Expected: maps that are the true haze, averaged over cells of 8x8 pixels of the padded crop, have the distance 0."""
    model = CoarseNet(CoarseNetConfig(width=2, blocks=1), rngs=nnx.Rngs(0))
    loss = make_loss(Config(model=model.config, data=DataConfig(crop=crop[0], crop_width=crop[1]), loss=LossConfig(cr=0, haze=0.1)))
    gain = jnp.broadcast_to(jnp.linspace(0, 2, crop[1])[None, None, :, None], (1, *crop, 1))
    cells = model.pad(gain, 32).reshape(1, -(-crop[0] // 32) * 4, 8, -(-crop[1] // 32) * 4, 8, 1).mean((2, 4))
    hazy = jnp.zeros((1, *crop, 3))
    prediction = loss.predict(model, hazy)
    assert prediction[1].shape == cells.shape
    batch = {"hazy": hazy, "clear": prediction[0], "transmission": 1 / (1 + gain), "airlight": jnp.ones((1, 1, 1, 3))}
    total, _ = loss((prediction[0], cells, jnp.broadcast_to(cells, (*cells.shape[:3], 3))), batch)
    assert float(total) == pytest.approx(0, abs=1e-6)


def test_the_truth_of_the_haze_belongs_to_the_batch():
    """Expected: the scattering model, I = J t + A (1 - t), to half a step of 8 bits."""
    scenes = list(draw_scenes(0, 3, (40, 48)))
    batch = next(train_batches(scenes, DataConfig(crop=32, threads=1), batch=2, seed=0, haze_truth=True))
    t = batch["transmission"]
    assert t.shape == (2, 32, 32, 1)
    model = batch["clear"] * t + batch["airlight"] * (1 - t)
    np.testing.assert_allclose(batch["hazy"], model, atol=0.5 / 255 + 1e-6)
    assert "transmission" not in next(train_batches(scenes, DataConfig(crop=32, threads=1), batch=2, seed=0))


def test_constant_haze_has_one_transmission():
    clear = np.random.default_rng(0).random((4, 5, 3)).astype(np.float32)
    haze = haze_for(clear, None, np.random.default_rng(3))
    assert haze.transmission.shape == (4, 5, 1)
    assert haze.transmission.min() == haze.transmission.max() == np.float32(np.random.default_rng(3).uniform())
    np.testing.assert_array_equal(haze.airlight, 1)


def test_what_cannot_be_supervised_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"loss.haze \(=0.1\) must be 0, because model.name \(=aecr_net\) does not estimate the haze"):
        make_loss(Config(loss=LossConfig(cr=0, haze=0.1)))
    with pytest.raises(UserError, match=r"loss.haze \(=0.1\) must be 0 if loss.kind is transmission"):
        Config(loss=LossConfig(kind="transmission", cr=0, haze=0.1)).validate()
    for side in ("hazy", "clear"):
        (tmp_path / side).mkdir()
        Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(tmp_path / side / "a.png")
    pairs = open_samples(str(tmp_path))[0]
    with pytest.raises(UserError, match=r"loss\.haze must be 0 for data with hazy images"):
        train_batches(pairs, DataConfig(crop=32), batch=1, seed=0, haze_truth=True)
    with pytest.raises(UserError, match=r"loss\.cr_negatives \(=rehazed\) must be hazy or lagging for data with hazy images"):
        train_batches(pairs, DataConfig(crop=32), batch=1, seed=0, rehazed=1)
