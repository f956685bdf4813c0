"""The average of the estimated haze over time, by which restored videos flicker less."""

import numpy as np
import pytest
from flax import nnx

from aecr_jax import load_checkpoint
from aecr_jax.data.haze import add_haze
from aecr_jax.data.scenes import render_scene
from aecr_jax.inference import video
from aecr_jax.inference.smooth import CUT, SmoothRestorer, colour_histogram, histogram_distance
from aecr_jax.networks.aecr_net import AECRNet, AECRNetConfig
from aecr_jax.networks.coarse_net import CoarseNet, CoarseNetConfig

RATE = 25


@pytest.mark.slow
def test_maps_are_averaged_and_begin_anew_at_a_cut():
    """Expected: K and B of each frame with the weights of an exponential average, applied to the last frame."""
    model = CoarseNet(CoarseNetConfig(width=4, blocks=1), rngs=nnx.Rngs(0))
    model.eval()
    rng = np.random.default_rng(0)
    scene = rng.random((32, 40, 3)).astype(np.float32) / 2
    frames = [(scene + 0.02 * rng.random(scene.shape)).astype(np.float32) for _ in range(3)]
    smooth = SmoothRestorer(model, 0.5)
    restored = [smooth.restore_next(frame, seconds) for frame, seconds in zip(frames, (0.0, 0.1, 0.3))]
    maps = [model.estimate_haze(frame[None]) for frame in frames]
    a, b = np.exp(-0.1 / 0.5), np.exp(-0.3 / 0.5)
    averages = [b * (a * x + (1 - a) * y) + (1 - b) * z for x, y, z in zip(*maps)]
    np.testing.assert_allclose(restored[0], model(frames[0][None])[0].clip(0, 1), atol=1e-6)
    np.testing.assert_allclose(restored[2], model.remove_haze(frames[2][None], *averages)[0].clip(0, 1), atol=1e-6)
    other = 1 - scene
    np.testing.assert_allclose(smooth.restore_next(other, 0.04), model(other[None])[0].clip(0, 1), atol=1e-6)


def test_networks_that_are_suited():
    assert SmoothRestorer.is_suited(CoarseNet(CoarseNetConfig(width=4, blocks=1), rngs=nnx.Rngs(0)))
    for output in ("residual", "affine"):  # without maps; with maps for each pixel
        assert not SmoothRestorer.is_suited(AECRNet(AECRNetConfig(width=2, blocks=1, output=output), rngs=nnx.Rngs(0)))


def test_other_networks_restore_each_frame_by_itself(capsys):
    model = AECRNet(AECRNetConfig(width=2, blocks=1), rngs=nnx.Rngs(0))
    model.name = "small"
    restore = video._make_restore(model, 0, 0.0, 0.5, "a.mp4")
    assert "small does not estimate the haze of whole images: each frame is restored by itself" in capsys.readouterr().out
    hazy = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    np.testing.assert_array_equal(restore(hazy, 0.0), hazy)  # the strength is 0


def test_the_distance_of_histograms():
    """Expected: 0 for the same colours in other places, 1 for black and white, and 15 levels x 1/255 for a fog that brightens by 1/255."""
    x = np.random.default_rng(0).random((64, 64, 3)).astype(np.float32)
    assert histogram_distance(colour_histogram(x), colour_histogram(x[::-1])) == pytest.approx(0, abs=1e-9)
    black, white = (colour_histogram(np.full((70, 90, 3), value, np.float32)) for value in (0, 1))
    assert histogram_distance(black, white) == pytest.approx(1)
    fog, brighter = (colour_histogram(np.full((70, 90, 3), value / 255, np.float32)) for value in (170, 171))
    assert histogram_distance(fog, brighter) == pytest.approx(15 / 255, abs=1e-4)


def still_clip(count, height=96, width=128, seed=3):
    """Return hazy frames of a scene that stands still, with haze that drifts and noise of a camera, and the clear scene."""
    clear, depth = render_scene(seed, height, width)
    rng = np.random.default_rng(seed)
    x = np.linspace(0, 2 * np.pi, width)
    frames = []
    for i in range(count):
        drift = 1 + 0.2 * np.sin(x - 2 * np.pi * i / RATE / 8)  # a wave that passes in eight seconds
        hazy = add_haze(clear, depth * drift.astype(np.float32), 0.85, 1.2)
        frames.append(np.clip(hazy + rng.normal(0, 0.03, hazy.shape), 0, 1).astype(np.float32))
    return frames, [clear] * count


def moving_clip(count, height=96, width=128, seed=3, speed=2):
    """Return hazy frames of a camera that pans over a wide scene by `speed` pixels per frame, with noise, and the clear frames."""
    clear, depth = render_scene(seed, height, width + speed * (count - 1))
    rng = np.random.default_rng(seed)
    hazy = add_haze(clear, depth, 0.85, 1.2)
    parts = [np.s_[:, speed * i : speed * i + width] for i in range(count)]
    return [np.clip(hazy[p] + rng.normal(0, 0.03, hazy[p].shape), 0, 1).astype(np.float32) for p in parts], [clear[p] for p in parts]


def restore_clip(model, frames, smoothing):
    restore = video._make_restore(model, 0, 1.0, smoothing, "clip")
    return np.stack([restore(frame, 1 / RATE) for frame in frames])


def flicker(frames):
    """Return the mean absolute change from one frame to the next, in units of 1/255, of averages over 8x8 pixels."""
    n, h, w, _ = np.shape(frames)
    cells = np.reshape(frames, (n, h // 8, 8, w // 8, 8, 3)).mean((2, 4))
    return 255 * float(np.abs(np.diff(cells, axis=0)).mean())


def psnr(restored, clear):
    return float(np.mean([-10 * np.log10(((x - y) ** 2).mean()) for x, y in zip(restored, clear)]))


@pytest.mark.slow
def test_smoothing_reduces_flicker_and_lags_little_behind_a_pan():
    """With `photo`. Expected: the purpose of the average, and at most the loss that docs/dehazing.md states for the worst of its clips."""
    model = load_checkpoint("photo")
    frames, _ = still_clip(8)
    assert flicker(restore_clip(model, frames, video.SMOOTHING)) < 0.8 * flicker(restore_clip(model, frames, 0.0))
    frames, clear = moving_clip(8)
    assert psnr(restore_clip(model, frames, video.SMOOTHING), clear) > psnr(restore_clip(model, frames, 0.0), clear) - 0.55


@pytest.mark.slow
def test_the_numbers_of_the_document(capsys):
    """Clips of a second at 160x120, of six scenes. Run with -s, it prints the table of docs/dehazing.md."""
    model = load_checkpoint("photo")
    scores = {name: [] for name in ("hazy", 0.0, 0.1, 0.25, 0.5, 1.0)}
    for seed in range(6):
        still, still_clear = still_clip(25, 120, 160, seed)
        moving, moving_clear = moving_clip(25, 120, 160, seed)
        for length, rows in scores.items():
            a, b = (still, moving) if length == "hazy" else (restore_clip(model, frames, length) for frames in (still, moving))
            rows.append([flicker(a), psnr(a, still_clear), psnr(b, moving_clear)])
    with capsys.disabled():
        for length, rows in scores.items():
            change = np.array(rows)[:, 2] - np.array(scores[0.0] or rows)[:, 2]
            means = " | ".join(f"{x:.2f}" for x in np.mean(rows, 0))
            print(f"| {length} | {means} | {change.min():+.2f} to {change.max():+.2f} |")
    assert np.mean(scores[video.SMOOTHING], 0)[0] < 0.8 * np.mean(scores[0.0], 0)[0]


def test_a_pan_is_no_cut_and_another_scene_is():
    """Of six drawn scenes with haze, each differs from each other one by more than `CUT`, and consecutive frames by less."""
    for frames in (still_clip(4)[0], moving_clip(4, speed=6)[0]):
        histograms = [colour_histogram(frame) for frame in frames]
        assert max(map(histogram_distance, histograms, histograms[1:])) < CUT
    scenes = [colour_histogram(still_clip(1, seed=seed)[0][0]) for seed in range(6)]
    assert min(histogram_distance(a, b) for i, a in enumerate(scenes) for b in scenes[:i]) > CUT
