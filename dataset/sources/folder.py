"""Lists the media and captions of a folder: what looks like media is used, or named with a reason."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dataset.cache.names import PREVIEW_FOLDER
from dataset.config.config import AnyDatasetConfig
from dataset.media.files import Content, is_hidden, media_extensions, media_kind, natural_order
from dataset.places import place_mark
from dataset.sources.captions import caption_lines, read_caption
from dataset.sources.items import (
    IS_FOLDER,
    MISSING_FILE,
    NAME_NOT_UTF8,
    NOT_A_FILE,
    OTHER_CONTENT,
    UNKNOWN_FORMAT,
    SkippedItem,
    SourceItem,
    SourceListing,
    composed_name,
    is_unicode,
)
from modules.errors import ConfigError, DataError
from modules.messages import counted, names_in_short
from modules.path_kinds import missing_problem, path_kind


def check_folder(directory: Path, what: str) -> None:
    """Refuse what is no folder.

    Args:
        what: how the message names it.
    Raises:
        ConfigError: there is no such folder, or it cannot be listed.
    """
    found = path_kind(directory)
    if found.kind == "file":
        raise ConfigError(f"{what}: is a file, not a folder")
    if found.kind != "folder":
        raise ConfigError(f"{what}: {missing_problem(directory, 'folder') or found.words}")
    try:
        next(directory.iterdir(), None)
    except OSError as error:
        raise ConfigError(f"{what}: cannot be listed: {error.strerror}") from error


def list_folder(
    dataset: AnyDatasetConfig, directory: Path, read_elsewhere: frozenset[Content]
) -> SourceListing:
    """The media of a folder.

    Args:
        read_elsewhere: what other datasets read from this folder: it is not missed here.
    Raises:
        ConfigError: there is no such folder.
        DataError: it holds nothing that looks like media.
    """
    where = f"dataset {dataset.index} ({dataset.origin})"
    check_folder(directory, f"{where}: {directory}")
    folders = [*media_folders(dataset, directory)]
    found: list[SourceItem | SkippedItem] = []
    notes: list[str] = []
    hidden: list[Path] = []
    for folder in folders:
        entries = sorted(folder.iterdir(), key=natural_order)
        hidden += (path for path in entries if is_hidden(path) and _looks_meant(path, dataset))
        contents = _Folder(dataset, [path for path in entries if not is_hidden(path)], read_elsewhere)
        prefix = folder_prefix(directory, folder)
        found += (
            replace(_prefixed(entry, prefix), key=place_mark(dataset.cache_directory, path))
            for path, entry in contents.entries()
        )
        notes += (f"dataset {dataset.index}: {prefix}{note}" for note in contents.notes())
    if not found:
        raise DataError(
            f"{where}: no {dataset.content}s in {directory}; known extensions: "
            f"{' '.join(media_extensions(dataset.content))}"
        )
    notes += (f"dataset {dataset.index}: {note}" for note in _hidden_note(hidden))
    return SourceListing(
        items=tuple(entry for entry in found if isinstance(entry, SourceItem)),
        skipped=tuple(entry for entry in found if isinstance(entry, SkippedItem)),
        notes=tuple(notes),
    )


def media_folders(dataset: AnyDatasetConfig, top: Path) -> Iterator[Path]:
    """The folder of a dataset and, if it is recursive, all below it in a fixed order.

    Hidden folders, those of caches, masks and previews, and what cannot be listed are left out; a folder that
    links lead to again is searched once.
    """
    own = {os.path.realpath(path) for path in (dataset.cache_directory, dataset.mask_directory) if path}
    seen = {os.path.realpath(top)}
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        yield folder
        below = sorted(folder.iterdir(), key=natural_order, reverse=True) if dataset.recursive else ()
        for path in below:
            real = os.path.realpath(path)
            if path_kind(path).kind != "folder" or is_hidden(path) or path.name == PREVIEW_FOLDER:
                continue
            if real not in seen | own and os.access(path, os.R_OK | os.X_OK):
                seen.add(real)
                waiting.append(path)


def folder_prefix(top: Path, folder: Path) -> str:
    """What the names of a subfolder's items start with, so that their caches differ: "day1~shots~"."""
    return "".join(f"{part}~" for part in folder.relative_to(top).parts)


def _prefixed(entry: SourceItem | SkippedItem, prefix: str) -> SourceItem | SkippedItem:
    if isinstance(entry, SourceItem):
        return replace(entry, base_name=prefix + entry.base_name)
    return replace(entry, name=prefix + entry.name)


def _looks_meant(path: Path, dataset: AnyDatasetConfig) -> bool:
    """Whether a hidden file would be media or a caption if it were not hidden."""
    is_caption = path.suffix.lower() == (dataset.caption_extension or "").lower()
    return is_caption or media_kind(path, dataset.content) is not None


def _hidden_note(hidden: Sequence[Path]) -> Iterator[str]:
    if hidden:
        count = counted(len(hidden), "hidden file is", "hidden files are")
        yield f"{count} left out: {names_in_short([path.name for path in hidden])}"


class _Folder:
    """The visible entries of one folder, sorted into media, captions and others."""

    def __init__(
        self, dataset: AnyDatasetConfig, entries: Sequence[Path], read_elsewhere: frozenset[Content]
    ) -> None:
        assert dataset.caption_extension is not None  # the config refuses a folder without it
        self._dataset = dataset
        self._extension = dataset.caption_extension
        self._read_elsewhere = read_elsewhere
        self._captions = CaptionFiles(entries, self._extension)
        self._others = [path for path in entries if path not in self._captions]
        self._stems = {
            composed_name(path.stem)
            for path in self._others
            if media_kind(path, dataset.content) == dataset.content
        }

    def entries(self) -> Iterator[tuple[Path, SourceItem | SkippedItem]]:
        """Every file that is meant as an item, used or skipped; what is neither is not among them."""
        for path in self._others:
            entry = self._entry(path)
            if entry is not None:
                yield path, entry

    def notes(self) -> Iterator[str]:
        """Captions of nothing, and subfolders that hold media."""
        stems = {composed_name(path.stem) for path in self._others}
        alone = [
            path.name
            for path in self._captions.paths
            if composed_name(self._captions.base(path)) not in stems
        ]
        if alone:
            count = counted(len(alone), "caption file belongs", "caption files belong")
            yield f"{count} to no {self._dataset.content} here: {names_in_short(alone)}"
        if self._dataset.recursive:
            return
        folders = [path.name for path in self._others if self._is_folder_of_media(path)]
        if folders:
            count = counted(len(folders), "subfolder", "subfolders")
            yield (
                f"{count} with {self._dataset.content}s, not searched without recursive = true: "
                f"{names_in_short(folders)}"
            )

    def _is_folder_of_media(self, path: Path) -> bool:
        if path_kind(path).kind != "folder" or path.name == PREVIEW_FOLDER:
            return False
        own = {self._dataset.cache_directory, self._dataset.mask_directory}
        try:
            if any(path.samefile(folder) for folder in own if folder is not None and folder.exists()):
                return False
            inside = list(path.iterdir())
        except OSError:  # not to be listed: nothing is known about it
            return False
        content = self._dataset.content
        return any(media_kind(entry, content) == content and not is_hidden(entry) for entry in inside)

    def _entry(self, path: Path) -> SourceItem | SkippedItem | None:
        kind = media_kind(path, self._dataset.content)
        has_caption = self._captions.find(path) is not None
        if kind == self._dataset.content:
            return self._item(path)
        if path_kind(path).kind == "folder":
            return _skipped_folder(path, self._dataset.content) if has_caption else None
        is_shared = composed_name(path.stem) in self._stems
        if kind == "unread":
            return _skipped_format(path)
        if is_shared or (kind is None and not has_caption):
            return None  # a preview or a settings file beside an item, or something else altogether
        if kind is None:
            return _skipped_format(path)
        if kind in self._read_elsewhere:
            return None
        return SkippedItem(name=_shown(path), reason=OTHER_CONTENT[kind])

    def _item(self, path: Path) -> SourceItem | SkippedItem:
        if not is_unicode(path.name):
            return SkippedItem(name=_shown(path), reason=NAME_NOT_UTF8, detail="rename it", is_failure=True)
        found = path_kind(path)
        if found.kind == "folder":
            return _skipped_folder(path, self._dataset.content)
        if found.kind != "file":
            return irregular_item(path)
        beside = self._captions.find(path) or path.with_suffix(self._extension)
        caption = read_caption(path, beside)
        if isinstance(caption, SkippedItem):
            return caption
        captions = caption_lines(caption) if self._dataset.caption_lines else (caption,)
        return SourceItem(path=path, captions=captions, base_name=path.stem)


def irregular_item(path: Path) -> SkippedItem:
    """For a path that leads to no file and no folder."""
    found = path_kind(path)
    reason = MISSING_FILE if found.kind == "missing" else NOT_A_FILE
    detail = "" if found.words == reason else found.words
    return SkippedItem(name=_shown(path), reason=reason, detail=detail, is_failure=True)


def _skipped_folder(path: Path, content: Content) -> SkippedItem:
    detail = "a JSONL file can name a folder of frames as a video" if content == "video" else ""
    return SkippedItem(name=_shown(path), reason=IS_FOLDER, detail=detail)


def _skipped_format(path: Path) -> SkippedItem:
    detail = f"extension {path.suffix.lower()}" if path.suffix else "no extension"
    return SkippedItem(name=_shown(path), reason=UNKNOWN_FORMAT, detail=detail)


def _shown(path: Path) -> str:
    """The name, with bytes that are no UTF-8 as escapes: an index can hold nothing else."""
    return path.name.encode("utf-8", "backslashreplace").decode()


class CaptionFiles:
    """The caption files of a folder, by the names of the media they belong to."""

    def __init__(self, entries: Sequence[Path], extension: str) -> None:
        self._extension = extension
        self._exact = {path.name: path for path in entries if path.name.lower().endswith(extension.lower())}
        self._alike = {composed_name(self.base(path)): path for path in self.paths}

    @property
    def paths(self) -> list[Path]:
        """All of them, in the folder's order."""
        return list(self._exact.values())

    def base(self, path: Path) -> str:
        """The name of a caption file without its extension, which may have several dots."""
        return path.name[: -len(self._extension)]

    def __contains__(self, path: Path) -> bool:
        return path.name in self._exact

    def find(self, path: Path) -> Path | None:
        """The caption of a media file; accents may be coded and its extension written differently."""
        return self._exact.get(path.stem + self._extension) or self._alike.get(composed_name(path.stem))
