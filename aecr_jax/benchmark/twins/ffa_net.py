"""FFA-Net in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .aecr_net import Block, PixelAttention


def make(settings: dict[str, Any]) -> nn.Module:
    """Return the network with the given `width` and number of `blocks`."""
    return FFANet(settings["width"], settings["blocks"])


class Group(nn.Module):
    """Feature-attention blocks and a convolution, whose result is added to the input."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.gp = nn.Sequential(*(Block(channels) for _ in range(blocks)), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gp(x) + x


class FFANet(nn.Module):
    """FFA-Net: maps `[N, 3, H, W]` in [0, 1] to the same shape."""

    def __init__(self, width: int = 64, blocks: int = 19) -> None:
        super().__init__()
        hidden = max(1, width // 16)
        # The buffers are not part of the authors' checkpoints.
        self.register_buffer("mean", torch.tensor([0.64, 0.60, 0.58], dtype=torch.float64)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.14, 0.15, 0.152], dtype=torch.float64)[:, None, None], persistent=False)
        self.pre = nn.Sequential(nn.Conv2d(3, width, 3, padding=1))
        self.g1, self.g2, self.g3 = (Group(width, blocks) for _ in range(3))
        self.ca = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(3 * width, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, 3 * width, 1),
            nn.Sigmoid(),
        )
        self.palayer = PixelAttention(width)
        self.post = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)
        g1 = self.g1(self.pre(x))
        g2 = self.g2(g1)
        g3 = self.g3(g2)
        w1, w2, w3 = self.ca(torch.cat([g1, g2, g3], 1)).chunk(3, 1)
        return self.post(self.palayer(w1 * g1 + w2 * g2 + w3 * g3)) + x
