"""Lists the media and captions of a JSONL file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset.config.config import AnyDatasetConfig
from dataset.config.keys import nearest_key
from dataset.confinement import Confinement
from dataset.media.files import Content, media_extensions, natural_order
from dataset.places import place_mark
from dataset.sources.folder import irregular_item
from dataset.sources.items import MISSING_FILE, SkippedItem, SourceItem, SourceListing, is_unicode
from dataset.sources.masks import is_mask
from modules.errors import ConfigError, DataError
from modules.messages import MAX_LINES, shortened
from modules.parsing import ParseError, parse_json
from modules.path_kinds import file_problem, name_length_problem, path_kind

_HALF_A_CHARACTER = "holds half a character (a lone surrogate such as \\ud800)"
_JSONL_KEYS: dict[Content, frozenset[str]] = {
    "image": frozenset({"image_path", "image_path_0", "caption", "mask_path"}),
    "video": frozenset({"video_path", "caption", "mask_path"}),
}


def _exists(path: Path) -> bool:
    return path_kind(path).kind not in {"missing", "unreachable"}


@dataclass(frozen=True, slots=True)
class _PathRule:
    """How the paths of a JSONL file are understood."""

    folder: Path
    """The file's own."""
    confinement: Confinement | None

    def resolve(self, key: str, written: str) -> Path:
        """Relative paths count from the working directory as in musubi-tuner, else from the JSONL's folder.

        Raises:
            ValueError: confined, and the path or a frame in it leads out, by itself or through a link.
        """
        path = Path(written)
        if self.confinement is None:
            is_beside = not path.is_absolute() and not _exists(path) and _exists(self.folder / path)
            return self.folder / path if is_beside else path
        path = self.folder / path
        if not self.confinement.holds(path):
            raise ValueError(f"{key} {written} leads out of {self.confinement.root} (--confine_paths)")
        return path


def list_jsonl(dataset: AnyDatasetConfig, path: Path, confinement: Confinement | None) -> SourceListing:
    problem = file_problem(path)
    if problem is not None:
        raise ConfigError(f"dataset {dataset.index} ({dataset.origin}): {path}: {problem}")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    problems: list[str] = []
    entries: list[SourceItem | SkippedItem] = []
    first_line: dict[str, int] = {}
    unknown: dict[str, int] = {}
    rule = _PathRule(path.parent, confinement)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = _json_object(line)
            entry, real_path = _jsonl_entry(value, rule, dataset.content)
        except ValueError as error:
            problems.append(f"{path} line {number}: {error}")
            continue
        other = first_line.setdefault(real_path, number)
        if other != number:
            problems.append(f"{path} line {number}: the same {dataset.content} as in line {other}")
        entries.append(replace(entry, key=place_mark(dataset.cache_directory, Path(real_path))))
        for name in value.keys() - _JSONL_KEYS[dataset.content]:
            unknown.setdefault(name, number)
    if problems:
        raise ConfigError(shortened(problems, MAX_LINES))
    if not entries:
        raise DataError(f"dataset {dataset.index} ({dataset.origin}): {path} lists no {dataset.content}s")
    items = sorted(
        (e for e in entries if isinstance(e, SourceItem)),
        key=lambda item: natural_order(Path(item.base_name)),
    )
    skipped = tuple(e for e in entries if isinstance(e, SkippedItem))
    notes = tuple(shortened([*_unknown_keys(path, unknown, dataset.content)], MAX_LINES))
    return SourceListing(items=tuple(items), skipped=skipped, notes=notes)


def _unknown_keys(path: Path, first_line: Mapping[str, int], content: Content) -> Iterator[str]:
    for key, number in sorted(first_line.items()):
        if key.startswith("control_path"):  # of other models, as in musubi-tuner
            continue
        hint = nearest_key(key, _JSONL_KEYS[content])
        guess = f"; did you mean {hint}?" if hint else ""
        shown = json.dumps(key, ensure_ascii=True)
        yield f"{path} line {number}: {shown} is no key of a JSONL line and is not used{guess}"


def _jsonl_entry(
    value: dict[str, Any], rule: _PathRule, content: Content
) -> tuple[SourceItem | SkippedItem, str]:
    """The item of one line, and its path without links, by which repeated lines are found."""
    keys = ("video_path",) if content == "video" else ("image_path", "image_path_0")
    written = next((value[key] for key in keys if key in value), None)
    if written is None:
        raise ValueError(f"has no {keys[0]}")
    path = _jsonl_path(keys[0], written, rule)
    captions = _jsonl_captions(value)
    mask = None if value.get("mask_path") is None else _jsonl_path("mask_path", value["mask_path"], rule)
    real_path = os.path.normcase(os.path.realpath(path))
    found = path_kind(path)
    if mask is not None and not _exists(mask):
        detail = f"its mask {mask.name}"
        return SkippedItem(name=path.name, reason=MISSING_FILE, detail=detail, is_failure=True), real_path
    if mask is not None and not is_mask(mask, content):
        raise ValueError(f"mask_path {value['mask_path']} cannot be the mask of a {content}")
    if found.kind not in {"file", "folder"}:
        return irregular_item(path), real_path
    is_folder = found.kind == "folder"
    if is_folder and content == "image":
        raise ValueError(f"{keys[0]} {written} is a folder")
    if not is_folder and path.suffix.lower() not in media_extensions(content):
        raise ValueError(f"{keys[0]} {written} is no {content}; known: {' '.join(media_extensions(content))}")
    base_name = Path(os.path.realpath(path)).name if is_folder else path.stem
    item = SourceItem(
        path=path, captions=captions, base_name=base_name, is_frame_folder=is_folder, mask_path=mask
    )
    return item, real_path


def _jsonl_path(key: str, written: Any, rule: _PathRule) -> Path:
    if not isinstance(written, str) or not written.strip() or "\0" in written:
        raise ValueError(f"{key} must be a path in quotes")
    if "://" in written or written.lower().startswith(("file:", "data:")):
        raise ValueError(f"{key} is a URL; only files on this machine are read")
    if not is_unicode(written):
        raise ValueError(_HALF_A_CHARACTER)
    too_long = name_length_problem(Path(written))
    if too_long is not None:
        raise ValueError(f"{key} {too_long}")
    return rule.resolve(key, written)


def _jsonl_captions(value: dict[str, Any]) -> tuple[str, ...]:
    if "caption" not in value:
        raise ValueError("has no caption")
    written = value["caption"]
    captions = written if isinstance(written, list) else [written]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(
            'caption must be a string in quotes or a list of strings: ["a cat", "a cat on a sofa"]'
        )
    if not all(map(is_unicode, captions)):
        raise ValueError(_HALF_A_CHARACTER)
    return tuple(caption.strip() for caption in captions)


def _json_object(line: str) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ParseError as error:
        raise ValueError(str(error).removeprefix("line 1, ")) from error
    if not isinstance(value, dict):
        raise ValueError('must be an object like {"image_path": "...", "caption": "..."}')
    return value
