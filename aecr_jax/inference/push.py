"""The command `push`, which uploads a model and its card to a repository on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aecr_jax.errors import UserError, first_line
from aecr_jax.inference.command import MODEL

_CARD, _PIPELINE, _LIBRARY = "README.md", "image-to-image", "aecr-jax"
# The names under which model cards mention the test sets of `Card.scores`.
_SETS = {"sots_indoor": "RESIDE SOTS indoor", "sots_outdoor": "RESIDE SOTS outdoor"}


@dataclass(frozen=True)
class Evaluation:
    """Scores on one test set: the mean of each metric, by its name in `METRICS`, of the restored images and of the hazy ones."""

    name: str
    images: int
    restored: Mapping[str, float]
    hazy: Mapping[str, float]


def add_options(parser: Any) -> None:
    """Add the options of `push` to its parser."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("repository", metavar="OWNER/NAME", help="the repository; it is created if it does not exist")
    parser.add_argument("--license", metavar="ID", help="licence of the weights, such as apache-2.0 (default: that of the model's card)")
    parser.add_argument(
        "--datasets", metavar="A,B,...", help="data sets of the training, by their names on the Hub (default: those of the model's card)"
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="scores for the card: the name of a test set, and the summary.json that eval wrote for it",
    )
    parser.add_argument("--revision", default="main", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    parser.add_argument("--dry-run", metavar="DIR", help="write the files to this folder, and upload nothing")


def run_push(options: argparse.Namespace, rest: list[str]) -> int:
    """Push the model that the options select, and return the exit status."""
    done = push(
        options.model,
        options.repository,
        license=options.license,
        datasets=options.datasets.split(",") if options.datasets else None,
        scores=dict(_name_and_file(text) for text in options.scores),
        revision=options.revision,
        private=options.private,
        message=options.message,
        dry_run=options.dry_run,
    )
    if options.dry_run:
        print(f"{done}: nothing was uploaded; edit {done / _CARD} and run `python -m aecr_jax push {done} {options.repository}`")
    else:
        print(f"{done}\nload it as hf://{options.repository}" + (f"@{options.revision}" if options.revision != "main" else ""))
    return 0


def push(
    model: str | Path,
    repository: str,
    *,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    scores: Mapping[str, str | Path] | None = None,
    revision: str = "main",
    private: bool = False,
    message: str | None = None,
    dry_run: str | Path | None = None,
) -> Any:
    """Upload a model to the Hugging Face Hub in one commit: its weights and config as `save_checkpoint` writes them, and a model card.

    A model whose folder has a model card keeps it, with the pictures in it that lie in the folder; what the arguments say is changed in
    its front matter. Otherwise a card is written.

    Args:
      model: a name or path that `load_checkpoint` accepts.
      repository: `OWNER/NAME`; it is created if it does not exist.
      license: the licence of the weights as the Hub abbreviates it, such as "apache-2.0"; by default, that of the model's card.
      datasets: the data sets of the training, by their names on the Hub; by default, those of the model's card.
      scores: maps names of test sets to the `summary.json` that `evaluate` wrote for them; by default, the scores of the model's card.
      revision: the branch to commit to; it is created if it does not exist.
      private: create the repository as a private one; an existing repository keeps its visibility.
      message: message of the commit.
      dry_run: a folder to write the files to; nothing is uploaded then.

    Returns:
      The address of the commit's page, or the folder `dry_run` as a Path.

    Raises:
      UserError: the model is missing, damaged or without weights, its licence is not known, the card is invalid, huggingface_hub is not
        installed, the user may not write to the repository, or the Hub cannot be reached.
    """
    from aecr_jax import __version__
    from aecr_jax.files import make_folder, refuse_existing
    from aecr_jax.inference.hub import check_repository, check_revision, import_hub, upload_folder
    from aecr_jax.inference.weights import load_with_info, model_folder, refuse_model, save_checkpoint
    from aecr_jax.networks.registry import has_parameters

    check_repository(repository)
    check_revision(revision)
    import_hub()
    if dry_run is not None:
        refuse_model(dry_run)
        refuse_existing(Path(dry_run) / _CARD)
    found = [_read_summary(name, Path(file)) for name, file in (scores or {}).items()]
    source = model_folder(model)
    network, info = load_with_info(model)
    if not has_parameters(network.config):
        raise UserError(f"{network.name} has no weights to push")
    about = {"name": network.name, "aecr_jax": __version__} | info.get("about", {})
    old, body = _read_card(source / _CARD) if (source / "model.safetensors").is_file() else ({}, "")
    license = license or old.get("license") or about.get("license")
    if not license:
        raise UserError(f"the licence of {network.name} is not known: add --license, such as --license apache-2.0")
    try:
        found = found or _known_scores(old)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{source / _CARD} has scores that are not those of a shipped model's card: {type(error).__name__}: {error}"
        ) from error
    changed = {"license": license, "library_name": _LIBRARY, "pipeline_tag": _PIPELINE}
    tags = {"tags": ["image-dehazing", network.config.NAME.replace("_", "-"), "jax", "flax"]}
    metadata = tags | old | changed | ({"datasets": list(datasets)} if datasets else {}) | _index(about["name"], found)
    body = body or _describe(network, about["name"], license, found)
    body, pictures = _make_portable(body, source)
    if "hf://" not in body:
        body = f"{body.rstrip()}\n\n## Use\n\n{_usage(repository, revision)}\n"
    card = f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=120)}---\n\n{body.strip()}\n"
    check_card(card)
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(temporary if dry_run is None else dry_run)
        save_checkpoint(network, folder, about | {"license": license})
        (folder / _CARD).write_text(card)
        for picture in pictures:
            shutil.copyfile(picture, folder / picture.name)
        if dry_run is not None:
            return folder
        message = message or f"Upload {about['name']} with aecr-jax {__version__}"
        return upload_folder(folder, repository, revision=revision, private=private, message=message)


def check_card(text: str) -> None:
    """Check the front matter of a model card as far as that is possible without the Hub, which checks it again during the upload.

    Raises:
      UserError: there is no front matter, it cannot be parsed, or an entry is missing or invalid.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import validate_repo_id

    try:
        data = ModelCard(text).data
        for key in ("license", "library_name", "pipeline_tag"):
            if not isinstance(data.get(key), str) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", data[key]):
                raise ValueError(f"{key} (={data.get(key)!r}) must be one of the Hub's names in lower case, such as apache-2.0")
        for key in ("tags", "datasets", "metrics"):
            if not isinstance(data.get(key) or [], list) or not all(isinstance(value, str) and value for value in data.get(key) or []):
                raise ValueError(f"{key} (={data.get(key)!r}) must be a list of names")
        for name in data.get("datasets") or []:
            validate_repo_id(name)
        for result in data.get("eval_results") or []:
            if not isinstance(result.metric_value, int | float):
                raise ValueError(f"the score {result.metric_type} (={result.metric_value!r}) on {result.dataset_name} must be a number")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"the model card's front matter is invalid: {first_line(error)}") from error


def _name_and_file(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not (name.strip() and equals and file):
        raise UserError(f"--scores (={text}) must be NAME=FILE, such as 'SOTS indoor=results/summary.json'")
    return name.strip(), file


def _read_summary(name: str, file: Path) -> Evaluation:
    """Read a `summary.json` of `eval`."""
    try:
        summary = json.loads(file.read_text())
        # Summaries of versions that had no choice of metrics do not list them.
        metrics = list(summary.get("metrics", ("psnr", "ssim")))
        restored = {metric: float(summary[metric]) for metric in metrics}
        hazy = {metric: float(summary[f"input_{metric}"]) for metric in metrics}
        return Evaluation(name, int(summary["images"]), restored, hazy)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--scores {name}={file} is not a summary.json of eval with scores: {type(error).__name__}: {error}") from error


def _known_scores(metadata: Mapping[str, Any]) -> list[Evaluation]:
    """Return the scores of a shipped model's card."""
    metrics = ("psnr", "ssim")
    return [
        Evaluation(_SETS[key], score["images"], {m: score[m] for m in metrics}, {m: score[f"input_{m}"] for m in metrics})
        for key, score in metadata.get("scores", {}).items()
        if key in _SETS
    ]


def _read_card(path: Path) -> tuple[dict[str, Any], str]:
    """Return the front matter and the text of a model card; both are empty if there is none."""
    if not path.is_file():
        return {}, ""
    try:
        text = path.read_text()
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else {}
        if not isinstance(metadata, dict):
            raise ValueError("it is not a mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"the front matter of {path} cannot be read: {first_line(error)}") from error
    return metadata, text[match.end() :] if match else text


def _index(model: str, scores: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the entries `metrics` and `model-index` for scores, or nothing if there are none."""
    from aecr_jax.inference.scores import METRICS

    if not scores:
        return {}
    results = [
        {
            "task": {"type": _PIPELINE, "name": "Image dehazing"},
            "dataset": {"name": f"{test.name} ({test.images} images)", "type": re.sub(r"[^a-z0-9]+", "-", test.name.lower()).strip("-")},
            "metrics": [
                {"type": metric, "value": value, "name": METRICS[metric].title if metric in METRICS else metric}
                for metric, value in test.restored.items()
            ],
        }
        for test in scores
    ]
    names = list(dict.fromkeys(metric for test in scores for metric in test.restored))
    return {"metrics": names, "model-index": [{"name": model, "results": results}]}


def _describe(network: Any, name: str, license: str, scores: Sequence[Evaluation]) -> str:
    """Return the text of a card for a model that has none."""
    from aecr_jax.inference.scores import METRICS
    from aecr_jax.networks.arrays import count_parameters

    facts = [("network", f"`{network.config.NAME}`"), ("parameters", f"{count_parameters(network):,}")]
    facts += [("optimizer steps", f"{network.step:,}")] if isinstance(network.step, int) else []
    lines = [f"# Model card: {name}", "", "A model that removes haze from photographs.", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in facts]
    if scores:
        lines += ["", "## Scores", "", "| test set | images | metric | hazy | restored |", "|---|---|---|---|---|"]
    for test in scores:
        for metric, value in test.restored.items():
            title, digits = (METRICS[metric].title, METRICS[metric].digits) if metric in METRICS else (metric, 4)
            lines.append(f"| {test.name} | {test.images} | {title} | {test.hazy[metric]:.{digits}f} | {value:.{digits}f} |")
    return "\n".join([*lines, "", "## Licence", "", f"The weights are under the licence `{license}`."])


def _usage(repository: str, revision: str) -> str:
    address = f"hf://{repository}" + (f"@{revision}" if revision != "main" else "")
    lines = ["import aecr_jax", "from PIL import Image", ""]
    lines.append(f'aecr_jax.dehaze(Image.open("photo.jpg"), "{address}").save("dehazed.png")')
    return "\n".join(["With the package aecr-jax and its extra `hub`:", "", "```python", *lines, "```"])


def _make_portable(body: str, source: Path) -> tuple[str, list[Path]]:
    """Replace links to files that are not uploaded by their text; return the new text and the pictures that have to be uploaded."""
    pictures: dict[str, Path] = {}

    def replace(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        if mark and re.fullmatch(r"[\w-]+\.(png|jpe?g|webp)", target) and (source / target).is_file():
            pictures[target] = source / target
            return match[0]
        return text

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replace, body), list(pictures.values())
