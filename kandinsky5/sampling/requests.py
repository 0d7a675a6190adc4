"""Resolves requests: fills in the task's defaults, checks or rounds sizes and frames.

No model and no torch here, so every problem is reported before anything slow starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dataset.geometry import (
    FRAMES_PER_LATENT,
    HD_LATENT_AREA,
    LATENT_CHANNELS,
    PIXELS_PER_LATENT,
    latent_frame_count,
    round_frames,
)
from dataset.media.media import probe_image, read_image
from kandinsky5.prompts import PromptSpec
from kandinsky5.sampling.images import image_clip_size
from kandinsky5.tasks import MAX_SIDE, TASKS, Task
from modules.errors import ConfigError, DataError
from modules.logs import get_logger

log = get_logger(__name__)

DEFAULT_SEED = 42
_OFFICIAL_SIZES = {
    512: {(512, 512), (512, 768), (768, 512)},
    1024: {(1024, 1024), (640, 1408), (1408, 640), (768, 1280), (1280, 768), (896, 1152), (1152, 896)},
}
"""(width, height) that the official text-to-video pipelines accept, by resolution of the task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRequest:
    """One video or image to make, every setting decided."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    """Pixels, multiples of 16, and pixel frames, 4k + 1."""
    steps: int
    guidance: float
    scheduler_scale: float
    seed: int
    image: Path | None = None
    image_last: Path | None = None
    has_own_size: bool = True
    """False: the size follows from the image, which is then scaled to it without a crop."""
    lora_multiplier: tuple[float, ...] | None = None
    """The prompt's own, as many as were given; None leaves all to the command line."""
    triggers: tuple[str, ...] = ()
    """Words of the LoRAs in use that come before the prompt."""
    where: str = ""

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(16, F, H, W)."""
        frames = latent_frame_count(self.num_frames)
        return LATENT_CHANNELS, frames, self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT

    @property
    def content(self) -> Literal["image", "video"]:
        """Which prompt template applies."""
        return "image" if self.num_frames == 1 else "video"


def resolve_request(
    spec: PromptSpec,
    task: Task,
    *,
    size_divisor: int,
    default_frames: int,
    default_negative_prompt: str,
    lora_count: int = 0,
) -> VideoRequest:
    """Fill in the task's defaults and check everything that needs no model; `PromptSpec` has the ranges.

    Sizes from a prompt file are rounded down with a log line; sizes from the command line must fit, because
    there the nearest ones can be named and typed at once. Frames are rounded down to 4k + 1 in both.

    Args:
        size_divisor: what width and height must be multiples of: 16, or 128 with NABLA attention.
        default_frames: pixel frames where the spec names none.
        default_negative_prompt: where the spec names none; an empty one in the spec stays empty.
        lora_count: how many multipliers a spec may give at most.
    Raises:
        ConfigError: with all problems of this request.
        DataError: an image cannot be decoded as a whole.
    """
    prefix = f"{spec.where}: " if spec.where else ""
    num_frames = _frames(spec.frames, default_frames, prefix)
    problems = [prefix + line for line in _image_problems(spec, task, num_frames)]
    if problems:  # a size may have to be read from the image, so its problems come first
        raise ConfigError(problems)
    _check_images(spec, prefix)
    width, height = _size(spec, task, size_divisor, prefix, problems)
    if spec.lora_multiplier is not None and len(spec.lora_multiplier) > lora_count:
        problems.append(
            f"{prefix}{len(spec.lora_multiplier)} LoRA multipliers for {lora_count} --lora_weight: "
            "at most one for each"
        )
    if problems:
        raise ConfigError(problems)
    return VideoRequest(
        prompt=(spec.prompt or "").strip(),
        negative_prompt=default_negative_prompt if spec.negative_prompt is None else spec.negative_prompt,
        width=width,
        height=height,
        num_frames=num_frames,
        steps=task.steps if spec.steps is None else spec.steps,
        guidance=task.guidance if spec.guidance is None else spec.guidance,
        scheduler_scale=spec.scheduler_scale or task.scheduler_scale,
        seed=DEFAULT_SEED if spec.seed is None else spec.seed,
        image=spec.image,
        image_last=spec.image_last,
        has_own_size=spec.image is None or spec.width is not None,
        lora_multiplier=spec.lora_multiplier,
        where=spec.where,
    )


def log_size_remarks(request: VideoRequest, task: Task) -> None:
    """Log remarks on a size that is valid but unusual."""
    size = (request.width, request.height)
    if task.is_tiny:
        return
    latent_area = request.latent_shape[2] * request.latent_shape[3]
    is_hd_size, is_hd_task = latent_area >= HD_LATENT_AREA, task.resolution >= 1024
    if is_hd_size != is_hd_task:
        twins = (task.name.removesuffix("-sd") + "-hd", task.name.removesuffix("-hd") + "-sd")
        other = next((name for name in twins if name in TASKS and name != task.name), None)
        hint = f"; {other} fits it" if other else ""
        log.warning(
            "%dx%d is %s size for --task %s%s", *size, "an HD" if is_hd_size else "an SD", task.name, hint
        )
    elif not task.is_i2v and size not in _OFFICIAL_SIZES[task.resolution]:
        official = ", ".join(f"{w}x{h}" for w, h in sorted(_OFFICIAL_SIZES[task.resolution]))
        log.info("%dx%d is not one of the sizes the model was made for: %s", *size, official)


def _frames(frames: int | None, default: int, prefix: str) -> int:
    if frames is None:
        return default
    legal = round_frames(frames)
    if legal != frames:
        log.info(
            "%s%d frames rounded down to %d (a clip has 4k+1 pixel frames; next: %d)",
            prefix, frames, legal, legal + FRAMES_PER_LATENT,
        )  # fmt: skip
    return legal


def _image_problems(spec: PromptSpec, task: Task, num_frames: int) -> list[str]:
    problems = []
    given = [("--image", spec.image), ("--image_last", spec.image_last)]
    given = [(flag, path) for flag, path in given if path is not None]
    if given and not task.is_i2v:
        names = ", ".join(name for name, other in TASKS.items() if other.is_i2v)
        problems.append(f"{given[0][0]} needs an image-to-video task, not {task.name}: {names}")
    if task.is_i2v and spec.image is None and (spec.image_last is not None or num_frames > 1):
        problems.append(f"--task {task.name} needs a first frame: --image PATH (--i PATH in a prompt line)")
    # A given frame leaves at least one other to be made.
    smallest = 1 + FRAMES_PER_LATENT * len(given)
    if given and num_frames < smallest:
        problems.append(f"--frames {num_frames}: at least {smallest} are needed with {given[-1][0]}")
    problems += [f"{flag} {path}: no such file" for flag, path in given if not path.is_file()]
    return problems


def _check_images(spec: PromptSpec, prefix: str) -> None:
    """Decode the images once: a header that can be read says nothing about the rest of a file."""
    problems = []
    for path in (spec.image, spec.image_last):
        try:
            if path is not None:
                unknown = probe_image(path).colour.unknown
                read_image(path)
                if unknown:
                    log.warning(
                        "%s%s: %s cannot be converted, so colours may be off",
                        prefix,
                        path,
                        " and ".join(unknown),
                    )
        except DataError as error:
            problems += [prefix + line for line in error.problems]
    if problems:
        raise DataError(problems)


def _size(spec: PromptSpec, task: Task, divisor: int, prefix: str, problems: list[str]) -> tuple[int, int]:
    width = _side("width", spec.width, divisor, spec.where, prefix, problems)
    height = _side("height", spec.height, divisor, spec.where, prefix, problems)
    if spec.image is None:
        return width or task.resolution, height or task.resolution
    if width is None and height is None:
        image_width, image_height = probe_image(spec.image).size
        divisor = max(divisor, task.image_size_divisor)
        height, width = image_clip_size(
            image_height, image_width, max_area=task.image_max_area, divisor=divisor
        )
        if max(height, width) > MAX_SIDE or min(height, width) < divisor:
            problems.append(
                f"{prefix}--image {spec.image}: {image_width}x{image_height} is too narrow: "
                "give --width and --height"
            )
    elif width is None or height is None:
        problems.append(f"{prefix}--width and --height go together when an image is given")
        return task.resolution, task.resolution
    return width, height


def _side(
    name: str, side: int | None, divisor: int, where: str, prefix: str, problems: list[str]
) -> int | None:
    if side is None:
        return None
    lower = side // divisor * divisor
    if lower == 0 and where:
        problems.append(
            f"{prefix}--{name} {side}: multiples of {divisor} from {divisor} to {MAX_SIDE} are possible"
        )
    elif lower != side and not where:
        nearest = [str(size) for size in (lower, lower + divisor) if 0 < size <= MAX_SIDE]
        problems.append(f"--{name} {side} is not a multiple of {divisor}; nearest: {' or '.join(nearest)}")
    elif lower != side:
        log.info("%s%s %d rounded down to %d, a multiple of %d", prefix, name, side, lower, divisor)
    return lower or divisor


def full_multipliers(given: Sequence[float], count: int) -> tuple[float, ...]:
    """One multiplier per LoRA: those given, then 1.0."""
    return (*given, *[1.0] * (count - len(given)))
