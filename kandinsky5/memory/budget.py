"""Chooses memory options that fit a card: `--vram_budget`.

Options are tried in the order of what they cost in time:

1. what the user typed, nothing added;
2. the base in 8 bits that suits the card (`kandinsky5.memory.bases`): a few per cent of a step, or less than
   nothing where products run in int8;
3. `--gradient_checkpointing`: one more forward pass per step, a quarter to a third of it;
4. both;
5. with both, whichever moves fewer bytes to and from the host in a step: `--blocks_to_swap N`, with the
   smallest N that fits, or `--gradient_checkpointing_cpu_offload`, or the two together. They run beside the
   computation and cost nothing where that is long enough, but they need host memory. Without a base in
   8 bits they are tried only if it cannot be added;
6. 4 and 5 once more with `--nf4_base`, where bitsandbytes is installed.

An option that was given is kept as it is, and so is a base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic

from kandinsky5.configs.train import ModelConfig
from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.memory.bases import BASE_OPTIONS, last_resort, with_base
from kandinsky5.memory.plan import Job, MemoryPlan, Options, Planner
from kandinsky5.model.offload import max_blocks_to_swap
from modules.byte_sizes import GIB
from modules.errors import ConfigError

CHOSEN_OPTIONS = (
    *BASE_OPTIONS,
    "gradient_checkpointing",
    "gradient_checkpointing_cpu_offload",
    "blocks_to_swap",
)
"""The memory options to choose from; generation has no gradients."""

CONTEXT_BYTES = GIB // 2
"""Assumed for a CUDA context and the workspaces of its libraries."""
FRAGMENTATION = 0.05
"""Assumed share of the planned bytes that the allocator cannot use."""


@dataclass(frozen=True, slots=True)
class Choice(Generic[Options]):
    """Options that fit, and the plan under them."""

    options: Options
    plan: MemoryPlan
    added: tuple[str, ...]
    """As typed on the command line."""


def with_reserve(planned: int) -> int:
    """Bytes of device memory for a plan, with the CUDA context and fragmentation."""
    return CONTEXT_BYTES + int(planned * (1 + FRAGMENTATION))


def choose(planner: Planner[Options, Job], job: Job, budget: int, base: tuple[str, ...]) -> Choice[Options]:
    """The cheapest options under which `job` fits into `budget` bytes with the reserve.

    Args:
        base: the options of the base in 8 bits that suits the card.
    Raises:
        ConfigError: none do; the message gives the smallest peak and what helps.
    """
    smallest: Choice[Options] | None = None
    for options in _candidates(planner, job, budget, base):
        plan = planner.plan(options, job)
        choice = Choice(options, plan, added_options(planner.given, options))
        if with_reserve(plan.peak) <= budget:
            return choice
        if smallest is None or plan.peak < smallest.plan.peak:
            smallest = choice
    assert smallest is not None
    peak = smallest.plan.peak
    raise ConfigError(
        f"--vram_budget {budget / GIB:g}: {smallest.plan.label} does not fit; the least it needs is "
        f"{with_reserve(peak) / GIB:.1f} GiB ({peak / GIB:.1f} planned, the rest reserve), "
        f"with {' '.join(smallest.added) or 'the options given'}.\n{planner.advice(smallest.plan)}"
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
    """The options of `chosen` that are not in `given`, as typed on the command line."""
    words = []
    for name in CHOSEN_OPTIONS:
        value = getattr(chosen, name, None)
        if value != getattr(given, name, None):
            words.append(f"--{name}" if value is True else f"--{name} {value}")
    return tuple(words)


def _candidates(
    planner: Planner[Options, Job], job: Job, budget: int, base: tuple[str, ...]
) -> Iterator[Options]:
    given = planner.given
    yield given
    eight_bits = given if given.is_quantised else with_base(given, base)
    if not given.is_quantised:
        yield eight_bits
    if isinstance(given, ModelConfig):
        if not given.gradient_checkpointing:
            yield replace(given, gradient_checkpointing=True)
        eight_bits = replace(eight_bits, gradient_checkpointing=True)
        if not given.is_quantised:
            yield eight_bits
    yield from _with_transfers(planner, eight_bits, job, budget)
    smallest = last_resort(planner.device)
    if smallest is None or given.is_quantised:
        return
    four_bits = with_base(given, smallest)
    if isinstance(four_bits, ModelConfig):
        four_bits = replace(four_bits, gradient_checkpointing=True)
    yield four_bits
    yield from _with_transfers(planner, four_bits, job, budget)


def _with_transfers(
    planner: Planner[Options, Job], base: Options, job: Job, budget: int
) -> Iterator[Options]:
    """Swap, offload or both: those that fit by the bytes they move, then the one with the smallest peak."""
    bases = [base]
    if isinstance(base, ModelConfig) and not base.gradient_checkpointing_cpu_offload:
        bases.append(replace(base, gradient_checkpointing_cpu_offload=True))
    most = max_blocks_to_swap(planner.params)
    found = []
    for options in bases:
        found.append(options)
        if base.blocks_to_swap == 0 and most > 0:
            found.append(
                fewest_that_fit(
                    most,
                    lambda count, options=options: replace(options, blocks_to_swap=count),
                    lambda swapped: with_reserve(planner.plan(swapped, job).peak) <= budget,
                )
            )
    plans = [(planner.plan(options, job), options) for options in found]
    fitting = [
        (plan.usage.moved_bytes, options) for plan, options in plans if with_reserve(plan.peak) <= budget
    ]
    if fitting:
        yield min(fitting, key=lambda pair: pair[0])[1]
        return
    yield min(plans, key=lambda pair: pair[0].peak)[1]
