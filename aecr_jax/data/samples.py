"""Samples, of which data sets consist. A sample reads its images only when `read` is called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from aecr_jax.data.images import read_depth, read_pixels
from aecr_jax.errors import UserError

Kind = Literal["pair", "depth"]
# RESIDE's clear images have 640x480 pixels, and its hazy ones 620x460, without 10 pixels on each side. Resizing instead costs 15 dB.
_RESIDE_FRAME, _RESIDE_CROP, _RESIDE_BORDER = (480, 640), (460, 620), 10


class Sample(Protocol):
    """A hazy image with its clear one, or a clear image with depth from which haze is made."""

    @property
    def name(self) -> str:
        """The image's name, unique in most data sets."""

    @property
    def scene(self) -> str:
        """The name of the scene, which the hazy versions of one clear image share."""

    @property
    def origin(self) -> str:
        """How messages refer to the sample: by its file, or by its data set and name."""

    @property
    def dataset(self) -> str:
        """The built data set that the sample belongs to, such as "reside/its"; empty if it belongs to none."""

    @property
    def kind(self) -> Kind:
        """The kind of images that `read` returns: "pair" (hazy and clear) or "depth" (clear and depth)."""

    @property
    def files(self) -> Mapping[str, Path]:
        """The files that the sample is read from: `hazy`, `clear`, `depth`, or `records`; empty if it is in memory."""

    def read(self) -> dict[str, np.ndarray]:
        """Read the images: `hazy` and `clear` `[H, W, 3]` as `read_pixels` returns them, `depth` `[H, W]` in (0, 1].

        Raises:
          UserError: a file cannot be read, or the sizes do not match.
        """


class Pair(NamedTuple):
    """A hazy image with its clear one."""

    hazy: Path
    clear: Path

    @property
    def kind(self) -> Kind:
        """Always "pair"."""
        return "pair"

    @property
    def dataset(self) -> str:
        """Empty, because the sample belongs to no built data set."""
        return ""

    @property
    def name(self) -> str:
        """The name of the hazy file, without extension."""
        return self.hazy.stem

    @property
    def origin(self) -> str:
        """The path of the hazy file, for messages."""
        return str(self.hazy)

    @property
    def scene(self) -> str:
        """The name of the scene, which the hazy versions of one clear image share."""
        return self.clear.stem

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


class DepthScene(NamedTuple):
    """A clear image with its depth map, from which haze is made."""

    clear: Path
    depth: Path

    @property
    def kind(self) -> Kind:
        """Always "depth"."""
        return "depth"

    @property
    def dataset(self) -> str:
        """Empty, because the sample belongs to no built data set."""
        return ""

    @property
    def name(self) -> str:
        """The name of the clear file, without extension."""
        return self.clear.stem

    @property
    def origin(self) -> str:
        """The path of the clear file, for messages."""
        return str(self.clear)

    @property
    def scene(self) -> str:
        """The same as `name`, because every clear image is a scene of its own."""
        return self.clear.stem

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


class DrawnScene(NamedTuple):
    """A drawn scene, held in memory."""

    name: str
    clear: np.ndarray
    depth: np.ndarray

    @property
    def kind(self) -> Kind:
        """Always "depth"."""
        return "depth"

    @property
    def dataset(self) -> str:
        """Empty, because the sample belongs to no built data set."""
        return ""

    @property
    def origin(self) -> str:
        """The name of the scene, for messages."""
        return self.name

    @property
    def scene(self) -> str:
        """The same as `name`, because every clear image is a scene of its own."""
        return self.name

    @property
    def files(self) -> dict[str, Path]:
        """Empty, because the scene is in memory."""
        return {}

    def read(self) -> dict[str, np.ndarray]:
        """Return `clear` `[H, W, 3]` and `depth` `[H, W]`."""
        return {"clear": self.clear, "depth": self.depth}


def _cut_border(image: np.ndarray) -> np.ndarray:
    return image[_RESIDE_BORDER:-_RESIDE_BORDER, _RESIDE_BORDER:-_RESIDE_BORDER]


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
