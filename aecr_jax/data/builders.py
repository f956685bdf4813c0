"""tensorflow-datasets builders for RESIDE, NH-HAZE and Dense-Haze, written as array_record and read without TensorFlow.

`prepare` builds one from the authors' unpacked archives; `open_dataset` reads what was built. Importing this module registers the
builders, so `tfds.data_source("reside/its", split="train", data_dir=...)` reads them too.
"""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from aecr_jax.data.folders import fit_clear
from aecr_jax.data.images import read_pixels
from aecr_jax.data.layouts import Layout, Part, find_layout
from aecr_jax.errors import UserError

NAMES = (
    *(f"reside/{config}" for config in ("its", "ots", "sots_indoor", "sots_outdoor", "hsts", "rtts")),
    "nh_haze",
    "dense_haze",
)
_RTTS_CLASSES = ["bicycle", "bus", "car", "motorbike", "person"]
_RESIDE_CITATION = """@article{li2019reside, title={Benchmarking Single-Image Dehazing and Beyond}, author={Li, Boyi and Ren, Wenqi and
Fu, Dengpan and Tao, Dacheng and Feng, Dan and Zeng, Wenjun and Wang, Zhangyang}, journal={IEEE TIP}, volume={28}, year={2019}}"""


class _HazeBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """What the builders share: records of `hazy`, `clear` and their names, in the order of the names.

    The metadata have `release` and, per split, `names` and `scenes`, so that a split can be chosen from without reading images.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012 (the base class has it so)
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Unpack the authors' archives into manual_dir; aecr_jax/data/layouts.py lists the folders."
    HOMEPAGE, CITATION = "", ""

    @property
    def _name(self) -> str:
        return f"{self.name}/{self.builder_config.name}" if self.builder_config else self.name

    def _features(self) -> dict[str, Any]:
        image = functools.partial(tfds.features.Image, shape=(None, None, 3))
        return {"hazy": image(), "clear": image(), "name": tfds.features.Text(), "scene": tfds.features.Text()}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{type(self).__doc__} {self.builder_config.description if self.builder_config else ''}".strip(),
            features=tfds.features.FeaturesDict(self._features()),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(release="", names={}, scenes={}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        layout: Layout = find_layout(self._name, Path(dl_manager.manual_dir))
        assert self.info.metadata is not None
        self.info.metadata["release"] = layout.release
        generators = {}
        for split, part in layout.parts.items():
            self.info.metadata["names"][split] = [pair.name for pair in part.pairs] or [path.stem for path in part.hazy]
            self.info.metadata["scenes"][split] = [pair.scene for pair in part.pairs] or [path.stem for path in part.hazy]
            generators[split] = self._generate_examples(part)
        return generators

    def _generate_examples(self, part: Part) -> Iterator[tuple[int, dict[str, Any]]]:
        # Paths and not arrays: the files go into the records as they are, and encoding arrays would need TensorFlow.
        for index, pair in enumerate(part.pairs):
            yield index, {"hazy": str(pair.hazy), "clear": str(pair.clear), "name": pair.name, "scene": pair.scene}


class Reside(_HazeBuilder):
    """RESIDE (Li et al., TIP 2019)."""

    HOMEPAGE, CITATION = "https://sites.google.com/view/reside-dehaze-datasets", _RESIDE_CITATION
    BUILDER_CONFIGS = [  # noqa: RUF012 (the base class has it so)
        tfds.core.BuilderConfig(name="its", description="Indoor training set, of RESIDE-standard or RESIDE-v0."),
        tfds.core.BuilderConfig(name="ots", description="Outdoor training set, of RESIDE-v0 or RESIDE-beta."),
        tfds.core.BuilderConfig(name="sots_indoor", description="Synthetic objective testing set, indoor."),
        tfds.core.BuilderConfig(name="sots_outdoor", description="Synthetic objective testing set, outdoor."),
        tfds.core.BuilderConfig(name="hsts", description="Hybrid subjective testing set: 10 pairs, and 10 real images without clear ones."),
        tfds.core.BuilderConfig(name="rtts", description="Real-world task-driven testing set: hazy images with boxes of five classes."),
    ]

    def _features(self) -> dict[str, Any]:
        features = super()._features()
        if self.builder_config.name == "hsts":
            features["clear"] = tfds.features.Sequence(features["clear"])  # none or one
        if self.builder_config.name == "rtts":
            del features["clear"]
            features["objects"] = tfds.features.Sequence(
                {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=_RTTS_CLASSES)}
            )
        return features

    def _generate_examples(self, part: Part) -> Iterator[tuple[int, dict[str, Any]]]:
        hsts = self.builder_config.name == "hsts"
        for index, example in super()._generate_examples(part):
            yield index, example | ({"clear": [example["clear"]]} if hsts else {})
        for index, path in enumerate(part.hazy):
            rest = {"clear": []} if hsts else {"objects": _read_boxes(path)}
            yield index, {"hazy": str(path), "name": path.stem, "scene": path.stem, **rest}


class NhHaze(_HazeBuilder):
    """NH-HAZE (Ancuti et al., CVPRW 2020): 55 outdoor scenes with haze from machines, not homogeneous."""

    HOMEPAGE = "https://data.vision.ee.ethz.ch/cvl/ntire20/nh-haze/"
    CITATION = "@inproceedings{ancuti2020nhhaze, title={NH-HAZE}, author={Ancuti, C. O. and Ancuti, C. and Timofte, R.}, year={2020}}"


class DenseHaze(_HazeBuilder):
    """Dense-Haze (Ancuti et al., ICIP 2019): 55 scenes with dense haze from machines."""

    HOMEPAGE = "https://data.vision.ee.ethz.ch/cvl/ntire19/dense-haze/"
    CITATION = "@inproceedings{ancuti2019dense, title={Dense-Haze}, author={Ancuti, C. O. and others}, year={2019}}"


def _read_boxes(image: Path) -> list[dict[str, Any]]:
    """The boxes of an RTTS image from its VOC annotation (XML), relative to the image's size."""
    path = image.parent.parent / "Annotations" / f"{image.stem}.xml"
    if not path.is_file():
        raise UserError(f"{image} has no annotation: there is no file {path}")
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (float(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        boxes = []
        for item in root.iter("object"):
            left, top, right, bottom = (float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            # VOC counts pixels from 1 and includes the last.
            corners = np.clip([(top - 1) / height, (left - 1) / width, bottom / height, right / width], 0, 1)
            boxes.append({"bbox": tfds.features.BBox(*map(float, corners)), "label": item.findtext("name", "")})
    except (ElementTree.ParseError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no VOC annotation: {error}") from error
    return boxes


class Record(NamedTuple):
    """One pair of a built data set."""

    dataset: str
    source: Any
    position: int
    name: str
    scene: str

    @property
    def origin(self) -> str:
        """What to call it in a message."""
        return f"{self.dataset} {self.name}"

    def read(self) -> dict[str, np.ndarray]:
        """`hazy` and `clear`, `[H, W, 3]` each, as `read_pixels` gives them.

        Raises:
          UserError: an image is damaged, or the sizes do not fit.
        """
        record = self.source[self.position]
        names = f"{self.origin} hazy", f"{self.origin} clear"
        hazy = read_pixels(record["hazy"], names[0])
        clear = record["clear"]
        clear = read_pixels(clear, names[1]) if isinstance(clear, bytes) else clear[0]
        return {"hazy": hazy, "clear": fit_clear(hazy, clear, *names)}


def is_dataset_name(text: str) -> bool:
    """Whether `text` names a builder here, with or without a `:split`."""
    return text.split(":")[0] in NAMES


def prepare(name: str, source: str | Path, data_dir: str | Path | None = None) -> str:
    """Builds data set `name` from the folder `source` where the authors' archives were unpacked.

    Args:
      name: one of `NAMES`.
      source: the folder; what is in it is only read.
      data_dir: where to write; tensorflow-datasets' own folder (`~/tensorflow_datasets`) by default.

    Returns:
      A line on what was built, with its release.

    Raises:
      UserError: the name is unknown, the data set is not there or is there already, or the folder cannot be written.
    """
    if name not in NAMES:
        raise UserError(f"there is no data set {name!r}; there are {', '.join(NAMES)}")
    builder = _builder(name, data_dir)
    if builder.data_path.exists():
        raise UserError(f"{name} was prepared already in {builder.data_path}: remove that folder to prepare it anew")
    if not Path(source).is_dir():
        raise UserError(f"there is no folder {source}")
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(Path(source).resolve())))
    except OSError as error:
        raise UserError(f"{name} cannot be prepared: {error.filename or builder.data_path}: {error.strerror or error}") from error
    counts = ", ".join(f"{split} {info.num_examples}" for split, info in builder.info.splits.items())
    return f"{name} ({builder.info.metadata['release']}): {counts} in {builder.data_path}"


def open_dataset(name: str, data_dir: str | Path | None = None) -> tuple[list[Record], str]:
    """The pairs of a built data set, and what it is ("reside/its:train, RESIDE-standard").

    Args:
      name: one of `NAMES`, and `:split` if it has several; "test" or the first by default.
      data_dir: as for `prepare`.

    Raises:
      UserError: it was not prepared, there is no such split, or it has no clear images.
    """
    name, _, split = name.partition(":")
    if name not in NAMES:
        raise UserError(f"there is no data set {name!r}; there are {', '.join(NAMES)}")
    builder = _builder(name, data_dir)
    if not builder.data_path.exists():
        raise UserError(
            f"{name} was not prepared in {builder.data_path}: `python -m aecr_jax prepare-data {name} --source FOLDER` builds it"
        )
    splits = list(builder.info.splits)
    split = split or ("test" if "test" in splits else splits[0])
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    metadata = builder.info.metadata
    if name == "reside/rtts" or (name, split) == ("reside/hsts", "real"):
        raise UserError(f"{name}:{split} has no clear images to train on or to score against; `dehaze` takes its folder of hazy ones")
    # The files' own bytes, so that a record and a file are decoded alike; not for the sequence in HSTS, which tfds cannot skip.
    skip = {key: tfds.decode.SkipDecoding() for key in ("hazy", "clear") if isinstance(builder.info.features[key], tfds.features.Image)}
    source = builder.as_data_source(split=split, decoders=skip)
    records = zip(metadata["names"][split], metadata["scenes"][split], strict=True)
    return [Record(name, source, i, *names) for i, names in enumerate(records)], f"{name}:{split}, {metadata['release']}"


def _builder(name: str, data_dir: str | Path | None) -> Any:
    kind, _, config = name.partition("/")
    cls = {"reside": Reside, "nh_haze": NhHaze, "dense_haze": DenseHaze}[kind]
    options = {"config": config} if config else {}
    return cls(data_dir=str(Path(data_dir).expanduser()) if data_dir else None, file_format="array_record", **options)
