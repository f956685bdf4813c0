"""The teacher of KDDN in PyTorch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .kddn import ReflectConv


def make(settings: dict[str, Any]) -> nn.Module:
    """Return the network with the given `width`."""
    return KDDNTeacher(settings["width"])


class Block(nn.Module):
    """A residual block."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.model = nn.Sequential(ReflectConv(features, features, 3), ReflectConv(features, features, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.model[1](F.relu(self.model[0](x), inplace=True))


class KDDNTeacher(nn.Module):
    """The teacher of KDDN: maps `[N, 3, H, W]` to the same shape; H and W must be multiples of 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w = width
        self.conv0 = ReflectConv(3, w, 7)
        self.down = nn.Sequential(ReflectConv(w, w, 4, 2), ReflectConv(w, w, 4, 2))
        for block in range(1, 7):
            self.add_module(f"res{block}", Block(w))
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), ReflectConv(w, w, 5), nn.Upsample(scale_factor=2), ReflectConv(w, w, 5))
        self.out = ReflectConv(w, 3, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv0(x), inplace=True)
        for layer in self.down:
            y = F.relu(layer(y), inplace=True)
        for block in range(1, 7):
            y = self.get_submodule(f"res{block}")(y)
        first, conv1, second, conv2 = self.up
        y = F.relu(conv1(first(y)), inplace=True)
        y = F.relu(conv2(second(y)), inplace=True)
        return self.out(y).tanh()
