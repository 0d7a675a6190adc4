"""Creates the latent and mask caches of a dataset file, or previews the clips."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.cache.files import (
    CacheMeta,
    LatentCacheMeta,
    latent_cache_problem,
    latent_meta,
    write_latent_cache,
    written_metadata,
)
from dataset.cache.index import CacheKind, IndexEntry, latent_entry, metadata_digest
from dataset.cache.mask_cache import mask_meta
from dataset.cache.names import mask_cache_name
from dataset.clips import ClipPlan, LoadedBatch, PlannedClip, cut_batches, load_batches
from dataset.config.config import AnyDatasetConfig
from dataset.sources.items import SourceListing
from kandinsky5.caching.check import ClipCheck, SeenPixels, check_clips, clips_report
from kandinsky5.caching.masks import MaskWork, write_masks
from kandinsky5.caching.preview import preview_clips
from kandinsky5.caching.preview_page import PreviewPage
from kandinsky5.caching.report import CONTINUE_HINT, CacheTarget, Outcome, raise_problems, refuse_shared_files
from kandinsky5.caching.run import encoding_device, list_sources, make_caches, plan_media, read_datasets
from kandinsky5.configs.caching import CacheLatentsConfig, DebugConfig
from kandinsky5.model.precision import check_vae, vae_dtype
from kandinsky5.vae.video_vae import VideoVAE, encode_or_tile, load_vae, uint8_to_pixels, vae_fingerprint
from modules.devices import pick_device
from modules.dtypes import dtype_name
from modules.files import disk_errors
from modules.interruption import exit_on_signal
from modules.logs import get_logger, print_report
from modules.processes import Processes, joined_processes
from modules.seeding import generator_for

log = get_logger(__name__)


def cache_latents(config: CacheLatentsConfig) -> None:
    """Encode every clip of the dataset file, or check or show the clips if the config asks for it.

    Raises:
        ConfigError, DataError, ModelFileError, ResourceError: see `make_caches`.
    """
    if not config.encodes_nothing:
        make_caches(lambda processes: _LatentJob(config, processes), config.run)
        return
    with exit_on_signal(), joined_processes() as processes:
        if processes.is_main and config.debug is not None:
            _show(config, config.debug)
        elif processes.is_main:
            _check(config)


def _check(config: CacheLatentsConfig) -> None:
    """`--check` and `--preview`: decode every clip once, report, and show the clips on a page."""
    datasets = read_datasets(config.run).datasets
    page = None if config.preview is None else PreviewPage(config.preview, datasets)
    dtype = vae_dtype(config.vae_dtype, pick_device(config.run.device, None))
    seen = SeenPixels()
    checks = []
    for dataset in datasets:
        listing = list_sources(dataset, datasets, config.run)
        plan = plan_media(dataset, listing, config)
        outcome = Outcome(
            dataset=dataset,
            found=listing.found,
            num_caches=len(plan.clips),
            skipped=[*listing.skipped, *plan.skipped],
        )
        check = ClipCheck(outcome, listing, plan)
        show = None if page is None else functools.partial(page.add_clip, dataset)
        check_clips(check, seen, config.run.num_workers, show)
        checks.append(check)
        if page is not None:
            page.add_skipped(dataset, outcome.skipped)
    print_report("\n\n".join(clips_report(check, dtype.itemsize) for check in checks))
    if page is not None:
        log.info("wrote %s", page.write())
    raise_problems([check.outcome for check in checks], config.run, "nothing was encoded")


def _show(config: CacheLatentsConfig, debug: DebugConfig) -> None:
    datasets = read_datasets(config.run).datasets
    for dataset in datasets:
        plan = plan_media(dataset, list_sources(dataset, datasets, config.run), config)
        if not preview_clips(dataset, plan.clips, debug, config.run.num_workers):
            return


@dataclass(kw_only=True, slots=True)
class _LatentWork:
    """One dataset: what its caches must record, and which batches have to be encoded."""

    plan: ClipPlan
    metas: dict[str, LatentCacheMeta]
    """By cache name."""
    outcome: Outcome
    batches: Sequence[tuple[PlannedClip, ...]] = ()
    stale: frozenset[str] = frozenset()
    """Cache names to write."""


class _LatentJob:
    """See `CachingJob`."""

    kind: CacheKind = "latents"

    def __init__(self, config: CacheLatentsConfig, processes: Processes) -> None:
        assert config.vae is not None  # the command line requires it
        self._config = config
        self._vae = config.vae
        self._processes = processes
        datasets = read_datasets(config.run).datasets
        self._device = encoding_device(config.run, processes)
        self._dtype = vae_dtype(config.vae_dtype, self._device)
        if config.disable_cudnn_backend:
            torch.backends.cudnn.enabled = False
        check_vae(config.vae_dtype, self._device)
        fingerprint = vae_fingerprint(self._vae)
        listings = [list_sources(dataset, datasets, config.run) for dataset in datasets]
        self._works = [self._work(*pair, fingerprint) for pair in zip(datasets, listings, strict=True)]
        self.outcomes = [work.outcome for work in self._works]
        refuse_shared_files(target for work in self._works for target in _targets(work))

    def _work(self, dataset: AnyDatasetConfig, listing: SourceListing, fingerprint: str) -> _LatentWork:
        plan = plan_media(dataset, listing, self._config)
        dtype, tile_px = dtype_name(self._dtype), self._config.tile_px
        metas = {
            clip.cache_name: latent_meta(clip, encoder_fingerprint=fingerprint, dtype=dtype, tile_px=tile_px)
            for clip in plan.clips
        }
        outcome = Outcome(
            dataset=dataset,
            found=listing.found,
            num_caches=len(plan.clips) + sum(clip.mask is not None for clip in plan.clips),
            skipped=[*listing.skipped, *plan.skipped],
        )
        return _LatentWork(plan=plan, metas=metas, outcome=outcome)

    def choose(self) -> None:
        """Write the masks, then find the latents that are missing."""
        run = self._config.run
        for work in self._works:
            write_masks(MaskWork(work.outcome, self._processes.share(work.plan.clips)), run)
            folder = work.outcome.dataset.cache_directory
            names = (clip.cache_name for clip in work.plan.clips)
            if run.skip_existing:
                metas = work.metas
                names = (n for n in names if latent_cache_problem(folder / n, metas[n]) is not None)
            work.stale = frozenset(names)
            batches = cut_batches(work.plan.clips, run.batch_size or work.outcome.dataset.batch_size)
            chosen = [batch for batch in batches if any(clip.cache_name in work.stale for clip in batch)]
            work.batches = self._processes.share(chosen)

    def encode(self) -> None:
        """Encode the chosen batches."""
        if any(work.batches for work in self._works):
            vae = load_vae(self._vae, dtype=self._dtype, device=self._device)
            for work in self._works:
                self._encode_clips(vae, work)

    def _encode_clips(self, vae: VideoVAE, work: _LatentWork) -> None:
        total = sum(map(len, work.batches))
        name, is_quiet = f"dataset {work.outcome.dataset.index}", not self._processes.is_main
        with tqdm(total=total, desc=name, unit="clip", disable=is_quiet) as progress:
            for loaded in load_batches(work.batches, num_workers=self._config.run.num_workers):
                work.outcome.skipped.extend(loaded.damaged)
                if loaded.clips:
                    _encode_batch(vae, work, loaded, self._config.tile_px)
                progress.update(len(loaded.clips) + len(loaded.damaged))

    def entries(self) -> Iterator[IndexEntry]:
        """What each cache of a dataset must record, masks too."""
        for work in self._works:
            metas: dict[str, CacheMeta] = dict(work.metas)
            for clip in work.plan.clips:
                if clip.mask is not None:
                    metas[mask_cache_name(clip.cache_name)] = mask_meta(clip)
            digests = {name: metadata_digest(written_metadata(meta)) for name, meta in metas.items()}
            yield latent_entry(work.plan.clips, work.outcome.skipped, digests)


def _targets(work: _LatentWork) -> Iterator[CacheTarget]:
    dataset = work.outcome.dataset
    for clip in work.plan.clips:
        path = dataset.cache_directory / clip.cache_name
        yield CacheTarget(dataset, path, clip.item.name, work.metas[clip.cache_name])
        if clip.mask is not None:
            yield CacheTarget(
                dataset, path.with_name(mask_cache_name(path.name)), clip.item.name, mask_meta(clip)
            )


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
    folder = work.outcome.dataset.cache_directory
    for clip, clip_latents, clip_ends in zip(loaded.clips, latents, ends, strict=True):
        if clip.cache_name in work.stale:
            path, meta = folder / clip.cache_name, work.metas[clip.cache_name]
            with disk_errors(folder, CONTINUE_HINT):
                write_latent_cache(path, clip_latents, clip_ends, meta)
            work.outcome.encoded += 1


def _encode(vae: VideoVAE, pixels: Tensor, keys: Sequence[str], part: str, tile_px: int | None) -> Tensor:
    """Latents [B, 16, F, H, W] on the CPU; the draw of an item depends on its key and the part alone."""
    generators = [generator_for("vae", key, part) for key in keys]
    return encode_or_tile(vae, pixels, generators, tile_px=tile_px).cpu()
