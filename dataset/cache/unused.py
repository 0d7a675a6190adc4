"""Finds cache files that no dataset uses any more."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from dataset.cache.files import ARCHITECTURE
from dataset.cache.index import CacheKind, listed_files, read_index
from dataset.cache.names import (
    LATENT_SUFFIX,
    MASK_SUFFIX,
    TEXT_SUFFIX,
    cache_base_name,
    parse_latent_name,
)
from dataset.media.files import Content
from dataset.sources.items import SkippedItem
from modules.errors import ModelFileError
from modules.tensor_files import read_header


@dataclass(frozen=True, kw_only=True, slots=True)
class UnusedCaches:
    """Cache files in a folder that no entry of its index uses."""

    files: tuple[Path, ...]
    """Carry our mark, which is also musubi-tuner's for Kandinsky 5: may be deleted."""
    unread: tuple[Path, ...]
    """The same of items that could not be read this time: not to be deleted, for they may be good again."""
    foreign: tuple[Path, ...]
    """Without that mark, or too damaged to show it: left alone."""

    @property
    def total_bytes(self) -> int:
        """Size of `files`."""
        return sum(path.stat().st_size for path in self.files)


def unused_caches(
    cache_directory: Path,
    kind: CacheKind,
    contents: Collection[Content],
    skipped: Iterable[SkippedItem] = (),
) -> UnusedCaches:
    """The caches of one kind that no dataset file uses by the folder's index; all when there is no index.

    Args:
        content: of the folder's dataset.
        skipped: items that the last run skipped.
    """
    unread_names = {
        cache_base_name(name)
        for entry in skipped
        if entry.is_failure
        for name in (entry.name, Path(entry.name).stem)
    }
    used = listed_files(read_index(cache_directory, kind) or {})
    suffixes = (LATENT_SUFFIX, MASK_SUFFIX) if kind == "latents" else (TEXT_SUFFIX,)
    if not cache_directory.is_dir():
        return UnusedCaches(files=(), unread=(), foreign=())
    files: list[Path] = []
    unread: list[Path] = []
    foreign: list[Path] = []
    for path in sorted(cache_directory.iterdir()):
        if not path.name.endswith(suffixes) or path.name in used or not path.is_file():
            continue
        if not _has_our_mark(path):
            foreign.append(path)
        elif any(_base_name(path, content) in unread_names for content in contents):
            unread.append(path)
        else:
            files.append(path)
    return UnusedCaches(files=tuple(files), unread=tuple(unread), foreign=tuple(foreign))


def _base_name(path: Path, content: Content) -> str | None:
    """Whose cache a file is, by its name."""
    if path.name.endswith(TEXT_SUFFIX):
        return path.name.removesuffix(TEXT_SUFFIX)
    name = path.name
    if name.endswith(MASK_SUFFIX):
        name = name.removesuffix(MASK_SUFFIX) + LATENT_SUFFIX
    parsed = parse_latent_name(name, content)
    return None if parsed is None else parsed.base_name


def _has_our_mark(path: Path) -> bool:
    try:
        return read_header(path).metadata.get("architecture") == ARCHITECTURE
    except ModelFileError:
        return False  # of a damaged file the maker is unknown
