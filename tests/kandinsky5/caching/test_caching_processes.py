"""Several processes of the cache scripts write together what one would have written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kandinsky5_cache_latents
import kandinsky5_cache_text_encoder_outputs
from kandinsky5.caching import run as caching
from kandinsky5.sampling.video_files import write_video
from modules.processes import Processes


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Three videos, two of them with masks and one of these damaged, to be cached into `cache`."""
    rng = np.random.default_rng(0)
    for folder in ("videos", "masks"):
        (tmp_path / folder).mkdir()
    for name in ("one", "two", "three"):
        frames = rng.integers(0, 255, (10, 32, 32, 3), dtype=np.uint8)
        write_video(tmp_path / "videos" / f"{name}.mp4", frames, fps=24)
        (tmp_path / "videos" / f"{name}.txt").write_text(f"a video of {name}\nwith words", encoding="utf-8")
    for name in ("one", "two"):
        path = tmp_path / "masks" / f"{name}.png"
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:700])
    return tmp_path


def words(project: Path, models: Path, kind: str) -> list[str]:
    (project / "dataset.toml").write_text(
        f"""
[[datasets]]
video_directory = "{(project / "videos").as_posix()}"
mask_directory = "{(project / "masks").as_posix()}"
cache_directory = "{(project / "cache").as_posix()}"
caption_extension = ".txt"
caption_lines = true
resolution = [32, 32]
target_frames = [1, 5]
frame_extraction = "chunk"
batch_size = 2
""",
        encoding="utf-8",
    )
    common = ["--dataset_config", str(project / "dataset.toml"), "--device", "cpu", "--skip_bad"]
    if kind == "latents":
        return [*common, "--vae", str(models / "vae")]
    encoders = (
        "--text_encoder_qwen",
        models / "text_encoder",
        "--text_encoder_clip",
        models / "text_encoder2",
    )
    return [*common, *map(str, encoders)]


def run(project: Path, models: Path) -> dict[str, bytes]:
    """Both scripts; every file they leave."""
    kandinsky5_cache_latents.main(words(project, models, "latents"))
    kandinsky5_cache_text_encoder_outputs.main(words(project, models, "text"))
    return contents(project)


def contents(project: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((project / "cache").glob("k5_*"))} | {
        path.name: path.read_bytes() for path in sorted((project / "cache").glob("*.safetensors"))
    }


def times(project: Path) -> dict[str, int]:
    names = contents(project)
    return {name: (project / "cache" / name).stat().st_mtime_ns for name in names}


class Lonely(Processes):
    """One of several, none of which waits for the others."""

    def gather(self, value: object) -> list[object]:
        return [value]


def test_the_shares_are_together_what_one_process_writes(
    project: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(project, tiny_models)
    for path in (project / "cache").iterdir():
        path.unlink()
    shares: list[set[str]] = []
    for index in (2, 1, 0):
        own = Lonely(index, 3)

        @contextmanager
        def joined(own: Processes = own) -> Iterator[Processes]:
            yield own

        monkeypatch.setattr(caching, "joined_processes", joined)
        before = times(project)
        found = run(project, tiny_models)
        shares.append({name for name, time in times(project).items() if before.get(name) != time})
        assert ("k5_index_latents.json" in found) == (index == 0)
    assert {name: found[name] for name in found if not name.endswith(".json")} == {
        name: value for name, value in expected.items() if not name.endswith(".json")
    }
    assert all(shares)
    assert sum(map(len, shares)) == len(expected)  # nothing is written twice


def test_what_one_process_did_before_another_died_is_finished_by_the_next_run(
    project: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(project, tiny_models)
    for path in (project / "cache").iterdir():
        path.unlink()

    @contextmanager
    def joined() -> Iterator[Processes]:
        yield Lonely(1, 2)  # the first one is dead: no index, and only half of the caches

    with monkeypatch.context() as patch:
        patch.setattr(caching, "joined_processes", joined)
        half = run(project, tiny_models)
    assert 0 < len(half) < len(expected) - 2
    kandinsky5_cache_latents.main([*words(project, tiny_models, "latents"), "--skip_existing"])
    kandinsky5_cache_text_encoder_outputs.main([*words(project, tiny_models, "text"), "--skip_existing"])
    assert contents(project) == expected


@pytest.mark.slow
def test_two_processes_of_a_launcher_write_what_one_writes(
    project: Path, tiny_models: Path, root: Path
) -> None:
    expected = run(project, tiny_models)
    for path in (project / "cache").iterdir():
        path.unlink()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--num_cpu_threads_per_process", "1"]
    for kind, script in (
        ("latents", "kandinsky5_cache_latents"),
        ("text", "kandinsky5_cache_text_encoder_outputs"),
    ):
        command = [*launch, str(root / f"{script}.py"), *words(project, tiny_models, kind)]
        subprocess.run(command, check=True, timeout=300)
    assert contents(project) == expected
