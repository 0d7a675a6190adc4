"""Lists the media and captions of a dataset, with skipped items and reasons."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset.cache.names import name_key
from dataset.config.config import AnyDatasetConfig
from dataset.config.keys import nearest_key
from dataset.confinement import Confinement
from dataset.media.files import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Content, media_extensions
from dataset.places import place_mark
from modules.errors import ConfigError, DataError
from modules.messages import MAX_LINES, lines_in_short, shortened

NO_CAPTION = "no caption"
CAPTION_NOT_UTF8 = "caption is not UTF-8"
MISSING_FILE = "no such file"
NAME_NOT_UTF8 = "file name is not UTF-8"
IS_FOLDER = "is a folder"

_HALF_A_CHARACTER = "holds half a character (a lone surrogate such as \\ud800)"
_JSONL_KEYS: dict[Content, frozenset[str]] = {
    "image": frozenset({"image_path", "image_path_0", "caption", "mask_path"}),
    "video": frozenset({"video_path", "caption", "mask_path"}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceItem:
    """One image or video with its captions."""

    path: Path
    captions: tuple[str, ...]
    """At least one; each stripped of white space at both ends, and it may be empty."""
    base_name: str
    """The name its caches start with: no folder, no last extension."""
    is_frame_folder: bool = False
    """A video given as a folder of images, one per frame."""
    mask_path: Path | None = None
    """Its mask for the masked loss; None weights everything equally."""
    key: str = ""
    """Tells it from other media of the same file name: a `place_mark`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedItem:
    """A skipped media item, with the reason."""

    name: str
    """File name without its folder."""
    reason: str
    """The kind of reason, the same for all items it applies to, to count by."""
    detail: str = ""
    """Detail of this item; contains no folder."""
    is_failure: bool = False
    """The file is broken, so the run ends with exit code 3 unless --skip_bad was given."""
    key: str = ""
    """The item's, see `SourceItem`; empty in indexes of older versions."""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceListing:
    """The contents of a dataset, in a fixed order."""

    items: tuple[SourceItem, ...]
    skipped: tuple[SkippedItem, ...]
    unmatched_masks: tuple[str, ...] = ()
    """Names of masks that belong to no item."""
    notes: tuple[str, ...] = ()
    """What looks like a mistake in the JSONL file: log lines."""

    @property
    def found(self) -> int:
        """Media files seen, used or not."""
        return len(self.items) + len(self.skipped)

    @property
    def empty_captions(self) -> int:
        """Items used with nothing but empty captions."""
        return sum(not any(item.captions) for item in self.items)


def list_items(dataset: AnyDatasetConfig, *, confinement: Confinement | None = None) -> SourceListing:
    """List the media of a dataset with their captions; media are not opened.

    Args:
        confinement: refuse paths outside a folder; the paths of a JSONL file then count from its own.
    Raises:
        ConfigError: the folder or JSONL file does not exist, a JSONL line is wrong, or a path leads out.
        DataError: there is nothing to use, or two media would share one cache file.
    """
    if confinement is not None:
        confinement.check(dataset)
    if dataset.jsonl_file is not None:
        listing = _list_jsonl(dataset, dataset.jsonl_file, confinement)
    else:
        assert dataset.directory is not None  # the config has one of the two
        listing = _list_directory(dataset, dataset.directory)
    listing = _with_masks(dataset, listing)
    _refuse_shared_names(dataset, listing.items)
    if not listing.items:
        raise DataError(
            f"dataset {dataset.index} ({dataset.origin}): none of its {listing.found} media can be used:\n"
            f"{lines_in_short(listing.skipped)}"
        )
    return listing


def _list_directory(dataset: AnyDatasetConfig, directory: Path) -> SourceListing:
    if not directory.is_dir():
        kind = "is a file, not a folder" if directory.exists() else "no such folder"
        raise ConfigError(f"dataset {dataset.index} ({dataset.origin}): {directory}: {kind}")
    extensions = media_extensions(dataset.content)
    entries = sorted(directory.iterdir())
    paths = [path for path in entries if path.suffix.lower() in extensions]
    if not paths:
        raise DataError(
            f"dataset {dataset.index} ({dataset.origin}): no {dataset.content}s in {directory}; "
            f"known extensions: {' '.join(extensions)}"
        )
    beside = {_composed(path.name): path for path in entries}
    found = [
        replace(_directory_entry(path, dataset, beside), key=place_mark(dataset.cache_directory, path))
        for path in paths
    ]
    return SourceListing(
        items=tuple(entry for entry in found if isinstance(entry, SourceItem)),
        skipped=tuple(entry for entry in found if isinstance(entry, SkippedItem)),
    )


def _directory_entry(
    path: Path, dataset: AnyDatasetConfig, beside: Mapping[str, Path]
) -> SourceItem | SkippedItem:
    """The item of one file; `beside` has all files of the folder by their composed names."""
    if not _is_unicode(path.name):
        shown = path.name.encode("utf-8", "backslashreplace").decode()
        return SkippedItem(name=shown, reason=NAME_NOT_UTF8, detail="rename it", is_failure=True)
    if path.is_dir():
        detail = (
            f"subfolders are not searched; a JSONL file can name a folder of frames as a {dataset.content}"
        )
        return SkippedItem(
            name=path.name, reason=IS_FOLDER, detail=detail if dataset.content == "video" else ""
        )
    if not path.exists():
        return SkippedItem(
            name=path.name, reason=MISSING_FILE, detail="a link that leads nowhere", is_failure=True
        )
    assert dataset.caption_extension is not None  # the config refuses a folder without it
    written = path.with_suffix(dataset.caption_extension)
    caption = _read_caption(
        path, written if written.exists() else beside.get(_composed(written.name), written)
    )
    if isinstance(caption, SkippedItem):
        return caption
    captions = _caption_lines(caption) if dataset.caption_lines else (caption,)
    return SourceItem(path=path, captions=captions, base_name=path.stem)


def _composed(name: str) -> str:
    """A name however its accents are coded: macOS writes them as characters of their own."""
    return unicodedata.normalize("NFC", name)


def _with_masks(dataset: AnyDatasetConfig, listing: SourceListing) -> SourceListing:
    """Give items the masks of `mask_directory`; a JSONL line's own mask wins."""
    if dataset.mask_directory is None:
        return listing
    folder = _MaskFolder(dataset, dataset.mask_directory)
    items = tuple(
        item if item.mask_path is not None else replace(item, mask_path=folder.find(item.base_name))
        for item in listing.items
    )
    names = [*(item.base_name for item in items), *(Path(entry.name).stem for entry in listing.skipped)]
    return replace(listing, items=items, unmatched_masks=folder.unmatched(names))


class _MaskFolder:
    """The masks of a dataset's `mask_directory`, by the names of the media they belong to."""

    def __init__(self, dataset: AnyDatasetConfig, directory: Path) -> None:
        """List the folder; nothing is opened.

        Raises:
            ConfigError: there is no such folder, or it is the one with the media.
            DataError: two masks have the same base name.
        """
        where = f"dataset {dataset.index} ({dataset.origin}): mask_directory {directory}"
        if not directory.is_dir():
            raise ConfigError(
                f"{where}: {'is a file, not a folder' if directory.exists() else 'no such folder'}"
            )
        if dataset.directory is not None and dataset.directory.resolve() == directory.resolve():
            raise ConfigError(
                f"{where}: holds the {dataset.content}s; put the masks into a folder of their own"
            )
        self._paths: dict[str, Path] = {}
        problems = []
        for path in sorted(directory.iterdir()):
            if not _is_mask(path, dataset.content):
                continue
            name = path.name if path.is_dir() else path.stem
            other = self._paths.setdefault(name_key(name), path)
            if other is not path:
                problems.append(f"{where}: {other.name} and {path.name} are masks of the same name; keep one")
        if problems:
            raise DataError(problems)

    def find(self, base_name: str) -> Path | None:
        """The mask of an item; None if it has none."""
        return self._paths.get(name_key(base_name))

    def unmatched(self, base_names: Iterable[str]) -> tuple[str, ...]:
        """Names of masks that belong to none of these items."""
        known = {name_key(name) for name in base_names}
        return tuple(path.name for name, path in self._paths.items() if name not in known)


def _is_mask(path: Path, content: Content) -> bool:
    """Whether a mask of such a dataset can look like this: videos may be masked by a still or by frames."""
    if path.is_dir():
        return content == "video"
    extension = path.suffix.lower()
    return extension in IMAGE_EXTENSIONS or (content == "video" and extension in VIDEO_EXTENSIONS)


def _read_caption(media: Path, path: Path) -> str | SkippedItem:
    try:
        return _caption_text(path.read_bytes())
    except FileNotFoundError:
        return SkippedItem(name=media.name, reason=NO_CAPTION, detail=f"{path.name} does not exist")
    except UnicodeDecodeError as error:
        detail = f"{path.name}, byte {error.start}; save it as UTF-8"
        return SkippedItem(name=media.name, reason=CAPTION_NOT_UTF8, detail=detail, is_failure=True)
    except OSError as error:
        detail = f"{path.name} cannot be read: {error.strerror}"
        return SkippedItem(name=media.name, reason=NO_CAPTION, detail=detail, is_failure=True)


def _caption_text(raw: bytes) -> str:
    """The caption, with line breaks as on Linux whatever they are in the file.

    Raises:
        UnicodeDecodeError: it is not UTF-8, or only by accident: UTF-16 without its mark, whose Latin letters
            are read as themselves with a NUL beside each. A NUL here and there is part of the caption.
    """
    text = raw.decode("utf-8-sig")
    if raw and raw.count(0) * 4 >= len(raw):
        first = raw.index(0)
        raise UnicodeDecodeError("utf-8", raw, first, first + 1, "every other byte is 0")
    return re.sub("\r\n?", "\n", text).strip()


def _caption_lines(text: str) -> tuple[str, ...]:
    """One caption per line; lines without text are no captions, unless there is nothing else."""
    lines = tuple(line.strip() for line in text.split("\n") if line.strip())
    return lines or ("",)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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
            is_beside = not path.is_absolute() and not path.exists() and (self.folder / path).exists()
            return self.folder / path if is_beside else path
        path = self.folder / path
        if not self.confinement.holds(path):
            raise ValueError(f"{key} {written} leads out of {self.confinement.root} (--confine_paths)")
        return path


def _list_jsonl(dataset: AnyDatasetConfig, path: Path, confinement: Confinement | None) -> SourceListing:
    if not path.is_file():
        raise ConfigError(f"dataset {dataset.index} ({dataset.origin}): {path}: no such file")
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
    items = sorted((e for e in entries if isinstance(e, SourceItem)), key=lambda item: item.base_name)
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
    real_path = os.path.normcase(path.resolve())
    if mask is not None and not mask.exists():
        detail = f"its mask {mask.name}"
        return SkippedItem(name=path.name, reason=MISSING_FILE, detail=detail, is_failure=True), real_path
    if mask is not None and not _is_mask(mask, content):
        raise ValueError(f"mask_path {value['mask_path']} cannot be the mask of a {content}")
    if not path.exists():
        return SkippedItem(name=path.name, reason=MISSING_FILE, is_failure=True), real_path
    is_folder = path.is_dir()
    if is_folder and content == "image":
        raise ValueError(f"{keys[0]} {written} is a folder")
    if not is_folder and path.suffix.lower() not in media_extensions(content):
        raise ValueError(f"{keys[0]} {written} is no {content}; known: {' '.join(media_extensions(content))}")
    base_name = path.resolve().name if is_folder else path.stem
    item = SourceItem(
        path=path, captions=captions, base_name=base_name, is_frame_folder=is_folder, mask_path=mask
    )
    return item, real_path


def _jsonl_path(key: str, written: Any, rule: _PathRule) -> Path:
    if not isinstance(written, str) or not written.strip() or "\0" in written:
        raise ValueError(f"{key} must be a path in quotes")
    if "://" in written or written.lower().startswith(("file:", "data:")):
        raise ValueError(f"{key} is a URL; only files on this machine are read")
    if not _is_unicode(written):
        raise ValueError(_HALF_A_CHARACTER)
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
    if not all(map(_is_unicode, captions)):
        raise ValueError(_HALF_A_CHARACTER)
    return tuple(caption.strip() for caption in captions)


def _json_object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError('must be an object like {"image_path": "...", "caption": "..."}')
    return value


def _refuse_shared_names(dataset: AnyDatasetConfig, items: Iterable[SourceItem]) -> None:
    first: dict[str, SourceItem] = {}
    problems = []
    for item in items:
        other = first.setdefault(name_key(item.base_name), item)
        if other is not item:
            same = "the same base name"
            if other.base_name != item.base_name:
                same = "base names that are the same on this system"
            problems.append(
                f"dataset {dataset.index} ({dataset.origin}): {other.path} and {item.path} have {same} "
                "and would share their caches; rename one of them or put them into two datasets"
            )
    if problems:
        raise DataError(problems)
