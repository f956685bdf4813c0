"""The folders of images in the authors' archives of RESIDE, NH-HAZE and Dense-Haze, and the recognition of a copy's release.

Folder names are those of the archives as published by their authors, and of the copies that circulate among researchers. Letter case is
ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aecr_jax.data.folders import every_image, find_pairs
from aecr_jax.data.images import list_images
from aecr_jax.data.samples import Pair
from aecr_jax.errors import UserError


@dataclass(frozen=True)
class Part:
    """One split of a data set: either pairs, or hazy images without clear ones."""

    pairs: tuple[Pair, ...] = ()
    hazy: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The release and the splits of a data set that were found."""

    release: str
    parts: dict[str, Part]


# Data set -> split -> (hazy folder, clear folder), in search order. The paths begin with the data set's own folder; the user may name
# that folder or its parent. An entry without a clear folder has only hazy images.
_INDOOR = [("SOTS/indoor/nyuhaze500", "gt"), ("SOTS/nyuhaze500", "gt"), ("SOTS/indoor", "gt"), ("SOTS/indoor", "clear")]
_OUTDOOR = [("SOTS/outdoor", "gt"), ("SOTS/outdoor", "clear")]
_FOLDERS: dict[str, dict[str, list[tuple[str, str]]]] = {
    "reside/its": {
        "train": [
            ("ITS/train/ITS_haze", "ITS/train/ITS_clear"),
            ("ITS/hazy", "ITS/clear"),
            ("ITS_v2/hazy", "ITS_v2/clear"),
            ("ITS/train/hazy", "ITS/train/clear"),
        ],
        "val": [("ITS/val/haze", "ITS/val/clear"), ("ITS/val/hazy", "ITS/val/clear")],
    },
    "reside/ots": {
        "train": [
            ("OTS_ALPHA/OTS", "OTS_ALPHA/clear_images"),
            ("OTS_ALPHA/haze/OTS", "OTS_ALPHA/clear/clear_images"),
            ("OTS_BETA/hazy", "OTS_BETA/clear"),
            ("OTS_BETA/OTS", "OTS_BETA/clear_images"),
            ("OTS/hazy", "OTS/clear"),
            ("OTS/OTS", "OTS/clear_images"),
            ("OTS/train/hazy", "OTS/train/clear"),
        ]
    },
    "reside/sots_indoor": {"test": [(f"{folder}/hazy", f"{folder}/{clear}") for folder, clear in _INDOOR]},
    "reside/sots_outdoor": {"test": [(f"{folder}/hazy", f"{folder}/{clear}") for folder, clear in _OUTDOOR]},
    "reside/hsts": {"test": [("HSTS/synthetic/synthetic", "HSTS/synthetic/original")], "real": [("HSTS/real-world", "")]},
    "reside/rtts": {"test": [("RTTS/JPEGImages", "")]},
    "nh_haze": {"full": [("NH-HAZE/hazy", "NH-HAZE/GT"), ("NH-HAZE/hazy", "NH-HAZE/clear"), ("NH-HAZE", "NH-HAZE")]},
    "dense_haze": {
        "full": [
            ("Dense_Haze_NTIRE19/hazy", "Dense_Haze_NTIRE19/GT"),
            ("Dense-Haze/hazy", "Dense-Haze/GT"),
            ("Dense-Haze/hazy", "Dense-Haze/clear"),
            ("Dense-Haze", "Dense-Haze"),
        ]
    },
}
# The data sets that can be built.
DATASETS = tuple(_FOLDERS)
# Splits that may be missing, because the other release lacks them or only one half of the archive was unpacked.
_OPTIONAL = {("reside/its", "val"), ("reside/hsts", "real")}

# Published numbers of (hazy, clear) images of each release, summed over its splits.
RELEASES: dict[str, dict[str, tuple[int, int]]] = {
    "reside/its": {"RESIDE-standard": (13_990, 1_399), "RESIDE-v0": (110_000, 11_000)},
    "reside/ots": {"RESIDE-v0": (313_950, 8_970), "RESIDE-beta": (72_135, 2_061)},
    "reside/sots_indoor": {"RESIDE-standard": (500, 50)},
    "reside/sots_outdoor": {"RESIDE-standard": (500, 492)},
    "reside/hsts": {"RESIDE-standard": (20, 10)},
    "reside/rtts": {"RESIDE-beta": (4_322, 0)},
    "nh_haze": {"NTIRE 2020": (55, 55)},
    "dense_haze": {"NTIRE 2019": (55, 55)},
}
# The same numbers for single splits of these releases.
_PARTS = {("reside/its", "RESIDE-v0"): [(100_000, 10_000), (10_000, 1_000)], ("reside/hsts", "RESIDE-standard"): [(10, 10)]}
_RESIDE_SIZE = (620, 460)
# RESIDE-v0: `0499_05_0.8353`, zero-padded to four and two digits. RESIDE-standard: `1_1_0.90179`, or `1_1` in some copies, not padded.
_ITS_V0 = re.compile(r"\d{4}_\d{2}(_[01](\.\d+)?)?$")
_ITS_STANDARD = re.compile(r"[1-9]\d{0,3}_([1-9]|10)(_[01](\.\d+)?)?$")
_OTS = re.compile(r"\d{4}_[01](\.\d+)?_0?\.\d+$")
_AIRLIGHT = re.compile(r"\d+_\d+_[01](\.\d+)?$")
_SOTS_INDOOR = re.compile(r"14[0-4]\d_([1-9]|10)$")


def find_layout(name: str, root: str | Path) -> Layout:
    """Find the data set `name` ("reside/its", "nh_haze", ...) in the folder in which its archives were unpacked.

    Raises:
      UserError: the name is unknown, the data set is not in the folder, or an image has no counterpart.
    """
    if name not in _FOLDERS:
        raise UserError(f"there is no data set {name!r}; choose one of {', '.join(_FOLDERS)}")
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    parts = {}
    for split, candidates in _FOLDERS[name].items():
        part = next((found for hazy, clear in candidates if (found := _find_part(root, hazy, clear)) is not None), None)
        if part is not None:
            parts[split] = part
        elif (name, split) not in _OPTIONAL:
            looked = " or ".join(f"{hazy} with {clear}" if clear and clear != hazy else hazy for hazy, clear in candidates)
            archives = sorted(p.name for p in root.iterdir() if re.search(r"\.(zip|rar|tar|7z|z\d\d|\d\d\d)(\.gz)?$", p.name.lower()))
            raise UserError(
                f"{name} was not found in {root}: looked for {looked}"
                + (f"; unpack {', '.join(archives[:3])} there first" if archives else "")
            )
    pairs = [pair for part in parts.values() for pair in part.pairs]
    alone = [path for part in parts.values() for path in part.hazy]
    hazy = [pair.name for pair in pairs] + [path.stem for path in alone]
    return Layout(recognise_release(name, hazy, len({pair.clear for pair in pairs})), parts)


def _find_part(root: Path, hazy: str, clear: str) -> Part | None:
    # The user may name the data set's own folder or its parent.
    for skip in (0, 1):
        folders = [_descend(root, path.split("/")[skip:]) if path else None for path in (hazy, clear)]
        if folders[0] is None or (clear and folders[1] is None) or not list_images(folders[0]):
            continue
        if not clear:
            return Part(hazy=tuple(every_image(folders[0])))
        if hazy == clear and not any(path.stem.lower().endswith("_hazy") for path in list_images(folders[0])):
            continue
        assert folders[1] is not None
        return Part(pairs=tuple(find_pairs(folders[0], folders[1])))
    return None


def _descend(folder: Path, names: Sequence[str]) -> Path | None:
    for name in names:
        found = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.lower() == name.lower()]
        if not found:
            return None
        folder = found[0]
    return folder


def recognise_data_set(names: Iterable[str], *, clear: int | None = None, size: tuple[int, int] | None = None) -> str | None:
    """Return the public data set that hazy images come from, or None if it is unknown.

    Names that contain an airlight are sufficient. Any numbered images may be named `1_1` or `2024_05`; to be recognised as ITS without
    airlights, images must therefore also have the numbers of a release, or RESIDE's size.

    Args:
      names: the names of the hazy images, without extension.
      clear: the number of clear images.
      size: width and height of most images.
    """
    names = list(names)

    def share(pattern: re.Pattern[str]) -> float:
        return sum(bool(pattern.match(name)) for name in names) / max(len(names), 1)

    if share(_SOTS_INDOOR) == 1:
        return "reside/sots_indoor"
    if share(_ITS_V0) > 0.9 or share(_ITS_STANDARD) > 0.9:
        counts = [*RELEASES["reside/its"].values(), *_PARTS["reside/its", "RESIDE-v0"]]
        return "reside/its" if share(_AIRLIGHT) > 0.9 or (len(names), clear) in counts or size == _RESIDE_SIZE else None
    if share(_OTS) > 0.9:
        return "reside/sots_outdoor" if len(names) <= 500 else "reside/ots"
    return None


def recognise_release(name: str, hazy: Sequence[str], clear: int) -> str:
    """Return the release of a copy of data set `name` from the names of its hazy images and the number of its clear ones.

    The releases of ITS differ in their names; those of OTS use the same names and differ in the numbers of images. If neither
    identifies the release, the result is "unknown release".
    """
    releases = RELEASES.get(name, {})
    if name == "reside/its":
        padded = sum(bool(_ITS_V0.match(stem)) for stem in hazy)
        plain = sum(bool(_ITS_STANDARD.match(stem)) for stem in hazy)
        # A name such as 1000_10 has both forms; names that have only one form decide.
        if max(padded, plain) > 0.9 * len(hazy) and padded != plain:
            return "RESIDE-v0" if padded > plain else "RESIDE-standard"
    if len(releases) == 1:
        return next(iter(releases))
    return next((release for release, numbers in releases.items() if numbers == (len(hazy), clear)), "unknown release")


def missing_images(name: str, release: str, hazy: int, clear: int) -> str | None:
    """Return a line that compares a copy's numbers of images with the published ones, or None if they agree."""
    releases = {release: RELEASES[name][release]} if release in RELEASES[name] else RELEASES[name]
    if (hazy, clear) in (*releases.values(), *_PARTS.get((name, release), [])):
        return None
    published = " or ".join(f"{known} has {n} hazy and {m} clear images" for known, (n, m) in releases.items())
    return f"{published}, but this copy has {hazy} and {clear}"
