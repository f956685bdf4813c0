import gc
import re
import time
import weakref

import numpy as np
import pytest
from PIL import Image

from aecr_jax.__main__ import main
from aecr_jax.data.images import read_image
from aecr_jax.errors import UserError
from aecr_jax.inference.compare import compare
from aecr_jax.metrics import psnr, ssim

WHITE, GAP, LINE = 255, 8, 26


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two hazy pictures of different sizes with RESIDE's names, and their clear ones."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number, (h, w) in ((1400, (24, 40)), (1401, (36, 28))):
        clear = rng.integers(0, 256, (h, w, 3), np.uint8)
        for name, pixels in ((f"hazy/{number}_1.png", clear // 2 + 100), (f"clear/{number}.png", clear)):
            (folder / name).parent.mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    return folder


def test_a_sheet_has_a_row_for_each_image_and_a_column_for_each_model(pictures, model_dir, tmp_path, capsys):
    hazy = [pictures / "hazy" / "1400_1.png", pictures / "hazy" / "1401_1.png"]
    command = ["compare", *map(str, hazy), "--models", f"{model_dir},{model_dir}", "--output", str(tmp_path / "sheet.png")]
    assert main([*command, "--clear", str(pictures / "clear")]) == 0
    said = capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    # Four columns as wide as the widest picture (40) and five gaps; a line of titles, and below each picture a line of scores.
    assert sheet.shape == (LINE + (24 + LINE) + (36 + LINE) + 3 * GAP, 4 * 40 + 5 * GAP, 3)
    first = sheet[LINE + GAP :][:24, GAP:][:, :40]
    np.testing.assert_array_equal(first, np.asarray(Image.open(hazy[0])))
    last = sheet[LINE + GAP :][:24, -GAP - 40 : -GAP]
    np.testing.assert_array_equal(last, np.asarray(Image.open(pictures / "clear" / "1400.png")))
    x, y = (read_image(path)[None] for path in (hazy[1], pictures / "clear" / "1401.png"))
    assert re.search(rf"1401_1.png +{psnr(x, y)[0]:.2f} / {ssim(x, y)[0]:.4f} ", said), said


def test_without_clear_images_there_are_no_scores(pictures, model_dir, tmp_path):
    assert compare([pictures / "hazy" / "1400_1.png"], [model_dir], tmp_path / "sheet.png", width=20) == ""
    with pytest.raises(UserError, match=r"sheet.psd must end in one of \.png, "):
        compare([pictures / "hazy" / "1400_1.png"], ["none"], tmp_path / "sheet.psd")
    assert Image.open(tmp_path / "sheet.png").size == (2 * 20 + 3 * GAP, LINE + 12 + 2 * GAP)  # reduced to half


def test_one_image_at_a_time_is_in_memory(pictures, model_dir, tmp_path, monkeypatch):
    """Expected: whenever an image is read, at most the previous image, its clear image and one more are in memory.

    A thread of JAX may hold the arrays that a program has read a little longer, until the next garbage collection.
    """
    images: list[weakref.ref] = []
    alive = []

    def count():
        return sum(image() is not None for image in images)

    def read(path):
        deadline = time.monotonic() + 5
        while count() > 3 and time.monotonic() < deadline:
            time.sleep(0.01)
            gc.collect()
        alive.append(count())
        image = read_image(path)
        images.append(weakref.ref(image))
        return image

    monkeypatch.setattr("aecr_jax.inference.compare.read_image", read)
    hazy = [pictures / "hazy" / f"{number}_1.png" for number in (1400, 1401, 1400, 1401)]
    compare(hazy, [model_dir], tmp_path / "sheet.png", clear=pictures / "clear", width=20)
    assert max(alive) <= 3


@pytest.mark.parametrize("which", ["hazy/1400_1.png", "clear/1400.png"])
def test_an_input_is_never_replaced(pictures, model_dir, which):
    before = (pictures / which).read_bytes()
    with pytest.raises(UserError, match=rf"{which} is an input and would be replaced"):
        compare([pictures / "hazy" / "1400_1.png"], [model_dir], pictures / which, clear=pictures / "clear", overwrite=True)
    assert (pictures / which).read_bytes() == before


def test_a_clear_file_serves_one_image(pictures, model_dir, tmp_path):
    table = compare([pictures / "hazy" / "1400_1.png"], [model_dir], tmp_path / "s.png", clear=pictures / "clear" / "1400.png")
    assert table.count("/") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clear": "hazy"}, r"1400_1.png has no clear image in .*hazy: looked for 1400_1 or 1400"),
        ({"clear": "clear/1401.png"}, r"1400_1.png is 40x24 and its clear image 28x36: they must have one size"),
        ({"images": ["hazy/1400_1.png"] * 2, "clear": "clear/1400.png"}, r"--clear \(=.*1400.png\) must be a folder"),
        ({"images": ["hazy/none.png"]}, "there is no file"),
        ({"models": ["none"]}, "there is no checkpoint folder none"),
        ({"width": 0}, r"--width \(=0\) must be from 16 to 4096"),
        ({"output": "hazy/1400_1.png"}, "already exists"),
    ],
)
def test_wrong_arguments_are_one_line_and_write_nothing(pictures, model_dir, tmp_path, change, message):
    images = [pictures / image for image in change.get("images", ["hazy/1400_1.png"])]
    if change.get("clear") == "hazy":  # a folder of its own without partners
        (tmp_path / "hazy").mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / "hazy" / "other.png")
        change = change | {"clear": tmp_path / "hazy"}
    output = pictures / change["output"] if "output" in change else tmp_path / "sheet.png"
    with pytest.raises(ValueError, match=message):
        compare(
            images,
            change.get("models", [model_dir]),
            output,
            clear=pictures / change["clear"] if "clear" in change else None,
            width=change.get("width", 320),
        )
    assert not (tmp_path / "sheet.png").exists()
