"""The cache format: names, keys, metadata, and every way a file can fail to fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from dataset.cache.files import (
    LatentCacheMeta,
    TextCacheMeta,
    inspect_latent_cache,
    inspect_text_cache,
    latent_cache_problem,
    read_latent_cache,
    read_text_cache,
    text_cache_problem,
    write_latent_cache,
    write_text_cache,
)
from dataset.cache.index import IndexEntry, IndexItem, index_path, read_index, update_index
from dataset.cache.names import (
    image_cache_name,
    parse_latent_name,
    text_cache_name,
    video_cache_name,
)
from dataset.cache.unused import unused_caches
from dataset.sources.items import SkippedItem
from modules.errors import CacheError, DataError, NewerCacheError
from modules.tensor_files import read_header, read_tensors, write_tensors

META = LatentCacheMeta(
    width=64,
    height=48,
    frame_count=5,
    frame_start=0,
    crop="64x48",
    fps="all",
    dtype="float16",
    vae_tile="none",
    source_fingerprint="12-ab",
    encoder_fingerprint="vae",
)
TEXT_META = TextCacheMeta(
    caption1="a cat 猫 {0}\nline 2",
    template="video",
    qwen_max_length=256,
    clip_max_length=77,
    encoder_fingerprint="qwen",
)
NAME = "a_00000-005_0064x0048_k5.safetensors"


def write_latents(path: Path, meta: LatentCacheMeta = META) -> Path:
    """A small latent cache of 5 frames at 64x48."""
    generator = torch.Generator().manual_seed(0)
    write_latent_cache(
        path,
        torch.randn(16, 2, 6, 8, generator=generator),
        torch.randn(16, 2, 6, 8, generator=generator),
        meta,
    )
    return path


def write_text(path: Path, meta: TextCacheMeta = TEXT_META) -> Path:
    """A small text cache of 3 tokens."""
    write_text_cache(path, torch.arange(12.0).reshape(3, 4), torch.arange(5.0), meta)
    return path


def test_names_are_as_users_know_them() -> None:
    assert image_cache_name("cat 01", 1920, 1080) == "cat 01_1920x1080_k5.safetensors"
    assert video_cache_name("run.v2", 0, 25, 672, 384) == "run.v2_00000-025_0672x0384_k5.safetensors"
    assert text_cache_name("shot7") == "shot7_k5_te.safetensors"


@pytest.mark.parametrize("base", ["a", "a_b", "a_00001-005", "a_0064x0048", "x.y", "日本", "_", "a\nb"])
def test_names_can_be_taken_apart_again(base: str) -> None:
    video = parse_latent_name(video_cache_name(base, 13, 121, 672, 384), "video")
    assert video is not None
    assert (video.base_name, video.start, video.num_frames) == (base, 13, 121)
    assert (video.width, video.height) == (672, 384)
    image = parse_latent_name(image_cache_name(base, 20000, 48), "image")
    assert image is not None
    assert (image.base_name, image.start, image.width, image.height) == (base, None, 20000, 48)


def test_foreign_names_are_not_taken_for_caches() -> None:
    for name in (
        "a_k5_te.safetensors",
        "a_64x48_k5.safetensors",
        "a_0064x0048_wan.safetensors",
        "k5.safetensors",
    ):
        assert parse_latent_name(name, "image") is None
    assert parse_latent_name("a_0064x0048_k5.safetensors", "video") is None
    three_parts = parse_latent_name("a_00000-005-00_0064x0048_k5.safetensors", "video")
    assert three_parts is not None
    assert three_parts.num_frames == 5


def test_a_latent_cache_has_upstreams_keys_and_comes_back_in_float32(tmp_path: Path) -> None:
    path = write_latents(tmp_path / NAME)
    header = read_header(path)
    assert set(header.tensors) == {"latents_2x6x8_float16", "latents_image_2x6x8_float16"}
    assert header.metadata["architecture"] == "kandinsky5"
    assert (header.metadata["width"], header.metadata["frame_count"]) == ("64", "5")
    cache = read_latent_cache(path, "video")
    assert cache.latents.shape == (16, 2, 6, 8)
    assert cache.latents.dtype == torch.float32
    assert cache.latents_image is not None


def test_a_text_cache_has_upstreams_keys(tmp_path: Path) -> None:
    path = write_text(tmp_path / text_cache_name("a"))
    tensors, metadata = read_tensors(path)
    assert tensors["text_embeds_bfloat16"].dtype == torch.bfloat16
    assert tensors["pooled_embed_float32"].shape == (5,)
    assert tensors["attention_mask"].tolist() == [True, True, True]
    assert metadata["caption1"] == TEXT_META.caption1
    assert torch.equal(read_text_cache(path).text_embeds.float(), torch.arange(12.0).reshape(3, 4))


def test_equal_caches_have_equal_bytes(tmp_path: Path) -> None:
    one, other = write_latents(tmp_path / NAME).read_bytes(), write_latents(tmp_path / NAME).read_bytes()
    assert one == other


def test_no_cache_holds_a_folder(tmp_path: Path) -> None:
    for path in (write_latents(tmp_path / NAME), write_text(tmp_path / text_cache_name("a"))):
        assert str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 80),
        ("frame_start", 3),
        ("fps", "30 -> 24"),
        ("vae_tile", "256"),
        ("dtype", "float32"),
        ("source_fingerprint", "13-ab"),
        ("encoder_fingerprint", "other vae"),
    ],
)
def test_each_thing_a_latent_cache_depends_on_makes_it_stale(
    tmp_path: Path, name: str, value: object
) -> None:
    path = write_latents(tmp_path / NAME)
    assert latent_cache_problem(path, META) is None
    problem = latent_cache_problem(path, dataclasses.replace(META, **{name: value}))
    assert problem is not None
    assert name in problem


def test_another_resolution_makes_a_latent_cache_stale(tmp_path: Path) -> None:
    problem = latent_cache_problem(write_latents(tmp_path / NAME), dataclasses.replace(META, crop="80x48"))
    assert problem == "latents are 8x6, should be 10x6"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("caption1", "a dog"),
        ("more_captions", ("a dog",)),
        ("template", "image"),
        ("qwen_max_length", 512),
        ("clip_max_length", 60),
        ("encoder_fingerprint", "other"),
    ],
)
def test_each_thing_a_text_cache_depends_on_makes_it_stale(tmp_path: Path, name: str, value: object) -> None:
    path = write_text(tmp_path / text_cache_name("a"))
    assert text_cache_problem(path, TEXT_META) is None
    problem = text_cache_problem(path, dataclasses.replace(TEXT_META, **{name: value}))
    assert problem is not None
    assert name.removeprefix("more_").removesuffix("s") in problem


def test_captions_lie_in_one_file_and_each_is_read_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / text_cache_name("a")
    tensors = [(torch.full((length, 4), float(length)), torch.ones(3) * length) for length in (2, 3)]
    meta = dataclasses.replace(TEXT_META, more_captions=("a dog",))
    write_text_cache(path, *tensors[0], meta, tensors[1:])
    assert text_cache_problem(path, meta) is None
    assert text_cache_problem(path, TEXT_META) == "captions were 2, are 1"
    for number, (embeds, pooled) in enumerate(tensors):
        cache = read_text_cache(path, number)
        assert torch.equal(cache.text_embeds.float(), embeds)
        assert torch.equal(cache.pooled_embed, pooled)
    with pytest.raises(CacheError, match="holds 2 captions, not 3"):
        read_text_cache(path, 2)
    stored, metadata = read_tensors(path)
    del stored["caption2_pooled_embed_float32"]
    write_tensors(path, stored, metadata)
    with pytest.raises(CacheError, match="holds no caption2_pooled_embed"):
        inspect_text_cache(path)


def test_a_cache_cut_anywhere_is_remade_and_refused(tmp_path: Path) -> None:
    latents, text = write_latents(tmp_path / NAME), write_text(tmp_path / text_cache_name("a"))
    whole = {path: path.read_bytes() for path in (latents, text)}
    for path, content in whole.items():
        for part in range(20):
            path.write_bytes(content[: len(content) * part // 20])
            if path is latents:
                assert latent_cache_problem(path, META) is not None
                with pytest.raises(CacheError, match="a_00000"):
                    inspect_latent_cache(path, "video")
            else:
                assert text_cache_problem(path, TEXT_META) is not None
                with pytest.raises(CacheError, match="a_k5_te"):
                    inspect_text_cache(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path, value: float) -> None:
    """1e6 is finite, but not in float16."""
    latents = torch.zeros(16, 2, 6, 8)
    latents[3, 1, 2, 5] = value
    with pytest.raises(DataError, match=r"a_00000-005.*1 of 1536 latents are not finite") as caught:
        write_latent_cache(tmp_path / NAME, latents, torch.zeros(16, 2, 6, 8), META)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_not_read_either(tmp_path: Path) -> None:
    bad = torch.full((16, 2, 6, 8), float("nan"))
    write_tensors(tmp_path / NAME, {"latents_2x6x8_float32": bad}, {"architecture": "kandinsky5"})
    with pytest.raises(CacheError, match="not finite"):
        read_latent_cache(tmp_path / NAME, "video")


def test_a_frame_count_that_does_not_fit_the_name_is_refused(tmp_path: Path) -> None:
    path = write_latents(tmp_path / "a_00000-009_0064x0048_k5.safetensors")
    with pytest.raises(CacheError, match="2 latent frames, but 9 pixel frames in its name make 3"):
        inspect_latent_cache(path, "video")


def test_caches_of_a_newer_version_are_neither_read_nor_remade(tmp_path: Path) -> None:
    path = write_latents(tmp_path / NAME)
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, {**metadata, "k5_cache_version": "99"})
    with pytest.raises(NewerCacheError, match="newer version"):
        inspect_latent_cache(path, "video")
    with pytest.raises(NewerCacheError):
        latent_cache_problem(path, META)
    write_tensors(path, tensors, {**metadata, "k5_cache_version": "0"})
    assert "older version" in str(latent_cache_problem(path, META))


def test_upstream_caches_are_recognised_and_their_last_frame_is_not_used(tmp_path: Path) -> None:
    tensors = {"latents_2x6x8_bfloat16": torch.ones(16, 2, 6, 8, dtype=torch.bfloat16)}
    tensors["latents_image_2x6x8_bfloat16"] = torch.ones(16, 2, 6, 8, dtype=torch.bfloat16)
    write_tensors(tmp_path / NAME, tensors, {"architecture": "kandinsky5", "format_version": "1.0.1"})
    info = inspect_latent_cache(tmp_path / NAME, "video")
    assert not info.is_ours
    assert read_latent_cache(tmp_path / NAME, "video").latents_image is None
    assert latent_cache_problem(tmp_path / NAME, META) == "made by musubi-tuner"


def test_keys_with_varlen_and_any_dtype_are_read(tmp_path: Path) -> None:
    tensors = {
        "varlen_text_embeds_float16": torch.ones(3, 4).half(),
        "pooled_embed_bfloat16": torch.ones(5).bfloat16(),
    }
    path = tmp_path / text_cache_name("a")
    write_tensors(path, tensors, {"architecture": "kandinsky5"})
    cache = read_text_cache(path)
    assert (cache.text_embeds.shape, cache.pooled_embed.dtype) == ((3, 4), torch.float32)


def test_the_index_comes_back_and_keeps_other_entries(tmp_path: Path) -> None:
    assert read_index(tmp_path, "latents") is None
    skipped = SkippedItem(name="b.mp4", reason="too short", detail="3 frames")
    entry = IndexEntry(items=(IndexItem(name="a", files=(NAME,)),), skipped=(skipped,))
    update_index(tmp_path, "latents", "h1", entry)
    update_index(tmp_path, "latents", "h2", IndexEntry(items=(), skipped=()))
    assert read_index(tmp_path, "latents") == {"h1": entry, "h2": IndexEntry(items=(), skipped=())}
    before = index_path(tmp_path, "latents").read_bytes()
    update_index(tmp_path, "latents", "h1", entry)
    assert index_path(tmp_path, "latents").read_bytes() == before
    assert str(tmp_path).encode() not in before


@pytest.mark.parametrize("folder", ["caches", "made by a newer version", "cannot be read"])
@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b'{"version": 1}', b'{"version": "x", "entries": {}}', b"[" * 100_000, b"\xff\xfe{"],
)
def test_a_damaged_index_is_refused_and_remade_whatever_its_folder_is_called(
    tmp_path: Path, folder: str, content: bytes
) -> None:
    path = index_path(tmp_path / folder, "text")
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CacheError, match="the index is damaged"):
        read_index(path.parent, "text")
    update_index(path.parent, "text", "h", IndexEntry(items=(), skipped=()))
    assert read_index(path.parent, "text") == {"h": IndexEntry(items=(), skipped=())}


def test_an_index_that_cannot_be_read_is_not_replaced(tmp_path: Path) -> None:
    """It may hold entries of other datasets, and be readable again tomorrow."""
    path = index_path(tmp_path, "text")
    path.mkdir()
    with pytest.raises(CacheError, match="cannot be read"):
        update_index(tmp_path, "text", "h", IndexEntry(items=(), skipped=()))
    assert path.is_dir()


def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    value = {"version": 1, "entries": {"h": {"items": [{"name": "a", "files": ["../../x"]}], "skipped": []}}}
    index_path(tmp_path, "text").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(CacheError, match="plain file name"):
        read_index(tmp_path, "text")


def test_an_index_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    index_path(tmp_path, "text").write_text('{"version": 99, "entries": {}}', encoding="utf-8")
    for use in (
        lambda: read_index(tmp_path, "text"),
        lambda: update_index(tmp_path, "text", "h", IndexEntry(items=(), skipped=())),
    ):
        with pytest.raises(NewerCacheError, match="newer version"):
            use()
    assert index_path(tmp_path, "text").read_text(encoding="utf-8") == '{"version": 99, "entries": {}}'


def test_unused_caches_are_told_from_used_and_foreign_ones(tmp_path: Path) -> None:
    used, old = write_latents(tmp_path / NAME), write_latents(tmp_path / NAME.replace("a_", "old_"))
    foreign = tmp_path / NAME.replace("a_", "other_")
    write_tensors(foreign, {"x": torch.ones(1)}, {"architecture": "wan"})
    write_text(tmp_path / text_cache_name("a"))
    entry = IndexEntry(items=(IndexItem(name="a", files=(used.name,)),), skipped=())
    update_index(tmp_path, "latents", "h", entry)
    unused = unused_caches(tmp_path, "latents", ["video"])
    assert (unused.files, unused.foreign) == ((old,), (foreign,))
    assert unused.total_bytes == old.stat().st_size
