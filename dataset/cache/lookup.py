"""Lists the cache files of a dataset, by the index of its cache folder or by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.cache.index import (
    CacheKind,
    IndexEntry,
    fitting_entries,
    metadata_digest,
    read_index,
    source_mark,
)
from dataset.cache.names import LATENT_SUFFIX, cache_base_name, parse_latent_name, text_cache_name
from dataset.config.config import AnyDatasetConfig
from dataset.sources.items import SkippedItem
from dataset.sources.listing import list_items
from modules.errors import CacheError, UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheListing:
    """The cache files of one dataset, not opened yet; base names as in file names."""

    latents: Mapping[str, Sequence[Path]]
    """By base name."""
    texts: Mapping[str, Path]
    """By base name."""
    skipped: tuple[SkippedItem, ...]
    """Items that the cache scripts skipped."""
    mask_names: frozenset[str] | None
    """Mask caches that the index lists; None without an index."""
    digests: Mapping[str, str]
    """`metadata_digest` of the files that an index lists, by file name."""
    keys: Mapping[str, str]
    """Keys of the items that an index lists, by base name."""
    notes: tuple[str, ...]
    """Log lines."""

    def has_mask(self, path: Path) -> bool:
        """Whether a mask cache belongs to the dataset."""
        return path.is_file() if self.mask_names is None else path.name in self.mask_names

    def replaced_problem(self, path: Path, metadata: Mapping[str, str]) -> str | None:
        """Reason why a listed file has been replaced since it was indexed, or None."""
        expected = self.digests.get(path.name)
        if expected is None or expected == metadata_digest(metadata):
            return None
        return (
            "was made again since it was cached for this dataset file: by another one with the same "
            "cache_directory (give each its own), or by a run that did not finish"
        )

    def skipped_names(self) -> frozenset[str]:
        """Base names that need no cache: of items that a cache script skipped.

        Where keys are known, another item of the same base name is not meant.
        """
        left_out = set()
        for entry in self.skipped:
            for name in map(cache_base_name, {entry.name, Path(entry.name).stem}):
                key = self.keys.get(name, "")
                if not key or not entry.key or entry.key == key:
                    left_out.add(name)
        return frozenset(left_out)


def list_caches(dataset: AnyDatasetConfig, config_path: Path) -> CacheListing:
    """List the cache files of a dataset.

    Raises:
        CacheError: they were made with other settings, may belong to another dataset, or two are of one clip.
    """
    folder = dataset.cache_directory
    notes: list[str] = []
    latent_entry = _entry(dataset, "latents", config_path, notes)
    if latent_entry is None:
        latents = _latents_in_folder(dataset, notes)
    else:
        latents = {cache_base_name(i.name): [folder / file for file in i.files] for i in latent_entry.items}
    text_entry = _entry(dataset, "text", config_path, notes)
    if text_entry is None:
        paths = {name: folder / text_cache_name(name) for name in latents}
        texts = {name: path for name, path in paths.items() if path.is_file()}
    else:
        texts = {cache_base_name(i.name): folder / i.files[0] for i in text_entry.items if i.files}
    entries = [entry for entry in (latent_entry, text_entry) if entry is not None]
    listed = [item for entry in entries for item in entry.items]
    masks = None if latent_entry is None else [name for item in latent_entry.items for name in item.masks]
    return CacheListing(
        latents=latents,
        texts=texts,
        skipped=tuple(dict.fromkeys(skipped for entry in entries for skipped in entry.skipped)),
        mask_names=None if masks is None else frozenset(masks),
        digests={name: digest for item in listed for name, digest in item.digest_by_file.items()},
        keys={cache_base_name(item.name): item.key for item in listed},
        notes=tuple(notes),
    )


def _latents_in_folder(dataset: AnyDatasetConfig, notes: list[str]) -> dict[str, list[Path]]:
    """All latent caches of a folder without an index, by base name."""
    folder = dataset.cache_directory
    found: dict[str, list[Path]] = {}
    first: dict[tuple[str, int | None, int | None], Path] = {}
    clashes = []
    for path in sorted(folder.glob(f"*{LATENT_SUFFIX}")) if folder.is_dir() else ():
        name = parse_latent_name(path.name, dataset.content)
        if name is None:
            continue
        found.setdefault(name.base_name, []).append(path)
        other = first.setdefault((name.base_name, name.start, name.num_frames), path)
        if other is not path:
            clashes.append(
                f"dataset {dataset.index}: {other} and {path} are two caches of the same item; "
                "delete the one that is out of date"
            )
    if clashes:
        raise CacheError(clashes)
    if found:
        notes.append(
            f"dataset {dataset.index}: {folder} has no index of its latent caches, so all "
            f"{sum(map(len, found.values()))} that are there are used"
        )
    return found


def _entry(
    dataset: AnyDatasetConfig, kind: CacheKind, config_path: Path, notes: list[str]
) -> IndexEntry | None:
    """The entry of a dataset in the index of its folder, None when the folder has no index.

    Caches may have been made from another place than the dataset file names, as on a rented machine. They are
    used if nothing here shows that they are another dataset's; `notes` then gets a line about it.

    Raises:
        CacheError: they were made with other settings, or may be those of another dataset.
    """
    folder = dataset.cache_directory
    entries = read_index(folder, kind)
    if entries is None:
        return None
    where = f"dataset {dataset.index}: the {'latents' if kind == 'latents' else 'captions'} in {folder} were"
    fitting = fitting_entries(entries, dataset, kind)
    if not fitting:
        raise CacheError(
            f"{where} cached with other settings than {config_path} has now\n"
            f"{cache_commands(config_path, (kind,))}"
        )
    for mark in (source_mark(dataset, kind), ""):
        if mark in fitting:
            return fitting[mark]
    source = dataset.jsonl_file or dataset.directory
    elsewhere = f"{where} cached from another place than {source}, which {config_path} names"
    if _media_are_here(dataset):
        raise CacheError(
            f"{elsewhere}. If they belong to another dataset, give this one a cache_directory of its own; "
            f"else --skip_existing keeps those that fit\n{cache_commands(config_path, (kind,))}"
        )
    if len(fitting) > 1:
        raise CacheError(
            f"{elsewhere}, and they belong to {len(fitting)} datasets. Name the place where the source lay, "
            "as seen from the cache folder, when the caches were made; it need not be there"
        )
    notes.append(f"{elsewhere}; it is not here to compare with, so they are used")
    return next(iter(fitting.values()))


def _media_are_here(dataset: AnyDatasetConfig) -> bool:
    try:
        return bool(list_items(dataset).items)
    except UserError:  # no folder, or nothing in it
        return False


def cache_commands(config_path: Path, kinds: Iterable[CacheKind]) -> str:
    """The commands that create the caches of these kinds, as the last lines of a message."""
    lines = ["Create the caches, then start the training again:"]
    for kind in kinds:
        if kind == "text":
            lines.append(
                f"  python kandinsky5_cache_text_encoder_outputs.py --dataset_config {config_path} "
                "--text_encoder_qwen <path or model id> --text_encoder_clip <path or model id>"
            )
        else:
            lines.append(f"  python kandinsky5_cache_latents.py --dataset_config {config_path} --vae <path>")
    return "\n".join(lines)
