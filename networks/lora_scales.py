"""The factor of a LoRA without `.alpha` tensors: PEFT settings in the metadata or beside the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.errors import ModelFileError
from modules.logs import get_logger

log = get_logger(__name__)

FOLDED_MARK = ("k5_lora_scale", "folded")
"""Metadata of files whose whole factor is inside lora_B already."""
_MAX_CONFIG_BYTES = 2**20
_MAX_ALPHA = 1e9


@dataclass(frozen=True, slots=True)
class PeftScale:
    """`lora_alpha / r` as PEFT computes it, with exceptions per layer."""

    lora_alpha: float | None = None
    """None: the factor is 1."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    """Divide by the square root of the rank."""

    def factor(self, layer: str, rank: int) -> float:
        """What up @ down is multiplied by in this layer; the first pattern that fits counts, as in PEFT."""
        fitting = (
            value
            for pattern, value in self.alpha_pattern.items()
            if layer == pattern or layer.endswith("." + pattern)
        )
        alpha = next(fitting, self.lora_alpha)
        if alpha is None:
            return 1.0
        return alpha / (rank**0.5 if self.use_rslora else rank)


def lora_config_path(lora: Path) -> Path:
    """The PEFT settings beside a LoRA file, which official loaders read its scale from."""
    return lora.with_name(f"{lora.stem}_config_lora.json")


def find_scale(path: Path, metadata: Mapping[str, str]) -> PeftScale:
    """The scale of a file without `.alpha` tensors.

    Looked for in this order: our own mark (then 1), `lora_adapter_metadata`, `<stem>_config_lora.json`,
    `config_lora.json`; without any of them 1, which is logged.

    Raises:
        ModelFileError: the settings cannot be read, or require features that are not supported (DoRA).
    """
    if metadata.get(FOLDED_MARK[0]) == FOLDED_MARK[1]:
        return PeftScale()
    if "lora_adapter_metadata" in metadata:
        where = f"{path}: metadata lora_adapter_metadata"
        settings = _parse_settings(metadata["lora_adapter_metadata"], where)
        return _peft_scale({name.removeprefix("transformer."): v for name, v in settings.items()}, where)
    for config in (lora_config_path(path), path.with_name("config_lora.json")):
        if config.is_file():
            log.info("%s: no alpha in the file, so its scale is that of %s beside it", path.name, config.name)
            return _peft_scale(_parse_settings(_read_config(config), str(config)), str(config))
    log.info("%s: no alpha in the file or beside it, so it is used at scale 1", path.name)
    return PeftScale()


def _read_config(path: Path) -> str:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ModelFileError(f"{path}: too large for LoRA settings")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: cannot be read: {error}") from error


def _parse_settings(text: str, where: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ModelFileError(f"{where}: expected a JSON object with r and lora_alpha")
    return settings


def _peft_scale(settings: Mapping[str, Any], where: str) -> PeftScale:
    if settings.get("use_dora"):
        raise ModelFileError(f"{where}: the file is a DoRA (use_dora), which cannot be applied here")
    alpha, pattern = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    is_valid = isinstance(pattern, dict) and all(_is_number(value) for value in pattern.values())
    if not is_valid or not (alpha is None or _is_number(alpha)):
        raise ModelFileError(f"{where}: lora_alpha and the values of alpha_pattern must be numbers")
    by_layer = {str(name).removeprefix("transformer."): float(value) for name, value in pattern.items()}
    odd = [name for name in by_layer if not name.replace(".", "").replace("_", "").isalnum()]
    if odd:
        raise ModelFileError(f"{where}: alpha_pattern must hold layer names, got {odd[0]!r}")
    return PeftScale(alpha if alpha is None else float(alpha), by_layer, bool(settings.get("use_rslora")))


def _is_number(value: Any) -> bool:
    """JSON as Python reads it may hold NaN, Infinity and numbers of any length."""
    is_numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_numeric and -_MAX_ALPHA <= value <= _MAX_ALPHA
