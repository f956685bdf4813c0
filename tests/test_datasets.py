"""Public data sets in their authors' layouts, named splits, and check-data, on small synthetic copies."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from test_commands import fails, lines
from test_data import SHARED, needs_shared, picture

from aecr_jax import UserError
from aecr_jax.__main__ import main
from aecr_jax.data.builders import open_dataset, prepare
from aecr_jax.data.check import check_data
from aecr_jax.data.folders import find_dataset, find_pairs
from aecr_jax.data.images import read_image, write_image
from aecr_jax.data.layouts import DATASETS, find_layout, recognise_data_set, recognise_release
from aecr_jax.data.sources import DataConfig, open_samples, split_samples
from aecr_jax.data.splits import apply_split, read_split, split_names

VOC = """<annotation><size><width>30</width><height>20</height></size><object><name>bus</name><bndbox><xmin>1</xmin><ymin>11</ymin>
<xmax>15</xmax><ymax>20</ymax></bndbox></object></annotation>"""

# Layout -> data set, files, release, number of pairs by split. Folder and file names are those of the archives and of common copies.
LAYOUTS = {
    "its-standard": (
        "reside/its",
        ["ITS/hazy/1_1_0.90179.png", "ITS/hazy/1_10_0.98796.png", "ITS/hazy/2_1_0.99082.png", "ITS/clear/1.png", "ITS/clear/2.png"],
        "RESIDE-standard",
        {"train": 3},
    ),
    "its-short-names": ("reside/its", ["ITS_v2/hazy/12_3.png", "ITS_v2/clear/12.png"], "RESIDE-standard", {"train": 1}),
    "its-v0": (
        "reside/its",
        ["ITS/train/ITS_haze/0499_05_0.8353.png", "ITS/train/ITS_clear/0499.png", "ITS/val/haze/0001_01_0.9.png", "ITS/val/clear/0001.png"],
        "RESIDE-v0",
        {"train": 1, "val": 1},
    ),
    "ots-v0": (
        "reside/ots",
        ["OTS_ALPHA/OTS/0005_0.8_0.04.jpg", "OTS_ALPHA/OTS/0005_1_0.2.jpg", "OTS_ALPHA/clear_images/0005.jpg"],
        "unknown release",
        {"train": 2},
    ),
    "ots-beta": ("reside/ots", ["OTS_BETA/hazy/0025_0.8_0.04.jpg", "OTS_BETA/clear/0025.jpg"], "unknown release", {"train": 1}),
    "sots-indoor-500": (
        "reside/sots_indoor",
        ["SOTS/indoor/nyuhaze500/hazy/1400_10.png", "SOTS/indoor/nyuhaze500/gt/1400.png"],
        "RESIDE-standard",
        {"test": 1},
    ),
    "sots-indoor": ("reside/sots_indoor", ["indoor/hazy/1400_1.png", "indoor/gt/1400.png"], "RESIDE-standard", {"test": 1}),
    "sots-outdoor": (
        "reside/sots_outdoor",
        ["SOTS/outdoor/hazy/0001_0.8_0.2.jpg", "SOTS/outdoor/gt/0001.png"],
        "RESIDE-standard",
        {"test": 1},
    ),
    "hsts": (
        "reside/hsts",
        ["HSTS/synthetic/synthetic/0586.jpg", "HSTS/synthetic/original/0586.jpg", "HSTS/real-world/a.jpg"],
        "RESIDE-standard",
        {"test": 1},
    ),
    "nh-haze": ("nh_haze", ["NH-HAZE/01_hazy.png", "NH-HAZE/01_GT.png"], "NTIRE 2020", {"full": 1}),
    "nh-haze-folders": ("nh_haze", ["NH-HAZE/hazy/51.png", "NH-HAZE/clear/51.png"], "NTIRE 2020", {"full": 1}),
    "dense-haze": (
        "dense_haze",
        ["Dense_Haze_NTIRE19/hazy/01_hazy.png", "Dense_Haze_NTIRE19/GT/01_GT.png"],
        "NTIRE 2019",
        {"full": 1},
    ),
}


def make(root, files):
    for seed, file in enumerate(files):
        picture(root / file, (30, 20), seed=seed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_builders_read_every_layout_as_the_folders_do(tmp_path, layout):
    name, files, release, counts = LAYOUTS[layout]
    make(tmp_path / "source", files)
    assert f"({release})" in prepare(name, tmp_path / "source", tmp_path / "built")
    for split, count in counts.items():
        records, about = open_dataset(f"{name}:{split}", tmp_path / "built")
        assert len(records) == count and about == f"{name}:{split}, {release}"
        pairs = find_layout(name, tmp_path / "source").parts[split].pairs
        for record, pair in zip(records, pairs, strict=True):
            assert (record.name, record.scene) == (pair.name, pair.scene)
            assert record.source[record.position]["name"] == pair.name.encode()
            for key, expected in pair.read().items():
                np.testing.assert_array_equal(record.read()[key], expected)
    pickle.loads(pickle.dumps(records))  # records are pickled for worker processes


def test_rtts_has_boxes_and_no_clear_images(tmp_path):
    """The box covers rows 11..20 of 20 and columns 1..15 of 30; VOC counts pixels from 1."""
    make(tmp_path, ["RTTS/JPEGImages/a.png"])
    with pytest.raises(UserError, match=r"a\.png has no annotation"):
        prepare("reside/rtts", tmp_path, tmp_path / "built")
    (tmp_path / "RTTS" / "Annotations").mkdir()
    (tmp_path / "RTTS" / "Annotations" / "a.xml").write_text(VOC)
    prepare("reside/rtts", tmp_path, tmp_path / "built")
    record = tfds.data_source("reside/rtts", split="test", data_dir=tmp_path / "built")[0]
    np.testing.assert_allclose(record["objects"]["bbox"], [[0.5, 0, 1, 0.5]])
    assert record["hazy"].shape == (20, 30, 3) and record["name"] == b"a"
    with pytest.raises(UserError, match="has no clear images"):
        open_dataset("reside/rtts", tmp_path / "built")


def test_tensorflow_is_not_imported(tmp_path):
    make(tmp_path, LAYOUTS["nh-haze"][1])
    code = f"""
import sys
from aecr_jax.data.builders import open_dataset, prepare
prepare("nh_haze", {str(tmp_path)!r}, {str(tmp_path / "built")!r})
open_dataset("nh_haze", {str(tmp_path / "built")!r})[0][0].read()
sys.exit("tensorflow" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_releases_are_told_apart():
    """Names are those of the archives. The published numbers of hazy images are 13,990 and 110,000 for ITS, 72,135 and 313,950 for OTS."""
    assert recognise_release("reside/its", ["1_1_0.90179", "1000_10_0.9"], 2) == "RESIDE-standard"
    assert recognise_release("reside/its", ["0499_05_0.8353", "1000_10_0.9"], 2) == "RESIDE-v0"
    assert recognise_release("reside/its", ["a", "b"], 2) == "unknown release"
    assert recognise_release("reside/ots", ["0025_0.8_0.04"] * 72_135, 2_061) == "RESIDE-beta"
    assert recognise_release("reside/ots", ["0005_0.8_0.04"] * 313_950, 8_970) == "RESIDE-v0"
    assert recognise_data_set(["1400_1", "1449_10"]) == "reside/sots_indoor"
    assert recognise_data_set(["1_1_0.9", "1399_10_0.8"]) == "reside/its"
    assert recognise_data_set(["0001_0.8_0.2"]) == "reside/sots_outdoor"
    assert recognise_data_set(["photo"]) is None


def test_what_is_missing_is_named(tmp_path, capsys):
    (tmp_path / "SOTS.zip").write_bytes(b"")
    assert "looked for SOTS/indoor/nyuhaze500/hazy with SOTS/indoor/nyuhaze500/gt or" in fails(
        capsys, "prepare-data", "reside/sots_indoor", "--source", tmp_path, "--data-dir", tmp_path / "b"
    )
    with pytest.raises(UserError, match=r"unpack SOTS.zip there first"):
        find_layout("reside/sots_indoor", tmp_path)
    assert "there is no folder" in fails(capsys, "prepare-data", "nh_haze", "--source", tmp_path / "no", "--data-dir", tmp_path / "b")
    assert "there is no data set 'reside/x'; choose one of reside/its" in fails(capsys, "prepare-data", "reside/x", "--source", tmp_path)
    assert "prepare-data reside/its --source FOLDER" in fails(capsys, "eval", "--data", "reside/its", "--data-dir", tmp_path / "b")
    said = fails(capsys, "prepare-data", "nh_haze", "--source", tmp_path, "--data-dir", "gs://bucket/built")
    assert "--data-dir (=gs://bucket/built) must be on this machine" in said
    make(tmp_path, LAYOUTS["nh-haze"][1])
    prepare("nh_haze", tmp_path, tmp_path / "b")
    assert "has already been prepared" in fails(capsys, "prepare-data", "nh_haze", "--source", tmp_path, "--data-dir", tmp_path / "b")
    assert "has no split 'x'; its splits are full" in fails(capsys, "eval", "--data", "nh_haze:x", "--data-dir", tmp_path / "b")
    assert set(DATASETS) == {layout[0] for layout in LAYOUTS.values()} | {"reside/rtts"}


# ---- splits


@pytest.mark.parametrize("name", [name for name in split_names() if "haze" in name])
def test_splits_are_of_the_55_images_and_do_not_overlap(name):
    parts = read_split(name)
    assert sorted(scene for part in parts.values() for scene in part) == [f"{i:02d}" for i in range(1, 56)]
    assert "_".join(str(len(part)) for part in parts.values()) == name.split("haze_")[1]


def haze_folder(tmp_path):
    for i in range(1, 56):
        picture(tmp_path / "NH-HAZE" / f"{i:02d}_hazy.png", (30, 20), seed=i)
        picture(tmp_path / "NH-HAZE" / f"{i:02d}_GT.png", (30, 20), seed=100 + i)
    return tmp_path / "NH-HAZE"


def test_a_split_says_what_trains_and_what_evaluates(tmp_path):
    root = str(haze_folder(tmp_path))
    train, held, name = split_samples(DataConfig(train=f"{root}@nh_haze_45_5_5/train", eval=f"{root}@nh_haze_45_5_5/validation"))
    assert [s.hazy.name for s in held] == [f"{i}_hazy.png" for i in range(46, 51)] and len(train) == 45
    assert name == f"nh_haze_45_5_5/validation of {root}"
    train, held, name = split_samples(DataConfig(train=f"{root}@nh_haze_50_5/train", eval=f"{root}@nh_haze_50_5/test"))
    assert (len(train), len(held), name) == (50, 5, f"nh_haze_50_5/test of {root}")
    prepare("nh_haze", tmp_path, tmp_path / "b")
    built, _, name = split_samples(
        DataConfig(train="nh_haze@nh_haze_50_5/train", eval="nh_haze@nh_haze_50_5/test", data_dir=str(tmp_path / "b"))
    )
    np.testing.assert_array_equal(built[7].read()["hazy"], train[7].read()["hazy"])
    with pytest.raises(UserError, match=r"has 45 scenes for train, but 1 are not in the data, first 01"):
        apply_split("nh_haze_45_5_5", find_dataset(root)[1:])
    with pytest.raises(UserError, match="there is no split 'x'; choose one of dense_haze_45_5_5"):
        apply_split("x", train)
    with pytest.raises(UserError, match="split dense_haze_50_5 is not for nh_haze"):
        apply_split("dense_haze_50_5", built)
    picture(tmp_path / "NH-HAZE" / "56_hazy.png"), picture(tmp_path / "NH-HAZE" / "56_GT.png")
    with pytest.raises(UserError, match="does not contain 1 of the 56 scenes in the data, such as 56"):
        apply_split("nh_haze_50_5", find_dataset(root))


def test_the_split_is_in_every_result(tmp_path, capsys):
    root = haze_folder(tmp_path)
    assert main(["eval", "--data", f"{root}@nh_haze_45_5_5/test", "--output", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["split"] == f"nh_haze_45_5_5/test of {root}" and summary["images"] == 5
    assert "5 images of nh_haze_45_5_5/test" in capsys.readouterr().out
    assert "split nh_haze_50_5 has no part validation; its parts are train, test" in fails(
        capsys, "eval", "--data", f"{root}@nh_haze_50_5/validation"
    )


# ---- check-data


def scene(seed, size=(620, 460)):
    """Return a synthetic image `[H, W, 3]` with many edges."""
    small = np.random.default_rng(seed).integers(0, 256, (23, 31, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.NEAREST), np.float32) / 255


def write_pairs(root, scenes, name="{}_1_0.9", size=(620, 460)):
    for i in scenes:
        clear = scene(i, size)
        write_image(root / "clear" / f"{i}.png", clear)
        write_image(root / "hazy" / f"{name.format(i)}.png", 0.5 * clear + 0.45)
    return root


def mistakes(report):
    return [text for level, text in report.findings if level == "MISTAKE"]


def test_good_data_pass(tmp_path, capsys):
    write_pairs(tmp_path / "a", range(1, 5)), write_pairs(tmp_path / "b", range(11, 14), "{}")
    sheet = tmp_path / "sheet.png"
    assert main(["check-data", "--data", str(tmp_path / "a"), "--test", str(tmp_path / "b"), "--output", str(sheet)]) == 0
    said = capsys.readouterr().out
    assert "train: 4 images of 4 scenes: reside/its, RESIDE-standard" in said and "620x460 (4)" in said and "MISTAKE" not in said
    assert "RESIDE-standard has 13990 hazy and 1399 clear images, but this copy has 4 and 4" in said
    assert read_image(sheet).shape == (374, 4 * 240 + 3 * 8, 3)


def test_psnr_by_hand(tmp_path):
    """All values are 51 / 255 and 76 / 255, so PSNR is 20 log10(255 / 25) = 20.17 dB."""
    for i in range(3):
        (
            picture(tmp_path / "clear" / f"{i}.png", (40, 40), value=51 / 255),
            picture(tmp_path / "hazy" / f"{i}.png", (40, 40), value=76 / 255),
        )
    report = check_data(find_dataset(tmp_path))
    assert "median 20.17 dB, 20.17 to 20.17" in str(report)


def test_each_mistake_is_found(tmp_path, capsys):
    good = find_dataset(write_pairs(tmp_path / "good", range(1, 6)))
    assert mistakes(check_data(good)) == []
    # The release is the wrong one.
    v0 = write_pairs(tmp_path / "v0", range(1, 4), "{:04d}_01_0.9")
    for path in (v0 / "clear").iterdir():
        path.rename(path.with_name(f"{int(path.stem):04d}.png"))
    assert "ITS of RESIDE-v0" in mistakes(check_data(find_dataset(v0)))[0]
    # Clear images of 640x480 were resized, where 10 pixels should be cropped from each side.
    resized = write_pairs(tmp_path / "resized", range(1, 6))
    for path in (resized / "clear").iterdir():
        frame = np.ones((480, 640, 3), np.float32)
        frame[10:470, 10:630] = read_image(path)
        Image.fromarray((frame * 255).astype(np.uint8)).resize((620, 460), Image.Resampling.BICUBIC).save(path)
    assert "look resized from 640x480" in mistakes(check_data(find_dataset(resized)))[0]
    # The clear images belong to other hazy images.
    swapped = write_pairs(tmp_path / "swapped", range(1, 6))
    for i in range(1, 6):
        write_image(swapped / "clear" / f"{i}.png", scene(i % 5 + 1))
    assert "5 of 5 hazy images do not look like their clear images" in mistakes(check_data(find_dataset(swapped)))[0]
    # A test image is also a training image, in another format.
    (tmp_path / "test" / "clear").mkdir(parents=True)
    write_image(tmp_path / "test" / "hazy" / "7_1.png", 0.5 * scene(3) + 0.4)
    Image.open(tmp_path / "good" / "clear" / "3.png").save(tmp_path / "test" / "clear" / "7.jpg", quality=75)
    assert "1 of 1 test scenes are in the training data" in mistakes(check_data(good, find_dataset(tmp_path / "test")))[0]
    # A training scene has the number of a test scene of SOTS.
    sots = find_dataset(write_pairs(tmp_path / "sots", [*range(1, 12), 1400]))
    assert "scenes of the test set SOTS indoor, 1400 to 1449: 1400" in mistakes(check_data(sots))[0]
    # Images have no haze, are too small or cannot be read.
    write_image(tmp_path / "good" / "hazy" / "1_1_0.9.png", scene(1))
    assert "1 hazy images are equal to their clear images" in mistakes(check_data(good))[0]
    assert "5 images are smaller than a crop (data.crop=512)" in mistakes(check_data(good, crop=(512, 512)))[0]
    (tmp_path / "good" / "hazy" / "2_1_0.9.png").write_bytes(b"")
    assert "1 images cannot be used: " in mistakes(check_data(good))[0]
    # The command reports an unpaired image.
    (tmp_path / "good" / "clear" / "4.png").unlink()
    assert main(["check-data", "--data", str(tmp_path / "good"), "--output", str(tmp_path / "s.png")]) == 1
    assert "MISTAKE: 1 hazy images have no clear image" in capsys.readouterr().out


def test_warnings(tmp_path):
    root = write_pairs(tmp_path / "a", range(1, 12))
    write_image(root / "clear" / "99.png", scene(99))
    write_image(root / "hazy" / "3_1_0.9.png", 0.05 * scene(3) + 0.95)
    report = str(check_data(find_dataset(root), find_dataset(root), test_name="nh_haze_50_5/test"))
    assert "1 clear images have no hazy image" in report and "1 pairs differ from the others in PSNR" in report
    assert "evaluation uses a test set" in report
    picture(tmp_path / "d" / "rgb" / "0.png", value=0.5), picture(tmp_path / "d" / "depth" / "0.png", value=0.5)
    assert "0.png is not a valid depth map: every value is 128" in str(check_data(find_dataset(tmp_path / "d")))


def test_check_data_of_a_config(tmp_path, capsys):
    root = haze_folder(tmp_path)
    data = ["--data.train", f"{root}@nh_haze_50_5/train", "--data.eval", f"{root}@nh_haze_50_5/test"]
    options = [*data, "--data.crop", "4", "--output", tmp_path / "s.png", "--limit", "3"]
    assert main([str(o) for o in ["check-data", "--config", "configs/nh_haze.py", *options]]) == 1  # random images do not match each other
    said = capsys.readouterr().out
    assert "train: 50 images of 50 scenes; only 3 are read" in said and "no hazy image" not in said
    assert (tmp_path / "s.png").is_file()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails(capsys, "check-data", "--data", root, "--limit", "1", "--output", tmp_path / "file" / "s.png")
    assert "--data DATA or --config FILE" in fails(capsys, "check-data")
    assert "--limit (=0) must be at least 1" in fails(capsys, "check-data", "--data", root, "--limit", "0")


@pytest.mark.slow
@needs_shared
def test_genuine_data_pass_the_check():
    its, sots = (open_samples(str(SHARED / name))[0] for name in ("its_samples", "sots_indoor_subset"))
    report = check_data(its, sots, limit=30)
    assert "only 30 are read and compared" in str(report)
    assert mistakes(report) == [] and "reside/its, RESIDE-standard" in str(report) and "reside/sots_indoor" in str(report)
    nyu = split_samples(DataConfig(train=str(SHARED / "nyu_depth_v2"), holdout=50))
    assert mistakes(check_data(nyu.train, sots, limit=100)) == []
    # The first scene of ITS is the first file of NYU.
    assert "1 of 2 test scenes" in mistakes(check_data(nyu.train[:1], its))[0]
    nh = find_pairs(SHARED / "nh_haze_samples" / "hazy", SHARED / "nh_haze_samples" / "clear")
    assert check_data(nh).findings == []


@needs_shared
def test_genuine_images_through_a_builder(tmp_path):
    (tmp_path / "SOTS").mkdir()
    (tmp_path / "SOTS" / "indoor").symlink_to(SHARED / "sots_indoor_subset")
    assert "test 100 in" in prepare("reside/sots_indoor", tmp_path, tmp_path / "built")
    records, _ = open_dataset("reside/sots_indoor", tmp_path / "built")
    pairs = find_dataset(SHARED / "sots_indoor_subset")
    for i in (0, 57, 99):
        np.testing.assert_array_equal(records[i].read()["hazy"], pairs[i].read()["hazy"])


# ---- train, eval and benchmark


@pytest.mark.slow
def test_train_and_eval_on_built_data(tmp_path, config_file, model_dir, capsys):
    haze_folder(tmp_path)
    built = str(tmp_path / "built")
    assert main(["prepare-data", "nh_haze", "--source", str(tmp_path), "--data-dir", built]) == 0
    data = ["--data.train", "nh_haze@nh_haze_45_5_5/train", "--data.eval", "nh_haze@nh_haze_45_5_5/validation"]
    data += ["--data.data_dir", built, "--data.cache", "True", "--loss.cr", "0", "--optim.steps", "1"]
    assert main(["train", "--config", config_file, "--run.workdir", str(tmp_path / "run"), *data]) == 0
    assert {entry["data"] for entry in lines(tmp_path / "run", "eval")} == {"nh_haze_45_5_5/validation of nh_haze:full, NTIRE 2020"}
    said = capsys.readouterr().out
    assert (
        "keeping 45 images in memory" in said
        and "training on 45 images, evaluating on 5 (nh_haze_45_5_5/validation of nh_haze:full" in said
    )
    assert main(["eval", "--checkpoint", str(model_dir), "--data", "nh_haze@nh_haze_50_5/test", "--data-dir", built]) == 0
    assert "5 images of nh_haze_50_5/test" in capsys.readouterr().out
    options = ["--data.eval", "nh_haze@nh_haze_45_5_5/validation", "--data.holdout", "3"]
    assert "both select the evaluation data" in fails(capsys, "train", "--config", config_file, *options)


def test_benchmark_data(tmp_path, config_file, capsys):
    """`benchmark data` measures the time of each stage and the speed and waiting time of each pipeline."""
    root = haze_folder(tmp_path)
    out = tmp_path / "figures.json"
    options = ["--data.train", root, "--data.crop", "16", "--seconds", "0.2", "--workers", "0", "--output", out]
    assert main(["benchmark", "data", "--config", config_file, *map(str, options)]) == 0
    figures = json.loads(out.read_text())
    assert [row["stage"] for row in figures["stages"]] == ["read files", "read and decode", "augment", "batch"]
    assert all(row["ms"] > 0 for row in figures["stages"]) and figures["pipelines"][0]["images_per_second"] > 0
    assert 0 <= figures["pipelines"][0]["waiting"] <= 1 and "images a second take" in capsys.readouterr().out
    for seconds in ("0", "nan", "inf"):  # inf would never finish
        assert "must be positive and finite" in fails(capsys, "benchmark", "data", "--config", config_file, "--seconds", seconds)
