"""AECR-Net on Dense-Haze.

Command: `python train.py --config configs/dense_haze.py --loss.features vgg19.safetensors`
Hardware: made for one accelerator with 40 GB or more, or several (the batch must divide by their number).
Time: not measured by this project yet.
Expected score: 15.80 dB, 0.4660 (paper, Table 1); not reproduced by this project yet.
The split of the paper is not public: a score depends on which images are in train/ and test/.

On a laptop, the same with less: `--model.width 16 --model.dtype float32 --data.crop 128 --train.batch 4 --train.steps 5000`.
"""

from aecr_jax.config import Config, DataConfig, TrainConfig
from aecr_jax.model import ModelConfig

config = Config(
    model=ModelConfig(dtype="bfloat16"),
    data=DataConfig(
        hazy="data/Dense-Haze/train/hazy",
        clear="data/Dense-Haze/train/clear",
        eval_hazy="data/Dense-Haze/test/hazy",
        eval_clear="data/Dense-Haze/test/clear",
    ),
    train=TrainConfig(workdir="runs/dense_haze", steps=100_000, eval_every=1000),
)
