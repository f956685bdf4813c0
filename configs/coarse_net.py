"""CoarseNet on NYU Depth v2 with haze made on the fly: the haze is estimated on a coarse grid, and compared with the true haze.

Command: `python train.py --config configs/coarse_net.py --data.train NYU`, where NYU is a folder with `rgb/` and `depth/`.
Hardware: 2 CPU cores, 6 GB of memory.
Time: about 2 hours.
Expected score: not measured by this project yet.
"""

from aecr_jax.networks.coarse_net import CoarseNetConfig
from aecr_jax.training.config import Config, DataConfig, LossConfig, OptimConfig, RunConfig

config = Config(
    model=CoarseNetConfig(),
    data=DataConfig(train="data/nyu_depth_v2", holdout=50, crop=256, threads=2, cache=True),
    loss=LossConfig(cr=0, haze=0.1),
    optim=OptimConfig(steps=30_000, batch=8, optimizer="muon", learning_rate=3e-3, warmup=200, ema=0.999, clip_norm=1),
    run=RunConfig(workdir="runs/coarse_net", log_every=100, eval_every=5000, save_every=1000, eval_images=25),
)
