"""Checks a data set before hours of training: what it is, what is wrong with it, and which known trap it walks into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from aecr_jax.data.folders import Pair, clear_names
from aecr_jax.data.images import list_images, panel, write_image
from aecr_jax.data.layouts import missing_images, recognise_data_set, recognise_release
from aecr_jax.data.pipeline import to_pair
from aecr_jax.errors import UserError

# Fingerprints of one image in two files (JPEG and PNG) correlate by 0.9999, of different scenes of NYU and SOTS by less than 0.5.
_FINGERPRINT, _SAME_IMAGE = 24, 0.9
_SHEET_PAIRS, _SHEET_SIZE = 12, (240, 180)
_LISTED = 5


class _Measured(NamedTuple):
    """What is kept of a pair."""

    position: int
    size: tuple[int, int]  # width, height
    psnr: float
    hazy: np.ndarray  # fingerprints
    clear: np.ndarray
    stretched: bool | None  # whether the clear image fits better as one that was resized; None: cannot be told
    flat: bool  # a depth map that says nothing


@dataclass
class Report:
    """Lines on what the data are, and findings: a mistake ruins a training or its score, a warning may."""

    lines: list[str] = field(default_factory=list)
    findings: list[tuple[Literal["MISTAKE", "warning"], str]] = field(default_factory=list)
    pairs: list[tuple[Any, _Measured]] = field(default_factory=list)  # samples worth looking at

    @property
    def mistaken(self) -> bool:
        """Whether training on these data would be a mistake."""
        return any(level == "MISTAKE" for level, _ in self.findings)

    def __str__(self) -> str:
        return "\n".join(self.lines + [f"{level}: {text}" for level, text in self.findings] + ([] if self.findings else ["nothing wrong"]))


def check_data(
    train: Sequence[Any],
    test: Sequence[Any] = (),
    *,
    test_name: str = "",
    unpaired: Sequence[Path] = (),
    crop: int = 1,
    limit: int | None = None,
) -> Report:
    """Checks samples for training, and those for evaluation with them.

    Args:
      train: samples as `split_samples` gives them.
      test: samples for evaluation.
      test_name: what they are called in results.
      unpaired: hazy files that have no clear one.
      crop: side of the training crops; images smaller than that are a mistake.
      limit: read at most this many images of each, evenly spread; all by default.

    Returns:
      The report.
    """
    report = Report()
    _check_completeness(report, train, test)
    if unpaired:
        report.findings.append(("MISTAKE", f"{len(unpaired)} hazy images have no clear one: {_list(map(str, unpaired))}"))
    measured = _check_set(report, "train", train, limit, crop)
    if test:
        tested = _check_set(report, "test", test, limit, 1)
        _check_overlap(report, train, measured, test, tested)
        if any(word in test_name for word in ("/test", ":test")) or _identify(test)[0] in ("reside/sots_indoor", "reside/sots_outdoor"):
            report.findings.append(
                (
                    "warning",
                    "evaluation is on a test set: as in the paper, the best checkpoint is then chosen by the set that it is scored on",
                )
            )
        sizes = {m.size for m in tested}
        if len(sizes) > 10:
            report.findings.append(("warning", f"test images have {len(sizes)} sizes; the network is compiled anew for each"))
    report.pairs = [(train[m.position], m) for m in _choose(measured)]
    return report


def _check_set(report: Report, label: str, samples: Sequence[Any], limit: int | None, crop: int) -> list[_Measured]:
    count = len(samples) if limit is None else min(limit, len(samples))
    scenes = len({sample.scene for sample in samples})
    name, release = _identify(samples)
    about = f": {name}, {release}" if name else ""
    report.lines.append(
        f"{label}: {len(samples)} images of {scenes} scenes{about}"
        + (f"; {count} read, and only those compared" if count < len(samples) else "")
    )
    if name:
        _check_release(report, label, name, release, samples)

    def measure(index: int) -> _Measured | str:
        try:
            return _measure(samples[index], index)
        except UserError as error:
            return str(error)

    indices = [i * len(samples) // count for i in range(count)]
    with ThreadPoolExecutor(4) as pool:
        results = list(tqdm(pool.map(measure, indices), f"reading {label}", count, leave=False))
    errors = [result for result in results if isinstance(result, str)]
    measured = [result for result in results if not isinstance(result, str)]
    if errors:
        report.findings.append(("MISTAKE", f"{label}: {len(errors)} images cannot be used: {_list(errors)}"))
    if not measured:
        return []
    sizes = Counter(m.size for m in measured)
    report.lines.append(
        "  sizes: " + ", ".join(f"{w}x{h} ({n})" for (w, h), n in sizes.most_common(6)) + (", ..." if len(sizes) > 6 else "")
    )
    small = [samples[m.position].origin for m in measured if min(m.size) < crop]
    if small:
        report.findings.append(("MISTAKE", f"{label}: {len(small)} images are smaller than a crop (data.crop={crop}): {_list(small)}"))
    flat = [samples[m.position].origin for m in measured if m.flat]
    if flat:
        report.findings.append(("warning", f"{label}: {len(flat)} depth maps are the same everywhere: {_list(flat)}"))
    _check_pairs(report, label, samples, measured)
    return measured


def _identify(samples: Sequence[Any]) -> tuple[str | None, str]:
    if not samples or not (hasattr(samples[0], "hazy") or hasattr(samples[0], "dataset")):
        return None, ""
    names = [sample.name for sample in samples]
    name = samples[0].dataset if hasattr(samples[0], "dataset") else recognise_data_set(names)
    return name, recognise_release(name, names, len({sample.scene for sample in samples})) if name else ""


def _check_release(report: Report, label: str, name: str, release: str, samples: Sequence[Any]) -> None:
    if name == "reside/its":
        if release == "RESIDE-v0":
            report.findings.append(
                (
                    "MISTAKE",
                    f"{label} is ITS of RESIDE-v0; the paper's scores, and most others', are for RESIDE-standard's 13,990 images."
                    " Training on the wrong release is reported to end 10 dB and more below them",
                )
            )
        tested = sorted({s.scene for s in samples if s.scene.isdigit() and 1400 <= int(s.scene) <= 1449} if release != "RESIDE-v0" else ())
        if tested:
            report.findings.append(("MISTAKE", f"{label} has scenes of the test set SOTS indoor, 1400 to 1449: {_list(tested)}"))
        lossy = [s for s in samples if isinstance(s, Pair) and {s.hazy.suffix.lower(), s.clear.suffix.lower()} & {".jpg", ".jpeg"}]
        if lossy:
            report.findings.append(("warning", f"{label}: ITS comes as PNG, and {len(lossy)} of these pairs are JPEG copies"))


def _check_completeness(report: Report, train: Sequence[Any], test: Sequence[Any]) -> None:
    # What data.holdout took apart is counted together.
    sets = [(_identify(samples), samples) for samples in (train, test)]
    for name, release in dict.fromkeys(identity for identity, _ in sets):
        if name is None or not name.startswith("reside/"):  # of the small ones, named splits leave a part out
            continue
        together = [sample for identity, samples in sets if identity == (name, release) for sample in samples]
        if missing := missing_images(name, release, len(together), len({s.scene for s in together})):
            report.findings.append(("warning", f"{name}: {missing}"))
    pairs = [sample for sample in (*train, *test) if isinstance(sample, Pair)]
    hazy = [path for folder in {pair.hazy.parent for pair in pairs} for path in list_images(folder)]
    used = {name for path in hazy for name in clear_names(path.stem)}
    folders = sorted({pair.clear.parent for pair in pairs})
    unused = [path for folder in folders for path in list_images(folder) if path.stem.lower() not in used]
    if unused:
        report.findings.append(("warning", f"{len(unused)} clear images have no hazy one: {_list(map(str, unused))}"))


def _measure(sample: Any, index: int) -> _Measured:
    read = sample.read()
    hazy, clear = to_pair(read, index)
    flat = "depth" in read and float(read["depth"].std()) < 1e-3
    error = float(np.mean((hazy - clear) ** 2, dtype=np.float64))
    psnr = 10 * np.log10(1 / error) if error else np.inf
    stretched = _looks_stretched(hazy, clear) if "hazy" in read and clear.shape == (460, 620, 3) else None
    height, width = clear.shape[:2]
    return _Measured(index, (width, height), psnr, _fingerprint(hazy), _fingerprint(clear), stretched, flat)


def _luma(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(image @ np.array([0.299, 0.587, 0.114], np.float32) * 255).astype(np.uint8))


def _fingerprint(image: np.ndarray) -> np.ndarray:
    """A small grey picture without its low frequencies, which haze changes; of norm 1, as bytes, 127 for 1."""
    n = _FINGERPRINT
    small = np.asarray(_luma(image).resize((n, n), Image.Resampling.BOX), np.float32)
    around = np.pad(small, 2, mode="edge")
    small = small - sum(around[i : i + n, j : j + n] for i in range(5) for j in range(5)) / 25
    small -= small.mean()
    return np.round(small.ravel() / max(float(np.linalg.norm(small)), 1e-6) * 127).astype(np.int8)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of every row of `a` with every row of `b`."""
    return (a.astype(np.float32) / 127) @ (b.astype(np.float32) / 127).T


def _looks_stretched(hazy: np.ndarray, clear: np.ndarray) -> bool | None:
    """Whether 640x480 was resized to this 620x460 clear image, where RESIDE cuts 10 pixels off each side.

    If so, undoing it brings the edges onto those of the hazy image.
    """
    undone = _luma(clear).resize((640, 480), Image.Resampling.BICUBIC).crop((10, 10, 630, 470))

    def edges(image: Image.Image) -> np.ndarray:
        values = np.asarray(image, np.float32)
        return np.abs(np.diff(values, axis=0))[:, :-1] + np.abs(np.diff(values, axis=1))[:-1]

    own, as_it_is, as_if_undone = (edges(image) for image in (_luma(hazy), _luma(clear), undone))
    before, after = (float(np.corrcoef(own.ravel(), other.ravel())[0, 1]) for other in (as_it_is, as_if_undone))
    return after > before + 0.05 if np.isfinite(before + after) else None


def _check_pairs(report: Report, label: str, samples: Sequence[Any], measured: Sequence[_Measured]) -> None:
    values = np.array([m.psnr for m in measured])
    finite = values[np.isfinite(values)]
    if finite.size:
        median = float(np.median(finite))
        report.lines.append(f"  hazy against clear: median {median:.2f} dB, {finite.min():.2f} to {finite.max():.2f}")
        spread = max(1.4826 * float(np.median(np.abs(finite - median))), 0.5)
        odd = [m for m in measured if np.isfinite(m.psnr) and abs(m.psnr - median) > 4 * spread]
        if odd:
            odd.sort(key=lambda m: -abs(m.psnr - median))
            listed = [f"{samples[m.position].origin} ({m.psnr:.1f} dB)" for m in odd]
            report.findings.append(("warning", f"{label}: {len(odd)} pairs differ from the others in PSNR: {_list(listed)}"))
    same = [samples[m.position].origin for m in measured if not np.isfinite(m.psnr)]
    if same:
        report.findings.append(("MISTAKE", f"{label}: {len(same)} hazy images are equal to their clear ones: {_list(same)}"))
    if hasattr(samples[0], "depth"):
        return
    stretched = [m for m in measured if m.stretched]
    if len(stretched) > 0.5 * sum(m.stretched is not None for m in measured):
        report.findings.append(
            (
                "MISTAKE",
                f"{label}: the clear images look resized from 640x480 to 620x460; RESIDE cuts 10 pixels off each side, and resizing"
                " costs some 15 dB. Name the folder of the 640x480 ones: they are cropped here",
            )
        )
    own = np.array([_correlation(m.hazy[None], m.clear[None])[0, 0] for m in measured])
    # Against the clear image of another scene, the next in order; with one scene alone there is none.
    following = (((i + k) % len(measured) for k in range(1, len(measured))) for i in range(len(measured)))
    scenes = [samples[m.position].scene for m in measured]
    other = [next((measured[k] for k in ks if scenes[k] != scenes[i]), None) for i, ks in enumerate(following)]
    if all(n is not None for n in other):
        foreign = np.array([_correlation(m.hazy[None], n.clear[None])[0, 0] for m, n in zip(measured, other) if n is not None])
        wrong = [samples[m.position].origin for m, a, b in zip(measured, own, foreign) if a <= max(b, 0.1)]
        if len(wrong) > 0.2 * len(measured):
            text = f"{label}: {len(wrong)} of {len(measured)} hazy images do not look like their clear ones: {_list(wrong)}"
            report.findings.append(("MISTAKE", text))
        elif wrong:
            report.findings.append(("warning", f"{label}: {len(wrong)} hazy images do not look like their clear ones: {_list(wrong)}"))


def _check_overlap(
    report: Report, train: Sequence[Any], measured: Sequence[_Measured], test: Sequence[Any], tested: Sequence[_Measured]
) -> None:
    if not measured or not tested:
        return
    # One clear image for each scene.
    ours, theirs = (list({samples[m.position].scene: m for m in found}.values()) for samples, found in ((train, measured), (test, tested)))
    correlation = _correlation(np.stack([m.clear for m in theirs]), np.stack([m.clear for m in ours]))
    found = [
        f"{test[m.position].origin} and {train[ours[int(row.argmax())].position].origin}"
        for m, row in zip(theirs, correlation)
        if row.max() > _SAME_IMAGE
    ]
    if found:
        report.findings.append(("MISTAKE", f"{len(found)} of {len(theirs)} test scenes are in the training data: {_list(found)}"))


def _choose(measured: Sequence[_Measured]) -> list[_Measured]:
    """The strangest, and an even spread."""
    if not measured:
        return []
    by_psnr = sorted(measured, key=lambda m: m.psnr)
    spread = [measured[i * len(measured) // _SHEET_PAIRS] for i in range(min(_SHEET_PAIRS, len(measured)))]
    return list({m.position: m for m in (*by_psnr[:2], *by_psnr[-2:], *spread)}.values())[:_SHEET_PAIRS]


def draw_sheet(report: Report, path: str | Path) -> bool:
    """Draws the report's pairs, hazy over clear; returns whether there were any.

    Raises:
      UserError: the file cannot be written.
    """
    if not report.pairs:
        return False
    cells = [_cell(sample, measured) for sample, measured in report.pairs]
    cells += [np.ones_like(cells[0])] * (-len(cells) % 4)
    write_image(path, panel([cells[i : i + 4] for i in range(0, len(cells), 4)], gap=8))
    return True


def _cell(sample: Any, measured: _Measured) -> np.ndarray:
    width, height = _SHEET_SIZE
    canvas = Image.new("RGB", (width, 2 * height + 14), "white")
    for row, image in enumerate(to_pair(sample.read(), measured.position)):
        picture = Image.fromarray(np.round(image * 255).astype(np.uint8))
        picture.thumbnail(_SHEET_SIZE)
        canvas.paste(picture, (0, row * height))
    ImageDraw.Draw(canvas).text((2, 2 * height + 1), f"{sample.name}  {measured.psnr:.1f} dB", fill="black")
    return np.asarray(canvas, np.float32) / 255


def _list(items: Any) -> str:
    items = list(items)
    return "; ".join(items[:_LISTED]) + (f"; and {len(items) - _LISTED} more" if len(items) > _LISTED else "")
