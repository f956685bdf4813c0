"""The shipped models: their cards are complete and agree with the files, they load by name, and the narrow one has its scores."""

import re

import numpy as np
import pytest
from PIL import Image
from test_commands import fails
from test_data import SHARED, needs_shared, picture

import aecr_jax
from aecr_jax.__main__ import main
from aecr_jax.data.folders import find_dataset
from aecr_jax.data.images import read_image
from aecr_jax.data.reader import eval_images
from aecr_jax.data.samples import DrawnScene
from aecr_jax.data.scenes import render_scene
from aecr_jax.inference.evaluate import score_images
from aecr_jax.inference.models import read_card
from aecr_jax.inference.restore import Restorer
from aecr_jax.inference.weights import DEFAULT_MODEL, SHIPPED, load_checkpoint, load_with_info, shipped_names
from aecr_jax.networks.arrays import count_parameters

FOLDERS = sorted(path for path in SHIPPED.iterdir() if path.is_dir())
each_model = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


def scores(samples, count, model):
    return [score for score, _, _ in score_images(Restorer(load_checkpoint(model)), eval_images(samples, limit=count))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "psnr", "ssim"),
    [
        ("aecr_net_tiny", [20.9336, 18.6832, 16.4216, 18.0624], [0.8398, 0.7785, 0.6133, 0.8465]),
        ("indoor", [19.2691, 20.9342, 17.4535, 19.6697], [0.7824, 0.9071, 0.7892, 0.8590]),
        ("photo", [19.6283, 22.4833, 20.2829, 18.7983], [0.7926, 0.9409, 0.7815, 0.8884]),
    ],
)
def test_score_on_embedded_scenes(model, psnr, ssim):
    """The scores were measured when the models were shipped; rounding on other platforms changes them by less than 0.01 dB."""
    # Of the 20 test scenes of `scenes`, four evenly spaced ones are evaluated; only these are drawn here, at 320x240.
    drawn = {i: DrawnScene(f"scene1-{i:04d}", *render_scene((1, i), 240, 320)) for i in (0, 5, 10, 15)}
    found = scores([drawn[i - i % 5] for i in range(20)], 4, model)
    np.testing.assert_allclose([score.hazy["psnr"] for score in found], [12.0155, 13.0001, 13.6923, 13.6736], atol=0.01)
    np.testing.assert_allclose([score.restored["psnr"] for score in found], psnr, atol=0.02)
    np.testing.assert_allclose([score.restored["ssim"] for score in found], ssim, atol=0.001)


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(
    ("model", "data", "wanted"),
    [
        ("aecr_net_tiny", "sots_indoor_subset", {"1400_1": 27.830, "1400_10": 23.514, "1435_1": 30.623}),
        ("indoor", "sots_indoor_subset", {"1400_1": 32.721, "1400_10": 25.759, "1435_1": 36.679}),
        ("photo", "sots_indoor_subset", {"1400_1": 32.114, "1400_10": 23.878, "1435_1": 35.132}),
        ("photo", "sots_outdoor_subset", {"0108_0.8_0.16": 29.668, "0380_0.85_0.2": 29.948}),
    ],
)
def test_score_on_sots(model, data, wanted):
    """A few images have the scores of the card's full evaluation."""
    pairs = [pair for pair in find_dataset(SHARED / data) if pair.name in wanted]
    found = {score.image: score.restored["psnr"] for score in scores(pairs, len(pairs), model)}
    assert found == pytest.approx(wanted, abs=0.02)


@needs_shared
def test_photo_returns_clear_pictures():
    """It is trained on clear pictures as well; the card says that all ten of this folder come back at 32 dB or better."""
    for path in sorted((SHARED / "sots_indoor_subset/clear").glob("*.png"))[:3]:
        clear = read_image(path)
        assert np.mean((aecr_jax.dehaze(clear, "photo") - clear) ** 2) < 10**-3.2


# ---- cards


@each_model
def test_a_folder_has_a_loadable_model_and_a_card(folder):
    """The files of a model have at most 4 MB together, so that the package stays small, and the links of its card exist."""
    card = (folder / "README.md").read_text()
    assert {file.name for file in folder.iterdir()} >= {"README.md", "config.json", "model.safetensors"}
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4e6
    assert all((folder / link).is_file() for link in re.findall(r"\]\(([^):#]+)\)", card))
    model, config = load_with_info(folder)
    assert len(config["sha256"]) == 64  # loading has verified it
    assert model.name == folder.name
    assert f"\n# Model card: {folder.name}\n" in card


@each_model
def test_a_card_describes_the_model_in_its_folder(folder):
    card, model = read_card(folder), load_checkpoint(folder)
    assert (card.network, card.parameters) == (model.config.NAME, count_parameters(model))
    assert card.steps == model.step
    assert f"{card.parameters:,} parameters" in (folder / "README.md").read_text()


@each_model
def test_the_values_of_a_card_have_the_right_types(folder):
    card = read_card(folder)
    assert (card.license, card.library_name, card.pipeline_tag) == ("apache-2.0", "aecr-jax", "image-to-image")
    for text in (card.purpose, card.data, *card.tags, *card.datasets):
        assert isinstance(text, str) and text and "\n" not in text
    assert card.minutes > 0 and card.seeds and all(isinstance(seed, int) for seed in card.seeds)
    assert card.revision and all(re.fullmatch("[0-9a-f]{7,40}", revision) for revision in card.revision)
    assert set(card.scores) == {"sots_indoor", "sots_outdoor"}
    for score in card.scores.values():
        assert set(score) == {"psnr", "ssim", "input_psnr", "input_ssim", "images"}
        assert isinstance(score["images"], int) and all(isinstance(number, int | float) for number in score.values())
        assert 5 < score["input_psnr"] < score["psnr"] < 50 and 0 < score["ssim"] < 1 and 1 <= score["images"] <= 500


@each_model
def test_a_card_shows_a_failure_among_the_limits(folder):
    card = (folder / "README.md").read_text()
    _, limits = card.split("\n## Limits\n")
    pictures = re.findall(r"!\[[^]]+\]\((\w+\.(?:jpg|png))\)", limits.split("\n## ")[0])
    assert pictures
    for name in pictures:
        Image.open(folder / name).verify()


def test_the_card_of_the_narrow_model_has_the_figures_of_its_config():
    card = read_card(SHIPPED / "aecr_net_tiny")
    model, config = load_with_info("aecr_net_tiny")
    about = config["about"]
    assert card.scores["sots_indoor"] == about["sots_indoor_10_scenes"] | {"images": 100}
    assert card.steps == sum(about["steps"]) and card.minutes == sum(about["minutes"])
    assert (card.seeds, card.revision) == (about["seed"], about["revision"])
    assert model.config.width == 24


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# No block\n", "must begin with a YAML block"),
        ("---\nlicense: mit\n", "must begin with a YAML block"),
        (
            "---\nlicense: mit\ncolour: red\n---\n",
            r"has missing or unknown keys: colour, data, .*; it must have data, ",
        ),
    ],
)
def test_an_incomplete_card_is_refused(tmp_path, text, message):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_card(tmp_path)


# ---- names


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_default_is_one_of_the_shipped_models():
    assert shipped_names() == [folder.name for folder in FOLDERS]
    assert DEFAULT_MODEL in FOLDERS
    assert load_checkpoint().name == DEFAULT_MODEL.name


def test_a_folder_comes_before_a_shipped_model_of_its_name(empty, model_dir):
    shipped = load_checkpoint("aecr_net_tiny")
    assert (shipped.name, shipped.config.width) == ("aecr_net_tiny", 24)
    (empty / "aecr_net_tiny").symlink_to(model_dir)
    assert load_checkpoint("aecr_net_tiny").config.width == 2


@pytest.mark.parametrize("name", ["aecr_net_tinny", "./aecr_net_tiny", "aecr_net_tiny/", "../pretrained/aecr_net_tiny", "README.md"])
def test_an_unknown_name_lists_the_shipped_models(empty, name):
    """Only the bare name of a model is one; anything with a separator is a path."""
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint folder .*; the shipped models are .*aecr_net_tiny"):
        load_checkpoint(name)


def test_commands_take_the_name_of_a_shipped_model(empty, capsys):
    image = picture(empty / "a.png", (20, 12))
    assert main(["dehaze", str(image), "--model", "aecr_net_tiny", "--output", "clean"]) == 0
    assert "model: aecr_net_tiny, shipped with the package" in capsys.readouterr().out
    expected = aecr_jax.dehaze(read_image(image), "aecr_net_tiny")
    np.testing.assert_allclose(read_image(empty / "clean/a.png"), expected, atol=0.51 / 255)
    assert main(["eval", "--model", "aecr_net_tiny", "--data", "scenes:1:40x32"]) == 0
    assert main(["compare", str(image), "--models", "dcp,aecr_net_tiny", "--output", "sheet.png"]) == 0
    assert "the shipped models are" in fails(capsys, "dehaze", image, "--model", "tiny", "--output", "other")
    said = fails(capsys, "dehaze", image, "--model", "aecr_net_tiny", "--checkpoint", "dcp", "--output", "other")
    assert "--model/--checkpoint is given twice" in said


def test_models_lists_the_shipped_models(capsys):
    """The values of the narrow model are those of its card."""
    assert main(["models"]) == 0
    head, *rows, _ = capsys.readouterr().out.splitlines()
    assert re.split("  +", head) == ["name", "network", "parameters", "MB", "SOTS indoor", "SOTS outdoor", "purpose"]
    cells = {row[0].removesuffix(" (default)"): row for row in (re.split("  +", row) for row in rows)}
    assert list(cells) == shipped_names()
    assert [row[0] for row in cells.values() if row[0].endswith(" (default)")] == [f"{DEFAULT_MODEL.name} (default)"]
    assert cells["aecr_net_tiny"][1:6] == ["aecr_net", "387,129", "1.6", "26.03 / 0.9246 (100)", "22.33 / 0.8514 (25)"]
