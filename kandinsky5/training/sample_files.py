"""Files of training samples: their names, and what is written for each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.geometry import FPS
from kandinsky5.sampling.video_files import write_png, write_video
from kandinsky5.training.sample_pictures import read_small, write_grid, write_steps_video
from modules.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SampleNames:
    """Names of the samples of one run: the folder, and what distinguishes its files from others."""

    folder: Path
    output_name: str
    run_id: str

    def stem(self, step: int, epoch: int | None, prompt: SampledPrompt) -> str:
        """`name_000010_00_20250131120000_42`, with `e000002` in place of the step after an epoch."""
        when = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
        return f"{self.output_name}_{when}_{prompt.number:02d}_{time.strftime('%Y%m%d%H%M%S')}_{prompt.seed}"

    def grid(self, prompt: int) -> Path:
        """The picture of a prompt's samples over the steps."""
        return self.folder / f"{self.output_name}_grid_{prompt:02d}.png"

    def steps_video(self, prompt: int) -> Path:
        """The video of a prompt's samples over the steps."""
        return self.folder / f"{self.output_name}_steps_{prompt:02d}.mp4"

    def samples(self, prompt: int) -> Iterator[tuple[int, Path]]:
        """(step, file) of what this run has made of a prompt, in the order of the names."""
        for path in sorted(self.folder.iterdir()):
            # Not a glob: an output name may hold its special characters.
            is_candidate = path.name.startswith(f"{self.output_name}_") and f"_{prompt:02d}_" in path.name
            if not is_candidate or path.suffix != ".png" or path == self.grid(prompt):
                continue
            settings = _png_texts(path)
            if settings.get("run") == self.run_id and settings.get("prompt_number") == str(prompt):
                clip = path.with_suffix(".mp4")
                yield int(settings["step"]), clip if clip.is_file() else path


def _png_texts(path: Path) -> dict[str, str]:
    try:
        with Image.open(path) as image:
            return {str(key): str(value) for key, value in image.info.items()}
    except OSError as error:
        log.warning("%s cannot be read and is left out of the grid: %s", path.name, error)
        return {}


@dataclass(frozen=True, slots=True)
class SampledPrompt:
    """The prompt of a sample."""

    number: int
    """Position in the prompt file, from 0."""
    text: str
    seed: int


def write_sample(
    names: SampleNames, frames: np.ndarray, prompt: SampledPrompt, *, step: int, epoch: int | None
) -> Path:
    """Write a clip with its first frame beside it, or a single image, and renew the prompt's grid.

    Args:
        frames: uint8 [F, H, W, 3].
        epoch: the epoch that the sample is named after; None for the step.
    Returns:
        The .mp4, or the .png of a single image.
    Raises:
        OSError, av.FFmpegError: the disk or the encoder failed.
    """
    names.folder.mkdir(parents=True, exist_ok=True)
    stem = names.stem(step, epoch, prompt)
    settings = {
        "prompt": prompt.text,
        "seed": str(prompt.seed),
        "step": str(step),
        "prompt_number": str(prompt.number),
        "run": names.run_id,
    }
    if len(frames) == 1:
        path = names.folder / f"{stem}_000.png"
        write_png(path, frames[0], settings)
    else:
        path = names.folder / f"{stem}.mp4"
        write_video(path, frames, fps=FPS, metadata=settings)
        write_png(names.folder / f"{stem}.png", frames[0], settings)
    write_pictures(names, prompt, last_step=step)
    return path


def write_pictures(names: SampleNames, prompt: SampledPrompt, *, last_step: int) -> None:
    """Renew the grid and the video of a prompt's samples over the steps.

    What lies after `last_step` belongs to a part of the run that a resumed run has left.
    """
    files = {step: path for step, path in names.samples(prompt.number) if step <= last_step}
    write_pictures_of(names, prompt, files)


def write_pictures_of(names: SampleNames, prompt: SampledPrompt, files: Mapping[int, Path]) -> None:
    """The same from given files, step -> .mp4 or .png."""
    clips = read_small(files)
    if not clips:
        return
    write_grid(names.grid(prompt.number), clips, prompt.text)
    if any(len(clip.frames) > 1 for clip in clips):
        write_steps_video(names.steps_video(prompt.number), clips, prompt.text)
