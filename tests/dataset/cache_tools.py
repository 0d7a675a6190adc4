"""Writes small caches and their indexes without any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dataset.cache.files import LatentCacheMeta, TextCacheMeta, write_latent_cache, write_text_cache
from dataset.cache.index import IndexEntry, IndexItem, entry_key, metadata_digest, update_index
from dataset.cache.names import text_cache_name, video_cache_name
from dataset.config.config import AnyDatasetConfig
from dataset.media.files import Content
from dataset.sources.items import SkippedItem
from modules.seeding import generator_for
from modules.tensor_files import read_header


def add_video_latents(
    folder: Path,
    name: str,
    *,
    num_frames: int = 5,
    start: int = 0,
    size: tuple[int, int] = (64, 48),
    vae: str = "vae",
    fps: str = "all",
    source: str = "1-a",
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
        source_fingerprint=source,
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
    limits: tuple[int, int] = (256, 77),
    file_name: str | None = None,
) -> None:
    """One text cache; `more` gives the numbers of tokens of further captions."""
    meta = TextCacheMeta(
        caption1=name if caption is None else caption,
        more_captions=tuple(f"{name} {length}" for length in more),
        template=template,
        qwen_max_length=limits[0],
        clip_max_length=limits[1],
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
    with_digests: bool = False,
) -> None:
    """Both indexes of a dataset: latent files by base name, and the names that have a text cache."""
    folder = dataset.cache_directory
    items = tuple(_item(folder, name, sorted(files[name]), with_digests) for name in sorted(files))
    entry = IndexEntry(items=items, skipped=tuple(skipped))
    update_index(folder, "latents", entry_key(dataset, "latents"), entry)
    write_text_index(dataset, sorted(files if texts is None else texts), skipped, with_digests=with_digests)


def write_text_index(
    dataset: AnyDatasetConfig,
    names: Sequence[str],
    skipped: Sequence[SkippedItem] = (),
    *,
    with_digests: bool = False,
) -> None:
    """The index of text caches for these names."""
    folder = dataset.cache_directory
    items = tuple(_item(folder, name, [text_cache_name(name)], with_digests) for name in names)
    entry = IndexEntry(items=items, skipped=tuple(skipped))
    update_index(folder, "text", entry_key(dataset, "text"), entry)


def _item(folder: Path, name: str, files: Sequence[str], with_digests: bool) -> IndexItem:
    digests = [metadata_digest(read_header(folder / file).metadata) for file in files if with_digests]
    return IndexItem(name=name, files=tuple(files), digests=tuple(digests))
