"""AECR-Net on NYU Depth v2 with haze made on the fly: the full network where RESIDE's training set cannot be had.

Command: `python train.py --config configs/nyu.py --data.clear NYU/rgb --data.depth NYU/depth --loss.features vgg19.safetensors`
Hardware: made for one accelerator with 40 GB or more, or several (the batch must divide by their number); 2.8 GB of memory more for the
decoded images (`--data.cache False`: none).
Time: not measured by this project yet.
Expected score: not measured by this project yet. RESIDE's ITS is made from the same indoor photographs, and the paper's 37.17 dB,
0.9901 on SOTS indoor is of a training on that. Evaluated on the last 50 images by name, which are not trained on.

On a laptop, the same with less: `--model.width 16 --model.dtype float32 --data.crop 128 --train.batch 4 --train.steps 5000`, or
`configs/nyu_tiny.py`.
"""

from aecr_jax.config import Config, DataConfig, TrainConfig
from aecr_jax.model import ModelConfig

config = Config(
    model=ModelConfig(dtype="bfloat16"),
    data=DataConfig(clear="data/nyu_depth_v2/rgb", depth="data/nyu_depth_v2/depth", holdout=50, cache=True),
    train=TrainConfig(workdir="runs/nyu"),
)
