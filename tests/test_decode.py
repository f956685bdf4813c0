"""Image files as cameras, scanners and programs write them: bit depths and colour profiles."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pyvips
from PIL import Image, ImageCms

from aecr_jax import UserError
from aecr_jax.data import decode
from aecr_jax.data.images import read_image, read_picture, read_pixels, write_image

# ---- files written here byte by byte, so that no library's reader is tested with its own writer


def png(values, colour_type, *chunks):
    """Return a PNG of 16-bit `values` `[H, W, C]`. By the specification, values are big-endian and each line begins with its filter, 0."""
    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    parts = [
        (b"IHDR", struct.pack(">2I5B", width, height, 16, colour_type, 0, 0, 0)),
        *chunks,
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)


def tiff(values, bits, photometric, *, sample_format=1, packed=None, order="<", extra=()):
    """Return an uncompressed TIFF of `values` `[H, W, C]` in one strip, written according to the specification."""
    height, width, samples = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes() if packed is None else packed
    tags = [(256, width), (257, height), (258, [bits] * samples), (259, 1), (262, photometric), (273, 0), (277, samples), (278, height)]
    tags += [(279, len(data)), *extra, (339, [sample_format] * samples)]
    after = 8 + 2 + 12 * len(tags) + 4
    ifd, blob = struct.pack(order + "H", len(tags)), b""
    for tag, value in sorted(tags):
        if tag in (273, 279):
            ifd += struct.pack(order + "2H2I", tag, 4, 1, value if tag == 279 else after + 2 * samples * 2)
            continue
        numbers = value if isinstance(value, list) else [value]
        field = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(field) > 4:
            offset, blob = after + len(blob), blob + field
            field = struct.pack(order + "I", offset)
        ifd += struct.pack(order + "2HI", tag, 3, len(numbers)) + field.ljust(4, b"\0")
    magic = b"II" if order == "<" else b"MM"
    return magic + struct.pack(order + "HI", 42, 8) + ifd + bytes(4) + blob.ljust(2 * samples * 2, b"\0") + data


def icc(gamma, colorants=None):
    """Return an ICC display profile (matrix and gamma) with the D50 XYZ of red, green and blue, or a grey profile without them."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    white = (0.9642, 1.0, 0.8249)
    tags = {b"desc": b"desc" + struct.pack(">2I", 0, 5) + b"test\0" + bytes(79), b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": xyz(white)}
    if colorants is None:
        tags[b"kTRC"] = curve
    else:
        tags |= {c + b"XYZ": xyz(v) for c, v in zip((b"r", b"g", b"b"), colorants)} | {c + b"TRC": curve for c in (b"r", b"g", b"b")}
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">2I", start + len(data), len(value))
        data += value.ljust(-(-len(value) // 4) * 4, b"\0")
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"none", 0x02400000, b"mntr", b"GRAY" if colorants is None else b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + xyz(white)[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


# D50-adapted colorants of Adobe RGB (1998) from Adobe's profile, and of Display P3 from Apple's profile.
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


# The colorants of the ICC's sRGB profile.
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def srgb_of(values, gamma, colorants=None):
    """Convert values in [0, 1] with this profile to sRGB (IEC 61966-2-1): linear light, change of basis, the curve of sRGB."""
    linear = np.asarray(values, np.float64) ** (round(gamma * 256) / 256)
    basis = [[1, 1, 1]] if colorants is None else np.array(colorants) @ np.linalg.inv(SRGB)
    linear = np.clip(linear @ basis, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def save(path, image, **options):
    image.save(path, **options)
    return path


def random16(channels, shape=(5, 7)):
    return np.random.default_rng(channels).integers(0, 65536, (*shape, channels), np.uint16)


# ---- more than 8 bits


@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (2, 4), (3, 2), (4, 6)], ids=["grey", "grey+alpha", "rgb", "rgba"])
def test_png_of_16_bits_keeps_all_of_them(channels, colour_type):
    values = random16(channels)
    expected = values[..., :3] if channels >= 3 else np.repeat(values[..., :1], 3, -1)
    image = read_pixels(png(values, colour_type))
    assert image.dtype == np.float32 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, expected.astype(np.float32) / 65535)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("channels", "photometric"), [(1, 1), (3, 2)])
def test_tiff_of_16_bits_keeps_all_of_them(channels, photometric, order):
    values = random16(channels)
    image = read_pixels(tiff(values, 16, photometric, order=order))
    np.testing.assert_array_equal(image, np.broadcast_to(values.astype(np.float32) / 65535, (5, 7, 3)))


def test_other_tiffs_of_16_bits():
    """White-is-zero grey is inverted, CMYK is `(1 - ink)(1 - black)` as in Pillow for 8 bits, and associated alpha is divided out."""
    values = random16(1)
    np.testing.assert_allclose(read_pixels(tiff(values, 16, 0))[..., :1], 1 - values / 65535, atol=1e-6)
    inks = random16(4)
    unit = inks / 65535
    np.testing.assert_allclose(read_pixels(tiff(inks, 16, 5)), (1 - unit[..., :3]) * (1 - unit[..., 3:]), atol=1e-6)
    half = np.full((2, 2, 4), [10000, 20000, 30000, 32768], np.uint16)
    np.testing.assert_allclose(read_pixels(tiff(half, 16, 2, extra=[(338, 1)]))[0, 0] * 32768, [10000, 20000, 30000], atol=1)


def test_packed_12_bits():
    """Three bytes hold two values of 12 bits: 0xFFF is white, and 0x800 is 2048 / 4095."""
    image = read_pixels(tiff(np.zeros((1, 2, 1), np.uint8), 12, 1, packed=bytes([0xFF, 0xF8, 0x00])))
    np.testing.assert_allclose(image[0, :, 0], [1, 2048 / 4095], atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_the_same_at_8_and_16_bits(tmp_path, orientation):
    """Pillow rotates the 8-bit file, which is the reference; 257 times an 8-bit value is the same brightness in 16 bits."""
    exif = Image.Exif()
    exif[274] = orientation
    small = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    expected = read_image(save(tmp_path / "small.png", Image.fromarray(small), exif=exif))
    deep = png(small.astype(np.uint16) * 257, 2, (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    np.testing.assert_allclose(read_pixels(deep), expected, atol=1e-6)
    deep = tiff(small.astype(np.uint16) * 257, 16, 2, extra=[(274, orientation)])
    np.testing.assert_allclose(read_pixels(deep), expected, atol=1e-6)


def test_cielab(tmp_path):
    """In 8 bits, white, black and L* = 50 are 255, 0 and 119 in sRGB; 16 bits are refused with one line."""
    lab = np.array([[[255, 0, 0], [0, 0, 0], [128, 0, 0]]], np.uint8)
    np.testing.assert_allclose(read_pixels(tiff(lab, 8, 8))[0, :, 1], [255, 0, 119], atol=1)
    (tmp_path / "a.tif").write_bytes(tiff(random16(3), 16, 8))
    with pytest.raises(UserError, match=r"^\S*a\.tif has 3 values per pixel in the colour space labs: save it as grey, RGB or CMYK$"):
        read_image(tmp_path / "a.tif")


def test_what_libvips_tolerates_is_not_printed(caplog):
    """The file has one more value per pixel than its kind; libvips logs a warning, which must not reach standard error."""
    values = random16(4)
    np.testing.assert_array_equal(read_pixels(tiff(values, 16, 2)), values[..., :3].astype(np.float32) / 65535)
    assert not caplog.records


@pytest.mark.parametrize("channels", [1, 3])
def test_floats_in_the_unit_range_are_read_and_others_refused(tmp_path, channels):
    def write(values):
        path = tmp_path / "float.tif"
        path.write_bytes(tiff(np.asarray(values, np.float32).reshape(1, -1, channels), 32, 2 if channels == 3 else 1, sample_format=3))
        return path

    image = read_image(write([0, 0.25, 0.5, 1, -0.02, 1.03]))  # values slightly outside [0, 1], as after interpolation, are clipped
    np.testing.assert_array_equal(image, np.broadcast_to(np.float32([0, 0.25, 0.5, 1, 0, 1]).reshape(1, -1, channels), image.shape))
    with pytest.raises(UserError, match=r"float\.tif holds floating-point values from 0 to 255, which must be in \[0, 1\]"):
        read_image(write([0, 3, 128, 17, 90, 255]))
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(UserError, match=r"float\.tif contains NaN or infinite values"):
            read_image(write([0, 0.5, bad, 1, 0, 0]))


def test_wide_integers_are_read_only_if_their_range_is_clear(tmp_path):
    """Values above 32767 must be 16-bit values. Images of 12-bit values, which would come out black, are refused."""
    path = tmp_path / "wide.tif"
    for dtype, sample_format in ((np.uint32, 1), (np.int32, 2)):
        path.write_bytes(tiff(np.array([[[0], [1000], [65535]]], dtype), 32, 1, sample_format=sample_format))
        np.testing.assert_allclose(read_image(path)[0, :, 0], [0, 1000 / 65535, 1], atol=1e-6)
        for high in (255, 4095, 70000):
            path.write_bytes(tiff(np.array([[[0], [high]]], dtype), 32, 1, sample_format=sample_format))
            with pytest.raises(UserError, match=rf"wide\.tif holds u?int32 values from 0 to {high}.*8 or 16 bits"):
                read_image(path)


def test_usual_kinds_stay_8_bits(tmp_path):
    """Images of 1 bit, palettes with transparency, grey with alpha, and CMYK give exactly the values of Pillow."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8))
    for mode, suffix in (
        ("1", "png"),
        ("P", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
        ("CMYK", "tif"),
        ("L", "bmp"),
        ("RGB", "webp"),
    ):
        path = save(tmp_path / f"{mode}.{suffix}", rgb.convert(mode), **({"transparency": 0} if mode == "P" else {}))
        pixels = read_pixels(path)
        assert pixels.dtype == np.uint8 and pixels.shape == (8, 9, 3)
        with Image.open(path) as image:
            np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_grey_with_premultiplied_alpha(tmp_path):
    """By hand: a premultiplied 60 at an alpha of 128 is 60 * 255 / 128 = 120, rounded up or down."""
    values = np.broadcast_to(np.uint8([60, 128]), (8, 9, 2))
    image = pyvips.Image.new_from_array(np.ascontiguousarray(values)).copy(interpretation="b-w")
    image.tiffsave(str(tmp_path / "a.tif"))
    data = bytearray((tmp_path / "a.tif").read_bytes())
    entry = data.index(struct.pack("<HHI", 338, 3, 1))  # ExtraSamples: 2 is alpha, and 1 is premultiplied alpha
    data[entry + 8] = 1
    (tmp_path / "a.tif").write_bytes(data)
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode == "La"
    picture = read_picture(tmp_path / "a.tif")
    assert np.abs(picture.pixels.astype(int) - 120).max() <= 1 and (picture.alpha == 128).all()


def test_damaged_deep_pictures_are_named(tmp_path):
    whole = png(random16(3, (64, 64)), 2)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 8
    strip = tiff(random16(3, (64, 64)), 16, 2)
    for name, data in (("cut.png", whole[: len(whole) // 2]), ("flipped.png", bytes(flipped)), ("cut.tif", strip[: len(strip) // 2])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"^\S*{name} cannot be read: [^\n]+$"):
            read_image(tmp_path / name)


# ---- colour profiles

COLOURS = np.array([[[200, 100, 50], [30, 200, 60], [40, 60, 220], [128, 128, 128], [0, 0, 0], [255, 255, 255]]], np.uint8)
PROFILES = [(2.2, ADOBE), (2.2, P3), (1.8, P3)]


@pytest.mark.parametrize(("gamma", "colorants"), PROFILES)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_8_bit_colours_become_srgb(tmp_path, suffix, gamma, colorants):
    wide = np.repeat(np.repeat(COLOURS, 16, 0), 16, 1)  # flat blocks, which JPEG preserves
    options = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(wide), icc_profile=icc(gamma, colorants), **options)
    pixels = read_pixels(path)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels, srgb_of(wide / 255, gamma, colorants) * 255, atol=3 if suffix == "jpg" else 1.01)


def check_deep(image, expected):
    """Compare colours. LittleCMS interpolates in tables, which costs up to 2 of 255 levels near black, but in the mean far less than
    rounding to 8 bits (0.25 levels)."""
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, expected, atol=2 / 255)
    assert np.abs(image - expected).mean() < 0.1 / 255


@pytest.mark.parametrize(("gamma", "colorants"), PROFILES)
def test_16_bit_colours_become_srgb(gamma, colorants):
    """Alpha is not converted as a colour, and steps finer than 8 bits stay distinct."""
    values = np.concatenate([np.round(np.random.default_rng(0).random((64, 64, 3)) * 65535), np.full((64, 64, 1), 7)], -1).astype(np.uint16)
    profile = (b"iCCP", b"test\0\0" + zlib.compress(icc(gamma, colorants)))
    check_deep(read_pixels(png(values, 6, profile)), srgb_of(values[..., :3] / 65535, gamma, colorants))
    ramp = np.repeat(np.linspace(20000, 60000, 2000).astype(np.uint16)[None, :, None], 3, -1)
    assert len(np.unique(read_pixels(png(ramp, 2, profile))[..., 1])) > 1900


def test_grey_with_a_gamma_becomes_srgb(tmp_path):
    ramp = np.arange(256, dtype=np.uint8)[None]
    expected = srgb_of(ramp[..., None] / 255, 1.8)
    path = save(tmp_path / "grey.png", Image.fromarray(ramp), icc_profile=icc(1.8))
    np.testing.assert_allclose(read_pixels(path), expected * 255, atol=1.5)
    assert np.abs(expected * 255 - ramp[..., None]).max() > 15  # the conversion has a large effect
    check_deep(read_pixels(png(ramp[..., None].astype(np.uint16) * 257, 0, (b"iCCP", b"test\0\0" + zlib.compress(icc(1.8))))), expected)
    path = save(tmp_path / "of_rgb.png", Image.fromarray(ramp), icc_profile=icc(1.8, P3))  # an RGB profile in a grey image
    np.testing.assert_allclose(read_pixels(path), expected * 255, atol=1.01)


def test_cmyk_by_its_profile(tmp_path):
    """Paper without ink is white. Printed cyan is much darker than the (0, 255, 255) of inks without a profile, in 8 and in 16 bits."""
    profile = pyvips.Image.profile_load("cmyk")
    inks = np.zeros((8, 16, 4), np.uint8)
    inks[:, 8:, 0] = 255
    for name in ("a.tif", "a.jpg"):
        pixels = read_pixels(
            save(tmp_path / name, Image.frombytes("CMYK", (16, 8), inks.tobytes()), icc_profile=profile, **{"quality": 100})
        )
        assert pixels[0, 0].min() >= 254 and pixels[0, 15, 0] < 60 and 120 < pixels[0, 15, 1] < 200, pixels[0, ::15]
    deep = pyvips.Image.new_from_array(inks.astype(np.uint16) * 257, interpretation="cmyk")
    deep.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
    np.testing.assert_allclose(read_pixels(deep.tiffsave_buffer()) * 255, read_pixels(tmp_path / "a.tif"), atol=1.01)


def test_srgb_profiles_change_nothing(tmp_path):
    """The sRGB profiles of libvips, LittleCMS and this package differ in their bytes, and by at most one level of 255."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (pyvips.Image.profile_load("srgb"), made, decode.srgb_profile()):
        np.testing.assert_array_equal(read_pixels(save(tmp_path / "a.png", Image.fromarray(noise), icc_profile=profile)), noise)
    values = random16(3)
    deep = png(values, 2, (b"iCCP", b"test\0\0" + zlib.compress(made)))
    np.testing.assert_array_equal(read_pixels(deep), values.astype(np.float32) / 65535)


def test_profiles_that_cannot_be_meant_change_nothing(tmp_path):
    """Damaged profiles, a CMYK or grey profile in an RGB image, and a profile that turns white to black are ignored."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    good = icc(2.2, P3)
    damaged = [b"x", bytes(300), good[:100], good[:200], good[:300], good.replace(b"curv", b"cu\0v"), icc(2.2, ((0, 0, 0),) * 3)]
    for profile in (*damaged, pyvips.Image.profile_load("cmyk"), icc(1.8)):
        np.testing.assert_array_equal(read_pixels(save(tmp_path / "a.png", Image.fromarray(noise), icc_profile=profile)), noise)
        values = noise.astype(np.uint16) * 257
        deep = png(values, 2, (b"iCCP", b"test\0\0" + zlib.compress(profile)))
        np.testing.assert_array_equal(read_pixels(deep), values.astype(np.float32) / 65535)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_written_pictures_carry_srgb(tmp_path, suffix):
    path, again = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    image = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    write_image(path, image), write_image(again, image)
    with Image.open(path) as written:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(written.info["icc_profile"]))
        np.testing.assert_array_equal(read_pixels(path), np.asarray(written))  # this package's profile is recognised as sRGB
    assert "sRGB" in ImageCms.getProfileDescription(profile)
    assert path.read_bytes() == again.read_bytes()


def test_many_threads_read_what_one_reads(tmp_path):
    """Threads share one colour transform and libvips."""
    values = random16(3, (40, 40))
    files = [png(np.roll(values, i, 0), 2, (b"iCCP", b"test\0\0" + zlib.compress(icc(2.2, P3)))) for i in range(6)]
    for i in range(6):
        buffer = io.BytesIO()
        Image.fromarray((np.roll(values, i, 0) >> 8).astype(np.uint8)).save(buffer, "PNG", icc_profile=icc(2.2, ADOBE))
        files.append(buffer.getvalue())
    expected = [read_pixels(file) for file in files]
    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(read_pixels, files * 8), expected * 8):
            np.testing.assert_array_equal(got, want)
