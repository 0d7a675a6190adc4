"""Pictures of a prompt's samples over the steps: a grid of frames, and a video of steps side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont

from dataset.geometry import FPS
from kandinsky5.sampling.video_files import write_video
from modules.files import atomic_writer
from modules.logs import get_logger

log = get_logger(__name__)

FRAMES_SHOWN = 4
"""Of each clip in the grid, from its first to its last frame."""
MAX_ROWS = 16
"""Steps in the grid; of more than these the first, the last, and evenly chosen ones between them."""
MAX_COLUMNS = 8
"""Steps in the video."""
HEIGHT = 192
"""Pixels of a frame in both."""

_MARGIN, _GAP, _LABEL = 16, 4, 20
_FONT_SIZE = 14
_MAX_PROMPT_LINES = 6
_MIN_WIDTH = 480
"""Of the grid, so that a prompt above narrow frames stays readable."""
_CRF = 18
_FONTS = ("NotoSansCJK-Regular.ttc", "YuGothM.ttc", "msgothic.ttc", "ヒラギノ角ゴシック W3.ttc")
"""Fonts of Linux, Windows and macOS for what DejaVu Sans, which comes with matplotlib, has no signs for."""


@dataclass(frozen=True, slots=True)
class SmallClip:
    """A sample, small."""

    step: int
    frames: np.ndarray
    """uint8 [F, HEIGHT, W, 3], W even; F = 1 for an image."""


def read_small(files: Mapping[int, Path]) -> list[SmallClip]:
    """The samples of at most MAX_ROWS steps, in their order; what cannot be read is logged and left out.

    Args:
        files: step -> .mp4 or .png.
    """
    clips = []
    steps = sorted(files)
    for step in (steps[position] for position in _spread(len(steps), MAX_ROWS)):
        path = files[step]
        try:
            frames = _read_video(path) if path.suffix == ".mp4" else _read_image(path)
        except (OSError, av.FFmpegError) as error:
            log.warning("%s cannot be read and is left out of the grid: %s", path.name, error)
            continue
        clips.append(SmallClip(step, frames))
    return clips


def _read_video(path: Path) -> np.ndarray:
    frames = []
    with av.open(path) as container:
        if not container.streams.video:
            raise OSError("it has no video")
        for frame in container.decode(container.streams.video[0]):
            # Written by `write_video`, whose colours these are.
            small = frame.reformat(
                *(_width(frame.width, frame.height), HEIGHT, "rgb24"),
                src_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
            )
            frames.append(small.to_ndarray())
    if not frames:
        raise OSError("it has no frames")
    return np.stack(frames)


def _read_image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((_width(*image.size), HEIGHT)))[None]


def _width(width: int, height: int) -> int:
    """Of a frame of HEIGHT; even, as H.264 requires."""
    return max(2, 2 * round(width * HEIGHT / height / 2))


def write_grid(path: Path, clips: Sequence[SmallClip], prompt: str) -> None:
    """Draw one row per clip: its step, and FRAMES_SHOWN of its frames; the prompt above them.

    Raises:
        OSError: the file cannot be written.
    """
    rows = [clip.frames[_spread(len(clip.frames), FRAMES_SHOWN)] for clip in clips]
    font = ImageFont.load_default(_FONT_SIZE)
    label_width = max(round(font.getlength(_label(clip))) for clip in clips) + _GAP
    strip = max(len(row) * (row.shape[2] + _GAP) - _GAP for row in rows)
    width = max(_MIN_WIDTH, label_width + strip)
    prompt_font = font_for(prompt, _FONT_SIZE)
    lines = wrapped(prompt, prompt_font, width)
    top = _MARGIN + len(lines) * _LABEL + _GAP
    height = top + len(rows) * (HEIGHT + _GAP) - _GAP + _MARGIN
    grid = Image.new("RGB", (width + 2 * _MARGIN, height), "white")
    pen = ImageDraw.Draw(grid)
    for number, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + number * _LABEL), line, "black", prompt_font)
    for clip, row in zip(clips, rows, strict=True):
        pen.text((_MARGIN, top + HEIGHT / 2), _label(clip), "black", font, anchor="lm")
        for column, frame in enumerate(row):
            left = _MARGIN + label_width + column * (row.shape[2] + _GAP)
            grid.paste(Image.fromarray(frame), (left, top))
        top += HEIGHT + _GAP
    with atomic_writer(path) as stream:
        grid.save(stream, format="png")


def write_steps_video(path: Path, clips: Sequence[SmallClip], prompt: str) -> None:
    """Write one .mp4 of the clips of at most MAX_COLUMNS steps side by side, each under its step.

    A clip that is shorter than others stays at its last frame.

    Raises:
        OSError, av.FFmpegError: the disk or the encoder failed.
    """
    shown = [clips[position] for position in _spread(len(clips), MAX_COLUMNS)]
    num_frames = max(len(clip.frames) for clip in shown)
    width = sum(clip.frames.shape[2] + _GAP for clip in shown) - _GAP
    head = Image.new("RGB", (width, _LABEL), "white")
    pen, font = ImageDraw.Draw(head), ImageFont.load_default(_FONT_SIZE)
    canvas = np.full((num_frames, _LABEL + HEIGHT, width, 3), 255, np.uint8)
    left = 0
    for clip in shown:
        frame_width = clip.frames.shape[2]
        label = _label(clip)
        if font.getlength(label) > frame_width:  # a narrow picture: only the number is sure to fit
            label = str(clip.step)
        pen.text((left, _LABEL / 2), label, "black", font, anchor="lm")
        canvas[: len(clip.frames), _LABEL:, left : left + frame_width] = clip.frames
        canvas[len(clip.frames) :, _LABEL:, left : left + frame_width] = clip.frames[-1]
        left += frame_width + _GAP
    canvas[:, :_LABEL] = np.asarray(head)
    steps = ", ".join(str(clip.step) for clip in shown)
    write_video(path, canvas, fps=FPS, crf=_CRF, metadata={"prompt": prompt, "steps": steps})


def _label(clip: SmallClip) -> str:
    return f"step {clip.step}"


def _spread(total: int, count: int) -> list[int]:
    """At most `count` of the positions 0 ... total - 1, evenly chosen, the first and the last among them."""
    if total <= count:
        return list(range(total))
    return [index * (total - 1) // (count - 1) for index in range(count)]


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that has all signs of a text, as far as this machine has one."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    plain = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    needed = {ord(sign) for sign in text if not sign.isspace()}
    for name in (str(plain), *_FONTS):
        try:
            font = ImageFont.truetype(name, size)
            if needed <= FT2Font(str(font.path)).get_charmap().keys():
                return font
        except (OSError, RuntimeError):  # not on this machine, or not a font that FreeType reads
            continue
    return ImageFont.truetype(str(plain), size)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A text in lines of at most `width` pixels, broken at spaces or, without any, anywhere."""
    lines, rest = [], " ".join(text.split())
    while rest and len(lines) < _MAX_PROMPT_LINES:
        end = len(rest)
        while end > 1 and font.getlength(rest[:end]) > width:
            space = rest.rfind(" ", 1, end)
            end = space if space > 0 else end - 1
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        lines[-1] = lines[-1][:-1] + "…"
    return lines
