"""What a LoRA changes in a generated clip, with float8 weights against without, and at several strengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kandinsky5.checkpoints import build_meta_dit
from kandinsky5.tasks import TINY_PARAMS
from modules.tensor_files import write_tensors
from networks.lora_kandinsky import is_target_name, linear_layer_sizes
from tests.kandinsky5.generation_kit import Generate, latents_of

pytestmark = pytest.mark.usefixtures("one_thread")

STRENGTH = 0.1
"""Of lora_B: the LoRA then changes the latents by about a fifth."""


@pytest.fixture
def whole_lora(tmp_path: Path) -> Path:
    """A LoRA on every layer that training would give one."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for layer, (rows, columns) in linear_layer_sizes(build_meta_dit(TINY_PARAMS, torch.float32)).items():
        if is_target_name(layer):
            down = torch.randn(4, columns, generator=generator) * columns**-0.5
            up = torch.randn(rows, 4, generator=generator) * STRENGTH
            tensors |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    write_tensors(tmp_path / "whole.safetensors", tensors)
    return tmp_path / "whole.safetensors"


def sample(run: Generate, folder: Path, *words: object) -> Tensor:
    options = ("--prompt", "x", "--steps", 3, "--overwrite", "--output_type", "latent")
    run(*options, *words, "--output", "sample.safetensors")
    return latents_of(folder / "sample.safetensors")


@pytest.mark.parametrize(
    ("mode", "most_noise"),
    # Merged, base and sum are each rounded to float8 once, differently: noise of the size of float8's own
    # error, which no direction prefers. Beside the weights, the LoRA itself is not rounded at all.
    [("merge", 0.25), ("runtime", 0.08)],
)
def test_under_fp8_a_lora_makes_the_same_change_within_a_few_per_cent(
    run: Generate, tmp_path: Path, whole_lora: Path, mode: str, most_noise: float
) -> None:
    lora = ("--lora_mode", mode, "--lora_weight", whole_lora)
    change = sample(run, tmp_path, *lora) - sample(run, tmp_path)
    fp8_change = sample(run, tmp_path, "--fp8_base", *lora) - sample(run, tmp_path, "--fp8_base")
    size = float(fp8_change.norm() / change.norm())
    share = float((fp8_change * change).sum() / change.square().sum())
    noise = float((fp8_change - change).norm() / change.norm())
    assert size == pytest.approx(1, abs=0.05)
    assert share == pytest.approx(1, abs=0.05)
    assert noise < most_noise


@pytest.mark.parametrize("mode", ["merge", "runtime"])
@pytest.mark.parametrize("fp8", [(), ("--fp8_base",)], ids=["plain", "fp8"])
def test_the_multiplier_goes_from_nothing_to_everything(
    run: Generate, tmp_path: Path, whole_lora: Path, fp8: tuple[str, ...], mode: str
) -> None:
    base = sample(run, tmp_path, *fp8)
    none, half, whole = (
        sample(run, tmp_path, *fp8, "--lora_mode", mode, "--lora_weight", whole_lora, "--lora_multiplier", m)
        for m in (0, 0.5, 1)
    )
    assert torch.equal(none, base)
    assert float((half - base).norm() / (whole - base).norm()) == pytest.approx(0.5, abs=0.05)
