"""A generation is planned request by request, without loading or writing anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kandinsky5.cli.generate import parse_generate
from kandinsky5.configs.generate import GenerateConfig
from kandinsky5.generation.models import ModelLoader
from kandinsky5.generation.plan import GenerationPlanner
from kandinsky5.memory.activations import BatchShape, make_inputs
from kandinsky5.memory.bases import suitable_base
from kandinsky5.memory.budget import choose, with_reserve
from kandinsky5.model.conditioning import VelocityModel
from kandinsky5.model.modulation_table import ModulationTable
from kandinsky5.sampling.requests import VideoRequest
from kandinsky5.tasks import PRO_PARAMS
from modules.byte_sizes import GIB
from modules.errors import ConfigError
from modules.live_bytes import LiveBytes
from tests.kandinsky5.generation.generation_kit import Generate, refused
from tests.sparse_models import write_sparse_dit, write_sparse_vae

CPU = torch.device("cpu")


def request(width: int, height: int, num_frames: int) -> VideoRequest:
    return VideoRequest(
        prompt="a cat",
        negative_prompt="",
        width=width,
        height=height,
        num_frames=num_frames,
        steps=2,
        guidance=5.0,
        scheduler_scale=5.0,
        seed=0,
    )


def test_a_dry_run_prints_every_prompt_and_writes_nothing(
    script: Generate, no_models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog --f 1 --g 1\n", encoding="utf-8")
    # Planning puts the DiT together without data; `no_models` would object to any other loading.
    before = sorted(tmp_path.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelLoader, "dit", LOAD_DIT)
        script("--from_file", prompts, "--output", tmp_path / "out", "--dry_run")
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    (passes,) = (row.index("passes") for row in rows if "decoding" in row and "tokens" in row)
    found = {row[0]: row[passes] for row in rows if row and row[0].startswith("32x48x")}
    assert found == {"32x48x5": "4", "32x48x1": "2"}  # two steps, with two passes each for the first
    assert "predicted peak" in printed
    assert sorted(tmp_path.rglob("*")) == before


LOAD_DIT = ModelLoader.dit


def test_only_prompts_can_be_planned(script: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(script, 2, capsys, "--interactive", "--output", "out", "--dry_run")
    assert "--dry_run plans for --prompt or --from_file" in message


def tiny_config(models: dict[str, Path], *words: str) -> GenerateConfig:
    paths = [str(word) for pair in models.items() for word in pair]
    return parse_generate(["--task", "k5-tiny-t2v", *paths, "--prompt", "x", "--output", "x.mp4", *words])


def test_planned_sampling_and_decoding_are_those_of_real_runs(models: dict[str, Path]) -> None:
    config = tiny_config(models)
    wanted = request(64, 96, 9)
    plan = GenerationPlanner(config, (), CPU).plan(config.dit, wanted)
    loader = ModelLoader(config, (), CPU, None)
    dit, task = loader.dit().dit, config.task
    _, frames, height, width = wanted.latent_shape
    batch = BatchShape(
        clips=1,
        latent_frames=frames,
        latent_height=height,
        latent_width=width,
        text_tokens=task.qwen_max_length,
    )
    with torch.no_grad(), LiveBytes() as sampling:
        inputs = make_inputs(dit, task, batch)
        kept = [VelocityModel(dit, task.scale_factor)(*inputs) for _ in range(2)]
        del kept
    assert plan.usage.device["activations"] == pytest.approx(sampling.peak, rel=0.03)
    assert plan.passes == 4
    pooled = torch.zeros(1, task.dit_params.in_text_dim2)
    with torch.no_grad():
        table = ModulationTable(dit, torch.ones(wanted.steps), [pooled, pooled], CPU)
    assert plan.usage.pageable["modulation of all passes"] == table.nbytes
    vae = loader.vae()
    assert plan.decoding.device["VAE"] == vae.weight_bytes
    with LiveBytes() as decoding:
        for _ in vae.decode_windows(torch.zeros(1, 16, frames, height, width)):
            pass
    assert plan.decoding.device["decoding"] == pytest.approx(decoding.peak, rel=0.05)


def test_tiles_and_magcache_show_in_the_plan(models: dict[str, Path]) -> None:
    wanted = request(256, 256, 5)
    ratios = ("--magcache", "--magcache_mag_ratios", "1", "1")
    plans = []
    for words in ((), ("--vae_spatial_tile_sample_min_size", "64"), ratios):
        config = tiny_config(models, *words)
        plans.append(GenerationPlanner(config, (), CPU).plan(config.dit, wanted))
    whole, tiled, cached = plans
    assert tiled.decoding.device["decoding"] < 0.5 * whole.decoding.device["decoding"]
    added = cached.usage.device["activations"] - whole.usage.device["activations"]
    assert added >= whole.video_tokens * 128 * 4  # at least one pass's residual beside the peak


@pytest.mark.slow
def test_the_budget_of_a_generation_quantises_before_it_swaps(tmp_path: Path) -> None:
    dit = write_sparse_dit(tmp_path / "pro.safetensors", PRO_PARAMS)
    vae = write_sparse_vae(tmp_path / "vae.safetensors")
    words = ["--dit", str(dit), "--vae", str(vae), "--prompt", "x", "--output", "x.mp4"]
    config = parse_generate([*words, "--dtype", "bfloat16"])
    planner = GenerationPlanner(config, (), torch.device("cuda"))
    wanted = request(512, 512, 17)
    assert choose(planner, wanted, 48 * GIB, suitable_base(None)).added == ()
    assert choose(planner, wanted, 24 * GIB, suitable_base(None)).added == ("--fp8_base",)
    chosen = choose(planner, wanted, 12 * GIB, suitable_base(None)).options
    assert chosen.fp8_base
    assert chosen.blocks_to_swap > 0
    assert with_reserve(planner.plan(chosen, wanted).peak) <= 12 * GIB
    with pytest.raises(ConfigError, match=r"the least it needs is \d+\.\d GiB"):
        choose(planner, wanted, GIB, suitable_base(None))
