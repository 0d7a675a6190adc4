"""`--preview`: one page that shows every clip as it would be encoded, with what `--check` found.

No scripts: the choice of a group and of an order are radio buttons and style rules. Captions and names are
anybody's text, so everything is escaped, and the page may load nothing but its own pictures.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.clips import PlannedClip
from dataset.config.config import AnyDatasetConfig
from dataset.geometry import size_label
from dataset.media.files import natural_order
from dataset.sources.items import SkippedItem
from kandinsky5.caching.check import Finding
from modules.errors import ConfigError
from modules.files import atomic_writer, make_writable_folder, write_text
from modules.messages import visible, visible_name
from modules.path_kinds import path_kind

PAGE_NAME = "index.html"
PICTURE_FOLDER = "pictures"
_MARK = '<meta name="generator" content="kandinsky5 preview">'
_POLICY = "default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'"
_SIDE = 320
"""Longest side of a picture on the page."""
_FINE = "nothing found"

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5em; color: #1c2024; background: #fff; }
h1 { font-size: 1.4em; margin: 0 0 .3em; } p { margin: .3em 0; }
input { position: absolute; opacity: 0; }
nav { margin: .4em 0; } nav b { display: inline-block; min-width: 5em; }
label { display: inline-block; padding: .15em .7em; margin: .15em; cursor: pointer; }
label { border: 1px solid #ccd; border-radius: 1em; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(20em, 1fr)); gap: 1em; margin: 1em 0; }
article { border: 1px solid #ccd; border-radius: 6px; padding: .7em; overflow-wrap: anywhere; }
article.skipped { background: #fff5f4; } article.warned { background: #fffaea; }
.pictures { display: flex; gap: 3px; }
.pictures img { min-width: 0; flex: 1; height: auto; object-fit: contain; }
h2 { font-size: 1em; margin: .4em 0 .2em; } .facts { color: #556; font-size: .9em; }
.caption { white-space: pre-wrap; margin: .4em 0; max-height: 9em; overflow: auto; }
.caption.empty { color: #889; font-style: italic; }
ul { margin: .3em 0; padding-left: 1.2em; color: #8a3b12; }
"""
_ORDERS = ("name", "reason", "frames", "bucket")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Card:
    """One clip or skipped item on the page."""

    name: str
    groups: tuple[str, ...]
    """The kinds of what was found, or why it is skipped."""
    body: str
    """HTML."""
    style: str
    frames: int = 0
    bucket: str = ""


class PreviewPage:
    """Collects clips and skipped items, then writes the page; pictures are written at once.

    Raises:
        ConfigError: the folder holds media of a dataset, or a page that is not ours.
        ResourceError: it cannot be written.
    """

    def __init__(self, folder: Path, datasets: Sequence[AnyDatasetConfig]) -> None:
        check_preview_folder(folder, datasets)
        make_writable_folder(folder, "--preview")
        self._folder = folder
        self._cards: list[_Card] = []
        self._num_pictures = 0

    def add_clip(
        self, dataset: AnyDatasetConfig, clip: PlannedClip, pixels: np.ndarray, found: Sequence[Finding]
    ) -> None:
        """Add a clip: pixels uint8 [F_px, H_px, W_px, 3] as they would be encoded."""
        bucket = size_label(*clip.crop, clip.num_frames)
        facts = [
            f"dataset {dataset.index}",
            f"source {clip.source_size[0]}x{clip.source_size[1]}",
            f"bucket {bucket}",
        ]
        if not clip.is_image:
            facts.append(f"frames {clip.start} to {clip.start + clip.num_frames - 1}")
            own_rate = clip.video.fps if clip.video is not None else None
            rate = "no rate of its own" if own_rate is None else f"{float(own_rate):.5g} frames a second"
            facts.append(rate if clip.fps == "all" else f"{rate}, frames chosen {clip.fps}")
        captions = clip.item.captions if any(clip.item.captions) else ("",)
        body = (
            f'<div class="pictures">{self._pictures(pixels)}</div>{_title(clip.item.name)}'
            f'<div class="facts">{html.escape(" · ".join(facts))}</div>'
            f"{''.join(map(_caption, captions))}{_findings(found)}"
        )
        groups = tuple(dict.fromkeys(finding.kind for finding in found)) or (_FINE,)
        style = "warned" if found else "fine"
        self._cards.append(
            _Card(
                name=clip.item.name,
                groups=groups,
                body=body,
                style=style,
                frames=clip.num_frames,
                bucket=bucket,
            )
        )

    def add_skipped(self, dataset: AnyDatasetConfig, entries: Iterable[SkippedItem]) -> None:
        """Add items that are not used, each once."""
        for entry in dict.fromkeys(entries):
            self._add_skipped(dataset, entry)

    def _add_skipped(self, dataset: AnyDatasetConfig, entry: SkippedItem) -> None:
        detail = f"<ul><li>{_text(entry.detail)}</li></ul>" if entry.detail else ""
        body = (
            f'{_title(entry.name)}<div class="facts">dataset {dataset.index} · not used</div>'
            f"<p><b>{_text(entry.reason)}</b></p>{detail}"
        )
        self._cards.append(
            _Card(name=entry.name, groups=(f"skipped: {entry.reason}",), body=body, style="skipped")
        )

    def write(self) -> Path:
        """Write the page; returns its path."""
        path = self._folder / PAGE_NAME
        write_text(path, _page(self._cards))
        return path

    def _pictures(self, pixels: np.ndarray) -> str:
        """First, middle and last frame as files beside the page."""
        last = len(pixels) - 1
        return "".join(self._picture(pixels[number]) for number in sorted({0, last // 2, last}))

    def _picture(self, frame: np.ndarray) -> str:
        self._num_pictures += 1
        name = f"{PICTURE_FOLDER}/{self._num_pictures:06d}.jpg"
        picture = Image.fromarray(frame)
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        with atomic_writer(self._folder / name) as stream:
            picture.save(stream, format="jpeg", quality=88)
        return f'<img src="{name}" width="{picture.width}" height="{picture.height}" alt="" loading="lazy">'


def check_preview_folder(folder: Path, datasets: Sequence[AnyDatasetConfig]) -> None:
    """Refuse a folder that is in use for something else.

    Raises:
        ConfigError: its pictures would be taken for media, or a page would be replaced that is not ours.
    """
    place = Path(folder).resolve() if path_kind(folder).kind == "folder" else Path(folder).absolute()
    for dataset in datasets:
        for source in (dataset.directory, dataset.mask_directory):
            if source is None:
                continue
            top = source.absolute()
            if place in (top, top / PICTURE_FOLDER) or (dataset.recursive and place.is_relative_to(top)):
                raise ConfigError(
                    f"--preview {folder}: dataset {dataset.index} takes media from there; give another folder"
                )
    page = folder / PAGE_NAME
    found = path_kind(page).kind
    if found == "missing":
        return
    if found != "file" or _MARK not in page.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"--preview {folder}: holds a {PAGE_NAME} of something else; give another folder")


def _text(text: str) -> str:
    """Escaped, and nothing in it turns the direction of the line."""
    return html.escape(visible(text))


def _title(name: str) -> str:
    return f"<h2>{html.escape(visible_name(name))}</h2>"


def _caption(caption: str) -> str:
    if not caption:
        return '<div class="caption empty">empty caption</div>'
    return f'<div class="caption" dir="auto">{_text(caption)}</div>'


def _findings(found: Sequence[Finding]) -> str:
    if not found:
        return ""
    lines = (_text(f"{f.kind}: {f.detail}" if f.detail else f.kind) for f in found)
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"


def _page(cards: Sequence[_Card]) -> str:
    counts = Counter(group for card in cards for group in card.groups)
    groups = sorted(counts, key=lambda group: (group == _FINE, not group.startswith("skipped"), group))
    numbers = {group: number for number, group in enumerate(groups)}
    places = _places(cards, numbers)
    show = [("all", f"all ({len(cards)})"), *((f"g{numbers[g]}", f"{g} ({counts[g]})") for g in groups)]
    sort = [(f"by-{order}", order) for order in _ORDERS]
    rules = [f"#g{n}:checked ~ main article:not(.g{n}) {{ display: none; }}" for n in numbers.values()]
    rules += [f"#by-{order}:checked ~ main article {{ order: var(--{order}); }}" for order in _ORDERS]
    rules += [
        f"#{name}:checked ~ nav label[for={name}] {{ background: #1c4f8a; color: #fff; }}\n"
        f"#{name}:focus-visible ~ nav label[for={name}] {{ outline: 2px solid #e90; }}"
        for name, _ in (*show, *sort)
    ]
    style = "\n".join(rules)
    radios = _radios("show", show) + _radios("sort", sort)
    articles = "\n".join(_article(card, numbers, places[number]) for number, card in enumerate(cards))
    skipped = sum(card.style == "skipped" for card in cards)
    warned = sum(card.style == "warned" for card in cards)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Dataset preview</title>{_MARK}
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width">
<style>{_STYLE}{style}</style></head><body>
{radios}
<h1>Dataset preview</h1>
<p>{len(cards) - skipped} clips and images as they would be encoded: first, middle and last frame after
turning, resizing, cropping and colour conversion. {warned} of them with a remark; {skipped} items are not
used.</p>
<nav><b>show</b>{_labels(show)}</nav>
<nav><b>sort by</b>{_labels(sort)}</nav>
<main>
{articles}
</main>
</body></html>
"""


def _places(cards: Sequence[_Card], numbers: dict[str, int]) -> list[dict[str, int]]:
    """For each card its place in every order."""
    keys = {
        "name": lambda card: natural_order(Path(card.name)),
        "reason": lambda card: (min(numbers[group] for group in card.groups), natural_order(Path(card.name))),
        "frames": lambda card: (-card.frames, natural_order(Path(card.name))),
        "bucket": lambda card: (natural_order(Path(card.bucket or "~")), natural_order(Path(card.name))),
    }
    places: list[dict[str, int]] = [{} for _ in cards]
    for order, key in keys.items():
        for place, number in enumerate(sorted(range(len(cards)), key=lambda n: key(cards[n]))):
            places[number][order] = place
    return places


def _article(card: _Card, numbers: dict[str, int], places: dict[str, int]) -> str:
    classes = " ".join([card.style, *(f"g{numbers[group]}" for group in card.groups)])
    style = "; ".join(f"--{order}: {place}" for order, place in places.items())
    return f'<article class="{classes}" style="{style}">{card.body}</article>'


def _radios(group: str, choices: Sequence[tuple[str, str]]) -> str:
    return "".join(
        f'<input type="radio" name="{group}" id="{name}"{" checked" if number == 0 else ""}>'
        for number, (name, _) in enumerate(choices)
    )


def _labels(choices: Sequence[tuple[str, str]]) -> str:
    return "".join(f'<label for="{name}">{_text(words)}</label>' for name, words in choices)
