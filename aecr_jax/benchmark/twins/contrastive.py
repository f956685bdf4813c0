"""VGG-19 features and contrastive regularization in PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG_CHANNELS = [64, 64, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512, 512]
VGG_POOL_BEFORE = (2, 4, 8, 12)  # indices of convolutions; the paper's feature levels are the outputs of convolution 0 and of these
LEVEL_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)


class VGG19(nn.Module):
    """The five VGG-19 feature maps of the regularization, with random weights, which do not affect the speed."""

    def __init__(self) -> None:
        super().__init__()
        channels = [3, *VGG_CHANNELS]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(channels))
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for i, conv in enumerate(self.convs):
            if i in VGG_POOL_BEFORE:
                x = F.max_pool2d(x, 2)
            x = F.relu(conv(x))
            if i == 0 or i in VGG_POOL_BEFORE:
                features.append(x)
        return features


def contrastive_regularization(
    features: Callable[[Tensor], Sequence[Tensor]], anchor: Tensor, positive: Tensor, negative: Tensor
) -> Tensor:
    """Return the regularization term of Eq. 4; the features of the clear and hazy images are treated as constants."""
    of_anchor = features(anchor)
    with torch.no_grad():
        of_positive, of_negative = features(positive), features(negative)
    terms = [
        w * F.l1_loss(a, p) / (F.l1_loss(a, n) + 1e-7)  # autocast computes l1_loss in float32
        for w, a, p, n in zip(LEVEL_WEIGHTS, of_anchor, of_positive, of_negative)
    ]
    return torch.stack(terms).sum()
