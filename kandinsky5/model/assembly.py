"""Assembles the model that is trained: the frozen DiT with merged LoRAs, and the trained LoRA."""

from __future__ import annotations

import torch

from kandinsky5.configs.train import ModelConfig, NetworkConfig
from kandinsky5.model.checkpoints import build_meta_dit, load_dit
from kandinsky5.model.compilation import compile_blocks
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.nabla import DensityReport
from kandinsky5.model.offload import stream_weights
from modules.activation_offload import ActivationOffload, tensor_mover
from modules.weight_files import WeightSource
from networks.lora import LoRANetwork
from networks.lora_files import LoadedLora, load_weights, read_lora
from networks.lora_kandinsky import (
    create_network,
    create_network_from_weights,
    linear_layer_sizes,
)

OFFLOADED_BYTES = 2**20
"""Saved tensors below this size are not worth a trip to host memory."""


def read_base_weights(model: ModelConfig) -> list[LoadedLora]:
    """The LoRAs of `--base_weights`, each at its strength.

    Raises:
        ModelFileError: see `read_lora`.
    """
    layers = linear_layer_sizes(build_meta_dit(model.dit_params, torch.float32)) if model.base_weights else {}
    return [
        read_lora(path, layers, allow_partial=model.lora_allow_partial).with_multiplier(strength)
        for path, strength in zip(model.base_weights, model.base_weights_multiplier, strict=True)
    ]


def load_model(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, *, source: WeightSource | None = None
) -> DiffusionTransformer3D:
    """The frozen model with `--base_weights` merged in; on the meta device all of it without data.

    Args:
        source: gives the tensors instead of the files of `--dit`.
    Raises:
        ModelFileError: see `load_dit` and `read_base_weights`.
    """
    params = model.dit_params
    loras = read_base_weights(model)
    dit = load_dit(source or model.dit, params, model, device=device, compute_dtype=dtype, loras=loras)
    dit.requires_grad_(False)
    dit.set_attention_backend(model.attention)
    if model.nabla is not None:
        dit.nabla_observer = DensityReport(params.num_visual_blocks)
    dit.gradient_checkpointing = model.gradient_checkpointing
    dit.kept_attention_blocks = model.gradient_checkpointing_keep_attention
    if model.gradient_checkpointing_cpu_offload:
        dit.activation_offload = ActivationOffload(tensor_mover(device), min_bytes=OFFLOADED_BYTES)
    return dit


def finish_model(model: ModelConfig, dit: DiffusionTransformer3D, device: torch.device) -> None:
    """Set up weight streaming and compilation; call after the LoRA is injected and on the device."""
    stream_weights(
        dit,
        model.blocks_to_swap,
        device,
        ring_size=model.block_swap_ring_size,
        force_pin=model.use_pinned_memory_for_block_swap,
    )
    if model.compile is not None:
        compile_blocks(dit, model.compile, device)


def build_network(
    config: NetworkConfig,
    dit: DiffusionTransformer3D,
    seed: int,
    *,
    allow_partial: bool,
    device: torch.device | str = "cpu",
) -> LoRANetwork:
    """Put the LoRA into the model, new or from `--network_weights`; without data on the meta device."""
    weights = config.network_weights
    lora = (
        None if weights is None else read_lora(weights, linear_layer_sizes(dit), allow_partial=allow_partial)
    )
    with torch.device(device):
        if config.dim_from_weights and lora is not None:
            return create_network_from_weights(
                dit,
                lora,
                network_dropout=config.network_dropout,
                network_args=config.network_args,
                seed=seed,
            )
        network = create_network(
            dit,
            network_dim=config.network_dim,
            network_alpha=config.network_alpha,
            network_dropout=config.network_dropout,
            network_args=config.network_args,
            seed=seed,
            network_module=config.network_module,
        )
    if lora is not None:
        load_weights(network, lora)
    return network
