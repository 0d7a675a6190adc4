"""The factor of a LoRA without `.alpha` tensors, from its header or from the settings beside the file.

Sources, in this order: PEFT's settings as JSON in the header (diffusers writes them as
`lora_adapter_metadata`), single numbers in the header (kohya's `ss_network_alpha`, `lora_alpha`, ...), PEFT's
`adapter_config.json`, and the official `<stem>_config_lora.json` or `config_lora.json` beside the file.
Settings that give other ranks than the file has belong to another file and are not used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from modules.errors import ModelFileError
from modules.logs import get_logger
from modules.messages import names_in_short
from modules.parsing import ParseError, parse_json

log = get_logger(__name__)

FOLDED_MARK = ("k5_lora_scale", "folded")
"""Metadata of files whose whole factor is inside lora_B already."""
PEFT_METADATA = "lora_adapter_metadata"
"""Metadata that holds PEFT's settings as JSON, as diffusers writes it."""
_ALPHA_AND_RANKS = (
    ("ss_network_alpha", ("ss_network_dim",)),
    ("lora_alpha", ("r", "lora_r", "lora_rank", "rank", "lora_dim")),
    ("network_alpha", ("network_dim", "network_rank", "rank", "r")),
    ("alpha", ("rank", "r", "dim")),
)
"""Names of an alpha in a header, each with the names that the rank beside it may have."""
_OWN_FILES = {"adapter_config.json": "adapter_model", "config_lora.json": "lora"}
"""Settings that bear no file's name, and the stem of the file that their writers put beside them."""
_BESIDE = " beside it"
_MAX_CONFIG_BYTES = 2**20
_MAX_NUMBER = 1e9
_MAX_PATTERN_LENGTH, _MAX_OPEN_REPEATS = 1000, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftSettings:
    """What one source states: `lora_alpha / r` as PEFT computes it, with exceptions per layer."""

    where: str = ""
    """Names the source in messages."""
    alpha: float | None = None
    """None: the factor is 1."""
    rank: int | None = None
    """None: not stated, so that any rank fits."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    """By layer name or regular expression; the first that matches a layer counts."""
    use_rslora: bool = False
    """Divide by the square root of the rank."""
    use_dora: bool | None = None
    """None: not stated."""
    scales_whole_matrices: bool = False
    """PEFT's LoKr: alpha / r acts on layers without a factorisation too."""

    @property
    def is_beside(self) -> bool:
        """Whether they are in a file of their own."""
        return self.where.endswith(_BESIDE)

    def as_json(self) -> str:
        """The same settings as PEFT writes them."""
        values = {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "alpha_pattern": dict(self.alpha_pattern),
            "rank_pattern": dict(self.rank_pattern),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }
        return json.dumps({name: value for name, value in values.items() if value is not None})

    def factor(self, layer: str, rank: int) -> float:
        """What the product of the factors is multiplied by in this layer."""
        alpha = first_match(self.alpha_pattern, layer, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (rank**0.5 if self.use_rslora else rank)

    def misfit(self, ranks: Mapping[str, int], has_magnitudes: bool) -> str | None:
        """What shows that these settings belong to another file; None if nothing does."""
        for layer, rank in ranks.items():
            stated = first_match(self.rank_pattern, layer, self.rank)
            if stated is not None and stated != rank:
                return f"r is {stated:g} there and {rank} in the file ({layer})"
        if has_magnitudes and self.use_dora is False:
            return "use_dora is false there, and the file is a DoRA"
        return None


UNSCALED = PeftSettings()


def first_match(patterns: Mapping[str, float], layer: str, default: float | None) -> float | None:
    """The value of the first pattern that matches a layer's name, as PEFT matches (`get_pattern_key`).

    A pattern is a regular expression that must match the whole name, or all of it after some dot.
    """
    for pattern, value in patterns.items():
        expression = _compiled(pattern)
        # Patterns may start with the name of the component, as keys in files do.
        if expression.match(layer) or expression.match(f"transformer.{layer}"):
            return value
    return default


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def lora_config_path(lora: Path) -> Path:
    """The PEFT settings beside a LoRA file, which official loaders read its scale from."""
    return lora.with_name(f"{lora.stem}_config_lora.json")


def find_settings(
    path: Path, metadata: Mapping[str, str], ranks: Mapping[str, int], *, has_magnitudes: bool = False
) -> PeftSettings:
    """The settings that give the scale of layers without `.alpha` tensors; the source is logged.

    Args:
        ranks: of those layers, by dotted name, less the layers of LoKr that are whole matrices.
        has_magnitudes: whether the file holds the magnitudes of a DoRA.
    Raises:
        ModelFileError: settings that cannot be read, or two sources that fit the file and disagree.
    """
    if metadata.get(FOLDED_MARK[0]) == FOLDED_MARK[1]:
        return UNSCALED
    fitting = []
    for settings in (*header_settings(path, metadata), *_settings_beside(path)):
        if not ranks and not settings.scales_whole_matrices:
            continue
        misfit = settings.misfit(ranks, has_magnitudes)
        if misfit is None:
            fitting.append(settings)
        else:
            log.warning("%s: the scale in %s is not used: %s", path.name, settings.where, misfit)
    if not fitting:
        if ranks:
            log.warning(
                "%s: no .alpha tensors, and neither its header nor a file beside it states an alpha for it: "
                "it is used at scale 1",
                path.name,
            )
        return UNSCALED
    chosen = fitting[0]
    for other in fitting[1:]:
        _check_agreement(path, chosen, other, ranks)
    _check_dora(path, chosen, has_magnitudes)
    _log_source(path, chosen, ranks)
    return chosen


def _check_agreement(path: Path, chosen: PeftSettings, other: PeftSettings, ranks: Mapping[str, int]) -> None:
    for layer, rank in ranks.items():
        scales = chosen.factor(layer, rank), other.factor(layer, rank)
        if not math.isclose(*scales, rel_tol=1e-4):
            raise ModelFileError(
                f"{path}: two sources give it different scales: {scales[0]:g} by {chosen.where}, "
                f"{scales[1]:g} by {other.where} ({layer}). Remove or correct the wrong one."
            )


def _check_dora(path: Path, settings: PeftSettings, has_magnitudes: bool) -> None:
    if settings.use_dora and not has_magnitudes:
        raise ModelFileError(
            f"{path}: is a DoRA by {settings.where} (use_dora), but holds no magnitude vectors: without them "
            "it would act differently"
        )


def _log_source(path: Path, settings: PeftSettings, ranks: Mapping[str, int]) -> None:
    by_layer = ranks or {"": settings.rank or 1}
    scales = sorted({f"{settings.factor(layer, rank):g}" for layer, rank in by_layer.items()})
    log.info(
        "%s: no .alpha tensors, so its scale is that of %s: %s",
        path.name, settings.where, names_in_short(scales),
    )  # fmt: skip
    own = _OWN_FILES.get(settings.where.removesuffix(_BESIDE))
    owner = None if own is None or path.stem == own else path.with_name(f"{own}.safetensors")
    if owner is not None and owner.is_file():
        log.warning("%s: %s may be that of %s", path.name, settings.where, owner.name)


def header_settings(path: Path, metadata: Mapping[str, str]) -> Iterator[PeftSettings]:
    """What the header states about the scale, JSON first.

    Raises:
        ModelFileError: diffusers' entry, or a setting in another one, cannot be used.
    """
    flat: dict[str, Any] = {}
    for key, text in metadata.items():
        where = f"{path}: metadata {key}"
        if key == PEFT_METADATA:
            yield _from_json(_without_component(_parse_settings(text, where)), where, f"its metadata {key}")
        elif text.lstrip().startswith("{") and "lora_alpha" in text:
            settings = _without_component(_parse_settings(text, where))
            if "lora_alpha" in settings:
                yield _from_json(settings, where, f"its metadata {key}")
        else:
            flat[key] = text
    flat = _without_component(flat)
    for alpha_name, rank_names in _ALPHA_AND_RANKS:
        alpha = _number(flat.get(alpha_name))
        if alpha is None:
            if alpha_name in flat:
                log.warning("%s: metadata %s is not a number, and is not used", path.name, alpha_name)
            continue
        rank = next((rank for name in rank_names if (rank := _number(flat.get(name))) is not None), None)
        if alpha == 0.0 and alpha_name != "lora_alpha":
            alpha = rank  # kohya's scripts: 0 stands for alpha = rank
        yield PeftSettings(
            where=f"its metadata {alpha_name}",
            alpha=alpha,
            rank=None if rank is None else int(rank),
            use_rslora=str(flat.get("use_rslora", "")).strip().lower() in {"true", "1"},
        )


def _without_component(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with "transformer." and the like cut off; those of text encoders are left out."""
    own: dict[str, Any] = {}
    for name, value in settings.items():
        component, _, setting = name.rpartition(".")
        if not component.startswith("text_encoder"):
            own.setdefault(setting, value)
    return own


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if -_MAX_NUMBER <= value <= _MAX_NUMBER else None


def _settings_beside(path: Path) -> Iterator[PeftSettings]:
    """Of the official two, the one that bears the file's own name; else the common one."""
    named = lora_config_path(path)
    official = named if named.is_file() else path.with_name("config_lora.json")
    for config in (path.with_name("adapter_config.json"), official):
        if not config.is_file():
            continue
        settings = _parse_settings(_read_config(config), str(config))
        parsed = _from_json(settings, str(config), f"{config.name}{_BESIDE}")
        if parsed.alpha is not None or parsed.alpha_pattern or parsed.use_dora:
            yield parsed


def _read_config(path: Path) -> str:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ModelFileError(f"{path}: too large for LoRA settings")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: cannot be read: {error}") from error


def _parse_settings(text: str, where: str) -> dict[str, Any]:
    try:
        settings = parse_json(text)
    except ParseError as error:
        raise ModelFileError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ModelFileError(f"{where}: expected a JSON object with r and lora_alpha")
    return settings


def _from_json(settings: Mapping[str, Any], where: str, short: str) -> PeftSettings:
    """PEFT's `LoraConfig`, or its `LoHaConfig` and `LoKrConfig`, which call their alpha `alpha`."""
    alpha = settings.get("lora_alpha", settings.get("alpha"))
    rank = settings.get("r")
    numbers = [value for value in (alpha, rank) if value is not None]
    if not all(_is_number(value) for value in numbers):
        raise ModelFileError(f"{where}: r, lora_alpha and the values of alpha_pattern must be numbers")
    return PeftSettings(
        where=short,
        alpha=None if alpha is None else float(alpha),
        rank=None if rank is None else int(rank),
        alpha_pattern=_patterns(settings, "alpha_pattern", where),
        rank_pattern=_patterns(settings, "rank_pattern", where),
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=bool(settings["use_dora"]) if "use_dora" in settings else None,
        scales_whole_matrices=str(settings.get("peft_type", "")).upper() == "LOKR",
    )


def _patterns(settings: Mapping[str, Any], name: str, where: str) -> dict[str, float]:
    patterns = settings.get(name) or {}
    if not isinstance(patterns, dict) or not all(_is_number(value) for value in patterns.values()):
        raise ModelFileError(f"{where}: the values of {name} must be numbers by layer name")
    for pattern in patterns:
        _check_pattern(pattern, f"{where}: {name}")
    return {pattern: float(value) for pattern, value in patterns.items()}


def _check_pattern(pattern: str, where: str) -> None:
    """Refuse what does not compile, and what could search for ever: the file may come from a stranger."""
    repeats_a_group = re.search(r"\)(?:[*+]|\{\d*,)", pattern) is not None
    open_repeats = len(re.findall(r"[*+]|,\}", pattern))
    if len(pattern) > _MAX_PATTERN_LENGTH or repeats_a_group or open_repeats > _MAX_OPEN_REPEATS:
        raise ModelFileError(f"{where}: refused: {pattern[:80]!r} repeats too much to be searched for safely")
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ModelFileError(f"{where}: {pattern[:80]!r} is not a regular expression: {error}") from error


def _is_number(value: Any) -> bool:
    """JSON as Python reads it may hold NaN, Infinity and numbers of any length."""
    is_numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_numeric and -_MAX_NUMBER <= value <= _MAX_NUMBER
