"""Parses layer and factor names of LoRA files with the model's own list of layer names.

Underscored names (kohya, LyCORIS) cannot be turned back into dotted ones by replacing characters, because the
dotted names contain underscores themselves; every name is looked up instead, with dots and underscores alike.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from networks.lora_types import LORA_TYPES, MAGNITUDE

# First whole prefixes, then what stands before one: "base_model.model.transformer." is three of them.
_KNOWN_PREFIXES = (
    *("lora_unet_", "lycoris_", "lora_transformer_"),
    *("base_model.", "diffusion_model.", "transformer.", "model.", "module.", "dit.", "unet."),
)
_WRAPPERS = re.compile(r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)[._]|\bbase_layer\.")
"""What torch.compile, FSDP, checkpointing and PEFT put into the names of the layers that they wrap."""
_LAYOUTS = {
    "lycoris_": "lycoris",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "base_model.model.": "peft",
    "model.diffusion_model.": "comfy",
    "diffusion_model.": "comfy",
    "transformer.": "diffusers",
    "": "bare",
}
_OTHER_ROLES = sorted(
    {role for kind in LORA_TYPES for role in kind.roles if not role.startswith("lora_")} - {MAGNITUDE}
)
_KEY = re.compile(
    r"(?P<name>.+?)(?:_lora\.(?P<processor>down|up)\.weight|\.(?i:"
    r"lora_(?P<half>down|up|a|b)(?:\.(?!bias$)[^.]+?)?(?:\.weight)?"
    r"|lora(?:_linear_layer|_layer)?\.(?P<nested>down|up)(?:\.weight)?"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector)(?:\.[^.]+?)?(?:\.weight)?"
    rf"|(?P<role>alpha|{'|'.join(_OTHER_ROLES)})(?:\.weight)?))"
)
_USUAL_KEY = re.compile(
    r".+\.(lora_(down|up|A|B)(\.default)?\.weight|lora_magnitude_vector"
    rf"|alpha|{MAGNITUDE}|{'|'.join(_OTHER_ROLES)})"
)
"""The spellings of factors that all programs use."""
_ROLE_BY_HALF = {"down": "lora_down", "a": "lora_down", "up": "lora_up", "b": "lora_up"}
_MARKER = re.compile(r"(?:.*\.)?scaled_fp8")
"""An empty tensor by which ComfyUI recognises float8 checkpoints; it says nothing about a LoRA."""


class ForeignKind(NamedTuple):
    """Tensors that are not factors of a supported adapter."""

    name: str
    """Completes the sentence "holds ..."."""
    is_separate: bool = False
    """The rest of the file means the same without them."""


_FOREIGN = (
    (
        r"lora_te\d*_.*|(?:.*\.)?text_encoder(?:_\d)?\..*|te\d?\..*",
        ForeignKind("a LoRA of a text encoder", True),
    ),
    (
        r"(?i:.*\.lora_(?:b|up|a|down)(?:\.[^.]+)?\.bias)",
        ForeignKind("biases of the factors (PEFT's lora_bias)"),
    ),
    (r".*\.diff_b", ForeignKind("changes of biases (diff_b)")),
    (r".*\.diff", ForeignKind("whole changes of weights (diff)")),
    (r".*\.set_weight", ForeignKind("whole weights (set_weight)")),
    (r".*\.boft_.*", ForeignKind("BOFT factors")),
    (r".*\.oft_.*", ForeignKind("OFT factors")),
    (r".*\.(?:a1|a2|b1|b2|bm1|bm2)\.weight", ForeignKind("GLoRA factors")),
    (r".*\.(?:ia3_l.*|on_input)", ForeignKind("IA3 factors")),
    (r".*\.vera_.*", ForeignKind("VeRA factors")),
    (r".*\.(?:lora_e|lora_E|ranknum)(?:\..*)?", ForeignKind("AdaLoRA factors")),
    (r".*\.(?:lora_mid.*|hada_t[12]|lokr_t[12])", ForeignKind("factors of convolutions")),
    (r".*\.(?:w_norm|b_norm)", ForeignKind("changes of norms")),
    (r".*\.lora_embedding_.*", ForeignKind("factors of embeddings")),
    (r".*\.modules_to_save\..*", ForeignKind("whole modules (PEFT's modules_to_save)")),
    (r".*\.bias", ForeignKind("biases of the model")),
)


def parse_key(key: str) -> tuple[str, str] | None:
    """(layer name as written, role) of a tensor; None for keys of unknown adapters.

    Roles: `lora_down`, `lora_up` (also for lora_A, lora_B), `alpha`, `hada_*`, `lokr_*`, and `dora_scale` for
    the magnitudes of a DoRA.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    half = match["half"] or match["nested"] or match["processor"]
    if half:
        return match["name"], _ROLE_BY_HALF[half.lower()]
    return match["name"], MAGNITUDE if match["magnitude"] else match["role"].lower()


def foreign_kind(key: str) -> ForeignKind | None:
    """What a key that `parse_key` does not know belongs to; None if that is not known either."""
    return next((kind for pattern, kind in _FOREIGN if re.fullmatch(pattern, key)), None)


def is_marker(key: str) -> bool:
    """Whether the tensor is a mark of its writer without a meaning for a LoRA."""
    return _MARKER.fullmatch(key) is not None


def underscored(layer: str) -> str:
    """A dotted name in the spelling of kohya and LyCORIS, without their prefix."""
    return layer.replace(".", "_")


class Written(NamedTuple):
    """A layer's name as it is written in a file."""

    prefix: str
    layer: str
    """The model's own dotted name."""
    is_respelled: bool
    """Dots and underscores stand in neither the model's nor kohya's places."""

    @property
    def has_known_prefix(self) -> bool:
        rest = self.prefix
        while rest:
            known = next((prefix for prefix in _KNOWN_PREFIXES if rest.startswith(prefix)), None)
            if known is None:
                return False
            rest = rest.removeprefix(known)
        return True

    @property
    def may_be_prefixed(self) -> bool:
        """Whether the prefix can be that of a whole file: it ends at a dot or is one of a LoRA's."""
        return self.prefix.endswith(".") or self.prefix.startswith(("lora", "lycoris"))


class LayerNames:
    """Finds the model's layer for a name written in any of the known layouts."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_underscored = {underscored(name): name for name in names}

    def split(self, written: str) -> Written | None:
        """The longest ending of the name that is a layer of the model, or None; wrappers are left out."""
        plain = _WRAPPERS.sub("", written)
        joined = underscored(plain)
        starts = [0, *(match.end() for match in re.finditer("_", joined))]
        for start in starts:
            layer = self._by_underscored.get(joined[start:])
            if layer is not None:
                spelled = plain[start:]
                return Written(plain[:start], layer, spelled not in {layer, joined[start:]})
        return None


@dataclass(frozen=True, slots=True)
class KeyGroups:
    """The keys of a file, grouped by layer."""

    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Dotted layer name -> role -> key in the file."""
    unmatched: list[str] = field(default_factory=list)
    """Adapter keys of layers that the model does not have, and keys that are no adapter's."""
    repeated: list[str] = field(default_factory=list)
    """Keys whose layer and role another key has taken already."""
    written: list[Written] = field(default_factory=list)
    """The names of the layers as the file spells them."""


def group_keys(keys: Collection[str], names: LayerNames) -> KeyGroups:
    """Sort the keys of a file by layer and role.

    A prefix that is not one of the known ones counts if it stands before every layer of the file.
    """
    groups = KeyGroups()
    parsed = {key: parse_key(key) for key in keys}
    found = {key: names.split(name_and_role[0]) for key, name_and_role in parsed.items() if name_and_role}
    is_uniform = len({written.prefix if written else None for written in found.values()}) == 1
    for key, name_and_role in parsed.items():
        written = found.get(key)
        if name_and_role is None or written is None or not (
            written.has_known_prefix or (is_uniform and written.may_be_prefixed)
        ):  # fmt: skip
            groups.unmatched.append(key)
            continue
        roles = groups.layers.setdefault(written.layer, {})
        if name_and_role[1] in roles:
            groups.repeated.append(key)
        else:
            roles[name_and_role[1]] = key
            groups.written.append(written)
    return groups


def layout_of(keys: Collection[str], names: LayerNames) -> str:
    """Return the naming scheme of a LoRA file: kohya, lycoris, diffusers, comfy, peft, bare or other.

    "other" is a mixture, or a spelling that only this project reads.
    """
    groups = group_keys(keys, names)
    used = [key for roles in groups.layers.values() for key in roles.values()]
    is_usual = all(_USUAL_KEY.fullmatch(key) for key in used)
    found = {
        "other" if written.is_respelled else _LAYOUTS.get(written.prefix, "other")
        for written in groups.written
    }
    return found.pop() if len(found) == 1 and is_usual else "other"
