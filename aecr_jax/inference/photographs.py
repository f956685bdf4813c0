"""Dehazing of image files and folders; the results are PNG files."""

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

from aecr_jax.compilation import NotEnoughMemory
from aecr_jax.data.images import EXTENSIONS, list_images, read_image, unique_names, write_image
from aecr_jax.errors import UserError, complaint
from aecr_jax.files import make_folder
from aecr_jax.inference.restore import (
    LEAST_TILE,
    OVERLAP,
    USUAL_TILE,
    Restorer,
    blend,
    check_strength,
    check_tile,
    restore_tiled,
)
from aecr_jax.inference.weights import DEFAULT_MODEL, load_with_info, shipped_folder

Existing = Literal["refuse", "overwrite", "skip"]


def dehaze_files(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    tile: int = USUAL_TILE,
    strength: float = 1.0,
    existing: Existing = "refuse",
) -> bool:
    """Write the restored version of each image to `output/NAME.png`.

    An image that cannot be restored is reported on standard error, and the function continues with the others. This applies to a file
    that cannot be read, an entry of a folder that is named like an image but is not a file, an image that does not fit into memory, and
    a result that is not finite or whose name is too long.

    Args:
      inputs: image files, and folders of image files; sub-folders are not searched.
      output: folder for the results; it is created if it does not exist.
      checkpoint: a name or path that `load_checkpoint` accepts; the default model by default.
      tile: images of more than `tile * tile` pixels are restored in overlapping tiles, if the network needs that; 0 disables tiling.
      strength: how much of the change to apply, from 0 (none) to 1.
      existing: what to do if results already exist: "refuse" to start, "overwrite" them, or "skip" their images.

    Returns:
      True if every image was restored, or was skipped because its result exists.

    Raises:
      UserError: an input is missing, a folder has no images, the model is not finite, or the output cannot be written, would replace
        an input, or already exists.
    """
    check_tile(tile)
    check_strength(strength)
    output = Path(output)
    images, skipped, notes = _list_inputs(inputs, output)
    names = unique_names(image.stem for image in images)
    todo = list(zip(images, (output / f"{name}.png" for name in names)))
    there = _existing_results(todo, existing)
    model, config = load_with_info(DEFAULT_MODEL if checkpoint is None else checkpoint)
    restorer = Restorer(model)
    make_folder(output)
    shipped = checkpoint is None or shipped_folder(checkpoint)
    print(f"model: {config['about']['name'] + ', shipped with the package' if shipped else checkpoint}")
    same = Counter(image.stem.lower() for image in images)
    notes += [f"{source} -> {target}" for source, target in todo if same[source.stem.lower()] > 1 or source.stem != target.stem]
    for note in notes:
        print(note)
    for path, reason in skipped:
        _complain(f"{path} cannot be read: {reason}")
    failed = len(skipped)
    todo = [(source, target) for source, target in todo if target not in there]
    for source, target in tqdm(todo, "dehazing", unit="image", disable=None):
        try:
            _check_name(source, target)
            hazy = read_image(source)
            restored = restore_any_size(restorer, hazy, tile, str(source))
        except UserError as error:
            failed += 1
            _complain(str(error))
            continue
        write_image(target, blend(hazy, restored, strength))
    done = len(images) + len(skipped) - len(there) - failed
    print(
        f"{done} images written to {output}"
        + (f", {len(there)} skipped because their results exist" if there else "")
        + (f", {failed} could not be restored" if failed else "")
    )
    return not failed


def restore_any_size(restorer: Restorer, image: np.ndarray, tile: int, name: str) -> np.ndarray:
    """Restore an image `[H, W, 3]`, in tiles if it has more than `tile * tile` pixels.

    Raises:
      UserError: the image or its result is not finite, or it does not fit into memory; the message begins with `name`.
    """
    h, w = image.shape[:2]
    large = restorer.splits(h, w, tile)
    try:
        return restore_tiled(restorer, image, tile, OVERLAP) if large else restorer(image)
    except NotEnoughMemory as error:
        pixels = min(h, tile) * min(w, tile) if large else h * w
        share = 0.5 if error.available is None else 0.8 * error.available / error.needed
        side = int(math.sqrt(pixels * share)) // OVERLAP * OVERLAP
        side = max(LEAST_TILE, min(side, USUAL_TILE))
        raise UserError(f"{name}: {error}" + (f": use --tile {side}" if restorer.needs_tiles and side * side < pixels else "")) from error
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _check_name(source: Path, target: Path) -> None:
    """Raise UserError if the file system rejects the name of the result, so that the error occurs before the image is restored."""
    try:
        target.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{source}: {target} cannot be written: {error.strerror or error}") from error


def _existing_results(todo: Sequence[tuple[Path, Path]], existing: Existing) -> set[Path]:
    """Return the existing results that are to be kept.

    Raises:
      UserError: a result is an input or a folder, or a result exists and `existing` is "refuse".
    """
    sources = {os.path.realpath(source) for source, _ in todo}
    there = []
    for _, target in todo:
        if os.path.realpath(target) in sources:
            raise UserError(f"{target} is an input and would be replaced: choose another folder for --output")
        if os.path.isdir(target) and not os.path.islink(target):
            raise UserError(f"{target} is a folder, but a result would be written there: choose another folder for --output")
        if os.path.lexists(target):
            there.append(target)
    if there and existing == "refuse":
        raise UserError(
            f"{there[0]} already exists ({len(there)} of {len(todo)} results): choose another --output, or add --overwrite to replace"
            " results or --skip-existing to keep them"
        )
    return set(there) if existing == "skip" else set()


def _list_inputs(inputs: Sequence[str | Path], output: Path) -> tuple[list[Path], list[tuple[Path, str]], list[str]]:
    """Return the images, the folder entries that are named like images but are not files (with reasons), and notes about the folders."""
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
    """Return a note about the sub-folders of `folder` except hidden ones and the output, or an empty string if there are none."""
    visible = (path for path in folder.iterdir() if not path.name.startswith(".") and path.suffix.lower() not in EXTENSIONS)
    here = os.path.realpath(output)
    count = sum(os.path.isdir(path) and os.path.realpath(path) != here for path in visible)
    if count == 1:
        return f"{folder} has 1 sub-folder that was not searched: to dehaze its images, add it as an input"
    return f"{folder} has {count} sub-folders that were not searched: to dehaze their images, add them as inputs" if count else ""


def _complain(message: str) -> None:
    tqdm.write(complaint(message), file=sys.stderr)
