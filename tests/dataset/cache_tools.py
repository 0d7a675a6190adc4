"""Writes small caches and their indexes without any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dataset.cache_files import LatentCacheMeta, TextCacheMeta, write_latent_cache, write_text_cache
from dataset.cache_index import IndexEntry, IndexItem, update_index
from dataset.cache_names import Content, text_cache_name, video_cache_name
from dataset.config import AnyDatasetConfig
from dataset.sources import SkippedItem
from modules.seeding import generator_for


def add_video_latents(
    folder: Path,
    name: str,
    *,
    num_frames: int = 5,
    start: int = 0,
    size: tuple[int, int] = (64, 48),
    vae: str = "vae",
    fps: str = "all",
) -> str:
    """One latent cache of a video; returns its file name."""
    width, height = size
    file_name = video_cache_name(name, start, num_frames, width, height)
    generator = generator_for(file_name)
    shape = (16, (num_frames - 1) // 4 + 1, height // 8, width // 8)
    meta = LatentCacheMeta(
        width=width,
        height=height,
        frame_count=num_frames,
        frame_start=start,
        crop=f"{width}x{height}",
        fps=fps,
        dtype="float32",
        vae_tile="none",
        source_fingerprint="1-a",
        encoder_fingerprint=vae,
    )
    latents = torch.randn(shape, generator=generator)
    write_latent_cache(folder / file_name, latents, latents[:, [0, -1]], meta)
    return file_name


def add_text(
    folder: Path,
    name: str,
    *,
    template: Content = "video",
    tokens: int = 3,
    encoder: str = "qwen",
    dim: int = 8,
    more: Sequence[int] = (),
    caption: str | None = None,
    file_name: str | None = None,
) -> None:
    """One text cache; `more` gives the numbers of tokens of further captions."""
    meta = TextCacheMeta(
        caption1=name if caption is None else caption,
        more_captions=tuple(f"{name} {length}" for length in more),
        template=template,
        qwen_max_length=256,
        clip_max_length=77,
        encoder_fingerprint=encoder,
    )
    generator = generator_for(name)
    first, *rest = (
        (torch.randn(length, dim, generator=generator), torch.randn(4, generator=generator))
        for length in (tokens, *more)
    )
    write_text_cache(folder / (file_name or text_cache_name(name)), *first, meta, rest)


def write_indexes(
    dataset: AnyDatasetConfig,
    files: dict[str, list[str]],
    *,
    texts: Sequence[str] | None = None,
    skipped: Sequence[SkippedItem] = (),
) -> None:
    """Both indexes of a dataset: latent files by base name, and the names that have a text cache."""
    items = tuple(IndexItem(name=name, files=tuple(sorted(files[name]))) for name in sorted(files))
    update_index(
        dataset.cache_directory,
        "latents",
        dataset.settings_hash,
        IndexEntry(items=items, skipped=tuple(skipped)),
    )
    write_text_index(dataset, sorted(files if texts is None else texts), skipped)


def write_text_index(
    dataset: AnyDatasetConfig, names: Sequence[str], skipped: Sequence[SkippedItem] = ()
) -> None:
    """The index of text caches for these names."""
    items = tuple(IndexItem(name=name, files=(text_cache_name(name),)) for name in names)
    entry = IndexEntry(items=items, skipped=tuple(skipped))
    update_index(dataset.cache_directory, "text", dataset.text_settings_hash, entry)
