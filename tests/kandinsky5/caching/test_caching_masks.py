"""The latent cache script and masks: made beside the latents, renewed without them, read by training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kandinsky5_cache_latents
from dataset.cache.cached_dataset import CachedDataset
from dataset.cache.fit import MatchOptions
from dataset.cache.index import read_index
from dataset.cache.mask_cache import read_mask_cache
from dataset.config.config import DatasetConfig, load_dataset_config
from kandinsky5.sampling.video_files import write_video
from modules.errors import CacheError
from tests.dataset.cache_tools import add_text, write_text_index

MASK = "one_00000-005_0032x0032_k5_mask.safetensors"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two tiny videos, a mask for the first, and text caches."""
    rng = np.random.default_rng(0)
    for folder in ("videos", "masks", "cache"):
        (tmp_path / folder).mkdir()
    for name in ("one", "two"):
        frames = rng.integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
        write_video(tmp_path / "videos" / f"{name}.mp4", frames, fps=24)
        (tmp_path / "videos" / f"{name}.txt").write_text(name, encoding="utf-8")
        add_text(tmp_path / "cache", name)
    paint(tmp_path, left=255)
    tmp_path.joinpath("dataset.toml").write_text(
        f"""
[[datasets]]
video_directory = "{(tmp_path / "videos").as_posix()}"
mask_directory = "{(tmp_path / "masks").as_posix()}"
cache_directory = "{(tmp_path / "cache").as_posix()}"
caption_extension = ".txt"
resolution = [32, 32]
target_frames = [5]
batch_size = 2
""",
        encoding="utf-8",
    )
    write_text_index(load_dataset_config(tmp_path / "dataset.toml").datasets[0], ["one", "two"])
    return tmp_path


def paint(project: Path, *, left: int) -> None:
    """A still as the mask of the first video."""
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = left
    Image.fromarray(mask).save(project / "masks" / "one.png")


def load(project: Path) -> DatasetConfig:
    return load_dataset_config(project / "dataset.toml")


def cache(project: Path, models: Path, *options: str) -> None:
    kandinsky5_cache_latents.main([
        "--dataset_config", str(project / "dataset.toml"), "--vae", str(models / "vae"),
        "--device", "cpu", *options,
    ])  # fmt: skip


def test_a_mask_is_cached_beside_the_latents_and_renewed_without_them(
    project: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    cache(project, tiny_models)
    folder = project / "cache"
    assert [path.name for path in folder.glob("*_mask.safetensors")] == [MASK]
    assert read_mask_cache(folder / MASK).tolist() == [[[1.0, 1.0, 0.0, 0.0]] * 4] * 2
    assert "1 of 2 videos have no mask" in said.text
    (entry,) = (read_index(folder, "latents") or {}).values()
    assert [item.masks for item in entry.items] == [(MASK,), ()]

    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*_k5*.safetensors")}
    monkeypatch.delattr("kandinsky5.caching.latents.load_vae")
    paint(project, left=51)
    cache(project, tiny_models, "--skip_existing")
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*_k5*.safetensors")}
    assert {name for name in after if after[name] != before[name]} == {MASK}
    assert read_mask_cache(folder / MASK)[0, 0, 0].item() == pytest.approx(0.2)
    cache(project, tiny_models, "--skip_existing", "--prune")
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*_k5*.safetensors")} == after

    (project / "masks" / "one.png").unlink()
    cache(project, tiny_models, "--skip_existing", "--prune")
    assert not (folder / MASK).exists()


def test_a_black_mask_is_mentioned(project: Path, tiny_models: Path, said: pytest.LogCaptureFixture) -> None:
    paint(project, left=0)
    cache(project, tiny_models)
    assert "1 mask is black throughout" in said.text


def test_a_damaged_mask_takes_its_clip_out_and_ends_with_exit_3(
    project: Path, tiny_models: Path, said: pytest.LogCaptureFixture
) -> None:
    path = project / "masks" / "one.png"
    noise = np.random.default_rng(1).integers(0, 255, (32, 32), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(SystemExit) as caught:
        cache(project, tiny_models)
    assert caught.value.code == 3
    assert "one.mp4: mask damaged" in said.text
    assert [item.key for item in CachedDataset(load(project), seed=0).items] == ["0/two_00000-005_0032x0032"]


def test_a_training_reads_masks_and_counts_clips_without_one_everywhere(
    project: Path, tiny_models: Path
) -> None:
    cache(project, tiny_models)
    unmasked = CachedDataset(load(project), seed=0)
    assert unmasked.load_batch(unmasked.epoch_batches(1)[0]).loss_mask is None
    assert any("1 mask is not used; --masked_loss" in note for note in unmasked.notes)
    data = CachedDataset(load(project), MatchOptions(use_masks=True), seed=0)
    assert any("1 of 2 clips have a mask" in note for note in data.notes)
    (plan,) = data.epoch_batches(1)
    masks = data.load_batch(plan).loss_mask
    assert masks is not None
    first = plan.item_keys.index("0/one_00000-005_0032x0032")
    assert torch.equal(masks[first], read_mask_cache(project / "cache" / MASK))
    assert torch.equal(masks[1 - first], torch.ones(2, 4, 4))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), MASK),
        (lambda path: path.write_bytes((path.parent / "one_k5_te.safetensors").read_bytes()), "no mask"),
    ],
)
def test_a_mask_cache_that_is_gone_or_damaged_stops_a_masked_training(
    project: Path, tiny_models: Path, harm: Callable[[Path], object], message: str
) -> None:
    cache(project, tiny_models)
    harm(project / "cache" / MASK)
    with pytest.raises(CacheError, match=message) as caught:
        CachedDataset(load(project), MatchOptions(use_masks=True), seed=0)
    assert "kandinsky5_cache_latents.py" in str(caught.value)
    CachedDataset(load(project), seed=0)


def test_a_masked_training_without_any_mask_is_refused(project: Path, tiny_models: Path) -> None:
    (project / "masks" / "one.png").unlink()
    cache(project, tiny_models)
    with pytest.raises(CacheError, match="--masked_loss: no clip has a mask"):
        CachedDataset(load(project), MatchOptions(use_masks=True), seed=0)
