"""One contact sheet and one HTML page of clips without and with a LoRA, judged.

python -m kandinsky5.small_world.page OUT --taught CLIPS --without FOLDER --with FOLDER
"""

from __future__ import annotations

import argparse
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kandinsky5.small_world.judge import NOTHING, read_clip
from kandinsky5.small_world.score import Judged, Shares, judge_folder
from kandinsky5.vae.video_vae import pixels_to_uint8
from modules.command_line import Parser, user_errors
from modules.files import atomic_writer, write_text
from modules.logs import get_logger

log = get_logger(__name__)

SHEET_NAME = "contact_sheet.png"
PAGE_NAME = "index.html"

_FRAMES_SHOWN = 5
_CELL = 96
_GAP = 4
_LINE = 18
_FONT_SIZE = 13

_STYLE = """
body { font: 16px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } th, td { padding: .4em .8em; text-align: left; vertical-align: middle; }
tr + tr { border-top: 1px solid #ddd; }
video { width: 128px; height: 128px; border-radius: 4px; display: block; }
.yes { color: #0a6b2d; } .no { color: #a61b1b; } .taught { display: flex; flex-wrap: wrap; gap: .5em; }
.taught video { width: 80px; height: 80px; }
"""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same prompts and seeds without and with the LoRA, and what the LoRA was taught with."""

    taught: Sequence[Path]
    without: Sequence[Judged]
    with_lora: Sequence[Judged]

    def pairs(self) -> list[tuple[Judged, Judged]]:
        """Clips of one prompt side by side, in order."""
        waiting: dict[str, list[Judged]] = {}
        for item in self.with_lora:
            waiting.setdefault(item.prompt, []).append(item)
        return [(item, waiting[item.prompt].pop(0)) for item in self.without if waiting.get(item.prompt)]


def said(item: Judged) -> str:
    """The judge's verdict as text."""
    verdict = item.verdict
    if verdict.shape == NOTHING:
        return "no clear shape"
    return f"{verdict.colour} {verdict.shape}, {verdict.motion}"


def is_shown(item: Judged) -> bool:
    """Whether the clip shows the prompt."""
    return item.verdict.matches(item.scene)


def contact_sheet(comparison: Comparison) -> Image.Image:
    """Five frames per clip, one row per prompt: left without, right with the LoRA."""
    pairs = comparison.pairs()
    strip = _FRAMES_SHOWN * (_CELL + _GAP)
    row = _CELL + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (2 * strip + 3 * _GAP, len(pairs) * row + _LINE + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for column, title in enumerate(("without the LoRA", "with the LoRA")):
        pen.text((_GAP + column * (strip + _GAP), 1), title, fill="black", font=font)
    for number, pair in enumerate(pairs):
        top = _LINE + number * row
        pen.text((_GAP, top), f'"{pair[0].prompt}"', fill="black", font=font)
        for column, item in enumerate(pair):
            left = _GAP + column * (strip + _GAP)
            for index, frame in enumerate(_frames(read_clip(item.path))):
                sheet.paste(frame, (left + index * (_CELL + _GAP), top + _LINE))
            words = f"{'shown' if is_shown(item) else 'not shown'}: {said(item)}"
            fill = "#0a6b2d" if is_shown(item) else "#a61b1b"
            pen.text((left, top + _LINE + _CELL), words, fill=fill, font=font)
    return sheet


def _frames(clip: Tensor) -> list[Image.Image]:
    """[3, F, H, W] -> evenly spaced frames, enlarged."""
    numbers = torch.linspace(0, clip.shape[1] - 1, _FRAMES_SHOWN).round().long()
    pixels = pixels_to_uint8(clip[:, numbers]).permute(1, 2, 3, 0).numpy()
    return [Image.fromarray(frame).resize((_CELL, _CELL), Image.Resampling.BICUBIC) for frame in pixels]


def html_page(comparison: Comparison, folder: Path) -> str:
    """The page, without scripts; clips are linked relative to `folder`."""
    rows = "\n".join(
        f"<tr><td>{html.escape(before.prompt)}</td>{_cell(before, folder)}{_cell(after, folder)}</tr>"
        for before, after in comparison.pairs()
    )
    taught = "".join(_video(path, folder) for path in comparison.taught)
    before, after = Shares.of(comparison.without), Shares.of(comparison.with_lora)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What the LoRA was taught</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>What the LoRA was taught</h1>
<p>A small Kandinsky model knows a drawn world: shapes, colours and motions. A LoRA was trained on these
{len(comparison.taught)} clips of something it had not seen:</p>
<div class="taught">{taught}</div>
<p>The same prompts and seeds without and with the LoRA. A judge by arithmetic names shape, colour and
motion: all three are as asked for in <b>{before.all_three:.0%}</b> of the clips without and in
<b>{after.all_three:.0%}</b> with the LoRA.</p>
<table><tr><th>prompt</th><th>without</th><th>with the LoRA</th></tr>
{rows}
</table>
</body></html>
"""


def _cell(item: Judged, folder: Path) -> str:
    kind, mark = ("yes", "&#10003;") if is_shown(item) else ("no", "&#10007;")
    return f'<td>{_video(item.path, folder)}<span class="{kind}">{mark} {html.escape(said(item))}</span></td>'


def _video(path: Path, folder: Path) -> str:
    source = html.escape(Path(os.path.relpath(path, folder)).as_posix(), quote=True)
    return f'<video src="{source}" autoplay loop muted playsinline></video>'


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors(argv):
        options = _parse(argv)
        comparison = Comparison(
            sorted(options.taught.glob("*.mp4")),
            judge_folder(options.without),
            judge_folder(options.with_lora),
        )
        options.out.mkdir(parents=True, exist_ok=True)
        with atomic_writer(options.out / SHEET_NAME) as stream:
            contact_sheet(comparison).save(stream, format="png", optimize=True)
        page = options.out / PAGE_NAME
        write_text(page, html_page(comparison, options.out))
        log.info("wrote %s and %s", page, options.out / SHEET_NAME)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m kandinsky5.small_world.page", "Compare clips without and with a LoRA on one page."
    )
    parser.add_argument("out", type=Path, help=f"folder for {PAGE_NAME} and {SHEET_NAME}")
    parser.add_argument("--taught", type=Path, required=True, help="the folder of training clips")
    parser.add_argument("--without", type=Path, required=True, help="generated without the LoRA")
    parser.add_argument("--with", dest="with_lora", type=Path, required=True, help="generated with the LoRA")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
