"""check-data on data with mistakes that are easy to miss: exchanged folders, empty images, bad depth maps, ambiguous names."""

import numpy as np
import pytest
from PIL import Image
from test_commands import fails
from test_data import SHARED, needs_shared, picture
from test_datasets import haze_folder, mistakes, write_pairs

from aecr_jax import UserError
from aecr_jax.__main__ import main
from aecr_jax.data.check import check_data
from aecr_jax.data.folders import find_dataset, find_pairs
from aecr_jax.data.haze import Haze, add_haze
from aecr_jax.data.images import read_depth, read_image, write_image
from aecr_jax.data.layouts import recognise_data_set
from aecr_jax.data.reader import to_pair
from aecr_jax.data.samples import Pair
from aecr_jax.data.sources import draw_scenes, open_samples

GENUINE = ("sots_indoor_subset", "sots_outdoor_subset", "nh_haze_samples", "dense_haze_samples", "its_samples")


def exchanged(pairs):
    return [Pair(pair.clear, pair.hazy) for pair in pairs]


def drawn_pairs(root, count):
    for i, scene in enumerate(draw_scenes(1, count, (96, 128))):
        hazy, clear = to_pair(scene.read(), i)
        write_image(root / "hazy" / f"{i:02d}.png", hazy), write_image(root / "clear" / f"{i:02d}.png", clear)
    return find_dataset(root)


def write_depth(root, values, name="0"):
    picture(root / "rgb" / f"{name}.png", (8, 6))
    (root / "depth").mkdir(exist_ok=True)
    Image.fromarray(values).save(root / "depth" / f"{name}.tif")
    return root


def ramp(dtype=np.float32):
    """Return a depth map `[6, 8]` with values from 1 to 4."""
    return np.linspace(1, 4, 48).reshape(6, 8).astype(dtype)


# ---- exchanged and empty images


@pytest.mark.parametrize("count", [1, 2, pytest.param(20, marks=pytest.mark.slow)])
def test_exchanged_drawn_scenes_are_found(tmp_path, count):
    pairs = drawn_pairs(tmp_path, count)
    assert mistakes(check_data(pairs)) == []
    (found,) = mistakes(check_data(exchanged(pairs)))
    assert f"hazy and clear images look exchanged: in {count} of {count} pairs" in found


@needs_shared
@pytest.mark.parametrize("name", GENUINE)
def test_exchanged_genuine_images_are_found(name):
    """About 12 pairs of each set are checked one at a time; what holds for single pairs also holds for sets of any size."""
    pairs = find_dataset(SHARED / name)
    for pair in pairs[:: max(1, len(pairs) // 12)]:
        assert mistakes(check_data([pair])) == []
        assert "look exchanged" in mistakes(check_data(exchanged([pair])))[0]


def test_one_exchanged_pair_among_others_is_a_warning(tmp_path):
    pairs = drawn_pairs(tmp_path, 6)
    report = check_data([*pairs[:5], *exchanged(pairs[5:])])
    assert mistakes(report) == [] and "1 clear images are hazier than their hazy ones: " in str(report)


def test_exchanged_folders_of_numbered_names_are_found(tmp_path, capsys):
    write_pairs(tmp_path, range(1, 4))
    (tmp_path / "hazy").rename(tmp_path / "x")
    (tmp_path / "clear").rename(tmp_path / "hazy")
    (tmp_path / "x").rename(tmp_path / "clear")
    assert main(["check-data", "--data", str(tmp_path), "--output", str(tmp_path / "s.png")]) == 1
    assert "MISTAKE: hazy and clear images look exchanged" in capsys.readouterr().out
    assert "look exchanged" in fails(capsys, "eval", "--data", tmp_path)


def test_pictures_of_one_colour_are_found(tmp_path):
    pairs = drawn_pairs(tmp_path, 3)
    for pair in pairs:
        write_image(pair.clear, np.zeros((96, 128, 3)))
    assert mistakes(check_data(pairs)) == [f"train: 3 clear images are black or of one colour: {'; '.join(str(p.clear) for p in pairs)}"]
    write_image(pairs[0].hazy, np.full((96, 128, 3), 0.8))
    pairs = pairs[:1]
    drawn_pairs(tmp_path / "b", 1)
    assert mistakes(check_data([Pair(pairs[0].hazy, tmp_path / "b" / "clear" / "00.png")]))[0].startswith(
        "train: 1 hazy images are of one colour"
    )


def test_black_pictures_with_depth_are_found(tmp_path):
    write_depth(tmp_path, ramp())
    picture(tmp_path / "rgb" / "0.png", (8, 6), value=0.0)
    assert "1 clear images are black or of one colour" in mistakes(check_data(find_dataset(tmp_path)))[0]


# ---- depth


BAD_DEPTH = {
    "negative": (-ramp(), "its values must be distances, at least 0, and the smallest is -4"),
    "sentinel": (np.where(ramp() < 2, np.float32(-9999), ramp()), "the smallest is -9999"),
    "nan": (np.where(ramp() < 2, np.float32(np.nan), ramp()), "its values must be finite"),
    "infinite": (np.where(ramp() < 2, np.float32(np.inf), ramp()), "its values must be finite"),
    "constant": (np.full((6, 8), 3, np.uint8), "every value is 3"),
    "far": (np.where(ramp() < 2, np.float32(65535), ramp()), "every value is 65535 or less than 1% of that"),
}


@pytest.mark.parametrize("kind", BAD_DEPTH)
def test_bad_depth_is_refused_by_name(tmp_path, config_file, capsys, kind):
    values, said = BAD_DEPTH[kind]
    root = write_depth(tmp_path, values, "1")  # not the first image, which is read before training begins
    for i in (0, 2, 3):
        write_depth(root, ramp(), str(i))
    line = fails(
        capsys,
        *("train", "--config", config_file, "--data.train", root, "--data.crop", "4"),
        *("--data.holdout", "1", "--loss.cr", "0", "--run.workdir", tmp_path / "run"),
    )
    assert f"{root / 'depth' / '1.tif'} is not a valid depth map: " in line and said in line and "learning_rate" not in line
    (found,) = mistakes(check_data(find_dataset(root)))
    assert f"1 images cannot be used: {root / 'depth' / '1.tif'} is not a valid depth map: " in found and said in found


def test_depth_that_may_be_marked_is_a_warning(tmp_path):
    """Zeros in an 8-bit map are the nearest points, rounded down, unless a gap separates them from the other values, in which case they
    may mark missing measurements. The same applies to many pixels of the largest value."""
    near = np.arange(48, dtype=np.uint8).reshape(6, 8)
    write_depth(tmp_path, near)
    np.testing.assert_allclose(read_depth(tmp_path / "depth" / "0.tif")[0, :2], [0.5 / 47, 1.5 / 47], rtol=1e-6)
    assert check_data(find_dataset(tmp_path)).findings == []
    write_depth(tmp_path, np.where(near < 9, 0, near + 100).astype(np.uint8))
    report = str(check_data(find_dataset(tmp_path)))
    assert "1 depth maps have zeros far below their other values" in report and f": {tmp_path / 'depth' / '0.tif'}" in report
    write_depth(tmp_path, np.where(near > 40, 65535, 1000 * near.astype(int) // 4 + 1000).astype(np.uint16))
    report = check_data(find_dataset(tmp_path))
    assert "1 depth maps have many pixels of the largest value far above the others" in str(report) and mistakes(report) == []


def test_haze_is_not_made_from_negative_depth():
    for value in (-0.1, np.nan):
        with pytest.raises(ValueError, match=r"depth must be at least 0 everywhere, and its smallest value is (-0\.1|nan)"):
            add_haze(np.zeros((1, 2, 3), np.float32), np.array([[0.5, value]]), 0.8, 1.0)


@needs_shared
def test_genuine_depth_maps_have_nothing_odd():
    assert "depth maps" not in str(check_data(find_dataset(SHARED / "nyu_depth_v2"), limit=60))


# ---- names


def photos(root):
    for i in range(1, 5):
        picture(root / "hazy" / f"photo_{i}.png", (20, 16), seed=i), picture(root / "clear" / f"photo_clear_{i}.png", (20, 16), seed=i)
    picture(root / "clear" / "photo.png", (20, 16))
    return root


def test_names_that_are_not_numbers_share_no_clear_image(tmp_path, config_file, capsys):
    root = photos(tmp_path)
    folders = "--data.train", f"{root / 'hazy'},{root / 'clear'}"
    for command in (("eval", "--data", root), ("train", "--config", config_file, *folders, "--run.workdir", tmp_path / "run")):
        line = fails(capsys, *command)
        first = root / "hazy" / "photo_1.png"
        assert f"4 of 4 hazy images have no clear image, first {first}; photo_2.png; photo_3.png; photo_4.png" in line
        assert "for photo_1 with any image extension" in line and "1400_1 with 1400" in line
    for options in (("--data", root), ("--config", config_file, *folders), ("--config", "configs/nh_haze.py", *folders)):
        assert main(["check-data", *map(str, options), "--output", str(tmp_path / "s.png")]) == 1
        assert "MISTAKE: 4 hazy images have no clear image: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hazy", "clear"),
    [
        (("photo.png", "photo.jpg"), "photo.png"),
        (("01_hazy.png", "01.png"), "01.png"),
        (("1400.png", "1400_1.png"), "1400.png"),
        (("1_1.png", "1_1.jpg"), "1.png"),
    ],
)
def test_other_ways_to_share_a_clear_image_are_refused(tmp_path, hazy, clear):
    for i, name in enumerate(hazy):
        picture(tmp_path / "hazy" / name, seed=i)
    picture(tmp_path / "clear" / clear), picture(tmp_path / "clear" / "other.png")
    with pytest.raises(UserError, match=r"2 hazy images have the same clear image, .*/clear/") as error:
        find_pairs(tmp_path / "hazy", tmp_path / "clear")
    assert all(name in str(error.value) for name in hazy)
    problems = []
    assert len(find_pairs(tmp_path / "hazy", tmp_path / "clear", problems)) == 2
    assert "2 hazy images have the same clear image" in problems[0]


@pytest.mark.parametrize(
    "names", [("1400_1", "1400_2"), ("0001_0.8_0.2", "0001_1_0.08"), ("1_1_0.90179", "1_10_1"), ("0499_05_0.8353", "0499_06")]
)
def test_resides_numbers_share_a_clear_image(tmp_path, names):
    for name in names:
        picture(tmp_path / "hazy" / f"{name}.png")
    picture(tmp_path / "clear" / f"{names[0].split('_')[0]}.png")
    assert len(find_pairs(tmp_path / "hazy", tmp_path / "clear")) == 2


def test_findings_do_not_hide_each_other(tmp_path, capsys):
    """All problems are reported together: a file without a partner, two files of one name, several unreadable files, a pair of different
    sizes, and an image of one colour."""
    root = write_pairs(tmp_path, range(1, 12), size=(64, 48))
    (root / "clear" / "9.png").unlink()
    picture(root / "clear" / "8.jpg")
    for i in range(1, 7):
        (root / "hazy" / f"{i}_1_0.9.png").write_bytes(b"")
    picture(root / "hazy" / "7_1_0.9.png", (30, 30))
    write_image(root / "clear" / "10.png", np.zeros((48, 64, 3)))
    assert main(["check-data", "--data", str(root), "--output", str(tmp_path / "s.png")]) == 1
    said = capsys.readouterr().out
    for text in (
        "1 hazy images have no clear image: ",
        "8.jpg and ",
        "6 images cannot be used: ",
        "7_1_0.9.png is 30x30 and",
        "1 clear images are black or of one colour: ",
    ):
        assert text in said
    assert main(["check-data", "--data", str(root), "--limit", "3", "--output", str(tmp_path / "t.png")]) == 1
    assert "; only 3 are read and compared" in capsys.readouterr().out


def test_numbered_pictures_are_not_taken_for_reside(tmp_path):
    names = [f"{i}_1" for i in range(1, 14)]
    assert recognise_data_set(names) is None and recognise_data_set(["2024_05", "2024_06"]) is None
    report = str(check_data(find_dataset(write_pairs(tmp_path / "a", range(1, 14), "{}_1", (64, 48)))))
    assert "reside" not in report and "RESIDE" not in report and "this copy" not in report
    # These do identify RESIDE: its image size, the numbers of a release (13,990 and 1,399), or airlights in the names.
    assert "reside/its, RESIDE-standard" in str(check_data(find_dataset(write_pairs(tmp_path / "b", range(1, 3), "{}_1"))))
    assert recognise_data_set([f"{i}_{j}" for i in range(1, 1400) for j in range(1, 11)], clear=1399) == "reside/its"
    assert recognise_data_set(["1_1_0.9"], size=(64, 48)) == "reside/its"


# ---- the contact sheet


def test_the_picture_does_not_replace_a_file(tmp_path, capsys):
    root, output = haze_folder(tmp_path), tmp_path / "photo.png"
    output.write_text("mine")
    (root / "01_hazy.png").write_bytes(b"")  # reading this file would fail
    line = fails(capsys, "check-data", "--data", root, "--output", output)
    assert f"{output} already exists" in line and "--overwrite" in line and output.read_text() == "mine"
    main(["check-data", "--data", str(root), "--limit", "2", "--output", str(output), "--overwrite"])
    assert read_image(output).shape[1] > 240
    assert "argument --output: must not be empty" in fails(capsys, "check-data", "--data", root, "--output", "")


def test_the_picture_does_not_replace_an_image_of_the_data(tmp_path, capsys):
    root = haze_folder(tmp_path)
    image = next(root.glob("*_GT.png"))
    before = image.read_bytes()
    line = fails(capsys, "check-data", "--data", root, "--output", image, "--overwrite")
    assert f"{image} belongs to the data and would be replaced" in line and image.read_bytes() == before


def test_constant_haze_may_hide_an_image_or_leave_it_clear(tmp_path, monkeypatch):
    """It is no mistake of the data if the drawn transmission is almost 0 or almost 1, unlike a blank clear image."""
    for i in range(3):
        picture(tmp_path / f"{i}.png", seed=i)
    picture(tmp_path / "3.png", value=0.5)
    samples, _ = open_samples(f"constant:{tmp_path}")
    for transmission in (0, 0.5, 1):
        add = lambda clear, depth, rng, t=transmission: Haze(clear * t + 1 - t, np.full((*clear.shape[:2], 1), t), np.ones(3))  # noqa: E731
        monkeypatch.setattr("aecr_jax.data.reader.haze_for", add)
        (found,) = mistakes(check_data(samples))
        assert f"clear images are black or of one colour: {tmp_path / '3.png'}" in found
