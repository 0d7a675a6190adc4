"""Several dataset files that cache into one folder: training never takes the caches of another dataset."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dataset.cache.cached_dataset import CachedDataset
from dataset.cache.index import entry_key, index_path, read_index
from dataset.config.config import DatasetConfig, load_dataset_config
from modules.errors import CacheError
from tests.dataset.cache_tools import add_text, add_video_latents, write_indexes


def dataset_file(
    folder: Path, name: str, source: str, extra: str = "", extension: str = ".txt"
) -> DatasetConfig:
    """A dataset file whose caches lie in `folder`/c."""
    (folder / "c").mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(
        f"[[datasets]]\nvideo_directory = '{folder / source}'\ncache_directory = '{folder / 'c'}'\n"
        f"caption_extension = '{extension}'\nresolution = [64, 48]\ntarget_frames = [5]\n{extra}\n",
        encoding="utf-8",
    )
    return load_dataset_config(path)


def fill(config: DatasetConfig, *names: str, caption: str = "a cat", source: str = "1-a") -> None:
    """What both cache scripts leave for these videos."""
    (dataset,) = config.datasets
    folder = dataset.cache_directory
    files = {name: [add_video_latents(folder, name, source=source)] for name in names}
    for name in names:
        add_text(folder, name, caption=caption)
    write_indexes(dataset, files, with_digests=True)


def keys(config: DatasetConfig) -> list[str]:
    """The clips a training takes."""
    return [item.key for item in CachedDataset(config, seed=0).items]


def refused(config: DatasetConfig) -> str:
    """The message that ends a training."""
    with pytest.raises(CacheError) as caught:
        CachedDataset(config, seed=0)
    return str(caught.value)


def test_caches_that_another_dataset_file_made_again_are_refused(tmp_path: Path) -> None:
    one, other = dataset_file(tmp_path, "one", "x"), dataset_file(tmp_path, "other", "y")
    fill(one, "clip", caption="a dog", source="1-a")
    fill(other, "clip", "more", caption="a cat", source="2-b")
    message = refused(one)
    assert "1 latent cache cannot be used" in message
    assert "1 text cache cannot be used" in message
    assert "kandinsky5_cache_latents.py" in message
    assert "kandinsky5_cache_text_encoder_outputs.py" in message
    assert keys(other) == ["0/clip_00000-005_0064x0048", "0/more_00000-005_0064x0048"]


def test_a_caption_from_another_extension_is_refused(tmp_path: Path) -> None:
    short, long = dataset_file(tmp_path, "a", "x"), dataset_file(tmp_path, "b", "x", extension=".caption")
    fill(short, "clip", caption="short")
    fill(long, "clip", caption="long")
    assert "clip_k5_te.safetensors: was made again" in refused(short)
    assert "latent caches cannot be used" not in refused(short)  # both share them
    assert len(keys(long)) == 1


def test_two_sources_with_names_of_their_own_can_share_a_folder(tmp_path: Path) -> None:
    one, other = dataset_file(tmp_path, "one", "x"), dataset_file(tmp_path, "other", "y")
    fill(one, "a")
    fill(other, "b")
    assert [keys(config)[0][2] for config in (one, other)] == ["a", "b"]


@pytest.mark.parametrize("fps", ["60 -> 24", "all", "30 -> 12"])
def test_clips_of_another_source_rate_are_refused_without_an_index_too(tmp_path: Path, fps: str) -> None:
    config = dataset_file(tmp_path, "one", "x", "source_fps = 30")
    folder = config.datasets[0].cache_directory
    add_video_latents(folder, "a", fps=fps)
    add_text(folder, "a")
    assert f"fps was {fps!r}, is '30 -> 24'" in refused(config)
    for right in ("30 -> 24", "time stamps -> 24"):
        add_video_latents(folder, "a", fps=right)
        assert len(keys(config)) == 1


def test_caches_move_to_a_machine_without_the_media(tmp_path: Path) -> None:
    fill(dataset_file(tmp_path / "home", "one", "x"), "a")
    shutil.copytree(tmp_path / "home", tmp_path / "rented")
    same_places = dataset_file(tmp_path / "rented", "one", "x")
    assert CachedDataset(same_places, seed=0).notes == ()
    other_place = dataset_file(tmp_path / "rented", "one", "nowhere")
    data = CachedDataset(other_place, seed=0)
    assert len(data.items) == 1
    assert any("cached from another place" in note for note in data.notes)


def test_a_dataset_that_was_never_cached_does_not_take_the_caches_of_its_neighbour(tmp_path: Path) -> None:
    fill(dataset_file(tmp_path, "one", "x"), "a")
    never = dataset_file(tmp_path, "other", "y")
    (tmp_path / "y").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "y" / "a.png")
    assert len(keys(never)) == 1  # no video is there: as on a machine without the media
    (tmp_path / "y" / "a.mp4").write_bytes(b"not opened")
    (tmp_path / "y" / "a.txt").write_text("a cat", encoding="utf-8")
    message = refused(never)
    assert "cached from another place" in message
    assert "cache_directory of its own" in message


def test_of_several_datasets_none_is_guessed(tmp_path: Path) -> None:
    for name in "xy":
        fill(dataset_file(tmp_path, name, name), name)
    assert "belong to 2 datasets" in refused(dataset_file(tmp_path, "z", "z"))


def test_indexes_of_older_versions_are_read(tmp_path: Path) -> None:
    config = dataset_file(tmp_path, "one", "x")
    fill(config, "a")
    (dataset,) = config.datasets
    for kind, settings in (("latents", dataset.settings_hash), ("text", dataset.text_settings_hash)):
        path = index_path(dataset.cache_directory, kind)
        value = json.loads(path.read_text(encoding="utf-8"))
        (entry,) = value["entries"].values()
        for item in entry["items"]:
            del item["digests"]
        value["entries"] = {settings: entry}
        path.write_text(json.dumps(value), encoding="utf-8")
    data = CachedDataset(config, seed=0)
    assert (len(data.items), data.notes) == (1, ())
    fill(config, "a")
    assert set(read_index(dataset.cache_directory, "text") or {}) == {entry_key(dataset, "text")}
