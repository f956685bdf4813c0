"""AECR-Net on NYU Depth v2 with haze made on the fly: the full network where RESIDE's training set cannot be had.

Command: `python train.py --config configs/nyu.py --data.train NYU --loss.features vgg19.safetensors` (NYU has `rgb/` and `depth/`)
Hardware: made for one accelerator with 40 GB or more, or several (the batch must be divisible by their number); 2.8 GB of memory more for
the decoded images (`--data.cache False`: none).
Time: not measured by this project yet.
Expected score: not measured by this project yet. RESIDE's ITS is made from the same indoor photographs, and the paper's 37.17 dB,
0.9901 on SOTS indoor was reached by training on ITS. Evaluated on the last 50 images by name, which are not trained on.

On a laptop, with a narrow network, small crops, and 5,000 steps:
`python train.py --config configs/nyu.py:laptop --data.train NYU --loss.features vgg19.safetensors`; or see `configs/nyu_narrow.py`.
"""

from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.training.config import Config, DataConfig, RunConfig, for_laptop

paper = Config(
    model=AECRNetConfig(dtype="bfloat16"),
    data=DataConfig(train="data/nyu_depth_v2", holdout=50, cache=True),
    run=RunConfig(workdir="runs/nyu"),
)

configs = {"paper": paper, "laptop": for_laptop(paper)}
