"""EXIF data of image files: read as bytes, corrected for an image that is upright and sRGB, and written into TIFF directories.

EXIF data are a TIFF file without pixels (CIPA DC-008): directories of entries, each with a tag, a type, and a value or its position.
They are corrected in place, because the notes of many camera makers contain positions, which would be wrong after a move.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

PREFIX = b"Exif\0\0"  # precedes EXIF data in a JPEG file, and in Pillow
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 129: 1}  # bytes of one value, by type
_ORIENTATION, _EXIF, _GPS, _INTEROPERABILITY = 274, 34665, 34853, 40965
_COLOR_SPACE, _WIDTH, _HEIGHT = 40961, 40962, 40963
_SUB_DIRECTORIES: dict[int, Any] = {_EXIF: {_INTEROPERABILITY: {}}, _GPS: {}}
# The tags of a TIFF file that are about the photograph; most others are about how the file stores it. In order: description, make, model,
# resolution (282, 283, 296), software, date, artist, computer, ratings, copyright, and Windows' title to subject.
_OF_THE_PHOTOGRAPH = {270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 18246, 18249, 33432, *range(40091, 40096), _EXIF, _GPS}


class Field(NamedTuple):
    """An entry of a directory: its type, its value in the file's byte order, and the position where the value was read."""

    kind: int
    value: bytes
    start: int = 0


Directory: TypeAlias = "dict[int, Field | Directory]"


def read_exif(info: Mapping[Any, Any], content: bytes = b"") -> bytes:
    """Return the EXIF data of an image file with `PREFIX`, or b"" if there are none.

    Args:
      info: `info` of the Pillow image.
      content: the whole content of a TIFF file, whose EXIF data are spread over its directories.
    """
    if content[:4] in _BYTE_ORDERS:
        try:
            order, directory = parse(content)
        except (KeyError, struct.error):
            return b""
        return PREFIX + content[:4] + struct.pack(order + "I", 8) + pack(directory, order, 8) if directory else b""
    data = info.get("exif", b"")
    if not data and (text := info.get("Raw profile type exif")):  # ImageMagick's text in PNG files: three lines, then hexadecimal digits
        try:
            data = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            return b""
    return PREFIX + data.removeprefix(PREFIX) if data else b""


def correct(exif: bytes, width: int, height: int) -> bytes:
    """Return EXIF data with the orientation, the colour space and the size of an upright sRGB image, and without the thumbnail.

    Returns b"" if the data are damaged.
    """
    data = bytearray(exif.removeprefix(PREFIX))
    try:
        order, start = _header(data)
        fields, end = _fields(data, order, start)
        struct.pack_into(order + "I", data, end, 0)  # the next directory would be that of the thumbnail
        _set(data, order, fields, {_ORIENTATION: 1})
        if _EXIF in fields:
            fields, _ = _fields(data, order, _position(fields[_EXIF], order))
            _set(data, order, fields, {_COLOR_SPACE: 1, _WIDTH: width, _HEIGHT: height})
    except (KeyError, struct.error):
        return b""
    return PREFIX + bytes(data)


def parse(data: bytes) -> tuple[str, Directory]:
    """Return the byte order ("<" or ">") of EXIF data or of a TIFF file, and the part of its first directory that is about the photograph.

    Raises:
      KeyError, struct.error: the data are damaged.
    """
    data = data.removeprefix(PREFIX)
    order, start = _header(data)
    directory = _tree(data, order, start, _SUB_DIRECTORIES)
    return order, {tag: field for tag, field in directory.items() if tag in _OF_THE_PHOTOGRAPH}


def pack(directory: Directory, order: str, at: int) -> bytes:
    """Return a directory, with its values and sub-directories after it, as bytes for the position `at` of a file."""
    entries, values = struct.pack(order + "H", len(directory)), b""
    after = at + len(entries) + 12 * len(directory) + 4
    for tag, field in sorted(directory.items()):
        position = struct.pack(order + "I", after + len(values))
        if isinstance(field, dict):
            entries += struct.pack(order + "2HI", tag, 4, 1) + position
            values += pack(field, order, after + len(values))
            continue
        entries += struct.pack(order + "2HI", tag, field.kind, len(field.value) // _SIZES[field.kind])
        if len(field.value) <= 4:
            entries += field.value.ljust(4, b"\0")
        else:
            entries += position
            values += field.value + bytes(len(field.value) % 2)  # values begin at even positions
    return entries + bytes(4) + values


def _header(data: bytes | bytearray) -> tuple[str, int]:
    order = _BYTE_ORDERS[bytes(data[:4])]
    return order, struct.unpack_from(order + "I", data, 4)[0]


def _fields(data: bytes | bytearray, order: str, offset: int) -> tuple[dict[int, Field], int]:
    """Return the entries of a directory, without those that are damaged, and the position of the link to the next directory."""
    (count,) = struct.unpack_from(order + "H", data, offset)
    fields = {}
    for at in range(offset + 2, offset + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "2HI", data, at)
        size = number * _SIZES.get(kind, 0)
        start = at + 8 if size <= 4 else struct.unpack_from(order + "I", data, at + 8)[0]
        if 0 < size <= len(data) - start:
            fields[tag] = Field(kind, bytes(data[start : start + size]), start)
    return fields, offset + 2 + 12 * count


def _position(field: Field, order: str) -> int:
    """Return the position of the sub-directory to which a field refers."""
    return struct.unpack(order + "I", field.value)[0]


def _tree(data: bytes, order: str, offset: int, sub_directories: Mapping[int, Any]) -> Directory:
    tree: Directory = dict(_fields(data, order, offset)[0])
    for tag, below in sub_directories.items():
        field = tree.pop(tag, None)
        with contextlib.suppress(struct.error):  # a damaged sub-directory is left out
            if isinstance(field, Field):
                tree[tag] = _tree(data, order, _position(field, order), below)
    return tree


def _set(data: bytearray, order: str, fields: Mapping[int, Field], numbers: Mapping[int, int]) -> None:
    """Replace numbers, of 16 bits (type 3) or 32 bits (type 4), in place. Tags that are missing stay missing."""
    for tag, number in numbers.items():
        if tag in fields and fields[tag].kind in (3, 4):
            struct.pack_into(order + {3: "H", 4: "I"}[fields[tag].kind], data, fields[tag].start, number)
