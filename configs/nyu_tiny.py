"""A narrow AECR-Net on NYU Depth v2 with haze made on the fly, for a laptop: the model that the package ships.

Command: `python train.py --config configs/nyu_tiny.py --data.clear NYU/rgb --data.depth NYU/depth --loss.features vgg19.safetensors`
Hardware: 2 CPU cores
Time: 80 minutes, on a machine that did other work beside it.
Expected score: 20.3 dB, 0.858 on ten scenes of SOTS indoor (hazy input 11.2 dB, 0.692); see the README's table of runs.
"""

from aecr_jax.config import Config, DataConfig, LossConfig, TrainConfig
from aecr_jax.model import ModelConfig

config = Config(
    model=ModelConfig(width=16),
    data=DataConfig(clear="data/nyu_depth_v2/rgb", depth="data/nyu_depth_v2/depth", holdout=50, crop=128, threads=2),
    loss=LossConfig(features="vgg19.safetensors"),
    train=TrainConfig(
        workdir="runs/nyu_tiny",
        steps=7500,
        batch=4,
        learning_rate=1e-3,
        log_every=50,
        eval_every=500,
        eval_images=10,
    ),
)
