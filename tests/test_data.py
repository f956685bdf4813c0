import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aecr_jax import UserError
from aecr_jax.data.folders import clear_names, find_dataset, find_depth_scenes, find_pairs
from aecr_jax.data.haze import add_constant_haze, add_haze, draw_haze
from aecr_jax.data.images import list_images, panel, read_depth, read_image, write_image
from aecr_jax.data.pipeline import cache_bytes, train_batches
from aecr_jax.data.reader import eval_images
from aecr_jax.data.samples import DepthScene, Pair
from aecr_jax.data.scenes import render_scene
from aecr_jax.data.sources import DataConfig, open_samples, split_samples
from aecr_jax.training.config import Config, OptimConfig, RunConfig

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the research images, which are not in the repository")


def picture(path, size=(8, 6), value=None, seed=0):
    """Write an RGB image of `size` (width, height), random or with one value, and return its path."""
    w, h = size
    image = np.full((h, w, 3), value) if value is not None else np.random.default_rng(seed).random((h, w, 3))
    write_image(path, image.astype(np.float32))
    return path


# ---- haze


def test_haze_by_hand():
    """With t = exp(-1) = 0.36788, 0.5 t + 0.8 (1 - t) = 0.68964, which is 176 / 255 in 8 bits; at depth 0 the image stays clear."""
    clear = np.full((1, 2, 3), 128 / 255, np.float32)
    hazy = add_haze(clear, np.array([[1.0, 0.0]]), 0.8, 1.0)
    np.testing.assert_allclose(hazy[0, 0] * 255, [176] * 3, atol=1e-4)
    np.testing.assert_allclose(hazy[0, 1] * 255, [128] * 3, atol=1e-4)


def test_constant_haze_by_hand():
    """0.5 t + 1 (1 - t) with t = 0.25 is 0.875, rounded to 8 bit 223 / 255; t = 1 leaves the image clear."""
    clear = np.full((2, 2, 3), 0.5, np.float32)
    np.testing.assert_allclose(add_constant_haze(clear, 0.25) * 255, np.full((2, 2, 3), 223), atol=1e-4)
    np.testing.assert_allclose(add_constant_haze(clear, 1.0) * 255, np.full((2, 2, 3), 128), atol=1e-4)


def test_clear_images_get_one_transmission_each_from_the_seed(tmp_path):
    """Solved for t, every pixel of a crop gives the same up to 8 bits; in the crops of a training run, it is spread over [0, 1)."""
    for i in range(2):
        write_image(tmp_path / f"{i}.png", np.random.default_rng(i).random((12, 10, 3)).astype(np.float32) / 2)
    data = DataConfig(train=f"constant:{tmp_path}", crop=8, threads=1)
    samples, _ = open_samples(data.train)
    batches = train_batches(samples, data, batch=40, seed=3)
    batch, other = next(batches), next(batches)
    t = (1 - batch["hazy"]) / (1 - batch["clear"])
    np.testing.assert_allclose(t, np.broadcast_to(np.median(t, (1, 2, 3), keepdims=True), t.shape), atol=2 / 255)
    drawn = np.sort(np.median(t, (1, 2, 3)))
    np.testing.assert_allclose(drawn, np.linspace(0, 1, 40), atol=0.25)
    again = next(train_batches(samples, data, batch=40, seed=3, start=40))
    for key in ("hazy", "clear", "index"):
        np.testing.assert_array_equal(again[key], other[key])
    first, second = (list(eval_images(samples)) for _ in range(2))
    np.testing.assert_array_equal(first[1].hazy, second[1].hazy)
    assert first[1].hazy.shape == (12, 10, 3) and (first[1].hazy >= first[1].clear - 1e-6).all()


def test_haze_parameters_are_resides():
    drawn = np.array([draw_haze(np.random.default_rng(i)) for i in range(500)])
    assert drawn.min(0) == pytest.approx([0.7, 0.6], abs=0.02) and drawn.max(0) == pytest.approx([1.0, 1.8], abs=0.02)


@needs_shared
@pytest.mark.parametrize(
    ("name", "beta"), [("1_1_0.90179", 0.881), ("1_2_0.97842", 0.934), ("2_1_0.99082", 1.131), ("2_2_0.76381", 1.1985)]
)
def test_reproduces_genuine_its_images(name, beta):
    """Images of RESIDE are reproduced from their clear image and NYU's depth; the airlight is in the name, and beta was fitted."""
    scene = int(name.split("_")[0])
    clear = read_image(SHARED / "its_samples" / "clear" / f"{scene}.png")
    nyu = SHARED / "nyu_depth_v2"
    depth = DepthScene(nyu / "rgb" / f"{scene - 1:05d}.jpg", nyu / "depth" / f"{scene - 1:05d}.png").read()["depth"]
    ours = add_haze(clear, depth, float(name.split("_")[2]), beta)
    genuine = read_image(SHARED / "its_samples" / "hazy" / f"{name}.png")
    assert -10 * np.log10(np.mean((ours - genuine) ** 2)) > 55


# ---- drawn scenes


def test_scenes_are_functions_of_their_seed_with_exact_depth():
    clear, depth = render_scene((0, 3), 48, 64)
    again, _ = render_scene((0, 3), 48, 64)
    other, _ = render_scene((0, 4), 48, 64)
    assert clear.shape == (48, 64, 3) and clear.dtype == np.float32 and clear.min() >= 0 and clear.max() <= 1
    assert depth.shape == (48, 64) and depth.max() == 1 and depth.min() > 0
    np.testing.assert_array_equal(clear, again)
    assert np.abs(clear - other).mean() > 0.05 and clear.std() > 0.05


def test_depth_of_a_flat_wall_is_the_same_at_other_resolutions():
    """Depth does not depend on the resolution: except at edges, a scene of half the size has the same depth at the same place."""
    _, fine = render_scene(5, 96, 128)
    _, coarse = render_scene(5, 48, 64)
    difference = np.abs(fine.reshape(48, 2, 64, 2).mean((1, 3)) - coarse)
    assert np.median(difference) < 1e-3


# ---- image files


def test_grey_alpha_16_bit_and_exif(tmp_path):
    Image.fromarray(np.full((4, 5), 51, np.uint8)).save(tmp_path / "grey.png")
    np.testing.assert_allclose(read_image(tmp_path / "grey.png"), np.full((4, 5, 3), 0.2), atol=1e-6)
    Image.fromarray(np.full((4, 5, 4), [255, 0, 51, 7], np.uint8)).save(tmp_path / "rgba.png")
    np.testing.assert_allclose(read_image(tmp_path / "rgba.png"), np.broadcast_to([1, 0, 0.2], (4, 5, 3)), atol=1e-6)
    Image.fromarray(np.full((4, 5), 13107, np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_allclose(read_image(tmp_path / "deep.png"), np.full((4, 5, 3), 0.2), atol=1e-4)
    turned = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    exif = turned.getexif()
    exif[274] = 6  # shown turned by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (6, 4, 3)


def test_damaged_files_are_named(tmp_path):
    whole = picture(tmp_path / "whole.png", (64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    for name, message in (("cut.png", "cut.png cannot be read"), ("text.jpg", "text.jpg is not an image"), ("no.png", "there is no file")):
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / name)


def test_depth_as_reside_takes_it(tmp_path):
    Image.fromarray(np.array([[0, 127, 255]], np.uint8)).save(tmp_path / "d.png")
    np.testing.assert_allclose(read_depth(tmp_path / "d.png"), [[0.5 / 255, 0.5, 1]], atol=1e-6)


def test_depth_of_any_scale(tmp_path):
    Image.fromarray(np.array([[500, 4000]], np.uint16)).save(tmp_path / "millimetres.png")
    np.testing.assert_allclose(read_depth(tmp_path / "millimetres.png"), [[500.5 / 4000, 1]], atol=1e-6)
    Image.fromarray(np.array([[1.5, 6.0]], np.float32)).save(tmp_path / "metres.tif")
    np.testing.assert_allclose(read_depth(tmp_path / "metres.tif"), [[0.25, 1]], atol=1e-6)
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "empty.png")
    with pytest.raises(UserError, match=r"empty\.png is not a valid depth map"):
        read_depth(tmp_path / "empty.png")


def test_two_files_of_one_name_are_refused(tmp_path):
    picture(tmp_path / "h" / "1_1.png"), picture(tmp_path / "c" / "1.png"), picture(tmp_path / "c" / "1.jpg")
    with pytest.raises(UserError, match=r"1.jpg and .*1.png have the same name"):
        find_pairs(tmp_path / "h", tmp_path / "c")


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(tmp_path):
    samples = pair_samples(tmp_path)
    expected = batches_of(samples, small_config())
    one, three = (batches_of(samples, small_config(workers=n)) for n in (1, 3))
    for _ in range(4):
        batch = next(expected)["clear"]
        np.testing.assert_array_equal(next(one)["clear"], batch)
        np.testing.assert_array_equal(next(three)["clear"], batch)


def test_write_image_rounds_and_reports(tmp_path):
    write_image(tmp_path / "new" / "a.png", np.full((2, 2, 3), 0.5, np.float32))
    assert np.asarray(Image.open(tmp_path / "new" / "a.png"))[0, 0, 0] == 128
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_image(tmp_path / "file" / "a.png", np.zeros((2, 2, 3)))


def test_write_image_refuses_what_the_format_cannot_hold(tmp_path):
    """Pillow reads PSD and writes none, and a side of a WebP picture has at most 16,383 pixels."""
    for name in ("a.psd", "a.txt", "a"):
        with pytest.raises(UserError, match=f"{name} must end in one of .png, .jpg, .jpeg, .webp, .tif, .tiff, .bmp"):
            write_image(tmp_path / name, np.zeros((2, 2, 3)))
    with pytest.raises(UserError, match=r"a.webp was not written: .*limit"):
        write_image(tmp_path / "a.webp", np.zeros((1, 16_384, 3)))
    assert list(tmp_path.iterdir()) == []


def test_a_grey_pfm_file_has_floating_point_values(tmp_path):
    """Pillow names the format PPM, as for files of integers."""
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "a.pfm")
    np.testing.assert_allclose(read_image(tmp_path / "a.pfm"), np.repeat(values[..., None], 3, -1), atol=1e-6)


def test_panel_has_white_gaps():
    image = panel([[np.zeros((2, 3, 3))] * 2] * 2, gap=1)
    assert image.shape == (5, 7, 3) and image[2].min() == 1 and image[:, 3].min() == 1 and image[0, 0].max() == 0


# ---- folders


def test_names():
    assert "1400" in clear_names("1400_1") and "1" in clear_names("1_2_0.97842") and "01_gt" in clear_names("01_hazy")
    assert clear_names("photo") == ["photo"]


@pytest.mark.parametrize(
    ("hazy", "clear"),
    [
        ("1400_1.png", "1400.png"),
        ("1_2_0.97842.png", "1.png"),
        ("01_hazy.png", "01_GT.png"),
        ("a.JPG", "a.png"),
        ("0025_0.8_0.04.jpg", "0025.png"),
    ],
)
def test_pairs_by_each_naming(tmp_path, hazy, clear):
    picture(tmp_path / "h" / hazy), picture(tmp_path / "c" / clear), picture(tmp_path / "c" / "other.png")
    assert find_pairs(tmp_path / "h", tmp_path / "c") == [Pair(tmp_path / "h" / hazy, tmp_path / "c" / clear)]


def test_find_dataset_in_each_layout(tmp_path):
    picture(tmp_path / "pairs" / "hazy" / "1_1.png"), picture(tmp_path / "pairs" / "clear" / "1.png")
    picture(tmp_path / "nyu" / "rgb" / "00000.jpg"), picture(tmp_path / "nyu" / "depth" / "00000.png")
    picture(tmp_path / "nh" / "01_hazy.png"), picture(tmp_path / "nh" / "01_GT.png")
    assert [type(find_dataset(tmp_path / name)[0]) for name in ("pairs", "nyu", "nh")] == [Pair, DepthScene, Pair]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no pairs in .*empty: looked for folders hazy/.* with clear/.*rgb"):
        find_dataset(tmp_path / "empty")
    with pytest.raises(UserError, match="there is no folder"):
        find_dataset(tmp_path / "nowhere")


def test_missing_partners_are_named(tmp_path):
    picture(tmp_path / "h" / "1_1.png"), picture(tmp_path / "h" / "2_1.png"), picture(tmp_path / "c" / "1.png")
    with pytest.raises(UserError, match=r"1 of 2 hazy images have no clear image, first .*2_1.png: looked in .*c for 2_1 or 2 with"):
        find_pairs(tmp_path / "h", tmp_path / "c")
    with pytest.raises(UserError, match=r"2 of 2 clear images have no depth map, first .*1_1.png: looked for 1_1.png in"):
        find_depth_scenes(tmp_path / "h", tmp_path / "c")
    (tmp_path / "e").mkdir()
    with pytest.raises(UserError, match=r"no pairs in .*e: looked for images such as 1400_1.png"):
        find_pairs(tmp_path / "e", tmp_path / "c")


def test_reside_clear_images_are_cropped_in_the_middle(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    Image.fromarray(frame).save(tmp_path / "1400.png")
    Image.fromarray(frame[10:470, 10:630]).save(tmp_path / "1400_1.png")
    read = Pair(tmp_path / "1400_1.png", tmp_path / "1400.png").read()
    np.testing.assert_array_equal(read["hazy"], read["clear"])
    picture(tmp_path / "other.png", (630, 470))
    with pytest.raises(UserError, match=r"1400_1.png is 620x460 and .*other.png is 630x470: sizes must be equal"):
        Pair(tmp_path / "1400_1.png", tmp_path / "other.png").read()


def test_nyu_frames_lose_their_border(tmp_path):
    picture(tmp_path / "c.png", (640, 480), value=0.5), picture(tmp_path / "d.png", (640, 480))
    read = DepthScene(tmp_path / "c.png", tmp_path / "d.png").read()
    assert read["clear"].shape == (460, 620, 3) and read["depth"].shape == (460, 620)
    picture(tmp_path / "e.png", (64, 48))
    with pytest.raises(UserError, match="sizes must be equal"):
        DepthScene(tmp_path / "c.png", tmp_path / "e.png").read()


# ---- pipeline


def pair_samples(tmp_path, count=5, size=(20, 16)):
    """Write and open pairs. A clear image is random and its hazy image is 1 - clear, so a batch shows whether both were cropped alike."""
    for i in range(count):
        clear = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3)) / 255
        write_image(tmp_path / "clear" / f"{i}.png", clear)
        write_image(tmp_path / "hazy" / f"{i}_1.png", 1 - clear)
    return find_dataset(tmp_path)


def small_config(**data):
    return Config(data=DataConfig(crop=8, threads=2, **data), optim=OptimConfig(batch=4))


def batches_of(samples, config, **options):
    return train_batches(samples, config.data, batch=config.optim.batch, seed=config.run.seed, **options)


def test_batches_are_aligned_crops_and_fixed_by_the_seed(tmp_path):
    samples, config = pair_samples(tmp_path), small_config()
    first, second = (batches_of(samples, config) for _ in range(2))
    for _ in range(3):
        batch, again = next(first), next(second)
        assert batch["hazy"].shape == (4, 8, 8, 3) and batch["hazy"].dtype == np.float32
        np.testing.assert_allclose(batch["hazy"], 1 - batch["clear"], atol=1e-6)
        np.testing.assert_array_equal(batch["clear"], again["clear"])
    other = dataclasses.replace(config, run=RunConfig(seed=1))
    assert not np.array_equal(next(batches_of(samples, other))["clear"], next(batches_of(samples, config))["clear"])


def test_a_run_goes_on_where_it_stood(tmp_path):
    samples, config = pair_samples(tmp_path), small_config()
    batches = batches_of(samples, config)
    next(batches), next(batches)
    expected = next(batches)
    for options in ({}, {"workers": 1}):
        resumed = batches_of(samples, small_config(**options), start=8)  # two batches of four
        np.testing.assert_array_equal(next(resumed)["clear"], expected["clear"])
    wider = dataclasses.replace(config, optim=OptimConfig(batch=2))  # the position is counted in images
    np.testing.assert_array_equal(next(batches_of(samples, wider, start=8))["clear"], expected["clear"][:2])


def test_processes_share_an_epoch_without_overlap(tmp_path):
    """Two processes read 14 images in total from a set of 7 one-valued images, and each epoch contains every image once."""
    for i in range(7):
        picture(tmp_path / "clear" / f"{i}.png", value=i / 10), picture(tmp_path / "hazy" / f"{i}.png", value=i / 10)
    config = dataclasses.replace(small_config(), optim=OptimConfig(batch=2), data=DataConfig(crop=4))
    parts = [batches_of(find_dataset(tmp_path), config, process_index=i, process_count=2) for i in range(2)]
    seen = [round(float(next(part)["clear"][0, 0, 0, 0]) * 10) for _ in range(7) for part in parts]
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7)) and seen[:7] != seen[7:]
    with pytest.raises(UserError, match=r"optim.batch \(=2\) must be a multiple of the number of processes \(4\)"):
        batches_of(find_dataset(tmp_path), config, process_count=4)


def test_processes_read_together_what_one_reads_alone(tmp_path):
    """Images, crops and rotations are the same, so a run can resume with another number of processes."""
    samples, config = pair_samples(tmp_path), small_config()
    alone = batches_of(samples, config)
    parts = [batches_of(samples, config, process_index=i, process_count=2) for i in range(2)]
    for _ in range(4):
        expected, dealt = next(alone)["clear"], [next(part)["clear"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(dealt), expected)


def test_cached_images_give_the_same_batches(tmp_path):
    samples = pair_samples(tmp_path)
    plain, cached = (batches_of(samples, small_config(cache=cache)) for cache in (False, True))
    for _ in range(5):
        first, second = next(plain), next(cached)
        np.testing.assert_array_equal(first["hazy"], second["hazy"])
    for sample in samples:
        sample.hazy.unlink()
    next(cached)  # no file is read any more
    # 5 pairs of 20x16 pixels at 3 bytes a pixel
    samples = pair_samples(tmp_path)
    assert cache_bytes(samples, DataConfig()) == 5 * 2 * 20 * 16 * 3
    with pytest.raises(UserError, match=r"data.cache needs about .* GB for 5 images in 1000000000 workers, but this machine has"):
        cache_bytes(samples, DataConfig(workers=10**9))


def test_haze_on_the_fly_is_new_in_each_epoch(tmp_path):
    """For one grey scene at depth 1 (or 254.5 / 255), the hazy value is A + (J - A) exp(-beta). It is new each time and within RESIDE's
    ranges of A and beta."""
    picture(tmp_path / "rgb" / "0.png", (12, 12), value=0.2)
    write_image(tmp_path / "depth" / "0.png", np.full((12, 12, 3), 1.0) - np.eye(12)[..., None] / 255)
    batches = batches_of(find_dataset(tmp_path), small_config())
    values = np.concatenate([next(batches)["hazy"][:, 0, 0, 0] for _ in range(5)])
    assert len(set(values.tolist())) > 12
    low, high = 0.7 + (0.2 - 0.7) * np.exp(-0.6), 1.0 + (0.2 - 1.0) * np.exp(-1.8)
    assert values.min() >= low - 0.01 and values.max() <= high + 0.01


def test_eval_images_are_the_same_at_every_call(tmp_path):
    picture(tmp_path / "rgb" / "0.png", (12, 12)), picture(tmp_path / "depth" / "0.png", (12, 12))
    a, b = (next(eval_images(find_dataset(tmp_path))) for _ in range(2))
    np.testing.assert_array_equal(a.hazy, b.hazy)
    assert a.name == "0" and not np.array_equal(a.hazy, a.clear)


def test_holdout_keeps_all_versions_of_a_scene_together(tmp_path):
    for scene in range(4):
        picture(tmp_path / "clear" / f"{scene}.png")
        for version in range(3):
            picture(tmp_path / "hazy" / f"{scene}_{version}.png")
    data = DataConfig(train=str(tmp_path), holdout=1)
    train, held, _ = split_samples(data)
    assert len(train) == 9 and {pair.clear.name for pair in held} == {"3.png"} and len(held) == 3
    with pytest.raises(UserError, match=r"data.holdout \(=4\) must be less than the 4 clear images"):
        split_samples(dataclasses.replace(data, holdout=4))


def test_an_image_smaller_than_a_crop_is_named(tmp_path):
    samples = pair_samples(tmp_path)
    with pytest.raises(UserError, match=r"0_1.png is 20x16, smaller than a crop: data.crop \(=17\) must be at most 16"):
        batches_of(samples, dataclasses.replace(small_config(), data=DataConfig(crop=17)))
    picture(tmp_path / "clear" / "9.png", (6, 6)), picture(tmp_path / "hazy" / "9_1.png", (6, 6))
    with pytest.raises(UserError, match=r"9_1.png is 6x6, smaller than a crop"):
        batches = batches_of(find_dataset(tmp_path), small_config())
        for _ in range(4):
            next(batches)


def test_a_damaged_training_file_stops_the_batches(tmp_path):
    samples = pair_samples(tmp_path)
    samples[2].hazy.write_bytes(samples[2].hazy.read_bytes()[:200])
    with pytest.raises(UserError, match=r"2_1\.png"):
        batches = batches_of(samples, small_config())
        for _ in range(4):
            next(batches)


def test_list_images_ignores_the_rest(tmp_path):
    (
        picture(tmp_path / "b.png"),
        picture(tmp_path / "a.JPEG"),
        (tmp_path / "notes.txt").write_text(""),
        (tmp_path / "._b.png").write_text(""),
    )
    assert [p.name for p in list_images(tmp_path)] == ["a.JPEG", "b.png"]
