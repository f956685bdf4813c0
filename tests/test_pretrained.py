"""The shipped model has the scores and the size that its card states."""

import re

import numpy as np
import pytest
from test_data import SHARED, needs_shared

from aecr_jax.data.folders import find_dataset
from aecr_jax.data.reader import eval_images
from aecr_jax.data.samples import DrawnScene
from aecr_jax.data.scenes import render_scene
from aecr_jax.inference.evaluate import score_images
from aecr_jax.inference.restore import Restorer
from aecr_jax.inference.weights import DEFAULT_MODEL, load_checkpoint, load_with_info
from aecr_jax.networks.arrays import count_parameters

CARD = (DEFAULT_MODEL / "README.md").read_text()


def scores(samples, count):
    return [score for score, _, _ in score_images(Restorer(load_checkpoint()), eval_images(samples, limit=count))]


def test_score_on_embedded_scenes():
    """The scores were measured when the model was shipped; rounding on other platforms changes them by less than 0.01 dB."""
    # Of the 20 test scenes of `scenes`, four evenly spaced ones are evaluated; only these are drawn here, at 320x240.
    drawn = {i: DrawnScene(f"scene1-{i:04d}", *render_scene((1, i), 240, 320)) for i in (0, 5, 10, 15)}
    found = scores([drawn[i - i % 5] for i in range(20)], 4)
    np.testing.assert_allclose([score.input_psnr for score in found], [12.0155, 13.0001, 13.6923, 13.6736], atol=0.01)
    np.testing.assert_allclose([score.psnr for score in found], [20.9336, 18.6832, 16.4216, 18.0624], atol=0.02)
    np.testing.assert_allclose([score.ssim for score in found], [0.8398, 0.7785, 0.6133, 0.8465], atol=0.001)


@needs_shared
def test_score_on_sots():
    """Three images of two scenes, with thin and thick haze, have the scores of the card's full evaluation."""
    wanted = {"1400_1": 27.830, "1400_10": 23.514, "1435_1": 30.623}
    pairs = [pair for pair in find_dataset(SHARED / "sots_indoor_subset") if pair.name in wanted]
    found = {score.image: score.psnr for score in scores(pairs, len(pairs))}
    assert found == pytest.approx(wanted, abs=0.02)


def test_the_card_tells_the_model():
    """The card states the number of parameters and the score that are in the files."""
    model, config = load_with_info(DEFAULT_MODEL)
    about = config["about"]
    assert count_parameters(model) == about["parameters"]
    assert f"{about['parameters']:,} parameters" in CARD
    assert CARD.startswith(f"# Model card: {about['name']}\n")
    score = about["sots_indoor_10_scenes"]
    assert model.step == sum(about["steps"]) and f"| steps in total | {model.step:,} |" in CARD
    assert f"**{score['psnr']:.2f} dB**" in CARD and f"{score['ssim']:.4f}" in CARD
    assert sum(file.stat().st_size for file in DEFAULT_MODEL.iterdir()) < 11e6
    assert all((DEFAULT_MODEL / link).is_file() for link in re.findall(r"\]\(([^):#]+)\)", CARD))
    assert model.config.width == 24
    assert len(config["sha256"]) == 64  # loading has verified it
