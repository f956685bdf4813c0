"""The checkpoints of GridDehazeNet's authors."""

from __future__ import annotations

from aecr_jax.convert.format import SAME, Format, count_layers, read_size, rename
from aecr_jax.convert.tensors import Tensors
from aecr_jax.networks.grid_dehaze_net import GridDehazeNetConfig

_TITLE = "GridDehazeNet"

_BLOCKS = {r"blocks\.(\d)\.(\d)": r"rdb_module.\1_\2", "block_in": "rdb_in", "block_out": "rdb_out"}
_rename = rename(
    [
        *((rf"{ours}\.fuse", rf"{theirs}.conv_1x1") for ours, theirs in _BLOCKS.items()),
        *((rf"{ours}\.layers\.(?P<layer>\d+)", rf"{theirs}.residual_dense_layers.\g<layer>.conv") for ours, theirs in _BLOCKS.items()),
        (r"downs\.(\d)\.(\d)\.shrink", r"downsample_module.\1_\2.conv1"),
        (r"downs\.(\d)\.(\d)\.widen", r"downsample_module.\1_\2.conv2"),
        # The authors count the columns from the left, and the first that leads up is column 3.
        *((rf"ups\.(\d)\.{column}\.enlarge", rf"upsample_module.\1_{column + 3}.deconv") for column in range(3)),
        *((rf"ups\.(\d)\.{column}\.narrow", rf"upsample_module.\1_{column + 3}.conv") for column in range(3)),
    ],
    transposed=r"ups\..*\.enlarge",
)


def _read_config(tensors: Tensors) -> GridDehazeNetConfig:
    width = read_size(tensors, ("conv_in.weight", "conv_in.bias", "rdb_in.conv_1x1.bias"), _TITLE)
    first = [f"{block}.residual_dense_layers.0.conv.bias" for block in ("rdb_in", "rdb_out", "rdb_module.0_0")]
    layers = count_layers(tensors, r"rdb_.*\.residual_dense_layers\.(\d+)\.conv\.bias", _TITLE)
    return GridDehazeNetConfig(width=width, growth=read_size(tensors, first, _TITLE), dense_layers=layers)


FORMAT = Format(
    title=_TITLE,
    signature=r"rdb_module\.0_0\.conv_1x1\.weight",
    read_config=_read_config,
    rename=lambda name: ("coefficient", SAME) if name == "coefficient" else _rename(name),
    # The coefficients are 1 before training, and the unused ones stay so.
    may_be_constant="coefficient",
)
