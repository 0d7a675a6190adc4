"""Reads videos with PyAV: what is in them, and chosen frames, upright and in presentation order.

A damaged file is an error, never a shorter clip: cut files are found from their packets, before anything but
the first frame is decoded, and frames that the decoder had to guess are refused. Undetectable are changed
bytes that still form a valid stream, and a file without an index (an MPEG program stream, FLV, a live
recording, a fragmented MP4) that was cut exactly between two packets.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.codec import CodecContext
from av.container import InputContainer
from av.filter import Graph
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from dataset.buckets import Size
from dataset.geometry import FPS
from dataset.media.container_ends import ends_early
from dataset.media.conversion import FrameConverter, Turn, VideoColour, has_alpha, video_colour
from dataset.media.frames import own_rate
from dataset.media.media import (
    DAMAGED,
    UNREADABLE,
    Frame,
    MediaError,
    check_pixel_count,
    decoder_errors,
    refuse_irregular,
)

_UPRIGHT: Turn = (1, 0, 0, 1)
_CLOCK = re.compile(r"([0-9]{1,4}):([0-9]{2}):([0-9]{2}(?:\.[0-9]{1,12})?)")
"""How Matroska writes a duration: 00:00:01.960000000; tags that look otherwise promise nothing."""
_ROUNDING = Fraction(1, 200)
"""By how much sums of rounded times may differ, in seconds."""
_OPEN_OPTIONS = {
    "format_whitelist": (
        "mov,matroska,avi,asf,flv,ogg,mpeg,mpegts,mpegvideo,gif,m4v,h264,hevc,obu,ivf,nut,mxf,gxf,dv,rm,apng"
    ),
    "protocol_whitelist": "file",
}
"""Containers of moving pictures. FFmpeg goes by content, not by name, and would open playlists of other
files, descriptions of network streams, scripts and subtitles too."""
_PLAYLIST_STARTS = (b"ffconcat version", b"#EXTM3U", b"<?xml", b"<MPD", b"[playlist]", b"[Reference]", b"v=0")
"""Of ffconcat, HLS, DASH (and other XML), PLS, QuickTime reference and SDP files."""
_LONGEST_STEP = Fraction(1, 10)
"""Assumed duration of a frame where the file gives none, in seconds."""
_SEEK_WORTHWHILE = 32
"""From so many frames before the first requested one on, seeking is faster than decoding them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """Properties of a video, read without decoding more than its first frame."""

    stored: Size
    """(width, height) of a decoded frame, before it is turned."""
    square: Size
    """The same once its pixels are square; larger than `stored` if they are stored narrow or flat."""
    turn: Turn
    colour: VideoColour
    has_alpha: bool
    """Parts of it may be transparent, and are shown over white."""
    is_interlaced: bool
    """Its first frame consists of two fields: the frames are deinterlaced."""
    times: tuple[Fraction, ...]
    """Presentation time of every frame in seconds, ascending: its length is the number of frames."""
    pts: tuple[int, ...] | None
    """The same in the file's clock; None when the packets give no times, and frames have to be counted."""
    tick: Fraction
    """Unit of the file's clock in seconds."""
    fps: Fraction | None
    """Frame rate by the time stamps; None of a single frame without a declared rate."""

    @property
    def size(self) -> Size:
        """(width, height) as it is shown: upright, with square pixels."""
        return self.square if self.turn[0] else (self.square[1], self.square[0])

    @property
    def treatment(self) -> str:
        """Processing of the decoded pixels besides rotation; "" for nearly all files."""
        scaled = "" if self.square == self.stored else "-square{}x{}".format(*self.square)
        woven = "-bwdif" if self.is_interlaced else ""
        return scaled + woven + ("-over-white" if self.has_alpha else "") + self.colour.treatment

    @property
    def num_frames(self) -> int:
        """Frames that are shown."""
        return len(self.times)


def probe_video(path: Path) -> VideoInfo:
    """Probe a video: size, frame times, orientation and completeness.

    Raises:
        MediaError: it cannot be opened, holds no video, is cut short, or its first frame cannot be decoded.
    """
    with decoder_errors(path, UNREADABLE):
        with _open(path) as container:
            stream = _video_stream(path, container)
            check_pixel_count(path, (stream.codec_context.width, stream.codec_context.height))
            packets = _Packets.read(container, stream)
            if packets.is_cut or ends_early(path, container.format.name):
                raise MediaError(path, DAMAGED, "the file ends early")
        _refuse_early_end(path, packets)
        with _open(path) as container:
            stream = _video_stream(path, container)
            if packets.can_be_trusted:
                first = next(container.decode(stream), None)
                times = None
            else:
                first, times = _count_frames(container.decode(stream), packets)
            aspect = stream.sample_aspect_ratio
            alpha_decoder = _alpha_decoder(stream)
            codec_name = stream.codec_context.name
    if first is None:
        raise MediaError(path, DAMAGED, "no frame can be decoded")
    if first.is_corrupt:
        raise MediaError(path, DAMAGED, "the first frame is corrupt")
    stored = (first.width, first.height)
    square = _square_size(stored, aspect)
    check_pixel_count(path, square)
    pts, times = _timing(path, packets, first, times)
    return VideoInfo(
        stored=stored,
        square=square,
        turn=_turn(first),
        colour=video_colour(first, codec_name),
        has_alpha=alpha_decoder is not None or has_alpha(first),
        is_interlaced=first.interlaced_frame,
        times=times,
        pts=pts,
        tick=packets.time_base,
        fps=own_rate(times, packets.time_base, packets.average_rate),
    )


def _timing(
    path: Path, packets: _Packets, first: VideoFrame, times: tuple[Fraction, ...] | None
) -> tuple[tuple[int, ...] | None, tuple[Fraction, ...]]:
    """`pts` and `times` of the VideoInfo."""
    pts = None
    if times is None:
        # Frames before the first that can be decoded (leading frames of an open group) are never shown.
        pts = tuple(value for value in packets.pts if first.pts is None or value >= first.pts)
        times = tuple(value * packets.time_base for value in pts)
    elif packets.declared_frames > len(times) + 1:  # old AVI files may count one empty packet
        raise MediaError(
            path, DAMAGED, f"{len(times)} of {packets.declared_frames} declared frames can be decoded"
        )
    return pts, times


def _square_size(stored: Size, aspect: Fraction | None) -> Size:
    """The size that shows the stored pixels in their shape, width to height; it is smaller in no direction.

    Shapes within a hundredth of a square are rounding in the file: they are not worth resampling for.
    """
    width, height = stored
    if aspect is None or aspect <= 0 or abs(aspect - 1) <= Fraction(1, 100):
        return stored
    half = Fraction(1, 2)
    return (int(width * aspect + half), height) if aspect > 1 else (width, int(height / aspect + half))


def _open(path: Path) -> InputContainer:
    """Open a video file; a playlist, which would play other files, is refused.

    Raises:
        MediaError: it is a playlist, no regular file, or not one of the containers that are read.
    """
    refuse_irregular(path)
    with path.open("rb") as stream:
        start = stream.read(512).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(_PLAYLIST_STARTS):
        raise MediaError(path, UNREADABLE, "a playlist of other files, not a video")
    try:
        return av.open(str(path), options=_OPEN_OPTIONS)
    except av.ArgumentError as error:  # also for a format outside the list
        detail = "not a video container that is read, or damaged"
        raise MediaError(path, UNREADABLE, detail) from error


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    shown = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not shown:
        cover = " but a cover picture" if container.streams.video else ""
        raise MediaError(path, UNREADABLE, f"holds no video{cover}")
    stream = shown[0]
    if stream.codec_context is None:  # as FFmpeg leaves it where it knows no decoder
        raise MediaError(path, UNREADABLE, "its codec is not known, or the file is damaged")
    # With several threads per frame FFmpeg loses the mark of corrupt frames; files are read side by side.
    stream.codec_context.thread_count = 1
    return stream


@dataclass(frozen=True, kw_only=True, slots=True)
class _Packets:
    """What the packets and the header of a file contain about its frames."""

    pts: tuple[int, ...]
    """Of all frames that are shown, ascending."""
    time_base: Fraction
    is_cut: bool
    """A packet ends before its announced length."""
    end: Fraction
    """End of the last frame in seconds."""
    declared_end: Fraction | None
    slack: Fraction
    """How much earlier than declared a whole file may end, in seconds."""
    declared_frames: int
    average_rate: Fraction | None
    can_be_trusted: bool
    """One packet is one shown frame, and all have times of their own."""

    @classmethod
    def read(cls, container: InputContainer, stream: VideoStream) -> _Packets:
        """Walk through the file without decoding."""
        pts: list[int] = []
        durations: dict[int, int] = {}
        is_cut, without_time = False, 0
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            is_cut = is_cut or packet.is_corrupt
            if packet.pts is None:
                without_time += 1
            elif not packet.is_discard:
                pts.append(packet.pts)
                durations[packet.pts] = packet.duration or 0
        pts.sort()
        time_base = stream.time_base or Fraction(1)
        step = _frame_step(pts, time_base, stream.average_rate)
        end = Fraction(0)
        if pts:
            end = pts[-1] * time_base + (durations[pts[-1]] * time_base or step)
        declared_end, slack = _declared_end(container, stream, step)
        # VP8 and old AVI files hold packets that show nothing.
        is_odd = stream.codec_context.name == "vp8" or "avi" in container.format.name.split(",")
        return cls(
            pts=tuple(pts),
            time_base=time_base,
            is_cut=is_cut or _lost_its_end(container, stream),
            end=end,
            declared_end=declared_end,
            slack=slack,
            declared_frames=stream.frames,
            average_rate=stream.average_rate,
            can_be_trusted=not without_time and len(set(pts)) == len(pts) and not is_odd,
        )


def _frame_step(pts: Sequence[int], time_base: Fraction, average_rate: Fraction | None) -> Fraction:
    """Seconds from one frame to the next, or how long the only one is shown."""
    steps = [b - a for a, b in itertools.pairwise(pts)]
    if steps:
        return int(statistics.median(steps)) * time_base
    return 1 / average_rate if average_rate else _LONGEST_STEP


def _lost_its_end(container: InputContainer, stream: VideoStream) -> bool:
    # A whole ASF file (wmv) declares its length; a cut one is opened without.
    return container.format.name == "asf" and stream.duration is None and container.duration is None


def _declared_end(
    container: InputContainer, stream: VideoStream, step: Fraction
) -> tuple[Fraction | None, Fraction]:
    """When the last frame should end by the header, and how exact that is; in seconds."""
    exact = max(step / 2, _ROUNDING)
    tag = _CLOCK.fullmatch(stream.metadata.get("DURATION", ""))
    if tag is not None:
        hours, minutes, seconds = (Fraction(part) for part in tag.groups())
        return hours * 3600 + minutes * 60 + seconds, exact
    if stream.duration is not None and stream.time_base is not None:
        # Some files count a late start into the duration, others do not; an early one is always counted.
        return (stream.duration + min(stream.start_time or 0, 0)) * stream.time_base, exact
    # FLV gives no duration of its last frame, and counts it in.
    length = None if container.format.name == "flv" else container.duration
    if length is not None and len(container.streams) == 1:
        end = Fraction(length + max(container.start_time or 0, 0), av.time_base)
        return end, max(2 * step, Fraction(1, 10))
    return None, step


def _refuse_early_end(path: Path, packets: _Packets) -> None:
    if packets.declared_end is None or not packets.pts:
        return
    if packets.declared_end - packets.end > packets.slack:
        detail = f"ends after {float(packets.end):.2f} of {float(packets.declared_end):.2f} declared seconds"
        raise MediaError(path, DAMAGED, detail)


def _count_frames(
    frames: Iterator[VideoFrame], packets: _Packets
) -> tuple[VideoFrame | None, tuple[Fraction, ...]]:
    """Decode everything, where the packets do not give the number of frames."""
    first: VideoFrame | None = None
    stamps: list[int | None] = []
    for frame in frames:
        first = first or frame
        stamps.append(frame.pts)
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) == len(stamps) and known == sorted(set(known)):
        return first, tuple(stamp * packets.time_base for stamp in known)
    rate = packets.average_rate or Fraction(FPS)
    return first, tuple(Fraction(number) / rate for number in range(len(stamps)))


def read_frames(
    path: Path, info: VideoInfo, numbers: Sequence[int], crop: Size | None = None
) -> Iterator[tuple[int, Frame]]:
    """Decode chosen frames in one pass and yield them as (number, upright 8-bit sRGB).

    Args:
        numbers: ascending frame numbers in presentation order; hardly anything after the last is decoded.
        crop: cover this (width, height) with the frame and cut out its centre, as `resize_and_crop` does;
            None keeps the size.
    Raises:
        MediaError: a requested frame, or one decoded on the way to it, is missing or corrupt.
    """
    requested = set(numbers)
    missing = len(requested)
    converter = FrameConverter(
        stored=info.stored, square=info.square, turn=info.turn, colour=info.colour, crop=crop
    )
    # The consumer's errors never reach a generator, so all that is raised in here comes from the decoder.
    with decoder_errors(path, DAMAGED), _open(path) as container:
        for number, frame in _numbered(container, _video_stream(path, container), info, numbers[0]):
            if number not in requested:
                continue
            missing -= 1
            yield number, converter.convert(frame)
            if number == numbers[-1]:
                break
    if missing:
        raise MediaError(path, DAMAGED, f"{missing} of {len(requested)} frames cannot be decoded")


def _decoded(container: InputContainer, stream: VideoStream, info: VideoInfo) -> Iterator[VideoFrame]:
    """Frames from where the container stands, whole and progressive.

    Raises:
        ValueError: a frame is corrupt.
    """
    name = _alpha_decoder(stream)
    frames = container.decode(stream) if name is None else _decoded_with_alpha(container, stream, name)
    frames = _intact(frames)
    return _deinterlaced(frames, stream) if info.is_interlaced else frames


def _intact(frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    for frame in frames:
        if frame.is_corrupt:
            raise ValueError(f"the frame at {frame.time} s is corrupt")
        yield frame


def _alpha_decoder(stream: VideoStream) -> str | None:
    """The decoder that reads the transparency of WebM; FFmpeg's own decoders show hidden colours."""
    if stream.metadata.get("alpha_mode") != "1":
        return None
    return {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)


def _decoded_with_alpha(
    container: InputContainer, stream: VideoStream, decoder_name: str
) -> Iterator[VideoFrame]:
    decoder = cast(VideoCodecContext, CodecContext.create(decoder_name, "r"))
    decoder.thread_count = 1
    for packet in container.demux(stream):
        yield from decoder.decode(packet if packet.size else None)


def _deinterlaced(frames: Iterable[VideoFrame], stream: VideoStream) -> Iterator[VideoFrame]:
    """One progressive frame for each interlaced one, by FFmpeg's bwdif, which looks one frame ahead."""
    graph = Graph()
    source = graph.add_buffer(template=stream)
    bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
    source.link_to(bwdif)
    bwdif.link_to(graph.add("buffersink"))
    graph.configure()
    for frame in itertools.chain(frames, (None,)):
        graph.vpush(frame)
        while True:
            try:
                progressive = graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                break
            if progressive.pts is not None and progressive.time_base and stream.time_base:
                # bwdif counts in half ticks.
                progressive.pts = round(progressive.pts * progressive.time_base / stream.time_base)
            yield progressive


def _numbered(
    container: InputContainer, stream: VideoStream, info: VideoInfo, first: int
) -> Iterator[tuple[int, VideoFrame]]:
    if info.pts is None:
        yield from enumerate(_decoded(container, stream, info))
        return
    number_by_pts = {pts: number for number, pts in enumerate(info.pts)}
    if first >= _SEEK_WORTHWHILE:
        # A deinterlaced frame depends on the one before, wherever decoding begins.
        target = info.pts[first - 1 if info.is_interlaced else first]
        container.seek(target, stream=stream, backward=True)
        frames = _decoded(container, stream, info)
        start = next(frames, None)
        if start is not None and start.pts is not None and start.pts <= target:
            yield from _by_pts(start, frames, number_by_pts)
            return
        container.seek(min(info.pts[0], 0), stream=stream, backward=True)  # the seek went too far
    frames = _decoded(container, stream, info)
    start = next(frames, None)
    if start is not None:
        yield from _by_pts(start, frames, number_by_pts)


def _by_pts(
    first: VideoFrame, rest: Iterator[VideoFrame], number_by_pts: dict[int, int]
) -> Iterator[tuple[int, VideoFrame]]:
    frame: VideoFrame | None = first
    while frame is not None:
        number = number_by_pts.get(frame.pts) if frame.pts is not None else None
        if number is not None:
            yield number, frame
        frame = next(rest, None)


def _turn(frame: VideoFrame) -> Turn:
    """The display matrix of a frame where it turns by quarters or mirrors; other angles count as upright."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _UPRIGHT
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), dtype="<i4").tolist()
    turn = tuple(round(value / 65536) for value in (a, b, c, d))
    if sorted(map(abs, turn)) != [0, 0, 1, 1] or abs(turn[0]) != abs(turn[3]):
        return _UPRIGHT
    return turn[0], turn[1], turn[2], turn[3]
