"""Previews the clips to encode: as files, or as characters on the console."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.cache.names import PREVIEW_FOLDER
from dataset.clips import PlannedClip, cut_batches, load_batches
from dataset.config.config import AnyDatasetConfig
from dataset.geometry import FPS
from kandinsky5.configs.caching import DebugConfig
from kandinsky5.sampling.video_files import write_video
from modules.files import atomic_writer
from modules.logs import get_logger, print_report

log = get_logger(__name__)

_SHADES = " .:-=+*#%@"
_CHARACTER_ASPECT = 2  # a console's characters are about twice as high as wide


def preview_clips(
    dataset: AnyDatasetConfig, clips: Sequence[PlannedClip], debug: DebugConfig, num_workers: int
) -> bool:
    """Show the clips of one dataset as they would be encoded.

    Returns:
        False when the user asked to stop; the remaining datasets are then not shown.
    """
    if debug.mode == "console" and debug.console_num_images is not None:
        clips = clips[: debug.console_num_images]
    asks = debug.mode == "console" and debug.console_num_images is None and sys.stdin.isatty()
    for loaded in load_batches(cut_batches(clips, 1), num_workers=num_workers):
        for entry in loaded.damaged:
            log.warning("%s", entry)
        for clip, frames in zip(loaded.clips, loaded.pixels, strict=True):
            if debug.mode == "video":
                log.info("wrote %s", write_preview(dataset.cache_directory, clip, frames))
                continue
            _print_clip(clip, frames, debug.console_width)
            answer = input("Enter: next, d: next dataset, q: quit > ").strip().lower() if asks else ""
            if answer == "q":
                return False
            if answer == "d":
                return True
    return True


def write_preview(folder: Path, clip: PlannedClip, frames: np.ndarray) -> Path:
    """Write frames uint8 [F, H, W, 3] into a folder beside where the cache would be: .mp4, .jpg for an image.

    Caches may lie among the media, where these files would be taken for more of them.
    """
    stem = Path(clip.cache_name).stem
    folder = folder / PREVIEW_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if clip.is_image:
        path = folder / f"{stem}.jpg"
        with atomic_writer(path) as stream:
            Image.fromarray(frames[0]).save(stream, format="jpeg", quality=95)
        return path
    path = folder / f"{stem}.mp4"
    write_video(path, frames, fps=FPS)
    return path


def ascii_picture(frame: np.ndarray, width: int) -> str:
    """An image uint8 [H, W, 3] as lines of `width` characters, darker to lighter."""
    height = max(1, round(frame.shape[0] * width / frame.shape[1] / _CHARACTER_ASPECT))
    gray = np.asarray(Image.fromarray(frame).convert("L").resize((width, height)), dtype=np.int32)
    shades = np.array(list(_SHADES))[gray * len(_SHADES) // 256]
    return "\n".join("".join(line) for line in shades)


def _print_clip(clip: PlannedClip, frames: np.ndarray, width: int) -> None:
    num_frames, height, columns = clip.shape
    print_report(f"{clip.cache_name}: {num_frames} frames of {columns}x{height}")
    for caption in clip.item.captions:
        print_report(f"caption: {caption}")
    print_report(ascii_picture(frames[0], width))
    if num_frames > 1:
        print_report(f"last frame:\n{ascii_picture(frames[-1], width)}")
