"""The third run towards the model that ships: the second one's network made wider without a change of its output, and trained on.

Command: `python train.py --config configs/nyu_tiny_wider.py --data.clear NYU/rgb --data.depth NYU/depth`, after the second
run; if that is not in `runs/nyu_tiny_large_crops`, with `--train.init_from WORKDIR/checkpoints/4800`
Hardware: 2 CPU cores, 6 GB of memory (2.7 less with `--data.cache False`)
Time: 101 minutes on 2 slow cores (AMD EPYC, 80 GMAC/s), beside light work.
Expected score: 25.4 dB on 25 of the 50 scenes held out (hazy input 14.19 dB); `configs/nyu_tiny_longer.py` goes on from it.

Width 24 has 2.1 times the multiplications of width 16, and a step took 1.4 times as long on such cores (0.90 s, 0.66 s).
"""

import dataclasses
import runpy
from pathlib import Path

second = runpy.run_path(str(Path(__file__).with_name("nyu_tiny_large_crops.py")))["config"]

config = dataclasses.replace(
    second,
    model=dataclasses.replace(second.model, width=24),
    train=dataclasses.replace(
        second.train,
        workdir="runs/nyu_tiny_wider",
        init_from=f"{second.train.workdir}/checkpoints/{second.train.steps}",
        steps=6000,
        learning_rate=2e-3,
        eval_every=1500,
    ),
)
