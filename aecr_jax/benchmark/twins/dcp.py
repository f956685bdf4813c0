"""The dark channel prior in PyTorch, written from the article."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .guided_filter import guided_filter


def make(settings: dict[str, Any]) -> nn.Module:
    """Return the network with the settings `patch`, `omega`, `least_transmission`, `radius` and `epsilon`."""
    return DCP(*(settings[name] for name in ("patch", "omega", "least_transmission", "radius", "epsilon")))


class DCP(nn.Module):
    """Restores images `[N, 3, H, W]`; H and W may have any value."""

    def __init__(self, patch: int, omega: float, least: float, radius: int, epsilon: float) -> None:
        super().__init__()
        self.patch, self.omega, self.least, self.radius, self.epsilon = patch, omega, least, radius, epsilon

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2)  # [N, 3, H W]
        dark = self.dark_channel(x).flatten(1)
        count = max(dark.shape[1] // 1000, 1)
        candidates = pixels.gather(2, dark.topk(count, 1).indices[:, None].expand(-1, 3, -1))
        brightest = candidates.sum(1).argmax(1)
        airlight = candidates.gather(2, brightest[:, None, None].expand(-1, 3, 1))[..., None]  # [N, 3, 1, 1]
        transmission = 1 - self.omega * self.dark_channel(x / airlight)
        grey = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
        transmission = guided_filter(grey, transmission, self.radius, self.epsilon)
        return (x - airlight) / transmission.clamp(min=self.least) + airlight

    def dark_channel(self, x: Tensor) -> Tensor:
        """Return the smallest value in windows of `patch` x `patch` pixels, `[N, 1, H, W]`."""
        negated = -x.amin(1, keepdim=True)
        reach = self.patch // 2
        # Rows and columns in turn take 2 k comparisons for each pixel instead of k^2.
        negated = F.max_pool2d(negated, (self.patch, 1), 1, (reach, 0))
        return -F.max_pool2d(negated, (1, self.patch), 1, (0, reach))
