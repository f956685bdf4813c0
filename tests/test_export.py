"""Exported models are written completely or not at all, and are verified when they are read."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from aecr_jax import AECRNet, AECRNetConfig, UserError, load_checkpoint
from aecr_jax.inference.weights import save_checkpoint
from aecr_jax.networks.arrays import get_arrays

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture
def folder(tmp_path, model_dir):
    """Return a copy of an exported model that a test may damage."""
    return shutil.copytree(model_dir, tmp_path / "model")


def bits(model):
    return model.config, {name: np.asarray(array).tobytes() for name, array in get_arrays(model).items()}


def flips(content, count, start=0, stop=None):
    """Yield copies of `content` with one flipped bit, for `count` bits spread evenly over the bytes from `start` to `stop`."""
    for bit in np.linspace(8 * start, 8 * (stop or len(content)) - 1, count).astype(int):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << (bit % 8)
        yield bit, bytes(flipped)


def refused(folder, expected):
    """Return whether the model is refused with one line that names it; otherwise check that its arrays and config are unchanged."""
    try:
        found = bits(load_checkpoint(folder))
    except UserError as error:
        assert str(error).startswith(f"model {folder} is damaged or half written: ") and "\n" not in str(error)
        return True
    assert found == expected
    return False


def test_a_description_that_is_no_object_is_refused(folder):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"about": None}))
    with pytest.raises(UserError, match=r"damaged or half written: config.json has None under 'about', which must be an object"):
        load_checkpoint(folder)


@pytest.mark.parametrize("data", ["NYU", {"train": 3}])
def test_data_that_are_no_object_are_refused(folder, data):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"data": data}))
    with pytest.raises(UserError, match="under 'data', which must be an object with the text 'train'"):
        load_checkpoint(folder)


def test_a_step_that_is_no_integer_is_refused(folder):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"about": {"step": "x"}}))
    with pytest.raises(UserError, match=r"damaged or half written: config.json has the step 'x', which must be an integer"):
        load_checkpoint(folder)


def test_weights_of_a_type_that_numpy_does_not_have_are_refused(folder):
    """By the format's description: the length of the header in 8 bytes, the header as JSON, and the bytes of the tensors."""
    header = json.dumps({"up3.bias": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(UserError, match="is damaged or half written: "):
        load_checkpoint(folder)


def test_a_model_in_float64_needs_jaxs_setting(folder):
    """Without it, JAX would silently compute in float32."""
    config = json.loads((folder / CONFIG).read_text())
    config["model"]["param_dtype"] = "float64"
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if name != "sha256"}))
    with pytest.raises(UserError, match=r"cannot be used: it has the type float64, for which JAX_ENABLE_X64=1 must be set"):
        load_checkpoint(folder)


def test_no_flipped_bit_of_the_weights_passes(folder):
    """Flips in the header are included; a few bits there, in the padding and the format's name, do not affect the model."""
    content, expected = (folder / WEIGHTS).read_bytes(), bits(load_checkpoint(folder))
    header = 8 + int.from_bytes(content[:8], "little")
    for start, stop, count, least in [(0, header, 60, 50), (header, len(content), 60, 60)]:
        found = []
        for _, flipped in flips(content, count, start, stop):
            (folder / WEIGHTS).write_bytes(flipped)
            found.append(refused(folder, expected))
        assert sum(found) >= least
    (folder / WEIGHTS).write_bytes(content)
    assert not refused(folder, expected)


def test_no_flipped_bit_of_the_config_passes(folder):
    """A flip in the settings or the checksum is refused; one in the word "sha256" removes the checksum, and the model loads unchanged."""
    content, expected = (folder / CONFIG).read_bytes(), bits(load_checkpoint(folder))
    for _, flipped in flips(content, 120):
        (folder / CONFIG).write_bytes(flipped)
        refused(folder, expected)


@pytest.mark.parametrize(
    ("name", "value"), [("blocks", 2), ("width", 3), ("deform_layers", 1), ("dtype", "bfloat16"), ("remat", True), ("mixup", "sum")]
)
def test_no_changed_setting_passes(folder, name, value):
    """Most of the changed settings fit the same weights, so only the checksum reveals the change."""
    config = json.loads((folder / CONFIG).read_text())
    config["model"][name] = value
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="is damaged or half written: its weights or settings differ from what was written"):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{}", '{"model": 3}', '{"model": {"depth": 3}}', "", "{"])
def test_a_config_of_something_else_is_refused(folder, text):
    (folder / CONFIG).write_text(text)
    assert refused(folder, None)


def test_notes_may_be_edited(folder):
    config = json.loads((folder / CONFIG).read_text())
    config["about"] = {"name": "mine"}
    expected = bits(load_checkpoint(folder))
    (folder / CONFIG).write_text(json.dumps(config))
    assert bits(load_checkpoint(folder)) == expected


def test_models_without_checksum_load(folder):
    """Models that were written before there were checksums still load."""
    config = json.loads((folder / CONFIG).read_text())
    assert len(config.pop("sha256")) == 64
    expected = bits(load_checkpoint(folder))
    (folder / CONFIG).write_text(json.dumps(config))
    assert bits(load_checkpoint(folder)) == expected


@pytest.mark.parametrize("tensor", ["later", "blocks.0.channel_down.bias"])
def test_a_model_of_another_version_of_its_network_is_not_called_damaged(tmp_path, tensor):
    """One model has a tensor that the network lacks. In the other model, a tensor has another shape than in the network."""
    model = AECRNet(AECRNetConfig(width=2, blocks=1), rngs=nnx.Rngs(0))
    if tensor == "later":
        model.later = nnx.Param(np.zeros(2, np.float32))
    else:
        model.config = AECRNetConfig(width=4, blocks=1)
    save_checkpoint(model, tmp_path)
    expected = rf"cannot be used: its weights do not fit the network aecr_net of this version of aecr_jax: .*{tensor}"
    with pytest.raises(UserError, match=expected):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_round_trip_is_bit_exact(tmp_path, dtype, x64):
    model = AECRNet(AECRNetConfig(width=2, blocks=1, dtype=dtype, param_dtype=dtype), rngs=nnx.Rngs(5))
    save_checkpoint(model, tmp_path, {"seed": 5})
    assert bits(load_checkpoint(tmp_path)) == bits(model)
    assert json.loads((tmp_path / CONFIG).read_text())["about"] == {"seed": 5}
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_checkpoint(load_checkpoint(tmp_path), tmp_path, {"seed": 5})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_step_is_exported(folder, tmp_path):
    """That of the model, unless `about` has another; a model that was never trained has none."""
    model = load_checkpoint(folder)
    assert model.step is None
    model.step = 12
    for about, step in ((None, 12), ({"name": "mine"}, 12), ({"step": 9}, 9)):
        save_checkpoint(model, tmp_path / "exported", about)
        assert json.loads((tmp_path / "exported" / CONFIG).read_text())["about"] == {"step": step} | (about or {})
        assert load_checkpoint(tmp_path / "exported").step == step


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path, folder, value):
    model = load_checkpoint(folder)
    model.down2.bias[...] = model.down2.bias[...].at[1].set(value)
    with pytest.raises(UserError, match=r"model .*new was not written: tensor down2.bias has values that are not finite"):
        save_checkpoint(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    arrays = load_file(folder / WEIGHTS)
    arrays["down2.bias"] = np.asarray(model.down2.bias[...])
    save_file(arrays, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    del config["sha256"]
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"model {folder} cannot be used: tensor down2.bias has values that are not finite"):
        load_checkpoint(folder)


def test_a_failed_export_leaves_the_model_that_was_there(folder, monkeypatch):
    """If the disk fills up at the second file, the existing model stays as it was."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(self, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(UserError, match=r"config.json cannot be written: No space left on device"):
        save_checkpoint(AECRNet(AECRNetConfig(width=1, blocks=1), rngs=nnx.Rngs(1)), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_checksum_covers_names_types_and_shapes(folder):
    """Exchanging two tensors of one shape, or reading one as another type, keeps the bytes but changes the model, and is refused."""
    arrays = load_file(folder / WEIGHTS)
    conv1, conv2 = arrays["blocks.0.conv1.kernel"], arrays["blocks.0.conv2.kernel"]
    for change in (
        {"blocks.0.conv1.kernel": conv2, "blocks.0.conv2.kernel": conv1},
        {"mix1.theta": arrays["mix1.theta"].astype(np.float64)},
        {"mix1.theta": arrays["mix1.theta"].view(np.int32)},
    ):
        save_file(arrays | change, folder / WEIGHTS, metadata={"format": "aecr_jax.networks.aecr_net"})
        with pytest.raises(UserError, match="its weights or settings differ from what was written"):
            load_checkpoint(folder)


def test_integer_weights_are_refused_without_a_checksum_too(folder):
    arrays = load_file(folder / WEIGHTS)
    save_file(arrays | {"down1.bias": np.ones(2, np.int32)}, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    del config["sha256"]
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cannot be used: tensor down1.bias has type int32 and must be floating point"):
        load_checkpoint(folder)
