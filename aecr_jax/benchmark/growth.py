"""Benchmark of how time and memory grow with the image area and with the batch size; both should grow linearly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aecr_jax.benchmark.speed import (
    check_writable,
    describe_machine,
    first_seconds,
    headline,
    measure_peak,
    megabytes,
    summary,
    take_turns,
    without_cache,
    write_json,
)
from aecr_jax.benchmark.work import Work, prepare
from aecr_jax.compilation import available_memory
from aecr_jax.errors import UserError

_BATCH_SIZE = 128


def benchmark_growth(
    sizes: Sequence[int], batches: Sequence[int], *, width: int = 64, rounds: int = 3, output: str | Path, plot: str | Path | None = None
) -> dict[str, Any]:
    """Measure forward pass and train step (L1) over image sizes with a batch of 1 and over batches at 128x128, and print a table.

    The exponent of a row is `log(time / time before) / log(pixels / pixels before)`, where "before" is the previous row; it is 1 if the
    time grows linearly. A case that needs more memory than the machine has is listed but not run.

    Args:
      sizes: heights and widths, in ascending order.
      batches: numbers of images, in ascending order.
      width: width of the network.
      rounds: number of measured runs of each case.
      output: JSON file for the figures.
      plot: image file for a plot (needs matplotlib); None for no plot.

    Returns:
      The figures: `machine` and `rows`.

    Raises:
      UserError: matplotlib is missing, or a file cannot be written.
    """
    if plot is not None:
        kinds = _import_pyplot().gcf().canvas.get_supported_filetypes()
        if Path(plot).suffix.removeprefix(".") not in kinds:
            raise UserError(f"--plot (={plot}) must end in a kind of picture, such as .png or .svg")
        check_writable(plot)
    check_writable(output)
    figures: dict[str, Any] = {"machine": describe_machine(), "rounds": rounds, "rows": []}
    print(headline(figures["machine"]))
    print(f"{'':38}{'median ms':>10}{'exponent':>10}{'first s':>9}{'peak MB':>9}{'temp MB':>9}{'bytes/pixel':>13}", flush=True)
    with without_cache():
        for kind in ("model", "train"):
            series = {
                "area": [Work(kind, size=size, width=width) for size in sizes],
                "batch": [Work(kind, batch, _BATCH_SIZE, width=width) for batch in batches],
            }
            for over, works in series.items():
                before: dict[str, Any] = {}
                for work in works:
                    row = _measure(work, rounds) | {"over": over}
                    _print(row, before)
                    before = row
                    figures["rows"].append(row)
                    write_json(output, figures)
    print(f"figures: {output}")
    if plot is not None:
        _draw(figures["rows"], plot)
        print(f"plot: {plot}")
    return figures


def _measure(work: Work, rounds: int) -> dict[str, Any]:
    pixels = work.batch * work.size**2
    row: dict[str, Any] = {"work": str(work), "kind": work.kind, "batch": work.batch, "size": work.size, "pixels": pixels}
    prepared = prepare(work)
    row |= {"compile_s": prepared.compile_s, "temporary_bytes": prepared.temporaries}
    available = _available()
    if available is not None and 1.2 * prepared.temporaries > available:
        return row | {"available_bytes": available}
    row |= {"first_s": first_seconds(prepared), "peak_bytes": measure_peak(prepared)}
    return row | summary(take_turns([prepared.run], rounds)[0])


def _print(row: dict[str, Any], before: dict[str, Any]) -> None:
    start = f"{row['work']:38}"
    if "median_s" not in row:
        needed, free = (row[name] / 1e9 for name in ("temporary_bytes", "available_bytes"))
        print(f"{start} not run: {needed:.1f} GB of temporaries, {free:.1f} GB free", flush=True)
        return
    exponent = ""
    if "median_s" in before:
        row["exponent"] = math.log(row["median_s"] / before["median_s"]) / math.log(row["pixels"] / before["pixels"])
        exponent = f"{row['exponent']:.2f}"
    line = f"{1e3 * row['median_s']:10.1f}{exponent:>10}{row['first_s']:9.1f}{megabytes(row['peak_bytes'])}"
    print(f"{start}{line}{row['temporary_bytes'] / 1e6:9.0f}{row['temporary_bytes'] / row['pixels']:13.0f}", flush=True)


def _available() -> int | None:
    """Return the free memory of the device or machine in bytes, or None if it is not known."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return available_memory() if jax.default_backend() == "cpu" else None


def _import_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    pyplot = _import_pyplot()
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    names = {"model": "forward", "train": "train step (L1)"}
    units = {"median_s": ("seconds", 1.0), "temporary_bytes": ("GB of temporaries", 1e9)}
    for column, over in enumerate(("area", "batch")):
        for panel, (key, (label, unit)) in zip(panels[:, column], units.items()):
            for kind, name in names.items():
                axis = "pixels" if over == "area" else "batch"
                points = [(row[axis], row[key] / unit) for row in rows if (row["kind"], row["over"]) == (kind, over) and key in row]
                if not points:
                    continue
                x, y = np.array(points).T
                (line,) = panel.loglog(x, y, "o-", label=name)
                panel.loglog(x, y[-1] * x / x[-1], ":", color=line.get_color(), alpha=0.6, label=f"{name}, if linear")
            panel.set_xscale("log", base=2)
            panel.set_xlabel("pixels of one image" if over == "area" else "images of 128x128")
            panel.set_ylabel(label)
            panel.grid(alpha=0.3)
    panels[0, 0].legend()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot (={path}) cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
