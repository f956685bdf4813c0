"""State dicts of the reproduction of PFDN in IDKiro/gUNet."""

from __future__ import annotations

from aecr_jax.convert.format import Format, count_layers, read_size, rename
from aecr_jax.convert.tensors import Tensors
from aecr_jax.networks.pfdn import PFDNConfig

_TITLE = "the PFDN of IDKiro/gUNet"


def _read_config(tensors: Tensors) -> PFDNConfig:
    width = read_size(tensors, ("encoder.0.weight", "encoder.0.bias", "decoder.2.bias"), _TITLE)
    return PFDNConfig(width=width, blocks=count_layers(tensors, r"pfdbs\.(\d+)\.conv[12]\.weight", _TITLE))


FORMAT = Format(
    title=_TITLE,
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
