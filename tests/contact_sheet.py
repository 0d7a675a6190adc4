"""Draws docs/contact_sheet.png: clips of the small random models from text, one picture and two pictures.

python tests/contact_sheet.py [OUTPUT.png]

One row per kind of task: the given pictures, then frames from the first to the last, of the generation script
itself. The weights are random, so the frames show structure and no content: a given picture comes back as the
random VAE draws it, and both clips that begin with a picture have the same first frame.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # the project's packages, when run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image, ImageDraw

from dataset.media.media import read_image
from kandinsky5.tiny_models import build_tiny_models
from kandinsky5_generate_video import main as generate

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT, FRAMES = 128, 96, 29
SHOWN = (0, 7, 14, 21, 28)
"""Frames of each clip, counted from 0."""
LABEL_HEIGHT, GAP = 14, 4
FIRST, LAST = (ROOT / "tests" / "media" / name for name in ("chelsea.jpg", "coffee.jpg"))
ROWS: tuple[tuple[str, str, tuple[Path, ...]], ...] = (
    ("text to video", "k5-tiny-t2v", ()),
    ("first frame to video", "k5-tiny-i2v", (FIRST,)),
    ("first and last frame to video", "k5-tiny-i2v", (FIRST, LAST)),
)


def make_clip(models: Path, folder: Path, task: str, given: Sequence[Path]) -> list[Image.Image]:
    """The shown frames of one clip, made by the generation script."""
    paths = ("--dit", "model/tiny.safetensors", "--vae", "vae", "--text_encoder_qwen", "text_encoder")
    paths += ("--text_encoder_clip", "text_encoder2")
    words = [word if word.startswith("--") else str(models / word) for word in paths]
    for flag, path in zip(("--image", "--image_last"), given, strict=False):
        words += [flag, str(path)]
    size = ("--width", WIDTH, "--height", HEIGHT, "--frames", FRAMES, "--steps", 10, "--seed", 1)
    words += ["--task", task, *map(str, size), "--prompt", "a rabbit stretches", "--device", "cpu"]
    generate([*words, "--output_type", "images", "--output", f"{folder}{os.sep}clip"])
    files = sorted((folder / "clip").glob("*.png"))
    return [Image.open(files[number]).convert("RGB") for number in SHOWN]


def picture(path: Path) -> Image.Image:
    """A given picture as small as a frame."""
    return Image.fromarray(read_image(path)).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def draw_sheet(output: Path) -> None:
    """Make all clips and write the sheet."""
    columns = 2 + len(SHOWN)
    row_height = LABEL_HEIGHT + HEIGHT + GAP
    sheet = Image.new("RGB", (columns * (WIDTH + GAP) + GAP, len(ROWS) * row_height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    with tempfile.TemporaryDirectory() as scratch:
        models = Path(scratch) / "models"
        build_tiny_models(models)
        for row, (label, task, given) in enumerate(ROWS):
            folder = Path(scratch) / f"row{row}"
            folder.mkdir()
            frames = make_clip(models, folder, task, given)
            top = GAP + row * row_height
            pen.text(
                (GAP, top), f"{label}: given, then frames {', '.join(str(n + 1) for n in SHOWN)}", "black"
            )
            cells = [(column, picture(path)) for column, path in enumerate(given)]
            cells += list(enumerate(frames, start=2))
            for column, image in cells:
                sheet.paste(image, (GAP + column * (WIDTH + GAP), top + LABEL_HEIGHT))
    sheet.quantize(256, dither=Image.Dither.NONE).save(output, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the contact sheet of the small models.")
    parser.add_argument("output", type=Path, nargs="?", default=ROOT / "docs" / "contact_sheet.png")
    draw_sheet(parser.parse_args().output)
