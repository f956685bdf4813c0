"""The files of the page: its own, the models as ONNX with a list of them, and onnxruntime-web."""

from __future__ import annotations

import json
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import aecr_jax
from aecr_jax.errors import UserError
from aecr_jax.export.command import check_onnx, describe
from aecr_jax.files import make_folder, replacing
from aecr_jax.inference.models import read_card
from aecr_jax.inference.weights import DEFAULT_MODEL, SHIPPED, load_with_info, shipped_names
from aecr_jax.networks import coarse_net
from aecr_jax.web.runtime import read_runtime

# The side in pixels of the tiles in which the page restores images, where `dehaze` takes 1536: a browser tab has less memory, and shows
# its progress after each tile.
TILE = 768


def make_site(runtime: str | Path | None = None) -> dict[str, bytes]:
    """Return the content of every file of the page by its path, such as "models/photo.onnx".

    Args:
      runtime: see `read_runtime`.

    Raises:
      UserError: a package that ONNX needs is missing, or onnxruntime-web cannot be had.
    """
    check_onnx()
    site = {f"runtime/{name}": content for name, content in read_runtime(runtime).items()}
    site |= _read_tree(files("aecr_jax.web") / "page")
    models = []
    for name in sorted(shipped_names(), key=lambda name: (name != DEFAULT_MODEL.name, name)):
        content, entry = _export(name)
        site[entry["file"]] = content
        models.append(entry)
    listing = {"version": aecr_jax.__version__, "models": models}
    return site | {"models/models.json": json.dumps(listing, indent=1).encode()}


def write_site(site: dict[str, bytes], folder: str | Path, *, overwrite: bool = False) -> None:
    """Write the files of the page to a folder, `index.html` last.

    Raises:
      UserError: a file exists and `overwrite` is not set, or the folder cannot be written.
    """
    folder = make_folder(folder)
    there = [path for path in site if (folder / path).exists()]
    if there and not overwrite:
        raise UserError(f"{folder / there[0]} already exists: choose another --output, or add --overwrite to replace the page")
    for path in sorted(site, key=lambda path: path == "index.html"):
        with replacing(folder / path) as partial:
            partial.write_bytes(site[path])


def _read_tree(folder: Traversable, prefix: str = "") -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= _read_tree(entry, f"{prefix}{entry.name}/")
        else:
            found[prefix + entry.name] = entry.read_bytes()
    return found


def _export(name: str) -> tuple[bytes, dict[str, Any]]:
    """Return a shipped model as ONNX, and its entry in the list of models.

    For a CoarseNet, the file has only the part that estimates the haze. The page reduces the image before and applies the maps after it,
    so the memory that it needs hardly grows with the image.
    """
    from aecr_jax.export.to_onnx import maps_to_onnx, to_onnx

    network, info = load_with_info(name)
    about = describe(network, info, name) | {"dtype": "float32"}
    card = read_card(SHIPPED / name)
    if isinstance(network, coarse_net.CoarseNet):
        content = maps_to_onnx(network, about)
        form = {"pixels": coarse_net.PIXELS, "cell": coarse_net.MAP_CELL, "multiple": network.MULTIPLE}
    else:
        content = to_onnx(network, about)
        multiple = network.symbolic_sizes().multiple
        form = {"tile": TILE if network.NEEDS_TILES else 0, "overlap": int(about["overlap"]), "multiple": multiple}
    entry = {"name": name, "file": f"models/{name}.onnx", "bytes": len(content), "purpose": card.purpose, "license": card.license}
    return content, entry | {"parameters": card.parameters, "form": form}
