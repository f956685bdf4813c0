"""Dehazes photographs: files and folders in, PNG files out."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from aecr_jax.checkpoint import DEFAULT_MODEL, load_checkpoint_with_config
from aecr_jax.compilation import NotEnoughMemory
from aecr_jax.data.images import EXTENSIONS, list_images, read_image, unique_names, write_image
from aecr_jax.errors import UserError, complaint
from aecr_jax.files import make_folder
from aecr_jax.restore import Restorer, restore_tiled

# A tile sees this much of its neighbours; the seams are blended over it.
OVERLAP = 128
_LEAST_TILE, _USUAL_TILE = 2 * OVERLAP, 1536

Existing = Literal["refuse", "overwrite", "skip"]


def dehaze(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    tile: int = _USUAL_TILE,
    existing: Existing = "refuse",
) -> bool:
    """Write the restored version of each image to `output/NAME.png`.

    What cannot be restored is named on standard error, and the others go on: a file that cannot be read, an entry of a folder that has
    an image's name and is no file, an image that does not fit into memory, a result that is not finite or whose name is too long.

    Args:
      inputs: image files, and folders of them; sub-folders are not searched.
      output: folder for the results; made if missing.
      checkpoint: as `load_checkpoint` takes it; the shipped model by default.
      tile: images of more than `tile * tile` pixels are restored in overlapping tiles; 0 for never.
      existing: what to do about results that exist: refuse to begin, overwrite them, or skip their images.

    Returns:
      Whether every image was restored or skipped because its result exists.

    Raises:
      UserError: an input is missing, a folder has no images, the model is not finite, the output cannot be written, would replace an
        input, or exists.
    """
    if tile < 0 or 0 < tile < _LEAST_TILE:
        raise UserError(f"tile (={tile}) must be 0 or at least {_LEAST_TILE}")
    output = Path(output)
    images, skipped, notes = _list_inputs(inputs, output)
    names = unique_names(image.stem for image in images)
    todo = list(zip(images, (output / f"{name}.png" for name in names)))
    there = _existing_results(todo, existing)
    model, config = load_checkpoint_with_config(DEFAULT_MODEL if checkpoint is None else checkpoint)
    restorer = Restorer(model)
    make_folder(output)
    print(f"model: {config['about'].get('name', 'unnamed') + ', shipped with the package' if checkpoint is None else checkpoint}")
    same = Counter(image.stem.lower() for image in images)
    notes += [f"{source} -> {target}" for source, target in todo if same[source.stem.lower()] > 1 or source.stem != target.stem]
    for note in notes:
        print(note)
    for path, reason in skipped:
        _complain(f"{path} cannot be read: {reason}")
    failed = len(skipped)
    todo = [(source, target) for source, target in todo if target not in there]
    for source, target in tqdm(todo, "dehazing", unit="image"):
        try:
            _check_name(source, target)
            restored = _restore(restorer, source, tile)
        except UserError as error:
            failed += 1
            _complain(str(error))
            continue
        write_image(target, restored)
    done = len(images) + len(skipped) - len(there) - failed
    print(
        f"{done} images in {output}"
        + (f", {len(there)} skipped: their results exist" if there else "")
        + (f", {failed} could not be restored" if failed else "")
    )
    return not failed


def _restore(restorer: Restorer, source: Path, tile: int) -> np.ndarray:
    """The restored image `[H, W, 3]`. Errors begin with the file's name."""
    image = read_image(source)
    h, w = image.shape[:2]
    large = tile > 0 and h * w > tile * tile
    try:
        return restore_tiled(restorer, image, tile, OVERLAP) if large else restorer(image)
    except NotEnoughMemory as error:
        pixels = min(h, tile) * min(w, tile) if large else h * w
        share = 0.5 if error.available is None else 0.8 * error.available / error.needed
        side = int(math.sqrt(pixels * share)) // OVERLAP * OVERLAP
        side = max(_LEAST_TILE, min(side, _USUAL_TILE))
        raise UserError(f"{source}: {error}" + (f": use --tile {side}" if side * side < pixels else "")) from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _check_name(source: Path, target: Path) -> None:
    """Raise UserError if the file system refuses the name of the result: before the image is computed, and not after."""
    try:
        target.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{source}: {target} cannot be written: {error.strerror or error}") from error


def _existing_results(todo: Sequence[tuple[Path, Path]], existing: Existing) -> set[Path]:
    """The results that exist and are to stay.

    Raises:
      UserError: a result is an input or a folder, or exists and was not to.
    """
    sources = {os.path.realpath(source) for source, _ in todo}
    there = []
    for _, target in todo:
        if os.path.realpath(target) in sources:
            raise UserError(f"{target} is an input and would be replaced: name another folder for --output")
        if os.path.isdir(target) and not os.path.islink(target):
            raise UserError(f"{target} is a folder, where a result would be written: name another folder for --output")
        if os.path.lexists(target):
            there.append(target)
    if there and existing == "refuse":
        raise UserError(
            f"{there[0]} already exists ({len(there)} of {len(todo)} results): name another --output, or add --overwrite to replace"
            " results or --skip-existing to keep them"
        )
    return set(there) if existing == "skip" else set()


def _list_inputs(inputs: Sequence[str | Path], output: Path) -> tuple[list[Path], list[tuple[Path, str]], list[str]]:
    """The images; the entries of folders that have an image's name and are none, with reasons; and remarks about the folders."""
    images: list[Path] = []
    skipped: list[tuple[Path, str]] = []
    notes: list[str] = []
    for path in map(Path, inputs):
        if os.path.isdir(path):
            found = list_images(path, skipped)
            note = _unsearched(path, output)
            if not found:
                raise UserError(f"no images in {path}: looked for {', '.join(sorted(EXTENSIONS))}" + (f"; {note}" if note else ""))
            images += found
            notes += [note] if note else []
        elif os.path.exists(path):
            images.append(path)
        else:
            raise UserError(f"there is no file or folder {path}")
    return images, skipped, notes


def _unsearched(folder: Path, output: Path) -> str:
    """A line about the sub-folders of `folder`, hidden ones and the output left out; empty if there are none."""
    visible = (path for path in folder.iterdir() if not path.name.startswith(".") and path.suffix.lower() not in EXTENSIONS)
    here = os.path.realpath(output)
    count = sum(os.path.isdir(path) and os.path.realpath(path) != here for path in visible)
    if count == 1:
        return f"{folder} has 1 sub-folder that was not searched: to dehaze it, name it too"
    return f"{folder} has {count} sub-folders that were not searched: to dehaze them, name them too" if count else ""


def _complain(message: str) -> None:
    tqdm.write(complaint(message), file=sys.stderr)
