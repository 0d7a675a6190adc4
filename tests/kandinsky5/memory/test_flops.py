"""Operations are counted by a run on the meta device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from kandinsky5.memory.activations import (
    META,
    BatchShape,
    make_inputs,
    sampling_activations,
    step_activations,
)
from kandinsky5.model.checkpoints import build_meta_dit
from kandinsky5.model.conditioning import VelocityModel
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.tasks import LITE_PARAMS, PRO_PARAMS, TASKS, TINY_PARAMS, DitParams
from modules.flops import FlopCounter
from modules.fp8 import Fp8Linear
from modules.int8 import Int8Linear
from modules.quantised_linear import QuantisedLinear
from networks.lora_kandinsky import create_network

TASK = TASKS["k5-tiny-t2v"]
SHAPE = BatchShape(clips=2, latent_frames=3, latent_height=8, latent_width=12, text_tokens=11)


def meta_dit(params: DitParams) -> DiffusionTransformer3D:
    dit = build_meta_dit(params, torch.bfloat16)
    dit.reset_buffers(META)
    return dit


def velocity(dit: DiffusionTransformer3D) -> VelocityModel:
    return VelocityModel(dit, (1.0, 2.0, 2.0))


def test_two_and_three_blocks_give_the_count_of_all_passes() -> None:
    dit = meta_dit(replace(TINY_PARAMS, num_visual_blocks=6))
    with FlopCounter() as counted, torch.no_grad():
        velocity(dit)(*make_inputs(dit, TASK, SHAPE))
    planned = sampling_activations(dit, TASK, SHAPE, velocity=velocity, passes=2)
    assert planned.flops == 2 * counted.total


@pytest.mark.parametrize(("checkpointing", "kept"), [(True, 0), (True, 3), (True, 6), (False, 0)])
def test_two_and_three_blocks_give_the_count_of_a_step(checkpointing: bool, kept: int) -> None:
    dit = meta_dit(replace(TINY_PARAMS, num_visual_blocks=6))
    with META:
        network = create_network(
            dit, network_dim=8, network_alpha=8, network_dropout=None, network_args={}, seed=0
        )
    dit.gradient_checkpointing, dit.kept_attention_blocks = checkpointing, kept
    with FlopCounter() as counted:
        velocity(dit)(*make_inputs(dit, TASK, SHAPE)).sum().backward()
    planned = step_activations(dit, network, TASK, SHAPE, velocity=velocity)
    assert planned.flops == pytest.approx(counted.total, rel=0.001)


@pytest.mark.parametrize(
    ("params", "frames", "height", "width", "expected"),
    [(PRO_PARAMS, 5, 64, 64, 0.173), (LITE_PARAMS, 31, 64, 96, 0.660)],
)
def test_the_published_models_need_what_was_worked_out_by_hand(
    params: DitParams, frames: int, height: int, width: int, expected: float
) -> None:
    shape = BatchShape(
        clips=1, latent_frames=frames, latent_height=height, latent_width=width, text_tokens=256
    )
    planned = sampling_activations(meta_dit(params), TASK, shape, velocity=velocity)
    assert planned.flops / 1e15 == pytest.approx(expected, abs=0.0005)


def test_the_count_of_a_forward_pass_is_that_of_torchs_own_counter() -> None:
    dit = meta_dit(TINY_PARAMS)
    inputs = make_inputs(dit, TASK, SHAPE)
    with FlopCounter() as ours, torch.no_grad():
        velocity(dit)(*inputs)
    # torch's table lacks the fused attention of the CPU, which the meta device takes as well.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as theirs, torch.no_grad():
        velocity(dit)(*inputs)
    assert ours.total == theirs.get_total_flops()


@pytest.mark.parametrize("layer_class", [Fp8Linear, Int8Linear])
@pytest.mark.parametrize("use_fast", [False, True])
def test_a_layer_counts_the_same_whatever_its_weights_and_products(
    layer_class: type[QuantisedLinear], use_fast: bool
) -> None:
    weight8, scale = layer_class.quantise(torch.randn(48, 32))
    layer = layer_class(weight8, scale, None, compute_dtype=torch.bfloat16, use_fast=use_fast)
    assert layer.use_fast == use_fast
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    with FlopCounter() as counted:
        layer(x).sum().backward()
    assert counted.total == 2 * (2 * 64 * 48 * 32)
