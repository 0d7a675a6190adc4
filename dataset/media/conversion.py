"""Turns decoded video frames into upright 8-bit sRGB at the size that is trained on.

Frames are shrunk before they are converted, plane by plane: luma by swscale's area filter, chroma by
OpenCV's, and then one matrix makes RGB. That is several times as fast as converting whole frames first, and
gives the same levels. Layouts other than planar YCbCr of 8 bits are shrunk and converted by swscale in one
pass. It knows matrices and ranges only, so frames whose transfer function or primaries are not the target's,
and layouts that it takes for another range than they have, come from it as 16-bit planes for `colour.py`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from PIL import Image

from dataset.buckets import Size, plan_crop
from dataset.media.colour import (
    BT601,
    PQ,
    SRGB,
    UNSPECIFIED,
    Colour,
    ColourTags,
    colour_of,
    full_range,
    matrix_of,
    to_srgb,
    yuv_matrix,
    yuv_to_rgb,
)
from dataset.media.media import Frame, over_white, resize

Turn = tuple[int, int, int, int]
"""The display matrix (a, b, c, d), each -1, 0 or 1: a pixel at (x, y) is shown at (a*x + c*y, b*x + d*y)."""

_SWSCALE_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
"""H.273's matrix -> FFmpeg's SWS_CS constant."""
_PLAIN = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND  # without them levels are up to 3 off
_AREA = Interpolation.AREA | _PLAIN
_PLANAR_LAYOUTS = {
    *("yuv420p", "yuv422p", "yuv440p", "yuv444p", "yuv411p", "yuv410p"),
    *("yuvj420p", "yuvj422p", "yuvj440p", "yuvj444p", "yuvj411p"),
}
"""YCbCr of 8 bits, one plane each."""
_LIMITED_GREY_CODECS = {"h264", "hevc", "vvc", "av1", "libdav1d", "vp9", "mpeg1video", "mpeg2video", "mpeg4"}
"""Codecs whose grey pictures are luma of limited range unless they say otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoColour:
    """How the numbers of a video's frames become colours."""

    colour: Colour = SRGB
    matrix: int = BT601
    """Of YCbCr; RGB and grey have none."""
    is_full_range: bool = False
    is_untagged: bool = False
    """The file does not say which matrix it uses."""
    unknown: tuple[str, ...] = ()
    """What the file says that cannot be converted."""

    @property
    def treatment(self) -> str:
        """Names the conversion in a cache's fingerprint; "" for tagged SDR, and SD without tags."""
        parts = []
        if self.is_untagged and self.matrix != BT601:
            parts.append(f"matrix{self.matrix}")
        if not self.colour.is_target:
            parts.append(f"{self.colour.transfer}-{hash_name(self.colour)}")
        return "".join(f"-{part}" for part in parts)


def hash_name(colour: Colour) -> str:
    """A short name of primaries and peak."""
    return "-".join(f"{value:g}" for value in (*colour.primaries[:6], colour.peak_nits))


def video_colour(frame: VideoFrame, codec_name: str) -> VideoColour:
    """The meaning of a video's numbers by the tags of its first frame."""
    tags = ColourTags(
        primaries=frame.color_primaries,
        transfer=frame.color_trc,
        matrix=frame.colorspace,
        peak_nits=_peak_nits(frame),
    )
    colour, unknown = colour_of(tags)
    if "ICC_PROFILE" in frame.side_data:
        unknown += ("an ICC profile",)
    if "DOVI_RPU_BUFFER" in frame.side_data and tags.transfer in {0, UNSPECIFIED}:
        unknown += ("Dolby Vision without a picture that other players can show",)
    matrix = BT601
    if _is_yuv(frame):
        matrix, unknown_matrix = matrix_of(tags, colour, frame.height)
        unknown += unknown_matrix
    return VideoColour(
        colour=colour,
        matrix=matrix,
        is_full_range=_is_full_range(frame, codec_name),
        is_untagged=tags.matrix == UNSPECIFIED and _is_yuv(frame),
        unknown=unknown,
    )


def _is_full_range(frame: VideoFrame, codec_name: str) -> bool:
    if frame.format.name.startswith("yuvj") or frame.color_range == ColorRange.JPEG:
        return True
    if frame.color_range == ColorRange.MPEG:
        return False
    if _is_yuv(frame):
        return False
    return not _is_grey(frame) or codec_name not in _LIMITED_GREY_CODECS


def _peak_nits(frame: VideoFrame) -> float | None:
    """MaxCLL, else the peak of the mastering display; None where the file gives neither."""
    if frame.color_trc != PQ:
        return None
    light = frame.side_data.get("CONTENT_LIGHT_LEVEL")
    if light is not None:
        (max_cll,) = struct.unpack_from("=I", bytes(light))  # AVContentLightMetadata
        if max_cll:
            return float(max_cll)
    display = frame.side_data.get("MASTERING_DISPLAY_METADATA")
    if display is not None:
        # AVMasteringDisplayMetadata: eight rationals of chromaticities, the darkest and the brightest level.
        numerator, denominator = struct.unpack_from("=ii", bytes(display), 72)
        if numerator > 0 and denominator > 0:
            return numerator / denominator
    return None


def has_alpha(frame: VideoFrame) -> bool:
    """Whether the frame's layout holds transparency."""
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _is_rgb(frame: VideoFrame) -> bool:
    return frame.format.is_rgb or frame.format.has_palette


def _is_grey(frame: VideoFrame) -> bool:
    return not _is_rgb(frame) and sum(not part.is_alpha for part in frame.format.components) == 1


def _is_yuv(frame: VideoFrame) -> bool:
    return not _is_rgb(frame) and not _is_grey(frame)


class FrameSizeError(ValueError):
    """A decoded frame has another size than its video."""


class FrameConverter:
    """Converts the frames of one video; keeps swscale's tables between them."""

    def __init__(
        self, *, stored: Size, square: Size, turn: Turn, colour: VideoColour, crop: Size | None
    ) -> None:
        """
        Args:
            square: size of the frame with square pixels, before it is turned.
            crop: cover this (width, height) of the upright picture and cut out its centre; None keeps all.
        """
        self.stored, self.turn, self.colour, self.crop = stored, turn, colour, crop
        is_lying = turn[0] == 0
        upright = _swapped(square) if is_lying else square
        self.plan = None if crop is None else plan_crop(upright, crop)
        resized = upright if self.plan is None else self.plan.resized
        self.size: Size = _swapped(resized) if is_lying else resized
        self.enlarges = self.size[0] > stored[0] or self.size[1] > stored[1]
        self._reformatter = VideoReformatter()
        self._tiles: tuple[Size, Any] | None = None
        to_rgb = yuv_matrix(colour.matrix, colour.colour, is_full_range=colour.is_full_range, depth=8)
        self._matrix = to_rgb * ([256] * 3 + [1]) * 255

    def convert(self, frame: VideoFrame) -> Frame:
        """RGB [H, W, 3] of a decoded frame.

        Raises:
            FrameSizeError: it is not of the video's size.
        """
        if (frame.width, frame.height) != self.stored:
            raise FrameSizeError(f"the frame size changes to {frame.width}x{frame.height}")
        pixels = self._srgb(frame)
        if self.enlarges:
            pixels = resize(pixels, self.size, enlarges=True)
        a, b, c, d = self.turn
        pixels = pixels[:: d or 1, ::a] if a else pixels.transpose(1, 0, 2)[::b, ::c]
        if self.plan is not None and self.crop is not None:
            (x, y), (width, height) = self.plan.offset, self.crop
            pixels = pixels[y : y + height, x : x + width]
        return np.ascontiguousarray(pixels)

    def _srgb(self, frame: VideoFrame) -> Frame:
        if frame.format.name in _PLANAR_LAYOUTS and self.colour.colour.is_target:
            return self._srgb_of_8_bits(frame)
        if not self._needs_planes(frame):
            layout = "rgba" if has_alpha(frame) else "rgb24"
            pixels = (
                self._reformat(frame, layout, to_full_range=True).to_ndarray().astype(np.uint8, copy=False)
            )
            return opaque(pixels) if layout == "rgba" else pixels
        return self._srgb_of_planes(frame)

    def _srgb_of_8_bits(self, frame: VideoFrame) -> Frame:
        size = width, height = self.stored if self.enlarges else self.size
        luma = _plane(frame.planes[0], np.uint8)
        if size != self.stored:
            # A frame of its own: from YCbCr to grey swscale changes levels by the tags of the frame.
            alone = VideoFrame.from_ndarray(np.ascontiguousarray(luma), format="gray")
            luma = self._reformatter.reformat(
                alone, width, height, "gray", interpolation=_AREA, threads=1
            ).to_ndarray()
        chroma = self._chroma(cv2.merge([_plane(plane, np.uint8) for plane in frame.planes[1:3]]), size)
        return cv2.transform(cv2.merge([luma, *cv2.split(chroma)]), self._matrix).astype(np.uint8, copy=False)

    def _chroma(self, chroma: np.ndarray, size: Size) -> np.ndarray:
        """[H, W, 2] at another size: the mean of what each pixel covers, as if samples were square tiles."""
        height, width = chroma.shape[:2]
        smaller = min(width, size[0]), min(height, size[1])
        if smaller != (width, height):
            chroma = cv2.resize(chroma, smaller, interpolation=cv2.INTER_AREA)
        if smaller == size:
            return chroma
        # OpenCV's own area filter takes a wrong neighbour where borders of pixels and samples meet.
        if self._tiles is None or self._tiles[0] != smaller:
            columns, rows = _tile_positions(smaller[0], size[0]), _tile_positions(smaller[1], size[1])
            maps = cv2.convertMaps(*np.meshgrid(columns, rows), cv2.CV_16SC2)
            self._tiles = smaller, maps
        places, shares = self._tiles[1]
        return cv2.remap(chroma, places, shares, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    def _needs_planes(self, frame: VideoFrame) -> bool:
        """Whether swscale alone would give other colours."""
        if not self.colour.colour.is_target:
            return True
        if _is_yuv(frame):
            return self.colour.matrix not in _SWSCALE_MATRICES
        return not self.colour.is_full_range  # swscale takes RGB and grey for full range

    def _reformat(self, frame: VideoFrame, layout: str, *, to_full_range: bool) -> VideoFrame:
        source = ColorRange.JPEG if self.colour.is_full_range or not _is_yuv(frame) else ColorRange.MPEG
        width, height = self.stored if self.enlarges else self.size
        matrix = _SWSCALE_MATRICES.get(self.colour.matrix, 1)
        return self._reformatter.reformat(
            frame,
            width,
            height,
            layout,
            src_colorspace=matrix,
            dst_colorspace=matrix,
            interpolation=_AREA,
            src_color_range=source,
            dst_color_range=ColorRange.JPEG if to_full_range else source,
            threads=1,
        )

    def _srgb_of_planes(self, frame: VideoFrame) -> Frame:
        depth = frame.format.components[0].bits
        colour, is_full = self.colour, self.colour.is_full_range
        with_alpha = has_alpha(frame)
        if _is_grey(frame):
            layout = "gray" if depth == 8 else "gray16le"
            (grey,) = _planes(self._reformat(frame, layout, to_full_range=False))
            values = full_range(
                grey * np.float32(256 if depth == 8 else 1), is_full_range=is_full, depth=depth
            )
            return to_srgb(np.repeat(values[..., None], 3, axis=2), colour.colour)
        if _is_rgb(frame):
            layout = "gbrap16le" if with_alpha else "gbrp16le"
            green, blue, red, *alpha = _planes(self._reformat(frame, layout, to_full_range=False))
            rgb = full_range(np.stack([red, green, blue], axis=-1), is_full_range=is_full, depth=depth)
        else:
            layout = "yuva444p16le" if with_alpha else "yuv444p16le"
            *yuv, alpha = (*_planes(self._reformat(frame, layout, to_full_range=False)), None)
            alpha = [yuv.pop()] if with_alpha else []
            rgb = yuv_to_rgb(
                np.stack(yuv, axis=-1), colour.matrix, colour.colour, is_full_range=is_full, depth=depth
            )
        pixels = to_srgb(rgb, colour.colour)
        if not alpha:
            return pixels
        opacity = full_range(alpha[0], is_full_range=True, depth=depth)
        return opaque(np.dstack([pixels, np.clip(opacity * 255 + 0.5, 0, 255).astype(np.uint8)]))


def _tile_positions(source: int, target: int) -> np.ndarray:
    """[target] float32: where linear interpolation weighs samples by what a larger picture's pixels cover."""
    first = np.arange(target) * source // target
    # A pixel covers source / target of a sample; `inside` of target parts belong to the first one.
    inside = (first + 1) * target - np.arange(target) * source
    return (first + np.clip(1 - inside / source, 0, 1)).astype(np.float32)


def _swapped(size: Size) -> Size:
    return size[1], size[0]


def opaque(rgba: np.ndarray) -> Frame:
    """RGBA [H, W, 4] composited over white."""
    return np.asarray(over_white(Image.fromarray(rgba, "RGBA")).convert("RGB"))


def _planes(frame: VideoFrame) -> list[np.ndarray]:
    """The planes of a planar frame as float32 [H, W]."""
    dtype = np.dtype("<u2") if frame.format.name.endswith("16le") else np.dtype(np.uint8)
    return [_plane(plane, dtype).astype(np.float32) for plane in frame.planes]


def _plane(plane: VideoPlane, dtype: type[np.uint8] | np.dtype) -> np.ndarray:
    """A view of the samples, [H, W]."""
    buffer: Any = plane
    return np.frombuffer(buffer, dtype).reshape(plane.height, -1)[:, : plane.width]
