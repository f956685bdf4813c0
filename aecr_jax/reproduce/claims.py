"""Whether the claims of a table hold: intervals of paired differences of the images' scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.special import stdtrit

_CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and its 95% interval, in dB."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def paired_interval(scores: Mapping[str, float], base: Mapping[str, float], scenes: Mapping[str, str]) -> Interval:
    """Return the mean of `scores - base` over the images, and its 95% interval by Student's t distribution.

    Images of one scene, such as the ten hazy versions in SOTS indoor, have similar differences, so the standard error is the one for
    clusters (Liang and Zeger, 1986), with one cluster for each scene. If each scene has one image, it is the ordinary paired interval.

    Args:
      scores: PSNR in dB by image.
      base: the same for the row to compare with.
      scenes: the scene of each image.

    Returns:
      The interval; it is infinite if there are fewer than two scenes.

    Raises:
      ValueError: the two rows were not scored on the same images, or on images without a scene.
    """
    if scores.keys() != base.keys() or not scores:
        raise ValueError("the rows were not scored on the same images")
    if other := sorted(scores.keys() - scenes.keys()):
        raise ValueError(f"they were scored on other images than those of today, such as {other[0]}")
    differences = {image: score - base[image] for image, score in scores.items()}
    count = len(differences)
    mean = math.fsum(differences.values()) / count
    sums: dict[str, float] = {}
    for image, difference in differences.items():
        sums[scenes[image]] = sums.get(scenes[image], 0.0) + difference - mean
    clusters = len(sums)
    if clusters < 2:
        return Interval(mean, -math.inf, math.inf)
    error = math.sqrt(clusters / (clusters - 1) * math.fsum(value**2 for value in sums.values())) / count
    reach = float(stdtrit(clusters - 1, (1 + _CONFIDENCE) / 2)) * error
    return Interval(mean, mean - reach, mean + reach)


def judge(gain: float | None, intervals: Sequence[Interval]) -> str:
    """Return whether a claim "holds", "fails" or is "undecided".

    It is decided if there are at least two seeds and the intervals of all exclude 0 on the same side.

    Args:
      gain: the paper's difference, of which only the sign counts; None, for claims that the paper does not make, counts as positive.
      intervals: what was measured, one interval for each seed.
    """
    signs = {1 if low > 0 else -1 if high < 0 else 0 for _, low, high in intervals}
    if len(intervals) < 2 or len(signs) > 1 or 0 in signs:
        return "undecided"
    return "holds" if signs == {-1 if gain is not None and gain < 0 else 1} else "fails"
