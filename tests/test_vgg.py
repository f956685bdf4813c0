import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from reference import load, nhwc, vgg19
from safetensors import safe_open
from safetensors.numpy import save_file
from test_data import SHARED, needs_shared

from aecr_jax import UserError, VGG19Features, load_vgg19
from aecr_jax.__main__ import main
from aecr_jax.losses import vgg
from aecr_jax.losses.lpips import LPIPS
from aecr_jax.losses.vgg import SHIPPED, VGG16Features


def test_all_five_levels():
    """The channel means of each level and all values of relu5_1 equal those of PyTorch (tests/golden)."""
    d = load("contrastive")
    features = vgg19(d["vgg_seed"])(jnp.array(nhwc(d["anchor"])))
    for level, feature in enumerate(features, 1):
        np.testing.assert_allclose(feature.mean((0, 1, 2)), d[f"relu{level}_1_anchor_mean_per_channel"], atol=1e-5)
    np.testing.assert_allclose(features[4], nhwc(d["relu5_1_anchor"]), atol=1e-4)


def tiny_weights(network=VGG19Features):
    return {
        name.replace("_kernel", ".kernel").replace("_bias", ".bias"): np.asarray(v[...])
        for name, v in network.random(width=2).weights.items()
    }


def test_file_round_trip(tmp_path):
    path = tmp_path / "vgg.safetensors"
    weights = tiny_weights()
    save_file(weights, path, metadata=VGG19Features.metadata(source="test"))
    x = jnp.asarray(np.random.default_rng(0).random((1, 16, 16, 3), np.float32))
    for ours, expected in zip(load_vgg19(path)(x), VGG19Features(weights)(x), strict=True):
        np.testing.assert_array_equal(ours, expected)
    # Files of an early version, which padded differently, must not be accepted.
    old = {"format": "aecr_jax.vgg19", "convention": '{"padding": "reflect", "input": "rgb01"}'}
    save_file(weights, path, metadata=old)
    with pytest.raises(UserError, match="pad by reflection, which are no longer read"):
        load_vgg19(path)


def test_fewer_levels():
    weights = {k: v for k, v in tiny_weights().items() if k < "conv3_2"}
    features = VGG19Features(weights)(jnp.ones((1, 8, 8, 3)))
    assert [f.shape for f in features] == [(1, 8, 8, 2), (1, 4, 4, 4), (1, 2, 2, 8)]


def test_bad_weights_are_named():
    weights = tiny_weights()
    for change, message in [
        ({"conv2_1.bias": None}, r"tensor conv2_1.bias of shape \(4,\) is missing"),
        ({"conv1_1.kernel": None}, "tensor conv1_1.kernel is missing"),
        ({"conv3_2.kernel": None}, "tensor conv3_2.kernel is missing"),
        ({"conv1_2.kernel": np.zeros((3, 3, 5, 2), np.float32)}, r"conv1_2.kernel has shape \(3, 3, 5, 2\) and must have \(3, 3, 2, 2\)"),
        ({"conv1_1.bias": np.array([np.nan, 0], np.float32)}, "conv1_1.bias has values that are not finite"),
        ({"conv6_1.bias": np.zeros(2)}, "conv6_1.bias is not one of VGG-19's"),
        ({"conv1_1.bias": np.zeros(2, np.int32)}, "conv1_1.bias has type int32 and must be floating point"),
        (
            {"conv3_3.kernel": np.zeros((3, 3, 8, 8), np.float32)},
            "conv3_3.kernel has the value 0 throughout: these are not trained weights",
        ),
        ({"conv1_1.kernel": np.array(0.5, np.float32)}, r"tensor conv1_1.kernel has shape \(\) and must have \(3, 3, 3, 1\)"),
        ({"conv1_1.bias": "zeros"}, "tensor conv1_1.bias is a str and must be an array"),
        ({"conv1_2.kernel": np.full((3, 3, 2, 2), 0.5, np.float32)}, "conv1_2.kernel has the value 0.5 throughout"),
    ]:
        changed = {k: v for k, v in (weights | change).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            VGG19Features(changed)


def test_the_levels_that_ship():
    """Expected: the layers and channels of the paper's first three levels. The file names its authors and its licence."""
    features = VGG19Features.load(SHIPPED)
    assert features.layers == ("relu1_1", "relu2_1", "relu3_1")
    maps = features(jnp.full((1, 16, 16, 3), 0.5))
    assert [x.shape for x in maps] == [(1, 16, 16, 64), (1, 8, 8, 128), (1, 4, 4, 256)]
    with safe_open(Path(vgg.__file__).with_name(f"{SHIPPED}.safetensors"), "np") as file:
        about = file.metadata()
    assert "Simonyan" in about["source"] and "CC BY 4.0" in about["licence"]
    with pytest.raises(UserError, match="the weights end at relu3_1, before layer relu4_1"):
        VGG19Features.load(SHIPPED, layers=VGG19Features.LAYERS)


@needs_shared
def test_the_levels_that_ship_are_the_authors(tmp_path):
    """Expected: the values of the authors' weights, `vgg19_caffe_to_conv5_1.safetensors`."""
    source = SHARED.with_name("weights") / "vgg19_caffe_to_conv5_1.safetensors"
    assert main(["convert-vgg", str(source), "--output", str(tmp_path / "vgg19.safetensors")]) == 0
    shipped, full = VGG19Features.load(SHIPPED), VGG19Features.load(tmp_path / "vgg19.safetensors")
    for name, values in shipped.weights.items():
        np.testing.assert_array_equal(np.asarray(values[...], np.float32), np.asarray(full.weights[name][...], np.float32))


def test_weights_may_be_lists():
    weights = tiny_weights()
    x = jnp.full((1, 16, 16, 3), 0.5)
    np.testing.assert_array_equal(VGG19Features({k: v.tolist() for k, v in weights.items()})(x)[4], VGG19Features(weights)(x)[4])
    with pytest.raises(ValueError, match="weights is a str and must be a mapping from names to arrays"):
        VGG19Features("vgg19.safetensors")


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match=r"there is no VGG-19 file .*convert-vgg vgg19-dcbb9e9d.pth --output"):
        load_vgg19(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        load_vgg19(tmp_path / "text.safetensors")
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "8bit.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    for load_file in (load_vgg19, LPIPS.load):
        with pytest.raises(UserError, match=r"8bit\.safetensors is not a readable safetensors file"):  # NumPy does not have this type
            load_file(tmp_path / "8bit.safetensors")
    save_file(tiny_weights(), tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match="was not written by convert-vgg"):
        load_vgg19(tmp_path / "plain.safetensors")


def test_small_images_are_refused():
    with pytest.raises(ValueError, match="images of 8x8 must be at least 16x16 for relu5_1"):
        VGG19Features.random(width=2)(jnp.ones((1, 8, 8, 3)))


def test_refuses_images_that_are_not_floats():
    """Integer images are refused, because weights cast to integers would be zero, and so would the features."""
    features = VGG19Features.random(width=2)
    for dtype in (np.uint8, np.bool_):
        with pytest.raises(ValueError, match=rf"images has type {np.dtype(dtype)} and must be floating point in \[0, 1\]"):
            features(np.ones((1, 16, 16, 3), dtype))
    np.testing.assert_array_equal(features(np.ones((1, 16, 16, 3)).tolist())[0], features(jnp.ones((1, 16, 16, 3)))[0])


def test_no_images_have_no_features():
    features = VGG19Features.random(width=2)(jnp.zeros((0, 16, 16, 3)))
    assert [f.shape for f in features] == [(0, 16 >> i, 16 >> i, 2 << min(i, 3)) for i in range(5)]


def test_vgg16_has_a_map_at_the_end_of_each_stage():
    """By hand: relu1_2, relu2_2 and relu3_3 of a network of width 2, with a 2x2 max pooling between the stages."""
    features = VGG16Features.random(width=2)
    x = jax.random.uniform(jax.random.key(0), (1, 8, 12, 3))
    y, expected = x, []
    for name in ("conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3"):
        if name in ("conv2_1", "conv3_1"):
            y = nnx.max_pool(y, (2, 2), (2, 2))
        kernel = features.weights[f"{name}_kernel"][...]
        y = nnx.relu(lax.conv_general_dilated(y, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        if name in ("conv1_2", "conv2_2", "conv3_3"):
            expected.append(y)
    for got, wanted in zip(features(x), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("network", [VGG19Features, VGG16Features])
def test_any_layers_and_imagenet_normalization(network):
    """The maps of named layers, in the order of the names, are those of a network evaluated step by step; only their weights are kept.

    Expected normalization: torchvision's mean (0.485, 0.456, 0.406) and standard deviation (0.229, 0.224, 0.225)."""
    layers = ("relu4_2", "relu1_1", "relu2_2")
    x = jax.random.uniform(jax.random.key(0), (1, 8, 12, 3))
    every = network.random(width=2, layers=[name.replace("conv", "relu") for name in network.CONVOLUTIONS[:10]])
    named = network.random(width=2, layers=layers, normalize=True)
    assert named.levels == 3 and named.least == 8 and "conv4_2_kernel" in named.weights and "conv4_3_kernel" not in named.weights
    normal = (x - np.array([0.485, 0.456, 0.406])[None, None, None]) / np.array([0.229, 0.224, 0.225])[None, None, None]
    maps = dict(zip(every.layers, every(normal.astype(np.float32)), strict=True))
    for got, layer in zip(named(x), layers, strict=True):
        np.testing.assert_allclose(got, maps[layer], rtol=1e-5, atol=1e-5, err_msg=layer)
    # The last layers of the two networks, sixteen and thirteen convolutions deep.
    last = network.random(width=1, layers=[{"VGG-19": "relu5_4", "VGG-16": "relu5_3"}[network.TITLE]])
    assert len(last.weights) == 2 * {"VGG-19": 16, "VGG-16": 13}[network.TITLE]


def test_wrong_layers_are_named():
    early = {name: value for name, value in tiny_weights().items() if name < "conv3_2"}
    for layers, message in [
        (("relu6_1",), "layer relu6_1 is not one of VGG-19's: relu1_1, relu1_2"),
        (("conv1_1",), "layer conv1_1 is not one of"),
        (("relu1_1", "relu1_1"), r"layers \(=relu1_1,relu1_1\) must be different"),
        ((), r"layers \(=\(\)\) must be a sequence of names"),
        ("relu1_1", r"layers \(='relu1_1'\) must be a sequence of names"),
        (("relu1_1", "relu3_2"), "the weights end at relu3_1, before layer relu3_2"),
    ]:
        with pytest.raises(ValueError, match=message):
            VGG19Features(early, layers=layers)


def test_a_file_of_the_other_network_is_refused(tmp_path):
    save_file(tiny_weights(VGG16Features), tmp_path / "vgg16.safetensors", metadata=VGG16Features.metadata(source="test"))
    assert VGG16Features.load(tmp_path / "vgg16.safetensors").levels == 3
    with pytest.raises(UserError, match=r"vgg16.safetensors holds vgg16 and must hold VGG-19: get torchvision's vgg19-dcbb9e9d.pth"):
        load_vgg19(tmp_path / "vgg16.safetensors")
