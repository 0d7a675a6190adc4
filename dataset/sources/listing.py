"""Lists the media, captions and masks of a dataset, with skipped items and reasons."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from dataset.cache.names import name_key
from dataset.config.config import AnyDatasetConfig
from dataset.confinement import Confinement
from dataset.media.files import Content
from dataset.sources.folder import list_folder
from dataset.sources.items import SourceItem, SourceListing, composed_name
from dataset.sources.jsonl import list_jsonl
from dataset.sources.masks import with_masks
from modules.errors import DataError
from modules.messages import lines_in_short


def list_items(
    dataset: AnyDatasetConfig,
    *,
    others: Iterable[AnyDatasetConfig] = (),
    confinement: Confinement | None = None,
) -> SourceListing:
    """List the media of a dataset with their captions; media are not opened.

    Args:
        others: the datasets of the same file: what one of them reads from the same folder is not missed.
        confinement: refuse paths outside a folder; the paths of a JSONL file then count from its own.
    Raises:
        ConfigError: the folder or JSONL file does not exist, a JSONL line is wrong, or a path leads out.
        DataError: there is nothing to use, or two media would share one cache file.
    """
    if confinement is not None:
        confinement.check(dataset)
    if dataset.jsonl_file is not None:
        listing = list_jsonl(dataset, dataset.jsonl_file, confinement)
    else:
        assert dataset.directory is not None  # the config has one of the two
        listing = list_folder(dataset, dataset.directory, _read_elsewhere(dataset.directory, others))
    listing = with_masks(dataset, listing)
    _refuse_shared_names(dataset, listing.items)
    if not listing.items:
        raise DataError(
            f"dataset {dataset.index} ({dataset.origin}): none of its {listing.found} media can be used:\n"
            f"{lines_in_short(listing.skipped)}"
        )
    return listing


def _read_elsewhere(directory: Path, others: Iterable[AnyDatasetConfig]) -> frozenset[Content]:
    """What the datasets read from this folder."""
    place = os.path.realpath(directory)
    return frozenset(
        other.content
        for other in others
        if other.directory is not None and os.path.realpath(other.directory) == place
    )


def _refuse_shared_names(dataset: AnyDatasetConfig, items: Iterable[SourceItem]) -> None:
    first: dict[str, SourceItem] = {}
    problems = []
    for item in items:
        other = first.setdefault(name_key(item.base_name), item)
        if other is not item:
            problems.append(
                f"dataset {dataset.index} ({dataset.origin}): {other.path} and {item.path} have "
                f"{_sameness(other.base_name, item.base_name)} and would share their caches; rename one of "
                "them or put them into two datasets"
            )
    if problems:
        raise DataError(problems)


def _sameness(name: str, other: str) -> str:
    if name == other:
        return "the same base name"
    if composed_name(name) == composed_name(other):
        # They look alike on every screen, so the message shows their characters.
        return f"names that differ only in how their accents are coded, {name!a} and {other!a},"
    return "base names that are the same on this system"
