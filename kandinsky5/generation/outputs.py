"""Output files: names, metadata, latent files, and fallbacks that never lose frames."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from dataset.geometry import LATENT_CHANNELS
from kandinsky5.configs.generate import OutputConfig
from kandinsky5.sampling.video_files import (
    check_video_encoder,
    remove_leftover_frames,
    write_frames,
    write_png,
    write_video,
)
from modules.errors import ConfigError, ModelFileError, ResourceError
from modules.files import check_folder_unwritten, make_writable_folder, remove_leftover_files
from modules.logs import get_logger
from modules.messages import names_in_short
from modules.tensor_files import read_tensors, write_tensors

log = get_logger(__name__)

LATENT_KEY = "latent"
_LATENT_ENDING = "_latent.safetensors"
UNFINISHED_ENDING = "_unfinished.safetensors"
"""Of the latents of a clip that is sampled and not yet written."""
# What encoders, muxers and disks raise: after hours of sampling every one of them has to leave the frames.
WRITE_ERRORS = (av.FFmpegError, OSError, RuntimeError, ValueError, MemoryError)


@dataclass(frozen=True, slots=True)
class OutputPaths:
    """The files of one result; None for files that were not requested."""

    folder: Path
    stem: str
    """What is saved instead, if that fails, is named after it."""
    video: Path | None = None
    image: Path | None = None
    frames: Path | None = None
    """A folder."""
    latent: Path | None = None
    replaces: bool = False
    """With --overwrite: what has one of the names is replaced."""

    def existing(self) -> list[Path]:
        return [
            path for path in (self.video, self.image, self.frames, self.latent) if path and _is_taken(path)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What is written of one result."""

    frames: np.ndarray | None
    """uint8 [F, H, W, 3]; needed for everything but latents."""
    latents: Tensor | None
    """[1, 16, F, H, W]; needed for latent files."""
    fps: int
    crf: int
    metadata: Mapping[str, str]
    latent_metadata: Mapping[str, str]
    copy: Path | None = None
    """A file with the latents, which goes once they are in another one or not needed any more."""


class OutputNames:
    """Chooses file names and checks, before anything slow, that they can be written.

    Args:
        makes_many: several results from one command: `output` is a folder whatever it looks like.
        is_dry: nothing will be written, and the folder is not made.
    Raises:
        ConfigError: several results but the name of one file.
        ResourceError: the folder cannot be made or written to, or there is no video encoder.
    """

    def __init__(self, config: OutputConfig, *, makes_many: bool, is_dry: bool = False) -> None:
        if config.output is None:
            raise ConfigError("--output is missing: a .mp4, a .png or a folder")
        self._config = config
        path = config.output
        self._suffix = path.suffix.lower() if path.suffix.lower() in {".mp4", ".png", ".safetensors"} else ""
        is_folder = config.output_is_folder or path.is_dir()
        if makes_many and not is_folder and self._suffix:
            raise ConfigError(f"--output {path}: several videos need a folder, not one file name")
        if makes_many or is_folder:
            self.folder, self._stem, self._suffix = path, None, ""
        else:
            self.folder = path.parent
            self._stem = path.name.removesuffix(path.suffix) if self._suffix else path.name
        if is_dry:
            check_folder_unwritten(self.folder, "the output folder")
        else:
            make_writable_folder(self.folder, "the output folder")
            remove_leftover_files(self.folder)
            remove_leftover_frames(self.folder)
        if self._suffix != ".png" and config.output_type in {"video", "both"}:
            check_video_encoder()

    @property
    def wants_one_image(self) -> bool:
        """Whether the name asks for a single picture."""
        return self._suffix == ".png" and self._config.output_type == "video"

    def problems(self, num_frames: int, way_out: str = "") -> list[str]:
        """Why so many frames cannot be written as requested; `way_out` is what else may be changed."""
        problems = []
        if self.wants_one_image and num_frames > 1:
            problems.append(
                f"--output {self._config.output} takes one image, not {num_frames} frames: "
                f"use {way_out}a .mp4, or --output_type images"
            )
        if self._config.trim_tail_frames >= num_frames:
            problems.append(f"--trim_tail_frames leaves nothing of {num_frames} frames")
        return problems

    def paths(self, seed: int, num_frames: int) -> OutputPaths:
        """Free names for one result in `folder` (with --overwrite the given name, free or not)."""
        stem = self._stem_for(seed)
        wanted = self._paths(stem, num_frames)
        may_replace = self._config.overwrite and self._stem is not None
        if may_replace:
            return replace(wanted, replaces=True)
        if not wanted.existing():
            return wanted
        for number in itertools.count(1):
            paths = self._paths(f"{stem}-{number}", num_frames)
            if not paths.existing():
                log.info(
                    "%s exists: writing %s-%d instead (--overwrite replaces)",
                    wanted.existing()[0],
                    stem,
                    number,
                )
                return paths
        raise AssertionError("unreachable")

    def rescue_paths(self, seed: int) -> OutputPaths:
        """Paths for rescued frames or latents of a result that is not written otherwise."""
        return OutputPaths(self.folder, self._stem_for(seed))

    def _stem_for(self, seed: int) -> str:
        if self._stem is not None:
            return self._stem
        now = datetime.now()
        return f"{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}_{seed}"

    def _paths(self, stem: str, num_frames: int) -> OutputPaths:
        kind = self._config.output_type
        is_image = self._suffix == ".png" or (self._suffix == "" and self._stem is None and num_frames == 1)
        makes_video = kind in {"video", "both"}
        latent_name = f"{stem}.safetensors" if self._suffix == ".safetensors" else f"{stem}{_LATENT_ENDING}"
        return OutputPaths(
            self.folder,
            stem,
            video=self.folder / f"{stem}.mp4" if makes_video and not is_image else None,
            image=self.folder / f"{stem}.png" if makes_video and is_image else None,
            frames=self.folder / stem if kind in {"images", "latent_images"} else None,
            latent=self.folder / latent_name if kind in {"latent", "both", "latent_images"} else None,
        )


def write_outputs(choose: Callable[[], OutputPaths], content: Content) -> list[Path]:
    """Write the files of one result; returns the paths written.

    Args:
        choose: gives names that are free. It is asked again where another process has taken one of them.
    Raises:
        ResourceError: something could not be written. The frames are then saved as PNG files (or, failing
            that, the latents), and the message says where.
    """
    while True:
        paths = choose()
        written: list[Path] = []
        try:
            _write_files(paths, content, written)
        except FileExistsError:
            for path in written:  # of this result, and nobody has asked for them under this name
                path.unlink()
        except WRITE_ERRORS as error:
            target = paths.video or paths.image or paths.frames or paths.latent
            kept = _rescue(paths, content)
            raise ResourceError(f"{target} could not be written: {error}\n{kept}") from error
        else:
            remove_copy(content.copy)
            return written


def write_latents(path: Path, latents: Tensor, metadata: Mapping[str, str], *, replaces: bool = True) -> None:
    """Save sampled latents [1, 16, F, H, W] for decoding later, as [16, F, H, W] float32."""
    write_tensors(path, {LATENT_KEY: latents[0].float()}, metadata, replaces=replaces)


def read_latents(path: Path) -> tuple[Tensor, dict[str, str]]:
    """A saved latent file as [1, 16, F, H, W] float32 and its metadata.

    Raises:
        ModelFileError: the file is damaged or holds something else.
    """
    tensors, metadata = read_tensors(path)
    latents = tensors.get(LATENT_KEY)
    if latents is None or latents.ndim != 4 or latents.shape[0] != LATENT_CHANNELS:
        shapes = names_in_short([f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()])
        raise ModelFileError(
            f"{path}: no saved latent: expected '{LATENT_KEY}' [16, F, H, W], found {shapes}"
        )
    if not bool(torch.isfinite(latents.float()).all()):
        raise ModelFileError(f"{path}: the latent holds numbers that are not finite")
    return latents[None].float(), metadata


def _write_files(paths: OutputPaths, content: Content, written: list[Path]) -> None:
    """Write the files in this order, each noted in `written` as soon as it is whole."""
    frames, metadata, replaces = content.frames, content.metadata, paths.replaces
    if paths.latent is not None and content.latents is not None:
        write_latents(paths.latent, content.latents, content.latent_metadata, replaces=replaces)
        written.append(paths.latent)
    if frames is None:
        return
    if paths.video is not None:
        fps, crf = content.fps, content.crf
        write_video(paths.video, frames, fps=fps, crf=crf, metadata=metadata, replaces=replaces)
        written.append(paths.video)
    if paths.image is not None:
        write_png(paths.image, frames[0], metadata, replaces=replaces)
        written.append(paths.image)
    if paths.frames is not None:
        write_frames(paths.frames, frames, metadata)
        written.append(paths.frames)


def _rescue(paths: OutputPaths, content: Content) -> str:
    """Save the result in another form, in another place if need be; returns what to tell the user."""
    frames = content.frames
    if frames is not None:
        for folder in (paths.folder, Path(tempfile.gettempdir())):
            place = _free_path(folder, paths.stem, "_frames")
            try:
                write_frames(place, frames, content.metadata)
            except WRITE_ERRORS as error:
                log.warning("%s: keeping the frames there failed too: %s", folder, error)
            else:
                remove_copy(content.copy)
                return f"The {len(frames)} frames were kept as PNG files in {place}"
    if content.latents is None:
        return "Keeping the frames in another form failed as well"
    return keep_latents(paths, content.latents, content.latent_metadata, content.copy)


def keep_latents(paths: OutputPaths, latents: Tensor, metadata: Mapping[str, str], copy: Path | None) -> str:
    """Save latents [1, 16, F, H, W] of a clip that was not written, in place of `copy`; returns a message."""
    for folder in (paths.folder, Path(tempfile.gettempdir())):
        try:
            place = write_spare_latents(replace(paths, folder=folder), _LATENT_ENDING, latents, metadata)
        except WRITE_ERRORS as error:
            log.warning("%s: keeping the latents there failed: %s", folder, error)
        else:
            remove_copy(copy)
            return _kept(place)
    return "Keeping the latents failed as well" if copy is None else _kept(copy)


def _kept(place: Path) -> str:
    return f"The latents were kept in {place}; decode them with --latent_path"


def remove_copy(copy: Path | None) -> None:
    """Delete the copy of latents that are saved elsewhere, if there is one."""
    if copy is not None:
        copy.unlink(missing_ok=True)


def write_spare_latents(
    paths: OutputPaths, ending: str, latents: Tensor, metadata: Mapping[str, str]
) -> Path:
    """Save latents under the first free of <stem><ending>, <stem>-1<ending>, ...; returns that.

    Raises:
        OSError and others: they cannot be written.
    """
    while True:
        place = _free_path(paths.folder, paths.stem, ending)
        try:
            write_latents(place, latents, metadata, replaces=False)
        except FileExistsError:  # another process was faster
            continue
        return place


def _free_path(folder: Path, stem: str, ending: str) -> Path:
    """The first of <stem><ending>, <stem>-1<ending>, ... that is not there: a rescue replaces nothing."""
    marks = ("" if number == 0 else f"-{number}" for number in itertools.count())
    return next(path for mark in marks if not _is_taken(path := folder / f"{stem}{mark}{ending}"))


def _is_taken(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a link that leads nowhere too
