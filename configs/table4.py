"""The rates of positives to negatives of Table 4 on RESIDE ITS, evaluated on SOTS indoor; the rate 1:1 is `configs/its.py`.

Command: `python train.py --config configs/table4.py:1:10`, and so on for the other rates
Hardware: made for one accelerator with 40 GB or more, or several (the batch must be divisible by their number).
Time: not measured by this project yet.
Expected score: the paper has 37.41 dB / 0.9906 for 1:10, 35.61 / 0.9862 for 10:1 and 35.65 / 0.9861 for 10:10; not reproduced by this
project yet.
"""

from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.training.config import Config, DataConfig, LossConfig, RunConfig

configs = {
    f"{positives}:{negatives}": Config(
        model=AECRNetConfig(dtype="bfloat16"),
        data=DataConfig(train="data/ITS/hazy,data/ITS/clear", eval="data/SOTS/indoor/hazy,data/SOTS/indoor/clear"),
        loss=LossConfig(positives=positives, negatives=negatives),
        run=RunConfig(workdir=f"runs/table4_{positives}_{negatives}"),
    )
    for positives, negatives in ((1, 10), (10, 1), (10, 10))
}
