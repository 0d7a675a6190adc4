"""Several datasets with one cache_directory, as in musubi-tuner's sample file, told apart by the index."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.cache.cached_dataset import CachedDataset
from dataset.config.config import load_dataset_config
from kandinsky5.sampling.video_files import write_video
from modules.errors import CacheError
from tests.kandinsky5.caching.test_caching import cache_latents, cache_text, contents


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """As in musubi-tuner's full sample: a folder of images, a JSONL file of images, a folder of videos."""
    rng = np.random.default_rng(0)
    for folder in ("image_dir", "more", "video_dir"):
        (tmp_path / folder).mkdir()
    lines = []
    for folder, name in (("image_dir", "a"), ("image_dir", "b"), ("more", "c")):
        path = tmp_path / folder / f"{name}.png"
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"photo {name}", encoding="utf-8")
        lines.append(json.dumps({"image_path": str(path), "caption": f"photo {name}"}))
    (tmp_path / "metadata.jsonl").write_text(lines[-1] + "\n", encoding="utf-8")
    write_video(
        tmp_path / "video_dir" / "v.mp4", rng.integers(0, 255, (6, 32, 32, 3), dtype=np.uint8), fps=24
    )
    (tmp_path / "video_dir" / "v.txt").write_text("a video", encoding="utf-8")
    (tmp_path / "dataset.toml").write_text(
        f"""
[general]
resolution = [32, 32]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true
bucket_no_upscale = false

[[datasets]]
image_directory = "{(tmp_path / "image_dir").as_posix()}"
cache_directory = "{(tmp_path / "cache_all").as_posix()}"
num_repeats = 1

[[datasets]]
image_jsonl_file = "{(tmp_path / "metadata.jsonl").as_posix()}"
cache_directory = "{(tmp_path / "cache_all").as_posix()}"

[[datasets]]
video_directory = "{(tmp_path / "video_dir").as_posix()}"
cache_directory = "{(tmp_path / "cache_all").as_posix()}"
target_frames = [1, 5]
frame_extraction = "head"
""",
        encoding="utf-8",
    )
    return tmp_path


def test_three_datasets_with_one_cache_folder_are_cached_and_trained_on(
    project: Path, tiny_models: Path, said: pytest.LogCaptureFixture
) -> None:
    cache_latents(project, tiny_models)
    cache_text(project, tiny_models)
    first = contents(project)
    cache_latents(project, tiny_models, "--skip_existing", "--prune")
    cache_text(project, tiny_models, "--skip_existing", "--prune")
    assert contents(project) == first  # nothing of one dataset is unused because of another
    config = load_dataset_config(project / "dataset.toml")
    dataset = CachedDataset(config, seed=0)
    assert [summary.used for summary in dataset.summaries] == [2, 1, 1]
    assert "not used by any dataset file" not in said.text
    (project / "video_dir" / "v.mp4").unlink()
    Image.new("RGB", (32, 32)).save(project / "image_dir" / "d.png")
    (project / "image_dir" / "d.txt").write_text("photo d", encoding="utf-8")
    (project / "image_dir" / "a.png").unlink()
    write_video(project / "video_dir" / "w.mp4", np.zeros((6, 32, 32, 3), np.uint8), fps=24)
    (project / "video_dir" / "w.txt").write_text("a video", encoding="utf-8")
    cache_latents(project, tiny_models, "--skip_existing", "--prune")
    names = {path.name[:2] for path in (project / "cache_all").glob("*_k5.safetensors")}
    assert names == {"b_", "c_", "d_", "w_"}


def test_files_that_would_replace_each_other_are_refused_by_name(
    project: Path, tiny_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "more" / "c.png").rename(project / "more" / "a.png")
    line = {"image_path": str(project / "more" / "a.png"), "caption": "another photo"}
    (project / "metadata.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    for cache, name in ((cache_latents, "a_0032x0032_k5"), (cache_text, "a_k5_te")):
        with pytest.raises(SystemExit) as caught:
            cache(project, tiny_models)
        assert caught.value.code == 3
        error = capsys.readouterr().err
        assert f"a.png and a.png would both be {name}.safetensors" in error
        assert "datasets 0 and 1 share" in error
    assert contents(project) == {}


def test_a_shared_folder_without_an_index_is_not_guessed_about(project: Path, tiny_models: Path) -> None:
    cache_latents(project, tiny_models)
    cache_text(project, tiny_models)
    for path in (project / "cache_all").glob("k5_index*"):
        path.unlink()
    with pytest.raises(CacheError, match=r"datasets 0, 1, 2 share .* has no index"):
        CachedDataset(load_dataset_config(project / "dataset.toml"), seed=0)
