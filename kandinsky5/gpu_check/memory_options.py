"""Which memory options training needs on a card, by the memory plan alone."""

from __future__ import annotations

import torch

from dataset.geometry import PIXELS_PER_LATENT, latent_frame_count
from kandinsky5.cli.train import parse_train
from kandinsky5.configs.train import TrainConfig
from kandinsky5.memory.activations import META, BatchShape
from kandinsky5.memory.bases import suitable_base
from kandinsky5.memory.budget import choose, with_reserve
from kandinsky5.memory.plan import TrainingPlanner
from kandinsky5.model.drawn_weights import DrawnWeights
from modules.byte_sizes import size_text
from modules.errors import ConfigError

LORA_OPTIONS = ("--network_dim", "32", "--network_alpha", "32", "--optimizer_type", "AdamW8bit", "--sdpa")
"""What the table is for, beside one clip per batch."""
MODELS = (("Pro", "k5-pro-t2v-5s-sd"), ("Lite", "k5-lite-t2v-5s-sd"))
CLIPS = ((17, 512, 512), (121, 512, 768))
"""Frames, height, width in pixels."""


def memory_options(memory: int, capability: tuple[int, int]) -> list[tuple[str, ...]]:
    """What `--vram_budget` would add on a card of so many bytes, for both models and two sizes of clips."""
    base = suitable_base(capability)
    rows = []
    for name, task in MODELS:
        config = parse_train([
            *("--task", task, *LORA_OPTIONS, "--dit", "none", "--dataset_config", "none"),
            *("--output_dir", "none", "--output_name", "none"),
        ])
        assert isinstance(config, TrainConfig)
        source = DrawnWeights(config.model.dit_params, META)
        planner = TrainingPlanner(config, torch.device("cuda"), torch.bfloat16, source=source)
        for frames, height, width in CLIPS:
            batch = BatchShape(
                clips=1,
                latent_frames=latent_frame_count(frames),
                latent_height=height // PIXELS_PER_LATENT,
                latent_width=width // PIXELS_PER_LATENT,
                text_tokens=planner.text_tokens,
            )
            rows.append((name, batch.size, *_fitting(planner, batch, memory, base)))
    return rows


def _fitting(
    planner: TrainingPlanner, batch: BatchShape, memory: int, base: tuple[str, ...]
) -> tuple[str, str, str]:
    """(options, device memory with reserve, host memory)."""
    try:
        choice = choose(planner, batch, memory, base)
    except ConfigError as error:
        least = error.problems[0].partition("; ")[2].partition(".\n")[0]
        return f"does not fit: {least}", "", ""
    added = " ".join(choice.added) or "nothing"
    return added, size_text(with_reserve(choice.plan.peak)), size_text(choice.plan.usage.host_bytes)
