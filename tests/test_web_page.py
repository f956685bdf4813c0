"""The web page in Chromium: pictures of all kinds are restored, and the results are those of `dehaze`."""

import base64
import io

import numpy as np
import pytest
from browser import TILE, difference, hazy_picture
from PIL import Image

from aecr_jax import dehaze, load_checkpoint
from aecr_jax.inference.restore import OVERLAP, Restorer, blend_tiles

pytest.importorskip("selenium", reason="needs selenium")
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

pytestmark = pytest.mark.slow


def by_tiles(hazy, model):
    restorer = Restorer(load_checkpoint(model))
    pixels = np.asarray(hazy) / np.float32(255)
    if not restorer.splits(*pixels.shape[:2], TILE):
        return dehaze(hazy, model)
    restored = blend_tiles(lambda i, j, tile: restorer(tile), pixels, *restorer.cut(*pixels.shape[:2], TILE, OVERLAP), OVERLAP)
    return Image.fromarray(np.uint8(np.round(255 * restored)))


@pytest.mark.parametrize(
    ("model", "size"),
    [("photo", (101, 75)), ("photo", (1301, 907)), ("photo", (4000, 3000)), ("aecr_net_tiny", (161, 118)), ("aecr_net_tiny", (330, 270))],
)
def test_pixels_are_those_of_dehaze(page, tmp_path, model, size):
    """The pictures have one and more than one megapixel, twelve of them, and one and several tiles, which do not know the whole picture."""
    hazy = hazy_picture(*size)
    hazy.save(tmp_path / "view.png")
    Select(page["model"]).select_by_visible_text(model)
    page.choose(tmp_path / "view.png")
    page.wait_for_result()
    found = page.download().convert("RGB")
    expected = by_tiles(hazy, model)
    assert difference(found, expected) <= 2
    assert difference(hazy, expected) > 15
    assert page["facts"].text.startswith(
        f"{size[0]} × {size[1]} pixels ({size[0] * size[1] / 1e6:.1f} megapixels), restored by {model} in "
    )


def test_the_strength(page, tmp_path):
    hazy = hazy_picture(120, 90)
    hazy.save(tmp_path / "view.png")
    page.choose(tmp_path / "view.png")
    page.wait_for_result()
    for percent in (0, 50, 100):
        page.set_strength(percent)
        assert page["strength-shown"].text == f"{percent}%"
        assert difference(page.download().convert("RGB"), dehaze(hazy, strength=percent / 100)) <= (2 if percent else 0)


def test_jpeg_and_transparency(page, tmp_path):
    """PNG keeps alpha, and JPEG puts the picture on white."""
    hazy = hazy_picture(120, 90)
    alpha = Image.fromarray(np.uint8(255 * (np.arange(120) >= 40))[None].repeat(90, 0))
    hazy.putalpha(alpha)
    hazy.save(tmp_path / "cut.out.png")
    page.choose(tmp_path / "cut.out.png")
    page.wait_for_result()
    found = page.download()
    assert found.mode == "RGBA" and found.filename.endswith("cut.out_dehazed.png") and difference(found.getchannel("A"), alpha) == 0
    jpeg = page.download("jpeg")
    assert jpeg.format == "JPEG" and jpeg.size == (120, 90) and np.asarray(jpeg)[:, :32].min() > 250
    white, file = Image.new("RGB", found.size, "white"), io.BytesIO()
    white.paste(found, mask=found)
    white.save(file, "JPEG", quality=92)  # the loss is about that of Pillow's encoder
    assert np.abs(np.asarray(jpeg, np.int16) - np.asarray(Image.open(file), np.int16)).mean() < 2


def test_the_orientation_of_exif_is_applied(page, tmp_path):
    """Orientation 6: the stored picture is turned clockwise by 90 degrees, so that its lower left corner comes to the upper left."""
    stored = Image.new("RGB", (120, 80), (120, 130, 140))
    stored.paste((200, 30, 30), (0, 60, 20, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    page.choose(tmp_path / "phone.jpg")
    page.wait_for_result()
    page.set_strength(0)
    found = page.download()
    assert found.size == (80, 120) and not found.getexif()
    red, _, blue = found.convert("RGB").getpixel((8, 8))
    assert red > 150 and blue < 90


def test_cancel_and_again(page, tmp_path):
    hazy = hazy_picture(900, 700)
    hazy.save(tmp_path / "large.png")
    Select(page["model"]).select_by_visible_text("aecr_net_tiny")
    page.choose(tmp_path / "large.png")
    page.wait(lambda: page["status"].text == "Restoring" and float(page["progress"].get_attribute("value") or 0) > 0)
    page["cancel"].click()
    assert page["status"].text == "Cancelled" and not page["png"].is_enabled() and not page["progress"].is_displayed()
    assert page.driver.switch_to.active_element == page["again"]
    page["again"].send_keys(Keys.ENTER)  # the focus goes on to the button that takes the place of this one
    assert page.driver.switch_to.active_element == page["cancel"]
    Select(page["model"]).select_by_visible_text("photo")  # starts again, with a new worker
    page.wait_for_result()
    assert difference(page.download().convert("RGB"), dehaze(hazy)) <= 2


# ---- ways to choose a picture

TRANSFER = """
    const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "given.png", { type: "image/png" }));
"""
WAYS = {
    "drop": TRANSFER + "document.body.dispatchEvent(new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true }));",
    "paste": TRANSFER + "document.body.dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true }));",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_picture_is_dropped_or_pasted(page, way):
    file = io.BytesIO()
    hazy_picture(64, 48).save(file, "PNG")
    page.run(WAYS[way], base64.b64encode(file.getvalue()).decode())
    page.wait_for_result()
    assert page["facts"].text.startswith("64 × 48 pixels") and page.download().filename.endswith("given_dehazed.png")


def test_the_sample(page):
    page.driver.find_element("class name", "sample").click()
    page.wait_for_result()
    assert page["facts"].text.startswith("640 × 426 pixels")


def test_a_later_picture_replaces_an_earlier_one(page, tmp_path):
    for name, size in (("first", (700, 600)), ("second", (50, 40))):
        hazy_picture(*size).save(tmp_path / f"{name}.png")
        page.choose(tmp_path / f"{name}.png")
    page.wait_for_result()
    assert page["facts"].text.startswith("50 × 40") and page.download().filename.endswith("second_dehazed.png")


def test_files_that_cannot_be_used_get_a_message(page, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    hazy_picture(64, 48).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    expected = {
        "notes.txt": "notes.txt is not an image that this browser can read. JPEG, PNG and WebP files work everywhere.",
        "huge.png": "huge.png is too large (20000 × 10000 pixels, 200 megapixels): the limit is 50 megapixels.",
        "cut.png": "cut.png is not an image that this browser can read.",
    }
    for name, message in expected.items():
        page.choose(tmp_path / name)
        page.wait(lambda message=message: page["problem"].text.startswith(message), 20)
        assert not page["result"].is_displayed()
    hazy_picture(64, 48).save(tmp_path / "good.png")
    page.choose(tmp_path / "good.png")
    page.wait_for_result()


SIZES = """
    const { declaredSize } = await import("./pictures.js");
    const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
    return declaredSize(new Blob([bytes]));
"""


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "comment": b"x" * 60_000}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0II*\0"}),
        ("TIFF", {}),
    ],
)
def test_sizes_are_found_without_decoding(page, format, options):
    file = io.BytesIO()
    hazy_picture(321, 45).save(file, format, **options)
    found = page.run(f"return (async function () {{{SIZES}}}).apply(null, arguments)", base64.b64encode(file.getvalue()).decode())
    assert found == (None if format == "TIFF" else [321, 45])
