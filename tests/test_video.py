"""Videos: what is kept of a clip, and what is refused."""

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

from aecr_jax.__main__ import main
from aecr_jax.errors import UserError
from aecr_jax.inference import video
from aecr_jax.networks.aecr_net import AECRNet, AECRNetConfig

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
    """Recordings of television are such videos. Frames and sound are shifted by the same time.

    The clip has 2 s, and AAC begins 0.064 s before it.
    """
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
