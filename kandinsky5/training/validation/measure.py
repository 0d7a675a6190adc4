"""A validation loss comparable between checks: fixed clips, noise and sigmas, LoRA on and off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataset.cache.cached_dataset import CachedDataset
from dataset.cache.items import CachedItem
from kandinsky5.model.flow_matching import draw_noise
from kandinsky5.training.loss.objective import Objective
from modules.interruption import Interrupted
from modules.seeding import generator_for
from networks.lora import LoRANetwork

NUM_BINS = 4
"""Equal parts of the sigmas 0..1; every clip is measured at one sigma of each."""
_SEED = 0
"""Fixed, not the run's, so that runs with different seeds can be compared."""


def draw_validation_sigmas(item_keys: Sequence[str]) -> Tensor:
    """Sigmas [NUM_BINS, B]: for every clip one in each bin, a pure function of bin and clip.

    Stratified: over many clips they fill their bins evenly, where fixed ones would leave gaps.
    """
    rows = [
        [float(torch.rand((), generator=generator_for(_SEED, "level", part, key))) for key in item_keys]
        for part in range(NUM_BINS)
    ]
    return (torch.arange(NUM_BINS)[:, None] + torch.tensor(rows)) / NUM_BINS


@dataclass(frozen=True, slots=True)
class _Group:
    """Some clips at some sigmas, whose losses are averaged."""

    section: str
    """Key in the record; "" is the record itself."""
    labels: Mapping[str, Any]
    clips: Tensor
    """[N] bool."""
    part: int | None = None
    """Number of the bin; None for all."""

    def mean(self, losses: Tensor) -> float:
        """losses [N, NUM_BINS] -> their average within the group."""
        chosen = losses[self.clips]
        return float((chosen if self.part is None else chosen[:, self.part]).mean())


def _digest(item: CachedItem) -> str:
    """Names what a clip's caches hold: with another caption or encoder they are another clip."""
    digest = hashlib.sha256()
    for path in (item.latent_path, item.text_path):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


class Validation:
    """Measures a dataset; the base model's numbers are taken once, or from an earlier part of the run.

    Args:
        model_settings: all that decides what the base model computes; other settings are another measurement.
    """

    def __init__(
        self, data: CachedDataset, objective: Objective, network: LoRANetwork, *, model_settings: str
    ) -> None:
        self._data, self._objective, self._network = data, objective, network
        self._plans = data.measured_batches()
        self._groups = self._make_groups()
        clips = [pair for plan in self._plans for pair in zip(plan.item_keys, plan.items, strict=True)]
        contents = [(key, _digest(data.items[index])) for key, index in clips]
        named = json.dumps([model_settings, NUM_BINS, contents]).encode("utf-8")
        self._identity = hashlib.sha256(named).hexdigest()[:16]
        self._base: list[float] | None = None

    def reuse_base(self, earlier: Iterable[Mapping[str, Any]]) -> None:
        """Take the base model's numbers from records of the same measurement, if there are any."""
        for record in earlier:
            if record.get("set") == self._identity:
                self._base = self._base_numbers(record) or self._base

    def measure(self, should_stop: Callable[[], bool]) -> dict[str, Any]:
        """Mean losses with and without the LoRA: over all, per bin of sigmas, bucket and dataset.

        No gradient is recorded, no random stream moves, and the network is left in training mode.

        Args:
            should_stop: called before every forward pass.
        Raises:
            Interrupted: it returned True.
        """
        self._network.eval()
        try:
            if self._base is None:
                with self._network.disabled():
                    self._base = self._means(should_stop)
            return self._record(self._means(should_stop), self._base)
        finally:
            self._network.train()

    def _means(self, should_stop: Callable[[], bool]) -> list[float]:
        losses = self.losses(should_stop)
        return [group.mean(losses) for group in self._groups]

    @torch.no_grad()
    def losses(self, should_stop: Callable[[], bool]) -> Tensor:
        """Losses [N, NUM_BINS], float64 on the CPU, clips in the order of the batches; one transfer for all.

        Raises:
            Interrupted: `should_stop` returned True.
        """
        rows = []
        for plan in self._plans:
            batch = self._data.load_batch(plan)
            use = torch.ones(len(batch.item_keys), dtype=torch.bool)
            columns = []
            for part, sigma in enumerate(draw_validation_sigmas(batch.item_keys)):
                if should_stop():
                    raise Interrupted
                noise = draw_noise(_SEED, part, batch.item_keys, batch.latents.shape[1:])
                columns.append(self._objective.losses(batch, noise, sigma, use))
            rows.append(torch.stack(columns, dim=1))
        return torch.cat(rows).double().cpu()

    def _make_groups(self) -> list[_Group]:
        items = [self._data.items[position] for plan in self._plans for position in plan.items]
        everything = torch.ones(len(items), dtype=torch.bool)
        groups = [_Group("", {}, everything)]
        width = 1000 // NUM_BINS
        for part in range(NUM_BINS):
            labels = {"from": part * width, "to": (part + 1) * width}
            groups.append(_Group("timesteps", labels, everything, part))
        for section, name, values in (
            ("buckets", "bucket", [item.bucket for item in items]),
            ("datasets", "dataset", [item.dataset_index for item in items]),
        ):
            for value in sorted(set(values)):
                clips = torch.tensor([other == value for other in values])
                groups.append(_Group(section, {name: value, "clips": int(clips.sum())}, clips))
        return groups

    def _record(self, losses: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
        record: dict[str, Any] = {"set": self._identity, "clips": len(self._groups[0].clips)}
        for group, loss, base_loss in zip(self._groups, losses, base, strict=True):
            entry = {**group.labels, "loss": loss, "base_loss": base_loss}
            if group.section:
                record.setdefault(group.section, []).append(entry)
            else:
                record |= entry
        return record

    def _base_numbers(self, record: Mapping[str, Any]) -> list[float] | None:
        """The base model's part of a record, in the order of the groups; None if it is not whole."""
        entries = [record, *(entry for name in self._sections() for entry in record.get(name, ()))]
        numbers = [entry.get("base_loss") for entry in entries]
        is_whole = len(numbers) == len(self._groups) and all(isinstance(n, float) for n in numbers)
        return numbers if is_whole else None

    def _sections(self) -> list[str]:
        return [name for name in dict.fromkeys(group.section for group in self._groups) if name]
