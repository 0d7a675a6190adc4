"""Cache files that no dataset uses any more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataset.cache_files import ARCHITECTURE
from dataset.cache_index import CacheKind, listed_files, read_index
from dataset.cache_names import LATENT_SUFFIX, MASK_SUFFIX, TEXT_SUFFIX
from modules.errors import ModelFileError
from modules.tensor_files import read_header


@dataclass(frozen=True, kw_only=True, slots=True)
class UnusedCaches:
    """Cache files in a folder that no entry of its index uses."""

    files: tuple[Path, ...]
    """Carry our mark, which is also musubi-tuner's for Kandinsky 5: may be deleted."""
    foreign: tuple[Path, ...]
    """Without that mark, or too damaged to show it: left alone."""

    @property
    def total_bytes(self) -> int:
        """Size of `files`."""
        return sum(path.stat().st_size for path in self.files)


def unused_caches(cache_directory: Path, kind: CacheKind) -> UnusedCaches:
    """The caches of one kind that the folder's index does not list; all of them when there is no index."""
    used = listed_files(read_index(cache_directory, kind) or {})
    suffixes = (LATENT_SUFFIX, MASK_SUFFIX) if kind == "latents" else (TEXT_SUFFIX,)
    if not cache_directory.is_dir():
        return UnusedCaches(files=(), foreign=())
    files: list[Path] = []
    foreign: list[Path] = []
    for path in sorted(cache_directory.iterdir()):
        if not path.name.endswith(suffixes) or path.name in used or not path.is_file():
            continue
        (files if _has_our_mark(path) else foreign).append(path)
    return UnusedCaches(files=tuple(files), foreign=tuple(foreign))


def _has_our_mark(path: Path) -> bool:
    try:
        return read_header(path).metadata.get("architecture") == ARCHITECTURE
    except ModelFileError:
        return False  # a damaged file does not tell whose it is
