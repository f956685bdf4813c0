"""Find the images of a data set in folders and match them by the naming schemes of public dehazing data sets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from aecr_jax.data.images import list_images
from aecr_jax.data.samples import ClearImage, DepthScene, Pair
from aecr_jax.errors import UserError

HAZY_FOLDERS = ("hazy", "haze", "hazy_images", "input")
CLEAR_FOLDERS = ("clear", "gt", "clean", "clear_images", "target", "rgb", "image")
DEPTH_FOLDERS = ("depth",)
# The names of RESIDE's hazy versions of one clear image: the number of the clear image, then one or two other numbers.
_NUMBERED = re.compile(r"(\d+)(_\d*\.?\d+){1,2}$")
_LISTED = 5


def clear_names(stem: str) -> list[str]:
    """Return the names, without extension and in lower case, that the clear image of the hazy image `stem` may have.

    These are the equal name; for `01_hazy`, `01_gt` and `01` (NH-HAZE, Dense-Haze, O-HAZE, I-HAZE); and for RESIDE's numbers, `1400_1`,
    `1_2_0.97842` and `0001_0.8_0.2`, the names `1400`, `1` and `0001`. Other names are not split: `photo_1` is not a version of `photo`.
    """
    stem = stem.lower()
    names = [stem]
    if stem.endswith("_hazy"):
        names += [stem.removesuffix("_hazy") + "_gt", stem.removesuffix("_hazy")]
    if numbered := _NUMBERED.match(stem):
        names.append(numbered[1])
    return names


def every_image(folder: str | Path) -> list[Path]:
    """List the images in `folder` as `list_images` does, but include those that cannot be read, such as links without a target.

    Reading one of those raises a `UserError` with its name. If they were left out, the data set would shrink without a message.
    """
    unreadable: list[tuple[Path, str]] = []
    images = list_images(folder, unreadable)
    return sorted(images + [path for path, _ in unreadable])


def find_pairs(hazy: str | Path, clear: str | Path, problems: list[str] | None = None) -> list[Pair]:
    """Pair every image in the folder `hazy` with its clear image in the folder `clear`, sorted by name.

    Both may be the same folder if the names distinguish the images (`01_hazy.png`, `01_GT.png`). Several hazy images may share a clear
    one only if they have RESIDE's numbered names. If `problems` is a list, each problem with the names is appended to it as a line and
    does not raise an error.

    Raises:
      UserError: a folder is missing or empty, a hazy image has no clear one, two hazy images share a clear one without RESIDE's numbers,
        or two files have the same name.
    """
    hazy, clear = Path(hazy), Path(clear)
    hazy_images, clear_images = every_image(hazy), every_image(clear)
    if hazy.resolve() == clear.resolve():
        hazy_images = [path for path in hazy_images if path.stem.lower().endswith("_hazy")]
        clear_images = [path for path in clear_images if path not in hazy_images]
    for folder, images in ((hazy, hazy_images), (clear, clear_images)):
        if not images:
            raise UserError(
                f"no pairs in {folder}: looked for images such as 1400_1.png with 1400.png, 01_hazy.png with 01_GT.png, or equal names"
            )
    found: list[str] = []
    by_name = _by_name(clear_images, found)
    partners = {path: _match(path, by_name) for path in hazy_images}
    pairs = [Pair(path, match) for path, match in partners.items() if match is not None]
    alone = [path for path, match in partners.items() if match is None]
    hazy_by_name = {path.stem.lower(): path for path in hazy_images}
    if not pairs and all(_match(path, hazy_by_name) for path in clear_images):
        found.append(
            f"hazy and clear images look exchanged: no image in {hazy} has a clear image in {clear}, and every image in {clear}, such"
            f" as {clear_images[0].name}, is named like a hazy version of an image in {hazy}"
        )
    elif alone:
        looked = (
            f"looked in {clear} for {' or '.join(clear_names(alone[0].stem))} with any image extension, among images such as"
            f" {clear_images[0].name}. Names must be equal, or like 01_hazy with 01_GT, or RESIDE's numbers, such as 1400_1 with 1400"
        )
        if problems is None:
            names = listed([str(alone[0]), *(path.name for path in alone[1:])])
            found.append(f"{len(alone)} of {len(hazy_images)} hazy images have no clear image, first {names}: {looked}")
        else:
            found.append(f"{len(alone)} hazy images have no clear image: {listed(map(str, alone))}; {looked}")
    found += _shared(pairs)
    _report(found, problems)
    return pairs


def find_depth_scenes(clear: str | Path, depth: str | Path, problems: list[str] | None = None) -> list[DepthScene]:
    """Pair every image in the folder `clear` with the depth map of the same name in the folder `depth`, sorted by name.

    `problems` has the same meaning as in `find_pairs`.

    Raises:
      UserError: a folder is missing or empty, a clear image has no depth map, or two files have the same name.
    """
    clear_images = every_image(clear)
    if not clear_images:
        raise UserError(f"no images in {clear}: looked for clear images such as 00000.jpg with depth maps such as {depth}/00000.png")
    found: list[str] = []
    by_name = _by_name(every_image(depth), found)
    missing = [path for path in clear_images if path.stem.lower() not in by_name]
    if missing:
        found.append(
            f"{len(missing)} of {len(clear_images)} clear images have no depth map, first {missing[0]}:"
            f" looked for {missing[0].stem}.png in {depth}"
        )
    _report(found, problems)
    return [DepthScene(path, by_name[path.stem.lower()]) for path in clear_images if path.stem.lower() in by_name]


def find_clear_images(clear: str | Path, problems: list[str] | None = None) -> list[ClearImage]:
    """List the images in the folder `clear`, sorted by name. `problems` has the same meaning as in `find_pairs`.

    Raises:
      UserError: the folder is missing or empty, or two files have the same name.
    """
    images = every_image(clear)
    if not images:
        raise UserError(f"no images in {clear}: looked for clear images such as 00000.jpg")
    found: list[str] = []
    _by_name(images, found)
    _report(found, problems)
    return [ClearImage(path) for path in images]


def find_dataset(root: str | Path, problems: list[str] | None = None) -> list[Pair] | list[DepthScene]:
    """Find the pairs or depth scenes in `root`: in subfolders such as hazy/ and clear/ (or rgb/ and depth/), or by NH-HAZE's names.

    `problems` has the same meaning as in `find_pairs`.

    Raises:
      UserError: the folder does not exist or contains no such images.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}

    def first(names: Sequence[str]) -> Path | None:
        return next((folders[name] for name in names if name in folders), None)

    hazy, clear, depth = first(HAZY_FOLDERS), first(CLEAR_FOLDERS), first(DEPTH_FOLDERS)
    if hazy and clear:
        return find_pairs(hazy, clear, problems)
    if clear and depth:
        return find_depth_scenes(clear, depth, problems)
    if any(path.stem.lower().endswith("_hazy") for path in list_images(root)):
        return find_pairs(root, root, problems)
    raise UserError(
        f"no pairs in {root}: looked for folders {'/'.join(HAZY_FOLDERS)} with {'/'.join(CLEAR_FOLDERS)},"
        f" for {'/'.join(CLEAR_FOLDERS)} with depth, and for files such as 01_hazy.png with 01_GT.png"
    )


def listed(items: Iterable[str]) -> str:
    """Return a line with the first of `items` and the number of the others."""
    items = list(items)
    return "; ".join(items[:_LISTED]) + (f"; and {len(items) - _LISTED} more" if len(items) > _LISTED else "")


def _match(path: Path, by_name: dict[str, Path]) -> Path | None:
    return next((by_name[name] for name in clear_names(path.stem) if name in by_name), None)


def _by_name(images: Sequence[Path], found: list[str]) -> dict[str, Path]:
    """Return the images by name; append a line to `found` for two files with the same name."""
    by_name: dict[str, Path] = {}
    for path in images:
        other = by_name.setdefault(path.stem.lower(), path)
        if other != path:
            found.append(f"{other} and {path} have the same name: remove one of them")
    return by_name


def _shared(pairs: Sequence[Pair]) -> list[str]:
    """Return a line for every clear image that has several hazy ones, unless all of those have RESIDE's numbers."""
    versions: dict[Path, list[Path]] = {}
    for pair in pairs:
        versions.setdefault(pair.clear, []).append(pair.hazy)
    return [
        f"{len(hazy)} hazy images have the same clear image, {clear}: {listed(map(str, hazy))}. Only images with RESIDE's numbers may share"
        " one, as 1400_1 and 1400_2 share 1400"
        for clear, hazy in versions.items()
        if len(hazy) > 1 and not _are_versions(hazy)
    ]


def _are_versions(hazy: Sequence[Path]) -> bool:
    names = {path.stem.lower() for path in hazy}
    return len(names) == len(hazy) and all(_NUMBERED.match(name) for name in names)


def _report(found: Sequence[str], problems: list[str] | None) -> None:
    if problems is not None:
        problems += found
    elif found:
        more = f" (check-data lists {len(found) - 1} more such problems)" if len(found) > 1 else ""
        raise UserError(found[0] + more)
