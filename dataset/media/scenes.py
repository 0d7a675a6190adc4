"""Finds where the scene of a video changes, with a detector of the package scenedetect."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import cv2
import numpy as np

from dataset.geometry import FPS
from dataset.media.media import Frame
from modules.errors import ResourceError

PACKAGE = "scenedetect"
_SIDE = 256
"""Longer sides are shrunk: the detector compares mean colours, which keep."""


def has_detector() -> bool:
    """Whether the package that finds scenes is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def require_detector(setting: str) -> None:
    """Refuse a setting that needs the package, before anything is read.

    Raises:
        ResourceError: it is not installed.
    """
    if not has_detector():
        raise ResourceError(f"{setting} needs the package {PACKAGE}: pip install {PACKAGE}")


def scene_starts(frames: Iterable[Frame]) -> tuple[int, ...]:
    """The positions in a sequence of frames, after 0, at which another scene begins.

    `ContentDetector` with its own threshold, without its least length of a scene, which may be as short as a
    cut. Of neighbouring frames that all differ, as in a whip pan, the first counts.
    """
    from scenedetect.common import FrameTimecode  # pyright: ignore[reportMissingImports] - optional
    from scenedetect.detectors import ContentDetector  # pyright: ignore[reportMissingImports]

    detector = ContentDetector(min_scene_len=0)
    starts: list[int] = []
    previous = -2
    for number, frame in enumerate(frames):
        if detector.process_frame(FrameTimecode(number, fps=float(FPS)), _small_bgr(frame)):
            if number != previous + 1:
                starts.append(number)
            previous = number
    return tuple(starts)


def _small_bgr(frame: Frame) -> Frame:
    height, width = frame.shape[:2]
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = frame if scale == 1.0 else cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small[..., ::-1], dtype=np.uint8)
