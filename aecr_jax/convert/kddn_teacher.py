"""The checkpoints of KDDN's teacher."""

from __future__ import annotations

import re

from aecr_jax.convert.format import Format, Layout, read_size, rename
from aecr_jax.convert.tensors import Tensors
from aecr_jax.networks.kddn import KDDNTeacherConfig

_TITLE = "the authors' KDDN teacher"

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
    return KDDNTeacherConfig(width=read_size(tensors, ("conv0.conv.bias", "down.0.conv.bias", "down.1.conv.bias"), _TITLE))


FORMAT = Format(
    title=_TITLE,
    signature=r"res1\.model\.0\.conv\.weight",
    read_config=_read_config,
    rename=_rename,
)
