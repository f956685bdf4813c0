"""AECR-Net on RESIDE ITS, evaluated on SOTS indoor: the paper's main result (last row of Table 2).

Command: `python train.py --config configs/its.py --loss.features vgg19.safetensors`
Hardware: made for one accelerator with 40 GB or more, or several (the batch must be divisible by their number).
Time: not measured by this project yet.
Expected score: 37.17 dB, 0.9901 (paper, Table 1); not reproduced by this project yet.

On a laptop: `python train.py --config configs/its.py:laptop --loss.features vgg19.safetensors`, a narrow network with small crops and
5,000 steps.
"""

from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.training.config import Config, DataConfig, RunConfig, for_laptop

paper = Config(
    model=AECRNetConfig(dtype="bfloat16"),
    data=DataConfig(train="data/ITS/hazy,data/ITS/clear", eval="data/SOTS/indoor/hazy,data/SOTS/indoor/clear"),
    run=RunConfig(workdir="runs/its"),
)

configs = {"paper": paper, "laptop": for_laptop(paper)}
