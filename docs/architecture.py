"""Draws `docs/pictures/architecture.svg`, the packages of `aecr_jax` and their imports: `python docs/architecture.py`."""

import ast
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).parent / "pictures" / "architecture.svg"
# Package -> what it has, and where it is drawn: column and row, from the left and from below.
PACKAGES = {
    "ops": ("deformable convolution", 0, 0),
    "data": ("folders, data sets, haze, grain pipeline", 1, 0),
    "networks": ("one file per network, registry by name", 0, 1),
    "inference": ("load, save, dehaze, evaluate, compare", 0.3, 3),
    "losses": ("L1, contrastive regularization, others; VGG", 1.6, 2),
    "training": ("settings, step, trainer, checkpoints, report", 1, 4),
    "convert": ("weights of other projects", 2, 4),
    "export": ("ONNX graphs, StableHLO programs", 0, 5),
    "benchmark": ("speed, PyTorch twins", 1, 5),
    "reproduce": ("the paper's tables: rows, claims", 2, 5),
    "web": ("a page that dehazes in the browser", 0, 6),
    "__main__": ("commands and exit statuses", 1.3, 7),
}
_WIDTH, _HEIGHT, _COLUMN, _ROW, _GAP = 270, 50, 290, 95, 10


def imports() -> dict[str, set[str]]:
    """Return which packages of `PACKAGES` each of them imports."""
    graph: dict[str, set[str]] = {}
    for name in PACKAGES:
        path = ROOT / "aecr_jax" / name
        files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
        nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
        modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        found = {module.split(".")[1] for module in modules if module.startswith("aecr_jax.")}
        graph[name] = (found & set(PACKAGES)) - {name}
    return graph


def draw(graph: Mapping[str, set[str]]) -> str:
    """Return the SVG. An arrow points from a package to what it imports; arrows that follow from others are left out."""
    columns, rows = (max(place[i] for place in PACKAGES.values()) for i in (1, 2))
    width, height = columns * _COLUMN + _WIDTH + 2 * _GAP, rows * _ROW + _HEIGHT + 2 * _GAP
    corner = {name: (_GAP + column * _COLUMN, _GAP + (rows - row) * _ROW) for name, (_, column, row) in PACKAGES.items()}
    shapes = []
    for name, below in graph.items():
        implied = {deep for other in below for deep in _reached(other, graph)}
        for other in sorted(below - implied):
            (x1, y1), (x2, y2) = corner[name], corner[other]
            ends = f'x1="{x1 + _WIDTH / 2:g}" y1="{y1 + _HEIGHT:g}" x2="{x2 + _WIDTH / 2:g}" y2="{y2 - 2:g}"'
            shapes.append(f'<line {ends} stroke="#667" marker-end="url(#tip)"/>')
    for name, (x, y) in corner.items():
        title = name if name == "__main__" else f"{name}/"
        shapes += [
            f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#eef3fa" stroke="#667"/>',
            f'<text x="{x + _WIDTH / 2:g}" y="{y + 21:g}" font-size="15" font-weight="bold">{title}</text>',
            f'<text x="{x + _WIDTH / 2:g}" y="{y + 39:g}" font-size="12">{PACKAGES[name][0]}</text>',
        ]
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" text-anchor="middle">'
    defs = f'<defs>{tip}<path d="M0 0L8 4L0 8z" fill="#667"/></marker></defs>'
    return "\n".join([head, defs, f'<rect width="{width:g}" height="{height:g}" fill="white"/>', *shapes, "</svg>", ""])


def _reached(name: str, graph: Mapping[str, set[str]]) -> set[str]:
    return graph[name] | {deep for below in graph[name] for deep in _reached(below, graph)}


if __name__ == "__main__":
    PICTURE.write_text(draw(imports()))
