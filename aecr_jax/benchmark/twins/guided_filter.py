"""The guided filter in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def guided_filter(guide: Tensor, image: Tensor, radius: int, epsilon: float) -> Tensor:
    """Return `image` `[N, 1, H, W]` filtered along the edges of `guide` of the same shape."""
    mean_guide, mean_image, square, product = box_mean(torch.cat([guide, image, guide * guide, guide * image], 1), radius).split(1, 1)
    a = (product - mean_guide * mean_image) / (square - mean_guide * mean_guide + epsilon)
    b = mean_image - a * mean_guide
    mean_a, mean_b = box_mean(torch.cat([a, b], 1), radius).split(1, 1)
    return mean_a * guide + mean_b


def box_mean(x: Tensor, radius: int) -> Tensor:
    """Return the mean over the window of `2 radius + 1` rows and columns, cut at the border, by differences of cumulative sums."""
    for axis in (2, 3):
        size = x.shape[axis]
        i = torch.arange(size, device=x.device)
        first, last = (i - radius).clamp(min=0), (i + radius).clamp(max=size - 1)
        sums = torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), x.cumsum(axis)], axis)
        counts = (last + 1 - first).to(x.dtype).reshape([-1 if other == axis else 1 for other in range(4)])
        x = (sums.index_select(axis, last + 1) - sums.index_select(axis, first)) / counts
    return x
