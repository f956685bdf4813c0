"""The networks against their authors' definitions, with weights made by a rule, and with the authors' own weights.

The expected values in tests/golden/networks were computed with PyTorch 2.13.0 from the definitions that the docstring of each network
names: `y64` is the output in float64, `grad_norms` and `grad_dots` are norms and projections of the gradients of `sum(y64 * c)`.
The files in ../shared/networks have more: the outputs of single layers, and images of odd size.
"""

import importlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aecr_jax import load_checkpoint, psnr
from aecr_jax.convert.networks import convert, find_format
from aecr_jax.data.images import read_image
from aecr_jax.networks.arrays import count_parameters, get_arrays
from aecr_jax.networks.registry import abstract_network, build_network, find_network

GOLDEN = Path(__file__).parent / "golden" / "networks"
SHARED = Path(__file__).parents[2] / "shared" / "networks"
WEIGHTS, SOTS = SHARED.with_name("weights"), SHARED.with_name("data") / "sots_indoor_subset"


@dataclass
class Case:
    """How a network's reference file compares with this project's network."""

    parameters: int
    images: Callable[[Any], Any] = lambda x: x
    """Maps the file's `x` to images in [0, 1]: the file has the authors' normalisation already."""
    call: Callable[[Any, Any], Any] = lambda model, images: model(images)
    output: Callable[[Any], Any] = lambda y: y
    """Maps the network's output to the file's `y`."""
    features: Mapping[str, str] = field(default_factory=dict)
    """Maps the file's names of layers to ours; "relu(NAME)" where the file has a layer with its activation."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    slow: bool = False
    """Whether the network takes too long for the quick tests, which then compare only its twin with the authors' values."""


CASES: dict[str, Case] = {
    "dehaze_net": Case(
        parameters=8305,
        call=lambda model, images: model.transmission(images),
        features={"f1_maxout": "features", "f3_maxpool": "local_maximum"},
    ),
    "aod_net": Case(parameters=1_761, features={f"e_conv{layer}": f"conv{layer}" for layer in (1, 3, 5)}),
    "grid_dehaze_net": Case(
        parameters=958_051,
        images=lambda x: (x + 1) / 2,
        features={
            "conv_in": "conv_in",
            "rdb_in": "block_in",
            "rdb_module.2_2": "blocks.2.2",
            "upsample_module.1_3": "ups.1.0",
            "rdb_out": "block_out",
        },
        slow=True,
    ),
    "ffa_net": Case(
        parameters=4_455_913,
        images=lambda x: x * np.array([0.14, 0.15, 0.152])[None, None, None] + np.array([0.64, 0.60, 0.58])[None, None, None],
        features={"pre": "first", "g1.gp.0": "groups.0.layers.0", "g2": "groups.1", "ca": "group_attention"},
        slow=True,
    ),
    "pfdn": Case(
        parameters=11_268_611,
        images=lambda x: (x + 1) / 2,
        output=lambda y: 2 * y - 1,
        features={"encoder": "relu(down3)", "pfdbs.0.fdu": "blocks.0.dehazing", "pfdbs": "blocks.8"},
        slow=True,
    ),
    "msbdn": Case(
        parameters=31_353_061,
        features={
            "conv_input": "conv_in",
            "fusion1": "encoder_fusions.0",
            "fusion4": "encoder_fusions.3",
            "dehaze": "bottleneck",
            "convd16x": "ups.0",
            "fusion_4": "decoder_fusions.0",
        },
        slow=True,
    ),
    "kddn": Case(
        6_116_419,
        features={
            "down2": "relu(down2)",
            "res1.0": "groups.0.layers.0",
            "res1": "groups.0",
            "res6": "groups.5",
            "up1": "relu(up1)",
        },
        slow=True,
    ),
}


# The tests that take long for large networks.
THOROUGH = [pytest.param(name, marks=pytest.mark.slow) if case.slow else name for name, case in CASES.items()]


def weights_by_rule(seed: int, gain: float, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Make the authors' tensors of these shapes by the rule of the reference files."""
    tensors = {}
    for name, shape in shapes.items():
        z = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
        if name == "coefficient":
            z = 1 + 0.1 * z
        elif len(shape) > 1:
            z = z * gain / np.sqrt(np.prod(shape[1:]))
        else:
            z = 0.1 * z if name.endswith("bias") else 0.25 + 0.05 * z
        tensors[name] = z.astype(np.float32)
    return tensors


def reference_model(name, file, dtype):
    """Our network with the file's weights."""
    config = find_network(name).Config(dtype=dtype, param_dtype=dtype, **CASES[name].settings)
    form, shapes = find_format(name), {ours: array.shape for ours, array in get_arrays(abstract_network(config)).items()}
    theirs = {their: array.shape for their, array in form.to_theirs({ours: np.empty(s, np.bool_) for ours, s in shapes.items()}).items()}
    tensors = weights_by_rule(int(file["seed"]), float(file["gain"]), theirs)
    total = sum(float(tensor.astype(np.float64).sum()) for tensor in tensors.values())
    np.testing.assert_allclose(total, file["weights_sum"], rtol=1e-9, err_msg="the tensors' names or shapes are not the authors'")
    return build_network(config, {ours: array.astype(dtype) for ours, array in form.to_ours(tensors, list(shapes)).items()})


def run(name, model, x, dtype):
    """Return the file's `y`, `[N, C, H, W]`, for its `x`."""
    case = CASES[name]
    images = case.images(jnp.asarray(x, dtype).transpose(0, 2, 3, 1))
    return case.output(case.call(model, images)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("name", THOROUGH)
def test_parameters_are_the_authors(name):
    config = find_network(name).Config(**CASES[name].settings)
    assert count_parameters(abstract_network(config)) == CASES[name].parameters


@pytest.mark.parametrize("name", THOROUGH)
def test_output_in_float32(name):
    file = np.load(GOLDEN / f"{name}.npz")
    y = run(name, reference_model(name, file, "float32"), file["x"], "float32")
    np.testing.assert_allclose(y, file["y64"], rtol=0, atol=2e-5 * np.abs(file["y64"]).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_in_float64(name, x64):
    file = np.load(GOLDEN / f"{name}.npz")
    model = reference_model(name, file, "float64")
    # Operation by operation, because that takes less time than to compile the whole gradient once.
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        y = run(name, nnx.merge(graph, params, rest), x, "float64")
        return jnp.sum(y * file["c"]), y

    (_, y), (by_params, by_x) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, jnp.asarray(file["x"], jnp.float64))
    np.testing.assert_allclose(y, file["y64"], rtol=0, atol=1e-9 * np.abs(file["y64"]).max())
    np.testing.assert_allclose(jnp.linalg.norm(by_x.ravel()), file["grad_x_norm"], rtol=1e-6)
    gradients = find_format(name).to_theirs(
        {ours: np.asarray(array) for ours, array in get_arrays(nnx.merge(graph, by_params, rest)).items()}
    )
    for their, norm, dot in zip(map(str, file["grad_names"]), file["grad_norms"], file["grad_dots"]):
        direction = np.random.default_rng([int(file["seed"]), zlib.crc32(b"dot:" + their.encode())]).standard_normal(gradients[their].shape)
        np.testing.assert_allclose(np.linalg.norm(gradients[their]), norm, rtol=1e-6, err_msg=their)
        np.testing.assert_allclose(np.sum(gradients[their] * direction), dot, rtol=1e-6, atol=1e-6 * norm, err_msg=their)


@pytest.mark.parametrize("name", THOROUGH)
def test_layers_and_odd_sizes_in_float64(name, x64):
    if not (SHARED / f"{name}.npz").exists():
        pytest.skip("the outputs of single layers are in ../shared/networks")
    file = np.load(SHARED / f"{name}.npz")
    model = reference_model(name, file, "float64")
    _, captured = nnx.capture(lambda model, x: run(name, model, x, "float64"), nnx.Intermediate, method_outputs=nnx.Intermediate)(
        model, file["x"]
    )
    outputs = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(captured)} if CASES[name].features else {}
    for theirs, ours in CASES[name].features.items():
        got = outputs[f"{ours.removeprefix('relu(').rstrip(')')}.__call__"].get_value()[0]
        if ours.startswith("relu("):
            got = nnx.relu(got)
        expected = file[f"feat_{theirs}"]  # stored as float32
        np.testing.assert_allclose(np.moveaxis(got, -1, 1), expected, rtol=0, atol=1e-6 * np.abs(expected).max(), err_msg=theirs)
    if "x_odd" in file:
        y = run(name, model, file["x_odd"], "float64")
        np.testing.assert_allclose(y, file["y64_odd"], rtol=0, atol=1e-9 * np.abs(file["y64_odd"]).max())


@pytest.mark.parametrize("name", CASES)
def test_pytorch_twin(name):
    """The baseline of the speed benchmark computes the same."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    file, case = np.load(GOLDEN / f"{name}.npz"), CASES[name]
    config = find_network(name).Config(**case.settings)
    twin = importlib.import_module(f"aecr_jax.benchmark.twins.{name}").make(vars(config))
    shapes = {their: tuple(tensor.shape) for their, tensor in twin.state_dict().items()}
    tensors = weights_by_rule(int(file["seed"]), float(file["gain"]), shapes)
    twin.load_state_dict({their: torch.from_numpy(tensor) for their, tensor in tensors.items()})
    images = np.asarray(case.images(np.moveaxis(file["x"].astype(np.float64), 1, -1)))
    twin = twin.double().eval()
    with torch.no_grad():
        x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
        y = case.call(twin, x).numpy()
    y = np.moveaxis(np.asarray(case.output(np.moveaxis(y, 1, -1))), -1, 1)
    np.testing.assert_allclose(y, file["y64"], rtol=0, atol=1e-9 * np.abs(file["y64"]).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights", "reference", "expected"),
    [
        ("aod_net", "aod_net_caffe.npz", "aod_net_real.npz", "y"),
        ("grid_dehaze_net", "grid_dehaze_net_indoor.pth", "grid_dehaze_net_indoor_real.npz", "y"),
        ("grid_dehaze_net", "grid_dehaze_net_outdoor.pth", "grid_dehaze_net_indoor_real.npz", "y_outdoor"),
    ],
)
def test_own_weights_restore_a_crop(name, weights, reference, expected, tmp_path):
    """The expected values are outputs of the definitions in PyTorch, for a crop of a SOTS image."""
    converted = convert_own(weights, tmp_path)  # skips the test where there are no weights
    file = np.load(SHARED / reference)
    y = run(name, converted, file["x"], "float32")
    np.testing.assert_allclose(y, file[expected], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("weights", "expected"), [("aod_net_caffe.npz", 21.055), ("aod_net_mayank.pth", 20.781)])
def test_own_weights_of_aod_net_restore_an_image(weights, expected, tmp_path):
    """The expected PSNR of the clipped output was measured in PyTorch."""
    if not SOTS.exists():
        pytest.skip("images of SOTS are in ../shared/data")
    hazy, clear = (jnp.asarray(read_image(SOTS / name))[None] for name in ("hazy/1400_1.png", "clear/1400.png"))
    restored = jnp.clip(convert_own(weights, tmp_path)(hazy), 0, 1)
    np.testing.assert_allclose(psnr(restored, clear), [expected], atol=0.001)


def convert_own(weights, folder):
    if not (WEIGHTS / weights).exists():
        pytest.skip("the networks' own weights are in ../shared/weights")
    if weights.endswith(".pth"):
        pytest.importorskip("torch", reason="reading .pth files needs PyTorch")
    convert(WEIGHTS / weights, folder / "model")
    return load_checkpoint(folder / "model")
