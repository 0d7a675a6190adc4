"""Work is counted as the model does it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kandinsky5.memory import roofline
from kandinsky5.memory.activations import META, Batch, make_inputs
from kandinsky5.memory.roofline import CARDS, Work, floor_seconds, forward_work, training_work
from kandinsky5.model.checkpoints import build_meta_dit
from kandinsky5.model.conditioning import VelocityModel
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.tasks import LITE_PARAMS, PRO_PARAMS, TASKS, TINY_PARAMS, DitParams
from networks.lora_kandinsky import create_network
from tests.flops import count_flops
from tests.tiny import tiny_dit

BATCH = Batch(clips=2, latent_frames=3, latent_height=8, latent_width=12, text_tokens=11)
SIZES = {"clips": 2, "video_tokens": 72, "text_tokens": 11}


def test_a_forward_pass_is_counted_to_the_last_operation() -> None:
    dit = tiny_dit().to(META)
    dit.reset_buffers(META)
    with count_flops() as counted, torch.no_grad():
        VelocityModel(dit, (1.0, 2.0, 2.0))(*make_inputs(dit, TASKS["k5-tiny-t2v"], BATCH))
    assert forward_work(TINY_PARAMS, **SIZES).total == counted.get_total_flops()


@pytest.mark.parametrize(("checkpointing", "kept"), [(True, 0), (True, 6), (False, 0)])
def test_a_step_is_counted_within_four_per_cent(checkpointing: bool, kept: int) -> None:
    """The first block has no gradient to hand on, which is left out of account."""
    dit = tiny_dit(num_visual_blocks=6).to(META)
    dit.reset_buffers(META)
    with META:
        network = create_network(
            dit, network_dim=8, network_alpha=8, network_dropout=None, network_args={}, seed=0
        )
    dit.gradient_checkpointing, dit.kept_attention_blocks = checkpointing, kept
    with count_flops() as counted:
        VelocityModel(dit, (1.0, 2.0, 2.0))(*make_inputs(dit, TASKS["k5-tiny-t2v"], BATCH)).sum().backward()
    work = training_work(
        dit.dit_params,
        **SIZES,
        lora_elements={
            path: sum(parameter.numel() for parameter in adapter.parameters())
            for path, adapter in network.adapters.items()
        },
        gradient_checkpointing=checkpointing,
        kept_attention_blocks=kept,
    )
    assert work.total == pytest.approx(counted.get_total_flops(), rel=0.04)


@pytest.mark.parametrize(
    ("params", "tokens", "forward"), [(PRO_PARAMS, 5120, 0.173), (LITE_PARAMS, 47616, 0.660)]
)
def test_the_published_models_need_what_was_worked_out_by_hand(
    params: DitParams, tokens: int, forward: float
) -> None:
    work = forward_work(params, clips=1, video_tokens=tokens, text_tokens=256)
    assert work.total / 1e15 == pytest.approx(forward, abs=0.0005)


def test_sparse_attention_and_float8_products_lower_the_floor() -> None:
    sizes = {"clips": 1, "video_tokens": 47616, "text_tokens": 256}
    dense, sparse = (forward_work(PRO_PARAMS, **sizes, density=density) for density in (1.0, 0.2))
    assert sparse.linear == dense.linear
    assert sparse.other < 0.3 * dense.other
    work = Work(linear=330e12, other=165e12)
    assert floor_seconds(work, CARDS["NVIDIA GeForce RTX 4090"], fp8_products=False) == 3.0
    assert floor_seconds(work, CARDS["NVIDIA GeForce RTX 4090"], fp8_products=True) == 2.0
    ampere = CARDS["NVIDIA GeForce RTX 3090"]
    assert floor_seconds(work, ampere, fp8_products=True) == floor_seconds(work, ampere, fp8_products=False)


def test_the_sizes_of_a_model_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--vram_budget` makes dozens of plans of one model; a model of Pro's size takes a second to build."""
    builds: list[DitParams] = []

    def build(params: DitParams, dtype: torch.dtype) -> DiffusionTransformer3D:
        builds.append(params)
        return build_meta_dit(params, dtype)

    monkeypatch.setattr(roofline, "build_meta_dit", build)
    params = replace(TINY_PARAMS, num_visual_blocks=5)
    for clips in (1, 2):
        for tokens in (72, 96):
            forward_work(params, clips=clips, video_tokens=tokens, text_tokens=11)
            training_work(
                params,
                clips=clips,
                video_tokens=tokens,
                text_tokens=11,
                lora_elements={},
                gradient_checkpointing=True,
            )
    assert len(builds) <= 1
