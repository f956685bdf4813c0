"""What results of `dehaze` keep of their pictures: bit depth, alpha and folders; and the formats that they are written in.

The network is replaced by one that changes nothing, so a result has the values of its input.
"""

import os

import numpy as np
import pytest
import pyvips
from conftest import Unchanged
from PIL import Image, JpegImagePlugin
from test_commands import fails
from test_data import picture
from test_decode import png, random16, tiff
from test_exif import exif_data

import aecr_jax
from aecr_jax import UserError
from aecr_jax.data.encode import Encoding
from aecr_jax.data.exif import PREFIX
from aecr_jax.data.images import read_picture
from aecr_jax.inference import dehaze as in_memory


def stored(path):
    """Return the values of a file `[H, W, C]` as libvips reads them, which writes none of the files here."""
    image = pyvips.Image.new_from_buffer(path.read_bytes(), "")
    return np.asarray(image).reshape(image.height, image.width, image.bands)


# ---- bits


@pytest.mark.parametrize("extension", ["png", "tif"])
@pytest.mark.parametrize("colour_type", [2, 6])
@pytest.mark.parametrize("strength", ["1", "0.3"])
def test_16_bits_stay_16_bits(dehaze, tmp_path, monkeypatch, extension, colour_type, strength):
    """All values are kept, also if a network that changes nothing is applied in part. The TIFF file has several strips."""
    monkeypatch.setattr("aecr_jax.data.encode._STRIP", 1000)
    values = random16({2: 3, 6: 4}[colour_type], (22, 30))
    (tmp_path / "in" / "a.png").write_bytes(png(values, colour_type))
    assert dehaze("--format", extension, "--strength", strength) == 0
    np.testing.assert_array_equal(stored(tmp_path / "out" / f"a.{extension}"), values)


def test_16_bits_of_a_tiff(dehaze, tmp_path):
    values = random16(4)
    (tmp_path / "in" / "a.tif").write_bytes(tiff(values, 16, 2, extra=[(338, 2)]))
    assert dehaze() == 0
    np.testing.assert_array_equal(stored(tmp_path / "out" / "a.png"), values)


@pytest.mark.parametrize("extension", ["png", "tif", "jpg", "webp"])
def test_bits_can_be_chosen(dehaze, tmp_path, extension):
    """8 bits of 16 are value / 257, rounded, and 16 bits of 8 are value * 257: both are the same brightness."""
    values = random16(3, (16, 16))
    (tmp_path / "in" / "deep.png").write_bytes(png(values, 2))
    small = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(small).save(tmp_path / "in" / "small.png")
    assert dehaze("--format", extension, "--bits", 8) == 0
    reduced = stored(tmp_path / "out" / f"deep.{extension}")
    assert reduced.dtype == np.uint8
    if extension in ("png", "tif"):
        np.testing.assert_array_equal(reduced, np.round(values / 257))
        np.testing.assert_array_equal(stored(tmp_path / "out" / f"small.{extension}"), small)
        assert dehaze("--format", extension, "--bits", 16, "--overwrite") == 0
        np.testing.assert_array_equal(stored(tmp_path / "out" / f"small.{extension}"), small.astype(np.uint16) * 257)


# ---- alpha


@pytest.mark.parametrize("extension", ["png", "webp", "tif"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_alpha_is_carried_through(dehaze, tmp_path, extension, mode):
    """Also the transparency of a palette, and the transparent colour of an RGB picture."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    if mode == "RGB":
        rgb.save(tmp_path / "in" / "a.png", transparency=rgb.getpixel((3, 2)))
        expected = np.full((16, 16), 255)
        expected[2, 3] = 0
    elif mode == "P":
        indices = ramp.copy()
        indices.putpalette(bytes(range(256)) * 3)
        indices.save(tmp_path / "in" / "a.png", transparency=bytes(range(256)))
        expected = np.asarray(ramp)
    else:
        image = rgb.convert(mode)
        image.putalpha(ramp)
        image.save(tmp_path / "in" / "a.png")
        expected = np.asarray(ramp)
    assert dehaze("--format", extension) == 0
    result = stored(tmp_path / "out" / f"a.{extension}")
    np.testing.assert_array_equal(result[..., 3], expected)
    if extension != "webp":
        np.testing.assert_array_equal(result[..., :3], np.asarray(Image.open(tmp_path / "in" / "a.png").convert("RGBA"))[..., :3])


def test_alpha_turns_with_the_picture(dehaze, tmp_path):
    """Orientation 6 is shown turned clockwise by 90 degrees; 8 and 16 bits have different readers."""
    exif = Image.Exif()
    exif[274] = 6
    small = np.random.default_rng(0).integers(0, 256, (3, 5, 4), np.uint8)
    Image.fromarray(small).save(tmp_path / "in" / "small.png", exif=exif)
    (tmp_path / "in" / "deep.png").write_bytes(png(small.astype(np.uint16) * 257, 6, (b"eXIf", exif.tobytes()[6:])))
    assert dehaze() == 0
    np.testing.assert_array_equal(stored(tmp_path / "out" / "small.png"), np.rot90(small, -1))
    np.testing.assert_array_equal(stored(tmp_path / "out" / "deep.png"), np.rot90(small, -1) * np.uint16(257))


def test_transparency_is_not_lost_in_jpeg(dehaze, tmp_path, capsys):
    """A picture with transparent parts is refused before it is restored. Alpha that is opaque everywhere is left out."""
    image = Image.new("RGBA", (8, 8), (200, 100, 50, 255))
    image.save(tmp_path / "in" / "opaque.png")
    image.putpixel((2, 2), (0, 0, 0, 254))
    image.save(tmp_path / "in" / "clear.png")
    assert dehaze("--format", "jpg") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "aecr_jax: " in line]
    assert len(said) == 1 and "clear.png has transparent parts, which a jpg file cannot hold: choose the format png, webp or tif" in said[0]
    assert os.listdir(tmp_path / "out") == ["opaque.jpg"]


# ---- formats


@pytest.mark.parametrize(
    ("extension", "format"), [("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("tif", "TIFF"), ("tiff", "TIFF")]
)
def test_results_have_the_format_and_an_srgb_profile(dehaze, tmp_path, extension, format):
    picture(tmp_path / "in" / "a.bmp", (17, 12))
    (tmp_path / "in" / "deep.png").write_bytes(png(random16(3), 2))
    assert dehaze("--format", extension) == 0 and dehaze("--format", extension, output=tmp_path / "again") == 0
    for name in ("a", "deep"):
        path = tmp_path / "out" / f"{name}.{extension}"
        with Image.open(path) as image:
            assert image.format == format and image.mode == "RGB"
            profile = image.info["icc_profile"]
        assert b"s\0R\0G\0B" in profile and profile[36:40] == b"acsp"
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_quality(dehaze, tmp_path):
    picture(tmp_path / "in" / "a.png", (64, 64))
    size = {}
    for extension in ("jpg", "webp"):
        for quality in (40, 89, 95):
            options = () if quality == 95 else ("--quality", quality)
            out = tmp_path / str(quality)
            assert dehaze("--format", extension, *options, output=out) == 0
            size[extension, quality] = (out / f"a.{extension}").stat().st_size
        assert size[extension, 40] < size[extension, 89] < size[extension, 95]
    with Image.open(tmp_path / "89" / "a.jpg") as low, Image.open(tmp_path / "95" / "a.jpg") as high:
        assert (JpegImagePlugin.get_sampling(low), JpegImagePlugin.get_sampling(high)) == (2, 0)  # 4:2:0 and 4:4:4


def test_bad_options_are_one_line(tmp_path, capsys):
    a = picture(tmp_path / "a.png", (8, 8))
    for options, message in [
        (["--format", "gif"], "format (=gif) must be one of png, jpg, jpeg, webp, tif, tiff"),
        (["--format", "jpg", "--quality", "0"], "quality (=0) must be from 1 to 100"),
        (["--quality", "90"], "quality (=90) applies to the formats jpg and webp only, and the format is png"),
        (["--bits", "12"], "bits (=12) must be 8 or 16"),
        (["--bits", "16", "--format", "webp"], "bits (=16) needs the format png or tif: webp files have 8 bits"),
        (["--suffix", "a/b"], "suffix (=a/b) must be part of a file name"),
        (["--suffix", ""], "argument --suffix: must not be empty"),
    ]:
        assert message in fails(capsys, "dehaze", a, "--output", tmp_path / "out", *options)
    assert os.listdir(tmp_path) == ["a.png"]


def test_pictures_beyond_the_limits_of_a_format_are_refused(dehaze, tmp_path, capsys):
    Image.new("RGB", (16384, 1)).save(tmp_path / "in" / "wide.png")
    Image.new("RGB", (4, 4)).save(
        tmp_path / "in" / "noted.png", exif=exif_data(note=bytes(66000))[:0] + PREFIX + exif_data() + bytes(66000)
    )
    assert dehaze("--format", "webp") == 2
    assert "wide.png has 16384 x 1 pixels, and a side of a webp file has at most 16383: choose" in capsys.readouterr().err
    assert dehaze("--format", "jpg") == 2
    said = capsys.readouterr().err
    assert "noted.png has 66" in said and "bytes of EXIF data, and a jpg file holds at most 65533: choose the format png" in said
    assert sorted(os.listdir(tmp_path / "out")) == ["noted.webp", "wide.jpg"]


@pytest.mark.parametrize(("extension", "writer"), [("jpg", "PIL.Image.Image.save"), ("tif", "aecr_jax.data.encode._write_tiff")])
def test_a_result_is_written_whole_or_not_at_all(dehaze, tmp_path, capsys, monkeypatch, extension, writer):
    picture(tmp_path / "in" / "a.png", (8, 8))
    assert dehaze("--format", extension) == 0
    before = (tmp_path / "out" / f"a.{extension}").read_bytes()

    def fill_the_disk(*arguments, **options):
        file = next(argument for argument in arguments if hasattr(argument, "write"))
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, fill_the_disk)
    assert dehaze("--format", extension, "--overwrite") == 2
    assert f"a.{extension} cannot be written: No space left on device" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == [f"a.{extension}"] and (tmp_path / "out" / f"a.{extension}").read_bytes() == before


# ---- names and folders


def test_suffix(dehaze, tmp_path, capsys):
    """With a suffix, results may lie beside their inputs; a second run refuses to replace its own inputs."""
    for name in ("a.jpg", "b.png"):
        picture(tmp_path / "in" / name, (8, 8))
    before = (tmp_path / "in" / "b.png").read_bytes()
    assert dehaze("--suffix=-clear", output=tmp_path / "in") == 0
    names = ["a-clear.png", "a.jpg", "b-clear.png", "b.png"]
    assert sorted(os.listdir(tmp_path / "in")) == names and (tmp_path / "in" / "b.png").read_bytes() == before
    assert dehaze("--suffix=-clear", output=tmp_path / "in") == 2
    assert "is an input and would be replaced" in capsys.readouterr().err and sorted(os.listdir(tmp_path / "in")) == names


def test_sub_folders_are_mirrored(dehaze, tmp_path, capsys):
    """Links to folders, hidden folders and the output are left out. Equal names in different folders stay, and in one get the extension."""
    folder, out = tmp_path / "in", tmp_path / "in" / "out"
    for name in ("a.jpg", "x/a.jpg", "x/a.bmp", "x/y.png/deep.tif", ".hidden/a.png", "z/.b.png", "out/old.png"):
        picture(folder / name, (8, 8))
    (folder / "loop").symlink_to(folder)
    (folder / "empty").mkdir()
    assert dehaze("--recursive", output=out) == 0
    results = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert results == ["a.png", "old.png", "x/a_bmp.png", "x/a_jpg.png", "x/y.png/deep.png"]
    said = capsys.readouterr()
    assert (
        f"links to folders in {folder} were not searched (1): to dehaze their images, add them as inputs" in said.out
        and not said.err.count("aecr_jax: ")
    )
    assert f"{folder}/x/a.bmp -> {out}/x/a_bmp.png" in said.out and f"4 images written to {out}" in said.out
    assert "deep.tif ->" not in said.out
    assert dehaze("--recursive", output=out) == 2
    assert "a.png already exists (4 of 4 results)" in capsys.readouterr().err


def test_a_sub_folder_that_cannot_be_listed_is_reported(dehaze, tmp_path, capsys, monkeypatch):
    """os.scandir is replaced, because tests may run as root, who may list every folder."""
    picture(tmp_path / "in" / "a.png", (8, 8)), picture(tmp_path / "in" / "secret" / "b.png", (8, 8))
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert dehaze("--recursive") == 2
    assert f"{tmp_path / 'in' / 'secret'} cannot be read: Permission denied" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["a.png"]


def test_a_file_in_the_place_of_a_sub_folder_is_reported(dehaze, tmp_path, capsys):
    picture(tmp_path / "in" / "x" / "a.png", (8, 8)), picture(tmp_path / "in" / "b.png", (8, 8))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("mine")
    assert dehaze("--recursive") == 2
    assert "x/a.png cannot be written: Not a directory" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "out")) == ["b.png", "x"] and (tmp_path / "out" / "x").read_text() == "mine"


# ---- images in memory


@pytest.fixture
def same(monkeypatch):
    monkeypatch.setattr(in_memory, "_restorer_of", lambda model: Unchanged())


def test_a_grey_pil_image_of_16_bits_keeps_them(same):
    values = random16(1)[..., 0]
    result = aecr_jax.dehaze(Image.fromarray(values))
    assert result.mode == "I;16"
    np.testing.assert_array_equal(np.asarray(result), values)
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"image has mode {mode}, whose range is unknown: pass an array"):
            aecr_jax.dehaze(Image.new(mode, (4, 4)))


def test_a_pil_image_keeps_transparency_exif_and_profile(same, tmp_path):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    indices = ramp.copy()
    indices.putpalette(bytes(range(256)) * 3)
    indices.save(tmp_path / "a.png", transparency=bytes(range(256)), exif=exif_data(), icc_profile=b"profile")
    result = aecr_jax.dehaze(Image.open(tmp_path / "a.png"))
    assert result.mode == "RGBA" and "transparency" not in result.info
    np.testing.assert_array_equal(np.asarray(result)[..., 3], np.asarray(ramp))
    assert result.info["icc_profile"] == b"profile" and result.getexif()[274] == 6
    inks = Image.new("CMYK", (4, 4))
    inks.info["icc_profile"] = b"of inks"
    assert "icc_profile" not in aecr_jax.dehaze(inks).info


def test_read_picture_tells_what_a_file_has(tmp_path):
    path = picture(tmp_path / "a.png", (8, 6))
    pixels, alpha, exif = read_picture(path)
    assert pixels.shape == (6, 8, 3) and alpha is None and exif == b""
    with pytest.raises(UserError, match="there is no file"):
        read_picture(tmp_path / "none.png")
    assert Encoding() == Encoding("png", None, None)
