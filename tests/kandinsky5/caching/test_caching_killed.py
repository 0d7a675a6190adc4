"""Caching that is killed anywhere, or that lists in any order, ends in the bytes of one clean run."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kandinsky5.sampling.video_files import write_video
from tests.kandinsky5.caching.test_caching import cache_latents, cache_text, contents, write_dataset
from tests.kandinsky5.training.fault_kit import KILLED, FaultyDisk, start, wait

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")

Script = Callable[..., None]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two images and a video with captions, and a dataset file for them."""
    rng = np.random.default_rng(0)
    for folder in ("images", "videos"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        path = tmp_path / "images" / f"{name}.png"
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"photo {name}", encoding="utf-8")
    write_video(tmp_path / "videos" / "v.mp4", rng.integers(0, 255, (6, 32, 32, 3), dtype=np.uint8), fps=24)
    (tmp_path / "videos" / "v.txt").write_text("a video", encoding="utf-8")
    write_dataset(tmp_path)
    return tmp_path


def clear(project: Path) -> None:
    for folder in project.glob("cache_*"):
        shutil.rmtree(folder)


def operations(project: Path, models: Path, script: Script) -> int:
    """How many file operations below the project one clean run makes."""
    log = project.parent / "count.txt"

    def count() -> None:
        disk = FaultyDisk(project, 0, "count")
        disk.install()
        script(project, models, "--num_workers", "1")
        (project.parent / "operations.txt").write_text(str(len(disk.done)), encoding="utf-8")

    assert wait(start(count, log)) == 0, log.read_text(encoding="utf-8")
    return int((project.parent / "operations.txt").read_text(encoding="utf-8"))


def check_kills(project: Path, models: Path, script: Script, numbers: Iterator[int] | range) -> None:
    expected = contents(project)
    for number in numbers:
        clear(project)

        def killed(number: int = number) -> None:
            FaultyDisk(project, number, "killed").install()
            script(project, models, "--num_workers", "1")

        assert wait(start(killed, project.parent / "log.txt")) == KILLED, number
        script(project, models, "--skip_existing")
        assert contents(project) == expected, number
        assert not [*project.rglob(".k5tmp-*")], number


@pytest.mark.parametrize("script", [cache_latents, cache_text], ids=["latents", "text"])
def test_a_run_that_is_killed_at_some_operations_is_finished_by_the_next(
    script: Script, project: Path, tiny_models: Path
) -> None:
    total = operations(project, tiny_models, script)
    assert total > 20
    check_kills(project, tiny_models, script, range(total // 3, total, total // 3))


@pytest.mark.slow
@pytest.mark.parametrize("script", [cache_latents, cache_text], ids=["latents", "text"])
def test_a_run_that_is_killed_at_any_operation_is_finished_by_the_next(
    script: Script, project: Path, tiny_models: Path
) -> None:
    check_kills(project, tiny_models, script, range(1, operations(project, tiny_models, script) + 1))


def test_neither_the_order_of_a_listing_nor_the_number_of_threads_changes_a_byte(
    project: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_latents(project, tiny_models)
    cache_text(project, tiny_models)
    expected = contents(project)
    iterdir = Path.iterdir
    for workers in (1, 2, 4):
        clear(project)

        def shuffled(self: Path, seed: int = workers) -> Iterator[Path]:
            paths = sorted(iterdir(self))
            random.Random(seed).shuffle(paths)
            return iter(paths)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "iterdir", shuffled)
            cache_latents(project, tiny_models, "--num_workers", str(workers))
            cache_text(project, tiny_models)
        assert contents(project) == expected, workers
