"""AECR-Net on Dense-Haze.

Command: `python train.py --config configs/dense_haze.py --loss.features vgg19.safetensors`
Hardware: made for one accelerator with 40 GB or more, or several (the batch must divide by their number).
Time: not measured by this project yet.
Expected score: 15.80 dB, 0.4660 (paper, Table 1); not reproduced by this project yet.
The split of the paper is not public. This is 50 images for training and the last 5 for evaluation, `dense_haze_50_5`;
`--data.split dense_haze_45_5_5` chooses the best checkpoint on 5 others, and `eval.py --split dense_haze_45_5_5/test` then scores it
on images that chose nothing.

On a laptop, the same with less: `--model.width 16 --model.dtype float32 --data.crop 128 --train.batch 4 --train.steps 5000`.
"""

from aecr_jax.config import Config, DataConfig, TrainConfig
from aecr_jax.model import ModelConfig

config = Config(
    model=ModelConfig(dtype="bfloat16"),
    data=DataConfig(hazy="data/Dense_Haze_NTIRE19/hazy", clear="data/Dense_Haze_NTIRE19/GT", split="dense_haze_50_5"),
    train=TrainConfig(workdir="runs/dense_haze", steps=100_000, eval_every=1000),
)
