"""The public API: images in memory, lazily imported names, and the modules that an import loads."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import aecr_jax
from aecr_jax.networks.aecr_net import AECRNet, AECRNetConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    model = AECRNet(AECRNetConfig(width=2, blocks=1), rngs=nnx.Rngs(0))
    model.train()
    return model


def restored_by_hand(model, hazy):
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, state)
    copy.eval()
    return np.clip(copy(jnp.asarray(hazy)), 0, 1)


def test_arrays_of_each_type_come_back_as_that_type(model):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 17, 22, 3), np.uint8)
    expected = restored_by_hand(model, pixels.astype(np.float32) / 255)
    result = aecr_jax.dehaze(pixels, model)
    assert result.dtype == np.uint8 and result.shape == pixels.shape
    np.testing.assert_allclose(result / 255, expected, atol=0.51 / 255)
    one = aecr_jax.dehaze(pixels[1], model)
    np.testing.assert_array_equal(one, result[1])
    wide = aecr_jax.dehaze(pixels.astype(np.uint16) * 257, model)
    assert wide.dtype == np.uint16
    np.testing.assert_allclose(wide / 65535, expected, atol=1e-4)
    other_order = aecr_jax.dehaze((pixels.astype(np.uint16) * 257).astype(">u2"), model)
    assert other_order.dtype == ">u2"
    np.testing.assert_array_equal(other_order, wide)
    for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-6), (np.float16, 1e-3)):
        floats = aecr_jax.dehaze((pixels / 255).astype(dtype), model)
        assert floats.dtype == dtype
        np.testing.assert_allclose(floats, expected, atol=tolerance + (1e-2 if dtype == np.float16 else 0))
    assert aecr_jax.dehaze(pixels[:0], model).shape == (0, 17, 22, 3)


def test_the_callers_model_stays_in_its_mode_and_may_change(model):
    pixels = np.full((8, 8, 3), 0.5, np.float32)
    before = aecr_jax.dehaze(pixels, model)
    assert model.fast_deconv.use_running_average is False  # still in training mode
    bias = model.up3.bias[...]
    model.up3.bias[...] = bias + 0.5
    after = aecr_jax.dehaze(pixels, model)
    model.up3.bias[...] = bias
    assert after.mean() > before.mean() + 0.05


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK"])
def test_pil_images(model, mode):
    rgb = Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 16, 3), np.uint8))
    image = rgb.convert(mode)
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize((16, 12)))
    result = aecr_jax.dehaze(image, model)
    assert result.mode == (mode if mode in ("RGB", "RGBA", "L", "LA") else "RGB") and result.size == (16, 12)
    if "A" in mode:
        np.testing.assert_array_equal(*(np.asarray(picture.getchannel("A")) for picture in (result, image)))
    expected = aecr_jax.dehaze(np.asarray(image.convert("RGB")), model)
    if mode == "RGB":
        np.testing.assert_array_equal(np.asarray(result), expected)


def test_large_images_go_in_tiles(model):
    image = np.random.default_rng(2).random((300, 270, 3), np.float32)
    tiled, whole = aecr_jax.dehaze(image, model, tile=256), aecr_jax.dehaze(image, model, tile=0)
    assert tiled.shape == image.shape and 0 < np.abs(tiled - whole).max() < 0.2


def test_strength_blends_the_result_with_the_input(model):
    """The expected values are those of the formula, in float64."""
    hazy = np.random.default_rng(4).random((12, 16, 3), np.float32)
    full = aecr_jax.dehaze(hazy, model)
    assert np.abs(full - hazy).max() > 0.1
    for strength in (0.25, 0.6):
        expected = hazy + strength * (full.astype(np.float64) - hazy)
        np.testing.assert_allclose(aecr_jax.dehaze(hazy, model, strength=strength), expected, atol=1e-6)
    np.testing.assert_array_equal(aecr_jax.dehaze(hazy, model, strength=1), full)
    np.testing.assert_array_equal(aecr_jax.dehaze(hazy, model, strength=0), hazy)
    large = np.random.default_rng(5).random((300, 270, 3), np.float32)
    halves = aecr_jax.dehaze(large, model, tile=256, strength=0.5)
    np.testing.assert_allclose(halves, (large + aecr_jax.dehaze(large, model, tile=256)) / 2, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_strength_zero_returns_integer_images_unchanged(model, mode):
    """All values of 8 bits occur, and every seventeenth of 16 bits."""
    pixels = np.arange(65536)[::17].astype(np.uint16)[: 3 * 35 * 36].reshape(35, 36, 3)
    np.testing.assert_array_equal(aecr_jax.dehaze(pixels, model, strength=0), pixels)
    image = Image.fromarray(np.random.default_rng(6).permutation(np.arange(768) % 256).astype(np.uint8).reshape(16, 16, 3)).convert(mode)
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize((16, 16)))
    result = aecr_jax.dehaze(image, model, strength=0)
    assert result.mode == mode
    np.testing.assert_array_equal(np.asarray(result), np.asarray(image))


def test_pillows_less_common_modes(model):
    """A transparent colour becomes an alpha channel, and grey with a premultiplied alpha channel comes back as grey with alpha."""
    grey = Image.linear_gradient("L").resize((16, 16))
    grey.info["transparency"] = 0
    result = aecr_jax.dehaze(grey, model, strength=0)
    assert result.mode == "LA"
    np.testing.assert_array_equal(np.asarray(result.getchannel("A")) == 0, np.asarray(grey) == 0)
    premultiplied = Image.merge("LA", [Image.new("L", (16, 16), 100), Image.new("L", (16, 16), 255)]).convert("La")
    result = aecr_jax.dehaze(premultiplied, model, strength=0)
    assert result.mode == "LA" and result.getpixel((3, 3)) == (100, 255)


def test_models_by_path(model, tmp_path):
    aecr_jax.save_checkpoint(model, tmp_path / "m", about={"name": "tiny", "step": 7})
    loaded = aecr_jax.load_checkpoint(tmp_path / "m")
    assert (loaded.name, loaded.step, loaded.config) == ("tiny", 7, model.config)
    pixels = np.random.default_rng(3).random((8, 12, 3), np.float32)
    np.testing.assert_allclose(aecr_jax.dehaze(pixels, tmp_path / "m"), aecr_jax.dehaze(pixels, model), atol=1e-6)


def test_wrong_images_are_value_errors(model, tmp_path):
    for image, message in [
        (np.zeros((8, 8), np.uint8), r"image has shape \(8, 8\) and must be \[H, W, 3\]"),
        (np.zeros((8, 8, 4), np.uint8), r"image has shape \(8, 8, 4\)"),
        (np.zeros((8, 8, 3), np.int32), "image has type int32 and must be uint8, uint16 or floating point"),
        (np.zeros((8, 8, 3), bool), "image has type bool"),
        (np.full((8, 8, 3), 200.0), r"image has values from 200 to 200 and must be in \[0, 1\]"),
        (np.full((8, 8, 3), np.nan), r"image has values from nan to nan and must be in \[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            aecr_jax.dehaze(image, model)
    with pytest.raises(ValueError, match=r"tile \(=5\) must be 0 or an integer of at least 256"):
        aecr_jax.dehaze(np.zeros((8, 8, 3), np.uint8), model, tile=5)
    for tile in (300.5, "300", float("nan")):
        with pytest.raises(ValueError, match=rf"tile \(={tile!r}\) must be 0 or an integer of at least 256"):
            aecr_jax.dehaze(np.zeros((8, 8, 3), np.uint8), model, tile=tile)
    for strength in (-0.1, 1.5, float("nan"), "1"):
        with pytest.raises(ValueError, match=rf"strength \(={strength!r}\) must be a number from 0 to 1"):
            aecr_jax.dehaze(np.zeros((8, 8, 3), np.uint8), model, strength=strength)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint folder"):
        aecr_jax.load_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        aecr_jax.load_checkpoint(tmp_path)


def modules_after(code):
    code += "\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_inference_imports_no_training_code(tmp_path):
    """Inference also imports none of the libraries used for training, except those that flax itself imports."""
    unwanted = {"orbax", "grain", "tyro", "tensorstore", "tensorflow_datasets", "optax"} - modules_after("import flax.nnx")
    loaded = modules_after("import numpy as np, aecr_jax; aecr_jax.dehaze(np.zeros((8, 8, 3), np.uint8)); aecr_jax.evaluate, aecr_jax.psnr")
    assert not unwanted & loaded
    assert not [name for name in loaded if name.startswith("aecr_jax.training")]


@pytest.mark.slow
def test_inference_works_where_the_libraries_for_training_are_missing(tmp_path):
    """As on Windows, which orbax does not support."""
    Image.fromarray(np.full((40, 50, 3), 120, np.uint8)).save(tmp_path / "photo.png")
    code = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("orbax", "grain", "tensorstore", "tensorflow_datasets"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from aecr_jax.__main__ import main
folder = sys.argv[1]
assert main(["models"]) == 0
assert main(["dehaze", f"{folder}/photo.png", "--output", f"{folder}/dehazed"]) == 0
assert main(["eval", "--model", "photo", "--data", "scenes:1:64x48", "--output", f"{folder}/eval"]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dehazed/photo.png").exists()


def test_import_is_lazy_and_changes_nothing_of_others():
    loaded = modules_after("import PIL.Image as I; limit = I.MAX_IMAGE_PIXELS; import aecr_jax; assert I.MAX_IMAGE_PIXELS == limit")
    assert "jax" not in loaded and "numpy" not in loaded
    assert set(aecr_jax.__all__) <= set(dir(aecr_jax))
    for name in aecr_jax.__all__:
        assert getattr(aecr_jax, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'dehase'"):
        aecr_jax.dehase  # noqa: B018
    assert (ROOT / "aecr_jax" / "py.typed").exists()


def test_help_needs_no_jax():
    """Help appears in a fraction of a second, because it does not import jax, which alone takes a second."""
    commands = ["train", "eval", "dehaze", "models", "prepare-data", "check-data", "benchmark", "report"]
    commands += ["convert", "convert-vgg", "convert-lpips"]
    calls = [["--help"], *([command, "--help"] for command in commands), ["unknown"]]
    code = "import contextlib, sys\nfrom aecr_jax.__main__ import main\n"
    code += f"for arguments in {calls}:\n    with contextlib.suppress(SystemExit): main(arguments)\n"
    code += "    assert 'jax' not in sys.modules, arguments"
    assert "jax" not in modules_after(code)
