"""Benchmark of the input pipeline: the speed of each stage and of the whole, and the number of workers that an accelerator needs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from aecr_jax.benchmark.speed import check_writable, write_json
from aecr_jax.data.haze import haze_for
from aecr_jax.data.images import to_float
from aecr_jax.data.outdoor import Window, draw_depth
from aecr_jax.data.pipeline import Augment, cache_bytes, train_batches
from aecr_jax.data.reader import Source
from aecr_jax.data.samples import Sample
from aecr_jax.training.config import Config


def benchmark_data(
    samples: Sequence[Sample],
    config: Config,
    *,
    seconds: float = 5.0,
    workers: Sequence[int] = (0, 1, 2),
    steps_per_second: float = 20.0,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Measure the input pipeline of a config and print tables.

    Args:
      samples: the training samples.
      config: supplies the crop, the batch, the number of threads and the cache.
      seconds: how long to measure each row.
      workers: numbers of worker processes to measure; 0 uses only the threads of this process. With a cache, only 0 is measured, because
        each worker would fill its own cache.
      steps_per_second: speed of the simulated accelerator, whose waiting time is reported; each step is simulated by a pause.
      output: JSON file for the figures.

    Returns:
      The figures: `stages` and `pipelines`, each a list of dicts.

    Raises:
      UserError: a file cannot be read, or the output cannot be written.
    """
    if output is not None:
        check_writable(output)
    (height, width), batch = config.data.crop_size, config.optim.batch
    stages = _measure_stages(samples, config, seconds)
    print(f"one thread, crops of {width}x{height}, batches of {batch}; {len(samples)} images, {os.cpu_count()} CPU cores")
    print(f"{'stage':24}{'ms/image':>10}{'images/s':>10}")
    for row in stages:
        print(f"{row['stage']:24}{row['ms']:10.2f}{1000 / row['ms']:10.0f}")
    pipelines = []
    print(f"\nthe whole pipeline, {config.data.threads} threads{', cached' if config.data.cache else ''};")
    print(f"waiting: of an accelerator that does {steps_per_second:g} steps of {batch} a second")
    print(f"{'workers':24}{'images/s':>10}{'waiting':>10}")
    for count in (0,) if config.data.cache else workers:
        row = _measure_pipeline(samples, replace(config, data=replace(config.data, workers=count)), seconds, steps_per_second)
        pipelines.append(row)
        print(f"{count or 'none':<24}{row['images_per_second']:10.0f}{row['waiting']:10.1%}")
    needed = steps_per_second * batch
    alone = pipelines[0]["images_per_second"]
    cores = os.cpu_count() or 1
    print(f"{needed:g} images a second take {needed / alone * cores:.1f} cores like these ({alone / cores:.0f} images a second each)")
    figures = {
        "crop": height,
        "crop_width": width,
        "batch": batch,
        "images": len(samples),
        "cores": cores,
        "stages": stages,
        "pipelines": pipelines,
    }
    if output is not None:
        write_json(output, figures)
    return figures


def _measure_stages(samples: Sequence[Sample], config: Config, seconds: float) -> list[dict[str, Any]]:
    """Measure the time per image, in milliseconds, that one thread needs for each stage."""
    rng, (height, width), batch = np.random.default_rng(0), config.data.crop_size, config.optim.batch
    stages = []

    def measure(stage: str, work: Callable[[int], Any], per_call: int = 1) -> None:
        work(0)
        start, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds / 5 or done < 3:
            work(done)
            done += 1
        stages.append({"stage": stage, "ms": 1000 * spent / (done * per_call)})

    if samples[0].files and not samples[0].dataset:
        measure("read files", lambda i: [path.read_bytes() for path in samples[i % len(samples)].files.values()])
    measure("read and decode", lambda i: samples[i % len(samples)].read())
    source = Source(samples, least=(height, width))
    element, augment = source[0], Augment(config.data, config.haze, source=source, **config.loss.needs)
    cut = {key: to_float(element[key][:height, :width]) for key in ("clear", "depth") if key in element}
    if outdoor := "sky" in element:
        size, window = element["clear"].shape[:2], Window(0, 0, height, width)
        measure("draw depth (of the crop)", lambda i: draw_depth(element["sky"], size, window, (height, width), rng))
        cut["depth"] = draw_depth(element["sky"], size, window, (height, width), rng)
    if "hazy" not in element:
        measure("make haze (of the crop)", lambda i: haze_for(cut["clear"], cut.get("depth"), rng, config.haze, outdoor=outdoor))
    measure("augment" if "hazy" in element else "augment (with haze)", lambda i: augment.random_map(element, rng))
    crops = [augment.random_map(element, rng) for _ in range(batch)]
    measure("batch", lambda i: {key: np.stack([c[key] for c in crops]) for key in crops[0]}, batch)
    return stages


def _measure_pipeline(samples: Sequence[Sample], config: Config, seconds: float, steps_per_second: float) -> dict[str, Any]:
    batch = config.optim.batch
    if config.data.cache:
        cache_bytes(samples, config.data)
    batches = train_batches(samples, config.data, batch=batch, seed=config.run.seed, haze=config.haze, **config.loss.needs)
    next(batches)
    if config.data.cache:  # the first epoch fills the cache
        for _ in tqdm(range(len(samples) // batch + 1), "filling the cache", leave=False, disable=None):
            next(batches)
    for _ in range(4 * max(1, config.data.workers)):  # discard the batches that were prefetched before the measurement
        next(batches)
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        next(batches)
        done += 1
    rate = done * batch / spent
    waited, start, steps = 0.0, time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        steps += 1
        time.sleep(1 / steps_per_second)
    return {"workers": config.data.workers, "images_per_second": rate, "waiting": waited / (time.perf_counter() - start)}
