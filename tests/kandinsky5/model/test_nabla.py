"""NABLA in the model and in training: sparse, reported, bit-exact on resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kandinsky5.model import nabla
from kandinsky5.model.conditioning import TextConditioning, VelocityModel, pad_text
from kandinsky5.tasks import NablaParams
from modules import block_sparse
from modules.flops import FlopCounter
from modules.live_bytes import LiveBytes
from tests.kandinsky5.training.training_runs import lora_bytes, metrics, train, write_dataset, write_dit
from tests.tiny import tiny_dit

SPARSE = NablaParams(P=0.01, wT=1, wH=1, wW=1)


def forward_flops(params: NablaParams | None) -> int:
    dit = tiny_dit(num_text_blocks=1, num_visual_blocks=2)
    caption = TextConditioning(torch.ones(3, 64), torch.ones(32))
    text = pad_text([caption], device="cpu", dtype=torch.float32)
    with FlopCounter() as counter, torch.no_grad():
        VelocityModel(dit, (1.0, 2.0, 2.0), params)(torch.ones(1, 16, 4, 32, 32), torch.tensor([0.5]), text)
    return counter.total


def test_the_model_does_not_compute_what_the_mask_leaves_out() -> None:
    """16 blocks of 64 tokens; a query block keeps hardly more than itself."""
    dense_attention = 2 * 2 * 2 * 1024 * 1024 * 128  # two blocks, two products
    assert forward_flops(None) - forward_flops(SPARSE) > 0.8 * dense_attention


def test_density_and_kernel_are_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(nabla.log, "info", lambda message, *values: messages.append(message % values))
    report = nabla.DensityReport(2)
    for _ in range(2):
        report(torch.ones(1, 2, 4, 4, dtype=torch.bool))
        report(torch.eye(4, dtype=torch.bool)[None, None])
    assert messages == ["NABLA attends to 62.5 % of all block pairs, by gathered blocks in plain torch"]


@pytest.mark.parametrize(
    "params", [NablaParams(P=0.8, wT=1, wH=1, wW=1), NablaParams(method="topk", P=0.3, add_sta=False)]
)
def test_blocks_are_chosen_for_few_heads_at_a_time(
    monkeypatch: pytest.MonkeyPatch, params: NablaParams
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 8 * nabla.BLOCK, 3, 16, generator=generator) for _ in range(2))
    plan = nabla.make_plan((2, 16, 16), params, "cpu")
    together = nabla.select_blocks(query, key, plan)
    monkeypatch.setattr(block_sparse, "SORTED_PAIRS", 1)
    assert torch.equal(nabla.select_blocks(query, key, plan), together)
    assert 0 < together.float().mean() < 1


def test_choosing_the_blocks_of_a_long_clip_takes_less_than_the_clip() -> None:
    """Pro, 241 frames of 768x512: the mask and 23 bytes for each of the pairs that are sorted at a time."""
    query, key = (
        torch.empty(1, 61 * 32 * 48, 32, 128, dtype=torch.bfloat16, device="meta") for _ in range(2)
    )
    plan = nabla.make_plan((61, 32, 48), NablaParams(), "meta")
    with LiveBytes() as counted:
        mask = nabla.select_blocks(query, key, plan)
    assert counted.peak <= mask.nbytes + 24 * block_sparse.SORTED_PAIRS < query.nbytes


def test_a_grid_without_whole_squares_is_an_error() -> None:
    with pytest.raises(ValueError, match="multiples of 128 pixels"):
        nabla.check_geometry((2, 8, 12))


def test_a_training_run_of_twenty_steps_resumes_bit_for_bit(tmp_path: Path) -> None:
    dit = write_dit(tmp_path)
    dataset = write_dataset(tmp_path, ((2, 16, 16, 5), (2, 16, 16, 7), (3, 16, 16, 6)), resolution=128)
    words = ("--nabla_P", 0.6, "--gradient_checkpointing", "--save_state", "--save_every_n_steps", 7)
    train(dit, dataset, tmp_path / "whole", *words, "--max_train_steps", 20, task="k5-tiny-nabla")
    state = tmp_path / "whole" / "lora-step00000007-state"
    train(
        *(dit, dataset, tmp_path / "again", *words, "--max_train_steps", 20, "--resume", state),
        task="k5-tiny-nabla",
    )
    assert lora_bytes(tmp_path / "again/lora.safetensors") == lora_bytes(tmp_path / "whole/lora.safetensors")
    losses = [[r["loss"] for r in metrics(tmp_path / name, "step")] for name in ("whole", "again")]
    assert losses[0][7:] == losses[1]
