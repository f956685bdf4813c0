"""The models that ship with the package, as their model cards describe them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import yaml

from aecr_jax.inference.weights import DEFAULT_MODEL, SHIPPED, shipped_names

_SETS = {"sots_indoor": "SOTS indoor", "sots_outdoor": "SOTS outdoor"}


@dataclass(frozen=True, kw_only=True)
class Card:
    """The YAML block at the beginning of a model card; the first six keys are those of Hugging Face's model cards."""

    license: str
    """The licence of the weights, such as "apache-2.0"."""
    library_name: str
    """The library that loads the model: "aecr-jax"."""
    pipeline_tag: str
    """The task: "image-to-image"."""
    tags: list[str]
    """Terms to search for."""
    datasets: list[str]
    """Data sets that the model was trained on, with names as the Hub allows them, such as "nyu-depth-v2"."""
    metrics: list[str]
    """The metrics of `scores`."""
    purpose: str
    """What the model is for, in one line."""
    network: str
    """Name of the network in the registry."""
    parameters: int
    """Number of learned scalars."""
    data: str
    """The training data in one line: which part of the data sets, and how haze was added."""
    steps: int
    """Number of optimizer steps, of all runs together."""
    minutes: float
    """Time of training, of all runs together."""
    seeds: list[int]
    """The seed of each run."""
    revision: list[str]
    """The commit of this repository with which each run was made."""
    scores: dict[str, dict[str, float]]
    """For each of the test sets `sots_indoor` and `sots_outdoor`: PSNR in dB and SSIM of the restored images (`psnr`, `ssim`) and of the
    hazy input (`input_psnr`, `input_ssim`), by the official definitions, and the number of `images` in the mean."""


def read_card(folder: str | Path) -> Card:
    """Read the YAML block of the model card, `README.md`, in a model's folder.

    Raises:
      ValueError: there is no such block, or a key is missing or unknown.
    """
    path = Path(folder) / "README.md"
    before, _, rest = path.read_text().partition("---\n")
    text, end, _ = rest.partition("\n---\n")
    if before or not end:
        raise ValueError(f"{path} must begin with a YAML block between two lines ---")
    values = yaml.safe_load(text)
    keys = {field.name for field in dataclasses.fields(Card)}
    if wrong := sorted(keys ^ set(values)):
        raise ValueError(f"{path} has missing or unknown keys: {', '.join(wrong)}; it must have {', '.join(sorted(keys))}")
    return Card(**values)


def table() -> str:
    """Return the shipped models as a text table: name, network, parameters, size of the weights, scores, purpose."""
    rows = [["name", "network", "parameters", "MB", *_SETS.values(), "purpose"]]
    for name in shipped_names():
        card = read_card(SHIPPED / name)
        size = (SHIPPED / name / "model.safetensors").stat().st_size / 1e6
        scores = [f"{(score := card.scores[key])['psnr']:.2f} / {score['ssim']:.4f} ({score['images']})" for key in _SETS]
        title = f"{name} (default)" if name == DEFAULT_MODEL.name else name
        rows.append([title, card.network, f"{card.parameters:,}", f"{size:.1f}", *scores, card.purpose])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, f"Scores: RGB PSNR in dB / SSIM (number of images). Model cards: {SHIPPED}/NAME/README.md"])
