"""PFDN in PyTorch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def make(settings: dict[str, Any]) -> nn.Module:
    """Return the network with the given `width` and number of `blocks`."""
    return PFDN(settings["width"], settings["blocks"])


class FeatureDehazingUnit(nn.Module):
    """Multiplies each channel by a factor and adds a summand, which are computed from the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 16)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(inplace=True), nn.Linear(hidden, 2 * channels, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        factor, summand = self.fc(x.mean((2, 3)))[:, :, None, None].chunk(2, 1)
        return x * factor + summand


class Block(nn.Module):
    """Two convolutions and a feature dehazing unit, whose result is added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.fdu = FeatureDehazingUnit(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fdu(self.conv2(F.relu(self.conv1(x)))) + x


class PFDN(nn.Module):
    """PFDN: maps `[N, 3, H, W]` in [0, 1] to the same shape; H and W must be multiples of 4."""

    def __init__(self, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        w = width
        self.encoder = nn.Sequential(
            nn.Conv2d(3, w, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(w, 2 * w, 3, 2, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * w, 4 * w, 3, 2, 1),
            nn.ReLU(inplace=True),
        )
        self.pfdbs = nn.Sequential(*(Block(4 * w) for _ in range(blocks)))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(4 * w, 2 * w, 2, 2),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * w, w, 2, 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(w, 3, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.decoder(self.pfdbs(self.encoder(2 * x - 1))) + 1) / 2
