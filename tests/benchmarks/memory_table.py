"""Computes what Pro needs in memory when its blocks are swapped, from headers alone; nothing is measured.

    python memory_table.py           # Pro with swapped blocks
    python memory_table.py --bases   # Pro and Lite with every base on cards of 12, 16 and 24 GB

Two files are planned, with modulation in bfloat16 and in float32: LoRA steps in bf16 with float8 weights,
gradient checkpointing and AdamW, 17 frames of 512 x 512. "fits" counts the reserve of --vram_budget, and the
host copies as pageable, with what streams through page-locked buffers.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from dataset.geometry import latent_frame_count  # noqa: E402
from kandinsky5.cli.train import parse_train  # noqa: E402
from kandinsky5.configs.train import TrainConfig  # noqa: E402
from kandinsky5.gpu_check.memory_options import CLIPS, LORA_OPTIONS, MODELS  # noqa: E402
from kandinsky5.memory.activations import META, BatchShape  # noqa: E402
from kandinsky5.memory.bases import suitable_base  # noqa: E402
from kandinsky5.memory.budget import choose, with_reserve  # noqa: E402
from kandinsky5.memory.plan import TrainingPlanner  # noqa: E402
from kandinsky5.model import offload  # noqa: E402
from kandinsky5.model.drawn_weights import DrawnWeights  # noqa: E402
from kandinsky5.tasks import PRO_PARAMS  # noqa: E402
from modules.byte_sizes import GIB  # noqa: E402
from modules.errors import ConfigError  # noqa: E402
from tests.sparse_models import write_sparse_dit  # noqa: E402

BATCH = BatchShape(clips=1, latent_frames=5, latent_height=64, latent_width=64, text_tokens=256)
CARDS, HOST, SYSTEM = (12, 16, 24), 32, 4
"""GiB of device memory, of host memory, and what of that the system and the script are taken to need."""


def main() -> None:
    """Print a table."""
    if sys.argv[1:] == ["--bases"]:
        _print_bases()
        return
    offload.available_memory = lambda: 0  # so that nothing is page-locked of its own accord
    print("| modulation in the file | rank | swapped | device, GiB | with reserve | host, GiB | fits with "
          f"{HOST} GiB of host memory |\n|---|---|---|---|---|---|---|")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for code, name in (("BF16", "bf16"), ("F32", "float32")):
            dit = write_sparse_dit(Path(folder) / f"{name}.safetensors", PRO_PARAMS, modulation=code)
            for rank in (16, 32):
                _print_rows(dit, name, rank)


def _print_rows(dit: Path, name: str, rank: int) -> None:
    words = ["--task", "k5-pro-t2v-5s-sd", "--dit", str(dit), "--dataset_config", "x", "--output_dir", "x"]
    words += ["--output_name", "x", "--network_dim", str(rank), "--fp8_base", "--gradient_checkpointing"]
    config = parse_train(words)
    assert isinstance(config, TrainConfig)
    planner = TrainingPlanner(config, torch.device("cuda"), torch.bfloat16)
    for swapped in (0, 20, 50):
        plan = planner.plan(replace(config.model, blocks_to_swap=swapped), BATCH)
        needed, host = with_reserve(plan.peak) / GIB, plan.usage.host_bytes / GIB
        cards = [f"{card} GB" for card in CARDS if needed <= card and host <= HOST - SYSTEM]
        print(f"| {name} | {rank} | {swapped} | {plan.peak / GIB:.2f} | {needed:.2f} | {host:.2f} | "
              f"{', '.join(cards) or 'none of 12, 16, 24 GB'} |")  # fmt: skip


def _print_bases() -> None:
    offload.available_memory = lambda: 0  # so that nothing is page-locked of its own accord
    print(
        "| model, clip | base | card | added | device with reserve, GiB | host, GiB |\n|---|---|---|---|---|---|"
    )
    for name, task in MODELS:
        for base in (suitable_base(None), suitable_base((8, 6)), ("nf4_base",)):
            words = [f"--{option}" for option in base]
            words += ["--task", task, "--dit", "x", "--dataset_config", "x", "--output_dir", "x"]
            config = parse_train([*words, "--output_name", "x", *LORA_OPTIONS])
            assert isinstance(config, TrainConfig)
            source = DrawnWeights(config.model.dit_params, META)
            planner = TrainingPlanner(config, torch.device("cuda"), torch.bfloat16, source=source)
            for frames, height, width in CLIPS:
                batch = BatchShape(
                    clips=1,
                    latent_frames=latent_frame_count(frames),
                    latent_height=height // 8,
                    latent_width=width // 8,
                    text_tokens=256,
                )
                for card in CARDS:
                    row = f"| {name}, {batch.size} | {' '.join(words[: len(base)])} | {card} |"
                    try:
                        choice = choose(planner, batch, card * 2**30, base)
                    except ConfigError as error:
                        print(
                            f"{row} does not fit: {error.problems[0].partition('; ')[2].partition(',')[0]} | | |"
                        )
                        continue
                    needed, host = with_reserve(choice.plan.peak) / GIB, choice.plan.usage.host_bytes / GIB
                    print(
                        f"{row} {' '.join(choice.added) or 'nothing'} | {needed:.2f} | {host:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
