"""Shared by both cache scripts: folder locks, summaries, the index and unused files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from dataset.cache.files import CacheMeta
from dataset.cache.index import (
    CacheKind,
    IndexEntry,
    drop_unused_entries,
    entry_key,
    index_path,
    update_index,
)
from dataset.cache.names import name_key
from dataset.cache.unused import unused_caches
from dataset.config.config import AnyDatasetConfig
from dataset.media.files import Content
from dataset.places import place_mark
from dataset.sources.items import SkippedItem
from kandinsky5.configs.caching import CacheRunConfig
from modules.errors import DataError
from modules.files import disk_errors, remove_leftover_files
from modules.locks import folder_lock
from modules.logs import format_table, get_logger
from modules.messages import MAX_LINES, counted, lines_in_short, names_in_short, shortened
from modules.processes import Processes

log = get_logger(__name__)

CONTINUE_HINT = "run the same command with --skip_existing; the files written so far are whole"
"""For `disk_errors`: how to continue a caching run that a full disk has stopped."""
_GIGABYTE = 1e9


@dataclass(kw_only=True, slots=True)
class Outcome:
    """One dataset of one run."""

    dataset: AnyDatasetConfig
    found: int
    """Media files seen."""
    num_caches: int
    """Cache files the dataset needs."""
    encoded: int = 0
    skipped: list[SkippedItem] = field(default_factory=list)
    empty_captions: int = 0
    num_listed: int = field(init=False)
    """Of `skipped`, those known before anything is encoded, which come first."""

    def __post_init__(self) -> None:
        self.num_listed = len(self.skipped)

    @property
    def num_skipped(self) -> int:
        """Media items, each once however often it was skipped."""
        return len({entry.key for entry in self.skipped})


@contextmanager
def cache_folders(datasets: Sequence[AnyDatasetConfig], processes: Processes) -> Iterator[None]:
    """Lock the cache folders in a fixed order, and delete leftovers of killed runs.

    The first of several processes holds them for all.

    Raises:
        ResourceError: a folder cannot be written, or the disk fills up within the block.
    """
    folders = sorted({Path(os.path.realpath(dataset.cache_directory)) for dataset in datasets})
    with ExitStack() as stack:

        def enter() -> None:
            for folder in folders if processes.is_main else ():
                stack.enter_context(folder_lock(folder))
                remove_leftover_files(folder)

        processes.together(enter)
        yield


def combine(outcomes: Sequence[Outcome], processes: Processes) -> None:
    """Merge the outcomes of all processes, in an order independent of the process."""
    everywhere = processes.gather([(outcome.encoded, outcome.skipped) for outcome in outcomes])
    for number, outcome in enumerate(outcomes):
        known = outcome.skipped[: outcome.num_listed]
        found = {entry for parts in everywhere for entry in parts[number][1][outcome.num_listed :]}
        outcome.encoded = sum(parts[number][0] for parts in everywhere)
        outcome.skipped = [*known, *sorted(found, key=str)]


@dataclass(frozen=True, slots=True)
class CacheTarget:
    """A cache file that a run would write."""

    dataset: AnyDatasetConfig
    path: Path
    item_name: str
    """Whose it is, for messages."""
    meta: CacheMeta


def refuse_shared_files(targets: Iterable[CacheTarget]) -> None:
    """Refuse datasets of one cache folder that would replace each other's files; equal content may be shared.

    Raises:
        DataError: two files of one name, with other content each.
    """
    first: dict[tuple[str, str], CacheTarget] = {}
    problems = []
    for target in targets:
        place = os.path.normcase(os.path.realpath(target.dataset.cache_directory))
        other = first.setdefault((place, name_key(target.path.name)), target)
        if other.dataset.index != target.dataset.index and other.meta != target.meta:
            problems.append(
                f"datasets {other.dataset.index} and {target.dataset.index} share "
                f"{target.dataset.cache_directory}, where {other.item_name} and {target.item_name} would "
                f"both be {target.path.name}; give one of the datasets another cache_directory"
            )
    if problems:
        raise DataError(shortened(problems, MAX_LINES))


def check_strict(outcomes: Sequence[Outcome], run: CacheRunConfig) -> None:
    """With --strict, refuse to start if any item is skipped.

    Raises:
        DataError: the items and their reasons.
    """
    skipped = [entry for outcome in outcomes for entry in outcome.skipped]
    if run.strict and skipped:
        raise DataError(f"--strict: {_listed(skipped)}")


def write_index(
    outcome: Outcome, outcomes: Sequence[Outcome], kind: CacheKind, entry: IndexEntry, run: CacheRunConfig
) -> None:
    """Write the result for a dataset into the index of its cache folder."""
    folder = outcome.dataset.cache_directory
    entry = replace(entry, users=(place_mark(folder, run.dataset_config),))
    with disk_errors(folder, CONTINUE_HINT):
        keys = {entry_key(other.dataset, kind) for other in outcomes if _folder(other) == _folder(outcome)}
        update_index(folder, kind, entry_key(outcome.dataset, kind), entry, keys)


def _folder(outcome: Outcome) -> str:
    """The place of its caches, by which datasets that share one are found."""
    return os.path.normcase(os.path.realpath(outcome.dataset.cache_directory))


def _by_folder(outcomes: Sequence[Outcome]) -> Iterator[list[Outcome]]:
    folders: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        folders.setdefault(_folder(outcome), []).append(outcome)
    yield from folders.values()


def handle_unused(outcomes: Sequence[Outcome], kind: CacheKind, run: CacheRunConfig) -> None:
    """Log the number of unused caches; with --prune, delete them."""
    for members in _by_folder(outcomes):
        folder = members[0].dataset.cache_directory
        contents: set[Content] = {outcome.dataset.content for outcome in members}
        skipped = [entry for outcome in members for entry in outcome.skipped]
        unused = unused_caches(folder, kind, contents, skipped)
        if unused.foreign:
            log.info(
                "%s: not made by a Kandinsky 5 cache script, so left alone: %s",
                folder,
                names_in_short([path.name for path in unused.foreign]),
            )
        if unused.unread:
            kept = counted(len(unused.unread), "cache")
            log.info("%s: kept %s of items that could not be read", folder, kept)
        size = f"{counted(len(unused.files), 'cache')} ({unused.total_bytes / _GIGABYTE:.2f} GB)"
        if run.prune:
            with disk_errors(folder, CONTINUE_HINT):
                drop_unused_entries(folder, kind)
            for path in unused.files:
                path.unlink(missing_ok=True)
        if unused.files and run.prune:
            log.info("%s: deleted %s not used by any dataset file", folder, size)
        elif unused.files:
            log.info("%s: %s not used by any dataset file; --prune deletes unused caches", folder, size)


def finish(outcomes: Sequence[Outcome], kind: CacheKind, run: CacheRunConfig) -> None:
    """Print the summary, then end with an error if a file was damaged or a dataset has nothing left.

    Raises:
        DataError: damaged items (unless --skip_bad), any skipped item (--strict), or nothing usable.
    """
    log.info("done\n%s", _summary(outcomes))
    skipped = [entry for outcome in outcomes for entry in outcome.skipped]
    if skipped:
        log.warning("%s", _listed(skipped))
        indexes = sorted({str(index_path(outcome.dataset.cache_directory, kind)) for outcome in outcomes})
        log.info("all skipped items and their reasons are in %s", ", ".join(indexes))
    raise_problems(outcomes, run, "everything else is cached")


def raise_problems(outcomes: Sequence[Outcome], run: CacheRunConfig, rest: str) -> None:
    """End with an error if a file was damaged or a dataset has nothing left.

    Args:
        rest: what became of the others.
    Raises:
        DataError: damaged items (unless --skip_bad), any skipped item (--strict), or nothing usable.
    """
    check_strict(outcomes, run)
    problems = []
    skipped = [entry for outcome in outcomes for entry in outcome.skipped]
    failures = [entry for entry in skipped if entry.is_failure]
    if failures and not run.skip_bad:
        damaged = counted(len(failures), "damaged item was", "damaged items were")
        problems.append(
            f"{damaged} left out, {rest}. Repair or remove damaged files, or add --skip_bad to skip them"
        )
    problems.extend(
        f"dataset {outcome.dataset.index}: nothing is left to train on"
        for outcome in outcomes
        if outcome.found and outcome.num_skipped >= outcome.found
    )
    if problems:
        raise DataError(problems)


def _summary(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        reasons = Counter(entry.reason for entry in dict.fromkeys(outcome.skipped))
        details = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        if outcome.empty_captions:
            details = ", ".join(
                filter(None, [details, f"{outcome.empty_captions} used with an empty caption"])
            )
        rows.append([
            f"{outcome.dataset.index} ({outcome.dataset.content}s)",
            outcome.found,
            outcome.found - outcome.num_skipped,
            outcome.encoded,
            outcome.num_caches - outcome.encoded,
            details or "-",
        ])
    return format_table(["dataset", "found", "used", "caches made", "caches kept", "skipped"], rows)


def _listed(skipped: Sequence[SkippedItem]) -> str:
    entries = list(dict.fromkeys(skipped))
    return f"{counted(len(entries), 'item was', 'items were')} skipped:\n{lines_in_short(entries)}"
