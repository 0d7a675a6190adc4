"""The strength of a LoRA file is what its writer meant, whatever states it, and the log says what did."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft.utils.other import get_pattern_key

from modules.errors import ModelFileError
from networks import post_hoc_ema
from networks.lora_files import read_lora
from networks.lora_scales import first_match
from tests.lora_strengths import (
    LAYERS,
    PEFT_SETTINGS,
    Way,
    by_hand,
    by_peft,
    small_factors,
    small_model,
    weights_of,
)


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Way]:
    folder = tmp_path_factory.mktemp("ways")
    model = small_model()
    return {
        way.name: way
        for way in (*by_hand(folder, model), *(by_peft(folder, model, name) for name in PEFT_SETTINGS))
    }


def test_one_set_of_factors_is_read_at_the_same_strength_however_it_is_written(
    ways: dict[str, Way], caplog: pytest.LogCaptureFixture
) -> None:
    errors = {name: way.error(weights_of(small_model())) for name, way in ways.items()}
    assert len(errors) >= 12
    assert not {name: error for name, error in errors.items() if not error < 1e-6}
    assert "scale 1" not in caplog.text


def write(folder: Path, header: Mapping[str, str] | None = None, **beside: Any) -> Path:
    """A file of rank 4 without `.alpha` tensors, with settings beside it by the stem of their file."""
    factors = small_factors(small_model())
    tensors = {
        f"transformer.{layer}.lora_{half}.weight": factor
        for layer, pair in factors.items()
        for half, factor in zip("AB", pair, strict=True)
    }
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "some.safetensors", dict(header or {}))
    for stem, settings in beside.items():
        (folder / f"{stem}.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder / "some.safetensors"


def scale(path: Path) -> float:
    (found,) = {factors.scale for factors in read_lora(path, LAYERS).layers.values()}
    return found


TWELVE, EIGHT = {"r": 4, "lora_alpha": 12}, {"r": 4, "lora_alpha": 8}
OTHER = {"r": 8, "lora_alpha": 32}


@pytest.mark.parametrize(
    ("header", "beside", "expected", "words"),
    [
        ({}, {"adapter_config": TWELVE}, 3, "INFO .* its scale is that of adapter_config.json beside it: 3$"),
        ({"lora_alpha": "8"}, {}, 2, "INFO .* its metadata lora_alpha: 2$"),
        ({"alpha": "8", "r": "4"}, {"config_lora": EIGHT}, 2, "its metadata alpha: 2$"),
        ({}, {}, 1, "WARNING .*it is used at scale 1$"),
        # Settings of another LoRA: r shows it.
        ({}, {"config_lora": OTHER}, 1, "config_lora.json beside it is not used: r is 8 there"),
        ({}, {"config_lora": OTHER, "adapter_config": TWELVE}, 3, "adapter_config.json"),
        ({"ss_network_alpha": "16", "ss_network_dim": "32"}, {}, 1, "ss_network_alpha is not used: r is 32"),
        ({}, {"adapter_config": {**TWELVE, "rank_pattern": {"in_layer": 2}}}, 1, r"r is 2 .*in_layer"),
        # What is no alpha.
        ({"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, {}, 1, "not a number"),
        ({"text_encoder.lora_alpha": "8", "title": "alpha 3"}, {}, 1, "scale 1$"),
        ({"network_alpha": "0", "network_dim": "4"}, {}, 1, "network_alpha: 1$"),
        ({}, {"adapter_config": {"r": 4}}, 1, "scale 1$"),
        # The official settings that bear the file's name are the ones that count.
        ({}, {"some_config_lora": TWELVE, "config_lora": EIGHT}, 3, "some_config_lora.json"),
    ],
)  # fmt: skip
def test_the_scale_comes_from_the_first_source_that_fits_and_the_log_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, header: dict[str, str], beside: Any, expected: float,
    words: str,
) -> None:  # fmt: skip
    with caplog.at_level("INFO"):
        assert scale(write(tmp_path, header, **beside)) == expected
    lines = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    assert any(re.search(words, line) for line in lines), lines
    assert ("scale 1" in caplog.text) == (expected == 1.0 and "network_alpha: 1" not in words)


@pytest.mark.parametrize(
    ("header", "beside"),
    [
        ({"lora_alpha": "8"}, {"adapter_config": TWELVE}),
        ({"lora_alpha": "8", "network_alpha": "4"}, {}),
        ({}, {"adapter_config": TWELVE, "config_lora": {"r": 4, "lora_alpha": 8}}),
        ({}, {"adapter_config": TWELVE, "config_lora": {**TWELVE, "use_rslora": True}}),
        ({}, {"adapter_config": TWELVE, "config_lora": {**TWELVE, "alpha_pattern": {"in_layer": 1}}}),
    ],
)
def test_two_fitting_sources_that_disagree_are_an_error(
    tmp_path: Path, header: dict[str, str], beside: Any
) -> None:
    with pytest.raises(ModelFileError, match="two sources give it different scales: "):
        scale(write(tmp_path, header, **beside))


def test_alpha_tensors_count_and_a_header_that_contradicts_them_is_named(
    ways: dict[str, Way], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = safetensors.torch.load_file(ways["alpha tensors"].path)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"ss_network_alpha": "1"})
    (tmp_path / "config_lora.json").write_text('{"r": 4, "lora_alpha": 400}', encoding="utf-8")
    assert scale(tmp_path / "a.safetensors") == 3.0
    assert (
        "its .alpha tensors are used, with which its scale is 3; its metadata ss_network_alpha gives 0.25"
        in (caplog.text)
    )


def test_settings_that_may_be_those_of_the_file_they_belong_to_by_name_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, config_lora=TWELVE)
    (tmp_path / "lora.safetensors").write_bytes(path.read_bytes())
    assert scale(path) == 3.0
    assert "config_lora.json beside it may be that of lora.safetensors" in caplog.text
    caplog.clear()
    assert scale(tmp_path / "lora.safetensors") == 3.0
    assert "may be" not in caplog.text


@pytest.mark.parametrize("name", ["adapter_config", "config_lora", "some_config_lora"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ('{"lora_alpha": "8"}', "must be numbers"),
        ('{"lora_alpha": NaN}', "must be numbers"),
        ('{"lora_alpha": 1, "alpha_pattern": {"to_key": Infinity}}', "alpha_pattern must be numbers"),
        ('{"lora_alpha": 1, "rank_pattern": ["to_key"]}', "rank_pattern must be numbers"),
        ('{"lora_alpha": 1, "alpha_pattern": {"to_(": 1}}', "not a regular expression"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(a+)+b": 1}}', "repeats too much"),
        ('{"lora_alpha": 1' + "0" * 400 + "}", "a number of 401 digits"),
        ('{"use_dora": true}', "no magnitude vectors"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_settings_beside_the_file_that_cannot_be_used_are_errors(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    path = write(tmp_path)
    (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelFileError, match=words):
        read_lora(path, LAYERS)


def test_patterns_choose_layers_as_in_peft() -> None:
    names = [
        f"{kind}_transformer_blocks.{index}.{layer}"
        for kind in ("text", "visual")
        for index in (0, 1, 11)
        for layer in ("self_attention.to_query", "cross_attention.to_key", "feed_forward.in_layer")
    ]
    patterns = [
        "to_query", "query", "self_attention.to_query", r".*\.1\..*", r"visual.*", r"^text.*in_layer",
        r"visual_transformer_blocks\.(0|11)\.feed_forward\.in_layer", "attention.to_key", r"blocks.1.*",
        r"[a-z_]*_blocks\.\d+\.self_attention\.to_(query|key)", r"to_\w+$", "TO_QUERY",
        "visual_transformer_blocks.1.cross_attention.to_key", r"transformer_blocks\.0\..*",
    ]  # fmt: skip
    for first in patterns:
        for second in patterns:
            values = {first: 1.0, second: 2.0}
            for name in names:
                expected = values.get(get_pattern_key(list(values), name), 3.0)
                assert first_match(values, name, 3.0) == expected, (first, second, name)


def test_a_pattern_that_begins_with_the_component_counts() -> None:
    name = "visual_transformer_blocks.0.self_attention.to_query"
    assert first_match({f"transformer.{name}": 1.0}, name, None) == 1.0


def test_an_average_keeps_the_scale_that_lay_beside_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write(tmp_path / name, adapter_config=TWELVE) for name in ("a", "b")]
    output = tmp_path / "average.safetensors"
    post_hoc_ema.main([*map(str, paths), "--output_file", str(output)])
    assert scale(output) == 3.0
    other = write(tmp_path / "c", adapter_config=EIGHT)
    with pytest.raises(SystemExit):
        post_hoc_ema.main([str(paths[0]), str(other), "--output_file", str(output), "--overwrite"])
    assert "its scale is stated otherwise" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "is_whole"), [("LOHA", False), ("LOKR", False), ("LOKR", True)])
def test_loha_and_lokr_of_peft_have_the_scale_of_their_settings(
    tmp_path: Path, kind: str, is_whole: bool
) -> None:
    model = small_model()
    settings = {"r": 2 if not is_whole else 16, "alpha": 6, "target_modules": ["to_query", "in_layer"]}
    config = peft.LoHaConfig(**settings) if kind == "LOHA" else peft.LoKrConfig(**settings)
    trained = peft.get_peft_model(copy.deepcopy(model), config)  # type: ignore[arg-type]
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    trained.save_pretrained(tmp_path)
    merged = trained.merge_and_unload()
    lora = read_lora(tmp_path, LAYERS)
    for layer, weight in weights_of(model).items():
        change = merged.get_submodule(layer).weight - weight
        torch.testing.assert_close(lora.layers[layer].delta(), change, rtol=1e-4, atol=1e-4)
