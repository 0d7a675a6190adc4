"""Draws clips of the small world as a dataset: `python -m kandinsky5.small_world.clips OUT --shape star`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from kandinsky5.sampling.video_files import write_video
from kandinsky5.small_world.world import ALL_SCENES, COLOURS, MOTIONS, SHAPES, WORDINGS, Scene, draw
from kandinsky5.tasks import FPS
from kandinsky5.vae.video_vae import pixels_to_uint8
from modules.command_line import Parser, user_errors
from modules.errors import ConfigError
from modules.files import write_text
from modules.logs import get_logger
from modules.options import non_negative_int, positive_int

log = get_logger(__name__)


def write_clips(folder: Path, scenes: Sequence[Scene], seed: int = 0) -> list[Path]:
    """Draw one clip per scene as .mp4 with its caption beside it; the wordings take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = draw(scenes, torch.Generator().manual_seed(seed))
    paths = []
    for number, (scene, clip) in enumerate(zip(scenes, pixels, strict=True)):
        path = folder / f"{number:02d}_{scene.colour}_{scene.shape}_{scene.motion}.mp4"
        frames = pixels_to_uint8(clip).permute(1, 2, 3, 0).numpy()
        write_video(path, frames, fps=FPS, crf=1)
        caption = scene.caption(number % len(WORDINGS))
        write_text(path.with_suffix(".txt"), caption)
        paths.append(path)
    return paths


def spread_scenes(scenes: Sequence[Scene], count: int) -> list[Scene]:
    """`count` scenes in which colours and motions take turns, so that a few clips show many of both."""
    step = next(step for step in range(len(scenes) // 2 + 1, 0, -1) if math.gcd(step, len(scenes)) == 1)
    return [scenes[number * step % len(scenes)] for number in range(count)]


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors(argv):
        options = _parse(argv)
        chosen = _choose(options)
        if not chosen:
            raise ConfigError("no such scene: circles and rings do not visibly spin")
        paths = write_clips(options.out, spread_scenes(chosen, options.clips), options.seed)
        log.info("drew %d clips into %s", len(paths), options.out)


def _choose(options: argparse.Namespace) -> list[Scene]:
    """The scenes that were asked for; spinning ones only by name."""
    motions = [options.motion] if options.motion else [name for name in MOTIONS if name != "spins"]
    return [
        scene
        for scene in ALL_SCENES
        if scene.shape in (options.shape or SHAPES)
        and scene.colour in (options.colour or COLOURS)
        and scene.motion in motions
        and scene.is_visible
    ]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("python -m kandinsky5.small_world.clips", "Draw clips of the small world with captions.")
    parser.add_argument("out", type=Path, help="folder for .mp4 and .txt files")
    parser.add_argument("--clips", type=positive_int, default=12, help="how many (default: 12)")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", help="only these shapes")
    parser.add_argument("--colour", choices=tuple(COLOURS), nargs="+", help="only these colours")
    parser.add_argument("--motion", choices=tuple(MOTIONS), help="only this motion")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of places, sizes and shades")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
