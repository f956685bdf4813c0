"""Tables 2 to 4 of the paper as data: the config of each row, its scores in the paper, and the claims that follow from the rows.

All scores are of SOTS indoor (Wu et al., CVPR 2021); those of Table 3's networks without regularization are in Table 1.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aecr_jax.errors import UserError

NAMES = ("table2", "table3", "table4")


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    name: str
    """Name on the command line and in the results."""
    config: str
    """Config of the paper's recipe, as for `train.py --config`."""
    psnr: float | None = None
    """The paper's PSNR in dB; None if the paper has no such row."""
    ssim: float | None = None
    """The paper's SSIM; None if it is not in the paper."""
    loss: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the loss that differ from those of `config`."""
    folder: str = ""
    """Name of the run's folder if it is not `name`: rows of two tables with the same settings share one run."""

    @property
    def run(self) -> str:
        """Name of the run's folder, without the seed."""
        return (self.folder or self.name).replace(":", "_")


@dataclass(frozen=True)
class Claim:
    """The claim that `row` has a higher score than `base`, or a lower one if `gain` is negative."""

    text: str
    row: str
    base: str
    gain: float | None
    """The paper's difference of PSNR in dB; None if the paper has no such rows."""


@dataclass(frozen=True)
class Table:
    """The rows and the claims of a table."""

    name: str
    title: str
    rows: Sequence[Row]
    claims: Sequence[Claim]


_TABLE2 = Table(
    "table2",
    "Table 2: the parts of AECR-Net",
    [
        Row("base", "configs/table2.py:base", 33.85, 0.9820),
        Row("base_mixup", "configs/table2.py:base_mixup", 34.04, 0.9838),
        Row("base_dfe", "configs/table2.py:base_dfe", 35.50, 0.9853),
        Row("base_dfe_sc", "configs/table2.py:base_dfe_sc", 35.59, 0.9858),
        Row("base_dfe_mixup", "configs/table2.py:base_dfe_mixup", 36.20, 0.9869),
        Row("cr_positive", "configs/table2.py:cr_positive", 36.46, 0.9889),
        Row("cr", "configs/its.py", 37.17, 0.9901),
    ],
    [
        Claim("adaptive mixup helps without DFE", "base_mixup", "base", 0.19),
        Claim("adaptive mixup helps with DFE", "base_dfe_mixup", "base_dfe", 0.70),
        Claim("DFE helps without mixup", "base_dfe", "base", 1.65),
        Claim("DFE helps with mixup", "base_dfe_mixup", "base_mixup", 2.16),
        Claim("adaptive mixup is better than a plain sum", "base_dfe_mixup", "base_dfe_sc", 0.61),
        Claim("regularization by positives alone (CR*) helps", "cr_positive", "base_dfe_mixup", 0.26),
        Claim("contrastive regularization (CR) helps", "cr", "base_dfe_mixup", 0.97),
    ],
)


def _with_and_without_cr(name: str, without: tuple[float, float], with_cr: float) -> list[Row]:
    """Return the two rows of a network of Table 3, which differ in `loss.cr` alone.

    KDDN is therefore trained without its teacher: its recipe compares features with those of a teacher in place of the regularization.
    """
    config = f"configs/methods.py:{name}:cr"
    return [Row(name, config, *without, loss={"cr": 0.0}), Row(f"{name}:cr", config, with_cr)]


_TABLE3 = Table(
    "table3",
    "Table 3: contrastive regularization (CR) with other networks",
    [
        *_with_and_without_cr("grid_dehaze_net", (32.16, 0.9836), 32.99),
        *_with_and_without_cr("ffa_net", (36.39, 0.9886), 36.74),
        *_with_and_without_cr("kddn", (34.72, 0.9845), 35.18),
        *_with_and_without_cr("msbdn", (33.79, 0.9840), 34.45),
    ],
    [
        Claim("CR helps GridDehazeNet", "grid_dehaze_net:cr", "grid_dehaze_net", 0.83),
        Claim("CR helps FFA-Net", "ffa_net:cr", "ffa_net", 0.35),
        Claim("CR helps KDDN", "kddn:cr", "kddn", 0.46),
        Claim("CR helps MSBDN", "msbdn:cr", "msbdn", 0.66),
    ],
)

# The paper's scores by numbers of positives and negatives, where 10 is its r.
_RATES: dict[tuple[int, ...], tuple[float, float]] = {
    (1, 1): (37.17, 0.9901),
    (1, 10): (37.41, 0.9906),
    (10, 1): (35.61, 0.9862),
    (10, 10): (35.65, 0.9861),
}
PAPERS_RATE = 10

# Rows that the paper does not have, each with its claim. They are run only if they are named. Before step 300, a lagging average equals the
# network too closely to be a negative; afterwards it is still close to it, so that the ratio is large and needs a smaller weight.
_LEVELS = {"cr_layers": ("relu1_1", "relu2_1", "relu3_1"), "cr_weights": (0.03125, 0.0625, 0.125)}
_MORE: dict[str, list[tuple[Row, Claim]]] = {
    "table2": [
        (
            Row("cr_three_levels", "configs/its.py", loss=_LEVELS),
            Claim("CR with the first three levels of VGG-19 helps", "cr_three_levels", "base_dfe_mixup", None),
        )
    ],
    "table4": [
        (
            Row("rehazed", "configs/its.py", loss={"cr_negatives": "rehazed"}),
            Claim("the same scene under other haze is a better negative", "rehazed", "1:1", None),
        ),
        (
            Row("lagging", "configs/its.py", loss={"cr": 0.01, "cr_negatives": "lagging", "cr_after": 300}),
            Claim("restorations by a lagging average are better negatives", "lagging", "1:1", None),
        ),
    ],
}


def _rate(positives: int, negatives: int, r: int) -> Row:
    rate = tuple(PAPERS_RATE if number == r else number for number in (positives, negatives))
    psnr, ssim = _RATES.get(rate, (None, None))
    folder = "cr" if positives == negatives == 1 else f"rate_{positives}_{negatives}"
    loss = {"positives": positives, "negatives": negatives}
    return Row(f"{positives}:{negatives}", "configs/its.py", psnr, ssim, loss, folder)


def _table4(r: int, more: Sequence[str]) -> Table:
    rows = [_rate(*rate, r) for rate in ((1, 1), (1, r), (r, 1), (r, r))]
    known = {row.name for row in rows}
    for name in more:
        if name not in known and (rate := re.fullmatch(r"([1-9]\d{0,5}):([1-9]\d{0,5})", name)):
            rows.append(_rate(int(rate[1]), int(rate[2]), r))
    claims = [Claim("more negatives help", f"1:{r}", "1:1", 0.24), Claim("more positives hurt", f"{r}:1", "1:1", -1.56)]
    return Table("table4", "Table 4: rates of positives to negatives", rows, claims)


def find_table(name: str, *, r: int = PAPERS_RATE, rows: Sequence[str] = ()) -> Table:
    """Return a table of the paper.

    Args:
      name: one of `NAMES`.
      r: the number of positives or negatives that stands for the paper's 10 in Table 4.
      rows: names of rows; those that the paper does not have are added, as are those of the form POSITIVES:NEGATIVES to Table 4.

    Raises:
      UserError: there is no such table.
    """
    if name not in NAMES:
        raise UserError(f"there is no table {name} to reproduce; there are {', '.join(NAMES)}")
    table = {"table2": _TABLE2, "table3": _TABLE3}.get(name) or _table4(r, rows)
    more = [(row, claim) for row, claim in _MORE.get(name, []) if row.name in rows]
    return dataclasses.replace(table, rows=[*table.rows, *(row for row, _ in more)], claims=[*table.claims, *(claim for _, claim in more)])


def choose_rows(table: Table, names: Sequence[str]) -> list[Row]:
    """Return the rows of these names in the order of the table, or all rows if there are no names.

    Raises:
      UserError: there is no row of a name.
    """
    known = [row.name for row in table.rows]
    for name in names:
        if name not in known:
            known += [row.name for row, _ in _MORE.get(table.name, []) if row.name not in known]
            more = ", and other rates POSITIVES:NEGATIVES" if table.name == "table4" else ""
            raise UserError(f"--rows: {table.name} has no row {name!r}; it has {', '.join(known)}{more}")
    return [row for row in table.rows if not names or row.name in names]
