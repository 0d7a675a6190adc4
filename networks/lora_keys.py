"""Parses layer and factor names of LoRA files with the model's own list of layer names.

Underscored names (kohya, LyCORIS) cannot be turned back into dotted ones by replacing characters, because the
dotted names contain underscores themselves; they are looked up instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from networks.lora_types import LORA_TYPES

UNDERSCORED_PREFIXES = ("lora_unet_", "lycoris_", "lora_transformer_")
DOTTED_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")

_OTHER_ROLES = [role for kind in LORA_TYPES if not kind.is_plain for role in kind.roles]
_KEY = re.compile(
    r"(?P<name>.+?)\.(?:lora_(?P<half>down|up|A|B)(?:\.[^.]+)?\.weight"
    rf"|(?P<role>alpha|{'|'.join(_OTHER_ROLES)})(?:\.weight)?)"
)
_ROLE_BY_HALF = {"down": "lora_down", "A": "lora_down", "up": "lora_up", "B": "lora_up"}
_DORA_SUFFIXES = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.default.weight")


def parse_key(key: str) -> tuple[str, str] | None:
    """(layer name as written, role) of a tensor; None for keys of unknown adapters.

    Roles: `lora_down`, `lora_up` (also for lora_A, lora_B), `alpha`, `hada_*`, `lokr_*`.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    return match["name"], _ROLE_BY_HALF[match["half"]] if match["half"] else match["role"]


def is_dora_key(key: str) -> bool:
    """Whether the tensor is the magnitude vector of a DoRA."""
    return key.endswith(_DORA_SUFFIXES)


def underscored(layer: str) -> str:
    """A dotted name in the spelling of kohya and LyCORIS, without their prefix."""
    return layer.replace(".", "_")


class LayerNames:
    """Finds the model's layer for a name written in any of the known layouts."""

    def __init__(self, names: Iterable[str]) -> None:
        self.dotted = frozenset(names)
        self._by_underscored = {underscored(name): name for name in self.dotted}
        assert len(self._by_underscored) == len(self.dotted), "two layer names differ only in dots"

    def find(self, written: str) -> str | None:
        """The model's dotted name, or None when it has no such layer."""
        for prefix in UNDERSCORED_PREFIXES:
            if written.startswith(prefix):
                return self._by_underscored.get(written.removeprefix(prefix))
        name = written
        while name not in self.dotted:
            prefix = next((p for p in DOTTED_PREFIXES if name.startswith(p)), None)
            if prefix is None:
                return None
            name = name.removeprefix(prefix)
        return name


@dataclass(frozen=True, slots=True)
class KeyGroups:
    """The keys of a file, grouped by layer."""

    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Dotted layer name -> role -> key in the file."""
    unmatched: list[str] = field(default_factory=list)
    """Adapter keys of layers that the model does not have, and keys that are no adapter's."""
    repeated: list[str] = field(default_factory=list)
    """Keys whose layer and role another key has taken already."""


def group_keys(keys: Collection[str], names: LayerNames) -> KeyGroups:
    """Sort the keys of a file by layer and role."""
    groups = KeyGroups()
    for key in keys:
        parsed = parse_key(key)
        layer = None if parsed is None else names.find(parsed[0])
        if parsed is None or layer is None:
            groups.unmatched.append(key)
            continue
        roles = groups.layers.setdefault(layer, {})
        if parsed[1] in roles:
            groups.repeated.append(key)
        else:
            roles[parsed[1]] = key
    return groups


def layout_of(keys: Collection[str]) -> str:
    """Return the naming scheme of a LoRA file: kohya, lycoris, diffusers, comfy, peft, bare or mixed."""
    found = {_layout_of_key(parsed[0]) for key in keys if (parsed := parse_key(key)) is not None}
    return found.pop() if len(found) == 1 else "mixed"


def _layout_of_key(written: str) -> str:
    prefixes = {
        "lycoris_": "lycoris",
        "lora_unet_": "kohya",
        "lora_transformer_": "kohya",
        "base_model.model.": "peft",
        "model.diffusion_model.": "comfy",
        "diffusion_model.": "comfy",
        "transformer.": "diffusers",
    }
    return next((layout for prefix, layout in prefixes.items() if written.startswith(prefix)), "bare")
