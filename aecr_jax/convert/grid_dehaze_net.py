"""The checkpoints of GridDehazeNet's authors."""

from __future__ import annotations

import re
import statistics
from collections import Counter

from aecr_jax.convert.format import SAME, Format, rename
from aecr_jax.convert.tensors import Tensors
from aecr_jax.networks.grid_dehaze_net import GridDehazeNetConfig

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
    # Use the most frequent sizes, so that a single wrong tensor is reported itself and not the correct ones.
    widths = [len(tensors[name]) for name in ("conv_in.weight", "conv_in.bias", "rdb_in.conv_1x1.bias") if _has_axes(tensors, name)]
    growths = [len(tensors[name]) for name in tensors if re.fullmatch(r"rdb_.*\.0\.conv\.bias", name) and _has_axes(tensors, name)]
    layers = Counter(found[1] for name in tensors if (found := re.fullmatch(r"(rdb_.*)\.residual_dense_layers\.\d+\.conv\.bias", name)))
    if not widths or not growths or not layers:
        raise ValueError("tensor conv_in.weight of shape (16, 3, 3, 3) is missing: this is no checkpoint of GridDehazeNet")
    width, growth, dense_layers = (statistics.mode(sizes) for sizes in (widths, growths, layers.values()))
    return GridDehazeNetConfig(width=width, growth=growth, dense_layers=dense_layers)


def _has_axes(tensors: Tensors, name: str) -> bool:
    return name in tensors and tensors[name].ndim > 0


FORMAT = Format(
    title="GridDehazeNet",
    signature=r"rdb_module\.0_0\.conv_1x1\.weight",
    read_config=_read_config,
    rename=lambda name: ("coefficient", SAME) if name == "coefficient" else _rename(name),
    # The coefficients are 1 before training, and the unused ones stay so.
    may_be_constant="coefficient",
)
