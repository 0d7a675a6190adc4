"""Low-rank adapters on the linear layers of any frozen model: the layer and the network.

Two objects share the work. `Adapter` modules own the trainable factors and belong to the `LoRANetwork`; the
`LoRALinear` that takes the place of a linear layer inside the model only refers to its adapter. So the model
still holds nothing but frozen weights (they can be swapped or moved by themselves), and the parameters of the
network are exactly what the optimizer, distributed training and the saved file need.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.fused_ops import JointLinear, Recomputable
from modules.quantised_linear import StoredLinear
from modules.seeding import derive_seed, generator_for
from networks.factors import LayerFactors
from networks.fused_lora import LowRankLayer, can_fuse, fused_lora


@dataclass(slots=True)
class AdapterState:
    """The settings that a network's layers read at every call; one object per network."""

    multiplier: float = 1.0
    is_enabled: bool = True
    step_seed: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True, slots=True)
class DropoutRates:
    """Chances in [0, 1), used in training mode only."""

    network_dropout: float = 0.0
    """Of each element of the rank-sized activations."""
    rank_dropout: float = 0.0
    """Of each rank, one draw per sample."""
    module_dropout: float = 0.0
    """Of the whole adapter of a layer, one draw per step."""


NO_DROPOUT = DropoutRates()


class Adapter(nn.Module, ABC):
    """The trainable change of one linear layer. Subclasses hold float32 factors and say how they act.

    Args:
        path: dotted name of the layer in its model; part of every seed.
        alpha: the change is multiplied by alpha / rank.
    """

    def __init__(self, path: str, in_features: int, out_features: int, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.path = path
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha = rank, alpha
        self.dropout = NO_DROPOUT

    @property
    def scale(self) -> float:
        """Factor of the product of the raw factors, without the network's multiplier."""
        return self.alpha / self.rank

    def bind(self, layer: nn.Module) -> None:
        """Take what this kind needs of the frozen layer, whose weight is in place now; once, before use."""

    @abstractmethod
    def forward_with(
        self, base: nn.Module, x: Tensor, multiplier: float, step_seed: tuple[int, ...]
    ) -> Tensor:
        """base(x) plus multiplier * change(x), in the dtype of the activations: x [..., in] -> [..., out]."""

    @abstractmethod
    def factors(self) -> LayerFactors:
        """The saved factors: views of the parameters, the zero-initialised one last."""

    def change_norm(self) -> Tensor:
        """Frobenius norm of the whole change of the weight: float64 []."""
        return self.factors().norm()

    def is_skipped(self, step_seed: tuple[int, ...]) -> bool:
        """Whether module dropout skips this layer in the current step (no device sync)."""
        chance = self.dropout.module_dropout
        if not self.training or chance == 0.0:
            return False
        return derive_seed(*step_seed, "module_dropout", self.path) < chance * 2**63

    def keep_mask(
        self, shape: Sequence[int], chance: float, kind: str, like: Tensor, seed: Sequence[int]
    ) -> Tensor:
        """Mask of 0 and 1 / (1 - chance): equal whenever it is drawn again for the same step, as a
        checkpointed block does in its backward pass.
        """
        generator = generator_for(*seed, kind, self.path, device=like.device)
        drawn = torch.rand(tuple(shape), generator=generator, device=like.device)
        return (drawn >= chance).to(like.dtype).div_(1.0 - chance)

    def multiplier_now(self, multiplier: float, step_seed: tuple[int, ...]) -> float:
        """The multiplier in this step.

        A skipped layer still takes part, times zero: distributed training waits for every gradient.
        """
        return 0.0 if self.is_skipped(step_seed) else multiplier

    def drop_ranks(self, hidden: Tensor, step_seed: tuple[int, ...]) -> Tensor:
        """The activations between two factors, [..., rank], with network dropout and rank dropout."""
        rates = self.dropout
        if not self.training:
            return hidden
        if rates.network_dropout > 0.0:
            hidden = hidden * self.keep_mask(
                hidden.shape, rates.network_dropout, "network_dropout", hidden, step_seed
            )
        if rates.rank_dropout > 0.0:
            # The first axis counts samples if there is one beside tokens and features.
            samples = hidden.shape[0] if hidden.ndim > 2 else 1
            shape = (samples, *[1] * (max(hidden.ndim, 2) - 2), self.rank)
            hidden = hidden * self.keep_mask(shape, rates.rank_dropout, "rank_dropout", hidden, step_seed)
        return hidden


@dataclass(frozen=True, slots=True)
class LoraFactors(LayerFactors):
    """delta = scale * up [out, r] @ down [r, in]."""

    PRODUCTS: ClassVar[tuple[tuple[str, str], ...]] = (("lora_up", "lora_down"),)

    @classmethod
    def is_complete(cls, roles: Collection[str]) -> bool:
        return {"lora_down", "lora_up"} <= set(roles)

    @property
    def down(self) -> Tensor:
        return self.tensors["lora_down"]

    @property
    def up(self) -> Tensor:
        return self.tensors["lora_up"]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def delta(self) -> Tensor:
        return (self.up.float() * self.scale) @ self.down.float()

    def norm(self) -> Tensor:
        """||delta||_F from rank x rank products, without forming delta: ||U D||_F^2 = trace((U^T U)(D D^T)).

        In float64, so that small factors do not vanish when they are squared.
        """
        up, down = self.up.double(), self.down.double()
        squared = ((up.t() @ up) * (down @ down.t())).sum().clamp(min=0.0)
        return squared.sqrt() * abs(self.scale)


def initial_down(path: str, rank: int, in_features: int, seed: int) -> Tensor:
    """`lora_down` at the start, [rank, in] float32: Kaiming-uniform, a function of (seed, path) alone."""
    down = torch.empty(rank, in_features, dtype=torch.float32)
    return nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator_for(seed, "lora", path))


class LoRAAdapter(Adapter):
    """delta(x) = alpha / rank * up(down(x)); `lora_up` starts at zero, so the first step changes nothing.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """

    def __init__(
        self, path: str, in_features: int, out_features: int, *, rank: int, alpha: float, seed: int
    ) -> None:
        super().__init__(path, in_features, out_features, rank=rank, alpha=alpha)
        self.lora_down = nn.Parameter(initial_down(path, rank, in_features, seed))
        self.lora_up = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))

    def forward_with(
        self, base: nn.Module, x: Tensor, multiplier: float, step_seed: tuple[int, ...]
    ) -> Tensor:
        layer = self.fusible(base, multiplier, step_seed)
        if layer is None:
            return self.add_delta(base(x), x, multiplier, step_seed)
        return fused_lora(x, [layer])[0]

    def fusible(self, base: nn.Module, multiplier: float, step_seed: tuple[int, ...]) -> LowRankLayer | None:
        """Inputs of `fused_lora` for this layer in this step; None if it must be computed separately."""
        drops_ranks = self.training and (self.dropout.network_dropout or self.dropout.rank_dropout)
        if drops_ranks or not can_fuse(base):
            return None
        return LowRankLayer(base, self.lora_down, self.lora_up, self._scale_now(multiplier, step_seed))

    def add_delta(
        self, base_output: Tensor, x: Tensor, multiplier: float, step_seed: tuple[int, ...]
    ) -> Tensor:
        """base_output [..., out] + multiplier * delta(x [..., in])."""
        hidden = self.drop_ranks(F.linear(x, self.lora_down.to(x.dtype)), step_seed)  # [..., rank]
        summed = torch.addmm(
            base_output.reshape(-1, self.out_features),
            hidden.reshape(-1, self.rank),
            self.lora_up.to(x.dtype).t(),
            alpha=self._scale_now(multiplier, step_seed),
        )
        return summed.view(base_output.shape)

    def _scale_now(self, multiplier: float, step_seed: tuple[int, ...]) -> float:
        return self.multiplier_now(multiplier, step_seed) * self.scale

    def factors(self) -> LoraFactors:
        return LoraFactors(
            {"lora_down": self.lora_down.detach(), "lora_up": self.lora_up.detach()}, self.scale
        )

    @torch.no_grad()
    def limit_norm(self, max_norm: float) -> Tensor:
        """Shrink both factors alike until ||scale * up @ down||_F <= max_norm; returns the norm before, [].

        The norm is taken from rank x rank products: ||U D||_F^2 = trace((U^T U)(D D^T)).
        """
        gram = (self.lora_up.t() @ self.lora_up) * (self.lora_down @ self.lora_down.t())
        norm = self.scale * gram.sum().clamp(min=0.0).sqrt()
        factor = (max_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0).sqrt()
        self.lora_up.mul_(factor)
        self.lora_down.mul_(factor)
        return norm


class LoRALinear(JointLinear):
    """Takes the place of a linear layer: its output plus the adapter's, from the same input.

    Args:
        base: any module with `in_features` and `out_features`, mapping [..., in] to [..., out]; another
            `LoRALinear` too, so that adapters stack.
    """

    def __init__(self, base: nn.Module, adapter: Adapter, state: AdapterState) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = adapter.in_features, adapter.out_features
        # In a tuple, so that the adapter is no submodule of the model (see the top of this file).
        self._adapter = (adapter,)
        self._state = state

    @property
    def adapter(self) -> Adapter:
        return self._adapter[0]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        state = self._state
        if not state.is_enabled or state.multiplier == 0.0:
            return self.base(x)
        return self.adapter.forward_with(self.base, x, state.multiplier, state.step_seed)

    def fusible(self) -> LowRankLayer | None:
        """See `LoRAAdapter.fusible`; None for other adapters and while this one is disabled."""
        state, adapter = self._state, self.adapter
        if not (state.is_enabled and state.multiplier != 0.0 and isinstance(adapter, LoRAAdapter)):
            return None
        return adapter.fusible(self.base, state.multiplier, state.step_seed)

    def project_jointly(
        self, x: Tensor, layers: Sequence[nn.Module], before: Recomputable | None
    ) -> list[Tensor] | None:
        fusible = [layer.fusible() if isinstance(layer, LoRALinear) else None for layer in layers]
        together = [layer for layer in fusible if layer is not None]
        if len(together) != len(layers):
            return None
        if before is not None and before.is_trained:
            x, before = before.value(x), None
        return fused_lora(x, together, before)


class LoRANetwork(nn.Module):
    """The adapters of one model. Its parameters are the trainable ones, under the model's own layer names.

    Calling the network calls the model, so that a wrapper for distributed training around the network sees
    every forward pass and synchronises the adapters' gradients alone. Build it with `inject`.
    """

    def __init__(
        self, host: nn.Module, adapters: Sequence[Adapter], *, loraplus_lr_ratio: float | None
    ) -> None:
        super().__init__()
        self._host = (host,)  # in a tuple: the frozen model is no submodule of the network
        self._state = AdapterState()
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.adapters: Mapping[str, Adapter] = {adapter.path: adapter for adapter in adapters}
        for adapter in adapters:
            _register(self, adapter)
            _replace(host, adapter.path, LoRALinear(host.get_submodule(adapter.path), adapter, self._state))

    @property
    def host(self) -> nn.Module:
        """The model that contains the adapters."""
        return self._host[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its adapters."""
        return self.host(*args, **kwargs)

    @property
    def multiplier(self) -> float:
        return self._state.multiplier

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of all adapters; at 0 the output is bit-identical to the base model's."""
        self._state.multiplier = multiplier

    def set_step_seed(self, seed: int, *position: int) -> None:
        """Fix the dropout masks until the next call: a function of `seed`, `position` and the layer alone.

        Args:
            position: identifies this forward and backward pass (step, micro-step, process).
        """
        self._state.step_seed = (seed, *position)

    @property
    def is_enabled(self) -> bool:
        return self._state.is_enabled

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model computes exactly what it does without adapters."""
        before = self._state.is_enabled
        self._state.is_enabled = False
        try:
            yield
        finally:
            self._state.is_enabled = before

    def remove(self) -> None:
        """Restore the model's own layers; the network keeps its factors."""
        for path in self.adapters:
            holder_path, _, name = path.rpartition(".")
            holder = self.host.get_submodule(holder_path)
            layer = getattr(holder, name)
            while layer._state is not self._state:  # an adapter of another network lies on top
                holder, name, layer = layer, "base", layer.base
            setattr(holder, name, layer.base)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer: one, or with LoRA+ a second one whose `lora_up` learn faster.

        Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models".
        """
        if self.loraplus_lr_ratio is None:
            return [{"name": "unet", "params": list(self.parameters()), "lr": lr}]
        named = list(self.named_parameters())
        return [
            {"name": "unet", "params": [p for n, p in named if "lora_up" not in n], "lr": lr},
            {
                "name": "unet plus",
                "params": [p for n, p in named if "lora_up" in n],
                "lr": lr * self.loraplus_lr_ratio,
            },
        ]

    def scale_weight_norms(self, max_norm: float) -> Tensor:
        """After an optimizer step: limit the Frobenius norm of every adapter's change.

        Returns:
            [number of LoRA adapters], float32, on their device: the norms before the cut.
        """
        norms = [a.limit_norm(max_norm) for a in self.adapters.values() if isinstance(a, LoRAAdapter)]
        return torch.stack(norms) if norms else torch.empty(0)


def inject(
    model: nn.Module,
    target_names: Sequence[str],
    *,
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float],
    seed: int,
    dropout: DropoutRates = NO_DROPOUT,
    loraplus_lr_ratio: float | None = None,
    make_adapter: Callable[..., Adapter] = LoRAAdapter,
) -> LoRANetwork:
    """Put adapters on the named layers of `model`, freeze the model, and return the trainable network.

    Args:
        target_names: dotted paths of modules with `in_features` and `out_features`.
        rank, alpha: one value for all layers, or one per path. An alpha of 0 means alpha = rank.
        seed: the factors are a function of (seed, path) alone; no global generator is read or moved.
        make_adapter: called as make_adapter(path, in_features, out_features, rank=, alpha=, seed=).
    Returns:
        The network, its factors in float32 on the CPU; move it with `.to(device)`.
    """
    model.requires_grad_(False)
    adapters = []
    for path in target_names:
        layer = model.get_submodule(path)
        layer_rank = rank if isinstance(rank, int) else rank[path]
        layer_alpha = alpha[path] if isinstance(alpha, Mapping) else alpha
        adapter = make_adapter(
            path,
            layer.in_features,
            layer.out_features,
            rank=layer_rank,
            alpha=layer_alpha or float(layer_rank),
            seed=seed,
        )
        adapter.dropout = dropout
        adapter.bind(frozen_layer(layer))
        adapters.append(adapter)
    return LoRANetwork(model, adapters, loraplus_lr_ratio=loraplus_lr_ratio)


def frozen_layer(layer: nn.Module) -> nn.Module:
    """The layer of the model itself under any number of adapters."""
    while isinstance(layer, LoRALinear):
        layer = layer.base
    return layer


def frozen_weight(layer: nn.Module) -> Tensor:
    """The weight [out, in] of a frozen layer, in float32 if it is stored in one byte per element."""
    return layer.widened() if isinstance(layer, StoredLinear) else layer.get_parameter("weight")


def _register(root: nn.Module, adapter: Adapter) -> None:
    """Add the adapter below plain containers, so that parameter names spell the layer's path."""
    *folders, name = adapter.path.split(".")
    holder = root
    for folder in folders:
        child = holder._modules.get(folder)
        if child is None:
            child = nn.Module()
            holder.add_module(folder, child)
        holder = child
    holder.add_module(name, adapter)


def _replace(root: nn.Module, path: str, layer: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    setattr(root.get_submodule(holder), name, layer)
