"""The rows of Table 2 on RESIDE ITS, evaluated on SOTS indoor; its last row, with contrastive regularization, is `configs/its.py`.

Command: `python train.py --config configs/table2.py:base_dfe`, and so on for the other rows
Hardware: made for one accelerator with 40 GB or more, or several (the batch must be divisible by their number).
Time: not measured by this project yet.
Expected score: the paper has 33.85 dB / 0.9820 for base, 34.04 / 0.9838 for base_mixup, 35.50 / 0.9853 for base_dfe, 35.59 / 0.9858 for
base_dfe_sc, 36.20 / 0.9869 for base_dfe_mixup and 36.46 / 0.9889 for cr_positive; not reproduced by this project yet.
"""

from typing import Literal

from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.training.config import Config, DataConfig, LossConfig, RunConfig

L1_ALONE = LossConfig(cr=0)


def row(name: str, dfe: Literal["after", "none"], mixup: Literal["adaptive", "sum", "none"], loss: LossConfig = L1_ALONE) -> Config:
    """Return the config of one row."""
    return Config(
        model=AECRNetConfig(dfe=dfe, mixup=mixup, dtype="bfloat16"),
        data=DataConfig(train="data/ITS/hazy,data/ITS/clear", eval="data/SOTS/indoor/hazy,data/SOTS/indoor/clear"),
        loss=loss,
        run=RunConfig(workdir=f"runs/table2_{name}"),
    )


configs = {
    "base": row("base", "none", "none"),
    "base_mixup": row("base_mixup", "none", "adaptive"),
    "base_dfe": row("base_dfe", "after", "none"),
    "base_dfe_sc": row("base_dfe_sc", "after", "sum"),
    "base_dfe_mixup": row("base_dfe_mixup", "after", "adaptive"),
    "cr_positive": row("cr_positive", "after", "adaptive", LossConfig(negatives=0)),
}
