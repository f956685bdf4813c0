"""Dehazes photographs: files and folders in, PNG files out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from aecr_jax.checkpoint import DEFAULT_MODEL, load_checkpoint_with_config
from aecr_jax.data.images import EXTENSIONS, list_images, read_image, unique_names, write_image
from aecr_jax.errors import UserError
from aecr_jax.files import make_folder
from aecr_jax.restore import Restorer, restore_tiled

# A tile sees this much of its neighbours; the seams are blended over it.
OVERLAP = 128


def dehaze(inputs: Sequence[str | Path], output: str | Path, *, checkpoint: str | Path | None = None, tile: int = 1536) -> bool:
    """Writes the restored version of each image to `output/NAME.png`.

    A file that cannot be read is named on standard error and the others go on.

    Args:
      inputs: image files, and folders of them.
      output: folder for the results; made if missing.
      checkpoint: as `load_checkpoint` takes it; the shipped model by default.
      tile: images of more than `tile * tile` pixels are restored in overlapping tiles; 0 for never.

    Returns:
      Whether every image was restored.

    Raises:
      UserError: an input is missing, a folder has no images, the output cannot be written or would replace an input.
    """
    if tile < 0 or 0 < tile < 2 * OVERLAP:
        raise UserError(f"tile (={tile}) must be 0 or at least {2 * OVERLAP}")
    images = _list_inputs(inputs)
    targets = _targets(images, Path(output))
    model, config = load_checkpoint_with_config(DEFAULT_MODEL if checkpoint is None else checkpoint)
    restorer = Restorer(model)
    make_folder(output)
    print(f"model: {config['about'].get('name', 'unnamed') + ', shipped with the package' if checkpoint is None else checkpoint}")
    failed = 0
    for source, target in tqdm(list(zip(images, targets)), "dehazing", unit="image"):
        try:
            image = read_image(source)
        except UserError as error:
            failed += 1
            tqdm.write(f"aecr_jax: {error}", file=sys.stderr)
            continue
        large = tile and image.shape[0] * image.shape[1] > tile * tile
        write_image(target, restore_tiled(restorer, image, tile, OVERLAP) if large else restorer(image))
    print(f"{len(images) - failed} images in {output}" + (f", {failed} could not be read" if failed else ""))
    return not failed


def _list_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    images: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = list_images(path)
            if not found:
                raise UserError(f"no images in {path}: looked for {', '.join(sorted(EXTENSIONS))}")
            images += found
        elif path.exists():
            images.append(path)
        else:
            raise UserError(f"there is no file or folder {path}")
    return images


def _targets(images: Sequence[Path], output: Path) -> list[Path]:
    sources = {path.resolve() for path in images}
    targets = [output / f"{name}.png" for name in unique_names(image.stem for image in images)]
    for target in targets:
        if target.resolve() in sources:
            raise UserError(f"{target} is an input and would be replaced: name another folder for --output")
    return targets
