"""Drawn weights pass through the loading of real ones."""

from __future__ import annotations

import pytest
import torch

from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.model.checkpoints import load_dit
from kandinsky5.model.dit import is_float32_island
from kandinsky5.model.drawn_weights import DrawnWeights
from kandinsky5.tasks import LITE_PARAMS, TINY_PARAMS
from modules.fp8 import Fp8Linear
from modules.int8 import Int8Linear

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("base", ["fp8_base", "int8_base", None])
def test_a_model_is_loaded_and_quantised_from_them_without_a_file(base: str | None) -> None:
    config = WeightsConfig(blocks_to_swap=2, **({} if base is None else {base: True}))
    source = DrawnWeights(TINY_PARAMS, CPU)
    dit = load_dit(source, TINY_PARAMS, config, device=CPU, compute_dtype=torch.bfloat16)
    layer = dit.visual_blocks()[0].self_attention.to_query
    assert isinstance(layer, {"fp8_base": Fp8Linear, "int8_base": Int8Linear, None: torch.nn.Linear}[base])
    latents = torch.randn(1, 2, 8, 8, TINY_PARAMS.in_channels)
    text, pooled = torch.randn(1, 5, TINY_PARAMS.in_text_dim), torch.randn(1, TINY_PARAMS.in_text_dim2)
    velocity = dit(latents, text, pooled, torch.tensor([500.0])).float()
    assert velocity.isfinite().all()
    assert velocity.std() > 0.01


def test_they_are_drawn_on_the_device_one_at_a_time() -> None:
    """Without data nothing could be drawn elsewhere and moved."""
    weights = DrawnWeights(LITE_PARAMS, META)
    for name, info in weights.tensors.items():
        tensor = weights.view(name)
        assert tensor.is_meta
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)
        assert info.dtype == (torch.float32 if is_float32_island(name) else torch.bfloat16)


def test_a_seed_gives_the_same_numbers() -> None:
    one, two, other = (DrawnWeights(TINY_PARAMS, CPU, seed=seed) for seed in (1, 1, 2))
    name = "visual_embeddings.in_layer.weight"
    assert torch.equal(one.read(name), two.read(name))
    assert not torch.equal(one.read(name), other.read(name))
