"""Which cache files a training run uses, and everything that is wrong with them, found before step 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dataset.buckets import Size, bucket_sizes, choose_bucket, nabla_size
from dataset.cache.files import (
    LatentCacheInfo,
    TextCacheInfo,
    cache_origin,
    empty_text_cache_name,
    inspect_latent_cache,
    inspect_text_cache,
    text_cache_name,
    upstream_latent_problem,
)
from dataset.cache.index import CacheKind, IndexEntry, metadata_digest
from dataset.cache.lookup import cache_commands, find_entry
from dataset.cache.mask_cache import inspect_mask_cache
from dataset.cache.names import (
    LATENT_SUFFIX,
    Content,
    LatentName,
    cache_base_name,
    mask_cache_name,
    parse_latent_name,
    prior_text_cache_name,
)
from dataset.cache.summary import DatasetSummary
from dataset.config.config import AnyDatasetConfig, DatasetConfig, ImageDatasetConfig, VideoDatasetConfig
from dataset.geometry import pixel_size, size_label
from dataset.media.frames import fps_rules
from dataset.sources import SkippedItem
from modules.errors import CacheError
from modules.messages import lines_in_short

NO_LATENTS = "no latent cache"
NO_TEXT = "no text cache"


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchOptions:
    """What a run needs of its caches and what it tolerates; the fields are those of `CachedDataset`."""

    needs_image_latents: bool = False
    allow_missing: bool = False
    allow_upstream_text_cache: bool = False
    strict: bool = False
    use_masks: bool = False
    use_prior: bool = False
    text_limits: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedItem:
    """One clip or image with its two cache files."""

    key: str
    """Dataset number and clip, without any folder: the same on every machine."""
    source: str
    """Base name of the media file, which all its cuts share, in all datasets."""
    dataset_index: int
    content: Content
    """Of the dataset, which decides how its cache names are read."""
    latent_path: Path
    text_path: Path
    num_captions: int
    """Held by `text_path`; one is drawn each time."""
    empty_text_path: Path
    """The cache of the empty caption, for caption dropout."""
    num_frames: int
    """Pixel frames."""
    shape: tuple[int, int, int]
    """(latent_frames, latent_height, latent_width)."""
    mask_path: Path | None = None
    """The cache of its mask; None where it has none, and where masks are not used."""
    prior_text_path: Path | None = None
    """The cache of the caption that its prior term takes; None where it has no such term or takes its own."""
    latent_origin: str = ""
    text_origin: str = ""
    mask_origin: str = ""
    """What the caches were made from, see `cache_origin`."""

    @property
    def bucket(self) -> str:
        """Width x height x frames in pixels."""
        return size_label(*pixel_size(*self.shape[1:]), self.num_frames)


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchedCaches:
    """The caches of a run."""

    items: tuple[CachedItem, ...]
    summaries: tuple[DatasetSummary, ...]
    notes: tuple[str, ...]
    text_dims: tuple[int, int]
    extra_text_origins: tuple[str, ...]
    """Where the captions that belong to no item come from."""


def match_caches(config: DatasetConfig, options: MatchOptions) -> MatchedCaches:
    """Find, pair and check the caches of all datasets; headers only.

    Raises:
        CacheError: all that is wrong, in one message with the commands that mend it.
    """
    if any(dataset.is_prior for dataset in config.datasets):
        options = replace(options, use_prior=False)  # no other dataset has a prior term then
    matchers = [_Matcher(dataset, config.path, options) for dataset in config.datasets]
    problems = [problem for matcher in matchers for problem in matcher.run()]
    problems += _mixed_encoders(matchers)
    items = tuple(item for matcher in matchers for item in matcher.items)
    if options.use_masks and items and not any(item.mask_path for item in items) and not problems:
        problems.append(
            "--masked_loss: no clip has a mask. Set mask_directory in the dataset file, or mask_path in the "
            f"JSONL file.\n{cache_commands(config.path, ('latents',))}"
        )
    if not items and not problems:
        counts = "; ".join(f"dataset {m.dataset.index}: {m.counts()}" for m in matchers)
        problems.append(
            f"no item can be trained on. {counts}\n{cache_commands(config.path, ('latents', 'text'))}"
        )
    if problems:
        raise CacheError(problems)
    return MatchedCaches(
        items=items,
        summaries=tuple(matcher.summary() for matcher in matchers),
        notes=tuple(note for matcher in matchers for note in matcher.notes),
        text_dims=next(dims for matcher in matchers for dims in matcher.text_dims),
        extra_text_origins=tuple(origin for matcher in matchers for origin in matcher.extra_text_origins),
    )


def _mixed_encoders(matchers: Sequence[_Matcher]) -> list[str]:
    """Caches that were made with different models cannot be trained on together."""
    problems = []
    for what, found in (
        ("VAEs", {f for m in matchers for f in m.vae_fingerprints}),
        ("text encoders", {f for m in matchers for f in m.text_fingerprints}),
        ("text widths", {str(d) for m in matchers for d in m.text_dims}),
    ):
        if len(found) > 1:
            kind: CacheKind = "latents" if what == "VAEs" else "text"
            path = matchers[0].config_path
            problems.append(
                f"the {kind.removesuffix('s')} caches were made with {len(found)} different {what} "
                f"(encoder_fingerprint: {', '.join(sorted(found))})\n{cache_commands(path, (kind,))}"
            )
    return problems


@dataclass(slots=True)
class _Problems:
    """Problems of one kind, told together with the command that mends them."""

    title: str
    kinds: tuple[CacheKind, ...]
    """Which scripts mend them."""
    lines: list[str] = field(default_factory=list)

    def message(self, where: str, config_path: Path) -> str:
        return "\n".join([
            f"{where}: {len(self.lines)} {self.title}:",
            lines_in_short(self.lines),
            cache_commands(config_path, self.kinds),
        ])


class _Matcher:
    """Pairs and checks the caches of one dataset."""

    def __init__(self, dataset: AnyDatasetConfig, config_path: Path, options: MatchOptions) -> None:
        self.dataset = dataset
        self.config_path = config_path
        self.options = options
        self.items: list[CachedItem] = []
        self.skipped: list[SkippedItem] = []
        self.notes: list[str] = []
        self.vae_fingerprints: set[str] = set()
        self.text_fingerprints: set[str] = set()
        self.text_dims: set[tuple[int, int]] = set()
        self.extra_text_origins: list[str] = []
        self._mask_names: frozenset[str] | None = None
        """As the index lists them; None without an index."""
        self._digests: dict[str, str] = {}
        """Of files that an index lists, by name."""
        self._keys: dict[str, str] = {}
        """Of items that an index lists, by base name."""
        self._skipped_by_name: dict[str, list[SkippedItem]] = {}
        self._used_names: set[str] = set()
        self._labels: Counter[str] = Counter()
        self._bad_latents = _Problems("latent caches cannot be used", ("latents",))
        self._bad_texts = _Problems("text caches cannot be used", ("text",))
        # An item that only one index lists is new or has left the dataset: both scripts together mend either.
        both: tuple[CacheKind, ...] = ("latents", "text")
        self._no_latents = _Problems("items have no latent cache", both)
        self._no_texts = _Problems("items have no text cache", both)
        self._no_extra_texts = _Problems("captions that belong to no item have no cache", ("text",))

    def run(self) -> list[str]:
        """Fill the fields above; returns what is wrong."""
        try:
            latents, latents_skipped = self._latent_files()
            texts, texts_skipped = self._text_files(latents)
        except CacheError as error:
            return error.problems
        self.skipped = list(dict.fromkeys([*latents_skipped, *texts_skipped]))
        for skipped in self.skipped:
            for name in {skipped.name, Path(skipped.name).stem}:
                self._skipped_by_name.setdefault(cache_base_name(name), []).append(skipped)
        for base_name in sorted(latents):
            if base_name not in texts:
                self._missing(base_name, NO_TEXT, self._no_texts)
                continue
            text = self._check_text(texts[base_name])
            for path in latents[base_name]:
                info = self._check_latents(path)
                if text is not None and info is not None:
                    self._add(base_name, path, info, texts[base_name], text)
        for base_name in sorted(set(texts) - set(latents)):
            self._missing(base_name, NO_LATENTS, self._no_latents)
        self._check_extra_texts()
        self._note_masks()
        self._note_captions()
        return self._messages()

    def _latent_files(self) -> tuple[dict[str, list[Path]], Sequence[SkippedItem]]:
        """Latent files by the base name as it stands in file names, from the index or by looking."""
        folder = self.dataset.cache_directory
        entry = self._entry("latents")
        if entry is not None:
            self._mask_names = frozenset(name for item in entry.items for name in item.masks)
            files = {cache_base_name(i.name): [folder / name for name in i.files] for i in entry.items}
            return files, entry.skipped
        found: dict[str, list[Path]] = {}
        first: dict[tuple[str, int | None, int | None], Path] = {}
        clashes = []
        for path in sorted(folder.glob(f"*{LATENT_SUFFIX}")) if folder.is_dir() else ():
            name = parse_latent_name(path.name, self.dataset.content)
            if name is None:
                continue
            found.setdefault(name.base_name, []).append(path)
            other = first.setdefault((name.base_name, name.start, name.num_frames), path)
            if other is not path:
                clashes.append(
                    f"dataset {self.dataset.index}: {other} and {path} are two caches of the same item; "
                    "delete the one that is out of date"
                )
        if clashes:
            raise CacheError(clashes)
        if found:
            self.notes.append(
                f"dataset {self.dataset.index}: {folder} has no index of its latent caches, so all "
                f"{sum(map(len, found.values()))} that are there are used"
            )
        return found, ()

    def _text_files(self, latents: dict[str, list[Path]]) -> tuple[dict[str, Path], Sequence[SkippedItem]]:
        """Text file by base name, for the items of the index, or for those that have latents."""
        folder = self.dataset.cache_directory
        entry = self._entry("text")
        if entry is None:
            paths = {name: folder / text_cache_name(name) for name in latents}
            return {name: path for name, path in paths.items() if path.is_file()}, ()
        return {cache_base_name(i.name): folder / i.files[0] for i in entry.items if i.files}, entry.skipped

    def _entry(self, kind: CacheKind) -> IndexEntry | None:
        entry, note = find_entry(self.dataset, kind, self.config_path)
        if note is not None:
            self.notes.append(note)
        for item in entry.items if entry is not None else ():
            self._digests |= item.digest_by_file
            self._keys[cache_base_name(item.name)] = item.key
        return entry

    def _replaced(self, path: Path, metadata: Mapping[str, str]) -> str | None:
        """Why a file that the index lists is not the one it was listed as, or None."""
        expected = self._digests.get(path.name)
        if expected is None or expected == metadata_digest(metadata):
            return None
        return (
            "was made again since it was cached for this dataset file: by another one with the same "
            "cache_directory (give each its own), or by a run that did not finish"
        )

    def _missing(self, base_name: str, reason: str, problems: _Problems) -> None:
        if self._is_left_out(base_name):
            return
        self.skipped.append(SkippedItem(name=base_name, reason=reason))
        if not self.options.allow_missing:
            problems.lines.append(base_name)

    def _is_left_out(self, base_name: str) -> bool:
        """Whether a cache script has left this item out and said why: this one, not one of its name."""
        key = self._keys.get(base_name, "")
        skipped = self._skipped_by_name.get(base_name, [])
        return any(not key or not entry.key or entry.key == key for entry in skipped)

    def _check_text(self, path: Path) -> TextCacheInfo | None:
        """What a text cache holds; None if it cannot be used."""
        try:
            info = inspect_text_cache(path)
        except CacheError as error:
            self._bad_texts.lines.extend(error.problems)
            return None
        problem = self._text_problem(info) or self._replaced(path, info.metadata)
        if problem is not None:
            self._bad_texts.lines.append(f"{path}: {problem}")
            return None
        self.text_dims.add(info.embed_dims)
        if info.is_ours:
            self.text_fingerprints.add(info.metadata.get("encoder_fingerprint", ""))
        return info

    def _text_problem(self, info: TextCacheInfo) -> str | None:
        template = self.dataset.template
        if info.is_ours:
            found = info.metadata["template"]
            if found != template:
                return f"template was {found!r}, is {template!r}"
            return _limit_problem(info, self.options.text_limits)
        if template == "video" and not self.options.allow_upstream_text_cache:
            return (
                "made by musubi-tuner with the prompt template for images "
                "(--allow_upstream_text_cache uses it all the same)"
            )
        self._note_once(
            f"dataset {self.dataset.index}: text caches made by musubi-tuner are used; caching again gives "
            "captions encoded as at generation time"
        )
        return None

    def _check_latents(self, path: Path) -> LatentCacheInfo | None:
        """What a latent cache holds; None if it cannot be used."""
        try:
            info = inspect_latent_cache(path, self.dataset.content)
        except CacheError as error:
            self._bad_latents.lines.extend(error.problems)
            return None
        problem = self._latent_problem(path, _parsed(path, self.dataset), info)
        problem = problem or self._replaced(path, info.metadata)
        if problem is not None:
            self._bad_latents.lines.append(f"{path}: {problem}")
            return None
        if info.is_ours:
            self.vae_fingerprints.add(info.metadata.get("encoder_fingerprint", ""))
        return info

    def _add(
        self, base_name: str, path: Path, info: LatentCacheInfo, text_path: Path, text: TextCacheInfo
    ) -> None:
        """Put a clip into the items."""
        mask_path, mask_origin = self._mask_of(path, info) if self.options.use_masks else (None, "")
        num_frames = _parsed(path, self.dataset).num_frames or 1
        self._used_names.add(base_name)
        self._labels[size_label(*pixel_size(*info.shape[1:]), num_frames)] += 1
        self.items.append(
            CachedItem(
                key=f"{self.dataset.index}/{path.name.removesuffix(LATENT_SUFFIX)}",
                source=base_name,
                dataset_index=self.dataset.index,
                content=self.dataset.content,
                latent_path=path,
                text_path=text_path,
                num_captions=len(text.keys),
                empty_text_path=self._empty_text_path(),
                num_frames=num_frames,
                shape=info.shape,
                mask_path=mask_path,
                prior_text_path=self._prior_text_path() if self.options.use_prior else None,
                latent_origin=info.origin,
                text_origin=text.origin,
                mask_origin=mask_origin,
            )
        )

    def _mask_of(self, path: Path, info: LatentCacheInfo) -> tuple[Path | None, str]:
        """The mask cache beside a latent cache, checked, and its origin; None and "" if there is none."""
        mask = path.with_name(mask_cache_name(path.name))
        if mask.name not in self._mask_names if self._mask_names is not None else not mask.is_file():
            return None, ""
        try:
            shape, header = inspect_mask_cache(mask)
        except CacheError as error:
            self._bad_latents.lines.extend(error.problems)
            return None, ""
        problem = self._replaced(mask, header.metadata)
        if shape != info.shape:
            problem = f"is {shape}, its latents are {info.shape}"
        if problem is not None:
            self._bad_latents.lines.append(f"{mask}: {problem}")
        return mask, cache_origin(header)

    def _latent_problem(self, path: Path, name: LatentName, info: LatentCacheInfo) -> str | None:
        if not info.is_ours:
            problem = upstream_latent_problem(path, self.dataset.content)
            if problem is not None:
                return problem
        if self.options.needs_image_latents and (name.num_frames or 1) > 1:
            if not info.is_ours:
                return "made by musubi-tuner, whose latents_image are not what image-to-video needs"
            if info.image_key is None:
                return "holds no latents_image, which image-to-video needs"
        return self._size_problem(name, info) or self._frames_problem(name, info)

    def _size_problem(self, name: LatentName, info: LatentCacheInfo) -> str | None:
        allowed = self._allowed_sizes(name)
        found = pixel_size(*info.shape[1:])
        if found in allowed:
            return None
        sizes = " or ".join(f"{width}x{height}" for width, height in dict.fromkeys(allowed))
        return f"resolution was {found[0]}x{found[1]}, is {sizes or 'another'} by the dataset file"

    def _allowed_sizes(self, name: LatentName) -> tuple[Size, ...]:
        """The pixel sizes that the dataset file gives an item, without and with --nabla_resize."""
        dataset = self.dataset
        buckets = bucket_sizes(dataset.resolution, enable_bucket=dataset.enable_bucket)
        size = (name.width, name.height)
        if isinstance(dataset, ImageDatasetConfig):
            bucket = choose_bucket(
                size, dataset.resolution, buckets, bucket_no_upscale=dataset.bucket_no_upscale
            )
        elif size in buckets or dataset.bucket_no_upscale:
            bucket = size  # the name of a video's cache holds the bucket
        else:
            return (dataset.resolution,) if not dataset.enable_bucket else ()
        return bucket, nabla_size(bucket)

    def _frames_problem(self, name: LatentName, info: LatentCacheInfo) -> str | None:
        dataset = self.dataset
        if not isinstance(dataset, VideoDatasetConfig):
            return None
        if dataset.frame_extraction == "full":
            if (name.num_frames or 1) > dataset.max_frames:
                return f"frame_count was {name.num_frames}, is at most {dataset.max_frames} (max_frames)"
        elif name.num_frames not in dataset.target_frames:
            return f"frame_count was {name.num_frames}, is one of {list(dataset.target_frames)}"
        rules = fps_rules(dataset.rates)
        if info.is_ours and info.metadata.get("fps") not in rules:
            return f"fps was {info.metadata.get('fps')!r}, is {rules[0]!r} by source_fps and target_fps"
        return None

    def _empty_text_path(self) -> Path:
        return self.dataset.cache_directory / empty_text_cache_name(self.dataset.template)

    def _prior_text_path(self) -> Path:
        if self.dataset.prior_caption is None:
            return self._empty_text_path()
        return self.dataset.cache_directory / prior_text_cache_name(self.dataset.template)

    def _check_extra_texts(self) -> None:
        """The captions that belong to no item, where this run needs them."""
        dataset = self.dataset
        needed = {}
        if dataset.caption_dropout_rate > 0:
            needed[self._empty_text_path()] = ("the empty caption, which caption dropout needs", "")
        if self.options.use_prior:
            what = "the empty caption" if dataset.prior_caption is None else "prior_caption"
            caption = dataset.prior_caption or ""
            needed[self._prior_text_path()] = (f"{what}, which --prior_loss_weight needs", caption)
        for path, (what, caption) in needed.items() if self.items else ():
            if not path.is_file():
                hint = "with --skip_existing the command makes nothing else"
                self._no_extra_texts.lines.append(f"{path.name}: {what} ({hint})")
                continue
            info = self._check_text(path)
            if info is None:
                continue
            self.extra_text_origins.append(f"{self.dataset.index}/{path.name} {info.origin}")
            found = info.metadata.get("caption1")
            if found != caption:
                self._bad_texts.lines.append(f"{path}: the caption was {found!r}, is {caption!r}")

    def _note_masks(self) -> None:
        masked = sum(item.mask_path is not None for item in self.items)
        if self.options.use_masks:
            self._note_once(
                f"dataset {self.dataset.index}: {masked} of {len(self.items)} clips have a mask; "
                "the others count everywhere"
            )
        elif self._mask_names:
            self._note_once(
                f"dataset {self.dataset.index}: its {len(self._mask_names)} masks are not used; "
                "--masked_loss uses them"
            )

    def _note_captions(self) -> None:
        counts = {item.source: item.num_captions for item in self.items if item.num_captions > 1}
        if counts:
            self._note_once(
                f"dataset {self.dataset.index}: {len(counts)} of {len({i.source for i in self.items})} "
                f"{self.dataset.content}s have several captions, {sum(counts.values())} in all; one is drawn "
                "each time"
            )

    def _messages(self) -> list[str]:
        where = f"dataset {self.dataset.index} ({self.dataset.cache_directory})"
        missing = (self._no_latents, self._no_texts, self._no_extra_texts)
        kinds = (self._bad_latents, self._bad_texts, *missing)
        problems = [kind.message(where, self.config_path) for kind in kinds if kind.lines]
        if self.options.strict and self.skipped:
            problems.append(
                f"{where}: --strict: {len(self.skipped)} items were skipped:\n{lines_in_short(self.skipped)}"
            )
        return problems

    def _note_once(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def counts(self) -> str:
        """For the message that there is nothing to train on."""
        reasons = Counter(entry.reason for entry in self.skipped)
        parts = [f"{count} {reason}" for reason, count in sorted(reasons.items())]
        return ", ".join(parts) or "no caches of latents in " + str(self.dataset.cache_directory)

    def summary(self) -> DatasetSummary:
        """What became of this dataset."""
        dataset = self.dataset
        batches = sum(
            -(-count * dataset.num_repeats // dataset.batch_size) for count in self._labels.values()
        )
        return DatasetSummary(
            index=dataset.index,
            content=dataset.content,
            found=len(self._used_names) + len(self.skipped),
            used=len(self._used_names),
            clips=len(self.items),
            skipped=tuple(self.skipped),
            buckets=tuple(sorted(self._labels.items())),
            batches=batches,
        )


def _limit_problem(info: TextCacheInfo, limits: tuple[int, int] | None) -> str | None:
    """Why a caption is not cut as generation cuts it, or None. CLIP's tokens cannot be counted in a cache."""
    if limits is None:
        return None
    qwen, clip = (info.metadata.get(name) for name in ("qwen_max_length", "clip_max_length"))
    if qwen != str(limits[0]) and (info.num_tokens > limits[0] or str(info.num_tokens) == qwen):
        return (
            f"qwen_max_length was {qwen}, is {limits[0]} in generation, which cuts this caption of "
            f"{info.num_tokens} tokens elsewhere"
        )
    return None if clip == str(limits[1]) else f"clip_max_length was {clip}, is {limits[1]} in generation"


def _parsed(path: Path, dataset: AnyDatasetConfig) -> LatentName:
    name = parse_latent_name(path.name, dataset.content)
    assert name is not None  # inspect_latent_cache has read it
    return name
