"""Hashes of a run's input files: a resumed run detects when they have been replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from dataset.cache.cached_dataset import CachedDataset
from kandinsky5.configs.train import ModelConfig
from modules.files import file_fingerprint
from modules.weight_files import find_weight_files
from networks.lora_files import lora_file

CACHES = {
    "latents": "the latents",
    "captions": "the captions",
    "other captions": "the empty caption or prior_caption",
    "masks": "the masks",
}
MODELS = {"dit": "--dit", "base_weights": "--base_weights"}


def cache_contents(data: CachedDataset) -> dict[str, str]:
    """A hash of each of `CACHES` that there are, from the origins that the caches record.

    Files that are made again from the same sources, captions and encoders have the same.
    """
    lines = {
        "latents": [f"{item.key} {item.latent_origin}" for item in data.items],
        "captions": [f"{item.key} {item.text_origin}" for item in data.items],
        "other captions": data.extra_text_origins,
        "masks": [f"{item.key} {item.mask_origin}" for item in data.items if item.mask_path is not None],
    }
    return {name: _hash(found) for name, found in lines.items() if found}


def model_contents(model: ModelConfig) -> dict[str, str]:
    """A hash of the files of each of `MODELS` that there are: sizes, first and last MiB of each file."""
    loras = tuple(map(lora_file, model.base_weights))
    files = {"dit": find_weight_files(model.dit, subfolder="transformer"), "base_weights": loras}
    return {name: _hash(map(file_fingerprint, paths)) for name, paths in files.items() if paths}


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()[:32]


def changed(before: Mapping[str, str], now: Mapping[str, str], names: Mapping[str, str]) -> list[str]:
    """Describe the inputs of `names` whose hashes differ."""
    both = before.keys() & now.keys()
    return [words for name, words in names.items() if name in both and before[name] != now[name]]
