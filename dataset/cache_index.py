"""The index a cache script leaves in the cache folder: what was used, what was skipped and why.

Training reads it instead of the sources. It holds names only, never a folder, so that caches can be moved to
another machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dataset.cache_names import mask_cache_name, text_cache_name
from dataset.sources import SkippedItem, SourceItem
from modules.errors import CacheError
from modules.files import write_json

if TYPE_CHECKING:  # training reads indexes and needs no media libraries
    from dataset.clips import PlannedClip

CacheKind = Literal["latents", "text"]

INDEX_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexItem:
    """A media item that was cached: its base name and its files in the cache folder."""

    name: str
    files: tuple[str, ...]
    masks: tuple[str, ...] = ()
    """Mask caches of those of its latent caches that have one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexEntry:
    """What one run of a cache script found for one dataset configuration."""

    items: tuple[IndexItem, ...]
    skipped: tuple[SkippedItem, ...]


def index_path(cache_directory: Path, kind: CacheKind) -> Path:
    """Where the index of a cache folder lies."""
    return cache_directory / f"k5_index_{kind}.json"


def text_entry(items: Iterable[SourceItem], skipped: Iterable[SkippedItem]) -> IndexEntry:
    """The entry for the captions of these items."""
    used = (IndexItem(name=item.base_name, files=(text_cache_name(item.base_name),)) for item in items)
    return IndexEntry(items=tuple(used), skipped=tuple(skipped))


def latent_entry(clips: Iterable[PlannedClip], skipped: Iterable[SkippedItem]) -> IndexEntry:
    """The entry for these clips.

    Of a source that is also in `skipped` as broken nothing is listed, not even its whole cuts: frames beside
    damaged ones may be the decoder's guesses. A source that is skipped several times is listed once.
    """
    skipped = tuple(dict.fromkeys(skipped))
    broken = {entry.name for entry in skipped if entry.is_failure}
    files: dict[str, list[str]] = {}
    masks: dict[str, list[str]] = {}
    for clip in clips:
        if clip.item.path.name not in broken:
            files.setdefault(clip.item.base_name, []).append(clip.cache_name)
            own = masks.setdefault(clip.item.base_name, [])
            own += [] if clip.mask is None else [mask_cache_name(clip.cache_name)]
    items = tuple(
        IndexItem(name=name, files=tuple(sorted(files[name])), masks=tuple(sorted(masks[name])))
        for name in sorted(files)
    )
    return IndexEntry(items=items, skipped=skipped)


def read_index(cache_directory: Path, kind: CacheKind) -> dict[str, IndexEntry] | None:
    """All entries of an index by settings hash; None when the folder has no index.

    Raises:
        CacheError: the index is damaged or was made by a newer version of this program.
    """
    path = index_path(cache_directory, kind)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CacheError(f"{path}: cannot be read: {error}") from error
    try:
        value = json.loads(text)
        version = value["version"]
        if version <= INDEX_VERSION:
            return {key: _entry_from_json(entry) for key, entry in value["entries"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(
            f"{path}: the index is damaged ({error!r}); delete it and run the cache script again"
        ) from error
    raise CacheError(
        f"{path}: made by a newer version of this program (index version {version}, known {INDEX_VERSION})"
    )


def update_index(cache_directory: Path, kind: CacheKind, settings_hash: str, entry: IndexEntry) -> None:
    """Put the entry of one dataset configuration into the folder's index; other entries stay."""
    try:
        entries = read_index(cache_directory, kind) or {}
    except CacheError as error:
        if "newer version" in str(error):
            raise
        entries = {}  # a damaged index is made anew: it only holds what the cache scripts can tell again
    entries[settings_hash] = entry
    value = {
        "version": INDEX_VERSION,
        "kind": kind,
        "entries": {key: _entry_to_json(entries[key]) for key in sorted(entries)},
    }
    write_json(index_path(cache_directory, kind), value)


def listed_files(entries: Mapping[str, IndexEntry]) -> set[str]:
    """The file names that any entry uses."""
    items = [item for entry in entries.values() for item in entry.items]
    return {name for item in items for name in (*item.files, *item.masks)}


def _entry_to_json(entry: IndexEntry) -> dict[str, Any]:
    return {
        "items": [
            {"name": item.name, "files": list(item.files)}
            | ({"masks": list(item.masks)} if item.masks else {})
            for item in entry.items
        ],
        "skipped": [
            {"name": s.name, "reason": s.reason, "detail": s.detail, "is_failure": s.is_failure}
            for s in entry.skipped
        ],
    }


def _entry_from_json(value: Mapping[str, Any]) -> IndexEntry:
    items = tuple(
        IndexItem(name=str(i["name"]), files=_file_names(i["files"]), masks=_file_names(i.get("masks", ())))
        for i in value["items"]
    )
    skipped = tuple(
        SkippedItem(
            name=str(s["name"]),
            reason=str(s["reason"]),
            detail=str(s["detail"]),
            is_failure=bool(s["is_failure"]),
        )
        for s in value["skipped"]
    )
    return IndexEntry(items=items, skipped=skipped)


def _file_names(values: Iterable[Any]) -> tuple[str, ...]:
    names = tuple(str(value) for value in values)
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not a plain file name")
    return names
