"""CoarseNet in PyTorch; the tensors have the names of aecr_jax's own network."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def make(settings: dict[str, Any]) -> nn.Module:
    """Return the network with the given `width` and `blocks`, for images of at most 1,048,576 pixels."""
    return CoarseNet(settings["width"], settings["blocks"])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(x)))


class Moments:
    """The least and the greatest values, the means and the variances of square cells."""

    def __init__(self, least: Tensor, greatest: Tensor, means: Tensor, variances: Tensor | float, side: int) -> None:
        self.least, self.greatest = -F.max_pool2d(-least, side), F.max_pool2d(greatest, side)
        self.mean = F.avg_pool2d(means, side)
        self.variance = F.avg_pool2d(variances + (means - F.interpolate(self.mean, scale_factor=side)) ** 2, side)

    def coarser(self) -> Moments:
        """Return the moments of cells twice as large."""
        return Moments(self.least, self.greatest, self.mean, self.variance, 2)

    def features(self) -> Tensor:
        """Return the extremes, and logarithms of extremes, distances from 1, means and standard deviations."""
        extremes = torch.cat([self.least, self.greatest], 1)
        logarithms = [extremes + 0.02, 1.02 - extremes, self.mean + 0.02, (self.variance + 1e-4).sqrt()]
        return torch.cat([extremes, *(x.log() for x in logarithms)], 1)


def smooth(gain: Tensor, airlight: Tensor) -> Tensor:
    """Return the mean airlight of the surroundings of each cell, weighted by the gain."""
    sums = F.avg_pool2d(torch.cat([gain, gain * airlight], 1), 4)
    weights = torch.tensor([1, 2, 1], dtype=sums.dtype)
    kernel = (weights[:, None] * weights / 16).expand(4, 1, 3, 3)
    for _ in range(2):
        sums = F.conv2d(F.pad(sums, (1, 1, 1, 1), mode="replicate"), kernel, groups=4)
    sums = F.interpolate(sums, scale_factor=4, mode="bilinear")
    return sums[:, 1:] / (sums[:, :1] + 1e-6)


class CoarseNet(nn.Module):
    """CoarseNet: maps `[N, 3, H, W]` to the same shape."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        widths = [width, width * 4 // 3, width * 2]
        self.stem = nn.Conv2d(72, width, 1)
        self.moments = nn.ModuleList(nn.Conv2d(24, channels, 1) for channels in widths)
        self.downs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in zip([width, *widths], widths))
        self.encoder = nn.ModuleList(nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks))) for channels in widths)
        self.context = nn.Conv2d(widths[-1], widths[-1], 1)
        self.ups = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(widths[1:], widths))
        self.decoder = nn.ModuleList(nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks))) for channels in widths[:-1])
        self.maps = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, hazy: Tensor) -> Tensor:
        h, w = hazy.shape[2:]
        maps = self.estimate(F.pad(hazy, (0, -w % 32, 0, -h % 32), mode="reflect"))
        gain = 1 / (0.02 + 0.98 * (maps[:, :1] + 2).sigmoid()) - 1
        offset = gain * smooth(gain, maps[:, 1:].sigmoid())
        enlarged = F.interpolate(torch.cat([1 + gain, offset], 1), scale_factor=8, mode="bilinear")[:, :, :h, :w]
        return enlarged[:, :1] * hazy - enlarged[:, 1:]

    def estimate(self, x: Tensor) -> Tensor:
        # The channels of a cell are ordered by row, column and colour; PyTorch's own order is by colour first.
        cells = F.pixel_unshuffle(x, 4).unflatten(1, (3, 16)).transpose(1, 2).flatten(1, 2)
        within = x.clamp(0, 1)
        moments = Moments(within, within, within, 0.0, 4)
        x = F.silu(self.stem(torch.cat([cells, moments.features()], 1)))
        levels = []
        for down, see, blocks in zip(self.downs, self.moments, self.encoder):
            moments = moments.coarser()
            x = blocks(F.silu(down(x) + see(moments.features())))
            levels.append(x)
        x = levels.pop()
        x = x + self.context(x.mean((2, 3), keepdim=True))
        for up, blocks, finer in zip(reversed(self.ups), reversed(self.decoder), reversed(levels)):
            x = blocks(finer + F.interpolate(up(x), scale_factor=2, mode="bilinear"))
        return self.maps(x)
