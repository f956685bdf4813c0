"""Exported files against the networks themselves: ONNX by onnxruntime, StableHLO by JAX.

The weights are random. The expected values are those of the network in JAX, which other tests compare with its authors' definition.
"""

import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx
from test_commands import fails
from test_documents import blocks, draw_pair
from test_networks import ToyConfig

from aecr_jax import UserError, load_checkpoint, save_checkpoint
from aecr_jax.__main__ import main
from aecr_jax.export import command, measure
from aecr_jax.export.command import export_model
from aecr_jax.export.to_onnx import to_onnx
from aecr_jax.export.to_stablehlo import to_stablehlo
from aecr_jax.networks import coarse_net
from aecr_jax.networks.arrays import get_arrays, replace_arrays
from aecr_jax.networks.network import Network
from aecr_jax.networks.registry import find_network, make_network, network_names

ROOT = Path(__file__).parents[1]
SMALL = {
    "aecr_net": {"width": 4, "blocks": 2},
    "aod_net": {},
    "coarse_net": {"width": 6, "blocks": 1},
    "dcp": {"patch": 5, "radius": 8},
    "dehaze_net": {"radius": 8},
    "ffa_net": {"width": 8, "blocks": 1},
    "grid_dehaze_net": {"width": 2, "growth": 2, "dense_layers": 2},
    "kddn": {"width": 4, "blocks": 1},
    "kddn_teacher": {"width": 4},
    "msbdn": {"width": 2, "blocks": 1},
    "pfdn": {"width": 4, "blocks": 2},
}
VARIANTS = [
    {"output": "affine", "coarse_levels": 2, "shared": False, "deform_layers": 1, "dfe": "before", "mixup": "sum", "fast_deconv": False},
    {"output": "airlight", "dfe": "none", "mixup": "none"},
    {"output": "residual"},
]
# An even size, an odd one, and one that is smaller than the paddings inside the networks.
SIZES = [(1, 32, 48), (2, 37, 45), (1, 6, 5)]


def make_model(name, **settings):
    """Return a small network whose weights and statistics all differ from their initial values."""
    model = make_network(find_network(name).Config(**(settings or SMALL[name])), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    # Kernels of this size neither extinguish the image on its way through the network nor blow it up.
    arrays = {
        key: array + rng.standard_normal(array.shape, np.float32) * min(0.1, max(1, np.prod(array.shape[:-1])) ** -0.5)
        for key, array in get_arrays(model).items()
    }
    for key in arrays:
        if key.endswith("offset_mask.bias"):  # pixels: many samples are outside of the image
            arrays[key] = 4 * jnp.asarray(rng.standard_normal(arrays[key].shape, np.float32))
    graph, state = nnx.split(model)
    model = nnx.merge(graph, replace_arrays(state, arrays))
    model.eval()
    return model


def images(n, h, w):
    return np.random.default_rng(h).random((n, h, w, 3), np.float32)


def run_onnx(content, x, output="restored"):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options)
    return session.run([output], {"hazy": x.transpose(0, 3, 1, 2)})[0].transpose(0, 2, 3, 1)


def reference(model, x):
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda x: nnx.merge(graph, state)(x))(x))


# ---- ONNX


def test_every_network_is_tested():
    assert sorted(SMALL) == [name for name in network_names() if name != "toy"]


# They take long to compile for each size of the images.
MANY_LAYERS = ("ffa_net", "grid_dehaze_net", "msbdn", "pfdn")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in MANY_LAYERS else name for name in SMALL])
def test_onnx_equals_the_network(name):
    model = make_model(name)
    content = to_onnx(model, {})
    for size in SIZES:
        x = images(*size)
        expected = reference(model, x)
        np.testing.assert_allclose(run_onnx(content, x), expected, atol=1e-4, rtol=0)
        assert expected.std() > 0.01


def test_values_beyond_0_and_1_and_parts_of_one_colour():
    """CoarseNet clips what it computes extremes and logarithms from; in a part of one colour, the variance is 0."""
    x = np.float32(1.2) * images(1, 32, 64) - np.float32(0.1)
    for column, colour in ((0, 0), (16, 1), (32, 0.83)):
        x[:, :16, column : column + 16] = colour
    model = make_model("coarse_net")
    np.testing.assert_allclose(run_onnx(to_onnx(model, {}), x), reference(model, x), atol=2e-5, rtol=0)


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: settings["output"])
def test_the_variants_of_aecr_net(settings):
    model = make_model("aecr_net", width=2, blocks=2, **settings)
    x = images(2, 37, 45)
    np.testing.assert_allclose(run_onnx(to_onnx(model, {}), x), reference(model, x), atol=1e-4, rtol=0)


def test_deformable_convolutions_by_grid_sample():
    model = make_model("aecr_net")
    content = to_onnx(model, {}, deform="grid-sample")
    operators = {node.op_type for node in onnx.load_from_string(content).graph.node}
    assert "GridSample" in operators and "DeformConv" not in operators
    for size in SIZES:
        x = images(*size)
        np.testing.assert_allclose(run_onnx(content, x), reference(model, x), atol=1e-4, rtol=0)
    # The offsets matter: a model whose samples are elsewhere has another output.
    x, moved = images(*SIZES[1]), make_model("aecr_net")
    moved.deform[0].offset_mask.bias[...] *= 0.5
    assert np.abs(reference(moved, x) - reference(model, x)).max() > 5e-3


def test_large_images_of_coarse_net_are_reduced(monkeypatch):
    """With a limit of 500 pixels instead of a million, 37 x 45 pixels are reduced by 2 (1665 pixels are more than 500, at most 2000)."""
    monkeypatch.setattr(coarse_net, "PIXELS", 500)
    model = make_model("coarse_net")
    content = to_onnx(model, {})
    for size in ((1, 20, 25), (2, 37, 45), (1, 60, 75)):  # 500, 1665 and 4500 pixels: factors 1, 2 and 3
        x = images(*size)
        np.testing.assert_allclose(run_onnx(content, x), reference(model, x), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "dtype", "most"), [("photo", "float16", 2e-3), ("photo", "int8", 0.1), ("aecr_net_tiny", "float16", 0.05)]
)
def test_smaller_types_stay_near(name, dtype, most):
    """The bounds are about three times the differences that were found; the means are much smaller."""
    model = load_checkpoint(name)
    x = np.tile(np.linspace(0.3, 0.9, 96, dtype=np.float32)[None, None, :, None], (1, 64, 1, 3)) * images(1, 64, 96) ** 0.2
    content, full = to_onnx(model, {"name": name}, dtype=dtype), to_onnx(model, {})
    assert len(content) < 0.6 * len(full) and onnx.load_from_string(content).metadata_props[0].value == name
    difference = np.abs(run_onnx(content, x) - run_onnx(full, x))
    assert 0 < difference.mean() < most / 5 and difference.max() < most


def test_shared_weights_are_stored_once():
    """The paper's network applies one block six times: the file has little more than its parameters, 4 bytes each."""
    model = make_model("aecr_net", width=16, blocks=6)
    assert len(to_onnx(model, {})) < 4 * sum(array.size for array in get_arrays(model).values()) + 40_000


# ---- StableHLO


@pytest.mark.parametrize(
    "name", [name if name in ("aecr_net", "coarse_net", "dcp") else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_stablehlo_equals_the_network(name):
    model = make_model(name)
    program = jax.export.deserialize(bytearray(to_stablehlo(model)))
    assert program.platforms == ("cpu", "cuda", "tpu")
    multiple, least, _ = model.symbolic_sizes()
    side = -(-least // multiple) * multiple
    for size in ((1, side, side + multiple), (2, side + 2 * multiple, side)):
        x = images(*size)
        np.testing.assert_allclose(program.call(x), reference(model, x), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="shape"):
        program.call(images(1, 8, 8))


# ---- the command


def test_the_command_writes_describes_and_measures(tmp_path, capsys):
    output = tmp_path / "new" / "photo.onnx"
    assert main(["export", "photo", "--format", "onnx", "--output", str(output), "--size", "64"]) == 0
    said = capsys.readouterr().out
    assert f"{output}: photo (coarse_net) as onnx, for images of any size" in said
    assert "926,820" in said and " G at 64x64" in said and f"{output.stat().st_size / 1e6:.3g} MB" in said
    assert 0 < float(said.partition("latency")[2].split()[0]) < 60_000 and "peak memory" in said
    model = onnx.load(output)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    settings = json.loads(metadata.pop("settings"))
    assert settings["name"] == "coarse_net" and settings["width"] == 48
    assert metadata.pop("source").startswith("NYU Depth v2") and metadata.pop("aecr_jax")
    expected = {"name": "photo", "network": "coarse_net", "parameters": "926820", "license": "apache-2.0", "step": "96000"}
    assert metadata == expected | {"tile": "0", "overlap": "0", "dtype": "float32"}


def test_metadata_of_a_converted_model(tmp_path):
    model = make_model("aod_net")
    save_checkpoint(model, tmp_path / "mine", {"source": "aod.pth", "sha256": "12ab", "step": 7})
    export_model(tmp_path / "mine", tmp_path / "mine.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "mine.onnx").metadata_props}
    found = {key: metadata.get(key) for key in ("name", "source", "sha256", "step", "tile", "overlap", "license")}
    assert found == {
        "name": "mine",
        "source": "aod.pth",
        "sha256": "12ab",
        "step": "7",
        "tile": "1536",
        "overlap": "128",
        "license": None,
    }


def test_errors_are_one_line_and_write_nothing(tmp_path, capsys, monkeypatch):
    output = tmp_path / "m.onnx"
    export = ["export", "photo", "--format", "onnx", "--output", output]
    assert "there is no checkpoint folder foto; the shipped models are" in fails(capsys, "export", "foto", *export[2:])
    assert "--dtype int8 needs a network with at least three convolutions: dcp has 0" in fails(
        capsys, "export", "dcp", *export[2:], "--dtype", "int8"
    )
    assert "--size (=8) must be at least 32" in fails(capsys, *export, "--size", "8")
    assert f"--output (={tmp_path}) is a folder" in fails(capsys, *export[:-1], tmp_path)
    stablehlo = ["export", "photo", "--format", "stablehlo", "--output", output]
    assert "--dtype int8 is for --format onnx" in fails(capsys, *stablehlo, "--dtype", "int8")
    assert "--deform grid-sample is for --format onnx" in fails(capsys, *stablehlo, "--deform", "grid-sample")
    assert not output.exists()
    output.write_text("kept")
    assert f"{output} already exists: choose another output, or add --overwrite" in fails(capsys, *export)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "run `pip install 'onnx>=1.23.2' 'onnxruntime>=1.25'`" in fails(capsys, *export, "--overwrite")
    assert output.read_text() == "kept"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"form": "torchscript"}, r"--format \(=torchscript\) must be one of onnx, stablehlo"),
        ({"dtype": "bfloat16"}, r"--dtype \(=bfloat16\) must be one of float32, float16, int8"),
        ({"deform": "gridsample"}, r"--deform \(=gridsample\) must be one of native, grid-sample"),
    ],
)
def test_an_unknown_choice_is_refused_in_python_too(option, words, tmp_path):
    with pytest.raises(UserError, match=words):
        export_model("photo", tmp_path / "x", **option)
    assert not (tmp_path / "x").exists()


def test_a_network_of_the_user_is_refused():
    class Unknown(Network):
        Config = ToyConfig

    with pytest.raises(UserError, match="the network toy cannot be exported to ONNX; those that can are aecr_net, aod_net,"):
        to_onnx(Unknown(ToyConfig(), rngs=nnx.Rngs(0)), {})


def test_a_file_that_does_not_run_is_reported(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    assert "INVALID_PROTOBUF" in measure.measure("onnx", tmp_path / "broken.onnx", 32)["error"]


@pytest.mark.slow
def test_a_program_for_other_sizes_gives_the_reason(tmp_path):
    """JAX prints a note after its errors, unless it shows whole tracebacks; docs/export.md has the reason."""
    export_model("photo", tmp_path / "photo.stablehlo", form="stablehlo")
    assert "Error refining shapes" in measure.measure("stablehlo", tmp_path / "photo.stablehlo", 1056)["error"]


def test_the_stated_packages_are_those_of_the_extra():
    import tomllib

    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["onnx"]
    assert set(extra) <= set((ROOT / "requirements-test.txt").read_text().splitlines())
    assert [entry.partition(",")[0] for entry in extra] == list(command.PACKAGES)


def test_the_examples_of_the_document_run(tmp_path, monkeypatch):
    draw_pair(tmp_path, ["photo.png"], "clear.png", 0, size=(100, 76))
    (tmp_path / "photo.png").rename(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for code in blocks(ROOT / "docs/export.md", "python"):
        module = types.ModuleType("example")
        exec(compile(code, "docs/export.md", "exec"), module.__dict__)
    assert (tmp_path / "dehazed.png").exists()
