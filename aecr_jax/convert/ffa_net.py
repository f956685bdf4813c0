"""The checkpoints of FFA-Net's authors."""

from __future__ import annotations

import re

from aecr_jax.convert.format import Format, Layout, count_layers, read_size, rename
from aecr_jax.convert.tensors import Tensors
from aecr_jax.networks.ffa_net import FFANetConfig

_TITLE = "the authors' FFA-Net"

_layers = rename(
    [
        (r"first", "pre.0"),
        (r"group_attention\.down", "ca.1"),
        (r"group_attention\.up", "ca.3"),
        (r"(.*\.)?channel_down", r"\1calayer.ca.0"),
        (r"(.*\.)?channel_up", r"\1calayer.ca.2"),
        (r"(.*\.)?pixel_down", r"\1palayer.pa.0"),
        (r"(.*\.)?pixel_up", r"\1palayer.pa.2"),
        (r"last1", "post.0"),
        (r"last2", "post.1"),
    ]
)


def _rename(ours: str) -> tuple[str, Layout]:
    # The authors count the groups from 1.
    return _layers(re.sub(r"groups\.(\d)\.layers", lambda group: f"g{int(group[1]) + 1}.gp", ours))


def _read_config(tensors: Tensors) -> FFANetConfig:
    width = read_size(tensors, ("pre.0.weight", "pre.0.bias", "post.0.bias"), _TITLE)
    return FFANetConfig(width=width, blocks=count_layers(tensors, r"g[123]\.gp\.(\d+)\.conv[12]\.weight", _TITLE))


FORMAT = Format(
    title=_TITLE,
    signature=r"g1\.gp\.0\.calayer\.ca\.0\.weight",
    read_config=_read_config,
    rename=_rename,
)
