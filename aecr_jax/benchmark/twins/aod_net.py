"""AOD-Net in PyTorch, written from the layers of the authors' Caffe model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def make(settings: dict[str, Any]) -> nn.Module:
    """Return the network, which has no settings."""
    return AODNet()


class AODNet(nn.Module):
    """AOD-Net: maps `[N, 3, H, W]` to the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.e_conv1 = nn.Conv2d(3, 3, 1)
        self.e_conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.e_conv3 = nn.Conv2d(6, 3, 5, padding=2)
        self.e_conv4 = nn.Conv2d(6, 3, 7, padding=3)
        self.e_conv5 = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = F.relu(self.e_conv1(x))
        x2 = F.relu(self.e_conv2(x1))
        x3 = F.relu(self.e_conv3(torch.cat([x1, x2], 1)))
        x4 = F.relu(self.e_conv4(torch.cat([x2, x3], 1)))
        k = F.relu(self.e_conv5(torch.cat([x1, x2, x3, x4], 1)))
        return F.relu(k * x - k + 1)
