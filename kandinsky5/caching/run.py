"""Runs the encoders over a dataset and writes its cache files.

Batches are cut from the full sorted list and encoded whole, whatever is cached already: the batch an item is
encoded in, and so its bytes, never depend on what was done before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.cache.files import (
    CacheMeta,
    LatentCacheMeta,
    TextCacheMeta,
    latent_cache_problem,
    latent_meta,
    text_cache_problem,
    write_latent_cache,
    write_text_cache,
    written_metadata,
)
from dataset.cache.index import latent_entry, metadata_digest, text_entry
from dataset.cache.mask_cache import mask_meta
from dataset.cache.names import empty_text_cache_name, mask_cache_name, prior_text_cache_name, text_cache_name
from dataset.clips import ClipPlan, LoadedBatch, PlannedClip, cut_batches, load_batches, plan_clips
from dataset.config.config import AnyDatasetConfig, DatasetConfig, load_dataset_config
from dataset.confinement import Confinement
from dataset.sources import SourceListing, list_items
from kandinsky5.caching.masks import MaskWork, mask_notes, write_masks
from kandinsky5.caching.preview import preview_clips
from kandinsky5.caching.report import (
    CONTINUE_HINT,
    Outcome,
    cache_folders,
    check_strict,
    combine,
    finish,
    handle_unused,
    write_index,
)
from kandinsky5.configs.caching import CacheLatentsConfig, CacheRunConfig, CacheTextConfig, DebugConfig
from kandinsky5.model.precision import vae_dtype
from kandinsky5.text.encoders import (
    TextEncoders,
    check_text_encoder_paths,
    default_qwen_dtype,
    load_text_encoders,
    text_encoder_fingerprint,
)
from kandinsky5.text.templates import PromptTemplates, load_prompt_templates
from kandinsky5.vae.video_vae import VideoVAE, encode_or_tile, load_vae, uint8_to_pixels, vae_fingerprint
from modules.devices import pick_device
from modules.dtypes import dtype_name
from modules.errors import ModelFileError
from modules.files import disk_errors
from modules.interruption import exit_on_signal
from modules.logs import get_logger
from modules.processes import Processes, joined_processes
from modules.seeding import generator_for

log = get_logger(__name__)

# ---------------------------------------------------------------------------------------------- latents


@dataclass(kw_only=True, slots=True)
class _LatentWork:
    """One dataset: what its caches must be, and which batches have to be encoded."""

    listing: SourceListing
    plan: ClipPlan
    metas: dict[str, LatentCacheMeta]
    """By cache name."""
    outcome: Outcome
    batches: tuple[tuple[PlannedClip, ...], ...] = ()
    stale: frozenset[str] = frozenset()
    """Cache names to write."""

    @property
    def dataset(self) -> AnyDatasetConfig:
        return self.outcome.dataset


def cache_latents(config: CacheLatentsConfig) -> None:
    """Encode every clip of the dataset file, or show the clips if the config says so.

    Several processes of a launcher share the batches; the first one writes the indexes and speaks.

    Raises:
        ConfigError, DataError, ModelFileError, ResourceError: each with what to do; damaged media end the run
        only after everything else is cached.
    """
    with exit_on_signal(), joined_processes() as processes:
        if config.debug is None:
            _cache_latents(config, processes)
        elif processes.is_main:
            _show(config, config.debug)


def _show(config: CacheLatentsConfig, debug: DebugConfig) -> None:
    for dataset in _read_datasets(config.run).datasets:
        plan = _plan(dataset, config, _listing(dataset, config.run))
        if not preview_clips(dataset, plan.clips, debug, config.run.num_workers):
            return


def _cache_latents(config: CacheLatentsConfig, processes: Processes) -> None:
    path = config.vae
    assert path is not None  # the command line requires it
    datasets = _read_datasets(config.run).datasets
    device = pick_device(config.run.device, processes.index_on_machine if processes.count > 1 else None)
    dtype = vae_dtype(config.vae_dtype, device)
    if config.disable_cudnn_backend:
        torch.backends.cudnn.enabled = False
    fingerprint = vae_fingerprint(path)
    works = [_latent_work(dataset, config, fingerprint, dtype) for dataset in datasets]
    outcomes = [work.outcome for work in works]
    check_strict(outcomes, config.run)

    def choose() -> None:
        for work in works:
            write_masks(MaskWork(work.outcome, processes.share(work.plan.clips)), config.run)
            _choose_batches(work, config.run)
            work.batches = tuple(processes.share(work.batches))

    def encode() -> None:
        if any(work.batches for work in works):
            vae = load_vae(path, dtype=dtype, device=device)
            for work in works:
                _encode_clips(vae, work, config, is_quiet=not processes.is_main)

    with cache_folders(datasets, processes):
        processes.together(choose)  # nobody writes latents before all have seen which are missing
        processes.together(encode)
        combine(outcomes, processes)
        if not processes.is_main:
            return
        for work in works:
            entry = latent_entry(work.plan.clips, work.outcome.skipped, _latent_digests(work))
            write_index(work.outcome, "latents", entry, config.run)
        handle_unused(outcomes, "latents", config.run)
    finish(outcomes, "latents", config.run)


def _latent_digests(work: _LatentWork) -> dict[str, str]:
    """What each cache of a dataset must record, masks too, by file name."""
    metas: dict[str, CacheMeta] = dict(work.metas)
    for clip in work.plan.clips:
        if clip.mask is not None:
            metas[mask_cache_name(clip.cache_name)] = mask_meta(clip)
    return {name: metadata_digest(written_metadata(meta)) for name, meta in metas.items()}


def _read_datasets(run: CacheRunConfig) -> DatasetConfig:
    datasets = load_dataset_config(run.dataset_config)
    for note in datasets.notes:
        log.info("%s", note)
    log.info("%s", datasets.describe())
    return datasets


def _listing(dataset: AnyDatasetConfig, run: CacheRunConfig) -> SourceListing:
    confinement = Confinement.to_folder_of(run.dataset_config) if run.confine_paths else None
    listing = list_items(dataset, confinement=confinement)
    for note in listing.notes:
        log.warning("%s", note)
    return listing


def _plan(dataset: AnyDatasetConfig, config: CacheLatentsConfig, listing: SourceListing) -> ClipPlan:
    plan = plan_clips(dataset, listing, nabla_resize=config.nabla_resize, num_workers=config.run.num_workers)
    for note in (*plan.notes, *mask_notes(dataset, listing)):
        log.info("%s", note)
    return plan


def _latent_work(
    dataset: AnyDatasetConfig, config: CacheLatentsConfig, fingerprint: str, dtype: torch.dtype
) -> _LatentWork:
    listing = _listing(dataset, config.run)
    plan = _plan(dataset, config, listing)
    metas = {
        clip.cache_name: latent_meta(
            clip, encoder_fingerprint=fingerprint, dtype=dtype_name(dtype), tile_px=config.tile_px
        )
        for clip in plan.clips
    }
    outcome = Outcome(
        dataset=dataset,
        found=listing.found,
        num_caches=len(plan.clips) + sum(clip.mask is not None for clip in plan.clips),
        skipped=[*listing.skipped, *plan.skipped],
    )
    return _LatentWork(listing=listing, plan=plan, metas=metas, outcome=outcome)


def _choose_batches(work: _LatentWork, run: CacheRunConfig) -> None:
    folder = work.dataset.cache_directory
    names = (clip.cache_name for clip in work.plan.clips)
    if run.skip_existing:
        names = (name for name in names if latent_cache_problem(folder / name, work.metas[name]) is not None)
    work.stale = frozenset(names)
    batches = cut_batches(work.plan.clips, run.batch_size or work.dataset.batch_size)
    work.batches = tuple(batch for batch in batches if any(clip.cache_name in work.stale for clip in batch))


def _encode_clips(vae: VideoVAE, work: _LatentWork, config: CacheLatentsConfig, *, is_quiet: bool) -> None:
    total = sum(len(batch) for batch in work.batches)
    name = f"dataset {work.dataset.index}"
    with tqdm(total=total, desc=name, unit="clip", disable=is_quiet) as progress:
        for loaded in load_batches(work.batches, num_workers=config.run.num_workers):
            work.outcome.skipped.extend(loaded.damaged)
            if loaded.clips:
                _encode_batch(vae, work, loaded, config.tile_px)
            progress.update(len(loaded.clips) + len(loaded.damaged))


def _encode_batch(vae: VideoVAE, work: _LatentWork, loaded: LoadedBatch, tile_px: int | None) -> None:
    pixels = uint8_to_pixels(torch.from_numpy(np.stack(loaded.pixels)))  # [B, 3, F_px, H_px, W_px]
    keys = [clip.item_key for clip in loaded.clips]
    latents = _encode(vae, pixels, keys, "clip", tile_px)
    if pixels.shape[2] == 1:
        ends = torch.cat([latents, latents], dim=2)
    else:
        first = _encode(vae, pixels[:, :, :1], keys, "first", tile_px)
        last = _encode(vae, pixels[:, :, -1:], keys, "last", tile_px)
        ends = torch.cat([first, last], dim=2)  # [B, 16, 2, H, W]
    folder = work.dataset.cache_directory
    for clip, clip_latents, clip_ends in zip(loaded.clips, latents, ends, strict=True):
        if clip.cache_name in work.stale:
            with disk_errors(folder, CONTINUE_HINT):
                write_latent_cache(
                    folder / clip.cache_name, clip_latents, clip_ends, work.metas[clip.cache_name]
                )
            work.outcome.encoded += 1


def _encode(vae: VideoVAE, pixels: Tensor, keys: Sequence[str], part: str, tile_px: int | None) -> Tensor:
    """Latents [B, 16, F, H, W] on the CPU; the draw of an item depends on its key and the part alone."""
    generators = [generator_for("vae", key, part) for key in keys]
    return encode_or_tile(vae, pixels, generators, tile_px=tile_px).cpu()


# ------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True, kw_only=True, slots=True)
class _TextTarget:
    """One text cache: where it goes and what it must record."""

    path: Path
    meta: TextCacheMeta


@dataclass(kw_only=True, slots=True)
class _TextWork:
    """One dataset's captions."""

    listing: SourceListing
    outcome: Outcome
    batches: tuple[tuple[_TextTarget, ...], ...]
    """Cut from the full list; batches without a stale cache are left out."""
    stale: frozenset[Path]
    digests: dict[str, str]
    """What each text cache of an item must record, by file name."""


def cache_text(config: CacheTextConfig) -> None:
    """Encode every caption of the dataset file; several processes of a launcher share the batches.

    Raises:
        ConfigError, DataError, ModelFileError, ResourceError: each with what to do.
    """
    with exit_on_signal(), joined_processes() as processes:
        _cache_text(config, processes)


def _cache_text(config: CacheTextConfig, processes: Processes) -> None:
    datasets = _read_datasets(config.run).datasets
    device = pick_device(config.run.device, processes.index_on_machine if processes.count > 1 else None)
    problems = check_text_encoder_paths(config.text_encoder_qwen, config.text_encoder_clip)
    if problems:
        raise ModelFileError(problems)
    templates = load_prompt_templates(config.prompt_templates)
    listings = [_listing(dataset, config.run) for dataset in datasets]
    outcomes = [
        Outcome(
            dataset=dataset,
            found=listing.found,
            num_caches=len(listing.items),
            skipped=list(listing.skipped),
            empty_captions=listing.empty_captions,
        )
        for dataset, listing in zip(datasets, listings, strict=True)
    ]
    check_strict(outcomes, config.run)
    fingerprint = text_encoder_fingerprint(
        config.text_encoder_qwen, config.text_encoder_clip, config.quantization
    )

    def choose() -> list[_TextWork]:
        pairs = zip(outcomes, listings, strict=True)
        works = [_text_work(outcome, listing, config, fingerprint) for outcome, listing in pairs]
        for work in works:
            work.batches = tuple(processes.share(work.batches))
        return works

    def encode() -> None:
        if any(work.batches for work in works):
            encoders = _load_encoders(config, device, templates)
            for work in works:
                _encode_captions(encoders, work, is_quiet=not processes.is_main)

    with cache_folders(datasets, processes):
        works = processes.together(choose)  # nobody writes before all have seen what is missing
        processes.together(encode)
        combine(outcomes, processes)
        if not processes.is_main:
            return
        for work in works:
            entry = text_entry(work.listing.items, work.listing.skipped, work.digests)
            write_index(work.outcome, "text", entry, config.run)
        handle_unused(outcomes, "text", config.run)
    finish(outcomes, "text", config.run)


def _load_encoders(config: CacheTextConfig, device: torch.device, templates: PromptTemplates) -> TextEncoders:
    return load_text_encoders(
        config.text_encoder_qwen,
        config.text_encoder_clip,
        device=device,
        dtype=default_qwen_dtype(device),
        qwen_max_length=config.qwen_max_length,
        clip_max_length=config.clip_max_length,
        quantization=config.quantization,
        templates=templates,
    )


def _text_work(
    outcome: Outcome, listing: SourceListing, config: CacheTextConfig, fingerprint: str
) -> _TextWork:
    dataset = outcome.dataset
    blank = TextCacheMeta(
        caption1="",
        template=dataset.template,
        qwen_max_length=config.qwen_max_length,
        clip_max_length=config.clip_max_length,
        encoder_fingerprint=fingerprint,
    )
    targets = [
        _TextTarget(
            path=dataset.cache_directory / text_cache_name(item.base_name),
            meta=replace(blank, caption1=item.captions[0], more_captions=item.captions[1:]),
        )
        for item in listing.items
    ]
    size = config.run.batch_size or dataset.batch_size
    batches = [tuple(targets[start : start + size]) for start in range(0, len(targets), size)]
    num_item_batches = len(batches)
    # By itself: its bytes then depend on no other caption. Made always, so that a training can drop captions
    # without another run of this script.
    path = dataset.cache_directory / empty_text_cache_name(dataset.template)
    batches.append((_TextTarget(path=path, meta=blank),))
    if dataset.prior_caption is not None:
        path = dataset.cache_directory / prior_text_cache_name(dataset.template)
        batches.append((_TextTarget(path=path, meta=replace(blank, caption1=dataset.prior_caption)),))
    outcome.num_caches += len(batches) - num_item_batches
    stale = frozenset(
        target.path
        for batch in batches
        for target in batch
        if not config.run.skip_existing or text_cache_problem(target.path, target.meta) is not None
    )
    chosen = tuple(batch for batch in batches if any(target.path in stale for target in batch))
    digests = {target.path.name: metadata_digest(written_metadata(target.meta)) for target in targets}
    return _TextWork(listing=listing, outcome=outcome, batches=chosen, stale=stale, digests=digests)


def _encode_captions(encoders: TextEncoders, work: _TextWork, *, is_quiet: bool) -> None:
    total = sum(len(target.meta.captions) for batch in work.batches for target in batch)
    name = f"dataset {work.outcome.dataset.index}"
    with tqdm(total=total, desc=name, unit="caption", disable=is_quiet) as progress:
        for batch in work.batches:
            for target, (first, *more) in zip(batch, _encode_batch_captions(encoders, batch), strict=True):
                if target.path in work.stale:
                    with disk_errors(target.path.parent, CONTINUE_HINT):
                        write_text_cache(target.path, *first, target.meta, more)
                    work.outcome.encoded += 1
            progress.update(sum(len(target.meta.captions) for target in batch))


def _encode_batch_captions(
    encoders: TextEncoders, batch: Sequence[_TextTarget]
) -> list[list[tuple[Tensor, Tensor]]]:
    """For each item the embeddings of its captions.

    The first captions of all items share a call, then the second ones, and so on: no call is larger than the
    batch, and a first caption is encoded as it would be without any others.
    """
    encoded: list[list[tuple[Tensor, Tensor]]] = [[] for _ in batch]
    for number in range(max(len(target.meta.captions) for target in batch)):
        members = [i for i, target in enumerate(batch) if number < len(target.meta.captions)]
        captions = [batch[i].meta.captions[number] for i in members]
        for i, result in zip(members, encoders.encode(captions, batch[0].meta.template), strict=True):
            encoded[i].append((result.text_embeds, result.pooled_embed))
    return encoded
