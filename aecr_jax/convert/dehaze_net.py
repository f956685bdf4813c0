"""The weights of the authors' DehazeNet (MATLAB), with the names of their layers and PyTorch's layouts."""

from __future__ import annotations

from aecr_jax.convert.format import Format, rename
from aecr_jax.networks.dehaze_net import DehazeNetConfig

FORMAT = Format(
    title="the authors' DehazeNet",
    signature=r"ip\.weight",
    read_config=lambda tensors: DehazeNetConfig(),
    rename=rename(
        [
            ("features", "conv1"),
            (r"scales\.convs\.0", "conv3x3"),
            (r"scales\.convs\.1", "conv5x5"),
            (r"scales\.convs\.2", "conv7x7"),
            ("estimate", "ip"),
        ]
    ),
    fixed=lambda config: DehazeNetConfig(dtype=config.dtype, param_dtype=config.param_dtype),
)
