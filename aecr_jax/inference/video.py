"""Dehazing of videos with PyAV: frames are streamed, sound is copied, and times, rotation and colour tags are kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from aecr_jax.data.images import to_float
from aecr_jax.errors import UserError
from aecr_jax.files import refuse_existing, replaces, replacing
from aecr_jax.inference.photographs import Existing, complain, restore_any_size
from aecr_jax.inference.restore import USUAL_TILE, Restorer, blend, check_strength, check_tile
from aecr_jax.inference.smooth import SmoothRestorer
from aecr_jax.inference.weights import DEFAULT_MODEL, load_checkpoint
from aecr_jax.networks.network import Network

EXTENSIONS = frozenset(
    {".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"}
)
# The containers that are written, by the names that FFmpeg gives them.
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
# Longer averages hardly reduce the flicker further, and lag more behind a moving camera: see the table in docs/dehazing.md.
SMOOTHING, LONGEST_SMOOTHING = 0.1, 60.0
QUALITY = 66
_JUMP = 0.1  # seconds by which times may go back, because some files are slightly out of order

# Codes of ITU-T H.273, as FFmpeg numbers them: matrices, ranges, and the transfer functions of high dynamic range.
_BT709, _UNSPECIFIED, _BT601 = 1, 2, 6
_LIMITED, _FULL = 1, 2
_HIGH_RANGE = {16: "PQ", 18: "HLG"}
# The number by which PyAV names the conversion of each matrix.
_CONVERSIONS = {_BT709: 1, 4: 4, 5: 5, _BT601: 5, 7: 7, 9: 9}

Restore = Callable[[np.ndarray, float], np.ndarray]
"""Maps a frame `[H, W, 3]` in [0, 1] and the seconds since the frame before to the restored frame."""


def is_video(path: str | Path) -> bool:
    """Return whether a file is a video, by the extension of its name."""
    return Path(path).suffix.lower() in EXTENSIONS


def dehaze_video(
    source: str | Path,
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    tile: int = USUAL_TILE,
    strength: float = 1.0,
    smoothing: float = SMOOTHING,
    existing: Existing = "refuse",
    quality: int = QUALITY,
) -> bool:
    """Write the restored version of a video, in H.264 with 8 bits, with the sound of the source.

    The memory needed does not depend on the length of the video. A frame that cannot be decoded is left out and reported.

    Args:
      source: a video file in any format that FFmpeg decodes, without high dynamic range.
      output: the file to write; its extension, a key of `CONTAINERS`, selects the container.
      checkpoint: a name or path that `load_checkpoint` accepts; the default model by default.
      tile: as for `dehaze_files`.
      strength: as for `dehaze_files`.
      smoothing: time constant in seconds of the average of the estimated haze (see `SmoothRestorer`); 0 restores each frame by itself,
        as do networks for which `SmoothRestorer.is_suited` is false.
      existing: what to do if `output` exists: "refuse" or "overwrite" it, or "skip" the video.
      quality: from 1 to 100; x264's constant rate factor is 1 + (100 - quality) / 2.

    Returns:
      True if every frame was restored, or the output exists and was kept.

    Raises:
      UserError: PyAV is missing, a setting is out of range, the source cannot be read or ends early, the output cannot be written or
        would replace the source or an existing file, or a result is not finite.
    """
    check_tile(tile)
    check_strength(strength)
    if not 0 <= smoothing <= LONGEST_SMOOTHING:
        raise UserError(f"smoothing (={smoothing}) must be from 0 to {LONGEST_SMOOTHING:g} seconds")
    if not 1 <= quality <= 100:
        raise UserError(f"quality (={quality}) must be from 1 to 100")
    if Path(output).suffix.lower() not in CONTAINERS:
        raise UserError(f"--output (={output}) must be a file with one of the extensions {', '.join(CONTAINERS)}")
    if not os.path.exists(source):
        raise UserError(f"there is no file {source}")
    if replaces(output, source):
        raise UserError(f"{output} is the input and would be replaced: choose another --output")
    if existing == "skip" and os.path.lexists(output):
        print(f"{output} exists, so {source} was skipped")
        return True
    refuse_existing(output, overwrite=existing == "overwrite")
    _require_av()
    about = _examine(Path(source))
    model = load_checkpoint(DEFAULT_MODEL if checkpoint is None else checkpoint)
    print(f"model: {model.name}")
    if about.left_out:
        print(f"not copied from {source}: {about.left_out}")
    restore = _make_restore(model, tile, strength, smoothing, str(source))
    with replacing(output) as partial:
        written, damaged = _transcode(Path(source), partial, Path(output), about, restore, 1 + (100 - quality) / 2)
        if not written:
            raise UserError(f"{source} has no frame that can be decoded")
    print(f"{written} frames written to {output}")
    if damaged:
        complain(f"{source} is damaged: {damaged} of its packets could not be decoded, and their frames are missing in {output}")
    return not damaged


def _make_restore(model: Network, tile: int, strength: float, smoothing: float, name: str) -> Restore:
    if smoothing and SmoothRestorer.is_suited(model):
        smooth = SmoothRestorer(model, smoothing)

        def restore(hazy: np.ndarray, seconds: float) -> np.ndarray:
            return blend(hazy, smooth.restore_next(hazy, seconds), strength)

        return restore
    if smoothing:
        print(f"{model.name} does not estimate the haze of whole images: each frame is restored by itself, without smoothing")
    restorer = Restorer(model)
    return lambda hazy, seconds: blend(hazy, restore_any_size(restorer, hazy, tile, name), strength)


def _require_av() -> None:
    try:
        import av as av
    except ImportError as error:
        raise UserError(f'videos need PyAV ({error}): run `pip install ".[video]"`') from error


@dataclass(frozen=True)
class _Source:
    """What the first pass over a video finds."""

    packets: int
    """Number of packets of the video stream; nearly always the number of frames."""
    first: Any
    """The first frame that could be decoded, an `av.VideoFrame`."""
    left_out: str
    """The streams that are not copied."""


def _examine(source: Path) -> _Source:
    """Read a whole video without decoding more than its first frame, so that a truncated one is reported before hours of work.

    Raises:
      UserError: the file cannot be read, has no video stream or no frame, ends early, has times that jump back, or has high dynamic range.
    """
    import av

    packets, first, end = 0, None, 0.0
    with _open(source) as clip:
        video = _video_stream(clip, source)
        kept = {video.index, *(stream.index for stream in _sound(clip))}
        last: dict[int, float] = {}
        for packet in _reading(clip.demux(), source):
            if packet.stream_index in kept and packet.dts is not None:
                time = float(packet.dts * packet.time_base)
                if time < last.get(packet.stream_index, time) - _JUMP:
                    raise UserError(
                        f"{source} has times that jump back from {last[packet.stream_index]:.1f} to {time:.1f} seconds, as after joining"
                        f" files: give it new times with another program, as with `ffmpeg -i {source.name} -c copy whole.mkv`"
                    )
                last[packet.stream_index] = time
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == video.index:
                packets += packet.size > 0
                if first is None:
                    first = next(iter(_decode(packet) or ()), None)
        # Matroska counts the duration from 0, other containers from the first packet.
        start = 0 if "matroska" in clip.format.name else clip.start_time or 0
        announced = 0 if clip.duration is None else (clip.duration + start) / av.time_base
        if end < announced - 0.5 - 0.01 * announced:
            raise UserError(
                f"{source} is truncated: it ends after {end:.1f} of {announced:.1f} seconds; make a video of what is left with another"
                f" program, as with `ffmpeg -i {source.name} -c copy whole{source.suffix}`"
            )
        other = [stream.type for stream in clip.streams if stream.index not in kept]
    if first is None:
        raise UserError(f"{source} has no frame that can be decoded")
    if first.color_trc in _HIGH_RANGE:
        raise UserError(
            f"{source} has high dynamic range ({_HIGH_RANGE[first.color_trc]}), which is not supported: convert it to BT.709 first"
        )
    return _Source(packets, first, ", ".join(f"{other.count(kind)} {kind} stream(s)" for kind in sorted(set(other))))


def _transcode(source: Path, partial: Path, output: Path, about: _Source, restore: Restore, crf: float) -> tuple[int, int]:
    """Write the restored video to `partial`, and return the numbers of written frames and of packets that could not be decoded."""
    import av

    container = CONTAINERS[output.suffix.lower()]
    fast = {} if container == "matroska" else {"movflags": "faststart"}  # the index comes first, so that browsers can begin to play
    written = damaged = 0
    last = None
    with _open(source) as clip, _writing(output), av.open(os.path.abspath(partial), "w", format=container, options=fast) as result:
        video = _video_stream(clip, source)
        video.thread_type = "AUTO"
        encoder = _add_encoder(result, video, about.first, crf)
        sound = _sound(clip)
        copies = {stream.index: _add_copy(result, stream, output) for stream in sound}
        result.metadata.update(clip.metadata)
        try:
            result.start_encoding()
        except av.FFmpegError as error:
            if not copies or container == "matroska":
                raise
            raise UserError(_cannot_hold_sound(output, error)) from error
        # A recording of television may begin at any time, and the result begins at 0. Sound that begins before 0 stays there.
        start = Fraction(max(0, clip.start_time or 0), av.time_base)
        offsets = {stream.index: round(start / stream.time_base) for stream in (video, *sound)}
        step = max(1, round(1 / (video.guessed_rate * video.time_base))) if video.guessed_rate else 1
        with tqdm(total=about.packets, desc="dehazing", unit="frame", disable=None) as bar:
            for packet in _reading(clip.demux(video, *sound), source):
                if packet.stream_index in copies:
                    if packet.dts is not None:  # the last one of each stream is empty
                        packet.dts -= offsets[packet.stream_index]
                        packet.pts = None if packet.pts is None else packet.pts - offsets[packet.stream_index]
                        packet.stream = copies[packet.stream_index]
                        result.mux(packet)
                    continue
                frames = _decode(packet)
                damaged += frames is None
                for frame in frames or ():
                    _check_size(frame, about.first, source)
                    # Some containers have no times, or repeat one; an encoder needs times that increase.
                    time = frame.pts - offsets[video.index] if frame.pts is not None else 0 if last is None else last + step
                    time = time if last is None else max(time, last + 1)
                    seconds = 0.0 if last is None else float((time - last) * video.time_base)
                    restored = _to_frame(restore(_to_image(frame, about.first), seconds), about.first)
                    restored.pts, restored.time_base, restored.duration = time, video.time_base, frame.duration
                    result.mux(encoder.encode(restored))
                    last = time
                    written += 1
                    bar.update()
            result.mux(encoder.encode(None))
    return written, damaged


def _add_encoder(result: Any, video: Any, first: Any, crf: float) -> Any:
    """Add an H.264 stream to the output with the rate, shape of pixels, colour tags and rotation of the source."""
    matrix, colour_range = _colours(first)
    encoder = result.add_stream(
        "libx264",
        rate=video.guessed_rate or Fraction(25),  # only for the control of the bit rate: the times are those of the frames
        options={"crf": f"{crf:g}"},
        width=first.width + first.width % 2,
        height=first.height + first.height % 2,
        time_base=video.time_base,
    )
    context = encoder.codec_context
    context.sample_aspect_ratio = video.sample_aspect_ratio or Fraction(0, 1)
    context.colorspace = _UNSPECIFIED if first.colorspace == _UNSPECIFIED and not _is_rgb(first) else matrix
    context.color_range, context.color_primaries, context.color_trc = colour_range, first.color_primaries, first.color_trc
    encoder.set_display_matrix(_display_matrix(first))
    encoder.metadata.update({key: value for key, value in video.metadata.items() if key == "language"})
    return encoder


def _sound(clip: Any) -> list[Any]:
    """Return the sound streams that can be copied: PyAV copies none that FFmpeg has no decoder for."""
    return [stream for stream in clip.streams.audio if stream.codec_context is not None]


def _add_copy(result: Any, stream: Any, output: Path) -> Any:
    """Add a stream for copied sound.

    Raises:
      UserError: the container cannot hold sound in this format.
    """
    try:
        copy = result.add_stream_from_template(stream)
    except ValueError as error:
        raise UserError(_cannot_hold_sound(output, error)) from error
    copy.metadata.update({key: value for key, value in stream.metadata.items() if key in ("language", "title")})
    return copy


def _cannot_hold_sound(output: Path, error: Exception) -> str:
    return f"{output} cannot hold the sound ({error}): choose an --output with the extension .mkv"


def _to_image(frame: Any, first: Any) -> np.ndarray:
    """Return a frame as an upright image `[H, W, 3]` in [0, 1], because networks are trained on upright ones."""
    matrix, colour_range = _colours(first)
    colours = {} if _is_rgb(frame) else {"src_colorspace": _CONVERSIONS[matrix], "src_color_range": colour_range}
    values = frame.reformat(format="rgb24", interpolation=_interpolation(), **colours).to_ndarray()
    return to_float(np.ascontiguousarray(np.rot90(values, _turns(first))))


def _to_frame(image: np.ndarray, first: Any) -> Any:
    """Return an upright image as a frame for the encoder: turned as `first`, with even sides, in YCbCr with 4:2:0 sampling."""
    import av

    matrix, colour_range = _colours(first)
    values = np.rot90(np.round(image.clip(0, 1) * 255).astype(np.uint8), -_turns(first))
    height, width = values.shape[:2]
    values = np.pad(values, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # 4:2:0 sampling needs even sides
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(values), format="rgb24")
    return rgb.reformat(format="yuv420p", dst_colorspace=_CONVERSIONS[matrix], dst_color_range=colour_range, interpolation=_interpolation())


def _interpolation() -> Any:
    from av.video.reformatter import Interpolation

    return Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


def _turns(frame: Any) -> int:
    """Return by how many quarter turns, counterclockwise, players rotate a frame."""
    return round(frame.rotation / 90) % 4


def _colours(frame: Any) -> tuple[int, int]:
    """Return the matrix and the range of a frame's colours; if none is stated, those that players assume for its size."""
    matrix = frame.colorspace
    if matrix not in _CONVERSIONS or _is_rgb(frame):
        matrix = _BT709 if frame.height >= 720 else _BT601
    full = not _is_rgb(frame) and (frame.color_range == _FULL or frame.format.name.startswith("yuvj"))
    return matrix, _FULL if full else _LIMITED


def _is_rgb(frame: Any) -> bool:
    return bool(frame.format.is_rgb)


def _display_matrix(frame: Any) -> list[int] | None:
    from av.sidedata.sidedata import Type

    try:
        return np.frombuffer(frame.side_data[Type.DISPLAYMATRIX], np.int32).tolist()
    except KeyError:
        return None


def _check_size(frame: Any, first: Any, source: Path) -> None:
    if (frame.width, frame.height) != (first.width, first.height):
        raise UserError(
            f"{source} changes its size from {first.width}x{first.height} to {frame.width}x{frame.height} after {frame.time or 0:.1f}"
            " seconds, which is not supported: convert it to one size first"
        )


def _video_stream(clip: Any, source: Path) -> Any:
    import av

    pictures = av.stream.Disposition.attached_pic  # such as the cover of an album
    streams = [stream for stream in clip.streams.video if not stream.disposition & pictures]
    if not streams:
        raise UserError(f"{source} has no video stream")
    if streams[0].codec_context is None:
        raise UserError(f"{source} has a video stream in a format that PyAV cannot decode")
    return streams[0]


def _open(source: Path) -> Any:
    import av

    try:
        return av.open(os.path.abspath(source))  # an absolute path is never taken for the address of a protocol, such as a:b.mp4
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error


def _reading(packets: Iterator[Any], source: Path) -> Iterator[Any]:
    """Yield the packets of `source`; errors of reading are reported as such, while errors of the consumer pass."""
    import av

    while True:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError) as error:
            raise UserError(f"{source} cannot be read: {error.strerror}") from error
        if packet is None:
            return
        yield packet


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Report FFmpeg's errors in the body as errors of the output."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error


def _decode(packet: Any) -> list[Any] | None:
    """Return the frames of a packet, or None if it cannot be decoded."""
    import av

    try:
        return list(packet.decode())
    except av.error.MemoryError:
        raise
    except av.FFmpegError:
        return None
