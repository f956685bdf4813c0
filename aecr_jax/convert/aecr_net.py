"""The checkpoints of the official AECR-Net."""

from __future__ import annotations

import numpy as np

from aecr_jax.convert.format import SCALAR, Format, Layout, read_size, rename
from aecr_jax.convert.tensors import Tensors
from aecr_jax.networks.aecr_net import AECRNetConfig

_TITLE = "the official AECR-Net"

# PyTorch's unfold orders the values of a patch by (channel, row, column), this project by (row, column, channel).
_PATCH = np.arange(27).reshape(3, 3, 3).transpose(1, 2, 0).ravel()
_PATCH_BACK = np.argsort(_PATCH)
_SPECIAL = {
    "fast_deconv.running_mean": ("deconv.running_mean", Layout(lambda x: x[_PATCH], lambda x: x[_PATCH_BACK])),
    "fast_deconv.running_deconv": (
        "deconv.running_deconv",
        Layout(lambda x: x[np.ix_(_PATCH, _PATCH)], lambda x: x[np.ix_(_PATCH_BACK, _PATCH_BACK)]),
    ),
    "mix1.theta": ("mix1.w", SCALAR),
    "mix2.theta": ("mix2.w", SCALAR),
}
_rename = rename(
    [
        (r"(down1|up3)", r"\1.1"),
        (r"(down2|down3|up1|up2)", r"\1.0"),
        (r"blocks\.0\.(conv.)", r"block.\1"),
        (r"blocks\.0\.channel_down", "block.calayer.ca.0"),
        (r"blocks\.0\.channel_up", "block.calayer.ca.2"),
        (r"blocks\.0\.pixel_down", "block.palayer.pa.0"),
        (r"blocks\.0\.pixel_up", "block.palayer.pa.2"),
        (r"deform\.0", "dcn_block.dcn"),
        (r"deform\.0\.offset_mask", "dcn_block.dcn.conv_offset_mask"),
        (r"fast_deconv", "deconv"),
    ],
    transposed="up1|up2",
)


def _read_config(tensors: Tensors) -> AECRNetConfig:
    width = read_size(tensors, ("down1.1.weight", "down1.1.bias", "up2.0.bias"), _TITLE)
    return AECRNetConfig(width=width, fast_deconv="deconv.weight" in tensors)


FORMAT = Format(
    title=_TITLE,
    signature=r"dcn_block\.dcn\.weight",
    read_config=_read_config,
    rename=lambda name: _SPECIAL.get(name) or _rename(name),
    # The convolution that predicts offsets and masks is initialized with zeros.
    may_be_constant=r".*conv_offset_mask\.weight",
    fixed=lambda config: AECRNetConfig(
        width=config.width, fast_deconv=config.fast_deconv, dtype=config.dtype, param_dtype=config.param_dtype
    ),
)
