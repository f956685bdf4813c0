"""Table 2 of the paper, row "base+DFE+SC": DFE, and plain sums for mixup. On RESIDE ITS, evaluated on SOTS indoor.

Command: `python train.py --config configs/table2_base_dfe_sc.py`
Hardware: made for one accelerator with 40 GB or more, or several (the batch must divide by their number).
Time: not measured by this project yet.
Expected score: 35.59 dB, 0.9858 (paper, Table 2); not reproduced by this project yet.

On a laptop, the same with less: `--model.width 16 --model.dtype float32 --data.crop 128 --train.batch 4 --train.steps 5000`.
"""

from aecr_jax.config import Config, DataConfig, LossConfig, TrainConfig
from aecr_jax.model import ModelConfig

config = Config(
    model=ModelConfig(dtype="bfloat16", mixup="sum"),
    data=DataConfig(hazy="data/ITS/hazy", clear="data/ITS/clear", eval_hazy="data/SOTS/indoor/hazy", eval_clear="data/SOTS/indoor/clear"),
    loss=LossConfig(cr=0),
    train=TrainConfig(workdir="runs/table2_base_dfe_sc"),
)
