"""The methods that the paper compares with (Tables 1 and 3), each by its authors' recipe, on RESIDE ITS, evaluated on SOTS indoor.

Command: `python train.py --config configs/methods.py:ffa_net`, and so on; `:ffa_net:cr` adds contrastive regularization (Table 3), and
`:ffa_net:laptop --data.train NYU` is a small version of the network on NYU Depth v2 (a folder with `rgb/` and `depth/`), with haze made
on the fly.
Hardware: made for one accelerator with 40 GB or more, or several; the configs `:laptop` are for a laptop.
Time: not measured by this project yet, except for the laptop's versions (docs/networks.md).
Expected score: the following on SOTS indoor (AECR paper, Table 1); none has been reproduced by this project yet. For GridDehazeNet and the
methods below it, their own papers have the same numbers; AOD-Net's and DehazeNet's own papers report other data sets.

    aod_net          19.82 dB, 0.8178
    dehaze_net       20.64 dB, 0.7995
    grid_dehaze_net  32.16 dB, 0.9836; with CR 32.99 (Table 3)
    ffa_net          36.39 dB, 0.9886; with CR 36.74
    msbdn            33.79 dB, 0.9840; with CR 34.45
    kddn             34.72 dB, 0.9845; with CR 35.18
    pfdn             32.68 dB, 0.9760

The input differs from the authors' in three points. Crops are flipped and turned at random, which the authors of GridDehazeNet and AOD-Net
do not do. AOD-Net's images are cropped and not resized to 640x480. MSBDN's patches come from images at one scale. PFDN's recipe is not
known, so it has AECR-Net's.

DehazeNet trains on clear patches with one random transmission each, and KDDN on the features of a teacher that restores clear images from
themselves: first `configs/methods.py:kddn_teacher`, then `:kddn`, which reads the teacher from `runs/kddn_teacher`.
"""

import dataclasses

from aecr_jax.networks.aod_net import AODNetConfig
from aecr_jax.networks.dehaze_net import DehazeNetConfig
from aecr_jax.networks.ffa_net import FFANetConfig
from aecr_jax.networks.grid_dehaze_net import GridDehazeNetConfig
from aecr_jax.networks.kddn import KDDNConfig, KDDNTeacherConfig
from aecr_jax.networks.msbdn import MSBDNConfig
from aecr_jax.networks.network import NetworkConfig
from aecr_jax.networks.pfdn import PFDNConfig
from aecr_jax.training.config import Config, DataConfig, LossConfig, OptimConfig, RunConfig

ITS = DataConfig(train="data/ITS/hazy,data/ITS/clear", eval="data/SOTS/indoor/hazy,data/SOTS/indoor/clear")
EPOCH = 13_990  # images of ITS
L1 = LossConfig(cr=0)


def recipe(model: NetworkConfig, loss: LossConfig, optim: OptimConfig, *, crop: int = 240, train: str = ITS.train) -> Config:
    """Return the config of the authors' recipe."""
    data = dataclasses.replace(ITS, crop=crop, train=train)
    return Config(model=model, data=data, loss=loss, optim=optim, run=RunConfig(workdir=f"runs/{model.NAME}"))


def with_cr(config: Config) -> Config:
    """Return a recipe with contrastive regularization of the paper's weight."""
    loss = dataclasses.replace(config.loss, kind="restoration", cr=0.1)
    return dataclasses.replace(config, loss=loss, run=dataclasses.replace(config.run, workdir=f"{config.run.workdir}_cr"))


def for_laptop(model: NetworkConfig, *, learning_rate: float = 1e-3, crop: int = 96, batch: int = 4) -> Config:
    """Return a config that trains a small network for 500 steps."""
    return Config(
        model=model,
        data=DataConfig(train="data/nyu_depth_v2", holdout=50, crop=crop, threads=2),
        loss=L1,
        optim=OptimConfig(steps=500, batch=batch, learning_rate=learning_rate, warmup=20, clip_norm=1),
        run=RunConfig(workdir=f"runs/{model.NAME}_laptop", log_every=50, eval_every=500, eval_images=25),
    )


recipes = {
    "aod_net": recipe(
        AODNetConfig(),
        LossConfig(cr=0, pixel="l2"),
        OptimConfig(steps=10 * EPOCH // 8, batch=8, learning_rate=1e-4, schedule="constant", weight_decay=1e-4, clip_norm=0.1),
        crop=400,
    ),
    "dehaze_net": recipe(
        DehazeNetConfig(),
        LossConfig(kind="transmission", cr=0),
        OptimConfig(steps=500_000, batch=128, optimizer="sgd", learning_rate=5e-3, schedule="steps", decay_every=100_000),
        crop=16,
        train="constant:data/ITS/clear",
    ),
    "grid_dehaze_net": recipe(
        GridDehazeNetConfig(),
        LossConfig(cr=0, pixel="smooth_l1", perceptual=0.04),
        OptimConfig(steps=100 * EPOCH // 16, batch=16, learning_rate=1e-3, schedule="steps", decay_every=20 * EPOCH // 16),
    ),
    "ffa_net": recipe(FFANetConfig(), L1, OptimConfig(steps=500_000, batch=2, learning_rate=1e-4)),
    "msbdn": recipe(
        MSBDNConfig(),
        LossConfig(cr=0, pixel="l2"),
        OptimConfig(
            steps=100 * EPOCH // 16, batch=16, learning_rate=1e-4, schedule="steps", decay_every=50 * EPOCH // 16, decay_factor=0.1
        ),
        crop=256,
    ),
    "kddn_teacher": recipe(
        KDDNTeacherConfig(),
        L1,
        OptimConfig(steps=20 * EPOCH // 2, batch=2, learning_rate=1e-4),
        crop=256,
        train="clear=data/ITS/clear",
    ),
    "kddn": recipe(
        KDDNConfig(),
        LossConfig(kind="distillation", cr=0, teacher="runs/kddn_teacher"),
        OptimConfig(steps=100 * EPOCH // 16, batch=16, learning_rate=1e-4),
        crop=256,
    ),
    "pfdn": recipe(PFDNConfig(), L1, OptimConfig()),
}

laptop = {
    "aod_net": for_laptop(AODNetConfig(), crop=128),
    "dehaze_net": dataclasses.replace(
        for_laptop(DehazeNetConfig(), crop=16, batch=64),
        data=DataConfig(train="constant:data/nyu_depth_v2/rgb", holdout=50, crop=16, threads=2),
        loss=LossConfig(kind="transmission", cr=0),
    ),
    "grid_dehaze_net": for_laptop(GridDehazeNetConfig(width=8, growth=8, dense_layers=2)),
    "ffa_net": for_laptop(FFANetConfig(width=16, blocks=2)),
    "msbdn": for_laptop(MSBDNConfig(width=8, blocks=4), learning_rate=5e-4),
    "kddn_teacher": dataclasses.replace(
        for_laptop(KDDNTeacherConfig(width=16)),
        data=DataConfig(train="clear=data/nyu_depth_v2/rgb", holdout=50, crop=96, threads=2),
    ),
    "kddn": for_laptop(KDDNConfig(width=16, blocks=2)),
    "pfdn": for_laptop(PFDNConfig(width=16, blocks=3)),
}
configs = {
    **recipes,
    **{f"{name}:cr": with_cr(recipes[name]) for name in recipes if name != "kddn_teacher"},
    **{f"{name}:laptop": config for name, config in laptop.items()},
}
