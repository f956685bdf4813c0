"""LPIPS: its values are those of the package lpips, and its weights convert."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_commands import fails
from test_evaluate import pairs, rows

from aecr_jax import UserError
from aecr_jax.__main__ import main
from aecr_jax.convert.lpips import convert_lpips
from aecr_jax.losses.lpips import LPIPS

# Index and stage of each convolution in torchvision's VGG-16, and channels of each stage of a narrow one.
CONVOLUTIONS = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
CHANNELS = (4, 6, 8, 10, 10)


def made_up(seed=0):
    """Return a narrow VGG-16 with torchvision's names, and linear weights with the names of the package lpips."""
    rng, vgg, channels = np.random.default_rng(seed), {}, 3
    for index, stage in CONVOLUTIONS.items():
        out = CHANNELS[stage - 1]
        kernel = rng.standard_normal((out, channels, 3, 3)) * np.sqrt(2 / (9 * channels))
        vgg |= {f"features.{index}.weight": kernel.astype(np.float32)}
        vgg |= {f"features.{index}.bias": (0.1 * rng.standard_normal(out)).astype(np.float32)}
        channels = out
    return vgg, {f"lin{i}.model.1.weight": rng.random((1, c, 1, 1)).astype(np.float32) for i, c in enumerate(CHANNELS)}


def images():
    """Return two batches of two images [2, 37, 50, 3], an odd size."""
    rng = np.random.default_rng(1)
    first = rng.random((2, 37, 50, 3))
    return first.astype(np.float32), np.clip(first + 0.1 * rng.standard_normal(first.shape), 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Write made-up weights to files, convert them, and return the converted file."""
    folder = tmp_path_factory.mktemp("lpips")
    vgg, linear = made_up()
    save_file(vgg, folder / "vgg16.safetensors")
    np.savez(folder / "linear.npz", **linear)
    said = convert_lpips(folder / "vgg16.safetensors", folder / "linear.npz", folder / "lpips.safetensors")
    assert "LPIPS 0.1 with VGG-16" in said and "linear.npz, not a known file" in said
    return folder / "lpips.safetensors"


def test_the_values_of_the_package(weights):
    """The values were computed by lpips 0.1.4 with PyTorch 2.13.0 in float64, with the weights and images above, as in the next test."""
    found = LPIPS.load(weights)(*images())
    np.testing.assert_allclose(found, [0.233411056, 0.246969863], rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # the package uses deprecated names of torchvision
def test_by_the_package(weights, monkeypatch):
    lpips = pytest.importorskip("lpips", reason="needs the packages lpips, torch and torchvision")
    import torch

    vgg, linear = made_up()
    layers, previous = [], 0
    for index, stage in CONVOLUTIONS.items():
        if layers and stage > previous:
            layers.append(torch.nn.MaxPool2d(2, 2))
        out, channels = vgg[f"features.{index}.weight"].shape[:2]
        layers += [torch.nn.Conv2d(channels, out, 3, padding=1), torch.nn.ReLU(inplace=True)]
        previous = stage
    features = torch.nn.Sequential(*layers)
    features.load_state_dict({name.removeprefix("features."): torch.from_numpy(array) for name, array in vgg.items()})
    # The package makes torchvision's network in its full width, which takes seconds.
    monkeypatch.setattr(lpips.pretrained_networks.tv, "vgg16", lambda **options: SimpleNamespace(features=features))
    package = lpips.LPIPS(pretrained=False, pnet_rand=True, net="vgg", verbose=False)
    package.lins = torch.nn.ModuleList([lpips.NetLinLayer(channels, use_dropout=True) for channels in CHANNELS])
    for layer, array in zip(package.lins, linear.values()):
        layer.model[1].weight.data = torch.from_numpy(array)
    package.eval()
    pair = [torch.from_numpy(batch.transpose(0, 3, 1, 2)) for batch in images()]
    expected = package(*pair, normalize=True).detach().numpy().reshape(-1)  # normalize: images in [0, 1]
    np.testing.assert_allclose(LPIPS.load(weights)(*images()), expected, rtol=1e-4)


def test_equal_images_and_types(weights):
    lpips = LPIPS.load(weights)
    x = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(lpips(x, x), [0])
    y = 255 - x
    np.testing.assert_allclose(lpips(x, y), lpips(x / np.float32(255), y / np.float32(255)), rtol=1e-5)
    with pytest.raises(ValueError, match="must be at least 16x16 for relu5_3"):
        lpips(x[:, :8], x[:, :8])


def linear(stage, *values, dtype=np.float32):
    return {f"lin{stage}.model.1.weight": np.array(values, dtype).reshape(1, -1, 1, 1)}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vgg16", dict.fromkeys(("features.28.weight", "features.28.bias")), "the weights end at relu5_2, before layer relu5_3"),
        ("linear", {"lin2.model.1.weight": None}, "linear.safetensors: tensor lin2.model.1.weight is missing: weights/v0.1/vgg.pth"),
        ("linear", linear(1, *range(9)), r"tensor linear2.weight has shape \(9,\) and must have \(6,\)"),
        ("linear", linear(0, 1, 2, 3, np.nan), "tensor linear1.weight has values that are not finite"),
        ("linear", linear(0, 1, 2, 3, 4, dtype=np.int32), "tensor lin0.model.1.weight has type int32"),
    ],
)
def test_wrong_weights_are_named(tmp_path, file, change, message):
    files = dict(zip(("vgg16", "linear"), made_up()))
    files[file] = {name: array for name, array in (files[file] | change).items() if array is not None}
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=message):
        convert_lpips(tmp_path / "vgg16.safetensors", tmp_path / "linear.safetensors", tmp_path / "lpips.safetensors")
    assert not (tmp_path / "lpips.safetensors").exists()


def test_an_existing_output_is_kept(weights, capsys):
    vgg, linear = weights.with_name("vgg16.safetensors"), weights.with_name("linear.npz")
    before = weights.read_bytes()
    assert "already exists" in fails(capsys, "convert-lpips", vgg, linear, "--output", weights)
    assert "must be another file" in fails(capsys, "convert-lpips", vgg, linear, "--output", vgg, "--overwrite")
    assert weights.read_bytes() == before
    assert main(["convert-lpips", str(vgg), str(linear), "--output", str(weights), "--overwrite"]) == 0


# ---- eval --metrics

NAMES = ("psnr", "ssim", "ssim_valid", "psnr_y", "ciede2000", "lpips")


@pytest.mark.slow
def test_eval_writes_the_chosen_metrics(weights, model_dir, tmp_path, capsys):
    """Each file has a column or entry for each metric and for the hazy input; the values are those of the functions."""
    from aecr_jax import ciede2000, psnr, psnr_y, ssim, ssim_valid
    from aecr_jax.data.images import read_image

    data, out = pairs(tmp_path / "data", "a", "b", size=(24, 20)), tmp_path / "out"
    arguments = ["eval", "--model", model_dir, "--data", data, "--output", out, "--metrics", ",".join(NAMES), "--lpips", weights]
    assert main(list(map(str, arguments))) == 0
    table = rows(out)
    assert list(table[0]) == ["image", *NAMES, *(f"input_{name}" for name in NAMES)]
    functions = dict(zip(NAMES, (psnr, ssim, ssim_valid, psnr_y, ciede2000, LPIPS.load(weights))))
    hazy, clear = (read_image(data / side / "b.png")[None] for side in ("hazy", "clear"))
    for name, function in functions.items():
        np.testing.assert_allclose(float(table[1][f"input_{name}"]), function(hazy, clear)[0], rtol=1e-4, err_msg=name)
    summary = json.loads((out / "summary.json").read_text())
    for name in NAMES:
        np.testing.assert_allclose(summary[name], np.mean([float(row[name]) for row in table]), rtol=1e-6)
        assert summary["metrics"][name]["definition"]
    assert summary["metrics"]["lpips"]["version"] == "0.1" and "SHA-256" in summary["metrics"]["lpips"]["weights"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["PSNR", "(dB)", "SSIM", "SSIM", "valid", "PSNR-Y", "(dB)", "CIEDE2000", "LPIPS"]
    assert len({len(line) for line in printed[:3]}) == 1


def test_psnr_and_ssim_are_the_default(model_dir, tmp_path):
    assert main(list(map(str, ["eval", "--model", model_dir, "--data", pairs(tmp_path / "data", "a"), "--output", tmp_path / "out"]))) == 0
    assert list(rows(tmp_path / "out")[0]) == ["image", "psnr", "ssim", "input_psnr", "input_ssim"]
    assert list(json.loads((tmp_path / "out/summary.json").read_text())["metrics"]) == ["psnr", "ssim"]


def test_wrong_metrics_are_refused(weights, model_dir, tmp_path, capsys):
    data = pairs(tmp_path / "data", "a", size=(20, 8))
    for options, message in [
        (["--metrics", "psnr,lpip"], "there is no metric 'lpip': choose from psnr, ssim, ssim_valid, psnr_y, ciede2000, lpips"),
        (["--metrics", "psnr,psnr"], "must be a sequence of different names"),
        (
            ["--metrics", "lpips"],
            "the metric lpips needs weights: name the file that `python -m aecr_jax convert-lpips` wrote",
        ),
        (["--lpips", weights], "--lpips has no use for the metrics psnr,ssim: add lpips to --metrics"),
        (
            ["--metrics", "lpips", "--lpips", "no.safetensors"],
            "there is no LPIPS file no.safetensors: get torchvision's vgg16",
        ),
        (["--metrics", "lpips", "--lpips", weights.with_name("vgg16.safetensors")], "was not written by convert-lpips"),
        (["--metrics", "ssim_valid"], "a: images of 8x20 must be at least 11x11"),
        (["--metrics", "lpips", "--lpips", weights], "a: images of 8x20 must be at least 16x16 for relu5_3"),
    ]:
        assert message in fails(capsys, "eval", "--model", model_dir, "--data", data, "--output", tmp_path / "out", *options)
        assert not (tmp_path / "out/summary.json").exists()
