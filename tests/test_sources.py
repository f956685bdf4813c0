"""The notation for images: the samples and the name that each form gives, and the errors for wrong forms."""

import pickle
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import numpy as np
import pytest
from test_commands import fails
from test_data import picture

from aecr_jax import UserError
from aecr_jax.data.builders import prepare
from aecr_jax.data.samples import ClearImage, DepthScene, DrawnScene, Pair
from aecr_jax.data.sources import DataConfig, drawn_test_scenes, open_samples, split_samples
from aecr_jax.data.splits import apply_split


@pytest.fixture
def root(tmp_path):
    for i in range(3):
        picture(tmp_path / "set" / "hazy" / f"{i}.png", seed=i), picture(tmp_path / "set" / "clear" / f"{i}.png", seed=i + 9)
        picture(tmp_path / "nyu" / "rgb" / f"{i}.png", seed=i), picture(tmp_path / "nyu" / "depth" / f"{i}.png", seed=i + 9)
    return tmp_path


def test_folders(root):
    pairs, name = open_samples(str(root / "set"))
    assert name == str(root / "set") and [type(sample) for sample in pairs] == [Pair] * 3
    hazy, clear, depth = root / "set" / "hazy", root / "set" / "clear", root / "nyu" / "depth"
    for spec in (f"{hazy},{clear}", f"hazy={hazy},clear={clear}", f"clear={clear},hazy={hazy}"):
        assert open_samples(spec) == (pairs, str(hazy))
    scenes, name = open_samples(str(root / "nyu"))
    assert [type(sample) for sample in scenes] == [DepthScene] * 3
    rgb = root / "nyu" / "rgb"
    assert open_samples(f"clear={rgb},depth={depth}") == (scenes, str(rgb))
    assert pairs[0].files == {"hazy": hazy / "0.png", "clear": clear / "0.png"} and pairs[0].kind == "pair"
    assert scenes[0].files == {"clear": rgb / "0.png", "depth": depth / "0.png"} and scenes[0].kind == "depth"


def test_clear_images_alone(root):
    spec, rgb = f"constant:{root / 'nyu' / 'rgb'}", root / "nyu" / "rgb"
    assert open_samples(spec) == ([ClearImage(rgb / f"{i}.png") for i in range(3)], spec)
    image = open_samples(spec)[0][1]
    assert image.kind == "clear" and image.name == image.scene == "1" and set(image.read()) == {"clear"}
    assert [sample.name for sample in split_samples(DataConfig(train=spec, holdout=1)).evaluation] == ["2"]
    (root / "empty").mkdir()
    for name, message in (("none", "there is no folder"), ("empty", "no images in .*empty")):
        with pytest.raises(UserError, match=message):
            open_samples(f"constant:{root / name}")
    picture(rgb / "2.jpg")
    with pytest.raises(UserError, match="have the same name"):
        open_samples(spec)


def test_drawn_scenes():
    test, name = open_samples("scenes:3:40x32")
    train, _ = open_samples("scenes:3:40x32", training=True)
    assert name == "scenes" and test[0].clear.shape == (32, 40, 3) and isinstance(test[0], DrawnScene)
    assert {sample.name for sample in test}.isdisjoint(sample.name for sample in train)
    assert [s.name for s in open_samples("scenes/train:3:40x32")[0]] == [s.name for s in train] and test[0].files == {}
    assert drawn_test_scenes("scenes:150:192x144") == "scenes/test:20:192x144" and drawn_test_scenes("scenes") == "scenes/test"


def test_samples_by_their_files(tmp_path):
    """RESIDE's names: the hazy file names the pair, and the clear one its scene."""
    pair, scene = Pair(tmp_path / "1400_2.png", tmp_path / "1400.jpg"), DepthScene(tmp_path / "7.jpg", tmp_path / "7_d.png")
    assert (pair.name, pair.scene, pair.origin, pair.dataset) == ("1400_2", "1400", str(tmp_path / "1400_2.png"), "")
    assert (scene.name, scene.scene, scene.origin, scene.dataset) == ("7", "7", str(tmp_path / "7.jpg"), "")


def test_samples_are_immutable_and_reach_worker_processes_whole(tmp_path):
    """Equal after pickling; drawn scenes, which are equal only to themselves, by their values."""
    clear, depth = np.full((2, 3, 3), 0.25, np.float32), np.ones((2, 3), np.float32)
    drawn = DrawnScene("a", clear, depth)
    for sample in (Pair(tmp_path / "a", tmp_path / "b"), DepthScene(tmp_path / "a", tmp_path / "b"), drawn):
        assert not hasattr(sample, "__dict__")
        with pytest.raises(FrozenInstanceError):
            sample.clear = None
        copy = pickle.loads(pickle.dumps(sample))
        if sample is drawn:
            assert (copy.name, copy.scene, copy.origin, copy.dataset, copy.kind) == ("a", "a", "a", "", "depth")
            np.testing.assert_array_equal(copy.clear, clear)
            np.testing.assert_array_equal(copy.depth, depth)
        else:
            assert copy == sample and hash(copy) == hash(sample)
    assert drawn == drawn and drawn != DrawnScene("a", clear, depth) and len({drawn, drawn}) == 1
    assert Pair(tmp_path / "a", tmp_path / "b") != DepthScene(tmp_path / "a", tmp_path / "b")


def test_built_data_sets_and_parts_of_splits(tmp_path):
    for i in range(1, 56):
        picture(tmp_path / "NH-HAZE" / f"{i:02d}_hazy.png", seed=i), picture(tmp_path / "NH-HAZE" / f"{i:02d}_GT.png", seed=i + 99)
    prepare("nh_haze", tmp_path, tmp_path / "built", say=lambda _: None)
    for spec in ("nh_haze", "nh_haze:full"):
        samples, name = open_samples(spec, data_dir=str(tmp_path / "built"))
        assert len(samples) == 55 and name == "nh_haze:full, NTIRE 2020" and samples[0].dataset == "nh_haze"
        assert (samples[0].name, samples[0].scene, samples[0].origin, samples[0].kind) == ("01_hazy", "01_GT", "nh_haze 01_hazy", "pair")
        assert set(samples[0].files) == {"records"}
    folder = str(tmp_path / "NH-HAZE")
    for spec, options in ((folder, {}), ("nh_haze", {"data_dir": str(tmp_path / "built")})):
        test, name = open_samples(f"{spec}@nh_haze_50_5/test", **options)
        assert [sample.scene[:2] for sample in test] == ["51", "52", "53", "54", "55"] and name.startswith("nh_haze_50_5/test of ")
    data = DataConfig(train=f"{folder}@nh_haze_45_5_5/train", eval=f"{folder}@nh_haze_45_5_5/validation")
    train, evaluation, name = split_samples(data)
    assert (len(train), len(evaluation)) == (45, 5) and name == f"nh_haze_45_5_5/validation of {folder}"


def test_a_folder_may_have_the_signs_of_the_notation_in_its_name(root):
    for name in ("a,b", "x@nh_haze_50_5/test"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / "set").rename(root / name)
        assert len(open_samples(str(root / name))[0]) == 3
        (root / name).rename(root / "set")


def test_wrong_notations_are_one_line(root, capsys):
    assert (
        "there is no folder nowhere: data must be a folder, HAZY,CLEAR, clear=FOLDER,depth=FOLDER, constant:FOLDER, clear=FOLDER,"
        in fails(capsys, "eval", "--data", "nowhere")
    )
    with pytest.raises(FileNotFoundError):
        open_samples("nowhere")
    for spec, message in [
        (f"depth={root / 'nyu' / 'depth'},hazy={root / 'set' / 'hazy'}", "must name two folders"),
        (f"{root / 'set'}@nh_haze_50_5/test", "split nh_haze_50_5"),
        (f"{root / 'set'}@other/test", "there is no split 'other'"),
        ("scenes:0", "must have at least 1 scene of at least 8x8 pixels"),
        ("scenes:5:4x4", "must have at least 1 scene of at least 8x8 pixels"),
        (f"{root / 'set' / 'hazy'},{root / 'none'}", "there is no folder"),
        # Empty names, as of variables that are not set, do not mean the current folder.
        *((spec, "must name each folder") for spec in ("", " ", "constant:", "outdoor:", "clear=", f"{root / 'set' / 'hazy'},", ",x")),
        (f"clear=,depth={root / 'nyu' / 'depth'}", "must name each folder"),
        (f"{root / 'set'} + 2*outdoor:", "must name each folder"),
    ]:
        with pytest.raises(UserError, match=message):
            open_samples(spec)


def test_the_ten_scenes_behind_the_shipped_models_score():
    """The split applies to a folder of all 50 scenes of SOTS indoor, to a folder of the ten alone, and to a built data set."""

    def samples(scenes, dataset=""):
        names = [(f"{scene}_{version}", str(scene)) for scene in scenes for version in (1, 2)]
        return [SimpleNamespace(name=name, scene=scene, dataset=dataset) for name, scene in names]

    ten = [str(scene) for scene in range(1400, 1450, 5)]
    for found in (samples(range(1400, 1450)), samples(ten), samples(range(1400, 1450), "reside/sots_indoor")):
        parts = apply_split("sots_indoor_10", found)
        assert list(parts) == ["test"] and [sample.scene for sample in parts["test"]] == [scene for scene in ten for _ in range(2)]
    with pytest.raises(UserError, match="has 10 scenes for test, but 1 are not in the data, first 1400"):
        apply_split("sots_indoor_10", samples(ten[1:]))
    with pytest.raises(UserError, match="does not contain 1 of the 11 scenes in the data, such as 7"):
        apply_split("sots_indoor_10", samples([*ten, "7"]))
    with pytest.raises(UserError, match="split sots_indoor_10 is not for sots_outdoor"):
        apply_split("sots_indoor_10", samples(ten, "reside/sots_outdoor"))


def test_clear_images_as_their_own_targets(tmp_path):
    picture(tmp_path / "b.png", (6, 4))
    picture(tmp_path / "a.jpg", (8, 5))
    samples, name = open_samples(f"clear={tmp_path}")
    assert name == f"clear={tmp_path}" and [sample.name for sample in samples] == ["a", "b"]
    for sample in samples:
        images = sample.read()
        np.testing.assert_array_equal(images["hazy"], images["clear"])
    with pytest.raises(UserError, match=r"no images in .*: looked for clear images"):
        (tmp_path / "empty").mkdir()
        open_samples(f"clear={tmp_path / 'empty'}")
