"""Layouts of quantised checkpoints: ComfyUI's descriptions, and the names of what is not read."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from modules.int8 import quantise_rotated_rows
from modules.quantised_files import (
    describe_int8,
    find_rotations,
    quantise_as_stored,
    unfit_scales,
    unread_layout,
)
from modules.quantised_linear import dequantise
from modules.tensor_files import TensorInfo


class Source:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self._tensors = dict(tensors)
        self.metadata = dict(metadata or {})
        self.tensors = {n: TensorInfo(t.dtype, tuple(t.shape), 0, 0) for n, t in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    view = read


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def int8(description: str | None, width: int = 512) -> Source:
    tensors = {"a.weight": torch.zeros(8, width, dtype=torch.int8), "a.weight_scale": torch.ones(8, 1)}
    if description is not None:
        tensors["a.comfy_quant"] = as_bytes(description)
    return Source(tensors)


@pytest.mark.parametrize(
    ("description", "block"),
    [
        ('{"format": "int8_tensorwise"}', 1),
        ('{"format": "int8_tensorwise", "convrot": false, "convrot_groupsize": 256}', 1),
        ('{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 64}', 64),
        ('{"format": "int8_tensorwise", "convrot": true}', 256),
        ('{"format": "int8_tensorwise", "params": {"convrot": true, "convrot_groupsize": 16}}', 16),
        ('{"full_precision_matrix_mult": true, "format": "int8_tensorwise"}', 1),
    ],
)
def test_descriptions_name_the_rotation(description: str, block: int) -> None:
    assert find_rotations(int8(description)) == ({"a": block}, [])
    assert unread_layout(int8(description)) is None


def test_what_is_written_is_read_again() -> None:
    for block in (1, 16, 256):
        text = describe_int8(block).numpy().tobytes().decode()
        assert find_rotations(int8(text)) == ({"a": block}, [])
    assert json.loads(describe_int8(256).numpy().tobytes()) == {
        "format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256,
    }  # fmt: skip
    assert json.loads(describe_int8(1).numpy().tobytes()) == {"format": "int8_tensorwise"}


def test_the_metadata_of_earlier_files_describes_layers_too() -> None:
    layers = {"a": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    source = Source({"a.weight": torch.zeros(8, 64, dtype=torch.int8)}, metadata)
    assert find_rotations(source) == ({"a": 64}, [])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (int8(None), "a.weight is not described: no a.comfy_quant"),
        (int8('{"format": "float8_e4m3fn"}'), "a.weight is int8, described as float8_e4m3fn"),
        (int8('{"format": "int8_tensorwise", "convrot": true}', 128), "rotated in blocks of 256"),
        (int8('{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": "x"}'), "in blocks of x"),
        (int8('{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 8}'), "in blocks of 8"),
    ],
)
def test_int8_weights_that_cannot_be_understood_are_problems(source: Source, words: str) -> None:
    rotations, (problem,) = find_rotations(source)
    assert rotations == {}
    assert words in problem


def test_int8_weights_need_a_scale_that_fits() -> None:
    tensors = {"a.weight": torch.zeros(8, 4, dtype=torch.int8)}
    assert unfit_scales(Source(tensors).tensors, "") == ["a.weight has none"]
    assert "for a weight" in unfit_scales(Source({**tensors, "a.weight_scale": torch.ones(4)}).tensors, "")[0]
    for scale in (torch.ones(8, 1), torch.ones(8), torch.ones(()), torch.ones(1)):
        assert unfit_scales(Source({**tensors, "a.weight_scale": scale}).tensors, "") == []


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (int8('{"format": "nvfp4"}'), "an NVFP4 checkpoint"),
        (int8('{"format": "mxfp8"}'), "an MXFP8 checkpoint"),
        (int8('{"format": "convrot_w4a4"}'), "a 4-bit ConvRot checkpoint"),
        (int8('{"format": "later"}'), "a checkpoint in the layout later"),
        (int8('{"convrot": true, "per_row": true}'), "described without a format"),
        (int8("no object"), "described without a format"),
        (int8("[" * 10_000), "described without a format"),
        *(
            (Source({name: torch.zeros(1)}), kind)
            for name, kind in (
                ("a.weight_scale_2", "an NVFP4 checkpoint"),
                ("a.weight.quant_state.bitsandbytes__nf4", "a 4-bit bitsandbytes checkpoint"),
                ("a.weight.absmax", "a 4-bit bitsandbytes checkpoint"),
                ("a.wscales", "a 4-bit SVDQuant (Nunchaku) checkpoint"),
                ("a.qweight", "a GPTQ or AWQ checkpoint"),
                ("a.weight._data", "an optimum-quanto checkpoint"),
                ("a.weight.SCB", "an 8-bit bitsandbytes checkpoint"),
            )
        ),
    ],
)
def test_other_layouts_are_named_with_what_to_download(source: Source, kind: str) -> None:
    message = unread_layout(source)
    assert message is not None
    assert kind in message
    assert "Download" in message


@pytest.mark.parametrize("shape", [(8, 1), (8,), (), (1,)])
@pytest.mark.parametrize("block", [1, 64])
def test_int8_is_rounded_again_as_it_was_stored(shape: tuple[int, ...], block: int) -> None:
    values = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    stored, scale = quantise_as_stored(values, torch.int8, shape, block)
    assert scale is not None
    assert scale.shape == shape
    restored = dequantise(stored, scale, torch.float32, block)
    assert (restored - values).norm() / values.norm() < 1.2e-2
    again, same = quantise_as_stored(restored, torch.int8, shape, block)
    assert same is not None
    torch.testing.assert_close(same, scale)
    assert (again - stored).abs().max() <= 1
    if shape == (8, 1) and block == 64:
        assert torch.equal(stored, quantise_rotated_rows(values)[0])
