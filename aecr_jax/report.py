"""One HTML page about a training run: scores, curves, pictures, settings, versions. It needs no other file and no network."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aecr_jax.errors import UserError
from aecr_jax.runlog import CONFIG, METRICS, PANELS, VERSIONS

_POINTS, _SHOWN_PANELS, _PANEL_WIDTH = 400, 4, 1200
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 460, 230, 58, 28, 12, 12
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")
_LEVELS = range(1, 6)

# Title -> kind of line in metrics.jsonl, names in it, whether the axis is logarithmic.
_CURVES: list[tuple[str, str, list[str], bool]] = [
    ("PSNR (dB), RGB", "eval", ["psnr", "input_psnr"], False),
    ("SSIM", "eval", ["ssim", "input_ssim"], False),
    ("L1", "train", ["l1"], True),
    ("contrastive regularization", "train", ["cr"], False),
    ("distance to the clear image, by feature level", "train", [f"d_ap_{i}" for i in _LEVELS], True),
    ("distance to the hazy image, by feature level", "train", [f"d_an_{i}" for i in _LEVELS], True),
    ("norms of gradient and update", "train", ["grad_norm", "update_norm"], True),
    ("norm of the parameters", "train", ["param_norm"], False),
    ("mixup factors", "train", ["mix1", "mix2"], False),
    ("offsets of the deformable layers (pixels)", "train", ["offset_mean", "offset_max"], True),
    ("learning rate", "train", ["learning_rate"], False),
    ("images per second", "train", ["images_per_second"], False),
    ("share of time waiting for data", "train", ["waiting_for_data"], False),
]

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --paper: #ffffff; --card: #f9fafb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --paper: #111827; --card: #1f2937; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { margin: 0 auto; max-width: 1000px; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 12px; } p { margin: 4px 0; color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
figcaption { font-size: 14px; font-weight: 600; margin-bottom: 4px; } img { width: 100%; border-radius: 4px; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); } .axis { stroke: var(--line); }
table { border-collapse: collapse; } td, th { padding: 3px 16px 3px 0; text-align: left; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; } .key { font-size: 12px; color: var(--soft); margin-right: 12px; }
summary { cursor: pointer; } .key { white-space: nowrap; display: inline-block; }
"""


def write_report(workdir: str | Path) -> Path:
    """Writes `report.html` into the work directory of a run, finished or not.

    Returns:
      The file's path.

    Raises:
      UserError: the folder is no work directory of a run, its files are damaged, or the page cannot be written.
    """
    workdir = Path(workdir)
    if not (workdir / METRICS).is_file():
        raise UserError(f"{workdir} is no work directory of a run: looked for {workdir / METRICS}")
    try:
        entries = [json.loads(line) for line in (workdir / METRICS).read_text().splitlines() if line.endswith("}")]
        config, versions = (json.loads((workdir / name).read_text()) for name in (CONFIG, VERSIONS))
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir} has a file that cannot be read: {error}") from error
    if not entries:
        raise UserError(f"{workdir / METRICS} is empty: the run has logged nothing yet")
    page = _page(workdir, entries, config, versions)
    path = workdir / "report.html"
    try:
        path.write_text(page)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _page(workdir: Path, entries: list[dict[str, Any]], config: dict[str, Any], versions: dict[str, Any]) -> str:
    name = html.escape(workdir.resolve().name)
    curves = [_figure(title, *_series(entries, kind, names), log=log) for title, kind, names, log in _CURVES]
    total = config["train"]["steps"]
    last = max(entry["step"] for entry in entries)
    state = "complete" if last >= total else f"step {last:,} of {total:,}"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>{name}: training run</title><style>{_STYLE}</style></head><body>",
        f"<h1>{name}</h1><p>aecr-jax training run, {state}; {html.escape(versions['devices'])}, {versions['processes']} process(es)</p>",
        "<h2>Scores</h2>",
        _scores([entry for entry in entries if entry["kind"] == "eval"]),
        "<h2>Curves</h2><div class='grid'>",
        *(curve for curve in curves if curve),
        "</div>",
        *_panels(workdir),
        "<h2>Settings</h2>",
        *(f"<details><summary>{section}</summary>{_table(config[section])}</details>" for section in config),
        "<h2>Versions</h2>",
        _table({key: value for key, value in versions.items() if key != "packages"} | versions["packages"]),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _scores(evaluations: list[dict[str, Any]]) -> str:
    if not evaluations:
        return "<p>Not evaluated yet.</p>"
    best = max(evaluations, key=lambda entry: entry["psnr"])
    last = evaluations[-1]
    rows = [("best", best["step"], best["psnr"], best["ssim"]), ("last", last["step"], last["psnr"], last["ssim"])]
    rows += [("hazy input", "", last["input_psnr"], last["input_ssim"])]
    cells = "".join(f"<tr><th>{name}</th><td>{step}</td><td>{psnr:.2f}</td><td>{ssim:.4f}</td></tr>" for name, step, psnr, ssim in rows)
    about = f"{last['images']} images of {html.escape(str(last.get('data', '')))}; PSNR and SSIM on RGB as in the official code"
    weights = "; moving average of the parameters" if last.get("weights") == "ema" else ""
    return f"<table><tr><th></th><th>step</th><th>PSNR (dB)</th><th>SSIM</th></tr>{cells}</table><p>{about}{weights}</p>"


def _series(entries: list[dict[str, Any]], kind: str, names: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps and values of each name that was logged, in at most `_POINTS` bins of means."""
    rows = [entry for entry in entries if entry["kind"] == kind]
    present = [name for name in names if rows and name in rows[-1]]
    steps = np.array([entry["step"] for entry in rows], float)
    values = {name: np.array([entry.get(name, math.nan) for entry in rows], float) for name in present}
    if len(steps) > _POINTS:
        bins = np.array_split(np.arange(len(steps)), _POINTS)
        values = {name: np.array([array[part].mean() for part in bins]) for name, array in values.items()}
        steps = np.array([steps[part].mean() for part in bins])
    return steps, values


def _figure(title: str, steps: np.ndarray, values: dict[str, np.ndarray], *, log: bool) -> str:
    latest = {name: array[-1] for name, array in values.items()}
    if log:
        values = {name: np.where(array > 0, array, np.nan) for name, array in values.items()}
    everything = np.concatenate(list(values.values())) if values else np.zeros(0)
    everything = everything[np.isfinite(everything)]
    if not everything.size:
        return ""
    ticks = _log_ticks(everything) if log else _ticks(float(everything.min()), float(everything.max()))
    scale = np.log10 if log else np.asarray
    low, high = float(scale(ticks[0])), float(scale(ticks[-1]))
    first, last = float(steps.min()), max(float(steps.max()), float(steps.min()) + 1)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(step: float) -> float:
        return _LEFT + width * (step - first) / (last - first)

    def y(value: float) -> float:
        return _TOP + height * (1 - (float(scale(value)) - low) / (high - low))

    marks = [
        f"<line class='axis' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y(t):.1f}' y2='{y(t):.1f}'/>"
        f"<text x='{_LEFT - 6}' y='{y(t) + 4:.1f}' text-anchor='end'>{t:.4g}</text>"
        for t in ticks
    ]
    marks += [
        f"<text x='{x(t):.1f}' y='{_HEIGHT - 8}' text-anchor='middle'>{t:,.0f}</text>" for t in _ticks(first, last, 4) if first <= t <= last
    ]
    keys = []
    for (name, array), colour in zip(values.items(), _COLOURS):
        points = [(x(s), y(v)) for s, v in zip(steps, array) if np.isfinite(v)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        marks.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='1.6' stroke-linejoin='round'/>")
        if len(points) < 30:
            marks += [f"<circle cx='{a:.1f}' cy='{b:.1f}' r='2.5' fill='{colour}'/>" for a, b in points]
        keys.append(f"<span class='key'><span style='color:{colour}'>&#9632;</span> {html.escape(name)} {latest[name]:.4g}</span>")
    picture = f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{html.escape(title)} over steps'>{''.join(marks)}</svg>"
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{picture}<div>{''.join(keys)}</div></figure>"


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that enclose [low, high]."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first = math.floor(low / step + 1e-9)
    ticks = [first * step]
    while ticks[-1] < high - 1e-9 * span or len(ticks) < 2:
        ticks.append((first + len(ticks)) * step)
    return ticks


def _log_ticks(values: np.ndarray) -> list[float]:
    """Powers of ten that enclose the values, or 1, 2, 5 times them where they span little."""
    low, high = float(values.min()), float(values.max())
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
    if last - first > 6:
        return [10.0**power for power in range(first, last + 1, -(-(last - first) // 6))] + [10.0**last]
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in ((1, 2, 5) if last - first <= 2 else (1,))]
    below = [tick for tick in ticks if tick <= low * (1 + 1e-9)][-1:]
    inside = [tick for tick in ticks if low * (1 + 1e-9) < tick < high]
    return below + inside + [tick for tick in ticks if tick >= high and tick not in below][:1]


def _panels(workdir: Path) -> list[str]:
    paths = sorted((workdir / PANELS).glob("step_*.png"))
    if not paths:
        return []
    # The first, the last, and some between.
    chosen = sorted({round(i * (len(paths) - 1) / max(1, _SHOWN_PANELS - 1)) for i in range(_SHOWN_PANELS)}, reverse=True)
    parts = ["<h2>Pictures</h2><p>hazy | restored | clear</p>"]
    for path in (paths[i] for i in chosen):
        try:
            image: Image.Image = Image.open(path).convert("RGB")
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        image.thumbnail((_PANEL_WIDTH, 10**6))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        step = int(path.stem.removeprefix("step_"))
        parts.append(
            f"<figure><figcaption>step {step:,}</figcaption><img alt='panel of step {step}' src='data:image/jpeg;base64,{data}'></figure>"
        )
    return parts


def _table(values: dict[str, Any]) -> str:
    rows = (f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>" for key, value in values.items())
    return f"<table>{''.join(rows)}</table>"
