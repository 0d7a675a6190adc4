"""What a LoRA changes in a generated clip, with float8 weights against without, and at several strengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import kandinsky5.sampling.pipeline as pipeline
from kandinsky5.generation.outputs import read_latents
from kandinsky5.model.checkpoints import build_meta_dit
from kandinsky5.tasks import TINY_PARAMS
from modules.tensor_files import read_tensors, write_tensors
from networks.lora_kandinsky import is_target_name, linear_layer_sizes
from tests.kandinsky5.generation.generation_kit import Generate, latents_of, refused

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


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills up with the texts that are encoded."""
    texts: list[str] = []
    encode = pipeline.TextEncoders.encode
    monkeypatch.setattr(
        pipeline.TextEncoders,
        "encode",
        lambda self, captions, content: texts.extend(captions) or encode(self, captions, content),
    )
    return texts


@pytest.mark.parametrize("usual", [0, 1])
def test_trigger_words_follow_the_strength_that_a_prompt_gives_its_lora(
    run: Generate, tmp_path: Path, lora: Path, seen: list[str], usual: int
) -> None:
    write_tensors(lora, read_tensors(lora)[0], {"trigger": "arcshot"})
    lines = ["plain", "off --m 0", "on --m 1"]
    (tmp_path / "p.txt").write_text("\n".join(lines), encoding="utf-8")
    words = ("--lora_weight", lora, "--lora_multiplier", usual, "--lora_mode", "runtime", "--steps", 1)
    words = (*words, "--from_file", "p.txt", "--output", "out", "--output_type", "latent", "--guidance", 1)
    run(*words)
    assert seen == ["arcshot plain" if usual else "plain", "off", "arcshot on"]
    prompts = [read_latents(path)[1]["prompt"] for path in (tmp_path / "out").iterdir()]
    assert sorted(prompts) == sorted(seen)
    seen.clear()
    run(*words, "--no_lora_trigger")
    assert seen == ["plain", "off", "on"]


@pytest.mark.parametrize(("given", "rest"), [((0.5, 0.25), "0.25"), ((0.5,), "1"), ((), "1")])
def test_a_prompt_with_fewer_multipliers_than_loras_leaves_the_rest_to_the_command_line(
    run: Generate,
    tmp_path: Path,
    lora: Path,
    said: pytest.LogCaptureFixture,
    given: tuple[float, ...],
    rest: str,
) -> None:
    (tmp_path / "p.txt").write_text("x --m 0.5\n", encoding="utf-8")
    words = ("--lora_weight", lora, lora, "--lora_mode", "runtime", "--steps", 1, "--output_type", "latent")
    run(*words, *(("--lora_multiplier", *given) if given else ()), "--from_file", "p.txt", "--output", "out")
    assert f"p.txt line 1: 1 multipliers for 2 LoRAs: the rest are {rest}" in said.text
    run(*words, "--prompt", "x", "--lora_multiplier", 0.5, rest, "--output", "whole.safetensors")
    (made,) = (tmp_path / "out").iterdir()
    assert torch.equal(latents_of(made), latents_of(tmp_path / "whole.safetensors"))


def test_a_multiplier_of_a_prompt_that_no_lora_could_have_is_refused(
    run: Generate, tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("x --m 1e40\n", encoding="utf-8")
    words = ("--lora_weight", lora, "--lora_mode", "runtime", "--from_file", "p.txt", "--output", "out")
    assert "p.txt line 1: --m: must lie within" in refused(run, 2, capsys, *words)
