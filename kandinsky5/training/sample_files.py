"""Files of training samples: names, frames, and one growing grid image per prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataset.geometry import FPS
from kandinsky5.sampling.video_files import write_png, write_video
from modules.files import atomic_writer
from modules.logs import get_logger

log = get_logger(__name__)

_GRID_HEIGHT = 192
_GRID_GAP = 4
_LABEL_HEIGHT = 16
_FONT_SIZE = 13
_MAX_COLUMNS = 64


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
        return self.folder / f"{self.output_name}_grid_{prompt:02d}.png"

    def first_frames(self, prompt: int) -> Iterator[tuple[int, Path]]:
        """(step, picture) of what this run has made of a prompt, in the order of the names."""
        for path in sorted(self.folder.iterdir()):
            # Not a glob: an output name may hold its special characters.
            is_candidate = path.name.startswith(f"{self.output_name}_") and f"_{prompt:02d}_" in path.name
            if not is_candidate or path.suffix != ".png" or path == self.grid(prompt):
                continue
            settings = _png_texts(path)
            if settings.get("run") == self.run_id and settings.get("prompt_number") == str(prompt):
                yield int(settings["step"]), path


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
    write_grid(names, prompt.number, last_step=step)
    return path


def write_grid(names: SampleNames, prompt_number: int, *, last_step: int) -> None:
    """Put the first frames of a prompt's samples side by side, one column per step.

    What lies after `last_step` belongs to a part of the run that a resumed run has left.
    """
    columns = {step: path for step, path in names.first_frames(prompt_number) if step <= last_step}
    steps = _spread(sorted(columns), _MAX_COLUMNS)
    pictures = [_thumbnail(columns[step]) for step in steps]
    width = sum(picture.width + _GRID_GAP for picture in pictures) - _GRID_GAP
    grid = Image.new("RGB", (width, _LABEL_HEIGHT + _GRID_HEIGHT), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(_FONT_SIZE)
    left = 0
    for step, picture in zip(steps, pictures, strict=True):
        label = f"step {step}"
        if font.getlength(label) > picture.width - 4:  # a narrow picture: only the number is sure to fit
            label = str(step)
        draw.text((left + 2, _LABEL_HEIGHT / 2), label, "black", font, anchor="lm")
        grid.paste(picture, (left, _LABEL_HEIGHT))
        left += picture.width + _GRID_GAP
    with atomic_writer(names.grid(prompt_number)) as stream:
        grid.save(stream, format="png")


def _spread(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values, evenly chosen, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[index * (len(values) - 1) // (count - 1)] for index in range(count)]


def _thumbnail(path: Path) -> Image.Image:
    with Image.open(path) as image:
        width = max(1, round(image.width * _GRID_HEIGHT / image.height))
        return image.convert("RGB").resize((width, _GRID_HEIGHT))
