"""The models of the generation script: checked from their headers first, loaded when their stage begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kandinsky5.configs.generate import GenerateConfig
from kandinsky5.configs.text_encoders import encoders_for_task
from kandinsky5.memory.advice import memory_advice
from kandinsky5.model.checkpoints import build_meta_dit, check_dit_file, file_name_warning, load_dit
from kandinsky5.model.compilation import check_compile_backend, compile_blocks
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.magcache import task_ratios
from kandinsky5.model.nabla import DensityReport
from kandinsky5.model.offload import max_blocks_to_swap, stream_weights
from kandinsky5.model.precision import check_vae, check_weight_format, compute_dtype, vae_dtype
from kandinsky5.text.encoders import (
    TextEncoders,
    check_text_encoder_paths,
    load_text_encoders,
)
from kandinsky5.text.templates import PromptTemplates
from kandinsky5.vae.video_vae import VideoVAE, check_vae_file, load_vae
from modules.attention_backends import DEFAULT_BACKEND, check_attention_backend
from modules.errors import ConfigError, ModelFileError
from modules.logs import get_logger
from networks.lora import LoRANetwork
from networks.lora_files import LoadedLora, read_lora
from networks.lora_kandinsky import create_network_from_weights, is_target_name, linear_layer_sizes

log = get_logger(__name__)

ENCODER_ADVICE = "--fp8_llm, --quantized_qwen or --text_encoder_cpu"
VAE_ADVICE = "--vae_dtype float16, or close other programs on the device"
_DIT_ADVICE = "--fp8_base or --blocks_to_swap N"


def check_models(config: GenerateConfig, device: torch.device) -> None:
    """Read headers and file lists of all models that will be loaded; takes no time and little memory.

    Raises:
        ModelFileError: with every problem found.
        ResourceError: the device cannot multiply in float8 or int8, or its libraries cannot compute the VAE.
    """
    check_dit_options(config, device)
    if config.output.output_type != "latent" or config.task.is_i2v:
        check_vae(config.vae.vae_dtype, device)
    problems: list[str] = []
    try:
        info = check_dit_file(config.models.dit, config.task.dit_params)
        log.info("DiT: %s", info.describe())
    except ModelFileError as error:
        problems += error.problems
    try:
        check_vae_file(config.models.vae)
    except ModelFileError as error:
        problems += error.problems
    params = config.task.dit_params
    problems += check_text_encoder_paths(
        config.models.text_encoder_qwen,
        config.models.text_encoder_clip,
        (params.in_text_dim, params.in_text_dim2),
    )
    if problems:
        raise ModelFileError(problems)
    warning = file_name_warning(config.models.dit, is_i2v=config.task.is_i2v)
    if warning:
        log.warning("%s", warning)


def check_dit_options(config: GenerateConfig, device: torch.device) -> None:
    """Check options against the model's size, the device and installed packages.

    Raises:
        ConfigError: too many blocks to swap, no MagCache ratios, a dtype the attention cannot compute in.
        ResourceError: a missing package, or a device that cannot multiply in float8 or int8.
    """
    dit, params = config.dit, config.task.dit_params
    problems = []
    most = max_blocks_to_swap(params)
    if dit.blocks_to_swap > most:
        problems.append(f"--blocks_to_swap {dit.blocks_to_swap}: at most {most} for {config.task.name}")
    if dit.magcache is not None and magcache_ratios(config) is None:
        problems.append(
            f"--magcache: there are no official ratios for {config.task.name}; give --magcache_mag_ratios"
        )
    if dit.attention != DEFAULT_BACKEND and compute_dtype(dit.dtype, device) == torch.float32:
        problems.append(f"--{dit.attention} computes in bfloat16 or float16: add --dtype bfloat16")
    if problems:
        raise ConfigError(problems)
    check_attention_backend(dit.attention, for_training=False)
    check_compile_backend(dit.compile)
    check_weight_format(dit, device)


def magcache_ratios(config: GenerateConfig) -> Sequence[float] | None:
    """The MagCache ratios, given or official; None without MagCache."""
    given = None if config.dit.magcache is None else config.dit.magcache.magcache_mag_ratios
    return given or task_ratios(config.task.name)


def read_loras(config: GenerateConfig) -> tuple[LoadedLora, ...]:
    """Read and check the LoRA files, with the multipliers of the command line.

    Raises:
        ModelFileError: with the problems of all files.
    """
    given, count = config.lora.lora_multiplier, len(config.lora.lora_weight)
    if given and len(given) < count:
        log.info("%d multipliers for %d LoRAs: the rest are 1.0", len(given), count)
    if not count:
        return ()
    layers = linear_layer_sizes(build_meta_dit(config.task.dit_params, torch.float32))
    loras: list[LoadedLora] = []
    problems: list[str] = []
    for path, multiplier in zip(
        config.lora.lora_weight, (*given, *[1.0] * (count - len(given))), strict=True
    ):
        try:
            lora = read_lora(
                path,
                layers,
                allow_partial=config.lora.lora_allow_partial,
                include_patterns=config.lora.include_patterns,
                exclude_patterns=config.lora.exclude_patterns,
            )
        except ModelFileError as error:
            problems += error.problems
            continue
        loras.append(lora.with_multiplier(multiplier))
    if problems:
        raise ModelFileError(problems)
    if config.lora.lora_mode == "runtime":
        for lora in loras:
            _check_runtime(lora)
    return tuple(loras)


def _check_runtime(lora: LoadedLora) -> None:
    lora.adapter_type()
    others = [name for name in lora.layers if not is_target_name(name)]
    if others:
        raise ConfigError(
            f"{lora.path}: {len(others)} layers can only be merged, first {others[0]}: use --lora_mode merge"
        )


def trigger_words(
    config: GenerateConfig, loras: Sequence[LoadedLora], multipliers: Sequence[float]
) -> tuple[str, ...]:
    """Trigger words of the LoRAs to put before a prompt, for these multipliers."""
    if config.lora.no_lora_trigger:
        return ()
    pairs = zip(loras, multipliers, strict=True)
    return tuple(lora.trigger for lora, multiplier in pairs if lora.trigger and multiplier != 0)


def log_trigger_words(config: GenerateConfig, loras: Sequence[LoadedLora]) -> None:
    """Log the trigger words once, and how they are used."""
    triggers = [lora.trigger for lora in loras if lora.trigger]
    if triggers:
        declined, used = "not used (--no_lora_trigger)", "put before the prompt where its strength is not 0"
        what = declined if config.lora.no_lora_trigger else used
        log.info("trigger words of the LoRA, %s: %s", what, ", ".join(triggers))


@dataclass(frozen=True, slots=True)
class SamplingModel:
    """The DiT with its LoRAs."""

    dit: DiffusionTransformer3D
    networks: tuple[LoRANetwork, ...]
    """Run-time LoRAs, in the order of the command line; empty when they are merged."""

    def set_multipliers(self, multipliers: Sequence[float]) -> None:
        """Set the strengths of run-time LoRAs; merged ones keep theirs."""
        for network, multiplier in zip(self.networks, multipliers, strict=False):
            network.set_multiplier(multiplier)


class ModelLoader:
    """Loads the models of one run by its options, without keeping references."""

    def __init__(
        self,
        config: GenerateConfig,
        loras: Sequence[LoadedLora],
        device: torch.device,
        templates: PromptTemplates | None,
    ) -> None:
        self.config = config
        self.templates = templates
        self.loras = loras
        self.device = device
        self.compute_dtype = compute_dtype(config.dit.dtype, device)

    def text_encoders(self) -> TextEncoders:
        device = torch.device("cpu") if self.config.text.text_encoder_cpu else self.device
        encoders = encoders_for_task(
            self.config.task,
            self.config.task.dit_params,
            self.config.models.text_encoder_qwen,
            self.config.models.text_encoder_clip,
            self.config.text.quantization,
        )
        with memory_advice("loading the text encoders", ENCODER_ADVICE):
            return load_text_encoders(encoders, device=device, templates=self.templates)

    def vae(self) -> VideoVAE:
        dtype = vae_dtype(self.config.vae.vae_dtype, self.device)
        with memory_advice("loading the VAE", VAE_ADVICE):
            return load_vae(self.config.models.vae, dtype=dtype, device=self.device)

    def dit(self) -> SamplingModel:
        with memory_advice("loading the DiT", _DIT_ADVICE):
            return self._dit()

    def _dit(self) -> SamplingModel:
        is_merged = self.config.lora.lora_mode == "merge"
        active = [lora for lora in self.loras if lora.multiplier != 0]
        dit = load_dit(
            self.config.models.dit,
            self.config.task.dit_params,
            self.config.dit,
            device=self.device,
            compute_dtype=self.compute_dtype,
            loras=active if is_merged else (),
        )
        dit.train(False)
        dit.set_attention_backend(self.config.dit.attention)
        if self.config.dit.nabla is not None:
            dit.nabla_observer = DensityReport(self.config.task.dit_params.num_visual_blocks)
        networks = () if is_merged else tuple(self._beside(dit, lora) for lora in self.loras)
        stream_weights(
            dit,
            self.config.dit.blocks_to_swap,
            self.device,
            force_pin=self.config.dit.use_pinned_memory_for_block_swap,
        )
        if self.config.dit.compile is not None:
            compile_blocks(dit, self.config.dit.compile, self.device)
        return SamplingModel(dit, networks)

    def _beside(self, dit: DiffusionTransformer3D, lora: LoadedLora) -> LoRANetwork:
        network = create_network_from_weights(dit, lora, network_dropout=None, network_args={}, seed=0)
        network.requires_grad_(False).train(False).to(self.device)
        network.set_multiplier(lora.multiplier)
        return network
