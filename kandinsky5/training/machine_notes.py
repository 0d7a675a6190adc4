"""Options of a training run that have no effect on the machine it found."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kandinsky5.configs.train import TrainConfig


def machine_notes(config: TrainConfig, num_processes: int, device: torch.device) -> Iterator[str]:
    """Log lines about the options that need several processes or CUDA, where there are none."""
    run, model = config.run, config.model
    if num_processes == 1:
        yield from _idle(
            "there is one process; start several with accelerate launch --num_processes N",
            ddp_timeout=run.ddp_timeout is not None,
            ddp_gradient_as_bucket_view=run.ddp_gradient_as_bucket_view,
            ddp_static_graph=run.ddp_static_graph,
        )
    if device.type != "cuda":
        yield from _idle(
            f"the run computes on {device.type}; it belongs to CUDA",
            cuda_allow_tf32=model.cuda_allow_tf32,
            cuda_cudnn_benchmark=model.cuda_cudnn_benchmark,
            no_probe=run.no_probe,
            use_pinned_memory_for_block_swap=(
                model.use_pinned_memory_for_block_swap and model.blocks_to_swap > 0
            ),
        )


def _idle(why: str, **is_given: bool) -> Iterator[str]:
    yield from (f"--{name} has no effect: {why}" for name, given in is_given.items() if given)
