"""Creates the text caches of a dataset file with both text encoders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from dataset.cache.files import TextCacheMeta, text_cache_problem, write_text_cache, written_metadata
from dataset.cache.index import CacheKind, IndexEntry, metadata_digest, text_entry
from dataset.cache.names import empty_text_cache_name, prior_text_cache_name, text_cache_name
from dataset.config.config import AnyDatasetConfig
from dataset.media.files import Content
from dataset.sources.items import SourceListing
from kandinsky5.caching.check import DatasetCheck, captions_report, check_captions
from kandinsky5.caching.report import CONTINUE_HINT, CacheTarget, Outcome, raise_problems, refuse_shared_files
from kandinsky5.caching.run import encoding_device, list_sources, make_caches, read_datasets
from kandinsky5.configs.caching import CacheTextConfig
from kandinsky5.configs.text_encoders import TextEncodersConfig
from kandinsky5.text.encoders import (
    TextEncoders,
    check_text_encoder_paths,
    load_text_encoders,
    text_encoder_fingerprint,
)
from kandinsky5.text.files import local_tokenizer
from kandinsky5.text.templates import load_prompt_templates
from kandinsky5.text.tokens import ClipTokens, QwenTokens
from modules.errors import ModelFileError
from modules.files import disk_errors
from modules.interruption import exit_on_signal
from modules.logs import print_report
from modules.processes import Processes, joined_processes


def cache_text(config: CacheTextConfig) -> None:
    """Encode every caption of the dataset file.

    Raises:
        ConfigError, DataError, ModelFileError, ResourceError: see `make_caches`.
    """
    if not config.run.check:
        make_caches(lambda processes: _TextJob(config, processes), config.run)
        return
    with exit_on_signal(), joined_processes() as processes:
        if processes.is_main:
            _check(config)


def _check(config: CacheTextConfig) -> None:
    """`--check`: list captions and count their tokens; no encoder is loaded."""
    datasets = read_datasets(config.run).datasets
    counts = _token_counter(config)
    checks, reports = [], []
    for dataset in datasets:
        listing = list_sources(dataset, datasets, config.run)
        outcome = Outcome(
            dataset=dataset,
            found=listing.found,
            num_caches=len(listing.items),
            skipped=list(listing.skipped),
            empty_captions=listing.empty_captions,
        )
        check = DatasetCheck(outcome, listing)
        need = check_captions(check, None if counts is None else functools.partial(counts, dataset.template))
        checks.append(check)
        reports.append(captions_report(check, need, has_tokenizers=counts is not None))
    print_report("\n\n".join(reports))
    raise_problems([check.outcome for check in checks], config.run, "nothing was encoded")


def _token_counter(config: CacheTextConfig) -> Callable[[Content, str], dict[str, tuple[int, str]]] | None:
    """Counts a caption's tokens for both encoders as caching would; None where a tokenizer is not here."""
    qwen_name, clip_name = config.text_encoder_qwen, config.text_encoder_clip
    qwen_tokenizer = local_tokenizer(qwen_name, "qwen") if qwen_name else None
    clip_tokenizer = local_tokenizer(clip_name, "clip") if clip_name else None
    if qwen_tokenizer is None or clip_tokenizer is None:
        return None
    qwen = QwenTokens(qwen_tokenizer, load_prompt_templates(config.prompt_templates), config.qwen_max_length)
    clip = ClipTokens(clip_tokenizer, config.clip_max_length)

    def count(template: Content, caption: str) -> dict[str, tuple[int, str]]:
        found = {"Qwen": qwen.encode(caption, template), "CLIP": clip.encode(caption)}
        return {name: (tokens.num_caption_tokens, tokens.lost_text) for name, tokens in found.items()}

    return count


@dataclass(frozen=True, kw_only=True, slots=True)
class _TextTarget:
    """One text cache: where it goes and what it must record."""

    path: Path
    meta: TextCacheMeta


@dataclass(kw_only=True, slots=True)
class _TextWork:
    """One dataset: the text caches it needs, and which batches have to be encoded."""

    listing: SourceListing
    outcome: Outcome
    items: Sequence[_TextTarget]
    """Of the media items, in their order."""
    extra: Sequence[_TextTarget]
    """Of captions that do not belong to an item."""
    batches: Sequence[tuple[_TextTarget, ...]] = ()
    stale: frozenset[Path] = frozenset()
    """Caches to write."""


class _TextJob:
    """See `CachingJob`."""

    kind: CacheKind = "text"

    def __init__(self, config: CacheTextConfig, processes: Processes) -> None:
        self._config = config
        self._processes = processes
        datasets = read_datasets(config.run).datasets
        self._device = encoding_device(config.run, processes)
        problems = check_text_encoder_paths(config.text_encoder_qwen, config.text_encoder_clip)
        if problems:
            raise ModelFileError(problems)
        self._templates = load_prompt_templates(config.prompt_templates)
        listings = [list_sources(dataset, datasets, config.run) for dataset in datasets]
        fingerprint = text_encoder_fingerprint(
            config.text_encoder_qwen, config.text_encoder_clip, config.quantization
        )
        self._works = [self._work(*pair, fingerprint) for pair in zip(datasets, listings, strict=True)]
        self.outcomes = [work.outcome for work in self._works]
        refuse_shared_files(target for work in self._works for target in _targets(work))

    def _work(self, dataset: AnyDatasetConfig, listing: SourceListing, fingerprint: str) -> _TextWork:
        blank = TextCacheMeta(
            caption1="",
            template=dataset.template,
            qwen_max_length=self._config.qwen_max_length,
            clip_max_length=self._config.clip_max_length,
            encoder_fingerprint=fingerprint,
        )
        folder = dataset.cache_directory
        items = [
            _TextTarget(
                path=folder / text_cache_name(item.base_name),
                meta=replace(blank, caption1=item.captions[0], more_captions=item.captions[1:]),
            )
            for item in listing.items
        ]
        # Made always, so that a training can drop captions without another run of this script.
        extra = [_TextTarget(path=folder / empty_text_cache_name(dataset.template), meta=blank)]
        if dataset.prior_caption is not None:
            path = folder / prior_text_cache_name(dataset.template)
            extra.append(_TextTarget(path=path, meta=replace(blank, caption1=dataset.prior_caption)))
        outcome = Outcome(
            dataset=dataset,
            found=listing.found,
            num_caches=len(items) + len(extra),
            skipped=list(listing.skipped),
            empty_captions=listing.empty_captions,
        )
        return _TextWork(listing=listing, outcome=outcome, items=items, extra=extra)

    def choose(self) -> None:
        """Find the text caches that are missing."""
        run = self._config.run
        for work in self._works:
            work.stale = frozenset(
                target.path
                for target in (*work.items, *work.extra)
                if not run.skip_existing or text_cache_problem(target.path, target.meta) is not None
            )
            size = run.batch_size or work.outcome.dataset.batch_size
            batches = [tuple(work.items[start : start + size]) for start in range(0, len(work.items), size)]
            # Extra captions by themselves: their bytes then depend on no other caption.
            batches += [(target,) for target in work.extra]
            chosen = [batch for batch in batches if any(target.path in work.stale for target in batch)]
            work.batches = self._processes.share(chosen)

    def encode(self) -> None:
        """Encode the chosen batches."""
        if any(work.batches for work in self._works):
            encoders = self._load_encoders()
            for work in self._works:
                self._encode_captions(encoders, work)

    def _load_encoders(self) -> TextEncoders:
        config = self._config
        settings = TextEncodersConfig(
            text_encoder_qwen=config.text_encoder_qwen,
            text_encoder_clip=config.text_encoder_clip,
            quantization=config.quantization,
            qwen_max_length=config.qwen_max_length,
            clip_max_length=config.clip_max_length,
        )
        return load_text_encoders(settings, device=self._device, templates=self._templates)

    def _encode_captions(self, encoders: TextEncoders, work: _TextWork) -> None:
        total = sum(len(target.meta.captions) for batch in work.batches for target in batch)
        name, is_quiet = f"dataset {work.outcome.dataset.index}", not self._processes.is_main
        with tqdm(total=total, desc=name, unit="caption", disable=is_quiet) as progress:
            for batch in work.batches:
                encoded = _encode_batch(encoders, batch)
                for target, (first, *more) in zip(batch, encoded, strict=True):
                    if target.path in work.stale:
                        with disk_errors(target.path.parent, CONTINUE_HINT):
                            write_text_cache(target.path, *first, target.meta, more)
                        work.outcome.encoded += 1
                progress.update(sum(len(target.meta.captions) for target in batch))

    def entries(self) -> Iterator[IndexEntry]:
        """What each text cache of an item must record."""
        for work in self._works:
            digests = {t.path.name: metadata_digest(written_metadata(t.meta)) for t in work.items}
            yield text_entry(work.listing.items, work.listing.skipped, digests)


def _targets(work: _TextWork) -> Iterator[CacheTarget]:
    dataset = work.outcome.dataset
    for item, target in zip(work.listing.items, work.items, strict=True):
        yield CacheTarget(dataset, target.path, item.name, target.meta)
    for target in work.extra:
        yield CacheTarget(dataset, target.path, "a caption of no item", target.meta)


def _encode_batch(encoders: TextEncoders, batch: Sequence[_TextTarget]) -> list[list[tuple[Tensor, Tensor]]]:
    """For each item the embeddings of its captions: [L, dim] and [dim2] each.

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
