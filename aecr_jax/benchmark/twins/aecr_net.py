"""AECR-Net in PyTorch, written from the paper and from the facts in docs/fidelity.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (x, offset, weight, bias, padding=, mask=) -> y, for example torchvision.ops.deform_conv2d
DeformConv2d = Callable[..., Tensor]


def make(settings: dict[str, Any]) -> nn.Module:
    """Return the network with the given `width`; the other settings must be the defaults."""
    return AECRNet(deform, settings["width"])


def deform(x: Tensor, offset: Tensor, weight: Tensor, bias: Any, padding: int, mask: Tensor) -> Tensor:
    """Apply torchvision's operator, which runs in float32 also under autocast.

    The operator does not support bfloat16 on CPUs, and on GPUs autocast runs it in float32.
    """
    from torchvision.ops import deform_conv2d

    with torch.autocast(x.device.type, enabled=False):
        return deform_conv2d(x.float(), offset.float(), weight, bias, padding=padding, mask=mask.float()).to(x.dtype)


class FastDeconv(nn.Module):
    """A convolution whose 3x3 input patches are whitened over the batch (Newton-Schulz iteration)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3) / 5)
        self.bias = nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(27))
        self.register_buffer("running_deconv", torch.eye(27))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.autocast(x.device.type, enabled=False):
                patches = F.unfold(x, 3, padding=1, stride=3).transpose(1, 2).reshape(-1, 27)
                mean = patches.mean(0)
                centred = patches - mean
                eye = torch.eye(27, device=x.device, dtype=x.dtype)
                covariance = centred.t() @ centred / len(patches) + 1e-5 * eye
                norm = covariance.norm()
                y, z = covariance / norm, eye
                for _ in range(5):
                    t = 0.5 * (3 * eye - z @ y)
                    y, z = y @ t, t @ z
                deconv = z / norm.sqrt()
                with torch.no_grad():
                    self.running_mean.lerp_(mean, 0.1)
                    self.running_deconv.lerp_(deconv, 0.1)
        else:
            mean, deconv = self.running_mean, self.running_deconv
        weight = self.weight.reshape(3, 27) @ deconv
        bias = self.bias - weight @ mean
        return F.conv2d(x, weight.reshape(3, 3, 3, 3), bias, padding=1)


class ChannelAttention(nn.Module):
    """Channel attention: scales each channel by a factor computed from the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 8)
        self.ca = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.ca(x.mean((2, 3), keepdim=True))


class PixelAttention(nn.Module):
    """Pixel attention: scales each pixel by a factor computed from its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 8)
        self.pa = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pa(x)


class Block(nn.Module):
    """The feature-attention block of FFA-Net."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.calayer = ChannelAttention(channels)
        self.palayer = PixelAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)) + x)
        return self.palayer(self.calayer(y)) + x


class DeformLayer(nn.Module):
    """A DCNv2 layer, whose offsets and mask are computed by a convolution of the input."""

    def __init__(self, channels: int, deform_conv2d: DeformConv2d) -> None:
        super().__init__()
        reference = nn.Conv2d(channels, channels, 3)
        self.weight, self.bias = reference.weight, nn.Parameter(torch.zeros(channels))
        self.conv_offset_mask = nn.Conv2d(channels, 27, 3, padding=1)
        nn.init.zeros_(self.conv_offset_mask.weight)
        nn.init.zeros_(self.conv_offset_mask.bias)
        self.deform_conv2d = deform_conv2d

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.conv_offset_mask(x).split([18, 9], 1)
        return self.deform_conv2d(x, offset.contiguous(), self.weight, self.bias, padding=1, mask=mask.sigmoid().contiguous())


class Mixup(nn.Module):
    """A learned mixture of encoder and decoder features."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([theta]))

    def forward(self, down: Tensor, up: Tensor) -> Tensor:
        share = self.w.sigmoid()
        return share * down + (1 - share) * up


class DeformBlock(nn.Module):
    """A deformable layer that is applied twice with the same weights."""

    def __init__(self, channels: int, deform_conv2d: DeformConv2d) -> None:
        super().__init__()
        self.dcn = DeformLayer(channels, deform_conv2d)

    def forward(self, x: Tensor) -> Tensor:
        return self.dcn(self.dcn(x))


class AECRNet(nn.Module):
    """AECR-Net: maps `[N, 3, H, W]` to the same shape; H and W must be multiples of 4."""

    def __init__(self, deform_conv2d: DeformConv2d, width: int = 64) -> None:
        super().__init__()
        w = width
        self.deconv = FastDeconv()
        self.down1 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, w, 7), nn.ReLU(inplace=True))
        self.down2 = nn.Sequential(nn.Conv2d(w, 2 * w, 3, 2, 1), nn.ReLU(inplace=True))
        self.down3 = nn.Sequential(nn.Conv2d(2 * w, 4 * w, 3, 2, 1), nn.ReLU(inplace=True))
        self.block = Block(4 * w)
        self.dcn_block = DeformBlock(4 * w, deform_conv2d)
        self.mix1, self.mix2 = Mixup(-1.0), Mixup(-0.6)
        self.up1 = nn.Sequential(nn.ConvTranspose2d(4 * w, 2 * w, 3, 2, 1, 1), nn.ReLU(inplace=True))
        self.up2 = nn.Sequential(nn.ConvTranspose2d(2 * w, w, 3, 2, 1, 1), nn.ReLU(inplace=True))
        self.up3 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(w, 3, 7), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        down2 = self.down2(self.down1(self.deconv(x)))
        y = down3 = self.down3(down2)
        for _ in range(6):
            y = self.block(y)
        up1 = self.up1(self.mix1(down3, self.dcn_block(y)))
        return self.up3(self.up2(self.mix2(down2, up1)))
