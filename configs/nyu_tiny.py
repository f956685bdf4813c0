"""A narrow AECR-Net on NYU Depth v2 with haze made on the fly, for a CPU: the first of four runs towards the model that ships.

Command: `python train.py --config configs/nyu_tiny.py --data.clear NYU/rgb --data.depth NYU/depth`
Hardware: 2 CPU cores, 6 GB of memory (2.7 less with `--data.cache False`)
Time: 42 minutes on 2 cores (AMD EPYC), beside light work.
Expected score: 22.9 dB after 4000 steps, on 25 of the 50 scenes held out (hazy input 14.19 dB);
`configs/nyu_tiny_large_crops.py` goes on from it.

The learning rate stays constant: the second run takes it to 0, the third widens the network, the fourth goes on with that. L1 alone:
a step with the regularization takes 1.7 times as long. The statistics freeze where the run that was shipped was stopped to freeze
them; the number is not tuned.
"""

from aecr_jax.config import Config, DataConfig, LossConfig, TrainConfig
from aecr_jax.model import ModelConfig

config = Config(
    model=ModelConfig(width=16),
    data=DataConfig(clear="data/nyu_depth_v2/rgb", depth="data/nyu_depth_v2/depth", holdout=50, crop=128, threads=2, cache=True),
    loss=LossConfig(cr=0),
    train=TrainConfig(
        workdir="runs/nyu_tiny",
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
        log_every=50,
        eval_every=1000,
        eval_images=25,
    ),
)
