"""One case of `bench_gpu.py`, in the process that measures it: the product's own functions on drawn weights."""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import common as C
import torch
import torch.nn.functional as F
from bench_dit import Floor
from gpu_cases import CAPS_GIB, Case
from torch import Tensor

from dataset.cache.cached_dataset import CachedBatch
from kandinsky5.configs.train import TrainConfig
from kandinsky5.model import assembly, offload
from kandinsky5.model.conditioning import VelocityModel
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.drawn_weights import DrawnWeights
from kandinsky5.model.nabla import BLOCK, NablaPlan, select_blocks
from kandinsky5.model.precision import check_weight_format
from kandinsky5.tasks import TASKS, DitParams, NablaParams
from kandinsky5.tiny_models import VAE_CONFIG
from kandinsky5.training import setup
from kandinsky5.training.loss.objective import Objective
from kandinsky5.vae.video_vae import VideoVAE
from modules.block_sparse import block_sparse_attention
from modules.byte_sizes import GIB

KEPT_SHARE = 0.2
"""Of the block pairs, in the cases of attention alone."""

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Workload:
    """What a case runs, once built."""

    run: Run
    beside: Callable[[], Run] | None = None
    """Builds what is timed in turn with it, after the memory was measured."""
    parts: dict[str, Run] = field(default_factory=dict)
    """Of `run` and of what is beside it, timed too."""


def card(device_type: str) -> dict[str, Any]:
    """What there is to know about the device, with the speed of one large product in bf16."""
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if device_type != "cuda":
        return facts | {"name": "CPU", "gib": None, "flops": 1e10}
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
        facts["driver"] = found.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        facts["driver"] = None
    properties = torch.cuda.get_device_properties(0)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = statistics.median(C.interleave({"product": lambda: a @ a}, 10, 3, "cuda")["product"])
    return facts | {
        "name": properties.name,
        "gib": properties.total_memory / GIB,
        "cudnn": torch.backends.cudnn.version(),
        "flops": 2 * 8192**3 / seconds,
    }


def measure(case: Case, chosen: tuple[str, ...], device_type: str) -> dict[str, Any]:
    """Build the case, run it, and give seconds and memory.

    Args:
        chosen: words that are added to the case's own.
    """
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device(device_type)
    is_cuda = device.type == "cuda"
    if is_cuda and case.card:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAPS_GIB[case.card] * GIB / total), device)
    if case.is_pageable:
        offload.available_memory = lambda: 0
    begin = time.perf_counter()
    workload = build(case, chosen, device)
    C.sync(device)
    result = {"build_seconds": time.perf_counter() - begin}
    result["first_seconds"] = C.time_once(workload.run, device_type)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = C.time_once(workload.run, device_type)
    if is_cuda:
        result["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        result["reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
        result["page_locked_gib"] = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) / GIB
    functions = {"ours": workload.run, **workload.parts}
    for part in workload.parts.values():
        part()
    if workload.beside is not None:
        functions["beside"] = workload.beside()
        C.time_once(functions["beside"], device_type)
    times = C.interleave(functions, case.rounds, 0, device_type)
    times["ours"].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    shares = {name: medians.pop(name) for name in workload.parts}
    return result | {f"{name}_seconds": value for name, value in medians.items()} | {"parts": shares}


def build(case: Case, chosen: tuple[str, ...], device: torch.device) -> Workload:
    """What the case runs, on random data."""
    if case.kind == "encode" or case.kind == "decode":
        return Workload(vae_pass(case, device))
    if not case.is_model:
        return sparse_attention(case, device)
    config = case.config(chosen)
    if device.type == "cuda":
        check_weight_format(config.model, device)
    run = lora_step(config, case, device) if case.kind == "step" else forward_pass(config, case, device)
    floor = None if case.beside is None else lambda: floor_of(config.model.dit_params, case, device)
    return Workload(run, floor)


def load(config: TrainConfig, device: torch.device) -> DiffusionTransformer3D:
    """The model as training loads it, from weights drawn on the device."""
    dtype = setup.training_dtype(config.model, device)
    source = DrawnWeights(config.model.dit_params, device)
    return assembly.load_model(config.model, device, dtype, source=source)


def cached_batch(case: Case) -> CachedBatch:
    """One clip as it comes from the caches."""
    params = TASKS[case.task].dit_params
    return CachedBatch(
        latents=torch.randn(1, params.in_visual_dim, *case.clip.latent_shape),
        latents_image=None,
        text_embeds=(torch.randn(case.batch.text_tokens, params.in_text_dim).bfloat16(),),
        pooled_embed=torch.randn(1, params.in_text_dim2),
        item_keys=("clip",),
        contents=("video",),
        num_frames=(case.clip.frames,),
        dataset_index=0,
        timestep_quantiles=None,
    )


def lora_step(config: TrainConfig, case: Case, device: torch.device) -> Run:
    """An optimizer step as the trainer makes it, without its logs."""
    model = config.model
    dit = load(config, device)
    network = assembly.build_network(config.network, dit, 0, allow_partial=False).to(device)
    network.train()
    assembly.finish_model(model, dit, device)
    optimizer = setup.optimizer_for(config.optimizer, network)
    velocity = VelocityModel(dit, model.task.scale_factor, model.nabla, network)
    objective = Objective(velocity, config.timesteps, config.conditioning, False, 0, device, config.loss)
    batch = cached_batch(case)
    draws = objective.draw(batch, 0)
    limit = config.optimizer.max_grad_norm or math.inf

    def step() -> None:
        objective.training_losses(batch, draws).sum().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward_pass(config: TrainConfig, case: Case, device: torch.device) -> Run:
    """One call of the model without gradients."""
    dit = load(config, device)
    assembly.finish_model(config.model, dit, device)
    velocity = VelocityModel(dit, config.model.task.scale_factor, config.model.nabla)
    objective = Objective(velocity, config.timesteps, config.conditioning, False, 0, device, config.loss)
    batch = cached_batch(case)
    draws = objective.draw(batch, 0)

    @torch.no_grad()
    def forward() -> None:
        objective.velocity(batch, draws.noise, draws.sigma)

    return forward


def floor_of(params: DitParams, case: Case, device: torch.device) -> Run:
    """The matrix products and attentions of the case alone; all blocks share one block's weights."""
    one = C.DitConfig(
        params.model_dim, params.ff_dim, params.time_dim, params.axes_dims, 1, 1,
        in_text_dim=params.in_text_dim, in_text_dim2=params.in_text_dim2,
    )  # fmt: skip
    weights = {}
    for name, tensor in C.make_weights(one, torch.bfloat16, device).items():
        count = params.num_text_blocks if name.startswith("text_t") else params.num_visual_blocks
        weights |= {name.replace(".0.", f".{index}.", 1): tensor for index in range(count)}
    cfg = C.replace(one, num_text_blocks=params.num_text_blocks, num_visual_blocks=params.num_visual_blocks)
    tokens = C.tokens(case.clip.latent_shape, cfg)
    floor = Floor(cfg, weights, tokens, case.batch.text_tokens, torch.bfloat16, device)
    return floor.forward if case.kind == "forward" else lambda: floor.step(2)


def sparse_attention(case: Case, device: torch.device) -> Workload:
    """Choosing blocks and attending to them in one layer, beside dense attention."""
    params = TASKS[case.task].dit_params
    head_dim = sum(params.axes_dims)
    frames, height, width = case.clip.latent_shape
    tokens = frames * height * width // 4
    query, key, value = (
        torch.randn(1, tokens, params.model_dim // head_dim, head_dim, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    blocks = tokens // BLOCK
    window = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
    plan = NablaPlan(NablaParams(P=KEPT_SHARE, method="topk", add_sta=False), window)
    inputs = [tensor.requires_grad_(True) for tensor in (query, key, value)]

    def sparse() -> Tensor:
        return block_sparse_attention(query, key, value, select_blocks(query, key, plan), BLOCK)

    def dense() -> Tensor:
        heads = (tensor.transpose(1, 2) for tensor in inputs)
        return F.scaled_dot_product_attention(*heads).transpose(1, 2)

    def step(attend: Callable[[], Tensor]) -> None:
        out = attend()
        torch.autograd.grad(out, inputs, out.detach())

    parts = {
        "forward": torch.no_grad()(sparse),
        "dense forward": torch.no_grad()(dense),
        "choosing": lambda: select_blocks(query, key, plan),
    }
    return Workload(lambda: step(sparse), lambda: lambda: step(dense), parts)


def drawn_vae(case: Case, device: torch.device) -> VideoVAE:
    """HunyuanVideo's VAE with random weights in float16, or the tiny one where the task is."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    is_tiny = TASKS[case.task].is_tiny
    with torch.device("meta"):
        model = AutoencoderKLHunyuanVideo(**(VAE_CONFIG if is_tiny else {}))
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(0.5)
    return VideoVAE(model)


def vae_pass(case: Case, device: torch.device) -> Run:
    """A clip to latents or back, as the scripts do it."""
    vae = drawn_vae(case, device)
    if case.kind == "encode":
        clip = case.clip
        pixels = torch.rand(1, 3, clip.frames, clip.height, clip.width, device=clip_home(device)) * 2 - 1
        return lambda: vae.encode_moments(pixels)
    latents = torch.randn(1, 16, *case.clip.latent_shape, device=device)

    def decode() -> None:
        for _ in vae.decode_windows(latents):
            pass

    return decode


def clip_home(device: torch.device) -> torch.device:
    """Where decoded pixels lie: in host memory, window by window to the device; without data nowhere."""
    return device if device.type == "meta" else torch.device("cpu")
