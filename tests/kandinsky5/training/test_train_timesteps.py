"""Noise levels against closed forms: quantiles, moments, limits and weights."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from PIL import Image

from kandinsky5.configs.train import TIMESTEP_SAMPLINGS, TimestepConfig, mode_scale
from kandinsky5.training.loss.timesteps import (
    MAX_REDRAWS,
    RARE_SHARE,
    draw_sigma,
    draw_sigmas,
    loss_weight,
    rarity_warning,
    shift_sigma,
    sigma_at,
    size_shift,
)
from kandinsky5_train_network import main
from modules.errors import ConfigError
from modules.seeding import generator_for
from tests.kandinsky5.training.training_runs import SMALLER

pytestmark = pytest.mark.fast

SIZE = (64, 96)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("u", [0.01, 0.3, 0.5, 0.9])
def test_every_mode_has_its_formula_at_every_quantile(u: float) -> None:
    z = NormalDist().inv_cdf(u)
    tokens = 32 * 48
    flux = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    qwen = math.exp(0.5 + (0.9 - 0.5) * (tokens - 256) / (8192 - 256))
    expected = {
        "uniform": u,
        "sigma": u,
        "sigmoid": logistic(1.5 * z),
        "shift": 5 * logistic(1.5 * z) / (1 + 4 * logistic(1.5 * z)),
        "flux_shift": shift_sigma(logistic(1.5 * z), flux),
        "qwen_shift": shift_sigma(logistic(1.5 * z), qwen),
        "logsnr": logistic(-(-6 + 2 * z) / 2),
    }
    for mode, value in expected.items():
        config = TimestepConfig(
            timestep_sampling=mode, discrete_flow_shift=5.0, sigmoid_scale=1.5, logit_mean=-6.0, logit_std=2.0
        )
        assert sigma_at(config, u, SIZE) == pytest.approx(value, rel=1e-9), mode


def test_size_dependent_shifts_take_their_end_points() -> None:
    assert size_shift("flux_shift", (32, 32)) == pytest.approx(math.exp(0.5))
    assert size_shift("flux_shift", (128, 128)) == pytest.approx(math.exp(1.15))
    assert size_shift("krea2_shift", (160, 160)) == pytest.approx(math.exp(1.15))
    assert size_shift("flux2_shift", (64, 64)) == pytest.approx(math.exp(1.15))


def test_mixtures_take_their_parts_by_share() -> None:
    config = TimestepConfig(timestep_sampling="qinglong_flux")
    low_noise = sigma_at(TimestepConfig(timestep_sampling="logsnr", logit_mean=5.36), 0.5, SIZE)
    assert sigma_at(config, 0.5, SIZE, branch=0.95) == pytest.approx(low_noise)
    assert sigma_at(config, 0.5, SIZE, branch=0.85) == 0.5
    flux = TimestepConfig(timestep_sampling="flux_shift")
    assert sigma_at(config, 0.5, SIZE, branch=0.78) == sigma_at(flux, 0.5, SIZE)


@pytest.mark.parametrize("mode", TIMESTEP_SAMPLINGS)
def test_limits_hold_in_every_mode(mode: str) -> None:
    for keep_shape in (False, True):
        config = TimestepConfig(
            timestep_sampling=mode,
            min_timestep=500,
            max_timestep=900,
            preserve_distribution_shape=keep_shape,
            discrete_flow_shift=3.0,
        )
        generator = generator_for(1, mode)
        drawn = [draw_sigma(config, generator, SIZE) for _ in range(50)]
        assert min(drawn) >= 0.5
        assert max(drawn) <= 0.9


def test_min_500_max_1000_means_the_noisy_half() -> None:
    config = TimestepConfig(min_timestep=500)
    generator = generator_for(2)
    drawn = torch.tensor([draw_sigma(config, generator, SIZE) for _ in range(2000)])
    assert drawn.mean().item() == pytest.approx(0.75, abs=0.01)


def test_a_draw_depends_on_seed_step_and_item_alone() -> None:
    config = TimestepConfig(timestep_sampling="shift", discrete_flow_shift=5.0)
    together = draw_sigmas(config, 7, 3, ["a", "b"], SIZE)
    torch.rand(5)
    assert draw_sigmas(config, 7, 3, ["b"], SIZE)[0] == together[1]
    assert draw_sigmas(config, 7, 4, ["b"], SIZE)[0] != together[1]
    assert draw_sigmas(config, 8, 3, ["b"], SIZE)[0] != together[1]


def test_quantiles_of_the_pool_replace_the_draw() -> None:
    drawn = draw_sigmas(TimestepConfig(timestep_sampling="uniform"), 0, 0, ["a", "b"], SIZE, (0.25, 0.75))
    assert drawn.tolist() == [0.25, 0.75]


def test_densities_of_sigma_mode() -> None:
    normal = TimestepConfig(weighting_scheme="logit_normal", logit_mean=0.5, logit_std=0.7)
    assert sigma_at(normal, 0.2, SIZE) == pytest.approx(logistic(0.5 + 0.7 * NormalDist().inv_cdf(0.2)))
    mode = TimestepConfig(weighting_scheme="mode")
    expected = 1 - 0.3 - 1.29 * (math.cos(math.pi * 0.15) ** 2 - 1 + 0.3)
    assert sigma_at(mode, 0.3, SIZE) == pytest.approx(expected)


def test_weights_of_the_loss() -> None:
    sigma = torch.tensor([0.25, 0.5, 1.0])
    assert loss_weight(TimestepConfig(weighting_scheme="sigma_sqrt"), sigma).tolist() == [16.0, 4.0, 1.0]
    cosmap = loss_weight(TimestepConfig(weighting_scheme="cosmap"), sigma)
    torch.testing.assert_close(cosmap, 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)))
    for scheme in ("none", "mode", "logit_normal"):
        assert loss_weight(TimestepConfig(weighting_scheme=scheme), sigma).tolist() == [1.0, 1.0, 1.0]


def test_limits_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="--min_timestep must be below --max_timestep"):
        TimestepConfig(min_timestep=900, max_timestep=100)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 2 / (math.pi - 2)])
def test_every_allowed_mode_scale_gives_a_distribution_over_all_levels(scale: float) -> None:
    config = TimestepConfig(weighting_scheme="mode", mode_scale=scale)
    levels = [sigma_at(config, u / 1000, SIZE) for u in range(1001)]
    assert levels == sorted(levels, reverse=True)
    assert (levels[0], levels[-1]) == (pytest.approx(1.0, abs=1e-6), pytest.approx(0.0, abs=1e-6))


@pytest.mark.parametrize("scale", [-3.0, 2.0, math.nan])
def test_a_mode_scale_that_gives_no_distribution_is_refused(scale: float) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"must lie within"):
        mode_scale(str(scale))


def test_limits_that_hardly_any_draw_falls_into_are_warned_of() -> None:
    far = TimestepConfig(
        timestep_sampling="logsnr", logit_mean=40.0, min_timestep=900, preserve_distribution_shape=True
    )
    assert "0.00% of the draws lie within 900 .. 1000" in (rarity_warning(far, [SIZE]) or "")
    near = TimestepConfig(timestep_sampling="logsnr", min_timestep=900, preserve_distribution_shape=True)
    assert rarity_warning(near, [SIZE]) is not None
    assert rarity_warning(replace(near, min_timestep=500), [SIZE]) is None
    assert rarity_warning(replace(far, preserve_distribution_shape=False), [SIZE]) is None


def test_a_distribution_that_gets_no_warning_is_redrawn_to_its_end() -> None:
    """At the share where the warning ends, fewer than one in 10^8 draws miss every time."""
    assert (1 - RARE_SHARE) ** MAX_REDRAWS < 2e-9


def test_the_picture_of_the_timesteps_is_a_whole_file(tmp_path: Path) -> None:
    words = ("--show_timesteps", "image", "--output_dir", tmp_path / "new")
    main([str(word) for word in words])
    (path,) = (tmp_path / "new").iterdir()
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(maxcolors=2**20) or ()) > 10


def test_a_run_gives_the_warning_before_a_model_is_loaded(
    dit: Path, dataset: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    places = ("--task", "k5-tiny-t2v", "--dit", dit, "--dataset_config", dataset, "--output_dir", tmp_path)
    words = ("--timestep_sampling", "logsnr", "--logit_mean", 40, "--min_timestep", 900, "--seed", 1)
    ends = ("--preserve_distribution_shape", "--output_name", "lora", "--dry_run", *SMALLER)
    main([str(word) for word in (*places, *words, *ends)])
    assert "--preserve_distribution_shape: 0.00% of the draws lie within 900 .. 1000" in said.text
