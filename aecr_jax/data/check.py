"""Check a data set before hours of training: identify it, find its defects, and warn of known pitfalls."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from aecr_jax.data.folders import clear_names, listed
from aecr_jax.data.images import list_images, panel, write_image
from aecr_jax.data.layouts import missing_images, recognise_data_set, recognise_release
from aecr_jax.data.measure import Measured, correlation, measure_all
from aecr_jax.data.reader import to_pair
from aecr_jax.data.samples import Sample

# Fingerprints of one image in two files (JPEG and PNG) correlate by 0.9999; those of different scenes of NYU and SOTS, by less than 0.5.
_SAME_IMAGE = 0.9
# Haze reduces contrast and raises the dark channel. For genuine pairs (SOTS, ITS, NH-HAZE, Dense-Haze), drawn scenes, and NYU with
# drawn haze, the logarithm of the gradients' ratio is at most -0.12, and the dark channel rises by at least 0.03. Exchanged pairs have the
# opposite signs. The limits are about half of these values.
_EXCHANGED_CONTRAST, _EXCHANGED_DARK = 0.05, -0.02
_Side: TypeAlias = Literal["origin", "clear", "depth"]
_SHEET_PAIRS, _SHEET_SIZE = 12, (240, 180)


@dataclass
class Report:
    """Lines that describe the data, and findings: a mistake makes training or its score useless; a warning may do so."""

    lines: list[str] = field(default_factory=list)
    findings: list[tuple[Literal["MISTAKE", "warning"], str]] = field(default_factory=list)
    pairs: list[tuple[Any, Measured]] = field(default_factory=list)  # samples worth looking at

    @property
    def mistaken(self) -> bool:
        """Whether training on these data would be a mistake."""
        return any(level == "MISTAKE" for level, _ in self.findings)

    def __str__(self) -> str:
        return "\n".join(self.lines + [f"{level}: {text}" for level, text in self.findings] + ([] if self.findings else ["nothing wrong"]))


class _Set:
    """Samples for training or for evaluation, their measurements, and the data set that they come from."""

    def __init__(self, label: str, samples: Sequence[Sample], limit: int | None):
        self.label = label
        self.samples = samples
        self.measured, self.failed = measure_all(samples, label, limit)
        self.sizes = Counter(m.size for m in self.measured)
        self.scenes = {sample.scene for sample in samples}
        self.name, self.release = self._identify()

    def _identify(self) -> tuple[str | None, str]:
        samples = self.samples
        if not samples or samples[0].kind != "pair":
            return None, ""
        names = [sample.name for sample in samples]
        name: str | None = samples[0].dataset
        if not name:
            size = self.sizes.most_common(1)[0][0] if self.sizes else None
            name = recognise_data_set(names, clear=len(self.scenes), size=size)
        return name, recognise_release(name, names, len(self.scenes)) if name else ""

    def origins(self, keep: Callable[[Measured], Any], side: _Side = "origin") -> list[str]:
        """Return the origins, or the files of one side, of the samples whose measurements satisfy `keep`."""
        chosen = [self.samples[m.position] for m in self.measured if keep(m)]
        return [str(sample.files.get(side, sample.origin)) for sample in chosen]


def check_data(
    train: Sequence[Sample],
    test: Sequence[Sample] = (),
    *,
    test_name: str = "",
    problems: Sequence[str] = (),
    crop: tuple[int, int] = (1, 1),
    limit: int | None = None,
) -> Report:
    """Check training samples together with evaluation samples.

    Args:
      train: training samples, as `split_samples` returns them.
      test: evaluation samples.
      test_name: the name of the evaluation samples in results.
      problems: problems with the names of the files, as `find_pairs` lists them.
      crop: height and width of the training crops in pixels; smaller images are reported as a mistake.
      limit: the largest number of samples to read from each of `train` and `test`, evenly spread; all by default.

    Returns:
      The report.
    """
    report = Report()
    training = _by_kind("train", train, limit) or [_Set("train", [], limit)]
    testing = _by_kind("test", test, limit)
    _check_completeness(report, *training, *testing)
    report.findings += [("MISTAKE", problem) for problem in problems]
    for data in training:
        _check_set(report, data, crop)
    for data in testing:
        _check_set(report, data, (1, 1))
        for other in training:
            _check_overlap(report, other, data)
    named = any(word in test_name for word in ("/test", ":test"))
    if testing and (named or {"reside/sots_indoor", "reside/sots_outdoor"} & {data.name for data in testing}):
        report.findings.append(
            (
                "warning",
                "evaluation uses a test set: the best checkpoint is then selected by the images that it is scored on, as in the paper",
            )
        )
    sizes = {size for data in testing for size in data.sizes}
    if len(sizes) > 10:
        report.findings.append(("warning", f"test images have {len(sizes)} sizes; the network is compiled again for each"))
    chosen = [[(data.samples[m.position], m) for m in _choose(data.measured)] for data in training]
    report.pairs = [pair for pairs in chosen for pair in pairs[: _SHEET_PAIRS // len(chosen)]]
    return report


def _by_kind(label: str, samples: Sequence[Sample], limit: int | None) -> list[_Set]:
    """Measure mixed data by kind, because what is normal for one kind is odd for another; images that are repeated count once."""
    unique = list(dict.fromkeys(samples))
    kinds = list(dict.fromkeys(sample.kind for sample in unique))
    limit = None if limit is None else -(-limit // max(1, len(kinds)))
    of_kind = {kind: [sample for sample in unique if sample.kind == kind] for kind in kinds}
    return [_Set(label if len(kinds) == 1 else f"{label} ({kind})", of_kind[kind], limit) for kind in kinds]


def _check_set(report: Report, data: _Set, crop: tuple[int, int]) -> None:
    label, samples, count = data.label, data.samples, len(data.measured) + len(data.failed)
    about = f": {data.name}, {data.release}" if data.name else ""
    report.lines.append(
        f"{label}: {len(samples)} images of {len(data.scenes)} scenes{about}"
        + (f"; only {count} are read and compared" if count < len(samples) else "")
    )
    if data.name:
        _check_release(report, label, data.name, data.release, samples)
    for errors in _group(data):
        report.findings.append(("MISTAKE", f"{label}: {len(errors)} images cannot be used: {listed(errors)}"))
    if not data.measured:
        return
    report.lines.append(
        "  sizes: " + ", ".join(f"{w}x{h} ({n})" for (w, h), n in data.sizes.most_common(6)) + (", ..." if len(data.sizes) > 6 else "")
    )
    shape = f"data.crop={crop[0]}" + (f", data.crop_width={crop[1]}" if crop[0] != crop[1] else "")
    checks: list[tuple[Literal["MISTAKE", "warning"], str, _Side, Callable[[Measured], Any]]] = [
        ("MISTAKE", f"images are smaller than a crop ({shape})", "origin", lambda m: m.size[0] < crop[1] or m.size[1] < crop[0]),
        ("MISTAKE", "clear images are black or of one colour", "clear", lambda m: m.blank[1]),
        # Constant haze, which is added to clear images alone, may hide everything.
        (
            "MISTAKE",
            "hazy images are of one colour",
            "origin",
            lambda m: m.blank[0] and not m.blank[1] and samples[m.position].kind != "clear",
        ),
        ("warning", "depth maps are almost constant", "depth", lambda m: m.depth == "flat"),
        (
            "warning",
            "depth maps have zeros far below their other values. If zeros mark missing measurements, these places get no haze: fill in"
            " their depth first",
            "depth",
            lambda m: m.depth == "zeros",
        ),
        (
            "warning",
            "depth maps have many pixels of the largest value far above the others. If this value marks missing measurements and not the"
            " sky, the rest gets too little haze: fill in the depth of these places first",
            "depth",
            lambda m: m.depth == "far",
        ),
    ]
    for level, text, side, keep in checks:
        if origins := data.origins(keep, side):
            report.findings.append((level, f"{label}: {len(origins)} {text}: {listed(origins)}"))
    if samples[0].kind != "clear":
        _check_pairs(report, data)


def _group(data: _Set) -> list[list[str]]:
    """Group the errors by kind, so that many errors of one kind do not hide another."""
    kinds: dict[str, list[str]] = {}
    for position, error in data.failed:
        sample, kind = data.samples[position], error
        for name in (*map(str, sample.files.values()), sample.origin):
            kind = kind.replace(name, "")
        kinds.setdefault(re.sub(r"\S*\d\S*", "", kind), []).append(error)
    return list(kinds.values())


def _check_release(report: Report, label: str, name: str, release: str, samples: Sequence[Sample]) -> None:
    if name == "reside/its":
        if release == "RESIDE-v0":
            report.findings.append(
                (
                    "MISTAKE",
                    f"{label} is ITS of RESIDE-v0, but the scores of the paper, and most others, are for the 13,990 images of"
                    " RESIDE-standard. Training on the wrong release is reported to give scores that are lower by 10 dB or more",
                )
            )
        tested = sorted({s.scene for s in samples if s.scene.isdigit() and 1400 <= int(s.scene) <= 1449} if release != "RESIDE-v0" else ())
        if tested:
            report.findings.append(("MISTAKE", f"{label} has scenes of the test set SOTS indoor, 1400 to 1449: {listed(tested)}"))
        lossy = [s for s in samples if {path.suffix.lower() for path in s.files.values()} & {".jpg", ".jpeg"}]
        if lossy:
            report.findings.append(("warning", f"{label}: ITS is published as PNG, but {len(lossy)} of these pairs are JPEG copies"))


def _check_completeness(report: Report, *sets: _Set) -> None:
    # The images that data.holdout separated are counted together.
    for name, release in dict.fromkeys((data.name, data.release) for data in sets):
        if name is None or not name.startswith("reside/"):  # named splits of the small data sets use only some of the images
            continue
        together = [sample for data in sets if (data.name, data.release) == (name, release) for sample in data.samples]
        if missing := missing_images(name, release, len(together), len({s.scene for s in together})):
            report.findings.append(("warning", f"{name}: {missing}"))
    pairs = [sample.files for data in sets for sample in data.samples if "hazy" in sample.files]
    hazy = [path for folder in {files["hazy"].parent for files in pairs} for path in list_images(folder)]
    used = {name for path in hazy for name in clear_names(path.stem)}
    folders = sorted({files["clear"].parent for files in pairs})
    unused = [path for folder in folders for path in list_images(folder) if path.stem.lower() not in used]
    if unused:
        report.findings.append(("warning", f"{len(unused)} clear images have no hazy image: {listed(map(str, unused))}"))


def _check_pairs(report: Report, data: _Set) -> None:
    label, samples, measured = data.label, data.samples, data.measured
    values = np.array([m.psnr for m in measured])
    finite = values[np.isfinite(values)]
    if finite.size:
        median = float(np.median(finite))
        report.lines.append(f"  PSNR of hazy against clear images: median {median:.2f} dB, {finite.min():.2f} to {finite.max():.2f}")
        spread = max(1.4826 * float(np.median(np.abs(finite - median))), 0.5)
        odd = [m for m in measured if np.isfinite(m.psnr) and abs(m.psnr - median) > 4 * spread]
        if odd:
            odd.sort(key=lambda m: -abs(m.psnr - median))
            values_of = [f"{samples[m.position].origin} ({m.psnr:.1f} dB)" for m in odd]
            report.findings.append(("warning", f"{label}: {len(odd)} pairs differ from the others in PSNR: {listed(values_of)}"))
    if same := data.origins(lambda m: not np.isfinite(m.psnr)):
        report.findings.append(("MISTAKE", f"{label}: {len(same)} hazy images are equal to their clear images: {listed(same)}"))
    if samples[0].kind != "pair":
        return
    stretched = [m for m in measured if m.stretched]
    if len(stretched) > 0.5 * sum(m.stretched is not None for m in measured):
        report.findings.append(
            (
                "MISTAKE",
                f"{label}: the clear images look resized from 640x480 to 620x460; RESIDE crops 10 pixels from each side, and resizing"
                " costs about 15 dB. Use the folder of the 640x480 images: they are cropped when they are read",
            )
        )
    # An image of one colour has no contrast and resembles no other image; it has been reported above.
    measured = [m for m in measured if not any(m.blank)]
    exchanged = data.origins(lambda m: m.contrast > _EXCHANGED_CONTRAST and m.dark < _EXCHANGED_DARK)
    if len(exchanged) > 0.5 * len(measured):
        text = f"{label}: hazy and clear images look exchanged: in {len(exchanged)} of {len(measured)} pairs the clear image is hazier"
        report.findings.append(("MISTAKE", f"{text}: {listed(exchanged)}"))
    elif exchanged:
        report.findings.append(("warning", f"{label}: {len(exchanged)} clear images are hazier than their hazy ones: {listed(exchanged)}"))
    own = np.array([correlation(m.hazy[None], m.clear[None])[0, 0] for m in measured])
    # Compare with the clear image of the next other scene in order; if there is only one scene, there is no such image.
    following = (((i + k) % len(measured) for k in range(1, len(measured))) for i in range(len(measured)))
    scenes = [samples[m.position].scene for m in measured]
    other = [next((measured[k] for k in ks if scenes[k] != scenes[i]), None) for i, ks in enumerate(following)]
    if all(n is not None for n in other):
        foreign = np.array([correlation(m.hazy[None], n.clear[None])[0, 0] for m, n in zip(measured, other) if n is not None])
        wrong = [samples[m.position].origin for m, a, b in zip(measured, own, foreign) if a <= max(b, 0.1)]
        if len(wrong) > 0.2 * len(measured):
            text = f"{label}: {len(wrong)} of {len(measured)} hazy images do not look like their clear images: {listed(wrong)}"
            report.findings.append(("MISTAKE", text))
        elif wrong:
            report.findings.append(("warning", f"{label}: {len(wrong)} hazy images do not look like their clear images: {listed(wrong)}"))


def _check_overlap(report: Report, training: _Set, testing: _Set) -> None:
    # Compare one clear image of each scene. Images of one colour are left out, because they match whatever scene they should show.
    train, test = training.samples, testing.samples
    ours = list({train[m.position].scene: m for m in training.measured if not m.blank[1]}.values())
    theirs = list({test[m.position].scene: m for m in testing.measured if not m.blank[1]}.values())
    if not ours or not theirs:
        return
    correlations = correlation(np.stack([m.clear for m in theirs]), np.stack([m.clear for m in ours]))
    found = [
        f"{test[m.position].origin} and {train[ours[int(row.argmax())].position].origin}"
        for m, row in zip(theirs, correlations)
        if row.max() > _SAME_IMAGE
    ]
    if found:
        report.findings.append(("MISTAKE", f"{len(found)} of {len(theirs)} test scenes are in the training data: {listed(found)}"))


def _choose(measured: Sequence[Measured]) -> list[Measured]:
    """Choose pairs for the sheet: those with the lowest and the highest PSNR, then an evenly spread selection."""
    if not measured:
        return []
    by_psnr = sorted(measured, key=lambda m: m.psnr)
    spread = [measured[i * len(measured) // _SHEET_PAIRS] for i in range(min(_SHEET_PAIRS, len(measured)))]
    return list({m.position: m for m in (*by_psnr[:2], *by_psnr[-2:], *spread)}.values())[:_SHEET_PAIRS]


def draw_sheet(report: Report, path: str | Path) -> bool:
    """Draw the pairs of the report, each hazy image above its clear one, and return whether there were any.

    Raises:
      UserError: the file cannot be written.
    """
    if not report.pairs:
        return False
    cells = [_cell(sample, measured) for sample, measured in report.pairs]
    cells += [np.ones_like(cells[0])] * (-len(cells) % 4)
    write_image(path, panel([cells[i : i + 4] for i in range(0, len(cells), 4)], gap=8))
    return True


def _cell(sample: Any, measured: Measured) -> np.ndarray:
    width, height = _SHEET_SIZE
    canvas = Image.new("RGB", (width, 2 * height + 14), "white")
    for row, image in enumerate(to_pair(sample.read(), measured.position)):
        picture = Image.fromarray(np.round(image * 255).astype(np.uint8))
        picture.thumbnail(_SHEET_SIZE)
        canvas.paste(picture, (0, row * height))
    ImageDraw.Draw(canvas).text((2, 2 * height + 1), f"{sample.name}  {measured.psnr:.1f} dB", fill="black")
    return np.asarray(canvas, np.float32) / 255
