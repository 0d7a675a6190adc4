"""Splits off validation source files by a hash of their names."""

from __future__ import annotations

from dataset.cache.cached_dataset import CachedDataset
from modules.errors import ConfigError
from modules.messages import counted, names_in_short
from modules.seeding import derive_seed

FLAG = "--validation_split"


def hash_position(source: str) -> float:
    """Position of a source file in [0, 1), a function of its base name alone.

    So neither other files, nor their order, nor a seed decide on which side a file is.
    """
    return derive_seed("held out", source) / 2**63


def hold_out(data: CachedDataset, share: float) -> tuple[CachedDataset, CachedDataset]:
    """Split a dataset into training and validation parts.

    All cuts of a source file, and files of the same base name in all datasets, stay on one side.

    Raises:
        ConfigError: one side is empty; the message gives shares that are not.
    """
    positions = sorted((hash_position(source), source) for source in {item.source for item in data.items})
    chosen = {source for position, source in positions if position < share}
    if not chosen or len(chosen) == len(positions):
        raise ConfigError(_empty_side([position for position, _ in positions], share))
    held = data.part(lambda item: item.source in chosen)
    clips = counted(len(held.items), "clip")
    note = (
        f"{FLAG} {share:g}: {len(chosen)} of {len(positions)} source files ({clips}) are "
        f"measured and not trained on: {names_in_short(sorted(chosen))}"
    )
    return data.part(lambda item: item.source not in chosen, note), held


def _empty_side(positions: list[float], share: float) -> str:
    count = len(positions)
    if count == 1:
        return f"{FLAG} {share:g}: there is only one source file; use --validation_dataset_config"
    # Rounded up, so that the number as printed holds the file out.
    smallest = int(positions[0] * 1000) / 1000 + 0.001
    what = "none" if positions[0] >= share else "all"
    return (
        f"{FLAG} {share:g} holds out {what} of the {count} source files: which ones is a matter of their "
        f"names. From {smallest:.3f} on at least one is held out"
    )
