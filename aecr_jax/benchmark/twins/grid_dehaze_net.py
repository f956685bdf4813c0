"""GridDehazeNet in PyTorch, written from the paper and from a description of the authors' layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def make(settings: dict[str, Any]) -> nn.Module:
    """Return the network with the given `width`, `growth` and `dense_layers`."""
    return GridDehazeNet(settings["width"], settings["growth"], settings["dense_layers"])


class DenseLayer(nn.Module):
    """A convolution whose output is concatenated behind its input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.relu(self.conv(x))], 1)


class ResidualDenseBlock(nn.Module):
    """Dense layers, a 1x1 convolution of all their outputs, and the block's input added."""

    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        self.residual_dense_layers = nn.Sequential(*(DenseLayer(channels + growth * layer, growth) for layer in range(layers)))
        self.conv_1x1 = nn.Conv2d(channels + growth * layers, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_1x1(self.residual_dense_layers(x))


class Down(nn.Module):
    """Halves height and width and doubles the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class Up(nn.Module):
    """Doubles height and width to a given size and halves the channels to `channels`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.deconv = nn.ConvTranspose2d(2 * channels, 2 * channels, 3, stride=2, padding=1)
        self.conv = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.relu(self.conv(F.relu(self.deconv(x, size))))


class GridDehazeNet(nn.Module):
    """GridDehazeNet: maps `[N, 3, H, W]` to the same shape."""

    def __init__(self, width: int, growth: int, dense_layers: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.coefficient = nn.Parameter(torch.ones(3, 6, 2, 4 * width))
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.rdb_in = ResidualDenseBlock(width, growth, dense_layers)
        self.rdb_module = nn.ModuleDict(
            {f"{i}_{j}": ResidualDenseBlock(widths[i], growth, dense_layers) for i in range(3) for j in range(5)}
        )
        self.downsample_module = nn.ModuleDict({f"{i}_{j}": Down(widths[i]) for i in range(2) for j in range(3)})
        self.upsample_module = nn.ModuleDict({f"{i}_{j}": Up(widths[i]) for i in range(2) for j in range(3, 6)})
        self.rdb_out = ResidualDenseBlock(width, growth, dense_layers)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        top = self.rdb_in(self.conv_in(2 * x - 1))
        middle = self.downsample_module["0_0"](top)
        bottom = self.downsample_module["1_0"](middle)
        for j in range(1, 6):
            top, middle, bottom = (self.rdb_module[f"{i}_{j - 1}"](x) for i, x in enumerate((top, middle, bottom)))
            if j < 3:
                middle = self.join(1, j, middle, self.downsample_module[f"0_{j}"](top))
                bottom = self.join(2, j, bottom, self.downsample_module[f"1_{j}"](middle))
            else:
                middle = self.join(1, j, middle, self.upsample_module[f"1_{j}"](bottom, middle.shape[2:]))
                top = self.join(0, j, top, self.upsample_module[f"0_{j}"](middle, top.shape[2:]))
        return F.relu(self.conv_out(self.rdb_out(top)))

    def join(self, row: int, column: int, along: Tensor, across: Tensor) -> Tensor:
        a, b = self.coefficient[row, column, :, : along.shape[1], None, None]
        return a * along + b * across
