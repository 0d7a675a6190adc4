"""Anonymous ids of files and folders that stay equal when everything is moved together."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


def place_mark(folder: Path, *paths: Path | None) -> str:
    """A short hash of `paths` relative to `folder`; links are not followed."""
    places = [None if path is None else _seen_from(folder, path) for path in paths]
    return hashlib.sha256(json.dumps(places).encode()).hexdigest()[:16]


def _seen_from(folder: Path, path: Path) -> str:
    try:
        place = os.path.relpath(path, folder)
    except ValueError:  # another drive of Windows
        place = os.path.abspath(path)  # noqa: PTH100 - Path.resolve would follow links
    return place.replace(os.sep, "/")
