"""Masks of clips: checked against the clip, decoded alike and resized to its latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.buckets import Size
from dataset.geometry import FRAMES_PER_LATENT, PIXELS_PER_LATENT
from dataset.media.files import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from dataset.media.frame_folders import frame_paths
from dataset.media.media import (
    CHANGED,
    Frame,
    MediaError,
    frames_fingerprint,
    memory_errors,
    probe_image,
    read_image,
    resize_and_crop,
    source_fingerprint,
)
from dataset.media.videos import VideoInfo, probe_video, read_frames

MISFIT = "does not fit"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedMask:
    """A mask that matches its clip."""

    path: Path
    video: VideoInfo | None
    """Of a video; None for a still, which counts for all frames, and for a folder of frames."""
    frames: tuple[Path, ...]
    """Of a folder of frames, else empty."""
    treatment: str
    """Conversion of its colours; "" for nearly all."""
    treatment: str
    """Names the conversion of its colours; "" for nearly all files."""
    fingerprint: str

    @property
    def is_folder(self) -> bool:
        """A video's mask given as a folder of images, one per frame."""
        return bool(self.frames)

    def current_fingerprint(self) -> str:
        """The fingerprint of the mask file as it is now."""
        return _fingerprint(self.path, frame_paths(self.path) if self.is_folder else ()) + self.treatment


def plan_mask(path: Path, size: Size, num_frames: int) -> PlannedMask:
    """Probe a mask without decoding it.

    Args:
        size: (width, height) of the upright source that it masks.
        num_frames: of the whole source, before anything is cut; 1 for an image.
    Raises:
        MediaError: it cannot be opened, or its size or number of frames is not that of its source.
    """
    video: VideoInfo | None = None
    frames = tuple(frame_paths(path)) if path.is_dir() else ()
    if not frames and path.suffix.lower() in VIDEO_EXTENSIONS and not _is_still(path):
        video = probe_video(path)
        found, count, treatment = video.size, video.num_frames, video.treatment
    else:
        info = probe_image(frames[0] if frames else path)
        found, treatment = info.size, info.treatment
        count = len(frames) or None
    if found != size:
        detail = f"{path.name} is {found[0]}x{found[1]}, what it masks {size[0]}x{size[1]}"
        raise MediaError(path, MISFIT, detail)
    if count is not None and count != num_frames:
        detail = f"{path.name} has {count} frames, what it masks {num_frames}"
        raise MediaError(path, MISFIT, detail)
    fingerprint = _fingerprint(path, frames) + treatment
    return PlannedMask(path=path, video=video, frames=frames, treatment=treatment, fingerprint=fingerprint)


def latent_mask(mask: PlannedMask, frame_numbers: Sequence[int], crop: Size) -> Tensor:
    """The loss weight of each latent position of a clip.

    The frames are resized and cut as the clip's are. Brightness 0 .. 255 becomes 0 .. 1, averaged over the
    8 x 8 pixels of a position and over the frames that make a latent frame: the first alone, then four by
    four, as the VAE groups them. White gives 1 exactly.

    Args:
        frame_numbers: the clip's, ascending; 4k+1 of them.
        crop: (width, height) in pixels that is encoded.
    Returns:
        [F, H, W], float32.
    Raises:
        MediaError: the mask is damaged or has changed since planning.
    """
    with memory_errors(mask.path):
        frames = _shrunk_frames(mask, sorted(set(frame_numbers)), crop)
    if mask.current_fingerprint() != mask.fingerprint:
        raise MediaError(mask.path, CHANGED, "start again when it is complete")
    small = torch.stack([frames[number] for number in frame_numbers])  # [F_px, H, W]
    if len(small) == 1:
        return small
    return torch.cat([small[:1], small[1:].unflatten(0, (-1, FRAMES_PER_LATENT)).mean(dim=1)])


def _shrunk_frames(mask: PlannedMask, numbers: Sequence[int], crop: Size) -> dict[int, Tensor]:
    if mask.video is not None:
        return {n: _shrunk(frame, crop) for n, frame in read_frames(mask.path, mask.video, numbers, crop)}
    if mask.is_folder:
        return {number: _shrunk(read_image(mask.frames[number]), crop) for number in numbers}
    return dict.fromkeys(numbers, _shrunk(read_image(mask.path), crop))


def _shrunk(frame: Frame, crop: Size) -> Tensor:
    """Mean brightness [H, W] of each latent position."""
    brightness = torch.from_numpy(resize_and_crop(frame, crop)).float().mean(dim=-1) / 255
    return F.avg_pool2d(brightness[None], PIXELS_PER_LATENT)[0]


def _is_still(path: Path) -> bool:
    """Whether a file whose extension may mean both, a GIF, holds a single frame."""
    return path.suffix.lower() in IMAGE_EXTENSIONS and probe_video(path).num_frames == 1


def _fingerprint(path: Path, frames: Sequence[Path]) -> str:
    return frames_fingerprint(frames) if frames else source_fingerprint(path)
