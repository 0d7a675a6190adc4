"""Finds the masks of a dataset's items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from dataset.cache.names import name_key
from dataset.config.config import AnyDatasetConfig
from dataset.media.files import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Content, is_hidden, natural_order
from dataset.sources.folder import check_folder, folder_prefix, media_folders
from dataset.sources.items import SourceListing
from modules.errors import ConfigError, DataError
from modules.path_kinds import path_kind


def with_masks(dataset: AnyDatasetConfig, listing: SourceListing) -> SourceListing:
    """Give items the masks of `mask_directory`; a JSONL line's own mask wins.

    Raises:
        ConfigError, DataError: the folder of masks cannot be used.
    """
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
        check_folder(directory, where)
        if dataset.directory is not None and dataset.directory.samefile(directory):
            raise ConfigError(
                f"{where}: holds the {dataset.content}s; put the masks into a folder of their own"
            )
        self._paths: dict[str, Path] = {}
        problems = []
        self._is_recursive = dataset.recursive
        for path in _entries(dataset, directory):
            if is_hidden(path) or not is_mask(path, dataset.content):
                continue
            name = folder_prefix(directory, path.parent) + (path.name if path.is_dir() else path.stem)
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
        # With subfolders a folder without an item is one of masks, not of frames.
        paths = (path for name, path in self._paths.items() if name not in known)
        return tuple(path.name for path in paths if not (self._is_recursive and path.is_dir()))


def _entries(dataset: AnyDatasetConfig, directory: Path) -> Iterator[Path]:
    for folder in media_folders(replace(dataset, mask_directory=None), directory):
        yield from sorted(folder.iterdir(), key=natural_order)


def is_mask(path: Path, content: Content) -> bool:
    """Whether a mask of such a dataset can look like this: videos may be masked by a still or by frames."""
    kind = path_kind(path).kind
    if kind == "folder":
        return content == "video"
    extension = path.suffix.lower()
    return extension in IMAGE_EXTENSIONS or (content == "video" and extension in VIDEO_EXTENSIONS)
