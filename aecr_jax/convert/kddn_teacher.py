"""The checkpoints of KDDN's teacher."""

from __future__ import annotations

import re
import statistics

from aecr_jax.convert.format import Format, Layout, rename
from aecr_jax.convert.tensors import Tensors
from aecr_jax.networks.kddn import KDDNTeacherConfig

_layers = rename(
    [
        (r"first", "conv0.conv"),
        (r"down1", "down.0.conv"),
        (r"down2", "down.1.conv"),
        (r"(res.)\.conv1", r"\1.model.0.conv"),
        (r"(res.)\.conv2", r"\1.model.1.conv"),
        # up.0 and up.2 enlarge.
        (r"up1", "up.1.conv"),
        (r"up2", "up.3.conv"),
        (r"last", "out.conv"),
    ]
)


def _rename(ours: str) -> tuple[str, Layout]:
    # The authors count the blocks from 1.
    return _layers(re.sub(r"blocks\.(\d)", lambda block: f"res{int(block[1]) + 1}", ours))


def _read_config(tensors: Tensors) -> KDDNTeacherConfig:
    # Use the most frequent width, so that a single wrong tensor is reported itself and not the correct ones.
    names = ("conv0.conv.bias", "down.0.conv.bias", "down.1.conv.bias")
    widths = [len(tensors[name]) for name in names if name in tensors and tensors[name].ndim]
    if len(widths) < 2 or not all(widths):
        raise ValueError("tensor down.0.conv.bias of shape (64,) is missing: this is no checkpoint of KDDN's teacher")
    return KDDNTeacherConfig(width=statistics.mode(widths))


FORMAT = Format(
    title="the authors' KDDN teacher",
    signature=r"res1\.model\.0\.conv\.weight",
    read_config=_read_config,
    rename=_rename,
)
