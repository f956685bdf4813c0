"""CoarseNet, with haze that is made on the fly and supervised: for rooms, and for photographs.

Command: `python train.py --config configs/coarse_net.py:indoor --data.train NYU`, where NYU is a folder with `rgb/` and `depth/`; then
`:indoor_whole`, twice, and then `:photo` and `:photo_smooth` with `--data.train "NYU + 2*outdoor:CLEAR"`, where CLEAR is a folder of
clear photographs. Each run begins with the parameters of the one before it, by `--run.init_from`; docs/results.md has the commands.
Hardware: 2 CPU cores, 6 GB of memory.
Time: 38 minutes for `indoor`, 72 + 60 for `indoor_whole`, 53 for `photo` and 11 for `photo_smooth` (AMD EPYC, 0.12 to 0.15 s a step).
Expected score: 29.4 dB on 100 images of SOTS indoor after `indoor_whole` (hazy input 11.16 dB), and 25.8 dB on 25 images of SOTS outdoor
after `photo_smooth` (hazy input 15.13 dB).

`indoor_whole` has nearly whole frames instead of crops, because the network takes a mean over the whole image. `photo_smooth` supervises
the haze by the mean squared error, because `photo` leaves white spots in the sky of smog.

The haze of `indoor` is RESIDE's. That of `photo` is thinner and thicker, has a coloured and darker airlight, may begin behind a clear
foreground, and is left out in one crop of ten, so that clear pictures stay as they are; noise, JPEG compression and other sizes are
those of photographs. Three crops of five have RESIDE's haze alone. `crop_width` is set so that crops are not turned: what is farther is
usually higher in the picture.

The configs `haze_*` are short runs from the parameters of `indoor` (`--run.init_from indoor`), about 4 minutes each, that show what the
settings of the haze gain: `haze_all` has the haze `varied`, `haze_stronger` more of it, `haze_reside` only RESIDE's haze, `haze_narrow`
RESIDE's ranges beside the other settings, and the others leave out what their names say.
"""

import dataclasses
from typing import Any

from aecr_jax.data.haze import HazeConfig
from aecr_jax.networks.coarse_net import CoarseNetConfig
from aecr_jax.training.config import Config, DataConfig, LossConfig, OptimConfig, RunConfig

indoor = Config(
    model=CoarseNetConfig(),
    data=DataConfig(train="data/nyu_depth_v2", holdout=50, crop=256, crop_width=256, threads=2, cache=True),
    loss=LossConfig(cr=0, haze=0.1),
    optim=OptimConfig(steps=18_000, batch=8, optimizer="muon", learning_rate=2e-3, warmup=200, accumulate=2, ema=0.999, clip_norm=1),
    run=RunConfig(workdir="runs/coarse_net_indoor", log_every=100, eval_every=6000, save_every=500, eval_images=50),
)

indoor_whole = dataclasses.replace(
    indoor,
    data=dataclasses.replace(indoor.data, crop=448, crop_width=608),
    optim=dataclasses.replace(indoor.optim, steps=30_000, batch=2, accumulate=1, learning_rate=1.2e-3),
    run=dataclasses.replace(indoor.run, workdir="runs/coarse_net_indoor_whole", eval_every=10_000),
)

train = "data/nyu_depth_v2 + 2*outdoor:data/outdoor_clear"
varied = HazeConfig(
    airlight=(0.5, 1.0),
    beta=(0.3, 1.8),
    outdoor_airlight=(0.5, 1.0),
    outdoor_beta=(0.0, 0.5),
    outdoor_near=0.7,
    cast=0.05,
    uneven=0.5,
    clear=0.05,
    darken=0.2,
    noise=0.02,
    jpeg=0.3,
    resize=0.3,
    foreign_depth=0.1,
    reside=0.4,
)

photo = dataclasses.replace(
    indoor,
    data=dataclasses.replace(indoor.data, train=train, crop=320, crop_width=320),
    haze=dataclasses.replace(varied, outdoor_beta=(0.0, 0.7), cast=0.08, noise=0.03, jpeg=0.5, reside=0.6, clear=0.25),
    optim=dataclasses.replace(indoor.optim, steps=20_000, batch=6, accumulate=1, learning_rate=1.2e-3),
    run=dataclasses.replace(indoor.run, workdir="runs/coarse_net_photo", eval_every=10_000, eval_images=100),
)

photo_smooth = dataclasses.replace(
    photo,
    loss=dataclasses.replace(photo.loss, haze=0.5, haze_distance="l2"),
    optim=dataclasses.replace(photo.optim, steps=4000, learning_rate=6e-4, ema=0.998),
    run=dataclasses.replace(photo.run, workdir="runs/coarse_net_photo_smooth", eval_every=4000),
)


def experiment(name: str, **haze: Any) -> Config:
    """Return a short run with the haze `varied` and other settings of it."""
    return dataclasses.replace(
        indoor,
        data=dataclasses.replace(indoor.data, train=train),
        haze=dataclasses.replace(varied, **haze),
        optim=dataclasses.replace(indoor.optim, steps=1000, learning_rate=1e-3, ema=0.99),
        run=dataclasses.replace(indoor.run, workdir=f"runs/experiments/{name}", eval_every=1000, eval_images=100),
    )


reside = HazeConfig()
ranges = {name: getattr(reside, name) for name in ("airlight", "beta", "outdoor_airlight", "outdoor_beta")}
configs = {
    "indoor": indoor,
    "indoor_whole": indoor_whole,
    "photo": photo,
    "photo_smooth": photo_smooth,
    "haze_all": experiment("haze_all"),
    "haze_stronger": experiment("haze_stronger", outdoor_beta=(0.0, 0.8), cast=0.1, noise=0.03, jpeg=0.6),
    "haze_reside": experiment("haze_reside", **dataclasses.asdict(reside)),
    "haze_narrow": experiment("haze_narrow", **ranges),
    "haze_no_near": experiment("haze_no_near", outdoor_near=0.0),
    "haze_no_cast": experiment("haze_no_cast", cast=0.0),
    "haze_no_uneven": experiment("haze_no_uneven", uneven=0.0),
    "haze_no_clear": experiment("haze_no_clear", clear=0.0),
    "haze_no_darken": experiment("haze_no_darken", darken=0.0),
    "haze_no_noise": experiment("haze_no_noise", noise=0.0, jpeg=0.0),
    "haze_no_resize": experiment("haze_no_resize", resize=0.0),
    "haze_no_foreign_depth": experiment("haze_no_foreign_depth", foreign_depth=0.0),
    "haze_no_share": experiment("haze_no_share", reside=0.0),
}
