"""Experiments with AECR-Net at equal cost on NYU Depth v2: output form, coarse levels, supervision of the haze, crops, frozen statistics.

Command: `python train.py --config configs/experiments.py:NAME --data.train NYU`, where NYU is a folder with `rgb/` and `depth/`; the names
are `direct`, `residual`, and so on, as listed below. `--run.seed 1` and another `--run.workdir` give a second seed.
Hardware: 2 CPU cores, 6 GB of memory.
Time: about 5 minutes each (AMD EPYC).
Expected score: 21.5 to 22.9 dB (hazy input 14.19 dB); docs/results.md has all of them.

Every run has Muon at 3e-3 with a cosine to 0, L1 alone, and width 16, and is compared on 25 images held out. All see the same number of
pixels, in 1,200 steps of 131,072 (`small_batch`: 2,400 steps of 65,536). `residual`, `affine` and `airlight` differ from `direct`, the
paper's form, in the output alone, and the other configs differ from `affine` in what their names say.
"""

import dataclasses
from typing import Any

from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.training.config import Config, DataConfig, LossConfig, OptimConfig, RunConfig

base = Config(
    model=AECRNetConfig(width=16),
    data=DataConfig(train="data/nyu_depth_v2", holdout=50, crop=128, threads=2, cache=True),
    loss=LossConfig(cr=0),
    optim=OptimConfig(
        steps=1200,
        batch=8,
        optimizer="muon",
        learning_rate=3e-3,
        warmup=100,
        ema=0.99,
        freeze_stats_after=480,
        offset_rate=0.1,
        clip_norm=1,
    ),
    run=RunConfig(log_every=50, eval_every=1200, save_every=300, eval_images=25),
)


def changed(name: str, **groups: dict[str, Any]) -> Config:
    """Return the base with other settings in the named groups."""
    groups["run"] = {"workdir": f"runs/experiments/{name}"} | groups.get("run", {})
    return dataclasses.replace(base, **{group: dataclasses.replace(getattr(base, group), **values) for group, values in groups.items()})


configs = {
    "direct": changed("direct"),
    "residual": changed("residual", model={"output": "residual"}),
    "affine": changed("affine", model={"output": "affine"}),
    "airlight": changed("airlight", model={"output": "airlight"}),
    "coarse": changed("coarse", model={"output": "affine", "coarse_levels": 3}),
    "supervised": changed("supervised", model={"output": "affine"}, loss={"haze": 0.1}),
    "large_crops": changed("large_crops", model={"output": "affine"}, data={"crop": 256}, optim={"batch": 2}),
    "small_batch": changed("small_batch", model={"output": "affine"}, optim={"batch": 4, "steps": 2400}),
    "frozen_late": changed("frozen_late", model={"output": "affine"}, optim={"freeze_stats_after": 960}),
    "never_frozen": changed("never_frozen", model={"output": "affine"}, optim={"freeze_stats_after": -1}),
}
