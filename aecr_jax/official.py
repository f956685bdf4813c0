"""The names and layouts of the official PyTorch checkpoint, both ways. A pure renaming: bits do not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_Layout = Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _conv(x: np.ndarray) -> np.ndarray:  # OIHW -> HWIO
    return x.transpose(2, 3, 1, 0)


def _conv_back(x: np.ndarray) -> np.ndarray:
    return x.transpose(3, 2, 0, 1)


def _up(x: np.ndarray) -> np.ndarray:  # IOHW -> HWIO, and back
    return x.transpose(2, 3, 0, 1)


# PyTorch's unfold lists a patch as (channel, row, column), ours as (row, column, channel).
_PATCH = np.arange(27).reshape(3, 3, 3).transpose(1, 2, 0).ravel()
_PATCH_BACK = np.argsort(_PATCH)

_CONV: tuple[_Layout, _Layout] = (_conv, _conv_back)
_UP: tuple[_Layout, _Layout] = (_up, _up)
_SAME: tuple[_Layout, _Layout] = (_same, _same)
_MEAN: tuple[_Layout, _Layout] = (lambda x: x[_PATCH], lambda x: x[_PATCH_BACK])
_MATRIX: tuple[_Layout, _Layout] = (lambda x: x[np.ix_(_PATCH, _PATCH)], lambda x: x[np.ix_(_PATCH_BACK, _PATCH_BACK)])
_SCALAR: tuple[_Layout, _Layout] = (lambda x: x.reshape(()), lambda x: x.reshape(1))

# ours -> (official, kernel layout); each stands for a kernel and a bias
_LAYERS = {
    "down1": ("down1.1", _CONV),
    "down2": ("down2.0", _CONV),
    "down3": ("down3.0", _CONV),
    "blocks.0.conv1": ("block.conv1", _CONV),
    "blocks.0.conv2": ("block.conv2", _CONV),
    "blocks.0.channel_down": ("block.calayer.ca.0", _CONV),
    "blocks.0.channel_up": ("block.calayer.ca.2", _CONV),
    "blocks.0.pixel_down": ("block.palayer.pa.0", _CONV),
    "blocks.0.pixel_up": ("block.palayer.pa.2", _CONV),
    "up1": ("up1.0", _UP),
    "up2": ("up2.0", _UP),
    "up3": ("up3.1", _CONV),
    "deform.0": ("dcn_block.dcn", _CONV),
    "deform.0.offset_mask": ("dcn_block.dcn.conv_offset_mask", _CONV),
    "fast_deconv": ("deconv", _CONV),
}
NAMES: dict[str, tuple[str, tuple[_Layout, _Layout]]] = {
    "fast_deconv.running_mean": ("deconv.running_mean", _MEAN),
    "fast_deconv.running_deconv": ("deconv.running_deconv", _MATRIX),
    "mix1.theta": ("mix1.w", _SCALAR),
    "mix2.theta": ("mix2.w", _SCALAR),
}
for _ours, (_theirs, _layout) in _LAYERS.items():
    NAMES[f"{_ours}.kernel"] = (f"{_theirs}.weight", _layout)
    NAMES[f"{_ours}.bias"] = (f"{_theirs}.bias", _SAME)


def official_names(ours: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our names -> (official name, its shape there), for the arrays (or shapes) of one of our models."""
    return {name: (NAMES[name][0], NAMES[name][1][1](np.empty(array.shape, np.bool_)).shape) for name, array in ours.items()}


def our_arrays(official: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Official tensors, without the prefix `module.`, by our names and in our layouts; unknown ones are left out."""
    return {ours: layout(official[theirs]) for ours, (theirs, (layout, _)) in NAMES.items() if theirs in official}


def official_arrays(ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The way back of `our_arrays`."""
    return {NAMES[name][0]: NAMES[name][1][1](array) for name, array in ours.items()}
