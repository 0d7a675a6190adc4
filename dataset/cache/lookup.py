"""Which entry of a cache folder's index belongs to a dataset, and the commands that make what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dataset.cache.index import CacheKind, IndexEntry, fitting_entries, read_index, source_mark
from dataset.config.config import AnyDatasetConfig
from dataset.sources import list_items
from modules.errors import CacheError, UserError


def find_entry(
    dataset: AnyDatasetConfig, kind: CacheKind, config_path: Path
) -> tuple[IndexEntry | None, str | None]:
    """The entry of a dataset, None when the folder has no index; and a line for the log, or None.

    Caches may have been made from another place than the dataset file names, as on a rented machine. They are
    used if nothing here says that they are another dataset's.

    Raises:
        CacheError: they were made with other settings, or may be those of another dataset.
    """
    folder = dataset.cache_directory
    entries = read_index(folder, kind)
    if entries is None:
        return None, None
    where = f"dataset {dataset.index}: the {'latents' if kind == 'latents' else 'captions'} in {folder} were"
    fitting = fitting_entries(entries, dataset, kind)
    if not fitting:
        raise CacheError(
            f"{where} cached with other settings than {config_path} has now\n"
            f"{cache_commands(config_path, (kind,))}"
        )
    for mark in (source_mark(dataset, kind), ""):
        if mark in fitting:
            return fitting[mark], None
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
    return next(iter(fitting.values())), f"{elsewhere}; it is not here to compare with, so they are used"


def _media_are_here(dataset: AnyDatasetConfig) -> bool:
    try:
        return bool(list_items(dataset).items)
    except UserError:  # no folder, or nothing in it
        return False


def cache_commands(config_path: Path, kinds: Iterable[CacheKind]) -> str:
    """What to type to make the caches of these kinds."""
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
