"""The rows of `bench_gpu.py`, the most telling first, each as the words of the training script that it measures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dataset.geometry import PIXELS_PER_LATENT, latent_frame_count
from kandinsky5.cli.train import parse_train
from kandinsky5.configs.train import TrainConfig
from kandinsky5.memory.activations import BatchShape
from kandinsky5.tasks import TASKS

PRO, LITE, PRO_HD = "k5-pro-t2v-5s-sd", "k5-lite-t2v-5s-sd", "k5-pro-t2v-5s-hd"
RANK = 16
CAPS_GIB = {24: 22.5, 16: 14.5, 12: 10.5}
"""What a card of that many GB leaves to a program's tensors, beside its context and a desktop."""

Kind = Literal["step", "forward", "attention", "encode", "decode"]


@dataclass(frozen=True, slots=True)
class Clip:
    """The size of a clip in pixels."""

    frames: int
    height: int
    width: int

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (
            latent_frame_count(self.frames),
            self.height // PIXELS_PER_LATENT,
            self.width // PIXELS_PER_LATENT,
        )


SHORT, SQUARE, LONG, HD = Clip(17, 512, 512), Clip(17, 768, 768), Clip(121, 512, 768), Clip(121, 768, 1280)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One measurement."""

    name: str
    """Begins with the letter of its part."""
    what: str
    kind: Kind = "step"
    """A LoRA step with gradient checkpointing, a forward pass, sparse attention alone, or the VAE."""
    task: str = PRO
    clip: Clip = SHORT
    options: tuple[str, ...] = ()
    """Of the training script."""
    swapped: int = 0
    blocks: int | None = None
    """Visual blocks, where not all of them are built."""
    card: int | None = None
    """GB: the process is held to what such a card leaves, and `--vram_budget` chooses further options."""
    is_pageable: bool = False
    """Weights in host memory are not page-locked."""
    beside: Literal["floor", "dense"] | None = None
    """Timed in turn with it, in the same process."""
    to: str | None = None
    """The earlier case that seconds are compared with."""
    at_most: float | None = None
    """The goal for the ratio."""
    at_most_gib: float | None = None
    rounds: int = 3
    """Runs after the first two."""

    @property
    def part(self) -> str:
        return self.name[0]

    @property
    def is_model(self) -> bool:
        """Whether the DiT is built."""
        return self.kind in {"step", "forward"}

    @property
    def batch(self) -> BatchShape:
        """One clip with the longest caption there is, in a rehearsal with a short one."""
        task = TASKS[self.task]
        frames, height, width = self.clip.latent_shape
        return BatchShape(
            clips=1,
            latent_frames=frames,
            latent_height=height,
            latent_width=width,
            text_tokens=16 if task.is_tiny else task.qwen_max_length,
        )

    def words(self) -> list[str]:
        """The command line of the training script."""
        words = ["--task", self.task, "--network_dim", str(RANK), "--network_alpha", str(RANK), "--sdpa"]
        words += ["--mixed_precision", "bf16", "--gradient_checkpointing", *self.options]
        if self.swapped:
            words += ["--blocks_to_swap", str(self.swapped)]
        if self.blocks:
            words += ["--override_dit", f'{{"num_visual_blocks": {self.blocks}, "num_text_blocks": 1}}']
        return words

    def config(self, chosen: tuple[str, ...] = ()) -> TrainConfig:
        """What the training script makes of the words.

        Args:
            chosen: more of them.
        """
        paths = [
            "--dit",
            "drawn",
            "--dataset_config",
            "none",
            "--output_dir",
            "none",
            "--output_name",
            "none",
        ]
        config = parse_train([*self.words(), *chosen, *paths])
        assert isinstance(config, TrainConfig)
        return config


FP8, INT8, AWAY = "--fp8_base", "--int8_base", "--gradient_checkpointing_cpu_offload"
PINNED = "--use_pinned_memory_for_block_swap"
KEPT = "--gradient_checkpointing_keep_attention"

CASES = (
    # a: what a step of the whole model takes
    Case(name="a1", what="Pro 17f 512x512, LoRA step, bf16", beside="floor", at_most=1.35),
    Case(name="a2", what="the same, --fp8_base", options=(FP8,), to="a1", at_most=1.06),
    Case(name="a3", what="the same, --fp8_fast", options=(FP8, "--fp8_fast"), to="a1", at_most=0.78),
    Case(name="a4", what="the same, --int8_base", options=(INT8,), to="a1"),
    Case(name="a5", what="the same, --int8_fast", options=(INT8, "--int8_fast"), to="a1"),
    # b: what block swap costs
    Case(name="b1", what="Pro 17f 512x512, fp8, 50 blocks swapped", options=(FP8,), swapped=50, to="a2",
         at_most=1.15, at_most_gib=10.0),
    # c: memory against the plan on smaller cards
    Case(name="c1", what="Pro 17f 512x512, fp8, 24 GB card", card=24, options=(FP8, PINNED), to="a2",
         at_most_gib=22.0),
    Case(name="c2", what="the same, 16 GB card", card=16, options=(FP8, PINNED), to="a2"),
    Case(name="c3", what="the same, 12 GB card", card=12, options=(FP8, PINNED), to="a2"),
    # d: Lite
    Case(name="d1", what="Lite 121f 512x768, LoRA step, bf16", task=LITE, clip=LONG, beside="floor",
         at_most=1.45, rounds=1),
    Case(name="d2", what="the same, block inputs offloaded", task=LITE, clip=LONG, options=(AWAY,), to="d1",
         at_most=1.05, at_most_gib=11.0, rounds=1),
    # e: sparse attention
    Case(name="e1", what="NABLA at 119k tokens, a fifth kept, forward and backward", kind="attention",
         task=PRO_HD, clip=HD, beside="dense", at_most=0.32),
    # f: the VAE
    Case(name="f1", what="VAE, 121f 512x768 to latents, float16", kind="encode", clip=LONG, rounds=0),
    Case(name="f2", what="VAE, latents to 121f 512x768, float16", kind="decode", clip=LONG, rounds=0),
    # g: the long clip on a consumer card
    Case(name="g1", what="Pro 121f 512x768, fp8, block inputs offloaded, 24 GB card", clip=LONG, card=24,
         options=(FP8, AWAY, PINNED), rounds=0),
    # Once more through the parts, where there is time.
    Case(name="a6", what="Pro 17f 512x512, --compile, bf16", options=("--compile",), to="a1"),
    Case(name="c4", what="12 GB card, host memory pageable", card=12, options=(FP8,), is_pageable=True, to="c3"),
    Case(name="a7", what="Pro 17f 512x512, --compile, fp8_fast", options=(FP8, "--fp8_fast", "--compile"),
         to="a3"),
    Case(name="b2", what="Pro 17f 768x768 (11.5k tokens), fp8", options=(FP8,), clip=SQUARE),
    Case(name="b3", what="the same, 50 blocks swapped", options=(FP8,), clip=SQUARE, swapped=50, to="b2",
         at_most=1.03),
    Case(name="e2", what="Pro HD 121f 768x1280 with NABLA, 2 blocks, LoRA step", task=PRO_HD, clip=HD, blocks=2,
         rounds=0),
    Case(name="d3", what="Lite 17f 512x512, LoRA step, bf16", task=LITE, beside="floor", at_most=1.6),
    Case(name="g2", what="Pro 121f 512x768, fp8, block inputs offloaded", clip=LONG, options=(FP8, AWAY),
         rounds=0),
    Case(name="a8", what="Pro 17f 512x512, --compile, fp8", options=(FP8, "--compile"), to="a2"),
    Case(name="a9", what="the same, int8_fast", options=(INT8, "--int8_fast", "--compile"), to="a5"),
    Case(name="c5", what="16 GB card, host memory pageable", card=16, options=(FP8,), is_pageable=True, to="c2"),
    Case(name="c6", what="24 GB card, host memory pageable", card=24, options=(FP8,), is_pageable=True, to="c1"),
    Case(name="h1", what="Pro 121f 512x768, 4 blocks, forward", kind="forward", clip=LONG, blocks=4,
         beside="floor", at_most=1.40),
    Case(name="h2", what="the same, LoRA step", clip=LONG, blocks=4, beside="floor", at_most=1.45),
    Case(name="h3", what="the same, attention kept", clip=LONG, blocks=4, options=(KEPT, "4"), to="h2",
         at_most=0.87),
    Case(name="a0", what="Pro 17f 512x512, --compile, int8", options=(INT8, "--compile"), to="a4"),
)  # fmt: skip


def tiny(case: Case) -> Case:
    """The same on the tiny model and a small clip, for a CPU."""
    options = ["2" if word == "4" else word for word in case.options]
    blocks = None if case.blocks is None else 3
    if "--compile" in options:
        options += ["--compile_backend", "eager"]
        blocks = 2
    is_sparse = case.task == PRO_HD
    return replace(
        case,
        task="k5-tiny-nabla" if is_sparse else "k5-tiny-t2v",
        clip=Clip(9, 128, 128) if is_sparse else Clip(5, 64, 64),
        options=tuple(options),
        swapped=2 if case.swapped or case.card else 0,
        blocks=blocks,
        rounds=1 if case.beside else 0,
    )
