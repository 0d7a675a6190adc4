"""Dataset files from others: nothing outside their folder is read or written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dataset.config.config import ImageDatasetConfig, VideoDatasetConfig
from dataset.confinement import Confinement
from dataset.sources.listing import list_items
from modules.errors import ConfigError


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """Someone else's folder with one image and its caption, beside a private one."""
    folder = tmp_path / "pack" / "im"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"x")
    (folder / "a.txt").write_text("a cat", encoding="utf-8")
    (tmp_path / "private").mkdir()
    for name in ("id_rsa", "a.png"):
        (tmp_path / "private" / name).write_text("secret", encoding="utf-8")
    return tmp_path / "pack"


def dataset(pack: Path, **settings: Any) -> ImageDatasetConfig:
    """The dataset that the pack's own file describes."""
    config = ImageDatasetConfig(
        index=0,
        origin="d.toml line 2",
        cache_directory=pack / "cache",
        image_directory=pack / "im",
        caption_extension=".txt",
    )
    return replace(config, **settings)


def jsonl(pack: Path, *lines: dict[str, Any]) -> ImageDatasetConfig:
    """The same with a JSONL file in a folder of its own."""
    (pack / "meta").mkdir(exist_ok=True)
    path = pack / "meta" / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return dataset(pack, image_directory=None, image_jsonl_file=path)


def refused(pack: Path, config: ImageDatasetConfig | VideoDatasetConfig) -> str:
    """The message about a dataset that leads out of its file's folder; without the option it is taken."""
    assert list_items(config).items
    before = sorted(pack.parent.rglob("*"))
    with pytest.raises(ConfigError, match="leads out of") as caught:
        list_items(config, confinement=Confinement.to_folder_of(pack / "d.toml"))
    assert sorted(pack.parent.rglob("*")) == before
    return str(caught.value)


def taken(pack: Path, config: ImageDatasetConfig) -> list[Path]:
    """The media of a dataset that stays in its folder."""
    return [
        item.path for item in list_items(config, confinement=Confinement.to_folder_of(pack / "d.toml")).items
    ]


def test_a_dataset_inside_its_files_folder_is_taken(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pack / "im" / "b.png").symlink_to(pack / "im" / "a.png")
    assert taken(pack, dataset(pack)) == [pack / "im" / "a.png"]
    (pack.parent / "link").symlink_to(pack)
    assert taken(pack.parent / "link", dataset(pack))
    monkeypatch.chdir(pack)
    inside = dataset(Path(), cache_directory=Path("im/../cache"))
    assert list_items(inside, confinement=Confinement.to_folder_of(Path("d.toml"))).items


def test_a_cache_folder_elsewhere_is_refused(pack: Path) -> None:
    message = refused(pack, dataset(pack, cache_directory=pack / ".." / "evil"))
    assert "cache_directory" in message
    (pack / "cache").symlink_to(pack.parent / "private")
    assert "cache_directory" in refused(pack, dataset(pack))


@pytest.mark.parametrize("name", ["image_directory", "mask_directory"])
def test_media_and_masks_elsewhere_are_refused(pack: Path, name: str) -> None:
    (pack.parent / "private" / "a.txt").write_text("x", encoding="utf-8")
    assert name in refused(pack, dataset(pack, **{name: pack.parent / "private"}))


@pytest.mark.parametrize("name", ["a.txt", "a.png"])
def test_a_caption_or_a_medium_that_is_a_link_to_a_private_file_is_refused(pack: Path, name: str) -> None:
    (pack / "im" / name).unlink()
    (pack / "im" / name).symlink_to("../../private/id_rsa")
    assert name in refused(pack, dataset(pack))


def test_links_among_masks_and_caches_are_refused(pack: Path) -> None:
    (pack / "masks").mkdir()
    (pack / "masks" / "a.png").symlink_to(pack.parent / "private" / "a.png")
    assert "masks/a.png" in refused(pack, dataset(pack, mask_directory=pack / "masks")).replace("\\", "/")
    (pack / "cache").mkdir()
    (pack / "cache" / ".k5_lock").symlink_to(pack.parent / "private" / "id_rsa")
    assert ".k5_lock" in refused(pack, dataset(pack))


def test_a_jsonl_file_elsewhere_is_refused(pack: Path) -> None:
    config = jsonl(pack, {"image_path": str(pack / "im" / "a.png"), "caption": "x"})
    moved = pack.parent / "private" / "m.jsonl"
    assert config.jsonl_file is not None
    config.jsonl_file.rename(moved)
    assert "image_jsonl_file" in refused(pack, replace(config, image_jsonl_file=moved))


def test_jsonl_paths_count_from_its_own_folder_and_stay_in_the_dataset_files(pack: Path) -> None:
    assert taken(pack, jsonl(pack, {"image_path": "../im/a.png", "caption": "x"})) == [
        pack / "meta" / "../im/a.png"
    ]
    (pack / "meta" / "link.png").symlink_to(pack.parent / "private" / "a.png")
    for leading_out in ("../../private/a.png", str(pack.parent / "private" / "a.png"), "link.png"):
        message = refused(pack, jsonl(pack, {"image_path": leading_out, "caption": "x"}))
        assert "line 1: image_path" in message
        mask = {"image_path": str(pack / "im" / "a.png"), "caption": "x", "mask_path": leading_out}
        assert "line 1: mask_path" in refused(pack, jsonl(pack, mask))


def test_a_frame_folder_may_hold_no_links_that_lead_out(pack: Path) -> None:
    (pack / "shot").mkdir()
    (pack / "shot" / "0.png").symlink_to(pack.parent / "private" / "a.png")
    path = pack / "v.jsonl"
    path.write_text(json.dumps({"video_path": "shot", "caption": "x"}), encoding="utf-8")
    config = VideoDatasetConfig(index=0, origin="", cache_directory=pack / "cache", video_jsonl_file=path)
    assert "video_path shot" in refused(pack, config)
