"""The folder layout in which huggingface_hub keeps downloads."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

_REVISION = "0123456789abcdef0123456789abcdef01234567"


def make_hub_cache(folder: Path, cache: Path, repo_id: str) -> Path:
    """Lay `folder` out as the downloaded model `repo_id`: a snapshot of symlinks into blobs.

    Returns the snapshot folder; `cache` is what HF_HUB_CACHE would name.
    """
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / _REVISION
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(_REVISION, encoding="utf-8")
    for path in sorted(folder.iterdir()):
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot
