"""Chooses memory options that fit a card: `--vram_budget`.

Options are tried in the order of what they cost in time:

1. what the user typed, nothing added;
2. `--fp8_base`: every product widens its weight once, a few per cent of a step;
3. `--gradient_checkpointing`: one more forward pass per step, a quarter to a third of it;
4. both;
5. with both, whichever moves fewer bytes to and from the host in a step: `--blocks_to_swap N`, with the
   smallest N that fits, or `--gradient_checkpointing_cpu_offload`, or the two together. They run beside the
   computation and cost nothing where that is long enough, but they need host memory. Without `--fp8_base`
   they are tried only if it cannot be added.

An option that was given is kept as it is. A base that is stored in 8 bits another way is left so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from kandinsky5.configs.train import ModelConfig
from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.memory.activations import Batch
from kandinsky5.memory.plan import MemoryPlan, TrainingPlanner
from kandinsky5.model.offload import max_blocks_to_swap
from modules.byte_sizes import GIB
from modules.errors import ConfigError

Options = TypeVar("Options")

CHOSEN_OPTIONS = (
    "fp8_base",
    "gradient_checkpointing",
    "gradient_checkpointing_cpu_offload",
    "blocks_to_swap",
)
"""What is chosen among; generation knows the first and the last."""

CONTEXT_BYTES = GIB // 2
"""Assumed for a CUDA context and the workspaces of its libraries."""
FRAGMENTATION = 0.05
"""Assumed share of the planned bytes that the allocator cannot use."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Options that fit, and the plan under them."""

    model: ModelConfig
    plan: MemoryPlan
    added: tuple[str, ...]
    """As a user would type them."""


def with_reserve(planned: int) -> int:
    """Bytes a card should have for a plan: with the context and what fragmentation costs."""
    return CONTEXT_BYTES + int(planned * (1 + FRAGMENTATION))


def choose(planner: TrainingPlanner, batch: Batch, budget: int) -> Choice:
    """The cheapest options under which a step with `batch` fits into `budget` bytes with the reserve.

    Raises:
        ConfigError: none do; the message tells the smallest peak and what helps.
    """
    given = planner.config.model
    smallest: Choice | None = None
    for model in _candidates(planner, batch, budget):
        plan = planner.plan(model, batch)
        choice = Choice(model, plan, added_options(given, model))
        if with_reserve(plan.peak) <= budget:
            return choice
        if smallest is None or plan.peak < smallest.plan.peak:
            smallest = choice
    assert smallest is not None
    what = f"a batch of {batch.clips} x {batch.size}"
    raise too_little_memory(budget, what, smallest.plan.peak, smallest.added, what_else_helps(smallest.plan))


def too_little_memory(
    budget: int, what: str, smallest_peak: int, added: Sequence[str], helps: str
) -> ConfigError:
    """The error when nothing fits: the smallest peak there is, the options for it, and what else helps."""
    return ConfigError(
        f"--vram_budget {budget / GIB:g}: {what} does not fit; the least it needs is "
        f"{with_reserve(smallest_peak) / GIB:.1f} GiB ({smallest_peak / GIB:.1f} planned, the rest reserve), "
        f"with {' '.join(added) or 'the options given'}.\n{helps}"
    )


def fewest_that_fit(
    most: int, with_swapped: Callable[[int], Options], fits: Callable[[Options], bool]
) -> Options:
    """The options with the smallest number of swapped blocks that fits, or with the largest there is.

    The peak falls with every block.
    """
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(with_swapped(middle)) else (middle + 1, high)
    return with_swapped(low)


def added_options(given: WeightsConfig, chosen: WeightsConfig) -> tuple[str, ...]:
    """What `chosen` has and `given`, of the same command, has not, in the words of the command line."""
    words = []
    for name in CHOSEN_OPTIONS:
        value = getattr(chosen, name, None)
        if value != getattr(given, name, None):
            words.append(f"--{name}" if value is True else f"--{name} {value}")
    return tuple(words)


def what_else_helps(plan: MemoryPlan) -> str:
    """Advice beyond memory options, by what the plan consists of."""
    words = []
    if plan.batch.clips > 1:
        words.append("batch_size = 1 in the dataset file")
    if plan.batch.latent_frames > 1:
        words.append("fewer frames")
    words.append("a smaller resolution")
    held = plan.held.device
    if held["LoRA"] + held["gradients"] + held["optimizer"] > plan.peak / 4:
        words.append("a smaller --network_dim or --optimizer_type AdamW8bit")
    return f"What helps: {', '.join(words)}."


def _candidates(planner: TrainingPlanner, batch: Batch, budget: int) -> Iterator[ModelConfig]:
    given = planner.config.model
    can_quantise = not given.has_one_byte_weights
    yield given
    if can_quantise:
        yield replace(given, fp8_base=True)
    checkpointed = replace(given, gradient_checkpointing=True)
    if not given.gradient_checkpointing:
        yield checkpointed
    base = replace(checkpointed, fp8_base=True) if can_quantise else checkpointed
    if can_quantise:
        yield base
    yield from _with_transfers(planner, base, batch, budget)


def _with_transfers(
    planner: TrainingPlanner, base: ModelConfig, batch: Batch, budget: int
) -> Iterator[ModelConfig]:
    """Swap, offload or both: those that fit by the bytes they move, then the one with the smallest peak."""
    offloads = [base]
    if not base.gradient_checkpointing_cpu_offload:
        offloads.append(replace(base, gradient_checkpointing_cpu_offload=True))
    found = []
    for model in offloads:
        found.append(model)
        if base.blocks_to_swap == 0 and max_blocks_to_swap(base.dit_params) > 0:
            found.append(
                fewest_that_fit(
                    max_blocks_to_swap(base.dit_params),
                    lambda count, model=model: replace(model, blocks_to_swap=count),
                    lambda options: with_reserve(planner.plan(options, batch).peak) <= budget,
                )
            )
    plans = [(planner.plan(model, batch), model) for model in found]
    fitting = [(plan.held.moved_bytes, model) for plan, model in plans if with_reserve(plan.peak) <= budget]
    if fitting:
        yield min(fitting, key=lambda pair: pair[0])[1]
        return
    yield min(plans, key=lambda pair: pair[0].peak)[1]
