"""Pairs the two cache files of each clip and checks them by their headers, before the first training step.

`match_caches` lists the files of each dataset (`lookup`), opens them, compares them with the dataset file and
the run (`fit`), and raises one error that lists every problem.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dataset.cache.files import (
    LatentCacheInfo,
    TextCacheInfo,
    cache_origin,
    inspect_latent_cache,
    inspect_text_cache,
)
from dataset.cache.fit import CacheRules, MatchOptions
from dataset.cache.index import CacheKind, index_path
from dataset.cache.items import CachedItem, DatasetSummary, reasons_in_short, summarise
from dataset.cache.lookup import CacheListing, cache_commands, list_caches
from dataset.cache.mask_cache import inspect_mask_cache
from dataset.cache.names import (
    LATENT_SUFFIX,
    empty_text_cache_name,
    mask_cache_name,
    parse_latent_name,
    prior_text_cache_name,
)
from dataset.config.config import AnyDatasetConfig, DatasetConfig
from dataset.sources.items import SkippedItem
from modules.errors import CacheError
from modules.messages import counted, lines_in_short

NO_LATENTS = "no latent cache"
NO_TEXT = "no text cache"
_BOTH: tuple[CacheKind, ...] = ("latents", "text")


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchedCaches:
    """The caches of a run."""

    items: tuple[CachedItem, ...]
    summaries: tuple[DatasetSummary, ...]
    notes: tuple[str, ...]
    """Log lines."""
    text_dims: tuple[int, int]
    """Width of the token embeddings and of the pooled one."""
    extra_text_origins: tuple[str, ...]
    """Where the captions that belong to no item come from."""


def match_caches(config: DatasetConfig, options: MatchOptions) -> MatchedCaches:
    """Find, pair and check the caches of all datasets; headers only.

    Raises:
        CacheError: everything that is wrong, in one message with the commands that make the caches.
    """
    if any(dataset.is_prior for dataset in config.datasets):
        options = replace(options, use_prior=False)  # no other dataset has a prior term then
    shared = _shared_folders(config)
    if shared:
        raise CacheError(shared)
    matches = [_match_dataset(dataset, config.path, options) for dataset in config.datasets]
    problems = [problem for match in matches for problem in match.problems]
    problems += _mixed_encoders(matches, config.path)
    problems = problems or list(_nothing_to_use(matches, config.path, options))
    if problems:
        raise CacheError(problems)
    return MatchedCaches(
        items=tuple(item for match in matches for item in match.items),
        summaries=tuple(summarise(match.dataset, match.items, match.skipped) for match in matches),
        notes=tuple(note for match in matches for note in match.notes),
        text_dims=next(dims for match in matches for dims in match.encoders.text_dims),
        extra_text_origins=tuple(origin for match in matches for origin in match.extra_text_origins),
    )


def _shared_folders(config: DatasetConfig) -> list[str]:
    """Cache folders of several datasets without an index: names alone do not say whose a cache is."""
    folders: dict[str, list[AnyDatasetConfig]] = {}
    for dataset in config.datasets:
        folders.setdefault(os.path.realpath(dataset.cache_directory), []).append(dataset)
    return [
        f"datasets {', '.join(str(member.index) for member in members)} share {members[0].cache_directory}, "
        "which has no index of its caches, so that nothing says which belongs to which\n"
        f"{cache_commands(config.path, _BOTH)}"
        for members in folders.values()
        if len(members) > 1 and not any(_has_index(members[0].cache_directory, kind) for kind in _BOTH)
    ]


def _has_index(cache_directory: Path, kind: CacheKind) -> bool:
    return index_path(cache_directory, kind).is_file()


@dataclass(slots=True)
class _Encoders:
    """What the caches were made with, as they record it."""

    vae_fingerprints: set[str] = field(default_factory=set)
    text_fingerprints: set[str] = field(default_factory=set)
    text_dims: set[tuple[int, int]] = field(default_factory=set)


@dataclass(kw_only=True, slots=True)
class _DatasetMatch:
    """What was found for one dataset."""

    dataset: AnyDatasetConfig
    items: Sequence[CachedItem] = ()
    skipped: Sequence[SkippedItem] = ()
    notes: Sequence[str] = ()
    problems: Sequence[str] = ()
    """One message for each kind of problem."""
    encoders: _Encoders = field(default_factory=_Encoders)
    extra_text_origins: Sequence[str] = ()


def _match_dataset(dataset: AnyDatasetConfig, config_path: Path, options: MatchOptions) -> _DatasetMatch:
    try:
        listing = list_caches(dataset, config_path)
    except CacheError as error:
        return _DatasetMatch(dataset=dataset, problems=error.problems)
    checker = _CacheChecker(listing, CacheRules(dataset, options))
    pairing = _Pairing(dataset, options, checker)
    pairing.pair(listing)
    pairing.check_extra_texts()
    where = f"dataset {dataset.index} ({dataset.cache_directory})"
    kinds = [checker.bad_latents, checker.bad_texts, *pairing.missing]
    problems = [kind.message(where, config_path) for kind in kinds if kind.lines]
    if options.strict and pairing.skipped:
        what = counted(len(pairing.skipped), "item was skipped", "items were skipped")
        problems.append(f"{where}: --strict: {what}:\n{lines_in_short(pairing.skipped)}")
    notes = [f"dataset {dataset.index}: {note}" for note in _notes(pairing, listing, checker)]
    return _DatasetMatch(
        dataset=dataset,
        items=pairing.items,
        skipped=pairing.skipped,
        notes=[*listing.notes, *notes],
        problems=problems,
        encoders=checker.encoders,
        extra_text_origins=pairing.extra_text_origins,
    )


def _mixed_encoders(matches: Sequence[_DatasetMatch], config_path: Path) -> Iterator[str]:
    """Caches that were made with different models cannot be trained on together."""
    found: tuple[tuple[CacheKind, str, set[str]], ...] = (
        ("latents", "VAEs", {name for m in matches for name in m.encoders.vae_fingerprints}),
        ("text", "text encoders", {name for m in matches for name in m.encoders.text_fingerprints}),
        ("text", "text widths", {str(dims) for m in matches for dims in m.encoders.text_dims}),
    )
    for kind, what, names in found:
        if len(names) > 1:
            yield (
                f"the {kind.removesuffix('s')} caches were made with {len(names)} different {what} "
                f"(encoder_fingerprint: {', '.join(sorted(names))})\n{cache_commands(config_path, (kind,))}"
            )


def _nothing_to_use(
    matches: Sequence[_DatasetMatch], config_path: Path, options: MatchOptions
) -> Iterator[str]:
    """Of a run without any item, or of one with masks without any mask."""
    items = [item for match in matches for item in match.items]
    if not items:
        counts = "; ".join(map(_what_became_of, matches))
        yield f"no item can be trained on. {counts}\n{cache_commands(config_path, _BOTH)}"
    elif options.use_masks and not any(item.mask_path for item in items):
        yield (
            "--masked_loss: no clip has a mask. Set mask_directory in the dataset file, or mask_path in the "
            f"JSONL file.\n{cache_commands(config_path, ('latents',))}"
        )


def _what_became_of(match: _DatasetMatch) -> str:
    dataset = match.dataset
    reasons = reasons_in_short(match.skipped) or f"no caches of latents in {dataset.cache_directory}"
    return f"dataset {dataset.index}: {reasons}"


def _notes(pairing: _Pairing, listing: CacheListing, checker: _CacheChecker) -> Iterator[str]:
    """Log lines about what is used of a dataset."""
    items = pairing.items
    if checker.uses_upstream_texts:
        yield (
            "text caches made by musubi-tuner are used; caching again gives captions encoded as at "
            "generation time"
        )
    if pairing.options.use_masks:
        masked = sum(item.mask_path is not None for item in items)
        yield f"{masked} of {len(items)} clips have a mask; the others count everywhere"
    elif listing.mask_names:
        unused = counted(len(listing.mask_names), "mask is not used", "masks are not used")
        yield f"{unused}; --masked_loss uses masks"
    captions = {item.source: item.num_captions for item in items if item.num_captions > 1}
    if captions:
        yield (
            f"{len(captions)} of {len({item.source for item in items})} {pairing.dataset.content}s have "
            f"several captions, {sum(captions.values())} in all; one is drawn each time"
        )


@dataclass(slots=True)
class _Problems:
    """Problems of one kind, reported together with the commands that make the caches."""

    one: str
    many: str
    """What the number of problems counts: "item has no text cache" and "items have no text cache"."""
    kinds: tuple[CacheKind, ...]
    """Which scripts make what is missing."""
    lines: list[str] = field(default_factory=list)

    def message(self, where: str, config_path: Path) -> str:
        return "\n".join([
            f"{where}: {counted(len(self.lines), self.one, self.many)}:",
            lines_in_short(self.lines),
            cache_commands(config_path, self.kinds),
        ])


class _CacheChecker:
    """Opens the caches of a dataset one by one, and keeps what is wrong with them and what made them."""

    def __init__(self, listing: CacheListing, rules: CacheRules) -> None:
        self._listing = listing
        self._rules = rules
        self.bad_latents = _Problems(
            "latent cache cannot be used", "latent caches cannot be used", ("latents",)
        )
        self.bad_texts = _Problems("text cache cannot be used", "text caches cannot be used", ("text",))
        self.encoders = _Encoders()
        self.uses_upstream_texts = False

    def text(self, path: Path) -> TextCacheInfo | None:
        """What a text cache holds; None if it cannot be used."""
        try:
            info = inspect_text_cache(path)
        except CacheError as error:
            self.bad_texts.lines.extend(error.problems)
            return None
        problem = self._rules.text_problem(info) or self._listing.replaced_problem(path, info.metadata)
        if problem is not None:
            self.bad_texts.lines.append(f"{path}: {problem}")
            return None
        self.encoders.text_dims.add(info.embed_dims)
        if info.is_ours:
            self.encoders.text_fingerprints.add(info.metadata.get("encoder_fingerprint", ""))
        else:
            self.uses_upstream_texts = True
        return info

    def latents(self, path: Path) -> LatentCacheInfo | None:
        """What a latent cache holds; None if it cannot be used."""
        try:
            info = inspect_latent_cache(path, self._rules.dataset.content)
        except CacheError as error:
            self.bad_latents.lines.extend(error.problems)
            return None
        problem = self._rules.latents_problem(path, info)
        problem = problem or self._listing.replaced_problem(path, info.metadata)
        if problem is not None:
            self.bad_latents.lines.append(f"{path}: {problem}")
            return None
        if info.is_ours:
            self.encoders.vae_fingerprints.add(info.metadata.get("encoder_fingerprint", ""))
        return info

    def mask(self, latent_path: Path, shape: tuple[int, int, int]) -> tuple[Path | None, str]:
        """The mask cache beside a latent cache, and its origin; None and "" without one that can be read."""
        path = latent_path.with_name(mask_cache_name(latent_path.name))
        if not self._listing.has_mask(path):
            return None, ""
        try:
            found, header = inspect_mask_cache(path)
        except CacheError as error:
            self.bad_latents.lines.extend(error.problems)
            return None, ""
        problem = self._listing.replaced_problem(path, header.metadata)
        if found != shape:
            problem = f"is {found}, its latents are {shape}"
        if problem is not None:
            self.bad_latents.lines.append(f"{path}: {problem}")
        return path, cache_origin(header)


class _Pairing:
    """The items of one dataset: latents and captions that belong together."""

    def __init__(self, dataset: AnyDatasetConfig, options: MatchOptions, checker: _CacheChecker) -> None:
        self.dataset = dataset
        self.options = options
        self._checker = checker
        self.items: list[CachedItem] = []
        self.skipped: list[SkippedItem] = []
        self.extra_text_origins: list[str] = []
        # An item that only one index lists is new or has left the dataset: both scripts have to run.
        self._no_latents = _Problems("item has no latent cache", "items have no latent cache", _BOTH)
        self._no_texts = _Problems("item has no text cache", "items have no text cache", _BOTH)
        self._no_extra_texts = _Problems(
            "caption that belongs to no item has no cache",
            "captions that belong to no item have no cache",
            ("text",),
        )

    @property
    def missing(self) -> tuple[_Problems, ...]:
        """Caches that are needed and do not exist."""
        return self._no_latents, self._no_texts, self._no_extra_texts

    def pair(self, listing: CacheListing) -> None:
        """Make the items; those without one of the two caches are skipped."""
        self.skipped = list(listing.skipped)
        explained = listing.skipped_names()
        for base_name in sorted(listing.latents):
            if base_name in listing.texts:
                self._add(base_name, listing.latents[base_name], listing.texts[base_name])
            elif base_name not in explained:
                self._skip(base_name, NO_TEXT, self._no_texts)
        for base_name in sorted(listing.texts.keys() - listing.latents.keys() - explained):
            self._skip(base_name, NO_LATENTS, self._no_latents)

    def _skip(self, base_name: str, reason: str, problems: _Problems) -> None:
        self.skipped.append(SkippedItem(name=base_name, reason=reason))
        if not self.options.allow_missing:
            problems.lines.append(base_name)

    def _add(self, base_name: str, latent_paths: Sequence[Path], text_path: Path) -> None:
        text = self._checker.text(text_path)
        for path in latent_paths:
            info = self._checker.latents(path)
            if text is not None and info is not None:
                self.items.append(self._item(base_name, path, info, text_path, text))

    def _item(
        self, base_name: str, path: Path, info: LatentCacheInfo, text_path: Path, text: TextCacheInfo
    ) -> CachedItem:
        mask_path, mask_origin = (
            self._checker.mask(path, info.shape) if self.options.use_masks else (None, "")
        )
        name = parse_latent_name(path.name, self.dataset.content)
        assert name is not None  # `inspect_latent_cache` refuses such a file
        return CachedItem(
            key=f"{self.dataset.index}/{path.name.removesuffix(LATENT_SUFFIX)}",
            source=base_name,
            dataset_index=self.dataset.index,
            content=self.dataset.content,
            latent_path=path,
            text_path=text_path,
            num_captions=len(text.keys),
            empty_text_path=self._empty_text_path,
            num_frames=name.num_frames or 1,
            shape=info.shape,
            mask_path=mask_path,
            prior_text_path=self._prior_text_path if self.options.use_prior else None,
            latent_origin=info.origin,
            text_origin=text.origin,
            mask_origin=mask_origin,
        )

    @property
    def _empty_text_path(self) -> Path:
        return self.dataset.cache_directory / empty_text_cache_name(self.dataset.template)

    @property
    def _prior_text_path(self) -> Path:
        if self.dataset.prior_caption is None:
            return self._empty_text_path
        return self.dataset.cache_directory / prior_text_cache_name(self.dataset.template)

    def check_extra_texts(self) -> None:
        """Check the captions that belong to no item, where this run needs them."""
        for path, (what, caption) in self._extra_texts().items() if self.items else ():
            if not path.is_file():
                hint = "with --skip_existing the command makes nothing else"
                self._no_extra_texts.lines.append(f"{path.name}: {what} ({hint})")
                continue
            info = self._checker.text(path)
            if info is None:
                continue
            self.extra_text_origins.append(f"{self.dataset.index}/{path.name} {info.origin}")
            found = info.metadata.get("caption1")
            if found != caption:
                self._checker.bad_texts.lines.append(f"{path}: the caption was {found!r}, is {caption!r}")

    def _extra_texts(self) -> Mapping[Path, tuple[str, str]]:
        """By file: what needs it, for a message, and its caption."""
        needed = {}
        prior_caption = self.dataset.prior_caption
        if self.dataset.caption_dropout_rate > 0:
            needed[self._empty_text_path] = ("the empty caption, which caption dropout needs", "")
        if self.options.use_prior:
            what = "the empty caption" if prior_caption is None else "prior_caption"
            needed[self._prior_text_path] = (f"{what}, which --prior_loss_weight needs", prior_caption or "")
        return needed
