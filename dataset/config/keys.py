"""The keys of a dataset file, with the check of each value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dataset.geometry import PIXEL_STEP
from dataset.media.frames import FRAME_EXTRACTIONS, SCENE_CUTS
from modules.path_kinds import name_length_problem

KeyCheck = Callable[[Any], Any]
"""Turns a raw value into the field's; raises ValueError saying what is expected ("must be ...")."""

_MAX_SIDE = 16384


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The known key that a mistyped one most resembles."""
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _is_int(raw: Any) -> bool:
    return isinstance(raw, int) and not isinstance(raw, bool)


def _boolean(raw: Any) -> bool:
    if not isinstance(raw, bool):
        raise ValueError("must be true or false")
    return raw


def _positive_int(raw: Any) -> int:
    if not _is_int(raw) or raw < 1:
        raise ValueError("must be a whole number of at least 1")
    return raw


def _any_int(raw: Any) -> int:
    if not _is_int(raw):
        raise ValueError("must be a whole number")
    return raw


def _rate(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or not 0 < raw <= 1000:
        raise ValueError("must be a number of frames a second above 0 and up to 1000")
    return float(raw)


def _source_rate(raw: Any) -> float | str:
    if raw == "auto":
        return raw
    try:
        return _rate(raw)
    except ValueError as error:
        raise ValueError(f'{error}, or "auto" for each file\'s own rate') from error


def _share(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or not 0 <= raw <= 1:
        raise ValueError("must be a number within 0 .. 1")
    return float(raw)


def _path(raw: Any) -> Path:
    if not isinstance(raw, str) or not raw.strip() or "\0" in raw:
        raise ValueError("must be a path in quotes")
    problem = name_length_problem(Path(raw))
    if problem is not None:
        raise ValueError(problem)
    return Path(raw)


def _extension(raw: Any) -> str:
    if not isinstance(raw, str) or not raw.startswith(".") or len(raw) < 2 or "/" in raw or "\\" in raw:
        raise ValueError('must be a file extension with its dot, for example ".txt"')
    return raw


def _caption(raw: Any) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError("must be a string in quotes")
    return raw.strip()


def _sides(raw: Any) -> tuple[int, int]:
    sides = (raw, raw) if _is_int(raw) else raw
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(_is_int(side) for side in sides):
        raise ValueError("must be a whole number or [width, height]")
    return sides[0], sides[1]


def _resolution(raw: Any) -> tuple[int, int]:
    width, height = _sides(raw)
    if not all(PIXEL_STEP <= side <= _MAX_SIDE for side in (width, height)):
        raise ValueError(f"must lie within {PIXEL_STEP} .. {_MAX_SIDE} on both sides")
    if width % PIXEL_STEP or height % PIXEL_STEP:
        nearest = [max(PIXEL_STEP, math.floor(s / PIXEL_STEP + 0.5) * PIXEL_STEP) for s in (width, height)]
        raise ValueError(f"must be multiples of {PIXEL_STEP} (nearest: {nearest})")
    return width, height


def _lengths(raw: Any) -> tuple[int, ...]:
    if not isinstance(raw, list) or not raw or not all(_is_int(value) and value >= 1 for value in raw):
        raise ValueError("must be a list of whole numbers of at least 1, for example [1, 25]")
    return tuple(raw)


def _ints(raw: Any) -> tuple[int, ...]:
    if not isinstance(raw, list) or not all(_is_int(value) for value in raw):
        raise ValueError("must be a list of whole numbers")
    return tuple(raw)


def _extraction(raw: Any) -> str:
    if raw not in FRAME_EXTRACTIONS:
        hint = nearest_key(raw, FRAME_EXTRACTIONS) if isinstance(raw, str) else None
        suffix = f" (did you mean {hint}?)" if hint else ""
        raise ValueError(f"must be one of {', '.join(FRAME_EXTRACTIONS)}{suffix}")
    return raw


def _scene_cuts(raw: Any) -> str:
    if raw not in SCENE_CUTS:
        raise ValueError(f"must be one of {', '.join(SCENE_CUTS)}")
    return raw


GENERAL_KEYS: dict[str, KeyCheck] = {
    "resolution": _resolution,
    "caption_extension": _extension,
    "caption_lines": _boolean,
    "recursive": _boolean,
    "batch_size": _positive_int,
    "num_repeats": _positive_int,
    "enable_bucket": _boolean,
    "bucket_no_upscale": _boolean,
    "caption_dropout_rate": _share,
    "prior_caption": _caption,
    "target_fps": _rate,
}
"""Allowed in [general] and in every [[datasets]] table."""

IMAGE_KEYS: dict[str, KeyCheck] = {
    "image_directory": _path,
    "image_jsonl_file": _path,
    "cache_directory": _path,
    "mask_directory": _path,
    "is_prior": _boolean,
}

VIDEO_KEYS: dict[str, KeyCheck] = {
    "video_directory": _path,
    "video_jsonl_file": _path,
    "cache_directory": _path,
    "mask_directory": _path,
    "is_prior": _boolean,
    "target_frames": _lengths,
    "frame_extraction": _extraction,
    "frame_stride": _positive_int,
    "frame_sample": _positive_int,
    "max_frames": _positive_int,
    "source_fps": _source_rate,
    "scene_cuts": _scene_cuts,
}

EXTRACTION_KEYS: dict[str, tuple[str, ...]] = {
    "target_frames": ("head", "chunk", "slide", "uniform"),
    "frame_stride": ("slide",),
    "frame_sample": ("uniform",),
    "max_frames": ("full",),
}
"""Which values of `frame_extraction` look at a setting."""

# Settings of other models, so that one dataset file can serve several trainers.
IGNORED_IMAGE_KEYS: dict[str, KeyCheck] = {
    "control_directory": _path,
    "multiple_target": _boolean,
    "no_resize_control": _boolean,
    "control_resolution": _sides,
    "fp_latent_window_size": _any_int,
    "fp_1f_clean_indices": _ints,
    "fp_1f_target_index": _any_int,
    "fp_1f_no_post": _boolean,
}
IGNORED_VIDEO_KEYS: dict[str, KeyCheck] = {
    "control_directory": _path,
    "fp_latent_window_size": _any_int,
}
OLD_SPELLINGS = {
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}
