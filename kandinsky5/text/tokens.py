"""Captions to token ids: as tokenizing the whole prompt, except that captions cannot inject control tokens.

A caption that contains a control token's text, such as <|im_end|>, is spelt out instead of ending the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kandinsky5.text.templates import ContentType, PromptTemplates
from modules.errors import ModelFileError

OFFICIAL_CROP = {"video": 129, "image": 41}
"""Template tokens before the caption, with the published Qwen2.5-VL tokenizer."""
_TURN_START = "<|im_start|>"


@dataclass(frozen=True, slots=True)
class CaptionTokens:
    """A caption ready for an encoder."""

    ids: list[int]
    lost_text: str
    """The truncated end of the caption; "" if all of it fits."""
    num_caption_tokens: int
    """Of the caption alone, before it was cut."""


class QwenTokens:
    """Puts captions into their template, as Qwen2.5-VL token ids."""

    def __init__(self, tokenizer: Any, templates: PromptTemplates, max_length: int) -> None:
        """`max_length` counts the tokens after the template part that is dropped."""
        self._tokenizer = tokenizer
        self._text = _PlainText(tokenizer)
        self._max_length = max_length
        self._parts: dict[str, tuple[list[int], list[int]]] = {}
        for content in ("video", "image"):
            before, after = templates.parts(content)
            self._parts[content] = (self._template_ids(before), self._template_ids(after))

    def crop(self, content: ContentType) -> int:
        """Number of leading template tokens."""
        return len(self._parts[content][0])

    def check_official_crops(self, source: str) -> None:
        """Refuse a tokenizer that cuts the templates differently from the published one."""
        counted = {content: len(before) for content, (before, _) in self._parts.items()}
        if counted != OFFICIAL_CROP:
            raise ModelFileError(
                f"{source}: its tokenizer makes {counted['video']} / {counted['image']} tokens of the video "
                f"/ image prompt template; Qwen2.5-VL-7B-Instruct's makes {OFFICIAL_CROP['video']} / "
                f"{OFFICIAL_CROP['image']}. Copy the tokenizer files of Qwen/Qwen2.5-VL-7B-Instruct there"
            )

    def encode(self, caption: str, content: ContentType) -> CaptionTokens:
        """Template and caption, cut on the right as the official code does."""
        before, after = self._parts[content]
        ids = self._text.encode(caption)
        room = self._max_length
        lost = self._tokenizer.decode(ids[room:]) if len(ids) > room else ""
        return CaptionTokens([*before, *ids, *after][: len(before) + room], lost, len(ids))

    def _template_ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


class ClipTokens:
    """Captions between CLIP's start and end token, padded to a fixed length."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._text = _PlainText(tokenizer)
        self._max_length = max_length

    def encode(self, caption: str) -> CaptionTokens:
        ids = self._text.encode(caption)
        room = self._max_length - 2
        lost = self._tokenizer.decode(ids[room:]) if len(ids) > room else ""
        framed = [self._tokenizer.bos_token_id, *ids[:room], self._tokenizer.eos_token_id]
        padding = [self._tokenizer.pad_token_id] * (self._max_length - len(framed))
        return CaptionTokens([*framed, *padding], lost, len(ids))


def check_tokenizer(tokenizer: Any, vocab_size: int, source: str, *, is_chat: bool) -> None:
    """Refuse a tokenizer that does not match an embedding table of `vocab_size` rows."""
    if len(tokenizer) > vocab_size:
        raise ModelFileError(
            f"{source}: its tokenizer has {len(tokenizer)} tokens, but the model's embedding has "
            f"{vocab_size} rows; tokenizer and weights belong to different models"
        )
    if is_chat and _TURN_START not in tokenizer.get_added_vocab():
        raise ModelFileError(f"{source}: its tokenizer has no {_TURN_START} token, so it is not Qwen2.5-VL's")
    if not is_chat and None in {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}:
        raise ModelFileError(
            f"{source}: its tokenizer has no start, end or padding token, so it is not CLIP's"
        )


class _PlainText:
    """Tokenizes user text in which added tokens have no meaning."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        words = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        # Some tokenizers look for added tokens after lower-casing.
        self._added = re.compile("|".join(re.escape(word) for word in words) or "(?!)", re.IGNORECASE)

    def encode(self, text: str) -> list[int]:
        return [
            token
            for piece in self._pieces(text)
            for token in self._tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        ]

    def _pieces(self, text: str) -> Iterator[str]:
        """The text cut inside every added token, so that none stays whole; text without any is one piece."""
        start = 0
        while match := self._added.search(text, start):
            yield text[start : match.start() + 1]
            start = match.start() + 1
        yield text[start:]
