"""Dehazing of image files and folders of them."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from aecr_jax.compilation import NotEnoughMemory
from aecr_jax.data.decode import Picture
from aecr_jax.data.encode import Encoding
from aecr_jax.data.images import EXTENSIONS, list_images, read_picture, to_float, unique_names
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
    encoding: Encoding | None = None,
    suffix: str = "",
    recursive: bool = False,
) -> bool:
    """Write the restored version of each image to `output/NAME.EXTENSION`, with the image's alpha channel and EXIF data.

    An image that cannot be restored is reported on standard error, and the function continues with the others. This applies to a file
    that cannot be read, an entry of a folder that is named like an image but is not a file, an image that does not fit into memory or
    into the output's format, and a result that is not finite or whose name is too long.

    Args:
      inputs: image files, and folders of image files.
      output: folder for the results; it is created if it does not exist.
      checkpoint: a name or path that `load_checkpoint` accepts; the default model by default.
      tile: images of more than `tile * tile` pixels are restored in overlapping tiles, if the network needs that; 0 disables tiling.
      strength: how much of the change to apply, from 0 (none) to 1.
      existing: what to do if results already exist: "refuse" to start, "overwrite" them, or "skip" their images.
      encoding: the format of the results; by default PNG files, with 16 bits per value for images that have more than 8.
      suffix: text that is added to the name of each result, before the extension.
      recursive: also restore the images in sub-folders of the inputs, to sub-folders of `output` with the same names. Links to folders,
        hidden folders and `output` are left out.

    Returns:
      True if every image was restored, or was skipped because its result exists.

    Raises:
      UserError: an input is missing, a folder has no images, the suffix is not part of a file name, the model is not finite, or the
        output cannot be written, would replace an input, or already exists.
    """
    check_tile(tile)
    check_strength(strength)
    if {os.sep, os.altsep, "\0"} & set(suffix):
        raise UserError(f"suffix (={suffix}) must be part of a file name, without {os.sep}")
    encoding = encoding or Encoding()
    output = Path(output)
    images, skipped, notes = _list_inputs(inputs, output, recursive)
    stems = [str(folder / source.stem) for source, folder in images]
    names = unique_names(_with_extensions(stems, [source.suffix for source, _ in images]))
    todo = [(source, output / f"{name}{suffix}.{encoding.extension}") for (source, _), name in zip(images, names)]
    there = _existing_results(todo, existing)
    model, config = load_with_info(DEFAULT_MODEL if checkpoint is None else checkpoint)
    restorer = Restorer(model)
    make_folder(output)
    shipped = checkpoint is None or shipped_folder(checkpoint)
    print(f"model: {config['about']['name'] + ', shipped with the package' if shipped else checkpoint}")
    same = Counter(stem.lower() for stem in stems)
    notes += [f"{source} -> {target}" for stem, name, (source, target) in zip(stems, names, todo) if same[stem.lower()] > 1 or stem != name]
    for note in notes:
        print(note)
    for path, reason in skipped:
        complain(f"{path} cannot be read: {reason}")
    failed = len(skipped)
    todo = [(source, target) for source, target in todo if target not in there]

    def read(source: Path, target: Path) -> Picture:
        _check_name(source, target)
        picture = read_picture(source)
        encoding.check(picture, str(source))
        return picture

    # While the network runs, one thread reads the next image, and another writes the last result. Images of 8 bits wait as such, because
    # floating-point ones take four times the memory.
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for (source, target), reading in tqdm(_one_ahead(reader, read, todo), "dehazing", len(todo), unit="image", disable=None):
            try:
                picture = reading.result()
                hazy = to_float(picture.pixels)
                restored = restore_any_size(restorer, hazy, tile, str(source))
            except UserError as error:
                failed += 1
                complain(str(error))
                continue
            if writing is not None:
                writing.result()
            writing = writer.submit(encoding.write, target, blend(hazy, restored, strength), picture)
        if writing is not None:
            writing.result()
    done = len(images) + len(skipped) - len(there) - failed
    print(
        f"{done} images written to {output}"
        + (f", {len(there)} skipped because their results exist" if there else "")
        + (f", {failed} could not be restored" if failed else "")
    )
    return not failed


def _one_ahead(
    reader: Executor, read: Callable[[Path, Path], Picture], todo: Sequence[tuple[Path, Path]]
) -> Iterator[tuple[tuple[Path, Path], Future[Picture]]]:
    """Yield each pair of files with what `read` returns for it; that of the next pair is read while the caller uses the current one."""
    current = None
    for pair in todo:
        following = pair, reader.submit(read, *pair)
        if current is not None:
            yield current
        current = following
    if current is not None:
        yield current


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
        pixels = math.prod(side.length for side in restorer.cut(h, w, tile, OVERLAP)) if large else h * w
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


def _with_extensions(stems: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """Add the extension to each stem that inputs with different extensions share: a.jpg and a.png become `a_jpg` and `a_png`.

    Numbers would change when a file is added, and "skip" would then keep the result of another image.
    """
    found: dict[str, set[str]] = {}
    for stem, suffix in zip(stems, suffixes):
        found.setdefault(stem.lower(), set()).add(suffix.lower())
    return [f"{stem}_{suffix[1:]}" if len(found[stem.lower()]) > 1 and suffix else stem for stem, suffix in zip(stems, suffixes)]


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


def _list_inputs(
    inputs: Sequence[str | Path], output: Path, recursive: bool
) -> tuple[list[tuple[Path, Path]], list[tuple[Path, str]], list[str]]:
    """Return the images, each with the folder of its result below `output`; what was left out, with reasons; and notes about folders.

    Entries of folders that are named like images but are not files, and folders that cannot be listed, are left out.
    """
    images: list[tuple[Path, Path]] = []
    skipped: list[tuple[Path, str]] = []
    notes: list[str] = []
    for path in map(Path, inputs):
        if os.path.isdir(path):
            folders, note = _folders(path, output, skipped) if recursive else ([path], _unsearched(path, output))
            found = [(image, folder.relative_to(path)) for folder in folders for image in _images_of(folder, skipped, recursive)]
            if not found:
                raise UserError(f"no images in {path}: looked for {', '.join(sorted(EXTENSIONS))}" + (f"; {note}" if note else ""))
            images += found
            notes += [note] if note else []
        elif os.path.exists(path):
            images.append((path, Path()))
        else:
            raise UserError(f"there is no file or folder {path}")
    return images, skipped, notes


def _images_of(folder: Path, skipped: list[tuple[Path, str]], recursive: bool) -> list[Path]:
    """List the images of a folder. If sub-folders are searched too, one that is named like an image is not reported as skipped."""
    here: list[tuple[Path, str]] = []
    images = list_images(folder, here)
    skipped += [(path, reason) for path, reason in here if not (recursive and os.path.isdir(path))]
    return images


def _folders(folder: Path, output: Path, skipped: list[tuple[Path, str]]) -> tuple[list[Path], str]:
    """Return `folder` and all folders below it, in order, and a note about links. Hidden folders, links and the output are left out."""
    below = os.path.realpath(output)
    found, links = [], 0

    def skip(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise UserError(f"{folder} cannot be listed: {error.strerror}") from error
        skipped.append((Path(error.filename), error.strerror or str(error)))

    for root, names, _ in os.walk(folder, onerror=skip):
        found.append(Path(root))
        visible = sorted(name for name in names if not name.startswith(".") and os.path.realpath(os.path.join(root, name)) != below)
        names[:] = [name for name in visible if not os.path.islink(os.path.join(root, name))]
        links += len(visible) - len(names)
    return found, f"links to folders in {folder} were not searched ({links}): to dehaze their images, add them as inputs" if links else ""


def _unsearched(folder: Path, output: Path) -> str:
    """Return a note about the sub-folders of `folder` except hidden ones and the output, or an empty string if there are none."""
    visible = (path for path in folder.iterdir() if not path.name.startswith(".") and path.suffix.lower() not in EXTENSIONS)
    here = os.path.realpath(output)
    count = sum(os.path.isdir(path) and os.path.realpath(path) != here for path in visible)
    if count == 1:
        return f"{folder} has 1 sub-folder that was not searched: to dehaze its images, add --recursive"
    return f"{folder} has {count} sub-folders that were not searched: to dehaze their images, add --recursive" if count else ""


def complain(message: str) -> None:
    """Print the line that reports a problem on standard error, above a progress bar if there is one."""
    tqdm.write(complaint(message), file=sys.stderr)
