"""Networks by name: a network of ten lines works with every command, because generic code does not depend on the network."""

import functools
import json
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_commands import fails, lines
from test_data import picture

from aecr_jax import load_checkpoint, save_checkpoint
from aecr_jax.__main__ import main
from aecr_jax.data.images import read_image
from aecr_jax.networks import registry
from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.networks.arrays import count_parameters
from aecr_jax.networks.network import Network, NetworkConfig


@dataclass(frozen=True, kw_only=True)
class ToyConfig(NetworkConfig):
    NAME = "toy"
    features: int = 4


class Toy(Network):
    Config = ToyConfig

    def __init__(self, config, *, rngs):
        self.config = config
        self.first = nnx.Conv(3, config.features, (3, 3), rngs=rngs)
        self.last = nnx.Conv(config.features, 3, (3, 3), rngs=rngs)

    def __call__(self, hazy):
        return hazy + self.last(nnx.relu(self.first(hazy)))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(registry, "_NETWORKS", dict(registry._NETWORKS))
    registry.register_network(Toy)


@pytest.mark.slow
@pytest.mark.parametrize("cr", ["0", "0.1"])
def test_a_new_network_goes_through_every_command(config_file, tmp_path, capsys, cr):
    workdir = tmp_path / "w"
    aecr = ["train", "--config", config_file, "--run.workdir", str(workdir), "--loss.cr", cr]
    train = [*aecr, "--model.name", "toy", "--model.features", "5"]
    assert main([*train, "--optim.steps", "2"]) == 0
    assert main([*train, "--optim.steps", "4", "--optim.freeze_stats_after", "1"]) == 0
    said = capsys.readouterr().out
    assert "continuing from step 2" in said and "frozen" not in said  # this network has no statistics
    assert json.loads((workdir / "config.json").read_text())["model"] == {"name": "toy", **vars(ToyConfig(features=5))}
    logged = lines(workdir, "train")
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4] and ("cr" in logged[-1]) == (cr != "0")
    assert not {"mix1", "offset_max"} & set(logged[-1]) and logged[-1]["l1"] < logged[0]["l1"] + 0.1
    assert "model.name is toy there and aecr_net here" in fails(capsys, *aecr)

    model = load_checkpoint(workdir / "checkpoints" / "4")
    assert isinstance(model, Toy) and model.config == ToyConfig(features=5) and model.step == 4 and model.name == "w"
    x = np.random.default_rng(0).random((1, 9, 11, 3), np.float32)
    save_checkpoint(model, tmp_path / "exported")
    exported = load_checkpoint(tmp_path / "exported")
    assert exported.step == 4  # an exported run keeps its step
    np.testing.assert_array_equal(exported(x), model(x))

    assert main(["eval", "--checkpoint", str(workdir), "--data", "scenes", "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["images"] == 20
    a = picture(tmp_path / "a.png", (20, 12))
    assert main(["dehaze", str(a), "--checkpoint", str(tmp_path / "exported"), "--output", str(tmp_path / "clean")]) == 0
    expected = np.clip(model(read_image(a)[None])[0], 0, 1)
    np.testing.assert_allclose(read_image(tmp_path / "clean" / "a.png"), expected, atol=0.51 / 255)
    assert main(["report", str(workdir)]) == 0 and "toy" in (workdir / "report.html").read_text()


@pytest.mark.parametrize(("what", "size"), [("model", "8"), pytest.param("train", "16", marks=pytest.mark.slow)])
def test_a_new_network_is_measured(tmp_path, what, size):
    output = tmp_path / "figures.json"
    options = ["--network", "toy", "--size", size, "--batch", "1", "--rounds", "1", "--output", str(output)]
    assert main(["benchmark", what, *options]) == 0
    assert "toy" in output.read_text()


def test_what_a_network_does_not_say_has_defaults_that_do_nothing():
    model = Toy(ToyConfig(), rngs=nnx.Rngs(0))
    assert model.MULTIPLE == 1 and not model.freeze_statistics() and model.diagnostics({}) == {} and model.explain({}, 16) == ""
    assert not model.predicts_offsets("first.kernel") and count_parameters(model) == 4 * 28 + 3 * 37
    with pytest.raises(ValueError, match="Toy cannot be widened"):
        model.widen(ToyConfig(features=8), rngs=nnx.Rngs(0))


def test_fine_tuning_from_another_network_is_refused(config_file, model_dir, tmp_path, capsys):
    train = ["train", "--config", config_file, "--run.workdir", tmp_path / "w", "--run.init_from", model_dir, "--model.name", "toy"]
    assert f"run.init_from (={model_dir}) is another network: model.name is aecr_net there and toy here" in fails(capsys, *train)


def test_saved_configs_carry_the_name():
    assert registry.config_to_dict(AECRNetConfig(width=8))["name"] == "aecr_net"
    assert registry.config_from_dict({"width": 8}) == AECRNetConfig(width=8)  # saved by versions with a single network
    assert registry.config_from_dict({"name": "toy", "features": 6}) == ToyConfig(features=6)
    with pytest.raises(ValueError, match=r"model.name \(='tou'\) must be one of the networks, such as toy"):
        registry.config_from_dict({"name": "tou"})
    with pytest.raises(ValueError, match=r"model.width is no setting of toy; it has dtype, features, param_dtype"):
        registry.config_from_dict({"name": "toy", "width": 6})


def test_unknown_networks_are_one_line(config_file, tmp_path, capsys):
    train = ["train", "--config", config_file, "--run.workdir", tmp_path / "w"]
    assert "model.name (='aecr') must be one of the networks, such as aecr_net" in fails(capsys, *train, "--model.name", "aecr")
    assert "unknown setting --model.blocks" in fails(capsys, *train, "--model.name", "toy", "--model.blocks", "2")
    assert "model.name (='tiny') must be one of" in fails(capsys, "benchmark", "model", "--network", "tiny", "--output", tmp_path / "b")
    assert "model.width is no setting of toy" in fails(capsys, "benchmark", "model", "--network", "toy", "--width", "8")


SMALL = {
    "aecr_net": {"width": 2, "blocks": 1},
    "grid_dehaze_net": {"width": 2, "growth": 2, "dense_layers": 1},
    "ffa_net": {"width": 8, "blocks": 1},
    "pfdn": {"width": 4, "blocks": 1},
    "msbdn": {"width": 1, "blocks": 1},
    "kddn": {"width": 2, "blocks": 1},
    "kddn_teacher": {"width": 2},
    "coarse_net": {"width": 6, "blocks": 1},
}


# MSBDN has so many layers of different shapes that each call takes ten seconds to compile.
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "msbdn" else name for name in registry.network_names()]


# One program compiles faster than the many operations of a network one by one.
@nnx.jit
def call(model, hazy):
    return model(hazy)


@functools.cache
def small(name):
    """Return the network with new initial values, in evaluation mode."""
    model = registry.make_network(registry.find_network(name).Config(**SMALL.get(name, {})), rngs=nnx.Rngs(0))
    model.eval()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_every_registered_network_restores_any_size(name):
    """All registered networks keep the contract of `Network`; large ones are built with the settings in `SMALL`."""
    model = small(name)
    restored = call(model, jnp.full((2, 13, 10, 3), 0.5))
    assert restored.shape == (2, 13, 10, 3) and restored.dtype == jnp.float32 and np.isfinite(restored).all()
    assert isinstance(model, registry.find_network(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_network_checks_its_arguments(name):
    """One pixel and no images are accepted; what is no batch of images is refused by name."""
    network, model = registry.find_network(name), small(name)
    for shape in ((1, 1, 1, 3), (0, 3, 2, 3)):
        restored = call(model, jnp.full(shape, 0.5))
        assert restored.shape == shape and np.isfinite(restored).all()
    half = nnx.eval_shape(lambda model, hazy: model(hazy), model, jnp.full((1, 3, 2, 3), 0.5, jnp.float16))
    assert half.dtype == jnp.float16
    with pytest.raises(ValueError, match=r"(hazy|clear) has type uint8 and must be floating point in \[0, 1\], such as float32"):
        model(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"(hazy|clear) has shape \(8, 8, 3\) and must be \[N, H, W, 3\], H and W at least 1"):
        model(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match=rf"config \(=None\) must be of type {network.Config.__name__}"):
        network(None, rngs=nnx.Rngs(0))
