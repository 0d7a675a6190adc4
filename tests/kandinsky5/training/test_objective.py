"""What the loss is made of: masks weigh it, and the prior term holds the LoRA to the base model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dataset.cache.cached_dataset import CachedBatch
from dataset.cache.files import TextCache
from kandinsky5.configs.train import ConditioningConfig, LossConfig, TimestepConfig
from kandinsky5.model.conditioning import VelocityModel
from kandinsky5.model.flow_matching import mean_squared_error
from kandinsky5.training.loss.objective import NoiseDraw, Objective
from kandinsky5.training.loss.prior import PriorPreservation, passes
from networks.lora import LoRANetwork
from networks.lora_kandinsky import create_network
from tests.tiny import tiny_dit

pytestmark = pytest.mark.fast

BLOCKS = {"num_text_blocks": 1, "num_visual_blocks": 1}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_batch(clips: int = 2, frames: int = 3) -> CachedBatch:
    return CachedBatch(
        latents=random(clips, 16, frames, 4, 4),
        latents_image=random(clips, 16, 2, 4, 4, seed=1),
        text_embeds=tuple(random(3 + number, 64, seed=2 + number).bfloat16() for number in range(clips)),
        pooled_embed=random(clips, 32, seed=9),
        item_keys=tuple(f"clip {number}" for number in range(clips)),
        contents=("video",) * clips,
        num_frames=(4 * frames - 3,) * clips,
        dataset_index=0,
        timestep_quantiles=None,
    )


def make_objective(*, is_i2v: bool = False, mask_min_weight: float = 0.0) -> tuple[Objective, LoRANetwork]:
    dit = tiny_dit(**BLOCKS)
    network = create_network(
        dit, network_dim=4, network_alpha=4, network_dropout=None, network_args={}, seed=1
    )
    network.train()
    objective = Objective(
        VelocityModel(dit, (1.0, 2.0, 2.0), None, network),
        TimestepConfig(timestep_sampling="shift", discrete_flow_shift=5.0),
        ConditioningConfig(),
        is_i2v,
        3,
        torch.device("cpu"),
        LossConfig(masked_loss=True, mask_min_weight=mask_min_weight),
    )
    return objective, network


def stir(network: LoRANetwork) -> None:
    """Give the LoRA an effect."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(network.named_parameters()):
            if "lora_up" in name:
                parameter += 0.1 * random(*parameter.shape, seed=number)


def gradients(network: LoRANetwork, losses: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    losses.sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_i2v", [False, True])
def test_a_white_mask_changes_no_bit_of_losses_and_gradients(is_i2v: bool) -> None:
    objective, network = make_objective(is_i2v=is_i2v, mask_min_weight=0.3)
    batch = make_batch()
    draws = objective.draw(batch, 5)
    plain = objective.training_losses(batch, draws)
    plain_gradients = gradients(network, plain)
    masked = objective.training_losses(replace(batch, loss_mask=torch.ones(2, 3, 4, 4)), draws)
    masked_gradients = gradients(network, masked)
    assert torch.equal(plain, masked)
    assert all(torch.equal(plain_gradients[name], value) for name, value in masked_gradients.items())


@pytest.mark.parametrize("frames", [None, torch.tensor([[False, True, True], [True, True, False]])])
def test_the_masked_loss_is_the_weighted_mean_over_the_frames_that_count(frames: Tensor | None) -> None:
    predicted, target = random(2, 16, 3, 4, 4).double(), random(2, 16, 3, 4, 4, seed=1).double()
    weights = random(2, 3, 4, 4, seed=2).abs()
    counted = weights.double()
    if frames is not None:
        counted = counted * frames[:, :, None, None]
    error = (predicted - target).square().mean(dim=1)  # over channels
    expected = (error * counted).sum(dim=(1, 2, 3)) / counted.sum(dim=(1, 2, 3))
    found = mean_squared_error(predicted.float(), target.float(), frames, weights)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_black_positions_teach_nothing_unless_they_count_a_minimum() -> None:
    batch = replace(make_batch(), loss_mask=torch.zeros(2, 3, 4, 4))
    objective, network = make_objective()
    losses = objective.training_losses(batch, objective.draw(batch, 0))
    assert losses.tolist() == [0, 0]
    assert not any(value.any() for value in gradients(network, losses).values())
    # A black mask with a minimum weighs all the same: it is no mask.
    objective, _ = make_objective(mask_min_weight=0.25)
    draws = objective.draw(batch, 0)
    torch.testing.assert_close(
        objective.training_losses(batch, draws),
        objective.training_losses(replace(batch, loss_mask=None), draws),
    )
    half = torch.zeros(2, 3, 4, 4)
    half[:, :, :2] = 1
    masked = objective.training_losses(replace(batch, loss_mask=half), draws)
    by_hand = objective.losses(batch, draws.noise, draws.sigma, draws.use, half.clamp_min(0.25))
    assert torch.equal(masked, by_hand * objective.sigma_weight(draws.sigma))


def with_prior(batch: CachedBatch, seed: int = 20) -> CachedBatch:
    caption = TextCache(text_embeds=random(2, 64, seed=seed).bfloat16(), pooled_embed=random(32, seed=seed))
    return replace(batch, prior_text=caption)


def on_prior_caption(batch: CachedBatch) -> CachedBatch:
    """The same clips with the prior's caption as their own."""
    assert batch.prior_text is not None
    count = len(batch.item_keys)
    pooled = batch.prior_text.pooled_embed.repeat(count, 1)
    return replace(batch, text_embeds=(batch.prior_text.text_embeds,) * count, pooled_embed=pooled)


@pytest.mark.parametrize("is_i2v", [False, True])
def test_the_prior_term_is_the_squared_difference_from_the_base_model(is_i2v: bool) -> None:
    objective, network = make_objective(is_i2v=is_i2v)
    batch = with_prior(make_batch())
    draws = objective.draw(batch, 5)
    prior = PriorPreservation(objective, network, 0.5)
    assert prior.losses(batch, draws).tolist() == [0, 0]  # a new LoRA is the base model
    stir(network)
    found = prior.losses(batch, draws)

    same = on_prior_caption(batch)
    sigma = draws.sigma[:, None, None, None, None]
    noisy = (1 - sigma) * batch.latents + sigma * draws.noise
    frames = objective.frames(same, draws.use)
    text = objective.text(same)
    predicted = objective.model(noisy, draws.sigma, text, frames)
    with network.disabled():
        target = objective.model(noisy, draws.sigma, text, frames)
    first = 1 if is_i2v else 0  # a frame that is given is not held
    expected = (predicted - target.detach())[:, :, first:].square().mean(dim=(1, 2, 3, 4))
    expected = 0.5 * expected * objective.sigma_weight(draws.sigma)
    torch.testing.assert_close(found, expected)
    assert found.min() > 0
    for name, value in gradients(network, expected).items():
        torch.testing.assert_close(gradients(network, prior.losses(batch, draws))[name], value)


def test_another_caption_gives_another_prior_and_a_marked_dataset_takes_its_own() -> None:
    objective, network = make_objective()
    stir(network)
    prior = PriorPreservation(objective, network, 1.0)
    batch = with_prior(make_batch())
    draws = objective.draw(batch, 5)
    found = prior.losses(batch, draws)
    assert not torch.equal(found, prior.losses(with_prior(batch, seed=21), draws))
    marked = replace(on_prior_caption(batch), prior_text=None, is_prior=True)
    torch.testing.assert_close(prior.losses(marked, draws), found)
    assert [passes(b) for b in (make_batch(), batch, marked)] == [(False,), (False, True), (True,)]


def test_the_base_pass_leaves_the_lora_on_and_in_training_mode() -> None:
    objective, network = make_objective()
    stir(network)
    batch = with_prior(make_batch())
    draws = objective.draw(batch, 5)
    before = objective.training_losses(batch, draws)
    PriorPreservation(objective, network, 1.0).losses(batch, draws)
    assert network.training
    assert torch.equal(objective.training_losses(batch, draws), before)


def test_draws_are_a_pure_function_of_seed_step_and_item() -> None:
    objective, _ = make_objective()
    batch = make_batch()
    other = replace(batch, item_keys=tuple(reversed(batch.item_keys)))
    first, again, swapped = (objective.draw(b, 4) for b in (batch, batch, other))
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in NoiseDraw.__slots__)
    assert torch.equal(first.noise, swapped.noise.flip(0))
    assert not torch.equal(first.noise, objective.draw(batch, 5).noise)
