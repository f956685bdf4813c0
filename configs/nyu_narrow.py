"""A narrow AECR-Net on NYU Depth v2 with haze made on the fly, for a CPU: the four runs that made `aecr_net_tiny`.

Command: `python train.py --config configs/nyu_narrow.py:first --data.train NYU` (NYU has `rgb/` and `depth/`), then the same with
`:large_crops`, `:wider` and `:longer`, each of which begins with the last checkpoint of the one before
Hardware: 2 CPU cores, 6 GB of memory (2.7 less with `--data.cache False`)
Time: 42 + 49 + 101 + 131 minutes on 2 slow cores (AMD EPYC, 80 to 105 GMAC/s), beside light work.
Expected score: 22.9, 24.7, 25.4 and 26.4 dB on 25 of the 50 scenes held out (hazy input 14.19 dB).

L1 alone: at width 24, a step with regularization by the full VGG-19 takes 3.6 times as long. The first run has a constant learning
rate, and the second takes it to 0.
The third widens the network: width 24 has 2.1 times the multiplications of width 16, and a step took 1.4 times as long (0.90 and 0.66 s).
The fourth run continues at width 24. A learning rate that starts again from its peak first loses much of what was learned: the third run
fell from 24.72 dB to 22.76 in its first quarter at 2e-3, and the fourth from 25.37 dB to 24.28 at 1e-3. The statistics of FastDeconv are
frozen after the step at which the original run was interrupted to freeze them; the number is not tuned.
"""

import dataclasses
from typing import Any

from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.training.config import Config, DataConfig, LossConfig, OptimConfig, RunConfig

first = Config(
    model=AECRNetConfig(width=16),
    data=DataConfig(train="data/nyu_depth_v2", holdout=50, crop=128, threads=2, cache=True),
    loss=LossConfig(cr=0),
    optim=OptimConfig(
        steps=4500,
        batch=8,
        optimizer="muon",
        learning_rate=3e-3,
        schedule="constant",
        warmup=200,
        ema=0.999,
        freeze_stats_after=1836,
        offset_rate=0.1,
        clip_norm=1,
    ),
    run=RunConfig(workdir="runs/nyu_narrow_first", log_every=50, eval_every=1000, eval_images=25),
)


def continued(before: Config, name: str, optim: dict[str, Any], run: dict[str, Any], **groups: Any) -> Config:
    """Return the config of a run that begins with the last checkpoint of the run `before`, with other settings."""
    begin: dict[str, Any] = {"workdir": f"runs/nyu_narrow_{name}", "init_from": f"{before.run.workdir}/checkpoints/{before.optim.steps}"}
    groups |= {"optim": dataclasses.replace(before.optim, **optim), "run": dataclasses.replace(before.run, **begin, **run)}
    return dataclasses.replace(before, **groups)


large_crops = continued(
    first,
    "large_crops",
    {"steps": 4800, "batch": 2, "schedule": "cosine", "warmup": 100, "freeze_stats_after": 0, "ema": 0},
    {"eval_every": 1200},
    data=dataclasses.replace(first.data, crop=256),
)
wider = continued(large_crops, "wider", {"steps": 6000, "learning_rate": 2e-3}, {"eval_every": 1500}, model=AECRNetConfig(width=24))
longer = continued(wider, "longer", {"steps": 6400, "learning_rate": 1e-3}, {"eval_every": 1600, "seed": 1})

configs = {"first": first, "large_crops": large_crops, "wider": wider, "longer": longer}
