"""Training's view of a dataset: cached clips in batches, in an order that depends on (seed, epoch) alone.

`epoch_batches(epoch)` lists plans; a plan is all that `load_batch` needs, which
any number of threads may call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dataset.cache.files import TextCache, read_latent_cache, read_text_cache
from dataset.cache.fit import MatchOptions
from dataset.cache.items import CachedItem, DatasetSummary, summarise, summary_table
from dataset.cache.mask_cache import read_mask_cache
from dataset.cache.match import match_caches
from dataset.config.config import AnyDatasetConfig, DatasetConfig
from dataset.media.files import Content
from modules.errors import CacheError
from modules.seeding import generator_for


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """One batch before it is read."""

    items: tuple[int, ...]
    """Positions in `CachedDataset.items`."""
    item_keys: tuple[str, ...]
    """Name each clip of an epoch, the same on every machine: seeds of noise and timesteps depend on them."""
    drops_caption: tuple[bool, ...]
    """Whether caption dropout replaces the caption by the empty one."""
    caption_numbers: tuple[int, ...]
    """Which of its captions each clip is trained with, from 0."""
    timestep_quantiles: tuple[float, ...] | None
    """Stratified uniform numbers in [0, 1) that spread the sigmas over the epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedBatch:
    """The input of a training step; B clips of one latent shape."""

    latents: Tensor
    """[B, 16, F, H, W], float32, scaled."""
    latents_image: Tensor | None
    """[B, 16, 2, H, W], float32: first and last pixel frame encoded alone; None unless all clips have it."""
    text_embeds: tuple[Tensor, ...]
    """For each clip [L_i, dim] as cached, bfloat16: real tokens only."""
    pooled_embed: Tensor
    """[B, dim2], float32."""
    item_keys: tuple[str, ...]
    contents: tuple[Content, ...]
    """Per clip: "image" for a single frame, else "video"."""
    num_frames: tuple[int, ...]
    """Pixel frames per clip."""
    dataset_index: int
    timestep_quantiles: tuple[float, ...] | None
    loss_mask: Tensor | None = None
    """[B, F, H, W], float32 within 0 .. 1, what each position counts; None where no clip has a mask."""
    prior_text: TextCache | None = None
    """The caption of the prior term; None where there is none, or it is on the clips' own captions."""
    is_prior: bool = False
    """Of a dataset that is not learned: it has the prior term only."""


class CachedDataset:
    """The caches of all datasets of a dataset file."""

    def __init__(
        self,
        config: DatasetConfig,
        options: MatchOptions | None = None,
        *,
        seed: int,
        num_timestep_buckets: int | None = None,
    ) -> None:
        """Find and check every cache file by its header; no source is opened.

        Args:
            seed: order, caption dropout and timestep pools are functions of it and the epoch.
            num_timestep_buckets: spread the sigmas of an epoch evenly over this many parts; None and
                1 draw them independently.
        Raises:
            CacheError: caches are missing, damaged or do not fit the dataset file; the message lists them
                and gives the command that makes them.
        """
        matched = match_caches(config, options or MatchOptions())
        self.config = config
        self.seed = seed
        self.num_timestep_buckets = num_timestep_buckets
        self.items: tuple[CachedItem, ...] = matched.items
        self.summaries: tuple[DatasetSummary, ...] = matched.summaries
        self.notes: tuple[str, ...] = matched.notes
        """Log lines."""
        self.text_dims: tuple[int, int] = matched.text_dims
        """Width of token embeddings and of the pooled one, to be compared with the model's."""
        self.extra_text_origins: tuple[str, ...] = matched.extra_text_origins
        """Where the empty captions and those of the prior term come from, if they are used."""
        self._groups = _group(self.items)

    @property
    def num_items(self) -> int:
        """Clips per epoch, repeats counted."""
        return sum(self.config.datasets[item.dataset_index].num_repeats for item in self.items)

    @property
    def caption_rules(self) -> tuple[str, ...]:
        """The caption settings beyond one caption per item (dropout, priors), for reproducibility."""
        rates = {d.index: d.caption_dropout_rate for d in self.config.datasets if d.caption_dropout_rate}
        priors = {d.index: (d.is_prior, d.prior_caption) for d in self.config.datasets if _has_prior(d)}
        return (
            *(f"dataset {index} dropout {rate:g}" for index, rate in rates.items()),
            *(f"dataset {index} prior {prior}" for index, prior in priors.items()),
            *(f"{item.key} {item.num_captions}" for item in self.items if item.num_captions > 1),
        )

    def part(self, keep: Callable[[CachedItem], bool], *notes: str) -> CachedDataset:
        """The same datasets restricted to some of their items, without reading anything again.

        Args:
            notes: log lines about it.
        """
        part = copy.copy(self)
        part.items = tuple(item for item in self.items if keep(item))
        part._groups = _group(part.items)
        part.notes = (*self.notes, *notes)
        part.summaries = tuple(part._count(summary) for summary in self.summaries)
        return part

    def _count(self, summary: DatasetSummary) -> DatasetSummary:
        items = [item for item in self.items if item.dataset_index == summary.index]
        counted = summarise(self.config.datasets[summary.index], items, summary.skipped)
        return replace(counted, found=summary.found)

    def summary_table(self) -> str:
        """Found, used and skipped items by reason, and the clips per bucket, as text."""
        return summary_table(self.summaries)

    def epoch_batches(self, epoch: int) -> list[BatchPlan]:
        """The batches of an epoch (counted from 1) in order: a pure function of (seed, epoch)."""
        batches: list[BatchPlan] = []
        for dataset in self.config.datasets:
            groups = [group for group in self._groups if self.items[group[0]].dataset_index == dataset.index]
            members = [
                batch
                for group in groups
                for batch in self._cut(group, epoch, dataset.index, dataset.batch_size)
            ]
            quantiles = self._quantiles(len(members), dataset.batch_size, epoch, dataset.index)
            batches.extend(
                self._plan(batch, epoch, None if quantiles is None else quantiles[number])
                for number, batch in enumerate(members)
            )
        order = torch.randperm(len(batches), generator=generator_for("batch order", self.seed, epoch))
        return [batches[i] for i in order.tolist()]

    def measured_batches(self, *, batch_size: int | None = None) -> list[BatchPlan]:
        """Every clip once with its first caption, in an order that no seed decides: for measurements.

        Args:
            batch_size: None is the datasets' own.
        """
        plans = []
        for group in self._groups:
            size = batch_size or self.config.datasets[self.items[group[0]].dataset_index].batch_size
            for start in range(0, len(group), size):
                plan = self._plan([(position, 0) for position in group[start : start + size]], 1, None)
                count = len(plan.items)
                plans.append(replace(plan, drops_caption=(False,) * count, caption_numbers=(0,) * count))
        return plans

    def _cut(
        self, group: Sequence[int], epoch: int, dataset_index: int, batch_size: int
    ) -> Iterator[list[tuple[int, int]]]:
        """Batches of (position, repeat) from one group of equal shape, shuffled."""
        repeats = self.config.datasets[dataset_index].num_repeats
        repeated = [(position, repeat) for position in group for repeat in range(repeats)]
        shape = "x".join(map(str, self.items[group[0]].shape))
        generator = generator_for("item order", self.seed, epoch, dataset_index, shape)
        order = torch.randperm(len(repeated), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            yield [repeated[i] for i in order[start : start + batch_size]]

    def _plan(
        self, members: Sequence[tuple[int, int]], epoch: int, quantiles: Sequence[float] | None
    ) -> BatchPlan:
        keys = [self.items[i].key + (f"#{repeat}" if repeat else "") for i, repeat in members]
        return BatchPlan(
            items=tuple(i for i, _ in members),
            item_keys=tuple(keys),
            drops_caption=tuple(
                self._drops_caption(i, key, epoch) for (i, _), key in zip(members, keys, strict=True)
            ),
            caption_numbers=tuple(
                self._caption_number(i, key, epoch) for (i, _), key in zip(members, keys, strict=True)
            ),
            timestep_quantiles=None if quantiles is None else tuple(quantiles[: len(members)]),
        )

    def _drops_caption(self, position: int, key: str, epoch: int) -> bool:
        rate = self.config.datasets[self.items[position].dataset_index].caption_dropout_rate
        if rate == 0:
            return False
        return torch.rand((), generator=generator_for("caption dropout", self.seed, epoch, key)).item() < rate

    def _caption_number(self, position: int, key: str, epoch: int) -> int:
        count = self.items[position].num_captions
        if count == 1:
            return 0
        return int(torch.randint(count, (), generator=generator_for("caption", self.seed, epoch, key)))

    def _quantiles(
        self, num_batches: int, batch_size: int, epoch: int, dataset_index: int
    ) -> list[list[float]] | None:
        """For each batch `batch_size` numbers of an evenly filled pool (after musubi-tuner)."""
        buckets = self.num_timestep_buckets
        if buckets is None or buckets < 2:
            return None
        needed = num_batches * batch_size
        per_bucket = -(-needed // buckets)
        generator = generator_for("timestep pool", self.seed, epoch, dataset_index)
        draws = torch.rand(buckets, per_bucket, generator=generator, dtype=torch.float64)
        pool = ((draws + torch.arange(buckets).unsqueeze(1)) / buckets).flatten()
        order = torch.randperm(pool.numel(), generator=generator)[:needed]
        return pool[order].reshape(num_batches, batch_size).tolist()

    def load_batch(self, plan: BatchPlan) -> CachedBatch:
        """Read the files of a batch.

        Raises:
            CacheError: a file has changed since the start, or holds numbers that are not finite.
        """
        items = [self.items[i] for i in plan.items]
        latents = [read_latent_cache(item.latent_path, item.content) for item in items]
        for item, cache in zip(items, latents, strict=True):
            if tuple(cache.latents.shape[1:]) != item.shape:
                raise CacheError(
                    f"{item.latent_path}: was replaced by one of another size during the training"
                )
        texts = [
            read_text_cache(item.empty_text_path) if dropped else read_text_cache(item.text_path, number)
            for item, dropped, number in zip(items, plan.drops_caption, plan.caption_numbers, strict=True)
        ]
        prior_path = items[0].prior_text_path  # one for the whole dataset
        images = [cache.latents_image for cache in latents if cache.latents_image is not None]
        return CachedBatch(
            latents=torch.stack([cache.latents for cache in latents]),
            latents_image=torch.stack(images) if len(images) == len(items) else None,
            text_embeds=tuple(text.text_embeds for text in texts),
            pooled_embed=torch.stack([text.pooled_embed for text in texts]),
            item_keys=plan.item_keys,
            contents=tuple("image" if item.num_frames == 1 else "video" for item in items),
            num_frames=tuple(item.num_frames for item in items),
            dataset_index=items[0].dataset_index,
            timestep_quantiles=plan.timestep_quantiles,
            loss_mask=_loss_mask(items),
            prior_text=None if prior_path is None else read_text_cache(prior_path),
            is_prior=self.config.datasets[items[0].dataset_index].is_prior,
        )


def _loss_mask(items: Sequence[CachedItem]) -> Tensor | None:
    """Masks of a batch; clips without one count everywhere."""
    if not any(item.mask_path for item in items):
        return None
    masks = []
    for item in items:
        mask = torch.ones(item.shape) if item.mask_path is None else read_mask_cache(item.mask_path)
        if tuple(mask.shape) != item.shape:
            raise CacheError(f"{item.mask_path}: was replaced by one of another size during the training")
        masks.append(mask)
    return torch.stack(masks)


def _has_prior(dataset: AnyDatasetConfig) -> bool:
    return dataset.is_prior or dataset.prior_caption is not None


def _group(items: Sequence[CachedItem]) -> list[list[int]]:
    """Positions of items that can share a batch: of one dataset and one tensor shape; in a fixed order."""
    groups: dict[tuple[int, tuple[int, int, int]], list[int]] = {}
    for position, item in enumerate(items):
        groups.setdefault((item.dataset_index, item.shape), []).append(position)
    return [groups[key] for key in sorted(groups)]
