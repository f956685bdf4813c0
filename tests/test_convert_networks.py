"""Conversion of the networks' authors' checkpoints, with small networks and random tensors under the authors' names."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aecr_jax import load_checkpoint
from aecr_jax.__main__ import main
from aecr_jax.convert.networks import find_format
from aecr_jax.inference.weights import save_checkpoint, shipped_folder
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.networks.dehaze_net import DehazeNetConfig
from aecr_jax.networks.registry import abstract_network, build_network, find_network


@dataclass
class Case:
    """A small network of one kind."""

    settings: Mapping[str, Any]
    tensor: str
    """The authors' name of a kernel that does not determine the config, for the tests of wrong files."""


CASES = {
    "dehaze_net": Case({}, "conv5x5.weight"),
    "aod_net": Case({}, "e_conv4.weight"),
    "grid_dehaze_net": Case({"width": 2, "growth": 3, "dense_layers": 2}, "rdb_module.1_2.conv_1x1.weight"),
    "ffa_net": Case({"width": 8, "blocks": 2}, "g3.gp.1.calayer.ca.2.weight"),
    "pfdn": Case({"width": 4, "blocks": 2}, "pfdbs.1.fdu.fc.2.weight"),
    "msbdn": Case({"width": 2, "blocks": 3}, "fusion_1.down_convs.3.conv.weight"),
    "kddn": Case({"width": 2, "blocks": 2}, "res3.1.conv2.weight"),
    "kddn_teacher": Case({"width": 2}, "res6.model.1.conv.weight"),
}


def make_tensors(name):
    """Return random tensors with the authors' names and shapes, for the network's small config."""
    config = find_network(name).Config(**CASES[name].settings)
    shapes = {ours: np.empty(array.shape, np.bool_) for ours, array in get_arrays(abstract_network(config)).items()}
    return {
        theirs: np.random.default_rng(zlib.crc32(theirs.encode())).standard_normal(array.shape, np.float32)
        for theirs, array in find_format(name).to_theirs(shapes).items()
    }


def write(path, tensors):
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch = pytest.importorskip("torch", reason="writing .pth files needs PyTorch")
        torch.save({"model": {f"module.{name}": torch.from_numpy(tensor) for name, tensor in tensors.items()}}, path)
    return path


def read(path):
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file)
    if path.suffix == ".safetensors":
        return load_file(path)
    torch = pytest.importorskip("torch", reason="reading .pth files needs PyTorch")
    return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}


# The tensors of a network and the format of a file have nothing to do with each other: the smallest network tests all formats quickly.
@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        (name, suffix) if name == "aod_net" or suffix == ".safetensors" else pytest.param(name, suffix, marks=pytest.mark.slow)
        for name in CASES
        for suffix in (".npz", ".safetensors", ".pth")
    ],
)
def test_there_and_back_is_bit_exact(name, suffix, tmp_path, capsys):
    """The network and its config are found from the tensors alone."""
    tensors = make_tensors(name)
    file, back = write(tmp_path / f"theirs{suffix}", tensors), tmp_path / f"back{suffix}"
    assert main(["convert", str(file), "--output", str(tmp_path / "ours")]) == 0
    assert f"ours: {name}, {len(tensors)} tensors" in capsys.readouterr().out
    model = load_checkpoint(tmp_path / "ours")
    assert model.config == find_network(name).Config(**CASES[name].settings)
    arrays = get_arrays(model)
    for ours, array in find_format(name).to_ours(tensors, list(arrays)).items():
        np.testing.assert_array_equal(arrays[ours], array, err_msg=ours)
    assert main(["convert", str(tmp_path / "ours"), "--output", str(back)]) == 0
    result = read(back)
    assert result.keys() == tensors.keys()
    for theirs, tensor in tensors.items():
        assert result[theirs].shape == tensor.shape and result[theirs].tobytes() == tensor.tobytes(), theirs


# The networks of few layers; the others have the same checks of their own tensors.
QUICK = ("dehaze_net", "aod_net", "kddn_teacher")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_wrong_files_are_one_line(name, tmp_path, capsys):
    """Status 2, one line with the tensor and what was expected, and no output."""
    tensors, tensor, title = make_tensors(name), CASES[name].tensor, find_format(name).title
    shape = tensors[tensor].shape
    without = {theirs: array for theirs, array in tensors.items() if theirs != tensor}
    cases = [
        (without, f"tensor {tensor} of shape {shape} is missing"),
        (without | {tensor: tensors[tensor][..., None]}, f"tensor {tensor} has shape {(*shape, 1)} and must have {shape}"),
        (without | {tensor: np.ones(shape, np.int32)}, f"tensor {tensor} has type int32 and must be floating point"),
        (without | {tensor: np.full(shape, np.nan, np.float32)}, f"tensor {tensor} has values that are not finite"),
        (without | {tensor: np.full(shape, 0.5, np.float32)}, f"tensor {tensor} has the value 0.5 throughout"),
        (tensors | {"extra.weight": np.ones(2, np.float32)}, f"tensor extra.weight is not one of {title}"),
    ]
    file, output = tmp_path / "theirs.safetensors", tmp_path / "ours"

    def fails(*options):
        assert main(["convert", str(file), "--output", str(output), *options]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("aecr_jax: ") and said.err.count("\n") == 1 and not output.exists()
        return said.err

    for wrong, message in cases:
        write(file, wrong)
        assert f"theirs.safetensors: {message}" in fails("--network", name)
    write(file, {"backbone.weight": np.ones((2, 2), np.float32)})
    assert "is missing" in fails("--network", name)
    assert "is of no known network (its tensors are backbone.weight, ...)" in fails()
    write(file, tensors)
    file.write_bytes(file.read_bytes()[:-100])
    assert "theirs.safetensors is damaged or no .safetensors file" in fails()


def test_every_file_is_recognized_as_one_network():
    for name in CASES:
        tensors = make_tensors(name)
        assert [other for other in CASES if find_format(other).recognizes(tensors)] == [name]


def test_names_of_the_caffe_model_of_aod_net(tmp_path):
    tensors = make_tensors("aod_net")
    write(tmp_path / "caffe.npz", {name.removeprefix("e_"): tensor for name, tensor in tensors.items()})
    assert main(["convert", str(tmp_path / "caffe.npz"), "--output", str(tmp_path / "ours")]) == 0
    arrays = get_arrays(load_checkpoint(tmp_path / "ours"))
    np.testing.assert_array_equal(arrays["conv3.kernel"], tensors["e_conv3.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(arrays["conv5.bias"], tensors["e_conv5.bias"])


def test_untrained_coefficients_of_grid_dehaze_net(tmp_path):
    """They are 1 before training, and half of them stay so."""
    tensors = make_tensors("grid_dehaze_net")
    tensors["coefficient"] = np.ones_like(tensors["coefficient"])
    write(tmp_path / "theirs.npz", tensors)
    assert main(["convert", str(tmp_path / "theirs.npz"), "--output", str(tmp_path / "ours")]) == 0
    np.testing.assert_array_equal(load_checkpoint(tmp_path / "ours").coefficient[...], np.ones((3, 6, 2, 8)))


def test_settings_that_the_authors_dehaze_net_has_not(tmp_path, capsys):
    """Their file has no place for the radius of the guided filter."""
    tensors, form = make_tensors("dehaze_net"), find_format("dehaze_net")
    arrays = form.to_ours(tensors, list(get_arrays(abstract_network(DehazeNetConfig()))))
    save_checkpoint(build_network(DehazeNetConfig(radius=9), arrays), tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), "--output", str(tmp_path / "back.npz")]) == 2
    assert "is not the authors' DehazeNet, whose settings are" in capsys.readouterr().err


def test_a_network_without_an_authors_format_is_named(tmp_path, capsys):
    assert main(["convert", str(shipped_folder("photo")), "--output", str(tmp_path / "x.npz")]) == 2
    assert "photo holds a coarse_net, for which there is no authors' format; there is one for aecr_net, " in capsys.readouterr().err
