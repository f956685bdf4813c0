import functools
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from reference import load, nhwc, official_weights, our_arrays, vgg19, vgg19_tensors
from safetensors import safe_open
from safetensors.numpy import save_file

from aecr_jax import AECRNetConfig, UserError, VGG19Features, load_checkpoint, load_vgg19
from aecr_jax.__main__ import main
from aecr_jax.convert.aecr_net import FORMAT
from aecr_jax.convert.networks import convert
from aecr_jax.convert.vgg import convert_vgg
from aecr_jax.inference.weights import save_checkpoint
from aecr_jax.losses.vgg import VGG16Features
from aecr_jax.networks.aecr_net import AECRNet
from aecr_jax.networks.arrays import get_arrays

convert_aecr = functools.partial(convert, network="aecr_net")
GENUINE = Path(__file__).parents[2] / "shared" / "weights" / "vgg19_caffe_to_conv5_1.safetensors"
INDICES = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28)


def small_vgg():
    """Return VGG-19 tensors with torchvision's names and few channels, so that files are small."""
    rng, tensors, channels = np.random.default_rng(0), {}, 3
    for index in INDICES:
        tensors[f"features.{index}.weight"] = rng.standard_normal((4, channels, 3, 3)).astype(np.float32)
        tensors[f"features.{index}.bias"] = rng.standard_normal(4).astype(np.float32)
        channels = 4
    return tensors


def test_safetensors_of_torchvision_or_timm(tmp_path):
    seed = load("contrastive")["vgg_seed"]
    tensors = {"head.fc.bias": np.zeros(10, np.float32), "features.30.bias": np.zeros(512, np.float32)}
    for index, (_, weight, bias) in zip(INDICES, vgg19_tensors(seed)):
        tensors |= {f"features.{index}.weight": weight, f"features.{index}.bias": bias}
    save_file(tensors, tmp_path / "timm.safetensors")
    said = convert_vgg(tmp_path / "timm.safetensors", tmp_path / "ours.safetensors")
    assert "5 of 5 levels, input RGB in [0, 1]" in said
    x = jnp.ones((1, 16, 16, 3)) * jnp.linspace(0, 1, 16).reshape(1, 1, 16, 1)
    for ours, expected in zip(load_vgg19(tmp_path / "ours.safetensors")(x), vgg19(seed)(x)):
        np.testing.assert_array_equal(ours, expected)
    with safe_open(tmp_path / "ours.safetensors", "np") as file:
        metadata = file.metadata()
    assert {"source", "sha256", "licence"} <= set(metadata) and len(metadata["sha256"]) == 64


def test_a_vgg16_is_recognized_by_its_seventeenth_layer(tmp_path):
    """torchvision's indices of VGG-16: 0, 2, 5, 7, 10, 12, 14 for the convolutions up to relu3_3, and 17 for the next one."""
    rng, tensors, channels = np.random.default_rng(0), {}, 3
    for index in (0, 2, 5, 7, 10, 12, 14, 17):
        tensors[f"features.{index}.weight"] = rng.standard_normal((4, channels, 3, 3)).astype(np.float32)
        tensors[f"features.{index}.bias"] = rng.standard_normal(4).astype(np.float32)
        channels = 4
    save_file(tensors, tmp_path / "x.safetensors")
    assert "VGG-16, 3 of 3 levels" in convert_vgg(tmp_path / "x.safetensors", tmp_path / "vgg16.safetensors")
    kernel = VGG16Features.load(tmp_path / "vgg16.safetensors").weights["conv3_3_kernel"]
    np.testing.assert_array_equal(kernel, tensors["features.14.weight"].transpose(2, 3, 1, 0))


def test_a_network_that_ends_early_serves_fewer_levels(tmp_path):
    tensors = {name: tensor for name, tensor in small_vgg().items() if int(name.split(".")[1]) <= 7}
    np.savez(tmp_path / "early.npz", **tensors)
    assert "2 of 5 levels" in convert_vgg(tmp_path / "early.npz", tmp_path / "ours.safetensors")
    assert load_vgg19(tmp_path / "ours.safetensors").levels == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"features.17.weight": np.zeros((4, 4, 3, 3), np.float32), "features.14.bias": None},
            r"features.14.bias \(conv3_3\) is missing: VGG-16 of torchvision",
        ),
        ({"features.1.running_mean": np.zeros(4, np.float32)}, "VGG with batch normalization"),
        ({"features.28.bias": None}, r"tensor features.28.bias \(conv5_1\) is missing"),
        (
            {"features.5.weight": np.zeros((4, 4, 5, 5), np.float32)},
            r"conv2_1.kernel has shape \(5, 5, 4, 4\) and must have \(3, 3, 4, 4\)",
        ),
        ({"features.2.bias": np.full(4, np.inf, np.float32)}, "conv1_2.bias has values that are not finite"),
        ({"features.2.bias": np.zeros(4, np.int32)}, "features.2.bias has type int32"),
        ({"features.2.weight": np.ones((4, 4, 3, 3), bool)}, "features.2.weight has type bool and must be floating point"),
        ({"features.7.weight": np.zeros((4, 4, 3, 3), np.float32)}, "conv2_2.kernel has the value 0 throughout"),
        ({"features.7.weight": np.full((4, 4, 3, 3), 0.1, np.float32)}, "conv2_2.kernel has the value 0.1 throughout"),
        ({"features.0.weight": np.full((4, 3, 3, 3), 1e300)}, "conv1_1.kernel has values that are not finite"),
    ],
)
def test_wrong_vgg_files_are_named(tmp_path, change, message):
    save_file({k: v for k, v in (small_vgg() | change).items() if v is not None}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message) as error:
        convert_vgg(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    assert "\n" not in str(error.value) and not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_floating_point_types_become_float32(tmp_path, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in small_vgg().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    assert "5 of 5 levels" in convert_vgg(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    features = load_vgg19(tmp_path / "y.safetensors")
    for index, name in zip(INDICES, ("conv1_1", "conv1_2", "conv2_1")):
        found = np.asarray(features.weights[f"{name}_kernel"][...])
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, tensors[f"features.{index}.weight"].astype(np.float32).transpose(2, 3, 1, 0))


def test_bfloat16_files_of_ours_load(tmp_path):
    """Weights that a user has stored as bfloat16 to save space load as float32."""
    tensors = small_vgg()
    save_file(tensors, tmp_path / "x.safetensors")
    convert_vgg(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    with safe_open(tmp_path / "y.safetensors", "np") as file:
        weights = {name: file.get_tensor(name).astype(ml_dtypes.bfloat16) for name in file.keys()}
        save_file(weights, tmp_path / "y.safetensors", metadata=file.metadata())
    x = jnp.full((1, 16, 16, 3), 0.5)
    for ours, expected in zip(load_vgg19(tmp_path / "y.safetensors")(x), VGG19Features(weights)(x)):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.skipif(not GENUINE.is_file(), reason="needs a trained VGG-19, which is not in the repository")
def test_a_trained_vgg19_converts(tmp_path):
    assert "5 of 5 levels" in convert_vgg(GENUINE, tmp_path / "y.safetensors")
    assert load_vgg19(tmp_path / "y.safetensors").levels == 5


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_truncated_files_are_named(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    np.savez(path, **small_vgg()) if suffix == ".npz" else save_file(small_vgg(), path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=f"x{suffix} is damaged or no {suffix} file"):
        convert_vgg(path, tmp_path / "y.safetensors")
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        convert_vgg(path, tmp_path / "y.safetensors")


def test_outputs_replace_no_inputs(tmp_path):
    save_file(small_vgg(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="must be another file"):
        convert_vgg(tmp_path / "x.safetensors", tmp_path / "x.safetensors")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a training run"):
        save_checkpoint(AECRNet(AECRNetConfig(width=1, blocks=1, dfe="none"), rngs=nnx.Rngs(0)), tmp_path / "run")


def test_existing_outputs_are_refused_before_the_conversion(tmp_path, capsys, monkeypatch):
    """An existing output is refused before the input is read, which is not convertible: status 2, one error line, no file changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "junk.pth").write_bytes(b"junk")
    cases = [
        ("convert-vgg", "junk.pth", "vgg.safetensors", "vgg.safetensors"),
        ("convert-aecr", "junk.pth", "model", "model/config.json"),
        ("convert-aecr", "junk.pth", "model", "model/model.safetensors"),
        ("convert-aecr", "model", "official.pth", "official.pth"),
    ]
    for command, file, output, existing in cases:
        (tmp_path / existing).write_text('{"mine": 1}')
        assert main([command, file, "--output", output]) == 2
        said = capsys.readouterr()
        wanted = f"aecr_jax: {existing} already exists: choose another output, or add --overwrite to replace it\n"
        assert (said.out, said.err) == ("", wanted)
        assert main([command, file, "--output", output, "--overwrite"]) == 2
        assert "already exists" not in capsys.readouterr().err  # the error is about the input
        assert (tmp_path / existing).read_text() == '{"mine": 1}'
        (tmp_path / existing).unlink()
    assert {path.name for path in tmp_path.rglob("*")} == {"model", "junk.pth"}


def test_overwrite_replaces_the_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(small_vgg(), "x.safetensors")
    (tmp_path / "y.safetensors").write_text("mine")
    assert main(["convert-vgg", "x.safetensors", "--output", "y.safetensors", "--overwrite"]) == 0
    assert load_vgg19("y.safetensors").levels == 5
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", "y.safetensors"}
    assert "5 of 5 levels" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["convert-vgg", "convert-aecr"])
def test_an_empty_output_is_refused(tmp_path, capsys, monkeypatch, command):
    """An empty path would mean the current folder."""
    monkeypatch.chdir(tmp_path)
    save_file(small_vgg(), "x.safetensors")
    assert main([command, "x.safetensors", "--output", ""]) == 2
    see = f"see python -m aecr_jax {command} --help"
    assert capsys.readouterr().err == f"aecr_jax: argument --output: must not be empty; {see}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("up1.0.bias", lambda x: np.ones(x.shape, np.int64), "tensor up1.0.bias has type int64 and must be floating point"),
        ("down2.0.weight", lambda x: x > 0, "tensor down2.0.weight has type bool and must be floating point"),
        ("down2.0.weight", np.zeros_like, "tensor down2.0.weight has the value 0 throughout: these are not trained weights"),
        ("block.conv1.weight", lambda x: np.full_like(x, 0.25), "tensor block.conv1.weight has the value 0.25 throughout"),
        ("deconv.running_deconv", np.zeros_like, "tensor deconv.running_deconv has the value 0 throughout"),
        ("mix1.w", lambda x: np.full(x.shape, 1e300), "tensor mix1.w has values that are not finite"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_untrained_official_tensors_are_named(tmp_path, suffix, name, change, message):
    tensors = official_weights(0)
    tensors[name] = np.asarray(change(tensors[name]))
    if suffix == ".pth":
        save_official(pytest.importorskip("torch", reason="reading .pth files needs PyTorch"), tmp_path / "x.pth", tensors)
    else:
        save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message) as error:
        convert_aecr(tmp_path / f"x{suffix}", tmp_path / "ours")
    assert "\n" not in str(error.value) and not (tmp_path / "ours").exists()


def test_what_starts_at_zero_may_stay_there(tmp_path):
    """In the official code, offsets, masks and biases start at zero. Its network converts before the first step, also in float16."""
    tensors = official_weights(0)
    for name in (
        "dcn_block.dcn.conv_offset_mask.weight",
        "dcn_block.dcn.conv_offset_mask.bias",
        "deconv.running_mean",
        "dcn_block.dcn.bias",
    ):
        tensors[name] = np.zeros_like(tensors[name])
    save_file({name: tensor.astype(np.float16) for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    convert_aecr(tmp_path / "x.safetensors", tmp_path / "ours")
    kernel = get_arrays(load_checkpoint(tmp_path / "ours"))["down2.kernel"]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel, tensors["down2.0.weight"].astype(np.float16).astype(np.float32).transpose(2, 3, 1, 0))


def test_names_of_the_official_checkpoint_round_trip():
    """The round trip is bit-exact, and every official tensor has a name in this package."""
    official = official_weights(0)
    back = FORMAT.to_theirs(our_arrays(official))
    assert set(back) == set(official)
    for name, array in official.items():
        np.testing.assert_array_equal(back[name], array)


def test_without_torch_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pth").write_bytes(b"x")
    with pytest.raises(UserError, match=r"needs PyTorch: run `pip install 'torch>=2.6'`"):
        convert_vgg(tmp_path / "a.pth", tmp_path / "b.safetensors")


# ---- with PyTorch


def save_official(torch, path, tensors, *, surround=True, prefix="module."):
    state = {prefix + k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
    torch.save({"epoch": 1, "model": state, "psnrs": [1.0]} if surround else state, path)
    return path


@pytest.mark.parametrize(("surround", "prefix"), [(True, "module."), (True, ""), (False, "module."), (False, "")])
def test_official_checkpoint_gives_the_official_output(tmp_path, surround, prefix):
    torch = pytest.importorskip("torch", reason="reading .pth files needs PyTorch")
    d = load("official_forward")
    path = save_official(torch, tmp_path / "official.pk", official_weights(d["weight_seed"]), surround=surround, prefix=prefix)
    assert "34 tensors, width 64" in convert_aecr(path, tmp_path / "ours")
    if surround and prefix:
        np.testing.assert_allclose(load_checkpoint(tmp_path / "ours")(jnp.array(nhwc(d["x"]))), nhwc(d["y"]), atol=2e-5)


def test_the_way_back_is_bit_exact(tmp_path):
    torch = pytest.importorskip("torch", reason="writing .pth files needs PyTorch")
    official = official_weights(3)
    convert_aecr(save_official(torch, tmp_path / "a.pth", official), tmp_path / "ours")
    convert_aecr(tmp_path / "ours", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert {k: v.numpy().tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in official.items()}


def test_a_failed_way_back_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="writing .pth files needs PyTorch")
    convert_aecr(save_official(torch, tmp_path / "a.pth", official_weights(3)), tmp_path / "ours")
    (tmp_path / "back.pth").write_text("mine")

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match=r"back.pth cannot be written: No space left on device"):
        convert_aecr(tmp_path / "ours", tmp_path / "back.pth", overwrite=True)
    assert (tmp_path / "back.pth").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "ours", "back.pth"}


def test_other_networks_have_no_way_back(tmp_path):
    pytest.importorskip("torch", reason="writing .pth files needs PyTorch")
    save_checkpoint(AECRNet(AECRNetConfig(width=2, mixup="sum"), rngs=nnx.Rngs(0)), tmp_path / "ours")
    with pytest.raises(UserError, match="is not the official AECR-Net"):
        convert_aecr(tmp_path / "ours", tmp_path / "x.pth")


def test_wrong_official_files_are_named(tmp_path):
    torch = pytest.importorskip("torch", reason="reading .pth files needs PyTorch")
    official = official_weights(0)
    for change, message in [
        ({"up2.0.bias": None}, r"tensor up2.0.bias of shape \(64,\) is missing"),
        ({"down1.1.weight": None}, r"tensor down1.1.weight of shape \(64, 3, 7, 7\) is missing"),
        (
            {"down1.1.weight": np.zeros((3, 64, 7, 7), np.float32)},
            r"down1.1.weight has shape \(3, 64, 7, 7\) and must have \(64, 3,",
        ),
        ({"mix1.w": np.zeros(2, np.float32)}, r"tensor mix1.w has shape \(2,\) and must have \(1,\)"),
        ({"deconv.bias": np.full(3, np.nan, np.float32)}, "tensor deconv.bias has values that are not finite"),
        ({"extra": np.zeros(1, np.float32)}, "tensor extra is not one of the official AECR-Net"),
    ]:
        path = save_official(torch, tmp_path / "x.pk", {k: v for k, v in (official | change).items() if v is not None})
        with pytest.raises(UserError, match=message):
            convert_aecr(path, tmp_path / "ours")
    for rest in (b"", path.read_bytes()[:1000]):
        path.write_bytes(rest)
        with pytest.raises(UserError, match=r"x\.pk is damaged, or a pickle that would run code"):
            convert_aecr(path, tmp_path / "ours")
    torch.save([1, 2], tmp_path / "list.pk")
    with pytest.raises(UserError, match="holds no state dict"):
        convert_aecr(tmp_path / "list.pk", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_with_code_is_refused_and_runs_nothing(tmp_path):
    torch = pytest.importorskip("torch", reason="reading .pth files needs PyTorch")
    torch.save({"model": Touch(str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    for convert_file in (convert_aecr, convert_vgg):
        with pytest.raises(UserError, match="would run code and is refused"):
            convert_file(tmp_path / "evil.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "ran").exists()


def test_torchvision_pth(tmp_path):
    torch = pytest.importorskip("torch", reason="reading .pth files needs PyTorch")
    torch.save({k: torch.from_numpy(v) for k, v in small_vgg().items()}, tmp_path / "vgg19.pth")
    assert "5 of 5 levels" in convert_vgg(tmp_path / "vgg19.pth", tmp_path / "ours.safetensors")
