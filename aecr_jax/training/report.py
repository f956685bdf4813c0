"""Write one HTML page about a training run: scores, curves, pictures, settings, versions. It needs no other files and no network.

A run may be damaged or come from an untrusted source, so each part is checked as it is read, and the template escapes everything.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image, UnidentifiedImageError

from aecr_jax.errors import UserError, first_line
from aecr_jax.files import replacing
from aecr_jax.storage import as_path, check_readable, is_remote, resolve
from aecr_jax.training.runlog import CONFIG, METRICS, PANELS, VERSIONS

_POINTS, _SHOWN_PANELS, _PANEL_WIDTH = 400, 4, 1200
_PLOT = {"width": 460, "height": 230, "left": 58, "bottom": 28, "top": 12, "right": 12}
_LEVELS = range(1, 17)  # VGG-19 has sixteen layers

# Title, kind of line in metrics.jsonl, names in it, and whether the axis is logarithmic.
_CURVES: list[tuple[str, str, list[str], bool]] = [
    ("PSNR (dB), RGB", "eval", ["psnr", "input_psnr"], False),
    ("SSIM", "eval", ["ssim", "input_ssim"], False),
    ("pixel distance", "train", ["l1", "l2", "smooth_l1"], True),
    ("squared error of the transmission", "train", ["mse"], True),
    ("perceptual loss and distillation", "train", ["perceptual", "distillation"], True),
    ("contrastive regularization", "train", ["cr"], False),
    ("distance to the clear image, by feature level", "train", [f"d_ap_{i}" for i in _LEVELS], True),
    ("distance to the negatives, by feature level", "train", [f"d_an_{i}" for i in _LEVELS], True),
    (
        "gradient norms of regularization and pixel distance, at the image",
        "train",
        ["grad_norm_cr", "grad_norm_l1", "grad_norm_l2", "grad_norm_smooth_l1"],
        True,
    ),
    ("norms of gradient and update", "train", ["grad_norm", "update_norm"], True),
    ("norm of the parameters", "train", ["param_norm"], False),
    ("mixup factors", "train", ["mix1", "mix2"], False),
    ("offsets of the deformable layers (pixels)", "train", ["offset_mean", "offset_max"], True),
    ("learning rate", "train", ["learning_rate"], False),
    ("images per second", "train", ["images_per_second"], False),
    ("shares of time spent waiting for data and saving", "train", ["waiting_for_data", "saving"], False),
    ("share of the devices' peak (model FLOPs utilization)", "train", ["model_flops_utilization"], False),
]

_Note = Callable[[str], None]
_Entry = dict[str, Any]


class _Kind(NamedTuple):
    """A type of value: its name in notes, and a function that tells whether a value is of that type."""

    name: str
    accepts: Callable[[Any], bool]


_COUNT = _Kind("a whole number", lambda value: type(value) is int and 0 <= value < 2**53)
_NUMBER = _Kind("a number", lambda value: type(value) is float or (type(value) is int and abs(value) < 2**53))
_TEXT = _Kind("a string", lambda value: isinstance(value, str))
_OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
# Name in a line of metrics.jsonl -> type that its value must have.
_FIELDS = {name: _NUMBER for _, _, names, _ in _CURVES for name in names} | {"images": _COUNT, "data": _TEXT, "weights": _TEXT}
# What a note calls a value that is not an object.
_TYPES = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def write_report(workdir: str | Path) -> Path:
    """Write `report.html` into the work directory of a run, finished or not.

    Parts that cannot be read are listed on the page and on standard error, one line each; all other parts are shown.

    Returns:
      The file's path.

    Raises:
      UserError: the folder is not the work directory of a run, nothing in it can be shown, or the page cannot be written.
    """
    workdir = as_path(workdir)
    check_readable(workdir)
    notes: list[str] = []
    entries = _read_metrics(workdir, notes.append)
    config, versions = (_read_object(workdir, name, notes.append) for name in (CONFIG, VERSIONS))
    panels = _read_panels(workdir, notes.append)
    # An exported model also has a config.json, but without training settings.
    if not (entries or versions or panels or "optim" in config or "train" in config):
        raise UserError(_printable(f"{workdir} is not the work directory of a run, or its files cannot be read: {'; '.join(notes)}"))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aecr_jax.training", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    figures = [_figure(title, _series(entries, kind, names, log=log), log=log) for title, kind, names, log in _CURVES]
    context = {
        "name": resolve(workdir).name,
        "about": _about(entries, config, versions, notes.append),
        "scores": _scores([entry for entry in entries if entry["kind"] == "eval"]),
        "figures": [figure for figure in figures if figure],
        "plot": _PLOT,
        "panels": panels,
        "settings": _settings(config, notes.append),
        "versions": _versions(versions, notes.append),
    }
    notes = [_printable(note) for note in notes]
    page = environment.get_template("report.html.jinja").render(context, notes=notes)
    path = workdir / "report.html"
    with replacing(path) as partial:
        partial.write_bytes(page.encode(errors="replace"))  # JSON may hold unpaired surrogates
    for note in notes:
        print(f"aecr_jax: {_printable(str(workdir))}: {note}", file=sys.stderr)
    return path


def _read_metrics(workdir: Path, note: _Note) -> list[_Entry]:
    """Return the entries of `metrics.jsonl`, sorted by step.

    Each has an integer `step` and a known `kind`; values of the wrong type are removed. A note is added for each kind of fault.
    """
    faults: dict[str, list[int]] = {}
    entries = []
    for number, line in enumerate(_read(workdir, METRICS, note).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = _parse(line)
        except ValueError as error:
            faults.setdefault(str(error), []).append(number)
            continue
        if not _COUNT.accepts(entry.get("step")):
            faults.setdefault(f"`step` is missing or not {_COUNT.name}", []).append(number)
        elif entry.get("kind") not in ("start", "train", "eval"):
            faults.setdefault('`kind` is missing or none of "start", "train" and "eval"', []).append(number)
        else:
            for name, kind in _FIELDS.items():
                if name in entry and not kind.accepts(entry[name]):
                    del entry[name]
                    faults.setdefault(f"`{name}` is not {kind.name}", []).append(number)
            entries.append(entry)
    for fault, lines in faults.items():
        where = f"line {lines[0]}" + (f" and {len(lines) - 1} more" if lines[1:] else "")
        note(f"{METRICS}, {where}: {fault}")
    return sorted(entries, key=lambda entry: entry["step"])


def _read_object(workdir: Path, name: str, note: _Note) -> dict[str, Any]:
    """Read a file that holds one JSON object; if it is missing or holds something else, add a note and return an empty dict."""
    if not (text := _read(workdir, name, note)):
        return {}
    try:
        value = _parse(text)
    except ValueError as error:
        note(f"{name}: {error}")
        return {}
    if not value:
        note(f"{name} is empty")
    return value


def _read(workdir: Path, name: str, note: _Note) -> bytes:
    path = workdir / name
    try:
        if path.exists() and not path.is_file():  # a pipe would block
            note(f"{name} is not a file")
        elif (text := path.read_bytes()).strip():
            return text
        else:
            note(f"{name} is empty")
    except FileNotFoundError:
        note(f"{name} is missing")
    except OSError as error:
        note(f"{name} cannot be read: {error.strerror or error}")
    return b""


def _parse(text: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
      ValueError: the text is something else.
    """
    try:
        value = json.loads(text.decode(errors="replace"))
    except ValueError as error:
        raise ValueError("it is not JSON") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it contains {_TYPES[type(value)]} instead of a JSON object")
    return value


def _read_panels(workdir: Path, note: _Note) -> list[tuple[str, str]]:
    """Return captions and base64-encoded JPEG images of some panels, newest first; names without a number come before all others."""

    def step(path: Path) -> float:
        match = re.fullmatch("step_([0-9]+)", path.stem)
        return int(match[1]) if match else math.inf

    try:
        paths = sorted((workdir / PANELS).glob("step_*.png"), key=lambda path: (step(path), path.name))
    except OSError as error:
        note(f"{PANELS} cannot be read: {error.strerror or error}")
        return []
    # The first, the last, and some in between.
    chosen = sorted({round(i * (len(paths) - 1) / (_SHOWN_PANELS - 1)) for i in range(_SHOWN_PANELS)}, reverse=True) if paths else []
    panels = []
    for path in (paths[i] for i in chosen):
        try:
            data = base64.b64encode(_read_panel(path)).decode()
        except UnidentifiedImageError:
            note(f"{PANELS}/{path.name} cannot be read: it is not a PNG image")
        except Exception as error:  # Pillow's decoders raise many types of exceptions for damaged files
            note(f"{PANELS}/{path.name} cannot be read: {first_line(error)}")
        else:
            panels.append((f"step {step(path):,}" if step(path) < math.inf else path.stem, data))
    return panels


def _read_panel(path: Path) -> bytes:
    if not path.is_file():
        raise OSError("it is not a file")
    # Accept only PNG, the format that runs write: some of Pillow's other decoders start programs.
    file = io.BytesIO(path.read_bytes()) if is_remote(path) else path
    with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning), Image.open(file, formats=["PNG"]) as image:
        image.thumbnail((_PANEL_WIDTH, 10**6))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _about(entries: list[_Entry], config: dict[str, Any], versions: dict[str, Any], note: _Note) -> str:
    """Describe how far the run has got, and on which devices."""
    optim = config.get("optim", config.get("train"))  # the latter in runs of version 0.1.0
    values = {"optim.steps": optim["steps"]} if isinstance(optim, dict) and "steps" in optim else {}
    total = _value(values, "optim.steps", _COUNT, CONFIG, note) if config else None
    last = entries[-1]["step"] if entries else 0
    state = f"step {last:,}" + ("" if total is None else f" of {total:,}")
    parts = ["complete" if total is not None and last >= total else state]
    if versions:
        devices = _value(versions, "devices", _TEXT, VERSIONS, note)
        processes = _value(versions, "processes", _COUNT, VERSIONS, note)
        parts += [text for text in (devices, processes and f"{processes} process(es)") if text]
    return "; ".join([parts[0], ", ".join(parts[1:])]) if parts[1:] else parts[0]


def _value(values: dict[str, Any], name: str, kind: _Kind, file: str, note: _Note) -> Any:
    """Return the value of that name; if it is missing or of another type, add a note and return None."""
    if name in values and kind.accepts(values[name]):
        return values[name]
    note(f"{file}: `{name}` is {f'not {kind.name}' if name in values else 'missing'}")
    return None


def _settings(config: dict[str, Any], note: _Note) -> list[tuple[str, list[tuple[str, str]]]]:
    sections = [(name, _rows(section, note)) for name, section in config.items() if isinstance(section, dict)]
    if others := {name: value for name, value in config.items() if not isinstance(value, dict)}:
        note(f"{CONFIG}: these are not sections of settings: {', '.join(f'`{name}`' for name in others)[:200]}")
        sections.append(("outside of sections", _rows(others, note)))
    return sections


def _versions(versions: dict[str, Any], note: _Note) -> list[tuple[str, str]]:
    if not versions or (packages := _value(versions, "packages", _OBJECT, VERSIONS, note)) is None:
        return _rows(versions, note)
    return _rows({key: value for key, value in versions.items() if key != "packages"}, note) + _rows(packages, note)


def _rows(values: dict[str, Any], note: _Note) -> list[tuple[str, str]]:
    rows = []
    for key, value in values.items():
        try:
            rows.append((key, str(value)))
        except RecursionError:
            note(f"`{key[:200]}` is nested too deeply")
    return rows


def _printable(text: str) -> str:
    """Put the text on one line, without characters that move a terminal's cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _scores(evaluations: list[_Entry]) -> dict[str, Any]:
    if not evaluations:
        return {"rows": []}

    def row(title: str, step: str, entry: _Entry, prefix: str = "") -> tuple[str, ...]:
        cells = (f"{entry[name]:{form}}" if name in entry else "?" for name, form in ((f"{prefix}psnr", ".2f"), (f"{prefix}ssim", ".4f")))
        return (title, step, *cells)

    last = evaluations[-1]
    best = max(evaluations, key=lambda entry: -math.inf if math.isnan(psnr := entry.get("psnr", math.nan)) else psnr)
    rows = [row("best", str(best["step"]), best), row("last", str(last["step"]), last), row("hazy input", "", last, "input_")]
    about = f"{last.get('images', '?')} images of {last.get('data', '?')}; PSNR and SSIM on RGB as in the official code"
    return {"rows": rows, "about": about + ("; moving average of the parameters" if last.get("weights") == "ema" else "")}


def _series(entries: list[_Entry], kind: str, names: list[str], *, log: bool) -> dict[str, tuple[float, np.ndarray]]:
    """Return the curves of those names that were logged.

    Returns:
      By name: the last value, and an `[N, 2]` array of steps and values that can be drawn, averaged in bins if there are more than
      `_POINTS` of them.
    """
    series = {}
    for name in names:
        logged = np.array([(entry["step"], entry[name]) for entry in entries if entry["kind"] == kind and name in entry], float)
        if not len(logged):
            continue
        # These are the limits of float32; values beyond them would overflow in the arithmetic of the axes.
        values = np.where(np.abs(logged[:, 1]) < 1e-38, 0, logged[:, 1])
        drawn = np.column_stack([logged[:, 0], values])[(np.abs(values) < 1e38) & ((values > 0) | (not log))]
        if len(drawn) > _POINTS:
            drawn = np.array([part.mean(0) for part in np.array_split(drawn, _POINTS)])
        series[name] = float(logged[-1, 1]), drawn
    return series


def _figure(title: str, series: dict[str, tuple[float, np.ndarray]], *, log: bool) -> dict[str, Any] | None:
    """Return the coordinates and texts of one plot, or None if there is nothing to draw."""
    if not any(len(drawn) for _, drawn in series.values()):
        return None
    steps, values = np.concatenate([drawn for _, drawn in series.values()]).T
    marks = log_ticks(values) if log else ticks(float(values.min()), float(values.max()))
    scale = np.log10 if log else np.asarray
    low, high = float(scale(marks[0])), float(scale(marks[-1]))
    first, last = float(steps.min()), max(float(steps.max()), float(steps.min()) + 1)
    width, height = _PLOT["width"] - _PLOT["left"] - _PLOT["right"], _PLOT["height"] - _PLOT["top"] - _PLOT["bottom"]

    def x(step: float) -> str:
        return f"{_PLOT['left'] + width * (step - first) / (last - first):.1f}"

    def y(value: float) -> str:
        return f"{_PLOT['top'] + height * (1 - (float(scale(value)) - low) / (high - low)):.1f}"

    return {
        "title": title,
        "x_ticks": [(x(t), f"{t:,.0f}") for t in ticks(first, last, 4) if first <= t <= last],
        "y_ticks": [(y(t), f"{t:.4g}") for t in marks],
        "lines": [
            {"name": name, "latest": f"{latest:.4g}", "points": [(x(s), y(v)) for s, v in drawn]}
            for name, (latest, drawn) in series.items()
        ],
    }


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers that enclose [low, high]."""
    largest = max(abs(low), abs(high))
    span = high - low if high - low > 1e-9 * largest else largest or 1.0  # means of equal values may differ in their last bits
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first = math.floor(low / step + 1e-9)
    marks = [first * step]
    while marks[-1] < high - 1e-9 * span or len(marks) < 2:
        marks.append((first + len(marks)) * step)
    return marks


def log_ticks(values: np.ndarray) -> list[float]:
    """Return powers of ten that enclose the values, or 1, 2 and 5 times powers of ten if the values span a small range."""
    low, high = float(values.min()), float(values.max())
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
    if last - first > 6:
        return [10.0**power for power in range(first, last + 1, -(-(last - first) // 6))] + [10.0**last]
    marks = [factor * 10.0**power for power in range(first, last + 1) for factor in ((1, 2, 5) if last - first <= 2 else (1,))]
    below = [tick for tick in marks if tick <= low * (1 + 1e-9)][-1:]
    inside = [tick for tick in marks if low * (1 + 1e-9) < tick < high]
    return below + inside + [tick for tick in marks if tick >= high and tick not in below][:1]
