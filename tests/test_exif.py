"""EXIF data: correction in place, and from every format of an input to every format of a result. They are written here byte by byte."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from test_decode import png

from aecr_jax.data.exif import PREFIX, correct, parse
from aecr_jax.data.images import read_image


def exif_data(order="<", orientation=6, color_space=65535, note=b"positions in it", thumbnail=b"\xff\xd8 thumbnail"):
    """Return EXIF data (CIPA DC-008) of a picture of 40 x 30 pixels with make, exposure, notes of the maker, place and thumbnail."""

    def directory(at, entries, following=0):
        fixed, values = struct.pack(order + "H", len(entries)), b""
        after = at + 2 + 12 * len(entries) + 4
        for tag, kind, count, value in entries:
            value = struct.pack(order + {3: "H", 4: "I"}[kind], value) if isinstance(value, int) else value
            if len(value) > 4:
                value, values = struct.pack(order + "I", after + len(values)), values + value + bytes(len(value) % 2)
            fixed += struct.pack(order + "2HI", tag, kind, count) + value.ljust(4, b"\0")
        return fixed + struct.pack(order + "I", following) + values

    exposure = struct.pack(order + "2I", 1, 250)
    inner = [(33434, 5, 1, exposure), (37500, 7, len(note), note), (40961, 3, 1, color_space), (40962, 4, 1, 40), (40963, 3, 1, 30)]
    latitude = struct.pack(order + "6I", 43, 1, 16, 1, 30, 1)
    at = {"first": 8, "inner": 200, "place": 400, "thumbnail": 500}
    first = [(271, 2, 7, b"Ren\xc3\xa9!\0"), (274, 3, 1, orientation), (34665, 4, 1, at["inner"]), (34853, 4, 1, at["place"])]
    last = [(513, 4, 1, 600), (514, 4, 1, len(thumbnail))]
    parts = [
        (8, directory(8, first, at["thumbnail"])),
        (200, directory(200, inner)),
        (400, directory(400, [(1, 2, 2, b"N\0"), (2, 5, 3, latitude)])),
        (500, directory(500, last)),
        (600, thumbnail),
    ]
    data = bytearray({"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)).ljust(600 + len(thumbnail), b"\0")
    for start, part in parts:
        data[start : start + len(part)] = part
    return bytes(data)


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_is_corrected_in_place(order):
    """Only the orientation, the colour space, the size and the link to the thumbnail change."""
    before = exif_data(order)
    expected = exif_data(order, orientation=1, color_space=1)
    after = correct(PREFIX + before, 30, 40)
    exif = Image.Exif()
    exif.load(after)
    inner = exif.get_ifd(34665)
    assert (exif[274], inner[40961], inner[40962], inner[40963], inner[33434]) == (1, 1, 30, 40, 1 / 250)
    assert not exif.get_ifd(1) and exif.get_ifd(34853)[2] == (43, 16, 30)  # 1 is Pillow's key of the thumbnail's directory
    changed = [i for i, pair in enumerate(zip(after[6:], expected, strict=True)) if pair[0] != pair[1]]
    # The last four bytes of the first directory, at 8, which has 4 entries, and the sizes of the picture, in the last two of the second.
    link, width, height = range(58, 62), range(200 + 2 + 36 + 8, 200 + 2 + 36 + 12), range(200 + 2 + 48 + 8, 200 + 2 + 48 + 12)
    assert changed and set(changed) <= {*link, *width, *height}


@pytest.mark.parametrize(
    "damage", [b"", b"II*\0", b"XX*\0\x08\0\0\0", exif_data()[:30], exif_data().replace(b"\xc8\0\0\0", b"\xc8\xff\0\0")]
)
def test_damaged_exif_is_left_out(dehaze, tmp_path, damage):
    assert correct(PREFIX + damage, 30, 40) == b""
    Image.new("RGB", (4, 3)).save(tmp_path / "in" / "a.webp", exif=PREFIX + damage, lossless=True)
    for extension in ("png", "tif"):
        assert dehaze("--format", extension) == 0
        with Image.open(tmp_path / "out" / f"a.{extension}") as image:
            assert not {271, 34665} & set(image.getexif())


def test_a_damaged_part_of_exif_does_not_spoil_a_tiff():
    """The position of the GPS directory lies outside the data."""
    _, directory = parse(exif_data().replace(struct.pack("<I", 400), struct.pack("<I", 60000)))
    assert 34853 not in directory and {271, 34665} <= set(directory)


def write_input(path, exif):
    """Write a picture of 40 x 30 pixels whose upright form has 30 x 40, with EXIF data as its format stores them."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    if path.suffix == ".tif":  # Pillow writes the directories
        image.save(path, exif=exif)
    elif path.name == "late.png":  # the EXIF data come after the pixels
        image.save(path)
        end = path.read_bytes().index(b"IEND") - 4
        chunk = b"eXIf" + exif
        chunk = struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(path.read_bytes()[:end] + chunk + path.read_bytes()[end:])
    elif path.name == "deep.png":
        path.write_bytes(png(np.asarray(image).astype(np.uint16) * 257, 2, (b"eXIf", exif)))
    else:
        image.save(path, exif=PREFIX + exif)


@pytest.mark.parametrize("source", ["a.jpg", "a.png", "late.png", "deep.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tif"])
def test_exif_goes_from_every_format_to_every_other(dehaze, tmp_path, source, extension):
    write_input(tmp_path / "in" / source, exif_data())
    assert dehaze("--format", extension) == 0
    (result,) = (tmp_path / "out").iterdir()
    with Image.open(result) as image:
        assert image.size == (30, 40)
        exif = image.getexif()
        inner = exif.get_ifd(34665)
        assert exif.get(274, 1) == 1 and exif[271].startswith("Ren")
        assert (inner[33434], inner[37500], inner[40961], inner[40962], inner[40963]) == (1 / 250, b"positions in it", 1, 30, 40)
        assert exif.get_ifd(34853) == {1: "N", 2: (43.0, 16.0, 30.0)}
    upright = read_image(tmp_path / "in" / source)
    assert np.abs(read_image(result) - upright).mean() < {"jpg": 0.03, "webp": 0.3}.get(extension, 1e-6)
    if source != "a.tif":  # Pillow, which wrote that one, writes ASCII only
        assert b"Ren\xc3\xa9!\0" in result.read_bytes()
