"""Options of generation that have no effect, alone or beside the others."""

from __future__ import annotations

from kandinsky5.cli.idle_rules import IdleRule
from kandinsky5.configs.generate import GenerateConfig
from modules.attention_backends import ATTENTION_BACKENDS

ACCEPTED = {
    "lycoris": "LoHa and LoKr files are recognised by themselves",
    "img_in_txt_in_offloading": "it belongs to another model",
    "vae_chunk_size": "the VAE always works in windows of 17 frames, as the official one",
    "split_attn": "guidance passes are never batched, so attention sees one clip at a time",
}
"""Options that never change anything here."""

_CLIP = (
    "negative_prompt",
    "image",
    "image_last",
    "width",
    "height",
    "video_size",
    "frames",
    "steps",
    "guidance",
    "scheduler_scale",
    "seed",
    "cpu_noise",
)
_NABLA = ("nabla_method", "nabla_P", "nabla_wT", "nabla_wH", "nabla_wW", "nabla_add_sta")
_DIT = (
    "dtype",
    "fp8_base",
    "fp8_scaled",
    "fp8_fast",
    "int8_base",
    "int8_fast",
    "blocks_to_swap",
    "use_pinned_memory_for_block_swap",
    "offload_dit_during_sampling",
    "disable_numpy_memmap",
    "no_weight_check",
    "magcache",
    "magcache_threshold",
    "magcache_k",
    "magcache_retention_ratio",
    "magcache_mag_ratios",
    *ATTENTION_BACKENDS,
    "attn_mode",
    "force_nabla_attention",
    *_NABLA,
    "compile",
    "compile_backend",
    "compile_mode",
    "compile_dynamic",
    "compile_fullgraph",
    "compile_cache_size_limit",
)
_TEXT = (
    "text_encoder_qwen",
    "text_encoder_clip",
    "text_encoder_cpu",
    "fp8_llm",
    "quantized_qwen",
    "prompt_templates",
)
_LORA = (
    "lora_weight",
    "lora_multiplier",
    "include_patterns",
    "exclude_patterns",
    "lora_mode",
    "lora_allow_partial",
    "no_lora_trigger",
)
_DECODING = ("vae_dtype", "vae_tiling", "vae_spatial_tile_sample_min_size")
_VIDEO = ("fps", "crf")


def _makes_many(config: GenerateConfig) -> bool:
    return config.from_file is not None or config.interactive


def _names_by_time(config: GenerateConfig) -> bool:
    output = config.output.output
    is_folder = config.output.output_is_folder or (output is not None and output.is_dir())
    return is_folder or _makes_many(config)


def _writes_no_video(config: GenerateConfig) -> bool:
    output = config.output.output
    is_image = output is not None and output.suffix.lower() == ".png" and not _names_by_time(config)
    return config.output.output_type not in ("video", "both") or is_image


def _has_one_pass(config: GenerateConfig) -> bool:
    guidance = config.task.guidance if config.spec.guidance is None else config.spec.guidance
    return guidance == 1 and not _makes_many(config)


RULES: tuple[IdleRule[GenerateConfig], ...] = (
    IdleRule(
        ("dit", *_CLIP, *_DIT, *_TEXT, *_LORA),
        lambda c: c.latent_path is not None,
        "--latent_path decodes what was sampled before",
    ),
    IdleRule(
        (
            *_CLIP,
            *_DIT,
            *_TEXT,
            "vae",
            *_DECODING,
            "output",
            "output_type",
            *_VIDEO,
            "trim_tail_frames",
            "overwrite",
            "no_metadata",
            "no_lora_trigger",
        ),
        lambda c: c.lora.save_merged_model is not None,
        "--save_merged_model writes the model and stops",
    ),
    IdleRule(
        ("lora_mode", "lora_allow_partial", "no_lora_trigger"),
        lambda c: not c.lora.lora_weight,
        "no LoRA is read; add --lora_weight",
    ),
    IdleRule(
        _VIDEO,
        _writes_no_video,
        "no video is written",
    ),
    IdleRule(
        ("trim_tail_frames",),
        lambda c: c.output.output_type == "latent",
        "a latent is kept whole; give it with --latent_path",
    ),
    IdleRule(
        _DECODING,
        lambda c: c.output.output_type == "latent" and not c.task.is_i2v,
        "nothing is decoded; give it with --latent_path",
    ),
    IdleRule(
        ("offload_dit_during_sampling",),
        lambda c: not c.interactive,
        "each model is freed before the next one loads; it belongs to --interactive",
    ),
    IdleRule(
        ("text_encoder_cpu",),
        lambda c: c.device == "cpu",
        "--device cpu computes everything there",
    ),
    IdleRule(
        ("overwrite",),
        _names_by_time,
        "files in a folder are named by time",
    ),
    IdleRule(
        ("negative_prompt",),
        _has_one_pass,
        "guidance 1 means no second pass",
    ),
    IdleRule(
        ("nabla_wT", "nabla_wH", "nabla_wW"),
        lambda c: c.dit.nabla is not None and not c.dit.nabla.add_sta,
        "the sliding window is left out; leave out --no_nabla_add_sta",
    ),
    IdleRule(
        ("force_nabla_attention",),
        lambda c: c.task.nabla is not None,
        "the task has this attention already",
    ),
)
