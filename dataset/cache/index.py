"""The index that a cache script writes into the cache folder: used and skipped items with reasons.

Training reads it instead of the sources. It holds names only, never a folder, so that caches can be moved to
another machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dataset.cache.names import mask_cache_name, text_cache_name
from dataset.config.config import AnyDatasetConfig
from dataset.places import place_mark
from dataset.sources.items import SkippedItem, SourceItem
from modules.errors import CacheError, NewerCacheError
from modules.files import write_json
from modules.logs import get_logger
from modules.parsing import parse_json

if TYPE_CHECKING:  # training reads indexes and needs no media libraries
    from dataset.clips import PlannedClip

log = get_logger(__name__)

CacheKind = Literal["latents", "text"]

INDEX_VERSION = 1


class DamagedIndexError(CacheError):
    """The index cannot be parsed; the cache scripts rebuild it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexItem:
    """A media item that was cached: its base name and its files in the cache folder."""

    name: str
    key: str = ""
    """Distinguishes media of the same base name; empty in indexes of older versions."""
    files: tuple[str, ...]
    masks: tuple[str, ...] = ()
    """Mask caches of those of its latent caches that have one."""
    digests: tuple[str, ...] = ()
    """`metadata_digest` of each of `files`, then of `masks`; empty in indexes of older versions."""

    @property
    def digest_by_file(self) -> dict[str, str]:
        """Digest by file name, to detect files replaced since this entry was written."""
        return dict(zip((*self.files, *self.masks), self.digests, strict=True)) if self.digests else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexEntry:
    """The result of a cache script for one dataset with one set of settings."""

    items: tuple[IndexItem, ...]
    skipped: tuple[SkippedItem, ...]
    users: tuple[str, ...] | None = None
    """Marks of the dataset files that use it; empty when all of them have other settings by now. None is not
    known, as in indexes of older versions."""


def index_path(cache_directory: Path, kind: CacheKind) -> Path:
    """The path of the index of a cache folder."""
    return cache_directory / f"k5_index_{kind}.json"


def source_mark(dataset: AnyDatasetConfig, kind: CacheKind) -> str:
    """Distinguishes the dataset's source from others cached into the same folder."""
    source = dataset.jsonl_file or dataset.directory
    masks = dataset.mask_directory if kind == "latents" else None
    return place_mark(dataset.cache_directory, source, masks)


def entry_key(dataset: AnyDatasetConfig, kind: CacheKind) -> str:
    """The key of the dataset's entry in the index."""
    return f"{_settings_hash(dataset, kind)}-{source_mark(dataset, kind)}"


def fitting_entries(
    entries: Mapping[str, IndexEntry], dataset: AnyDatasetConfig, kind: CacheKind
) -> dict[str, IndexEntry]:
    """The entries with the dataset's settings by source mark; "" is an older version's, which has none."""
    parts = {key: key.partition("-") for key in entries}
    settings = _settings_hash(dataset, kind)
    return {mark: entries[key] for key, (found, _, mark) in parts.items() if found == settings}


def _settings_hash(dataset: AnyDatasetConfig, kind: CacheKind) -> str:
    return dataset.settings_hash if kind == "latents" else dataset.text_settings_hash


def metadata_digest(metadata: Mapping[str, str]) -> str:
    """A short hash of a cache file's metadata, and so of all that the file depends on."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16]


def text_entry(
    items: Iterable[SourceItem], skipped: Iterable[SkippedItem], digests: Mapping[str, str]
) -> IndexEntry:
    """The entry for the captions of these items; `digests` by file name."""
    used = []
    for item in items:
        name = text_cache_name(item.base_name)
        used.append(IndexItem(name=item.base_name, key=item.key, files=(name,), digests=(digests[name],)))
    return IndexEntry(items=tuple(used), skipped=tuple(skipped))


def latent_entry(
    clips: Iterable[PlannedClip], skipped: Iterable[SkippedItem], digests: Mapping[str, str]
) -> IndexEntry:
    """The entry for these clips; `digests` by file name, those of masks too.

    Of a source that is also in `skipped` as broken nothing is listed, not even its whole cuts: frames beside
    damaged ones may be the decoder's guesses. A source that is skipped several times is listed once.
    """
    skipped = tuple(dict.fromkeys(skipped))
    broken = {entry.key for entry in skipped if entry.is_failure}
    by_name: dict[str, list[PlannedClip]] = {}
    for clip in clips:
        if clip.item.key not in broken:
            by_name.setdefault(clip.item.base_name, []).append(clip)
    items = tuple(_latent_item(name, by_name[name], digests) for name in sorted(by_name))
    return IndexEntry(items=items, skipped=skipped)


def _latent_item(name: str, clips: Sequence[PlannedClip], digests: Mapping[str, str]) -> IndexItem:
    files = tuple(sorted(clip.cache_name for clip in clips))
    masks = tuple(sorted(mask_cache_name(clip.cache_name) for clip in clips if clip.mask is not None))
    return IndexItem(
        name=name,
        key=clips[0].item.key,
        files=files,
        masks=masks,
        digests=tuple(digests[file] for file in (*files, *masks)),
    )


def read_index(cache_directory: Path, kind: CacheKind) -> dict[str, IndexEntry] | None:
    """All entries of an index by key; None when the folder has no index.

    Raises:
        DamagedIndexError: its content is not that of an index.
        NewerCacheError: it was made by a newer version of this program.
        CacheError: the file cannot be read.
    """
    path = index_path(cache_directory, kind)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise _damaged(path, error) from error
    try:
        value = parse_json(text)
        version = value["version"]
        if not isinstance(version, int):
            raise TypeError("its version is no number")
        if version <= INDEX_VERSION:
            return {key: _entry_from_json(entry) for key, entry in value["entries"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    raise NewerCacheError(
        f"{path}: made by a newer version of this program (index version {version}, known {INDEX_VERSION})"
    )


def _damaged(path: Path, error: Exception) -> DamagedIndexError:
    return DamagedIndexError(
        f"{path}: the index is damaged ({error!r}); run the cache script again to rebuild it"
    )


def update_index(
    cache_directory: Path, kind: CacheKind, key: str, entry: IndexEntry, together: Collection[str] = ()
) -> None:
    """Put an entry under its `entry_key` into the folder's index; other entries stay.

    That of an older version with the same settings does not: it is this dataset's, or its files cannot be
    distinguished from this dataset's. The dataset files that use the entry no longer use the others.

    Args:
        together: keys of the other datasets of the same dataset file that share the folder.

    A damaged index is made again: its other entries are lost until their cache scripts run again.

    Raises:
        CacheError: the index was made by a newer version of this program, or cannot be read.
    """
    try:
        entries = read_index(cache_directory, kind) or {}
    except DamagedIndexError:
        log.warning(
            "%s was damaged and is made again; if other datasets share the folder, cache them again too",
            index_path(cache_directory, kind),
        )
        entries = {}
    entries.pop(key.partition("-")[0], None)
    for other, old in entries.items():
        if other == key:
            entry = replace(entry, users=tuple(sorted({*(entry.users or ()), *(old.users or ())})) or None)
        elif old.users is not None and other not in together:
            entries[other] = replace(old, users=tuple(u for u in old.users if u not in (entry.users or ())))
    entries[key] = entry
    _write_index(cache_directory, kind, entries)


def drop_unused_entries(cache_directory: Path, kind: CacheKind) -> None:
    """Take entries out of the index that no dataset file uses any more."""
    entries = read_index(cache_directory, kind) or {}
    used = {key: entry for key, entry in entries.items() if entry.users != ()}
    if len(used) < len(entries):
        _write_index(cache_directory, kind, used)


def _write_index(cache_directory: Path, kind: CacheKind, entries: Mapping[str, IndexEntry]) -> None:
    value = {
        "version": INDEX_VERSION,
        "kind": kind,
        "entries": {key: _entry_to_json(entries[key]) for key in sorted(entries)},
    }
    write_json(index_path(cache_directory, kind), value)


def listed_files(entries: Mapping[str, IndexEntry]) -> set[str]:
    """The file names of all entries but those that no dataset file uses any more."""
    items = [item for entry in entries.values() if entry.users != () for item in entry.items]
    return {name for item in items for name in (*item.files, *item.masks)}


def _entry_to_json(entry: IndexEntry) -> dict[str, Any]:
    return {
        "items": [
            {"name": item.name, "files": list(item.files)}
            | ({"key": item.key} if item.key else {})
            | ({"masks": list(item.masks)} if item.masks else {})
            | ({"digests": list(item.digests)} if item.digests else {})
            for item in entry.items
        ],
        "skipped": [
            {"name": s.name, "reason": s.reason, "detail": s.detail, "is_failure": s.is_failure}
            | ({"key": s.key} if s.key else {})
            for s in entry.skipped
        ],
    } | ({} if entry.users is None else {"users": list(entry.users)})


def _entry_from_json(value: Mapping[str, Any]) -> IndexEntry:
    items = tuple(_item_from_json(item) for item in value["items"])
    skipped = tuple(
        SkippedItem(
            name=str(s["name"]),
            reason=str(s["reason"]),
            detail=str(s["detail"]),
            is_failure=bool(s["is_failure"]),
            key=str(s.get("key", "")),
        )
        for s in value["skipped"]
    )
    users = value.get("users")
    return IndexEntry(
        items=items, skipped=skipped, users=None if users is None else tuple(str(user) for user in users)
    )


def _item_from_json(value: Mapping[str, Any]) -> IndexItem:
    item = IndexItem(
        name=str(value["name"]),
        key=str(value.get("key", "")),
        files=_file_names(value["files"]),
        masks=_file_names(value.get("masks", ())),
        digests=tuple(str(digest) for digest in value.get("digests", ())),
    )
    if item.digests and len(item.digests) != len(item.files) + len(item.masks):
        raise ValueError(f"{item.name!r} does not have one digest per file")
    return item


def _file_names(values: Iterable[Any]) -> tuple[str, ...]:
    names = tuple(str(value) for value in values)
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not a plain file name")
    return names
