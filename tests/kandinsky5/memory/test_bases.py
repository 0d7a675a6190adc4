"""Which base --vram_budget takes on which card, and what a resumed run keeps."""

from __future__ import annotations

import pytest
import torch

from kandinsky5.cli.train import parse_train
from kandinsky5.configs.train import ModelConfig, TrainConfig
from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.memory import bases, budget
from kandinsky5.memory.activations import BatchShape
from kandinsky5.memory.bases import base_for, describe_error, suitable_base, with_base, with_base_of
from kandinsky5.memory.budget import choose
from kandinsky5.memory.plan import MemoryPlan, MemoryUsage, TrainingPlanner
from modules.byte_sizes import GIB
from modules.errors import ConfigError, ResourceError

CUDA = torch.device("cuda")
FP8, INT8 = ("fp8_base",), ("int8_base", "int8_fast")
BATCH = BatchShape(clips=1, latent_frames=5, latent_height=64, latent_width=64, text_tokens=256)


@pytest.mark.parametrize(
    ("capability", "base"),
    [
        (None, FP8),
        ((7, 0), FP8),  # Volta has neither
        ((7, 5), INT8),  # RTX 2080
        ((8, 0), INT8),  # A100
        ((8, 6), INT8),  # RTX 3090
        ((8, 9), FP8),  # RTX 4090
        ((9, 0), FP8),
        ((12, 0), FP8),
    ],
)
def test_the_base_follows_from_the_card(capability: tuple[int, int] | None, base: tuple[str, ...]) -> None:
    assert suitable_base(capability) == base
    assert with_base(WeightsConfig(), base).rotates_weights is (base == INT8)


def test_products_are_tried_before_they_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(bases.log, "warning", lambda text, *given: said.append(text % given))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr("modules.int8.check_int8_matmul", lambda _: None)
    assert base_for(CUDA) == INT8
    assert base_for(torch.device("cpu")) == FP8

    def fail(_: torch.device) -> None:
        raise ResourceError("--int8_fast cannot be used here: tried")

    monkeypatch.setattr("modules.int8.check_int8_matmul", fail)
    assert base_for(CUDA) == ("int8_base",)
    assert said == ["--int8_fast is not chosen for this card: --int8_fast cannot be used here: tried"]


def test_four_bits_are_tried_before_they_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(bases.log, "warning", lambda text, *given: said.append(text % given))
    monkeypatch.setattr(bases, "has_nf4", lambda: True)
    assert bases.last_resort(CUDA) == ("nf4_base",)  # planned on a machine without the card
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def fail(_: torch.device) -> None:
        raise ResourceError("no kernels")

    monkeypatch.setattr(bases, "check_nf4", fail)
    assert bases.last_resort(CUDA) is None
    assert said == ["--nf4_base is not chosen for this card: no kernels"]
    monkeypatch.setattr(bases, "has_nf4", lambda: False)
    assert bases.last_resort(CUDA) is None


def test_the_base_of_an_earlier_part_stays() -> None:
    plain = WeightsConfig()
    assert with_base_of(plain, {"fp8_base": True}) == WeightsConfig(fp8_base=True)
    assert with_base_of(plain, {"int8_base": True, "int8_fast": True}) == with_base(plain, INT8)
    assert with_base_of(plain, {"fp8_base": False}) == plain
    given = WeightsConfig(nf4_base=True)
    assert with_base_of(given, {"fp8_base": True}) == given


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), ""),
        (FP8, "weights in float8 move a layer's output by about 2.7 %"),
        (INT8, "weights in int8, rotated move a layer's output by about 1.2 %"),
        (("int8_base",), "weights in int8 move a layer's output by about 0.9 %"),
        (("nf4_base",), "weights in nf4 move a layer's output by about 9 %"),
    ],
)
def test_the_error_of_a_base_is_named(names: tuple[str, ...], words: str) -> None:
    assert describe_error(with_base(WeightsConfig(), names)) == words


class Planned(TrainingPlanner):
    """Weights alone: 40 GiB as they are, 20 in 8 bits and 10 in 4; swapping takes half of them away."""

    def plan(self, options: ModelConfig, job: BatchShape) -> MemoryPlan:
        size = 40 if not options.is_quantised else 10 if options.nf4_base else 20
        size = size / 2 if options.blocks_to_swap else size
        return MemoryPlan(
            shape=job, usage=MemoryUsage(device={"all": int(size * GIB)}), flops=0, video_tokens=1
        )

    def advice(self, plan: MemoryPlan) -> str:
        return ""


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> Planned:
    monkeypatch.setattr(budget, "last_resort", lambda _: ("nf4_base",))  # importing bitsandbytes is slow
    words = ["--task", "k5-tiny-t2v", "--dit", "x", "--dataset_config", "x", "--output_dir", "x"]
    config = parse_train([*words, "--output_name", "x"])
    assert isinstance(config, TrainConfig)
    return Planned(config, CUDA, torch.bfloat16)


@pytest.mark.parametrize("base", [FP8, INT8])
def test_four_bits_come_after_swapping_eight(planner: Planned, base: tuple[str, ...]) -> None:
    words = tuple(f"--{name}" for name in base)
    checkpointed = "--gradient_checkpointing"
    assert choose(planner, BATCH, 48 * GIB, base).added == ()
    assert choose(planner, BATCH, 24 * GIB, base).added == words
    assert choose(planner, BATCH, 12 * GIB, base).added == (*words, checkpointed, "--blocks_to_swap 1")
    tight = choose(planner, BATCH, int(10.9 * GIB), base).added
    assert tight == ("--nf4_base", checkpointed, "--blocks_to_swap 1")


def test_four_bits_are_left_out_without_bitsandbytes(
    planner: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "last_resort", lambda _: None)
    with pytest.raises(ConfigError, match=r"does not fit; the least it needs is 11\.0 GiB"):
        choose(planner, BATCH, 8 * GIB, FP8)
