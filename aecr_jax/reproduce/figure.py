"""PSNR over parameters of the rows of a table, as in Fig. 2 of the paper, drawn as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from aecr_jax.reproduce.results import Result
from aecr_jax.training.report import log_ticks, ticks

_LEFT, _TOP, _WIDTH, _HEIGHT, _LEGEND = 60, 16, 460, 320, 190
_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def draw_figure(rows: Mapping[str, Sequence[Result]]) -> str:
    """Return the SVG: one dot for each row at the mean of its seeds, with a line from its lowest to its highest score.

    The horizontal axis begins at 0, or is logarithmic if the numbers of parameters differ by more than a factor of ten.

    Args:
      rows: the results of each row, at least one.
    """
    sizes = np.array([results[0].parameters for results in rows.values()], float)
    scores = [[result.psnr for result in results] for results in rows.values()]
    log = sizes.max() > 10 * sizes.min()
    across = log_ticks(sizes) if log else ticks(0.0, float(sizes.max()), 4)
    upward = ticks(min(map(min, scores)), max(map(max, scores)))
    scale = np.log10 if log else np.asarray

    def x(size: float) -> float:
        low, high, value = (float(scale(number)) for number in (across[0], across[-1], size))
        return _LEFT + _WIDTH * (value - low) / (high - low)

    def y(score: float) -> float:
        return _TOP + _HEIGHT * (1 - (score - upward[0]) / (upward[-1] - upward[0]))

    bottom, right = _TOP + _HEIGHT, _LEFT + _WIDTH
    shapes = [f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#667"/>']
    for tick in across:
        shapes.append(f'<text x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick / 1e6:.4g}</text>')
    for tick in upward:
        shapes.append(f'<line x1="{_LEFT}" y1="{y(tick):.1f}" x2="{right}" y2="{y(tick):.1f}" stroke="#dde"/>')
        shapes.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    shapes.append(f'<text x="{_LEFT + _WIDTH / 2}" y="{bottom + 38}" text-anchor="middle">parameters (millions)</text>')
    middle = _TOP + _HEIGHT / 2
    shapes.append(f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">PSNR (dB)</text>')
    for i, (name, size, each) in enumerate(zip(rows, sizes, scores)):
        color, mean = _COLORS[i % len(_COLORS)], sum(each) / len(each)
        span = f'x1="{x(size):.1f}" y1="{y(min(each)):.1f}" x2="{x(size):.1f}" y2="{y(max(each)):.1f}"'
        shapes.append(f'<line {span} stroke="{color}" stroke-width="2"/>')
        shapes.append(
            f'<circle cx="{x(size):.1f}" cy="{y(mean):.1f}" r="5" fill="{color}"><title>{escape(name)}: {mean:.2f} dB</title></circle>'
        )
        shapes.append(f'<circle cx="{right + 18}" cy="{_TOP + 12 + 20 * i}" r="5" fill="{color}"/>')
        shapes.append(f'<text x="{right + 30}" y="{_TOP + 16 + 20 * i}">{escape(name)}</text>')
    width, height = right + _LEGEND, max(bottom + 50, _TOP + 20 * len(rows) + 20)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *shapes, "</svg>", ""])
