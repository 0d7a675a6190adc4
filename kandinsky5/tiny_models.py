"""Small random models in the file formats of the published ones: `python -m kandinsky5.tiny_models OUT`.

For tests and for trying out the scripts. Their weights are random, so the videos are noise; everything else
(file layouts, dtypes, tokenizers, tensor names) is as in the published checkpoints, and the same code loads
them.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataset.geometry import LATENT_CHANNELS
from kandinsky5.tasks import TINY_PARAMS, DitParams
from kandinsky5.tiny_tokenizers import save_clip_tokenizer, save_qwen_tokenizer
from modules.command_line import Parser, user_errors
from modules.files import write_json
from modules.logs import get_logger
from modules.options import non_negative_int
from modules.seeding import generator_for
from modules.tensor_files import write_tensors

log = get_logger(__name__)

VAE_CONFIG = {
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": LATENT_CHANNELS,
    "scaling_factor": 0.476986,
}
"""Constructor arguments of diffusers' AutoencoderKLHunyuanVideo; compression is the real one."""

_QWEN_SHARD_SIZE = "320KB"  # gives the two shards that loaders have to join
_MEAN_GAIN = 4.0  # brings the tiny VAE's scaled latents to a standard deviation near 1, as the real one's are
_LOGVAR_BIAS = -6.0  # a trained posterior is narrow; a random one would drown the picture in its own noise


def build_tiny_models(out: Path, seed: int = 0) -> None:
    """Write `model/tiny.safetensors`, `vae/`, `text_encoder/` and `text_encoder2/` under `out`.

    A few MB in total; the bytes depend only on `seed` and the installed library versions. Existing files with
    these names are replaced.
    """
    write_tensors(out / "model" / "tiny.safetensors", dit_tensors(TINY_PARAMS, seed))
    build_vae(out / "vae", seed)
    with _quiet_transformers():
        build_text_encoder(out / "text_encoder", seed)
        build_clip(out / "text_encoder2", seed)


def dit_tensor_shapes(params: DitParams) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a DiT checkpoint."""
    width, time_dim, ff_dim = params.model_dim, params.time_dim, params.ff_dim
    patch = math.prod(params.patch_size)
    has_condition = params.visual_cond or params.instruct_type == "channel"
    channels = 2 * params.in_visual_dim + 1 if has_condition else params.in_visual_dim
    shapes: dict[str, tuple[int, ...]] = {
        **_linear("time_embeddings.in_layer", width, time_dim),
        **_linear("time_embeddings.out_layer", time_dim, time_dim),
        **_linear("text_embeddings.in_layer", params.in_text_dim, width),
        **_affine("text_embeddings.norm", width),
        **_linear("pooled_text_embeddings.in_layer", params.in_text_dim2, time_dim),
        **_affine("pooled_text_embeddings.norm", time_dim),
        **_linear("visual_embeddings.in_layer", patch * channels, width),
        **_linear("out_layer.modulation.out_layer", time_dim, 2 * width),
        **_linear("out_layer.out_layer", width, patch * params.out_visual_dim),
    }
    kinds = (
        ("text", params.num_text_blocks, 6, ("self_attention",)),
        ("visual", params.num_visual_blocks, 9, ("self_attention", "cross_attention")),
    )
    for kind, count, chunks, attentions in kinds:
        for index in range(count):
            block = f"{kind}_transformer_blocks.{index}"
            shapes |= _linear(f"{block}.{kind}_modulation.out_layer", time_dim, chunks * width)
            for attention in attentions:
                shapes |= _attention(f"{block}.{attention}", width, sum(params.axes_dims))
            shapes[f"{block}.feed_forward.in_layer.weight"] = (ff_dim, width)
            shapes[f"{block}.feed_forward.out_layer.weight"] = (width, ff_dim)
    return shapes


def dit_tensors(params: DitParams, seed: int = 0, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Random DiT weights in the dtypes of the published files, or all in `dtype`.

    Published: float32 for modulation and time embedding, bfloat16 for the rest. Scales are chosen so that
    activations stay near 1 and every modulation has an effect.
    """
    tensors = {}
    for name, shape in dit_tensor_shapes(params).items():
        tensor = _random_tensor(seed, "dit", name, shape)
        if "modulation" in name:
            tensor *= 0.2 * shape[-1] ** 0.5 if name.endswith("bias") else 0.4
        is_island = "modulation" in name or name.startswith("time_embeddings")
        tensors[name] = tensor.to(dtype or (torch.float32 if is_island else torch.bfloat16))
    return tensors


def build_vae(folder: Path, seed: int = 0) -> None:
    """Write a random HunyuanVideo VAE as a diffusers folder: `config.json` and
    `diffusion_pytorch_model.safetensors`.
    """
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    vae = AutoencoderKLHunyuanVideo(**VAE_CONFIG)
    tensors = _random_state(vae, seed, "vae")
    channels = VAE_CONFIG["latent_channels"]
    tensors["quant_conv.weight"][:channels] *= _MEAN_GAIN
    tensors["quant_conv.weight"][channels:] *= 0.1
    tensors["quant_conv.bias"][channels:] = _LOGVAR_BIAS
    vae.load_state_dict(tensors)
    write_vae_folder(folder, vae)


def write_vae_folder(folder: Path, vae: Any, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a diffusers VAE as `config.json` and `diffusion_pytorch_model.safetensors`."""
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in vae.state_dict().items()}
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", {"_class_name": type(vae).__name__, **_plain_config(vae.config)})


def build_text_encoder(folder: Path, seed: int = 0) -> None:
    """Write a random Qwen2.5-VL folder as on the hub: two bfloat16 shards, vision tower and
    lm_head included.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    token_ids, vocab_size = save_qwen_tokenizer(folder)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": TINY_PARAMS.in_text_dim,
            "intermediate_size": 2 * TINY_PARAMS.in_text_dim,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
            "bos_token_id": token_ids["<|endoftext|>"],
            "eos_token_id": token_ids["<|im_end|>"],
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": TINY_PARAMS.in_text_dim,
            "fullatt_block_indexes": [0],
        },
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).bfloat16()
    model.load_state_dict(_random_state(model, seed, "qwen"))
    model.save_pretrained(folder, max_shard_size=_QWEN_SHARD_SIZE)


def build_clip(folder: Path, seed: int = 0) -> None:
    """Write a random CLIPModel folder as on the hub, with `eos_token_id` 2 as in the published config."""
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = save_clip_tokenizer(folder)
    width = TINY_PARAMS.in_text_dim2
    shared = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **shared,
            "vocab_size": vocab_size,
            "num_hidden_layers": 2,
            "projection_dim": width,
            # Not the tokenizer's end token: transformers then takes the position of the highest token id.
            "eos_token_id": 2,
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
        vision_config={**shared, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16},
        projection_dim=width,
    )
    model = CLIPModel(config)
    model.load_state_dict(_random_state(model, seed, "clip"))
    model.save_pretrained(folder)


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _affine(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _attention(name: str, width: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.{norm}.weight": (head_dim,) for norm in ("query_norm", "key_norm")}
    for layer in ("to_query", "to_key", "to_value", "out_layer"):
        shapes |= _linear(f"{name}.{layer}", width, width)
    return shapes


def _random_tensor(seed: int, model: str, name: str, shape: Sequence[int]) -> Tensor:
    """float32: weights scaled by their fan-in, one-dimensional weights (norms) near 1, small biases."""
    noise = torch.randn(tuple(shape), generator=generator_for("tiny", seed, model, name))
    if len(shape) >= 2:
        return noise * math.prod(shape[1:]) ** -0.5
    if name.endswith("weight"):
        return 1 + 0.05 * noise
    return 0.02 * noise


def _random_state(model: nn.Module, seed: int, part: str) -> dict[str, Tensor]:
    return {
        name: _random_tensor(seed, part, name, tensor.shape) for name, tensor in model.state_dict().items()
    }


def _plain_config(config: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Disable transformers' progress bars and hints while saving; restores the settings afterwards."""
    from transformers.utils import logging as transformers_logging

    had_bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m kandinsky5.tiny_models", "Write small random models for trying out the scripts."
    )
    parser.add_argument(
        "out", type=Path, help="folder to write model/, vae/, text_encoder/, text_encoder2/ into"
    )
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, help="seed of the random weights (default: 0)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors(argv):
        options = _parse(argv)
        build_tiny_models(options.out, options.seed)
        log.info("wrote small random models to %s", options.out)


if __name__ == "__main__":
    main()
