"""Confines a dataset file from an untrusted source to its own folder (`--confine_paths`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataset.config.config import AnyDatasetConfig
from modules.errors import ConfigError
from modules.messages import MAX_LINES, shortened


@dataclass(frozen=True, slots=True)
class Confinement:
    """The one folder that a dataset may read from and write to."""

    root: Path
    """With all links resolved."""

    @classmethod
    def to_folder_of(cls, dataset_file: Path) -> Confinement:
        """To the folder that this dataset file lies in; links that lead to the folder are fine."""
        return cls(Path(os.path.realpath(dataset_file.parent)))

    def holds(self, path: Path) -> bool:
        """Whether a file or folder is inside the root, with all that a folder lists.

        Links are resolved; what does not exist counts by its name.
        """
        return self._holds(path) and all(map(self._holds, _entries(path)))

    def check(self, dataset: AnyDatasetConfig) -> None:
        """Check the paths of a dataset and the contents of its folders: media, captions, masks and caches.

        The paths in a JSONL file are not looked at here.

        Raises:
            ConfigError: a path leads outside, directly or through a link.
        """
        folders = {
            f"{dataset.content}_directory": dataset.directory,
            "mask_directory": dataset.mask_directory,
            "cache_directory": dataset.cache_directory,
        }
        named = {**folders, f"{dataset.content}_jsonl_file": dataset.jsonl_file}
        wrong = [f"{key} {path}" for key, path in named.items() if path is not None and not self._holds(path)]
        if not wrong:  # else the folder, which someone else chose, is not even listed
            wrong = [
                str(path)
                for folder in folders.values()
                if folder is not None
                for path in self._below(folder, is_deep=dataset.recursive)
                if not self.holds(path)
            ]
        if wrong:
            where = f"dataset {dataset.index} ({dataset.origin})"
            problems = [f"{where}: {what} leads out of {self.root} (--confine_paths)" for what in wrong]
            raise ConfigError(shortened(problems, MAX_LINES))

    def _below(self, folder: Path, *, is_deep: bool) -> Iterator[Path]:
        """The entries of a folder, and of those below it; one that leads out is not entered."""
        seen = set()
        waiting = [folder]
        while waiting:
            for path in _entries(waiting.pop()):
                yield path
                real = os.path.realpath(path)
                if is_deep and real not in seen and path.is_dir() and self._holds(path):
                    seen.add(real)
                    waiting.append(path)

    def _holds(self, path: Path) -> bool:
        # realpath: unlike Path.resolve it has an answer for links that lead in a circle.
        return Path(os.path.realpath(path)).is_relative_to(self.root)


def _entries(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(folder.iterdir())
