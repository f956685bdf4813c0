"""DehazeNet in PyTorch, written from the article and from the facts that the docstring of `aecr_jax.networks.dehaze_net` gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .guided_filter import guided_filter


def make(settings: dict[str, Any]) -> nn.Module:
    """Return the network with the settings `least_transmission`, `radius` and `epsilon`."""
    return DehazeNet(settings["least_transmission"], settings["radius"], settings["epsilon"])


class DehazeNet(nn.Module):
    """Restores images `[N, 3, H, W]`; H and W must be at least 3, the largest padding."""

    def __init__(self, least: float, radius: int, epsilon: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 5)
        self.conv3x3, self.conv5x5, self.conv7x7 = (nn.Conv2d(4, 16, size) for size in (3, 5, 7))
        self.ip = nn.Conv2d(48, 1, 6)
        self.least, self.radius, self.epsilon = least, radius, epsilon

    def forward(self, x: Tensor) -> Tensor:
        transmission = self.transmission(x)
        grey = 0.298936021293775 * x[:, :1] + 0.587043074451121 * x[:, 1:2] + 0.114020904255103 * x[:, 2:]
        estimated = transmission.flatten(1)
        rank = max((estimated.shape[1] + 50) // 100, 1)
        candidates = torch.where(estimated <= estimated.kthvalue(rank, 1, keepdim=True).values, grey.flatten(1), -torch.inf)
        chosen = (candidates == candidates.amax(1, keepdim=True))[:, None].to(x.dtype)
        airlight = ((x.flatten(2) * chosen).sum(2) / chosen.sum(2))[..., None, None]
        transmission = guided_filter(grey, transmission, self.radius, self.epsilon)
        if self.training or self.least:
            transmission = transmission.clamp(min=max(self.least, 0.05 if self.training else 0.0))
        return (x - airlight) / transmission + airlight

    def transmission(self, x: Tensor) -> Tensor:
        """Return the estimated transmission, `[N, 1, H, W]`."""
        y = self.conv1(mirror(x - 0.5, 2, 2))
        y = y.unflatten(1, (4, 4)).amax(2)
        y = mirror(y, 3, 3)  # the largest kernel's; the others need less of it
        y = torch.cat([self.conv3x3(y[:, :, 2:-2, 2:-2]), self.conv5x5(y[:, :, 1:-1, 1:-1]), self.conv7x7(y)], 1)
        y = F.max_pool2d(F.max_pool2d(y, (7, 1), 1, (3, 0)), (1, 7), 1, (0, 3))
        return self.ip(mirror(y, 2, 3)).clamp(0, 1)


def mirror(x: Tensor, before: int, after: int) -> Tensor:
    """Pad height and width by mirroring, with the edge pixels repeated."""
    for axis in (2, 3):
        size = x.shape[axis]
        index = torch.as_tensor(np.pad(np.arange(size), (before, after), mode="symmetric"), device=x.device)
        x = x.index_select(axis, index)
    return x
