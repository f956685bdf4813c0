"""Samples, of which data sets consist. A sample reads its images only when `read` is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from aecr_jax.data.images import read_depth, read_pixels
from aecr_jax.data.outdoor import find_sky
from aecr_jax.errors import UserError

Kind = Literal["pair", "depth", "outdoor", "clear"]
# RESIDE's clear images have 640x480 pixels, and its hazy ones 620x460, without 10 pixels on each side. Resizing instead costs 15 dB.
_RESIDE_FRAME, _RESIDE_CROP, _RESIDE_BORDER = (480, 640), (460, 620), 10


class Sample(ABC):
    """A hazy image with its clear one, or a clear image, with depth or alone, to which haze is added.

    The properties below are those of a sample with image files of its own; other kinds of samples override them. A sample must be
    picklable, because worker processes read samples too.
    """

    __slots__ = ()

    kind: ClassVar[Kind]
    """The kind of images that `read` returns: "pair" (hazy and clear), "depth" (clear and depth), "outdoor" (clear and a map of the sky) or
    "clear" (clear alone)."""

    @property
    @abstractmethod
    def files(self) -> Mapping[str, Path]:
        """The files that the sample is read from: `hazy`, `clear`, `depth`, or `records`; empty if it is in memory."""

    @property
    def name(self) -> str:
        """The image's name, unique in most data sets: the name of the first file, without extension."""
        return self._first_file.stem

    @property
    def scene(self) -> str:
        """The name of the scene, which the hazy versions of one clear image share: the name of the clear file, without extension."""
        return self.files["clear"].stem

    @property
    def origin(self) -> str:
        """How messages refer to the sample: by the path of its first file, or by its data set and name."""
        return str(self._first_file)

    @property
    def dataset(self) -> str:
        """The built data set that the sample belongs to, such as "reside/its"; empty if it belongs to none."""
        return ""

    @abstractmethod
    def read(self) -> dict[str, np.ndarray]:
        """Read the images: `hazy` and `clear` `[H, W, 3]` as `read_pixels` returns them, `depth` `[H, W]` in (0, 1], `sky` by `find_sky`.

        Raises:
          UserError: a file cannot be read, or the sizes do not match.
        """

    @property
    def _first_file(self) -> Path:
        return next(iter(self.files.values()))


@dataclass(frozen=True, slots=True)
class Pair(Sample):
    """A hazy image with its clear one."""

    hazy: Path
    clear: Path

    kind = "pair"

    @property
    def files(self) -> dict[str, Path]:
        """The files `hazy` and `clear`."""
        return {"hazy": self.hazy, "clear": self.clear}

    def read(self) -> dict[str, np.ndarray]:
        """Return `hazy` and `clear`, each `[H, W, 3]`, as `read_pixels` returns them.

        Raises:
          UserError: a file cannot be read, or the sizes do not match.
        """
        hazy, clear = read_pixels(self.hazy), read_pixels(self.clear)
        return {"hazy": hazy, "clear": fit_clear(hazy, clear, str(self.hazy), str(self.clear))}


@dataclass(frozen=True, slots=True)
class DepthScene(Sample):
    """A clear image with its depth map, from which haze is made."""

    clear: Path
    depth: Path

    kind = "depth"

    @property
    def files(self) -> dict[str, Path]:
        """The files `clear` and `depth`."""
        return {"clear": self.clear, "depth": self.depth}

    def read(self) -> dict[str, np.ndarray]:
        """Return `clear` `[H, W, 3]` and `depth` `[H, W]`; the white border of NYU's 640x480 frames is cropped, as in RESIDE.

        Raises:
          UserError: a file cannot be read, or the sizes differ.
        """
        clear, depth = read_pixels(self.clear), read_depth(self.depth)
        if clear.shape[:2] != depth.shape:
            raise UserError(f"{self.clear} is {_size(clear)} and {self.depth} is {_size(depth)}: sizes must be equal")
        if depth.shape == _RESIDE_FRAME:
            clear, depth = _cut_border(clear), _cut_border(depth)
        return {"clear": clear, "depth": depth}


@dataclass(frozen=True, slots=True)
class ClearImage(Sample):
    """A clear image alone, to which haze with one random transmission and airlight 1 is added."""

    clear: Path

    kind: ClassVar[Kind] = "clear"  # a subclass has another

    @property
    def files(self) -> dict[str, Path]:
        """The file `clear`."""
        return {"clear": self.clear}

    def read(self) -> dict[str, np.ndarray]:
        """Return `clear` `[H, W, 3]`.

        Raises:
          UserError: the file cannot be read.
        """
        return {"clear": read_pixels(self.clear)}


@dataclass(frozen=True, slots=True)
class OutdoorImage(ClearImage):
    """A clear outdoor photograph without depth, to which haze with a random depth field is added."""

    kind = "outdoor"

    def read(self) -> dict[str, np.ndarray]:
        """Return `clear` `[H, W, 3]` and `sky`, a small map `[h, w]` of the same view.

        Raises:
          UserError: the file cannot be read.
        """
        images = ClearImage.read(self)
        return images | {"sky": find_sky(images["clear"])}


def fit_clear(hazy: np.ndarray, clear: np.ndarray, hazy_name: str, clear_name: str) -> np.ndarray:
    """Return the clear image at the size of the hazy one: RESIDE's larger clear images are cropped in the middle, never resized.

    Raises:
      UserError: the sizes do not match.
    """
    if clear.shape[:2] == _RESIDE_FRAME and hazy.shape[:2] == _RESIDE_CROP:
        clear = _cut_border(clear)
    if hazy.shape != clear.shape:
        raise UserError(f"{hazy_name} is {_size(hazy)} and {clear_name} is {_size(clear)}: sizes must be equal, or 620x460 with 640x480")
    return clear


@dataclass(frozen=True, slots=True, eq=False)  # eq compares fields, and arrays cannot be compared in this way
class DrawnScene(Sample):
    """A drawn scene, held in memory."""

    name: str = field()  # field(), because otherwise the property of the base class would become the default value
    clear: np.ndarray
    depth: np.ndarray

    kind = "depth"

    @property
    def files(self) -> dict[str, Path]:
        """Empty, because the scene is in memory."""
        return {}

    @property
    def scene(self) -> str:
        """The same as `name`, because every clear image is a scene of its own."""
        return self.name

    @property
    def origin(self) -> str:
        """The name of the scene, for messages."""
        return self.name

    def read(self) -> dict[str, np.ndarray]:
        """Return `clear` `[H, W, 3]` and `depth` `[H, W]`."""
        return {"clear": self.clear, "depth": self.depth}


def _cut_border(image: np.ndarray) -> np.ndarray:
    return image[_RESIDE_BORDER:-_RESIDE_BORDER, _RESIDE_BORDER:-_RESIDE_BORDER]


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
