"""Very large images, and unusual entries and names of folders of images."""

import os
import socket
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from test_decode import png, random16, save, tiff

from aecr_jax import UserError
from aecr_jax.data.folders import find_pairs
from aecr_jax.data.images import list_images, read_depth, read_image, read_pixels, write_image
from aecr_jax.data.samples import Pair

# ---- sizes


def test_pillows_limit_is_left_alone():
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 4 // 3  # the default of Pillow


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
@pytest.mark.parametrize("limit", [100, 1000])
def test_pictures_beyond_pillows_limit_are_read(tmp_path, monkeypatch, suffix, limit):
    """For 48 x 32 = 1536 pixels, Pillow would warn at a limit of 1000, which is an error in tests, and raise at a limit of 100."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(noise), **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as image:
        expected = np.asarray(image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    pixels = read_pixels(path)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)


def test_bombs_are_refused_from_their_header(tmp_path):
    """Files of a few hundred bytes whose headers declare 400 million pixels are refused before Pillow or libvips decodes them."""
    small = random16(3, (1, 1))
    shape = struct.pack(">2I", 20000, 20000)
    deep = bytearray(png(small, 2))
    deep[16:24] = shape
    deep[29:33] = struct.pack(">I", zlib.crc32(deep[12:29]))
    plain = deep.copy()
    plain[24] = 8
    plain[29:33] = struct.pack(">I", zlib.crc32(plain[12:29]))
    size = struct.pack("<2HI", 256, 3, 1) + struct.pack("<HH", 1, 0), struct.pack("<2HI", 257, 3, 1) + struct.pack("<HH", 1, 0)
    big = [field[:8] + struct.pack("<HH", 20000, 0) for field in size]
    files = {"deep.png": deep, "plain.png": plain}
    for name, values, bits, kind in (("deep.tif", small, 16, 1), ("float.tif", small.astype(np.float32), 32, 3)):
        files[name] = tiff(values, bits, 2, sample_format=kind).replace(size[0], big[0]).replace(size[1], big[1])
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"^\S*{name} is too large: 20000 x 20000 pixels; the limit is 250 million[^\n]*$"):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match=r"plain\.png is too large"):
        read_depth(tmp_path / "plain.png")


# ---- folders and names


def test_odd_entries_are_left_out_with_a_reason(tmp_path):
    write_image(tmp_path / "good.png", np.zeros((2, 2, 3)))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "linked.png").symlink_to("good.png")
    skipped = []
    assert [path.name for path in list_images(tmp_path, skipped)] == ["good.png", "linked.png"] == [p.name for p in list_images(tmp_path)]
    assert {path.name: reason for path, reason in skipped} == {
        "dangling.png": "it is a link to a file that does not exist",
        "folder.png": "it is a directory",
        "loop.png": "it is a symbolic link that leads back to itself",
        "pipe.png": "it is a named pipe (FIFO)",
    }
    for path, reason in skipped:  # reading one raises the same error at once, although opening a FIFO would block
        with pytest.raises(UserError) as error:
            read_image(path)
        assert str(error.value) == f"{path} cannot be read: {reason}"


def test_sockets_and_files_without_permission(tmp_path, monkeypatch):
    """os.access is replaced, because tests may run as root, who may read every file."""
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        write_image("secret.png", np.zeros((2, 2, 3)))
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: "secret" not in str(path) and allowed(path, mode))
        skipped = []
        assert list_images(".", skipped) == []
        assert [(path.name, reason) for path, reason in skipped] == [
            ("secret.png", "no permission to read it"),
            ("socket.png", "it is a socket"),
        ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8_are_read(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    write_image(path, np.full((2, 2, 3), 0.2, np.float32))
    deep = tmp_path / os.fsdecode(b"deep\xe9.png")
    deep.write_bytes(png(random16(3), 2))
    assert list_images(tmp_path) == [path, deep]
    assert read_pixels(path)[0, 0, 0] == 51 and read_image(deep).shape == (5, 7, 3)


def test_a_training_folder_keeps_what_it_cannot_read(tmp_path):
    """A dangling link stays in the list and is reported when it is read; the data set does not become smaller."""
    for name in ("hazy/1_1.png", "hazy/2_1.png", "clear/1.png"):
        write_image(tmp_path / name, np.zeros((2, 2, 3)))
    (tmp_path / "clear" / "2.png").symlink_to("gone.png")
    pairs = find_pairs(tmp_path / "hazy", tmp_path / "clear")
    assert pairs == [Pair(tmp_path / "hazy" / f"{i}_1.png", tmp_path / "clear" / f"{i}.png") for i in (1, 2)]
    with pytest.raises(UserError, match=r"clear/2\.png cannot be read: it is a link to a file that does not exist"):
        pairs[1].read()


@pytest.mark.parametrize("name", ["a" * 246 + ".png", "雾" * 80 + ".png"], ids=["250 letters", "80 characters of 3 bytes"])
def test_long_names_are_written(tmp_path, name):
    write_image(tmp_path / name, np.full((2, 2, 3), 0.2, np.float32))
    assert os.listdir(tmp_path) == [name] and read_pixels(tmp_path / name)[0, 0, 0] == 51


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pictures_of_nan_are_not_written(tmp_path, value):
    image = np.zeros((2, 2, 3), np.float32)
    image[1, 1, 1] = value
    with pytest.raises(UserError, match=r"a\.png was not written: .* NaN or infinite"):
        write_image(tmp_path / "new" / "a.png", image)
    assert not list(tmp_path.iterdir())
