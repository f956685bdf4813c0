"""A narrow AECR-Net on drawn scenes: the whole path in a few minutes, nothing to download.

Command: `python train.py --config configs/demo.py` (or `make demo`, which also evaluates and dehazes)
Hardware: 2 CPU cores
Time: 3 minutes
Expected score: at least 6 dB PSNR above the hazy input on the held-out scenes.
"""

from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.training.config import Config, DataConfig, LossConfig, OptimConfig, RunConfig

config = Config(
    model=AECRNetConfig(width=16),
    data=DataConfig(train="scenes:150:192x144", crop=96, threads=2),
    # The regularization compares the first three levels of VGG-19, which ship with the package.
    loss=LossConfig(features="vgg19_relu3_1", cr_layers=("relu1_1", "relu2_1", "relu3_1"), cr_weights=(0.03125, 0.0625, 0.125)),
    optim=OptimConfig(
        steps=800,
        batch=4,
        # Ten times the paper's, for a run so short; without the next three lines the offsets run away.
        learning_rate=2e-3,
        warmup=50,
        offset_rate=0.1,
        clip_norm=1.0,
    ),
    run=RunConfig(workdir="runs/demo", log_every=50, eval_every=200, eval_images=8),
)
