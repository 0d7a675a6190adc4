"""Tokenizers for the small models: of the same types as Qwen2's and CLIP's, trained on a few sentences."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

# Text of the kind that captions and prompt templates are made of, so that common words become single tokens.
_SENTENCES = """
A cat walks on the grass, realistic style. A dog runs along the beach at sunset, its fur wet from the waves.
The camera pans slowly to the left over a cup of coffee on a wooden table; warm light falls through a window.
A white rabbit looks out of its burrow and stretches in the morning sun. A rocket rises from the launch pad.
A woman in a red coat crosses a busy street in the rain while cars pass behind her, shallow depth of field.
Two friends talk in a quiet garden, and the colors of the flowers change with the light of the evening.
In the background a train moves past mountains; the style is a detailed painting with a soft, calm atmosphere.
The objects keep their shape, size and texture while the camera moves around them at a low angle.
A short video of a man who opens a door, then an image of the same scene at night, with rain and lights.
An old man sits by the river and feeds the birds. Children play in the park. Snow falls on the mountains.
""".strip().splitlines()

_NUM_MERGES = 256

# Source: the added tokens of Qwen2.5-VL's tokenizer_config.json, in its order; the second group is not marked
# "special" there.
_QWEN_CONTROL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_QWEN_PLAIN_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
_MODEL_ROWS = 64
"""The embedding table is padded to a multiple of this, as Qwen's is, so it is larger than the vocabulary."""


def save_qwen_tokenizer(folder: Path) -> tuple[dict[str, int], int]:
    """Write a Qwen2 byte-level tokenizer; returns the ids of its control tokens and the number of embedding
    rows.
    """
    from transformers import Qwen2Tokenizer

    merges = _train_merges(Qwen2Tokenizer(vocab={}, merges=[]), suffix="")
    words = [*_byte_alphabet(), *("".join(pair) for pair in merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(dict.fromkeys(words))},
        merges=merges,
        eos_token="<|im_end|>",
        model_max_length=131072,
    )
    rules: Any = tokenizer.backend_tokenizer
    rules.add_special_tokens([AddedToken(word, normalized=False) for word in _QWEN_CONTROL_TOKENS])
    rules.add_tokens([AddedToken(word, normalized=False) for word in _QWEN_PLAIN_TOKENS])
    _save(tokenizer, folder)
    ids = {word: rules.token_to_id(word) for word in _QWEN_CONTROL_TOKENS}
    return ids, -(-(len(tokenizer) + 1) // _MODEL_ROWS) * _MODEL_ROWS


def save_clip_tokenizer(folder: Path) -> int:
    """Write a CLIP tokenizer (lower case, `</w>` at word ends, 77 tokens); returns its vocabulary size.

    As in CLIP's vocabulary the end token has the highest id, which the pooling relies on.
    """
    from transformers import CLIPTokenizer

    blank = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges = _train_merges(CLIPTokenizer(vocab=blank, merges=[]), suffix="</w>")
    letters = _byte_alphabet()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words), _CLIP_START, _CLIP_END]
    tokenizer = CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=merges, model_max_length=77
    )
    _save(tokenizer, folder)
    return len(tokenizer)


def _train_merges(blank: Any, suffix: str) -> list[Any]:
    """Byte-pair merges for the text rules (normaliser, word splitting) of an empty transformers tokenizer.

    Not trained with the tokenizers package, whose order of equally frequent pairs varies when there is a
    suffix.
    Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", algorithm 1.
    """
    rules: Tokenizer = blank.backend_tokenizer
    words = Counter(word for sentence in _SENTENCES for word in _split_words(rules, sentence))
    symbols = {word: [*word[:-1], word[-1] + suffix] for word in words}
    merges: list[tuple[str, str]] = []
    for _ in range(_NUM_MERGES):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in symbols.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        symbols = {word: _merge_pair(parts, best) for word, parts in symbols.items()}
    return merges


def _split_words(rules: Tokenizer, sentence: str) -> list[str]:
    if rules.normalizer is not None:
        sentence = rules.normalizer.normalize_str(sentence)
    return [word for word, _ in rules.pre_tokenizer.pre_tokenize_str(sentence)]


def _merge_pair(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in a fixed order."""
    return sorted(ByteLevel.alphabet())


def _save(tokenizer: Any, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, and the vocab.json and merges.txt that older
    readers require.
    """
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
