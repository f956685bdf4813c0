"""The dark channel prior: its steps against reference values, and a network without parameters in every command.

`golden/networks/dcp.npz` was computed with NumPy in float64 from the published method: `x` is an image of 48x64 pixels, and the
settings are stored beside the results, once with the prefix `alt_`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_authors import GOLDEN
from test_commands import fails
from test_data import picture

from aecr_jax import UserError, dehaze, load_checkpoint, save_checkpoint
from aecr_jax.__main__ import main
from aecr_jax.data.images import read_image
from aecr_jax.networks.dcp import DCP, DCPConfig, dark_channel


def make(file, prefix, dtype):
    names = {"patch": "patch", "omega": "omega", "least_transmission": "t0", "radius": "r", "epsilon": "eps"}
    settings = {ours: file[prefix + theirs].item() for ours, theirs in names.items()}
    return DCP(DCPConfig(dtype=dtype, **settings), rngs=nnx.Rngs(0))


def steps(model, x):
    transmission = model.transmission(x)
    return {
        "dark_channel": dark_channel(x, model.config.patch),
        "airlight": model.airlight(x),
        "transmission_raw": transmission[..., 0],
        "transmission": model.refine(x, transmission)[..., 0],
        "y": model(x),
    }


@pytest.mark.parametrize("prefix", ["", "alt_"])
def test_every_step_in_float64(prefix, x64):
    file = np.load(GOLDEN / "dcp.npz")
    model = make(file, prefix, "float64")
    x = jnp.asarray(file["x"], jnp.float64)
    # A batch of different images, so that each must have its own airlight.
    got = jax.jit(lambda x: steps(model, x))(jnp.stack([1 - x, x]))
    for name, value in got.items():
        np.testing.assert_allclose(value[1], file[prefix + name], rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("prefix", ["", "alt_"])
def test_every_step_in_float32(prefix):
    """Reached: 7e-8 in the transmission and 2e-7 in the restored image."""
    file = np.load(GOLDEN / "dcp.npz")
    model = make(file, prefix, "float32")
    for name, value in jax.jit(lambda x: steps(model, x))(jnp.asarray(file["x"])[None]).items():
        np.testing.assert_allclose(value[0], file[prefix + name], rtol=0, atol=1e-6, err_msg=name)


def test_airlight_by_hand():
    """Of 2,000 pixels, 2 are candidates. Among equal dark channels, the first two rows of the tie are taken, then the brightest colour."""
    model = DCP(DCPConfig(patch=1), rngs=nnx.Rngs(0))
    x = np.full((1, 40, 50, 3), 0.25, np.float32)
    x[0, 5, 7] = 0.5, 0.5, 0.75  # the first of three pixels with the dark channel 0.5
    x[0, 5, 9] = 0.5, 1.0, 0.5
    x[0, 6, 0] = 0.5, 1.0, 1.0  # brighter, but no candidate
    np.testing.assert_array_equal(model.airlight(x), [[0.5, 1.0, 0.5]])
    x[0, 5, 7] = 0.5, 0.5, 1.0  # as bright as the other candidate, and first
    np.testing.assert_array_equal(model.airlight(x), [[0.5, 0.5, 1.0]])


@pytest.mark.parametrize("size", [(1, 1), (9, 1), (7, 8)])
def test_images_smaller_than_the_windows(size):
    model = DCP(rngs=nnx.Rngs(0))
    restored = nnx.jit(model)(jnp.asarray(np.random.default_rng(0).random((2, *size, 3)), jnp.float32))
    assert restored.shape == (2, *size, 3) and np.isfinite(restored).all()


def test_black_and_white_images_stay():
    x = jnp.stack([jnp.zeros((20, 20, 3)), jnp.ones((20, 20, 3))])
    np.testing.assert_allclose(nnx.jit(DCP(rngs=nnx.Rngs(0)))(x), x, atol=1e-6)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"patch \(=4\) must be odd"):
        DCPConfig(patch=4)
    with pytest.raises(ValueError, match="hazy has shape"):
        DCP(rngs=nnx.Rngs(0))(jnp.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="must be floating point"):
        DCP(rngs=nnx.Rngs(0))(np.zeros((1, 4, 4, 3), np.uint8))


def test_pytorch_twin(x64):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from aecr_jax.benchmark.twins.dcp import make as make_twin

    file = np.load(GOLDEN / "dcp.npz")
    for prefix in ("", "alt_"):
        twin = make_twin(vars(make(file, prefix, "float64").config))
        y = twin(torch.from_numpy(file["x"].astype(np.float64)).permute(2, 0, 1)[None])
        np.testing.assert_allclose(y[0].permute(1, 2, 0), file[prefix + "y"], rtol=0, atol=1e-9)


# ---- a network without parameters


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, so that no folder is called dcp."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_loaded_by_name_or_from_a_folder(folder):
    model = load_checkpoint("dcp")
    assert isinstance(model, DCP) and model.config == DCPConfig() and model.name == "dcp" and model.step is None
    save_checkpoint(DCP(DCPConfig(patch=7), rngs=nnx.Rngs(0)), folder / "other")
    assert load_checkpoint("other").config == DCPConfig(patch=7)
    save_checkpoint(DCP(DCPConfig(radius=9), rngs=nnx.Rngs(0)), folder / "dcp")
    assert load_checkpoint("dcp").config == DCPConfig(radius=9)  # a folder of that name comes first
    with pytest.raises(UserError, match="there is no checkpoint folder dehaze_net"):
        load_checkpoint("dehaze_net")


def test_commands_take_its_name(folder, capsys):
    image = picture(folder / "a.png", (20, 12))
    assert main(["dehaze", str(image), "--checkpoint", "dcp", "--output", "clean"]) == 0
    assert "model: dcp" in capsys.readouterr().out
    np.testing.assert_allclose(read_image(folder / "clean" / "a.png"), dehaze(read_image(image), "dcp"), atol=0.51 / 255)
    assert main(["eval", "--checkpoint", "dcp", "--data", "scenes:2:40x32", "--output", "out"]) == 0
    assert json.loads((folder / "out" / "summary.json").read_text())["checkpoint"] == "dcp"


def test_training_it_is_refused(config_file, folder, capsys):
    train = ["train", "--config", config_file, "--run.workdir", folder / "w", "--model.name", "dcp"]
    assert "model.name (=dcp) has no parameters to train; eval and dehaze take it with --checkpoint" in fails(capsys, *train)
    assert not (folder / "w").exists()
    assert "--network (=dcp) has no parameters to train" in fails(capsys, "benchmark", "train", "--network", "dcp")
