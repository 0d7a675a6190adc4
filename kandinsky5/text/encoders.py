"""Captions to text conditioning: Qwen2.5-VL's last hidden states and CLIP's pooled vector.

One path for caches, samples and generation, so that the same caption gives the same numbers everywhere.
Source: kandinskylab/kandinsky-5:kandinsky/models/text_embedders.py for templates, cropping and token limits.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kandinsky5.configs.text_encoders import Quantization, TextEncodersConfig
from kandinsky5.model.conditioning import TextConditioning
from kandinsky5.text.files import (
    EncoderKind,
    LoadedEncoder,
    check_text_encoder,
    encoder_fingerprint,
    load_clip,
    load_qwen,
    wrong_width_message,
)
from kandinsky5.text.templates import ContentType, PromptTemplates, load_prompt_templates
from kandinsky5.text.tokens import CaptionTokens, ClipTokens, QwenTokens, check_tokenizer
from modules.errors import ConfigError, ModelFileError
from modules.logs import get_logger

log = get_logger(__name__)

_PUBLISHED_WIDTH = 3584
_SHOWN_CHARACTERS = 60


class TextEncoders:
    """Qwen2.5-VL and CLIP, loaded; see `encode`."""

    def __init__(
        self,
        qwen: LoadedEncoder,
        clip: LoadedEncoder,
        qwen_tokens: QwenTokens,
        clip_tokens: ClipTokens,
        templates: PromptTemplates,
    ) -> None:
        self.templates = templates
        self.fingerprint = _join_fingerprints(qwen.fingerprint, clip.fingerprint)
        """Stands for weights, configurations, tokenizers and quantisation; independent of paths."""
        self._qwen: LoadedEncoder | None = qwen
        self._clip: LoadedEncoder | None = clip
        self._qwen_tokens = qwen_tokens
        self._clip_tokens = clip_tokens
        self._has_told_of_clip = False

    @property
    def text_dims(self) -> tuple[int, int]:
        """Widths of the Qwen embeddings and of the CLIP vector."""
        qwen, clip = self._loaded()
        return qwen.model.config.hidden_size, clip.model.config.hidden_size

    @torch.no_grad()
    def encode(self, captions: Sequence[str], content: ContentType) -> list[TextConditioning]:
        """Encode captions in one batch, padded to the longest.

        Args:
            captions: used verbatim except for white space at both ends; no character is special.
            content: which template: `image` for clips of one frame, else `video`.
        Returns:
            One entry per caption on the CPU: text_embeds [L, in_text_dim] bfloat16, only the real tokens
            after the template part, L at most the token limit; pooled_embed [in_text_dim2] float32.
        """
        texts = [caption.strip() for caption in captions]
        qwen_tokens = [self._qwen_tokens.encode(text, content) for text in texts]
        clip_tokens = [self._clip_tokens.encode(text) for text in texts]
        self._tell_what_was_cut(texts, qwen_tokens, clip_tokens)
        embeds = self._run_qwen([tokens.ids for tokens in qwen_tokens], self._qwen_tokens.crop(content))
        pooled = self._run_clip([tokens.ids for tokens in clip_tokens])
        return [TextConditioning(*pair) for pair in zip(embeds, pooled, strict=True)]

    def free(self) -> None:
        """Free the memory of both models; `encode` then raises."""
        self._qwen = self._clip = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _loaded(self) -> tuple[LoadedEncoder, LoadedEncoder]:
        if self._qwen is None or self._clip is None:
            raise RuntimeError("the text encoders were freed")
        return self._qwen, self._clip

    def _run_qwen(self, sequences: list[list[int]], crop: int) -> list[Tensor]:
        """Hidden states after the final norm, without the first `crop`; one [L, D] per sequence.

        No attention mask: the model is causal and the padding stands on the right, so that real tokens do not
        see it, and a caption that is alone in its batch is computed without any padding.
        """
        qwen, _ = self._loaded()
        longest = max(len(ids) for ids in sequences)
        padding = qwen.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*ids, *[padding] * (longest - len(ids))] for ids in sequences])
        states = qwen.model(input_ids=ids.to(qwen.model.device), use_cache=False).last_hidden_state
        states = states.to("cpu", torch.bfloat16)
        return [state[crop : len(ids)].clone() for state, ids in zip(states, sequences, strict=True)]

    def _run_clip(self, sequences: list[list[int]]) -> list[Tensor]:
        _, clip = self._loaded()
        ids = torch.tensor(sequences, device=clip.model.device)
        return [vector.clone() for vector in clip.model(input_ids=ids).pooler_output.to("cpu", torch.float32)]

    def _tell_what_was_cut(
        self, texts: list[str], qwen_tokens: list[CaptionTokens], clip_tokens: list[CaptionTokens]
    ) -> None:
        for text, tokens in zip(texts, qwen_tokens, strict=True):
            if tokens.lost_text:
                log.warning(
                    'caption "%s" has %d tokens and was cut; lost: "%s"',
                    _shorten(text),
                    tokens.num_caption_tokens,
                    _shorten(tokens.lost_text),
                )
        if not self._has_told_of_clip and any(tokens.lost_text for tokens in clip_tokens):
            self._has_told_of_clip = True
            log.info("CLIP reads only the beginning of long captions; the model sees all of it through Qwen")


def load_text_encoders(
    config: TextEncodersConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    templates: PromptTemplates | None = None,
) -> TextEncoders:
    """Load both encoders.

    Args:
        dtype: of Qwen's weights and computation, `default_qwen_dtype` if None; CLIP is always float32, as in
            the official code.
        templates: None reads them from diffusers.
    Raises:
        ModelFileError: a file is missing or wrong, or the encoders are not of `expected_dims`.
        ConfigError: `clip_max_length` does not fit the encoder.
    """
    log.info("loading the text encoders")
    device = torch.device(device)
    templates = templates or load_prompt_templates()
    loaded_qwen = load_qwen(
        config.text_encoder_qwen,
        device=device,
        dtype=dtype or default_qwen_dtype(device),
        quantization=config.quantization,
    )
    qwen_config = loaded_qwen.model.config
    check_tokenizer(loaded_qwen.tokenizer, qwen_config.vocab_size, str(loaded_qwen.folder), is_chat=True)
    qwen_tokens = QwenTokens(loaded_qwen.tokenizer, templates, config.qwen_max_length)
    require_official_crop = config.require_official_crop
    if require_official_crop is None:
        require_official_crop = qwen_config.hidden_size == _PUBLISHED_WIDTH
    if require_official_crop:
        qwen_tokens.check_official_crops(str(loaded_qwen.folder))
    loaded_clip = load_clip(config.text_encoder_clip, device=device)
    clip_config = loaded_clip.model.config
    check_tokenizer(loaded_clip.tokenizer, clip_config.vocab_size, str(loaded_clip.folder), is_chat=False)
    clip_max_length = config.clip_max_length
    if not 3 <= clip_max_length <= clip_config.max_position_embeddings:
        raise ConfigError(
            f"--clip_max_length must lie within 3 .. {clip_config.max_position_embeddings}, "
            f"got {clip_max_length}"
        )
    clip_tokens = ClipTokens(loaded_clip.tokenizer, clip_max_length)
    encoders = TextEncoders(loaded_qwen, loaded_clip, qwen_tokens, clip_tokens, templates)
    if config.expected_dims is not None:
        check_text_dims(encoders, config.expected_dims)
    return encoders


def check_text_dims(encoders: TextEncoders, expected: tuple[int, int]) -> None:
    """Refuse encoders whose widths are not the DiT's in_text_dim and in_text_dim2."""
    kinds: tuple[EncoderKind, EncoderKind] = ("qwen", "clip")
    problems = [
        wrong_width_message(kind, found, wanted)
        for kind, found, wanted in zip(kinds, encoders.text_dims, expected, strict=True)
        if found != wanted
    ]
    if problems:
        raise ModelFileError(problems)


def check_text_encoder_paths(
    qwen: str, clip: str, expected_dims: tuple[int, int] | tuple[None, None] = (None, None)
) -> list[str]:
    """Problems of the two `--text_encoder_*` values, checked without loading anything.

    Args:
        expected_dims: the DiT's in_text_dim and in_text_dim2, when there is a DiT.
    """
    return [
        *check_text_encoder(qwen, "qwen", expected_dims[0]),
        *check_text_encoder(clip, "clip", expected_dims[1]),
    ]


def text_encoder_fingerprint(qwen: str, clip: str, quantization: Quantization | None = None) -> str:
    """Compute `TextEncoders.fingerprint` without loading the weights.

    Raises:
        ModelFileError: a folder cannot be used.
    """
    return _join_fingerprints(
        encoder_fingerprint(qwen, "qwen", quantization),
        encoder_fingerprint(clip, "clip"),
    )


def default_qwen_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16, the weights' own, on accelerators; float32 on the CPU."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def _join_fingerprints(qwen: str, clip: str) -> str:
    return hashlib.sha256(f"{qwen} {clip}".encode()).hexdigest()


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."
