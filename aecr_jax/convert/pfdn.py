"""State dicts of the reproduction of PFDN in IDKiro/gUNet."""

from __future__ import annotations

import re
import statistics

from aecr_jax.convert.format import Format, rename
from aecr_jax.convert.tensors import Tensors
from aecr_jax.networks.pfdn import PFDNConfig


def _read_config(tensors: Tensors) -> PFDNConfig:
    # Use the most frequent width, so that a single wrong tensor is reported itself and not the correct ones.
    names = ("encoder.0.weight", "encoder.0.bias", "decoder.2.bias")
    widths = [len(tensors[name]) for name in names if name in tensors and tensors[name].ndim]
    blocks = {int(found[1]) for name in tensors if (found := re.fullmatch(r"pfdbs\.(\d+)\.conv[12]\.weight", name))}
    if len(widths) < 2 or not all(widths) or not blocks:
        raise ValueError("tensor encoder.0.weight of shape (64, 3, 3, 3) is missing: this is no checkpoint of PFDN")
    return PFDNConfig(width=statistics.mode(widths), blocks=max(blocks) + 1)


FORMAT = Format(
    title="the PFDN of IDKiro/gUNet",
    signature=r"pfdbs\.0\.fdu\.fc\.0\.weight",
    read_config=_read_config,
    rename=rename(
        [
            (r"blocks\.(\d+)\.(conv.)", r"pfdbs.\1.\2"),
            (r"blocks\.(\d+)\.dehazing\.down", r"pfdbs.\1.fdu.fc.0"),
            (r"blocks\.(\d+)\.dehazing\.up", r"pfdbs.\1.fdu.fc.2"),
            (r"down1", "encoder.0"),
            (r"down2", "encoder.2"),
            (r"down3", "encoder.4"),
            (r"up1", "decoder.0"),
            (r"up2", "decoder.2"),
            (r"up3", "decoder.4"),
        ],
        transposed=r"up1|up2",
        linear=r".*\.dehazing\.(down|up)",
    ),
)
