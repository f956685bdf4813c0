"""Haze made for training: its settings, outdoor photographs without depth, mixed data, and crops of whole frames."""

import dataclasses
import json
import pickle
import zlib

import numpy as np
import pytest
from test_commands import fails
from test_data import picture

from aecr_jax.__main__ import main
from aecr_jax.data.fingerprint import fingerprint
from aecr_jax.data.haze import HazeConfig
from aecr_jax.data.images import to_float
from aecr_jax.data.pipeline import Augment, cache_bytes, train_batches
from aecr_jax.data.reader import Source, eval_images
from aecr_jax.data.samples import ClearImage, DrawnScene, OutdoorImage
from aecr_jax.data.sources import DataConfig, open_samples, split_samples
from aecr_jax.errors import UserError
from aecr_jax.training.config import Config, override
from aecr_jax.training.help import settings_help

# Settings under which haze follows the scattering model exactly, apart from the rounding to 8 bits.
EXACT = HazeConfig(cast=0.1, uneven=0.4, clear=0.2, darken=0.5, resize=0.5, foreign_depth=0.5, outdoor_near=0.5, outdoor_beta=(0.04, 0.6))
DATA = DataConfig(crop=16, threads=1)


def scene(i, size=(24, 32)):
    clear = np.random.default_rng(i).integers(0, 256, (*size, 3)).astype(np.float32) / 255
    return DrawnScene(f"s{i}", clear, np.linspace(0.1, 1, size[0] * size[1], dtype=np.float32).reshape(size))


SCENES = [scene(i) for i in range(3)]


def crops_of(samples, haze, count=100, data=DATA):
    """Return crops as `train_batches` makes them, stacked; the seed of each is its position."""
    source = Source(samples, least=data.crop_size, cache=True)
    augment = Augment(data, haze, source=source, haze_truth=True)
    crops = [augment.random_map(source[i % len(samples)], np.random.default_rng(i)) for i in range(count)]
    return {key: np.stack([crop[key] for crop in crops]) for key in crops[0]}


def batch_of(samples, haze, seed=0, data=DATA):
    return next(train_batches(samples, data, batch=12, seed=seed, haze=haze))


# ---- defaults


def test_the_defaults_make_the_haze_that_was_made_before_there_were_settings():
    """Expected: sums of 8-bit values, indices and airlights, and checksums of haze from the code before the settings were added."""
    batches = train_batches(SCENES, DATA, batch=4, seed=5, haze_truth=True)
    sums = [[132138, 118843, 120655, 117049], [152687, 123906, 123606, 116316]]
    airlights = [[0.9555320143699646, 0.9852057695388794, 0.8150714039802551, 0.759009599685669], None]
    for expected, airlight, index, checksum in zip(sums, airlights, [[0, 2, 1, 0], [2, 1, 0, 1]], [492178017, 3042195336]):
        batch = next(batches)
        pixels = np.round(batch["hazy"] * 255).astype(np.uint8)
        assert pixels.astype(int).sum((1, 2, 3)).tolist() == expected
        assert batch["index"].tolist() == index
        assert airlight is None or batch["airlight"][:, 0, 0, 0].tolist() == airlight
        assert zlib.crc32(pixels.tobytes()) == checksum
    assert [int(np.round(image.hazy * 255).sum()) for image in eval_images(SCENES, seed=2)] == [361990, 448076, 441592]


def test_evaluation_under_other_haze(model_dir, tmp_path, capsys):
    """Expected: where depth is 1, thick haze has the colour of the airlight; `clear` and `reside` are ignored."""
    haze = HazeConfig(airlight=(0.5, 0.5), beta=(10, 10), clear=1, reside=1)
    for image, scene in zip(eval_images(SCENES, haze=haze), SCENES):
        np.testing.assert_allclose(image.hazy[scene.depth == 1], 0.5, atol=0.003)
        np.testing.assert_array_equal(image.clear, to_float(scene.clear))
    dark = next(eval_images(SCENES, haze=HazeConfig(darken=1))).clear
    assert dark.mean() < to_float(SCENES[0].clear).mean()
    config = tmp_path / "config.py"
    config.write_text(
        "from aecr_jax import Config\nfrom aecr_jax.data.haze import HazeConfig\nconfig = Config(haze=HazeConfig(beta=(0, 0)))\n"
    )
    command = ["eval", "--model", str(model_dir), "--data", "scenes:2:32x24", "--output", str(tmp_path / "out")]
    assert main([*command, "--haze", str(config)]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["input_psnr"] > 50 and summary["haze"]["beta"] == [0, 0]  # no haze: only rounding remains
    assert "there is no config file none.py" in fails(capsys, *command, "--haze", "none.py")
    picture(tmp_path / "clear" / "a.png", (32, 24))
    for data in (f"clear={tmp_path / 'clear'}", f"constant:{tmp_path / 'clear'}"):  # which would ignore the settings
        said = fails(capsys, "eval", "--model", model_dir, "--data", data, "--haze", config)
        assert "--haze is for clear images with depth and for outdoor photographs" in said


# ---- outdoor photographs


def test_outdoor_photographs(landscape):
    samples, name = open_samples(f"outdoor:{landscape}")
    assert name == f"outdoor:{landscape}" and samples == [OutdoorImage(landscape / f"{i}.png") for i in range(2)]
    assert samples[0].kind == "outdoor" and samples[0].name == samples[0].scene == "0" and set(samples[0].files) == {"clear"}
    assert pickle.loads(pickle.dumps(samples)) == samples
    batch = crops_of(samples, HazeConfig())
    assert batch["airlight"].min() >= 0.8 - 1e-6  # RESIDE's outdoor ranges; depth is between 1.95 and 4.5
    assert np.exp(-0.2 * 4.5) - 1e-3 < batch["transmission"].min() < 0.6
    assert 0.8 < batch["transmission"].max() < np.exp(-0.04 * 1.95) + 1e-3
    first, second = (list(eval_images(samples)) for _ in range(2))
    np.testing.assert_array_equal(first[1].hazy, second[1].hazy)
    assert first[1].hazy.shape == (60, 80, 3) and not np.array_equal(first[1].hazy, first[1].clear)
    assert str(fingerprint(samples)) != str(fingerprint(open_samples(f"constant:{landscape}")[0]))


def test_check_data_takes_outdoor_photographs_and_mixed_data(landscape, tmp_path, capsys):
    for i in range(2):
        picture(tmp_path / "rgb" / f"{i}.png", (40, 30), seed=i), picture(tmp_path / "depth" / f"{i}.png", (40, 30), seed=i + 5)
    spec = f"{tmp_path} + 2*outdoor:{landscape}"
    assert main(["check-data", "--data", spec, "--output", str(tmp_path / "sheet.png")]) == 0
    said = capsys.readouterr().out
    assert "train (depth): 2 images of 2 scenes" in said and "train (outdoor): 2 images of 2 scenes" in said
    assert (tmp_path / "sheet.png").exists()


# ---- settings


def test_haze_follows_the_scattering_model_with_all_settings_that_keep_it(landscape):
    """Expected: I = J t + A (1 - t) to half a step of 8 bits."""
    batch = crops_of([*SCENES, *open_samples(f"outdoor:{landscape}")[0]], EXACT)
    t = batch["transmission"]
    np.testing.assert_allclose(batch["hazy"], batch["clear"] * t + batch["airlight"] * (1 - t), atol=0.5 / 255 + 1e-5)
    assert 0 < t.min() < t.max() == 1


def test_haze_may_begin_behind_a_clear_foreground(landscape):
    """Expected: by default, depth begins at 1.95, and t is at most exp(-0.2 * 1.95) = 0.68; begun at 0, t is nearly 1 there."""
    samples, _ = open_samples(f"outdoor:{landscape}")
    greatest = [crops_of(samples, HazeConfig(outdoor_beta=(0.2, 0.2), outdoor_near=p))["transmission"].max((1, 2, 3)) for p in (0, 1, 0.5)]
    assert greatest[0].max() < 0.68 and greatest[1].max() > 0.9
    assert (greatest[2] > 0.68).mean() == pytest.approx((greatest[1] > 0.68).mean() / 2, abs=0.12)


def test_a_cast_colours_the_airlight():
    batch = crops_of(SCENES, HazeConfig(cast=0.1, airlight=(0.8, 0.8)))
    deviation = batch["airlight"] - 0.8
    assert np.abs(deviation).max() == pytest.approx(0.1, abs=0.01) and deviation.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.2)


def test_uneven_airlight_is_darker_in_some_parts():
    """Expected: in every crop, brightest as drawn, and darkest by a share that is uniform in [0, 0.6], mean 0.3."""
    batch = crops_of(SCENES, HazeConfig(uneven=0.6, airlight=(0.9, 0.9)), 300)
    assert batch["airlight"].shape == batch["clear"].shape
    np.testing.assert_allclose(batch["airlight"].max((1, 2, 3)), 0.9, rtol=1e-6)
    share = 1 - batch["airlight"].min((1, 2, 3)) / 0.9
    assert share.mean() == pytest.approx(0.3, abs=0.03) and 0.55 < share.max() <= 0.6
    assert np.abs(np.diff(batch["airlight"], axis=1)).max() < 0.25  # smooth, though the crops have only 16 rows


def test_clear_crops_keep_their_values():
    batch = crops_of(SCENES, HazeConfig(clear=1.0))
    np.testing.assert_array_equal(np.round(batch["hazy"] * 255), np.round(batch["clear"] * 255))
    np.testing.assert_array_equal(batch["transmission"], 1)
    share = (crops_of(SCENES, HazeConfig(clear=0.3), 300)["transmission"].min((1, 2, 3)) == 1).mean()
    assert share == pytest.approx(0.3, abs=0.1)


def test_a_darkened_scene_is_also_the_target():
    """Expected: the clear crop to a power from 1 to 2. What is drawn before is the same, so the crop is the same without darkening."""
    darker, plain = (crops_of(SCENES, HazeConfig(darken=p))["clear"] for p in (1.0, 0.0))
    between = (plain > 0.1) & (plain < 0.9)
    power = np.log(darker[between]) / np.log(plain[between])
    assert 1 - 1e-4 <= power.min() < 1.2 and 1.8 < power.max() <= 2 + 1e-4


def test_noise_and_jpeg_degrade_only_the_hazy_image():
    """Expected: noise whose standard deviation is uniform in [0, 0.1], mean 0.05; JPEG changes values by a few steps of 8 bits."""
    smooth = DrawnScene("grey", np.full((40, 40, 3), 0.5, np.float32), np.ones((40, 40), np.float32))
    batch = crops_of([smooth], HazeConfig(noise=0.1, clear=1.0))
    assert (batch["hazy"] - 0.5).std((1, 2, 3)).mean() == pytest.approx(0.05, abs=0.01)
    np.testing.assert_array_equal(batch["clear"], 0.5)
    batch = crops_of(SCENES, HazeConfig(jpeg=1.0))
    t = batch["transmission"]
    error = batch["hazy"] - (batch["clear"] * t + batch["airlight"] * (1 - t))
    assert 2 / 255 < np.abs(error).mean() < 0.15
    steps = batch["hazy"] * 255
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)


def test_rescaled_scenes_fit_the_crop_and_keep_their_values():
    """A ramp across the image has a slope of 1/64 a pixel, and by a factor f one of 1 / (64 f). For the height of 20, f is at least 0.8."""
    ramp = np.broadcast_to((np.arange(64, dtype=np.float32) / 64)[None, :, None], (20, 64, 3)).copy()
    sample = DrawnScene("ramp", ramp, np.ones((20, 64), np.float32))
    data = dataclasses.replace(DATA, crop_width=16)
    clear = crops_of([sample], HazeConfig(resize=1.0), data=data)["clear"]
    assert clear.shape == (100, 16, 16, 3)
    factor = 1 / (64 * np.abs(np.diff(clear[:, :, 4:12, 0], axis=2)).mean((1, 2)))
    assert 0.78 < factor.min() < 0.85 and 1.4 < factor.max() < 1.55
    pixels = np.round(ramp * 255).astype(np.uint8)
    sample = DrawnScene("ramp", pixels, np.ones((20, 64), np.float32))
    clear = crops_of([sample], HazeConfig(resize=1.0), data=data)["clear"]
    assert clear.dtype == np.float32 and 0 <= clear.min() < clear.max() <= 1


def test_a_scene_may_take_the_depth_of_another():
    """Two scenes of constant depth 0.5 and 1; the transmission shows whose depth was used."""
    clear = np.random.default_rng(0).random((30, 30, 3)).astype(np.float32)
    scenes = [DrawnScene(f"{d}", clear, np.full((30, 30), d, np.float32)) for d in (0.5, 1.0)]
    for probability, expected in ((0.0, 0.0), (1.0, 1.0), (0.5, 0.5)):
        haze = HazeConfig(beta=(1.0, 1.0), foreign_depth=probability)
        batch = crops_of(scenes, haze)
        own = np.array([0.5, 1.0])[batch["index"]]
        foreign = np.abs(batch["transmission"][:, 0, 0, 0] - np.exp(-own)) > 0.1
        assert foreign.mean() == pytest.approx(expected, abs=0.15 if probability == 0.5 else 0)


def test_a_share_of_the_crops_gets_resides_haze(landscape):
    """Expected: half of the crops with RESIDE's grey airlight from 0.7 (outdoors 0.8) and beta, and half with none of it."""
    other = HazeConfig(cast=0.1, uneven=0.4, clear=1.0, darken=1.0, noise=0.1, jpeg=1.0, resize=1.0, foreign_depth=1.0, reside=0.5)
    for samples, least in ((SCENES, 0.7), (open_samples(f"outdoor:{landscape}")[0], 0.8)):
        batch = crops_of(samples, other, 300)
        reside = batch["transmission"].min((1, 2, 3)) < 1
        assert reside.mean() == pytest.approx(0.5, abs=0.1)
        airlight, t = batch["airlight"][reside], batch["transmission"][reside]
        assert airlight.min() >= least and np.ptp(airlight, axis=(1, 2, 3)).max() == 0
        exact = batch["clear"][reside] * t + airlight * (1 - t)
        assert np.abs(batch["hazy"][reside] - exact).max() < 0.51 / 255


def test_the_seed_determines_everything(landscape):
    samples = [*SCENES, *open_samples(f"outdoor:{landscape}")[0]]
    haze = dataclasses.replace(EXACT, noise=0.05, jpeg=0.5)
    first, again, workers = (
        batch_of(samples, haze, data=dataclasses.replace(DATA, **changes)) for changes in ({}, {"cache": True}, {"workers": 1})
    )
    for other in (again, workers):
        np.testing.assert_array_equal(first["hazy"], other["hazy"])
        np.testing.assert_array_equal(first["clear"], other["clear"])
    assert not np.array_equal(first["hazy"], batch_of(samples, haze, seed=1)["hazy"])


def test_constant_haze_and_pairs_are_left_as_they_are(landscape):
    strong = HazeConfig(cast=0.1, clear=1.0, darken=1.0, noise=0.2, jpeg=1.0, resize=1.0)
    for spec in (f"constant:{landscape}", f"clear={landscape}"):
        samples, _ = open_samples(spec)
        plain, other = (batch_of(samples, haze) for haze in (HazeConfig(), strong))
        np.testing.assert_array_equal(plain["hazy"], other["hazy"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--haze.beta", "1.8,0.6"], r"^haze.beta \(=1.8,0.6\) must have its lower end first: 0.6,1.8$"),
        (["--haze.airlight", "0.7,1.2"], r"^haze.airlight \(=\(0.7, 1.2\)\) must be at most 1$"),
        (["--haze.beta", "0.6"], r"^haze.beta \(='0.6'\) must be 2 values with commas between them, each a finite number$"),
        (["--haze.beta", "a,b"], r"^haze.beta \(='a,b'\) must be 2 values with commas"),
        (["--haze.outdoor_beta", "0,inf"], r"haze.outdoor_beta .* must be \(a finite number, a finite number\)"),
        (["--haze.clear", "1.5"], r"^haze.clear \(=1.5\) must be at most 1$"),
        (["--haze.jpeg", "-0.1"], r"^haze.jpeg \(=-0.1\) must be at least 0$"),
        (["--haze.betta", "1"], r"unknown setting --haze.betta; nearest: .*--haze.beta"),
        (["--data.crop_width", "3"], r"^data.crop_width \(=3\) must be 0 or at least 4$"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        override(Config(), arguments)


def test_ranges_on_the_command_line():
    config = override(Config(), ["--haze.beta", "0.2,2", "--haze.cast=0.1"])
    assert config.haze == HazeConfig(beta=(0.2, 2.0), cast=0.1)
    assert "--haze.beta FLOAT,FLOAT  (default 0.6,1.8)" in settings_help()


# ---- mixed data


def test_mixed_data_are_a_list(landscape, tmp_path):
    spec = f"constant:{landscape}+2*outdoor:{landscape}".replace("+", " + ")
    samples, name = open_samples(spec)
    photographs = [OutdoorImage(landscape / f"{i}.png") for i in range(2)]
    assert samples == [ClearImage(landscape / f"{i}.png") for i in range(2)] + 2 * photographs and name == spec
    assert len(open_samples("3*scenes:2:24x16")[0]) == 6
    split = split_samples(DataConfig(train=spec, holdout=1))
    assert split.train == [ClearImage(landscape / "0.png"), photographs[0], photographs[0]]
    assert split.evaluation == [ClearImage(landscape / "1.png"), photographs[1]]
    assert split.evaluated_on == f"the last 1 scenes of constant:{landscape} and of outdoor:{landscape}"
    for side in ("hazy", "clear"):
        picture(tmp_path / "a + b" / side / "0.png")
    assert len(open_samples(str(tmp_path / "a + b"))[0]) == 1  # a folder may have such a name


def test_images_that_are_repeated_are_kept_once(landscape):
    samples, _ = open_samples(f"constant:{landscape} + 2*outdoor:{landscape}")
    source = Source(samples, cache=True)
    elements = [source[i] for i in range(6)]
    assert [int(element["index"]) for element in elements] == list(range(6))
    assert elements[2]["clear"] is elements[4]["clear"] and elements[3]["sky"] is elements[5]["sky"]
    # 4 different samples of 80x60 pixels with 3 bytes, two of them with a sky map of the same size
    assert cache_bytes(samples, DATA) == 4 * 80 * 60 * 3 + 2 * 80 * 60


def test_the_fingerprint_counts_repetitions_and_drawn_scenes(landscape):
    def description(spec):
        return str(fingerprint(open_samples(spec)[0]))

    once = description(f"outdoor:{landscape} + scenes:2:24x16")
    assert once == description(f"outdoor:{landscape} + scenes:2:24x16")
    others = (f"outdoor:{landscape} + 2*scenes:2:24x16", f"outdoor:{landscape} + scenes:2:32x16", f"outdoor:{landscape}")
    assert len({once, *map(description, others)}) == 4


def test_wrong_mixed_data_name_the_part(landscape, capsys):
    said = fails(capsys, "check-data", "--data", f"outdoor:{landscape} + nowhere")
    assert "part nowhere of the mixed data: there is no folder nowhere" in said
    with pytest.raises(FileNotFoundError):
        open_samples(f"outdoor:{landscape} + nowhere")
    with pytest.raises(UserError, match=r"0\*scenes:2:24x16 in data must be repeated at least once"):
        open_samples(f"outdoor:{landscape} + 0*scenes:2:24x16")
    with pytest.raises(UserError, match=r"part outdoor:none of the mixed data: there is no folder none"):
        split_samples(DataConfig(train="scenes:2:24x16 + outdoor:none"))


# ---- crops of whole frames


def test_wide_crops_are_flipped_and_not_turned():
    """Expected: every crop of the whole frame is the frame itself or its mirror image, and both occur."""
    clear = SCENES[0].clear
    batch = crops_of(SCENES[:1], HazeConfig(), data=DataConfig(crop=24, crop_width=32))
    kinds = {
        "frame" if np.array_equal(crop, clear) else "mirror" if np.array_equal(crop, clear[:, ::-1]) else "other" for crop in batch["clear"]
    }
    assert batch["clear"].shape == (100, 24, 32, 3) and kinds == {"frame", "mirror"}


def test_an_image_narrower_than_a_wide_crop_is_named():
    with pytest.raises(
        UserError, match=r"s0 is 32x24, smaller than a crop: data.crop \(=16\) must be at most 24, and data.crop_width \(=40\) at"
    ):
        batch_of(SCENES, HazeConfig(), data=DataConfig(crop=16, crop_width=40, threads=1))


# ---- other haze for the same scene


def misfit(clear, hazy, transmission):
    """Return the largest difference of `hazy` from J t + A (1 - t) for the best airlight A and the best power t of `transmission`."""

    def residual(power):
        t = transmission**power
        airlight = ((hazy - clear * t) * (1 - t)).sum() / (3 * ((1 - t) ** 2).sum())
        return np.abs(hazy - clear * t - airlight * (1 - t)).max()

    best = min(np.geomspace(1e-3, 1e3, 500), key=residual)
    for spread in (0.03, 0.002):
        best = min(np.linspace(1 - spread, 1 + spread, 61) * best, key=residual)
    return residual(best)


@pytest.mark.parametrize("kind", ["depth", "outdoor", "constant"])
def test_the_same_scene_under_other_haze(kind, landscape):
    """Each image follows the scattering model with the clear crop and its depth, to half a step of 8 bits, as -log t = beta d is a multiple
    of that of the hazy image. Everything else in the batch is as without it."""
    samples = SCENES if kind == "depth" else open_samples(f"{kind}:{landscape}")[0]
    plain, more = (next(train_batches(samples, DATA, batch=3, seed=4, haze_truth=True, rehazed=n)) for n in (0, 2))
    for key, value in plain.items():
        np.testing.assert_array_equal(more[key], value, err_msg=key)
    rehazed = more["rehazed"]
    assert rehazed.shape == (3, 2, 16, 16, 3) and rehazed.dtype == np.float32
    for i in range(3):
        clear, hazy, transmission = (more[key][i].astype(np.float64) for key in ("clear", "hazy", "transmission"))
        others = [*rehazed[i].astype(np.float64), hazy]
        assert max(misfit(clear, other, transmission) for other in others) < 0.6 / 255
        assert min(np.abs(a - b).mean() for a in others for b in others if a is not b) > 1 / 255


def test_a_crop_without_haze_has_hazy_versions():
    """The settings of the haze apply to them too, except `clear`, which would make the clear image its own negative."""
    augment = Augment(DATA, HazeConfig(clear=1.0, airlight=(0.9, 0.9), beta=(1.5, 1.5)), rehazed=1)
    crop = augment.random_map(Source([scene(0)])[0], np.random.default_rng(0))
    np.testing.assert_allclose(crop["hazy"], crop["clear"], atol=1e-6)
    assert np.abs(crop["rehazed"][0] - crop["clear"]).mean() > 0.1
