"""The dehazing network of KDDN (the student) in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def make(settings: dict[str, Any]) -> nn.Module:
    """Return the network with the given `width` and number of `blocks`."""
    return KDDN(settings["width"], settings["blocks"])


class ReflectConv(nn.Module):
    """A convolution padded by reflection."""

    def __init__(self, in_features: int, out_features: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_features, out_features, size, stride, (size - 1) // 2, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ChannelAttention(nn.Module):
    """Scales each channel by a factor computed from the means of all channels."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, features), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class Block(nn.Module):
    """The spatially weighted residual channel-attention block."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.model1 = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(features, features, 3, padding=1), nn.Sigmoid()
        )
        self.se = ChannelAttention(features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x).relu_())
        return x + self.se(y * self.model1(y))


class KDDN(nn.Module):
    """The student of KDDN: maps `[N, 3, H, W]` to the same shape; H and W must be multiples of 4."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        w = width
        self.conv0 = nn.Sequential(ReflectConv(3, w, 3), nn.ReLU(inplace=True))
        self.down1 = nn.Sequential(ReflectConv(w, w, 4, 2), nn.ReLU(inplace=True))
        self.down2 = nn.Sequential(ReflectConv(w, w, 4, 2), nn.ReLU(inplace=True))
        for group in range(1, 7):
            self.add_module(f"res{group}", nn.Sequential(*(Block(w) for _ in range(blocks)), nn.Conv2d(w, w, 3, padding=1)))
        self.up1 = nn.Sequential(ReflectConv(2 * w, w, 3), nn.ReLU(inplace=True))
        self.up2 = nn.Sequential(ReflectConv(2 * w, w, 3), nn.ReLU(inplace=True))
        self.out = nn.Sequential(ReflectConv(w, 3, 3), nn.Tanh())
        self.enlarge = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

    def forward(self, x: Tensor) -> Tensor:
        full = self.conv0(x)
        half = self.down1(full)
        y = self.down2(half)
        for group in range(1, 7):
            y = y + self.get_submodule(f"res{group}")(y)
        y = self.up1(torch.cat([self.enlarge(y), half], 1))
        return self.out(self.up2(torch.cat([self.enlarge(y), full], 1)))
