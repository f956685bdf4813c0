"""The checkpoints of KDDN's student, the dehazing network."""

from __future__ import annotations

import re

from aecr_jax.convert.format import Format, Layout, count_layers, read_size, rename
from aecr_jax.convert.tensors import Tensors
from aecr_jax.networks.kddn import KDDNConfig

_TITLE = "the authors' KDDN"

_layers = rename(
    [
        (r"first", "conv0.0.conv"),
        (r"last", "out.0.conv"),
        (r"(down1|down2|up1|up2)", r"\1.0.conv"),
        (r"(res.\.\d+)\.spatial1", r"\1.model1.0"),
        (r"(res.\.\d+)\.spatial2", r"\1.model1.2"),
        (r"(res.\.\d+)\.channel1", r"\1.se.fc.0"),
        (r"(res.\.\d+)\.channel2", r"\1.se.fc.2"),
    ],
    linear=r".*\.channel[12]",
)


def _rename(ours: str) -> tuple[str, Layout]:
    # The authors count the groups from 1.
    return _layers(re.sub(r"groups\.(\d)\.layers", lambda group: f"res{int(group[1]) + 1}", ours))


def _read_config(tensors: Tensors) -> KDDNConfig:
    width = read_size(tensors, ("conv0.0.conv.bias", "down1.0.conv.bias", "down2.0.conv.bias"), _TITLE)
    return KDDNConfig(width=width, blocks=count_layers(tensors, r"res.\.(\d+)\.conv[12]\.weight", _TITLE))


FORMAT = Format(
    title=_TITLE,
    signature=r"res1\.0\.se\.fc\.0\.weight",
    read_config=_read_config,
    rename=_rename,
    # The authors' Student1 is the same network with three convolutions that it does not use.
    unused=r"convR[123]\.(weight|bias)",
)
