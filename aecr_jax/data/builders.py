"""tensorflow-datasets builders for RESIDE, NH-HAZE and Dense-Haze, written as array_record and read without TensorFlow.

`prepare` builds a data set from the authors' unpacked archives; `open_dataset` opens a built one. Importing this module registers the
builders, so that `tfds.data_source("reside/its", split="train", data_dir=...)` can also read the built data sets.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from aecr_jax.data.images import read_pixels
from aecr_jax.data.layouts import DATASETS, Layout, Part, find_layout, missing_images
from aecr_jax.data.samples import Sample, fit_clear
from aecr_jax.errors import UserError, first_line
from aecr_jax.files import make_folder
from aecr_jax.storage import has_scheme

_RTTS_CLASSES = ["bicycle", "bus", "car", "motorbike", "person"]
# The name that tensorflow-datasets gives the folder of a build until the build is complete.
_UNFINISHED = re.compile(r"incomplete\.[A-Z0-9]{6}_\d+\.\d+\.\d+$")
_RESIDE_CITATION = """@article{li2019reside, title={Benchmarking Single-Image Dehazing and Beyond}, author={Li, Boyi and Ren, Wenqi and
Fu, Dengpan and Tao, Dacheng and Feng, Dan and Zeng, Wenjun and Wang, Zhangyang}, journal={IEEE TIP}, volume={28}, year={2019}}"""


class _HazeBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base class of the builders: each record holds `hazy`, `clear` and their names, and records are sorted by name.

    The metadata contain `release` and, for each split, `names` and `scenes`, so that samples can be selected without reading images.
    Every image is decoded while the records are written, and a damaged image ends the build.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012 (the base class declares it this way)
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
        pairs = [pair for part in layout.parts.values() for pair in part.pairs]
        count = len(pairs) + sum(len(part.hazy) for part in layout.parts.values())
        self.missing = missing_images(self._name, layout.release, count, len({pair.clear for pair in pairs}))
        generators = {}
        for split, part in layout.parts.items():
            self.info.metadata["names"][split] = [pair.name for pair in part.pairs] or [path.stem for path in part.hazy]
            self.info.metadata["scenes"][split] = [pair.scene for pair in part.pairs] or [path.stem for path in part.hazy]
            generators[split] = self._generate_examples(part)
        return generators

    def _generate_examples(self, part: Part) -> Iterator[tuple[int, dict[str, Any]]]:
        # Yield paths, not arrays: the files are copied into the records unchanged, whereas encoding arrays would need TensorFlow.
        read_clear = functools.lru_cache(1)(read_pixels)  # the hazy versions of a scene are consecutive
        for index, pair in enumerate(part.pairs):
            fit_clear(read_pixels(pair.hazy), read_clear(pair.clear), str(pair.hazy), str(pair.clear))
            yield index, {"hazy": str(pair.hazy), "clear": str(pair.clear), "name": pair.name, "scene": pair.scene}


class Reside(_HazeBuilder):
    """RESIDE (Li et al., TIP 2019)."""

    HOMEPAGE, CITATION = "https://sites.google.com/view/reside-dehaze-datasets", _RESIDE_CITATION
    BUILDER_CONFIGS = [  # noqa: RUF012 (the base class declares it this way)
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
            features["clear"] = tfds.features.Sequence(features["clear"])  # zero or one image
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
            read_pixels(path)
            rest = {"clear": []} if hsts else {"objects": _read_boxes(path)}
            yield index, {"hazy": str(path), "name": path.stem, "scene": path.stem, **rest}


class NhHaze(_HazeBuilder):
    """NH-HAZE (Ancuti et al., CVPRW 2020): 55 outdoor scenes with non-homogeneous haze from haze machines."""

    HOMEPAGE = "https://data.vision.ee.ethz.ch/cvl/ntire20/nh-haze/"
    CITATION = "@inproceedings{ancuti2020nhhaze, title={NH-HAZE}, author={Ancuti, C. O. and Ancuti, C. and Timofte, R.}, year={2020}}"


class DenseHaze(_HazeBuilder):
    """Dense-Haze (Ancuti et al., ICIP 2019): 55 scenes with dense haze from haze machines."""

    HOMEPAGE = "https://data.vision.ee.ethz.ch/cvl/ntire19/dense-haze/"
    CITATION = "@inproceedings{ancuti2019dense, title={Dense-Haze}, author={Ancuti, C. O. and others}, year={2019}}"


def _read_boxes(image: Path) -> list[dict[str, Any]]:
    """Return the boxes of an RTTS image from its VOC annotation (XML), relative to the image's size."""
    path = image.parent.parent / "Annotations" / f"{image.stem}.xml"
    if not path.is_file():
        raise UserError(f"{image} has no annotation: there is no file {path}")
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (float(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        boxes = []
        for item in root.iter("object"):
            left, top, right, bottom = (float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            # VOC counts pixels from 1, and its maxima are inclusive.
            corners = np.clip([(top - 1) / height, (left - 1) / width, bottom / height, right / width], 0, 1)
            boxes.append({"bbox": tfds.features.BBox(*map(float, corners)), "label": item.findtext("name", "")})
    except (ElementTree.ParseError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} is not a valid VOC annotation: {error}") from error
    return boxes


@dataclass(frozen=True, slots=True)
class Record(Sample):
    """One pair of a built data set."""

    # field(), because otherwise the properties of the base class would become the default values
    dataset: str = field()
    source: Any = field(hash=False)  # its class is not hashable
    position: int
    file: Path
    name: str = field()
    scene: str = field()

    kind = "pair"

    @property
    def origin(self) -> str:
        """The data set and the name of the pair, for messages."""
        return f"{self.dataset} {self.name}"

    @property
    def files(self) -> dict[str, Path]:
        """The record file that contains the pair."""
        return {"records": self.file}

    def read(self) -> dict[str, np.ndarray]:
        """Return `hazy` and `clear`, each `[H, W, 3]`, as `read_pixels` returns them.

        Raises:
          UserError: an image or its record is damaged, or the sizes do not match.
        """
        try:
            record = self.source[self.position]
        except Exception as error:  # array_record and protobuf raise many exception types for damaged files
            raise UserError(f"{self.file} is damaged: {self.origin} cannot be read ({first_line(error)})") from error
        names = f"{self.origin} hazy", f"{self.origin} clear"
        hazy = read_pixels(record["hazy"], names[0])
        clear = record["clear"]
        clear = read_pixels(clear, names[1]) if isinstance(clear, bytes) else clear[0]
        return {"hazy": hazy, "clear": fit_clear(hazy, clear, *names)}


def prepare(name: str, source: str | Path, data_dir: str | Path | None = None, say: Callable[[str], None] = print) -> str:
    """Build the data set `name` from the folder `source`, in which the authors' archives were unpacked.

    Args:
      name: one of `DATASETS`.
      source: the folder; its contents are only read.
      data_dir: the folder to write to; by default, tensorflow-datasets' own folder (`~/tensorflow_datasets`).
      say: called with each warning.

    Returns:
      A line that describes what was built, including its release.

    Raises:
      UserError: the name is unknown, the data set is not in `source` or has been built already, an image is damaged, or the folder cannot
        be written. Nothing that was written remains.
    """
    if has_scheme(str(data_dir or "")):
        raise UserError(f"--data-dir (={data_dir}) must be on this machine")
    folder = _folder(name, data_dir)
    if folder.exists():
        raise UserError(f"{name} has already been prepared in {folder}: delete that folder to prepare it again")
    if not Path(source).is_dir():
        raise UserError(f"there is no folder {source}")
    if not any(Path(source).iterdir()):
        raise UserError(f"the folder {source} is empty: unpack the archives of {name} there")
    with _only_writer(make_folder(folder.parent), say):
        try:
            builder = _builder(name, data_dir)
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(Path(source).resolve())))
        except (OSError, RuntimeError) as error:  # array_record reports a full disk as a RuntimeError
            where = getattr(error, "filename", None) or folder
            raise UserError(f"{name} cannot be prepared: {where}: {_reason(error).split('; writing')[0]}") from error
        finally:
            downloads = folder.parents[len(Path(name).parts)] / "downloads"  # created by tensorflow-datasets, not needed here
            for path in (downloads / "extracted", downloads):
                with contextlib.suppress(OSError):
                    path.rmdir()
    if builder.missing:
        say(f"warning: {name} is not complete: {builder.missing}")
    counts = ", ".join(f"{split} {info.num_examples}" for split, info in builder.info.splits.items())
    return f"{name} ({builder.info.metadata['release']}): {counts} in {builder.data_path}"


@contextlib.contextmanager
def _only_writer(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other builds out of `folder` while the body runs, and first remove what interrupted builds left there.

    Raises:
      UserError: another process is building there, or the leftovers cannot be removed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, for whatever reason
            alone = True
        except BlockingIOError as error:
            raise UserError(f"another process is preparing data in {folder}: wait until it ends") from error
        except (OSError, ImportError):  # the file system or the operating system has no such locks
            alone = False
        for left in _unfinished(folder):
            if not alone:
                say(f"warning: {left} was left by an interrupted build or belongs to a running one: if no build is running, delete it")
                continue
            try:
                shutil.rmtree(left)
            except OSError as error:
                raise UserError(f"{left}, left by an interrupted build, cannot be removed: {error.strerror}") from error
            say(f"removed {left}, left by an interrupted build")
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # the folder is not empty if it contains a build
            folder.rmdir()


def _unfinished(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("incomplete.*") if _UNFINISHED.match(path.name))


def open_dataset(name: str, data_dir: str | Path | None = None) -> tuple[list[Record], str]:
    """Open a built data set; return its pairs and a description ("reside/its:train, RESIDE-standard").

    Args:
      name: one of `DATASETS`, followed by `:split` to choose a split; the default is "test" if there is one, or else the first split.
      data_dir: as for `prepare`.

    Raises:
      UserError: the data set was not prepared, one of its files is damaged, there is no such split, or the split has no clear images.
    """
    name, _, split = name.partition(":")
    folder = _folder(name, data_dir)
    if not folder.exists():
        left = [str(path) for path in _unfinished(folder.parent)]
        raise UserError(
            f"{name} has not been prepared in {folder}: run `python -m aecr_jax prepare-data {name} --source FOLDER`"
            + (f", which also removes {', '.join(left)}, left by an interrupted build" if left else "")
        )
    for file in ("dataset_info.json", "metadata.json"):
        try:
            json.loads((folder / file).read_bytes())
        except (OSError, ValueError) as error:
            raise _damaged(folder / file, error) from error
    try:
        builder = _builder(name, data_dir)
        splits = {
            split: [(Path(path), count) for path, count in zip(info.filepaths, info.shard_lengths, strict=True)]
            for split, info in builder.info.splits.items()
        }
    except Exception as error:  # tensorflow-datasets may raise anything for JSON that it did not write
        raise _damaged(folder / "dataset_info.json", error) from error
    split = split or ("test" if "test" in splits else next(iter(splits), ""))
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}; its splits are {', '.join(splits)}")
    if name == "reside/rtts" or (name, split) == ("reside/hsts", "real"):
        raise UserError(f"{name}:{split} has no clear images to train on or to score against; use `dehaze` with its folder of hazy images")
    for path, count in splits[split]:
        _check_records(path, count)
    # Get the files' own bytes, so that records and files are decoded alike. For the sequence in HSTS, tfds cannot skip decoding.
    skip = {key: tfds.decode.SkipDecoding() for key in ("hazy", "clear") if isinstance(builder.info.features[key], tfds.features.Image)}
    source = builder.as_data_source(split=split, decoders=skip)
    files = [path for path, count in splits[split] for _ in range(count)]
    try:
        metadata = builder.info.metadata
        records = list(zip(range(len(source)), files, metadata["names"][split], metadata["scenes"][split], strict=True))
        about = f"{name}:{split}, {metadata['release']}"
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder / "metadata.json", f"it does not name the {len(source)} images of {split}") from error
    return [Record(name, source, *record) for record in records], about


def _check_records(path: Path, count: int) -> None:
    """Raise UserError unless the file has `count` records; the index is at the end of the file, so a truncated file has none."""
    try:
        found = len(grain.sources.ArrayRecordDataSource(str(path)))
    except Exception as error:  # the type depends on which part of the file is damaged
        raise _damaged(path, error) from error
    if found != count:
        raise _damaged(path, f"it has {found} records instead of {count}")


def _damaged(path: Path, why: Exception | str) -> UserError:
    return UserError(
        f"{path} is damaged or missing ({why if isinstance(why, str) else _reason(why)}): remove {path.parent} and run prepare-data again"
    )


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def _folder(name: str, data_dir: str | Path | None) -> Path:
    """Return the folder of the built data set, whether or not it exists yet.

    Raises:
      UserError: there is no data set of that name.
    """
    if name not in DATASETS:
        raise UserError(f"there is no data set {name!r}; choose one of {', '.join(DATASETS)}")
    return Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / name / str(_HazeBuilder.VERSION)


def _builder(name: str, data_dir: str | Path | None) -> Any:
    kind, _, config = name.partition("/")
    cls = {"reside": Reside, "nh_haze": NhHaze, "dense_haze": DenseHaze}[kind]
    options = {"config": config} if config else {}
    return cls(data_dir=str(Path(data_dir).expanduser()) if data_dir else None, file_format="array_record", **options)
