"""AECR-Net on Dense-Haze.

Command: `python train.py --config configs/dense_haze.py --loss.features vgg19.safetensors`
Hardware: made for one accelerator with 40 GB or more, or several (the batch must be divisible by their number).
Time: not measured by this project yet.
Expected score: 15.80 dB, 0.4660 (paper, Table 1); not reproduced by this project yet.

The split of the paper is not public. This is 50 images for training and the last 5 for evaluation, `dense_haze_50_5`. To choose the best
checkpoint on 5 images and to score it on 5 others, take the split `dense_haze_45_5_5`: train with
`--data.train data/Dense_Haze_NTIRE19@dense_haze_45_5_5/train --data.eval data/Dense_Haze_NTIRE19@dense_haze_45_5_5/validation`,
then score with `eval.py --data data/Dense_Haze_NTIRE19@dense_haze_45_5_5/test`.

On a laptop, with a narrow network, small crops, and 5,000 steps:
`python train.py --config configs/dense_haze.py:laptop --loss.features vgg19.safetensors`
"""

from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.training.config import Config, DataConfig, OptimConfig, RunConfig, for_laptop

paper = Config(
    model=AECRNetConfig(dtype="bfloat16"),
    data=DataConfig(train="data/Dense_Haze_NTIRE19@dense_haze_50_5/train", eval="data/Dense_Haze_NTIRE19@dense_haze_50_5/test"),
    optim=OptimConfig(steps=100_000),
    run=RunConfig(workdir="runs/dense_haze", eval_every=1000),
)

configs = {"paper": paper, "laptop": for_laptop(paper)}
