"""MSBDN-DFF in PyTorch, written from the facts in the docstrings of aecr_jax/networks/msbdn.py."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def make(settings: dict[str, Any]) -> nn.Module:
    """Return the network with the given `width` and `blocks`."""
    return MSBDN(settings["width"], settings["blocks"])


class ReflectConv(nn.Module):
    """A convolution with reflection padding."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(inputs, outputs, size, stride, size // 2, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2d(x)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ReflectConv(channels, channels, 3), ReflectConv(channels, channels, 3)
        self.relu = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x.add(self.conv2(self.relu(self.conv1(x))), alpha=0.1)


class Up(nn.Module):
    """A transposed convolution that doubles the size, and a PReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.deconv, self.act = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.deconv(x))


class Down(nn.Module):
    """A convolution that halves the size, and a PReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(inputs, outputs, 4, 2, 1), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Fusion(nn.Module):
    """Corrects features by those of other scales; `factor` is the ratio of channels from one scale to the next, 1/2 (finer) or 2."""

    def __init__(self, channels: int, count: int, factor: float) -> None:
        super().__init__()
        sides = [sorted((int(channels * factor**k), int(channels * factor ** (k + 1)))) for k in range(count)]
        self.up_convs = nn.ModuleList(Up(many, few) for few, many in sides)
        self.down_convs = nn.ModuleList(Down(few, many) for few, many in sides)
        self.finer = factor < 1

    def forward(self, x: Tensor, others: list[Tensor]) -> Tensor:
        away, back = (self.up_convs, self.down_convs) if self.finer else (self.down_convs, self.up_convs)
        for i, other in enumerate(others):
            steps = len(others) - i
            error = x
            for k in range(steps):
                error = away[k](error)
            error = error - other
            for k in reversed(range(steps)):
                error = back[k](error)
            x = x + error
        return x


class MSBDN(nn.Module):
    """MSBDN-DFF: maps `[N, 3, H, W]` to the same shape; H and W must be multiples of 16."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        w = width
        self.conv_input = ReflectConv(3, w, 11)
        self.conv_output = ReflectConv(w, 3, 3)
        for n in range(4):
            c = w * 2**n
            setattr(self, f"dense{n}", nn.Sequential(*(Block(c) for _ in range(3))))
            setattr(self, f"conv{2 ** (n + 1)}x", ReflectConv(c, 2 * c, 3, 2))
            setattr(self, f"fusion{n + 1}", Fusion(2 * c, n + 1, 0.5))
            up = nn.Module()
            up.conv2d = nn.ConvTranspose2d(2 * c, c, 3, 2)
            setattr(self, f"convd{2 ** (n + 1)}x", up)
            setattr(self, f"dense_{n + 1}", nn.Sequential(*(Block(c) for _ in range(3))))
            setattr(self, f"fusion_{n + 1}", Fusion(c, 4 - n, 2))
        self.dehaze = nn.Sequential()
        for n in range(blocks):
            self.dehaze.add_module(f"res{n}", Block(16 * w))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_input(x)
        finer, skips = [x], []
        for n in range(4):
            skips.append(getattr(self, f"dense{n}")(x) + x)
            x = getattr(self, f"fusion{n + 1}")(getattr(self, f"conv{2 ** (n + 1)}x")(skips[n]), finer)
            finer.append(x)
        x = self.dehaze(2 * x) + x
        coarser = [x]
        for n in (3, 2, 1, 0):
            skip = skips[n]
            up = getattr(self, f"convd{2 ** (n + 1)}x").conv2d(x)
            up = F.interpolate(up, skip.shape[2:], mode="bilinear", align_corners=False)
            x = getattr(self, f"dense_{n + 1}")(up + skip) + skip
            x = getattr(self, f"fusion_{n + 1}")(x, coarser)
            coarser.append(x)
        return self.conv_output(x)
