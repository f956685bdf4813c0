"""The second run of four towards the model that ships: from the weights of `configs/nyu_tiny.py`, larger crops, the learning rate to 0.

Command: `python train.py --config configs/nyu_tiny_large_crops.py --data.clear NYU/rgb --data.depth NYU/depth`, after the
first run; if that is not in `runs/nyu_tiny`, with `--train.init_from WORKDIR/checkpoints/4500`
Hardware: 2 CPU cores, 6 GB of memory (2.7 less with `--data.cache False`)
Time: 49 minutes on 2 cores (AMD EPYC).
Expected score: 24.7 dB on 25 of the 50 scenes held out (hazy input 14.19 dB);
`configs/nyu_tiny_wider.py` goes on from it.
"""

import dataclasses
import runpy
from pathlib import Path

first = runpy.run_path(str(Path(__file__).with_name("nyu_tiny.py")))["config"]

config = dataclasses.replace(
    first,
    data=dataclasses.replace(first.data, crop=256),
    train=dataclasses.replace(
        first.train,
        workdir="runs/nyu_tiny_large_crops",
        init_from=f"{first.train.workdir}/checkpoints/{first.train.steps}",
        steps=4800,
        eval_every=1200,
        batch=2,
        schedule="cosine",
        warmup=100,
        freeze_stats_after=0,
        ema=0,
    ),
)
