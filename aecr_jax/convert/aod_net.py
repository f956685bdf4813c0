"""The checkpoints of AOD-Net: the authors' Caffe model and MayankSingal's PyTorch model."""

from __future__ import annotations

from aecr_jax.convert.format import Format, rename
from aecr_jax.networks.aod_net import AODNetConfig

FORMAT = Format(
    title="AOD-Net",
    signature=r"e_conv5\.weight",
    read_config=lambda tensors: AODNetConfig(),
    rename=rename([(r"conv([1-5])", r"e_conv\1")]),
    # The names in the Caffe model.
    aliases=[(r"conv([1-5]\.(?:weight|bias))", r"e_conv\1")],
)
