"""Videos: what is kept of a clip, what is refused, and the average of the estimated haze over time."""

import os
import sys
import tomllib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from test_commands import fails
from test_data import picture

from aecr_jax import load_checkpoint
from aecr_jax.__main__ import main
from aecr_jax.data.haze import add_haze
from aecr_jax.data.scenes import render_scene
from aecr_jax.errors import UserError
from aecr_jax.inference import video
from aecr_jax.inference.smooth import CUT, SmoothRestorer, colour_histogram, histogram_distance
from aecr_jax.networks.aecr_net import AECRNet, AECRNetConfig
from aecr_jax.networks.coarse_net import CoarseNet, CoarseNetConfig

try:
    import av
except ImportError:
    av = None
needs_av = pytest.mark.skipif(av is None, reason="needs the extra video")

RATE = 25


def flat(height, width, colour=(200, 100, 50)):
    return np.broadcast_to(np.uint8(colour), (height, width, 3))


def write_clip(
    path, frames, *, codec="libx264", pixels="yuv420p", times=None, sound="", sound_begins=0, rotation=None, aspect=None, colours=()
):
    """Write frames (uint8 `[H, W, 3]`) at 25 per second, or at `times` in units of 1/90000 s, and two seconds of quiet noise as `sound`."""
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}) as clip:
        stream = clip.add_stream(codec, rate=Fraction(RATE), width=width, height=height, time_base=Fraction(1, 90000))
        stream.pix_fmt = pixels
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in dict(colours).items():
            setattr(stream.codec_context, name, value)
        audio = clip.add_stream(sound, rate=16000, bit_rate=32000) if sound else None
        if audio:
            audio.codec_context.layout = "mono"
            noise = (np.random.default_rng(0).normal(size=(1, 32000)) / 100).astype(np.float32)
            block = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
            block.sample_rate, block.pts = 16000, 16000 * sound_begins
            for part in av.AudioResampler(format=audio.codec_context.format, layout="mono", rate=16000).resample(block):
                clip.mux(audio.encode(part))
        tags = dict(colours)
        for i, values in enumerate(frames):
            options = {"dst_colorspace": tags.get("colorspace", 5), "dst_color_range": tags.get("color_range", 1)}
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(values), format="rgb24").reformat(format=pixels, **options)
            frame.pts, frame.time_base = times[i] if times else i * 90000 // RATE, Fraction(1, 90000)
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode(None))
        if audio:
            clip.mux(audio.encode(None))
    return path


def read_clip(path):
    """Return the frames as arrays and what describes a clip."""
    with av.open(str(path)) as clip:
        stream = clip.streams.video[0]
        about = {"aspect": stream.sample_aspect_ratio, "title": clip.metadata.get("title"), "codec": stream.codec_context.name}
        frames = list(clip.decode(stream))
        about["times"] = [frame.pts * frame.time_base for frame in frames]
        first = frames[0]
        about["rotation"] = first.rotation
        about["colours"] = (first.colorspace, first.color_range, first.color_trc, first.color_primaries)
        about["format"] = first.format.name
        matrix = {1: 1}.get(first.colorspace, 5)
        arrays = [frame.reformat(format="rgb24", src_colorspace=matrix).to_ndarray() for frame in frames]
    with av.open(str(path)) as clip:
        about["sound"] = [(p.pts * p.time_base, bytes(p)) for p in clip.demux(audio=0) if p.dts is not None] if clip.streams.audio else []
    return arrays, about


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs `dehaze` with a stand-in for the network, which darkens frames to half; `seen` holds its inputs."""
    seen = []

    def restore(hazy, seconds):
        seen.append((hazy, seconds))
        return hazy / 2

    monkeypatch.setattr(video, "load_checkpoint", lambda model: AECRNet(AECRNetConfig(width=2, blocks=1), rngs=nnx.Rngs(0)))
    monkeypatch.setattr(video, "_make_restore", lambda *arguments: restore)

    def run(*arguments):
        return main(["dehaze", *map(str, arguments)])

    run.seen = seen
    return run


def test_the_stated_package_is_that_of_the_extra():
    root = Path(__file__).parents[1]
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["video"]
    assert set(extra) <= set((root / "requirements-test.txt").read_text().splitlines())


# ---- what is kept


@needs_av
def test_times_sound_rotation_aspect_and_colour_tags_are_kept(run, tmp_path):
    """A clip of variable frame rate. Expected: every value as in the source, sound packets byte for byte, and colours at half."""
    times = [0, 3600, 9000, 10800, 45000, 90000]
    colours = {"colorspace": 1, "color_range": 2, "color_primaries": 1, "color_trc": 1}
    source = write_clip(
        tmp_path / "a.mp4", [flat(48, 64)] * 6, times=times, sound="aac", rotation=90, aspect=Fraction(4, 3), colours=colours
    )
    assert run(source, "--output", tmp_path / "new" / "b.mp4") == 0
    before, after = read_clip(source)[1], read_clip(tmp_path / "new" / "b.mp4")[1]
    assert after["times"] == [Fraction(time, 90000) for time in times] and len(before["sound"]) > 20
    assert after["rotation"] == 90 and after["aspect"] == Fraction(4, 3) and after["colours"] == (1, 2, 1, 1)
    assert after == before
    restored = read_clip(tmp_path / "new" / "b.mp4")[0]
    np.testing.assert_allclose(restored[3], flat(48, 64, (100, 50, 25)), atol=3)
    assert os.listdir(tmp_path / "new") == ["b.mp4"]
    np.testing.assert_allclose([seconds for _, seconds in run.seen], np.diff([0, *times]) / 90000)


@needs_av
def test_the_network_sees_upright_frames_in_true_colours(run, tmp_path):
    """The left half of the stored frames is red. Players turn the frames by 90 degrees counterclockwise: then the lower half is red."""
    frame = np.concatenate([flat(48, 32, (220, 30, 30)), flat(48, 32, (30, 30, 220))], 1)
    assert run(write_clip(tmp_path / "a.mp4", [frame] * 3, rotation=90), "--output", tmp_path / "b.mkv") == 0
    hazy = run.seen[0][0] * 255
    assert hazy.shape == (64, 48, 3)
    np.testing.assert_allclose(hazy[48:, 4:-4], np.broadcast_to([220, 30, 30], (16, 40, 3)), atol=6)
    np.testing.assert_allclose(hazy[:16, 4:-4], np.broadcast_to([30, 30, 220], (16, 40, 3)), atol=6)
    restored, about = read_clip(tmp_path / "b.mkv")
    assert about["rotation"] == 90 and restored[0].shape == (48, 64, 3)
    np.testing.assert_allclose(restored[0][4:-4, :16], np.broadcast_to([110, 15, 15], (40, 16, 3)), atol=6)


@needs_av
def test_odd_sizes_and_other_codecs(run, tmp_path):
    """H.264 with 4:2:0 sampling has even sides, so the last column and row are repeated. The source is RGB, compressed without loss."""
    frame = np.random.default_rng(0).integers(0, 256, (1, 1, 3)).astype(np.uint8).repeat(25, 0).repeat(33, 1)
    assert run(write_clip(tmp_path / "a.mkv", [frame] * 2, codec="ffv1", pixels="bgr0"), "--output", tmp_path / "b.mp4") == 0
    np.testing.assert_allclose(run.seen[0][0] * 255, frame, atol=0.01)
    restored, about = read_clip(tmp_path / "b.mp4")
    assert restored[0].shape == (26, 34, 3) and about["format"] == "yuv420p" and about["codec"] == "h264"
    np.testing.assert_allclose(restored[0], np.broadcast_to(frame[0, 0] / 2, (26, 34, 3)), atol=4)


@needs_av
def test_quality_changes_the_size(run, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    source = write_clip(tmp_path / "a.mp4", list(noise))
    sizes = []
    for quality in (90, 66, 10):
        assert run(source, "--output", tmp_path / f"{quality}.mp4", "--quality", quality) == 0
        sizes.append((tmp_path / f"{quality}.mp4").stat().st_size)
    assert run(source, "--output", tmp_path / "default.mp4") == 0
    assert sizes[0] > sizes[1] > sizes[2] and (tmp_path / "default.mp4").stat().st_size == sizes[1]


@needs_av
def test_frames_are_streamed(run, tmp_path, monkeypatch):
    """Few frames are decoded ahead of the one that is restored: those that the decoder's threads hold."""
    monkeypatch.setattr(os, "process_cpu_count", lambda: 2, raising=False)
    decoded, ahead = [0], []
    original = video._decode

    def decode(packet):
        frames = original(packet)
        decoded[0] += len(frames or ())
        ahead.append(decoded[0] - len(run.seen))
        return frames

    monkeypatch.setattr(video, "_decode", decode)
    assert run(write_clip(tmp_path / "a.mp4", [flat(16, 16)] * 200), "--output", tmp_path / "b.mp4") == 0
    assert len(run.seen) == 200 and max(ahead[:200]) <= 8


# ---- what is refused


@needs_av
def test_files_that_are_no_whole_video(run, tmp_path, capsys):
    good = write_clip(tmp_path / "good.mp4", [flat(48, 64) + np.uint8(i) for i in range(75)])
    (tmp_path / "text.mp4").write_text("no video")
    noise = np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3)).astype(np.uint8)
    whole = write_clip(tmp_path / "noise.mp4", list(noise)).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    with av.open(str(tmp_path / "sound.mp4"), "w") as clip:
        audio = clip.add_stream("aac", rate=16000)
        block = av.AudioFrame.from_ndarray(np.zeros((2, 16000), np.float32), format="fltp", layout="stereo")
        block.sample_rate = 16000
        clip.mux([*audio.encode(block), *audio.encode(None)])
    output = tmp_path / "out" / "b.mp4"
    for name, message in (
        ("text.mp4", "cannot be read: Invalid data found"),
        ("none.mp4", "there is no file"),
        ("half.mp4", "is truncated: it ends after"),
        ("sound.mp4", "has no video stream"),
    ):
        assert message in fails(capsys, "dehaze", tmp_path / name, "--output", output)
        assert not output.parent.exists()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails(capsys, "dehaze", good, "--output", tmp_path / "file" / "b.mp4")
    assert not run.seen


@needs_av
def test_high_dynamic_range_is_refused(run, tmp_path, capsys):
    source = write_clip(tmp_path / "a.mkv", [flat(48, 64)] * 2, colours={"colorspace": 9, "color_primaries": 9, "color_trc": 16})
    assert "has high dynamic range (PQ)" in fails(capsys, "dehaze", source, "--output", tmp_path / "b.mp4")


@needs_av
def test_sound_that_ffmpeg_does_not_know_is_left_out(run, tmp_path, capsys):
    """In Matroska, the codec is named by a string; a name that is no codec's has no decoder."""
    source = write_clip(tmp_path / "a.mkv", [flat(48, 64)] * 5, sound="flac")
    source.write_bytes(source.read_bytes().replace(b"A_FLAC", b"A_XLAC"))
    assert run(source, "--output", tmp_path / "o.mkv") == 0
    assert f"not copied from {source}: 1 audio stream(s)" in capsys.readouterr().out
    assert read_clip(tmp_path / "o.mkv")[1]["sound"] == []


@needs_av
def test_sound_that_the_container_cannot_hold(run, tmp_path, capsys):
    source = write_clip(tmp_path / "a.mkv", [flat(48, 64)] * 50, sound="pcm_u8")
    assert "cannot hold the sound" in fails(capsys, "dehaze", source, "--output", tmp_path / "b.mp4")
    assert os.listdir(tmp_path) == ["a.mkv"]
    assert run(source, "--output", tmp_path / "b.mkv") == 0
    sound = read_clip(tmp_path / "b.mkv")[1]["sound"]
    assert sound == read_clip(source)[1]["sound"] and sum(len(data) for _, data in sound) == 32000


@needs_av
def test_sound_that_is_found_not_to_fit_when_writing_begins(run, tmp_path, capsys):
    source = write_clip(tmp_path / "a.mkv", [flat(48, 64)] * 5, sound="flac")
    assert "cannot hold the sound" in fails(capsys, "dehaze", source, "--output", tmp_path / "b.mov")
    assert os.listdir(tmp_path) == ["a.mkv"] and not run.seen


@needs_av
@pytest.mark.parametrize("extension", [".mp4", ".mkv"])
@pytest.mark.parametrize("source", ["a.ts", "a.mkv"])
def test_a_video_that_begins_late_begins_at_0_in_the_result(run, tmp_path, source, extension):
    """A recording of television is such a video. Frames and sound move by the same time; 2 s were written, and AAC begins 0.064 s early."""
    times = [3600 * 90000 + i * 3600 for i in range(50)]
    late = write_clip(tmp_path / source, [flat(48, 64)] * 50, times=times, sound="aac", sound_begins=3600)
    assert run(late, "--output", tmp_path / f"b{extension}") == 0
    before, after = read_clip(late)[1], read_clip(tmp_path / f"b{extension}")[1]
    assert before["times"][0] > 3599 and len(after["times"]) == 50 and len(after["sound"]) == len(before["sound"]) > 20
    shifts = np.subtract(np.float64(before["times"]), np.float64(after["times"]))
    of_sound = [float(early - late) for (early, _), (late, _) in zip(before["sound"], after["sound"])]
    np.testing.assert_allclose([*shifts, *of_sound], 3600 if source == "a.mkv" else float(before["sound"][0][0]), atol=0.002)
    with av.open(str(tmp_path / f"b{extension}")) as clip:
        assert clip.duration / av.time_base == pytest.approx(2, abs=0.15)
    assert run(tmp_path / f"b{extension}", "--output", tmp_path / "again.mkv") == 0


@needs_av
def test_times_that_jump_back_are_refused(run, tmp_path, capsys):
    """Two recordings that were joined with `cat` have such times."""
    one = write_clip(tmp_path / "one.ts", [flat(48, 64)] * 30)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(one.read_bytes() * 2)
    message = fails(capsys, "dehaze", joined, "--output", tmp_path / "b.mp4")
    assert "has times that jump back from" in message and "ffmpeg -i joined.ts -c copy" in message and not run.seen


@needs_av
def test_damaged_frames_are_reported_and_the_others_are_restored(run, tmp_path, capsys, monkeypatch):
    source = write_clip(tmp_path / "a.mp4", [flat(48, 64)] * 10)
    original, count = video._decode, []

    def decode(packet):
        count.append(packet)
        return None if len(count) == 6 else original(packet)  # the first packet is decoded twice

    monkeypatch.setattr(video, "_decode", decode)
    assert run(source, "--output", tmp_path / "b.mp4") == 2
    assert "1 of its packets could not be decoded" in capsys.readouterr().err
    assert len(read_clip(tmp_path / "b.mp4")[0]) == 9


@needs_av
def test_a_run_that_fails_writes_nothing(run, tmp_path, capsys, monkeypatch):
    source = write_clip(tmp_path / "a.mp4", [flat(48, 64)] * 5)

    def restore(hazy, seconds):
        run.seen.append(hazy)
        if len(run.seen) == 3:
            raise UserError("the restored image has values that are not finite")
        return hazy

    monkeypatch.setattr(video, "_make_restore", lambda *arguments: restore)
    assert "not finite" in fails(capsys, "dehaze", source, "--output", tmp_path / "b.mp4")
    assert os.listdir(tmp_path) == ["a.mp4"]


@needs_av
def test_existing_outputs(run, tmp_path, capsys):
    source = write_clip(tmp_path / "a.mp4", [flat(48, 64)] * 2)
    (tmp_path / "b.mp4").write_text("mine")
    assert "already exists" in fails(capsys, "dehaze", source, "--output", tmp_path / "b.mp4")
    assert "is the input and would be replaced" in fails(capsys, "dehaze", source, "--output", source, "--overwrite")
    assert run(source, "--output", tmp_path / "b.mp4", "--skip-existing") == 0
    assert (tmp_path / "b.mp4").read_text() == "mine" and not run.seen
    assert run(source, "--output", tmp_path / "b.mp4", "--overwrite") == 0
    assert len(read_clip(tmp_path / "b.mp4")[0]) == 2


def test_options_and_inputs_that_do_not_go_together(tmp_path, capsys):
    clip, photo = tmp_path / "a.mp4", picture(tmp_path / "a.jpg", (16, 12))
    clip.write_text("")
    out = tmp_path / "b.mp4"
    for arguments, message in (
        ([clip, photo, "--output", out], "a video must be the only input, and there are 2"),
        ([clip, "--output", out, "--recursive"], "--recursive is for images"),
        ([clip, "--output", out, "--suffix=-x"], "--suffix is for images"),
        ([clip, "--output", out, "--format", "jpg"], "--format is for images"),
        ([clip, "--output", out, "--bits", "8"], "--bits is for images"),
        ([clip, "--output", tmp_path / "out"], "must be a file with one of the extensions .mp4"),
        ([clip, "--output", tmp_path / "b.webm"], "must be a file with one of the extensions .mp4"),
        ([clip, "--output", out, "--smoothing", "-1"], "smoothing (=-1.0) must be from 0 to 60 seconds"),
        ([clip, "--output", out, "--smoothing", "nan"], "smoothing (=nan)"),
        ([clip, "--output", out, "--quality", "0"], "quality (=0) must be from 1 to 100"),
        ([clip, "--output", out, "--strength", "2"], "strength (=2.0)"),
        ([photo, "--output", out], "names a video, but"),
        ([photo, "--output", tmp_path / "out", "--smoothing", "1"], "--smoothing is for videos"),
    ):
        assert message in fails(capsys, "dehaze", *arguments)
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "a.mp4"]


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_text("")
    assert 'run `pip install ".[video]"`' in fails(capsys, "dehaze", tmp_path / "a.mp4", "--output", tmp_path / "b.mp4")


# ---- the average over time


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
