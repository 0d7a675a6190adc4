"""Timestep sampling: from a quantile in (0, 1) to sigma, loss weights, and plots of both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor

from kandinsky5.configs.train import ShowTimestepsConfig, TimestepConfig
from modules.errors import ConfigError
from modules.files import atomic_writer, disk_errors
from modules.logs import get_logger, print_report
from modules.seeding import generator_for

log = get_logger(__name__)

_NORMAL = NormalDist()
_MARGIN = 1e-7
"""Quantiles are kept this far from 0 and 1, where the normal quantile is infinite."""
MAX_REDRAWS = 1000
RARE_SHARE = 0.02
"""From it on fewer than one in 10^8 draws miss MAX_REDRAWS times."""

_SHIFT_LINES = {
    # mode: ((tokens, mu), (tokens, mu)) of the line mu(tokens); the shift is exp(mu).
    "flux_shift": ((256, 0.5), (4096, 1.15)),
    "qwen_shift": ((256, 0.5), (8192, 0.9)),
    "krea2_shift": ((256, 0.5), (6400, 1.15)),
    "flux2_shift": ((256, 0.5), (4096, 1.15)),
}
_SHOWN_SIZE = (64, 64)
_LOW_NOISE = {"logit_mean": 5.36, "logit_std": 1.0}


def draw_sigmas(
    config: TimestepConfig,
    seed: int,
    step: int,
    item_keys: Sequence[str],
    latent_size: tuple[int, int],
    quantiles: Sequence[float] | None = None,
) -> Tensor:
    """Draw the sigmas of a batch, a pure function of (seed, step, item).

    Args:
        latent_size: latent height and width, for the modes that depend on them.
        quantiles: the epoch's pool of stratified numbers, one per item, instead of a random one.
    Returns:
        [B] float32 in [0, 1], on the CPU.
    """
    values = []
    for index, key in enumerate(item_keys):
        generator = generator_for(seed, "sigma", step, key)
        first = None if quantiles is None else quantiles[index]
        values.append(draw_sigma(config, generator, latent_size, first))
    return torch.tensor(values, dtype=torch.float32)


def draw_sigma(
    config: TimestepConfig,
    generator: torch.Generator,
    latent_size: tuple[int, int],
    quantile: float | None = None,
) -> float:
    """Draw one sigma within min_timestep..max_timestep (over 1000).

    Args:
        quantile: used instead of the generator's first number.
    """
    low, high = config.min_timestep / 1000, config.max_timestep / 1000
    for attempt in range(MAX_REDRAWS):
        given = quantile if attempt == 0 and quantile is not None else _uniform(generator)
        sigma = sigma_at(config, given, latent_size, branch=_uniform(generator))
        if not config.preserve_distribution_shape:
            return low + (high - low) * sigma
        if low <= sigma <= high:
            return sigma
    # So little of the distribution lies inside that an even draw is the honest fallback; `rarity_warning`.
    return low + (high - low) * _uniform(generator)


def rarity_warning(config: TimestepConfig, latent_sizes: Iterable[tuple[int, int]]) -> str | None:
    """A warning if hardly any of the distribution lies within the limits it is redrawn to, else None.

    Args:
        latent_sizes: latent height and width of the clips, for the modes that depend on them.
    """
    if not config.preserve_distribution_shape:
        return None
    low, high = config.min_timestep / 1000, config.max_timestep / 1000
    share = min(_share_within(config, size, low, high) for size in latent_sizes)
    if share >= RARE_SHARE:
        return None
    return (
        f"--preserve_distribution_shape: {share:.2%} of the draws lie within {config.min_timestep:g} .. "
        f"{config.max_timestep:g}. After {MAX_REDRAWS} draws outside an even one between these limits is "
        "taken instead; other limits or another --timestep_sampling keep the shape"
    )


def _share_within(config: TimestepConfig, latent_size: tuple[int, int], low: float, high: float) -> float:
    generator, count = generator_for(0, "share_within"), 4000
    drawn = (
        sigma_at(config, _uniform(generator), latent_size, branch=_uniform(generator)) for _ in range(count)
    )
    return sum(low <= sigma <= high for sigma in drawn) / count


def sigma_at(
    config: TimestepConfig, quantile: float, latent_size: tuple[int, int], *, branch: float = 0.0
) -> float:
    """The sigma at a quantile in (0, 1), before min and max; monotone in it.

    Args:
        branch: a second number in (0, 1): which part of a mixture (qinglong_*) is taken.
    """
    u = min(max(quantile, _MARGIN), 1.0 - _MARGIN)
    z = _NORMAL.inv_cdf(u)
    match config.timestep_sampling:
        case "sigma":
            return _density(config, u, z)
        case "uniform":
            return u
        case "sigmoid":
            return _sigmoid(config.sigmoid_scale * z)
        case "shift":
            return shift_sigma(_sigmoid(config.sigmoid_scale * z), config.discrete_flow_shift)
        case "logsnr":
            return _sigmoid(-(config.logit_mean + config.logit_std * z) / 2)
        case "qinglong_flux":
            if branch < 0.79:
                mixed = replace(config, timestep_sampling="flux_shift")
            elif branch < 0.90:
                mixed = replace(config, timestep_sampling="logsnr")
            else:
                mixed = replace(config, timestep_sampling="logsnr", **_LOW_NOISE)
            return sigma_at(mixed, u, latent_size)
        case "qinglong_qwen":
            if branch < 0.95:
                return sigma_at(replace(config, timestep_sampling="qwen_shift"), u, latent_size)
            return sigma_at(replace(config, timestep_sampling="logsnr", **_LOW_NOISE), u, latent_size)
        case mode if mode in _SHIFT_LINES:
            return shift_sigma(_sigmoid(config.sigmoid_scale * z), size_shift(mode, latent_size))
    raise ConfigError(f"--timestep_sampling {config.timestep_sampling}: unknown mode")


def size_shift(mode: str, latent_size: tuple[int, int]) -> float:
    """The shift of a size-dependent mode: exp of a line in the number of tokens of one frame.

    flux2_shift counts latent positions, the others patches of 2 x 2.
    """
    (low, low_mu), (high, high_mu) = _SHIFT_LINES[mode]
    height, width = latent_size
    tokens = height * width if mode == "flux2_shift" else (height // 2) * (width // 2)
    slope = (high_mu - low_mu) / (high - low)
    return math.exp(low_mu + slope * (tokens - low))


def shift_sigma(sigma: float, shift: float) -> float:
    """s * sigma / (1 + (s - 1) * sigma), as the sampling schedule is shifted."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def loss_weight(config: TimestepConfig, sigma: Tensor) -> Tensor:
    """The factor on each item's loss, [B] like sigma.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", arXiv 2403.03206, sections 3.1 and 4.
    """
    if config.weighting_scheme == "sigma_sqrt":
        return sigma.clamp(min=1e-3) ** -2.0  # a level of exactly 0 would weigh infinitely
    if config.weighting_scheme == "cosmap":
        return 2.0 / (math.pi * (1.0 - 2.0 * sigma + 2.0 * sigma**2))
    return torch.ones_like(sigma)


def _density(config: TimestepConfig, u: float, z: float) -> float:
    """The distributions of `--weighting_scheme`, which act in sigma mode alone."""
    if config.weighting_scheme == "logit_normal":
        return _sigmoid(config.logit_mean + config.logit_std * z)
    if config.weighting_scheme == "mode":
        return 1.0 - u - config.mode_scale * (math.cos(math.pi * u / 2) ** 2 - 1.0 + u)
    return u


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def histogram(
    config: TimestepConfig,
    *,
    num_draws: int = 100_000,
    bins: int = 40,
    latent_size: tuple[int, int] = _SHOWN_SIZE,
) -> tuple[list[float], list[float]]:
    """Share of draws and mean loss weight per bin of 1000 / bins timesteps."""
    generator = generator_for(0, "show_timesteps")
    drawn = [draw_sigma(config, generator, latent_size) for _ in range(num_draws)]
    sigma = torch.tensor(drawn, dtype=torch.float64)
    index = (sigma * bins).long().clamp(0, bins - 1)
    counts = torch.bincount(index, minlength=bins).double()
    weights = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, loss_weight(config, sigma))
    return (counts / num_draws).tolist(), (weights / counts.clamp(min=1)).tolist()


def text_bars(shares: Sequence[float], weights: Sequence[float], *, width: int = 50) -> str:
    """One line per bin: its timesteps, a bar for its share of the draws, and the weight of the loss there."""
    top = max(shares)
    span = 1000 / len(shares)
    return "\n".join(
        f"{round(i * span):4d}-{round((i + 1) * span):4d}  {share:7.2%}  weight {weight:8.3f}  "
        + "#" * round(width * share / top)
        for i, (share, weight) in enumerate(zip(shares, weights, strict=True))
    )


def save_bars_image(path: Path, shares: Sequence[float], weights: Sequence[float]) -> None:
    """Save bar charts as a PNG file: shares of the draws above, loss weights below, over timesteps 0 to 1000.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # imported late: training does not need it

    # A figure of its own, without pyplot: it draws with Agg, needs no display and keeps no global state.
    figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
    span = 1000 / len(shares)
    for row, (title, values) in enumerate((("share of draws", shares), ("loss weight", weights)), start=1):
        axes = figure.add_subplot(2, 1, row)
        left_edges = [number * span for number in range(len(values))]
        axes.bar(left_edges, values, width=0.9 * span, align="edge", color="#466ebe")
        axes.set_title(f"{title}, highest {max(values):.4g}", loc="left", fontsize=10)
        axes.set_xlim(0, 1000)
        axes.set_xlabel("timestep")
    with atomic_writer(path) as stream:
        figure.savefig(stream, format="png")


def show_timesteps(config: ShowTimestepsConfig) -> None:
    """Draw many sigmas as training does, and show their distribution and loss weights."""
    for note in config.notes:
        log.info("%s", note)
    warning = rarity_warning(config.timesteps, [_SHOWN_SIZE])
    if warning is not None:
        log.warning("%s", warning)
    shares, weights = histogram(config.timesteps)
    if config.show_timesteps == "console":
        print_report(text_bars(shares, weights))
        return
    with disk_errors(config.image_path, "run the command again"):
        save_bars_image(config.image_path, shares, weights)
    print_report(str(config.image_path))
