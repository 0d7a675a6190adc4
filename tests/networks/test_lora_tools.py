"""The commands that convert, merge, average and describe LoRA files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modules.tensor_files import read_tensors, write_tensors
from networks import convert_lora, inspect_lora, merge_lora, merging, post_hoc_ema
from networks.convert_lora import TARGETS
from networks.lora import LoRANetwork
from networks.lora_files import read_lora
from networks.lora_kandinsky import create_network, known_layer_names
from networks.lora_keys import LayerNames, layout_of
from networks.lora_saving import save_lora, with_hashes
from networks.post_hoc_ema import decay_rates, power_of_sigma_rel
from tests.tiny import tiny_dit

TARGET = "visual_transformer_blocks.0.feed_forward.in_layer"


@pytest.fixture(scope="module")
def network() -> LoRANetwork:
    """Of rank 4 and alpha 3, on one block of each kind."""
    network = create_network(
        tiny_dit(num_visual_blocks=1, num_text_blocks=1),
        network_dim=4,
        network_alpha=3.0,
        network_dropout=None,
        network_args={},
        seed=0,
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return network


def deltas(path: Path) -> dict[str, torch.Tensor]:
    return {name: layer.delta() for name, layer in read_lora(path, known_layer_names()).layers.items()}


def fails(main: object, argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(argv)  # type: ignore[operator]
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source_format", ["kohya", "diffusers"])
def test_a_round_trip_through_any_layout_keeps_the_change(
    network: LoRANetwork, tmp_path: Path, target: str, source_format: str
) -> None:
    source, there, back = (tmp_path / f"{name}.safetensors" for name in ("source", "there", "back"))
    metadata = {"trigger": "dolly in", "ss_seed": "1"}
    save_lora(network, source, lora_format=source_format, save_precision=torch.float32, metadata=metadata)  # type: ignore[arg-type]
    convert_lora.main(["--input", str(source), "--output", str(there), "--target", target])
    convert_lora.main(["--input", str(there), "--output", str(back), "--target", "default"])
    for path in (there, back):
        for name, delta in deltas(path).items():
            torch.testing.assert_close(delta, network.adapters[name].factors().delta(), rtol=1e-5, atol=1e-7)
    tensors, written = read_tensors(there)
    expected = {"default": "kohya", "other": "comfy", "official": "peft"}.get(target, target)
    assert layout_of(tensors, LayerNames(known_layer_names())) == expected
    assert written["trigger"] == "dolly in"
    assert written["sshs_model_hash"] == with_hashes(tensors, {})["sshs_model_hash"]
    assert len(tensors) == len(network.adapters) * (3 if target == "default" else 2)


def test_converted_names_are_those_of_the_model(network: LoRANetwork, tmp_path: Path) -> None:
    save_lora(network, tmp_path / "a.safetensors", lora_format="kohya")
    for prefix, expected in (("transformer", "transformer."), ("", "")):
        output = tmp_path / f"b{prefix}.safetensors"
        argv = ["--input", str(tmp_path / "a.safetensors"), "--output", str(output), "--target", "other"]
        convert_lora.main([*argv, "--diffusers_prefix", prefix])
        assert f"{expected}{TARGET}.lora_A.weight" in read_tensors(output)[0]


def test_the_dtype_of_the_factors_is_kept(network: LoRANetwork, tmp_path: Path) -> None:
    save_lora(network, tmp_path / "a.safetensors", lora_format="kohya", save_precision=torch.float16)
    argv = ["--input", str(tmp_path / "a.safetensors"), "--output", str(tmp_path / "b.safetensors")]
    convert_lora.main([*argv, "--target", "diffusers"])
    tensors, _ = read_tensors(tmp_path / "b.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_the_converter_refuses_foreign_layers_and_existing_files(
    network: LoRANetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_lora(network, source)
    output.write_bytes(b"mine")
    argv = ["--input", str(source), "--output", str(output), "--target", "comfy"]
    code, text = fails(convert_lora.main, argv, capsys)
    assert (code, "exists already" in text) == (2, True)
    assert output.read_bytes() == b"mine"
    convert_lora.main([*argv, "--overwrite"])
    argv[3] = str(source)
    assert fails(convert_lora.main, [*argv, "--overwrite"], capsys)[0] == 2
    tensors, _ = read_tensors(source)
    tensors["transformer.single_blocks.0.linear1.lora_A.weight"] = torch.ones(4, 4)
    write_tensors(source, tensors)
    argv[3] = str(output)
    code, text = fails(convert_lora.main, [*argv, "--overwrite"], capsys)
    assert (code, "single_blocks.0.linear1" in text) == (4, True)


def test_merging_by_command_adds_the_changes(
    network: LoRANetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dit = tiny_dit(num_visual_blocks=1, num_text_blocks=1)
    tensors = dict(dit.state_dict())
    tensors[f"{TARGET}.weight"] = tensors[f"{TARGET}.weight"].bfloat16()
    write_tensors(tmp_path / "dit.safetensors", tensors, {"format": "pt"})
    save_lora(network, tmp_path / "lora.safetensors", save_precision=torch.float32)
    output = tmp_path / "merged.safetensors"
    lora = str(tmp_path / "lora.safetensors")
    argv = ["--dit", str(tmp_path / "dit.safetensors"), "--save_merged_model", str(output)]
    merge_lora.main([*argv, "--lora_weight", lora, lora, "--lora_multiplier", "0.5"])
    merged, metadata = read_tensors(output)
    delta = network.adapters[TARGET].factors().delta()
    expected = (tensors[f"{TARGET}.weight"].float() + 1.5 * delta).bfloat16()
    # One rounding; the order of the float32 sums may decide a tie.
    torch.testing.assert_close(merged[f"{TARGET}.weight"], expected, rtol=2**-7, atol=0)
    assert metadata["format"] == "pt"
    assert [entry["multiplier"] for entry in json.loads(metadata["ss_merged_loras"])] == [0.5, 1.0]
    assert fails(merge_lora.main, [*argv, "--lora_weight", lora], capsys)[0] == 2  # exists
    argv[3] = str(tmp_path / "new.safetensors")
    for numbers in (["1", "2"], ["nan"]):
        words = ["--lora_weight", lora, "--lora_multiplier", *numbers]
        assert fails(merge_lora.main, [*argv, *words], capsys)[0] == 2
    argv[1] = lora
    code, text = fails(merge_lora.main, [*argv, "--lora_weight", lora], capsys)
    assert (code, "not a Kandinsky 5 DiT" in text) == (4, True)
    assert not (tmp_path / "new.safetensors").exists()


@pytest.fixture
def merge_words(network: LoRANetwork, tmp_path: Path) -> dict[str, str]:
    """Options of a merge that works; tests change single ones."""
    dit = dict(tiny_dit(num_visual_blocks=1, num_text_blocks=1).state_dict())
    write_tensors(tmp_path / "dit.safetensors", dit)
    save_lora(network, tmp_path / "lora.safetensors")
    names = {"--dit": "dit", "--lora_weight": "lora", "--save_merged_model": "merged"}
    return {option: str(tmp_path / f"{name}.safetensors") for option, name in names.items()}


def words_of(options: dict[str, str]) -> list[str]:
    return [word for pair in options.items() for word in pair]


@pytest.mark.parametrize("number", ["nan", "inf", "1e40", "1001"])
def test_multipliers_that_are_no_strengths_are_refused(
    merge_words: dict[str, str], capsys: pytest.CaptureFixture[str], number: str
) -> None:
    words = [*words_of(merge_words), "--lora_multiplier", number]
    assert fails(merge_lora.main, words, capsys)[0] == 2


@pytest.mark.parametrize(
    ("dtype", "value", "scale"),
    [
        (torch.float16, 1.0, None),
        (torch.bfloat16, float("nan"), None),
        (torch.float8_e4m3fn, 1.0, float("nan")),
    ],
)
def test_a_merged_tensor_that_is_not_finite_is_named_and_nothing_is_left_behind(
    network: LoRANetwork,
    merge_words: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dtype: torch.dtype,
    value: float,
    scale: float | None,
) -> None:
    """A strong LoRA in float16, a damaged weight, a damaged scale."""
    tensors, _ = read_tensors(tmp_path / "dit.safetensors")
    tensors[f"{TARGET}.weight"] = (tensors[f"{TARGET}.weight"] * value).to(dtype)
    if scale is not None:
        tensors[f"{TARGET}.scale_weight"] = torch.tensor(scale)
    write_tensors(tmp_path / "dit.safetensors", tensors)
    strong, _ = read_tensors(tmp_path / "lora.safetensors")
    key = f"transformer.{TARGET}.lora_B.weight"
    write_tensors(tmp_path / "lora.safetensors", {**strong, key: strong[key].float() * 1e4})
    words = [*words_of(merge_words), "--lora_multiplier", "1000"]
    code, text = fails(merge_lora.main, words, capsys)
    assert code == 4
    assert f"{TARGET}." in text
    assert "holds NaN or infinite values once the LoRAs are added" in text
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "dit.safetensors",
        "lora.safetensors",
        "lora_config_lora.json",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.ones(4, 4, dtype=torch.int16)}, "weights of type int16"),
        ({"weight": torch.ones(4, 4, dtype=torch.int8)}, "do not fit their weights"),
        (
            {"weight": torch.ones(4, 4, dtype=torch.int8), "weight_scale": torch.ones(4, 1)},
            "int8 weights cannot be read",
        ),
        (
            {"weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "scale_weight": torch.ones(3)},
            r"do not fit their weights",
        ),
    ],
)
def test_weights_that_nothing_can_be_added_to_are_refused(
    merge_words: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, torch.Tensor],
    words: str,
) -> None:
    tensors, _ = read_tensors(tmp_path / "dit.safetensors")
    changed = {f"{TARGET}.{role}": tensor for role, tensor in change.items()}
    write_tensors(tmp_path / "dit.safetensors", {**tensors, **changed})
    code, text = fails(merge_lora.main, words_of(merge_words), capsys)
    assert (code, words in text) == (4, True)


def test_a_device_that_is_not_there_is_told(
    merge_words: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = fails(merge_lora.main, [*words_of(merge_words), "--device", "foo"], capsys)
    assert (code, "--device foo cannot be used" in text) == (5, True)


def test_a_device_without_memory_for_one_tensor_is_told(
    merge_words: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("patched")

    monkeypatch.setattr(merging, "add_deltas", fail)
    code, text = fails(merge_lora.main, words_of(merge_words), capsys)
    assert (code, "use --device cpu" in text) == (5, True)
    assert not Path(merge_words["--save_merged_model"]).exists()


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [
        ("merged.txt", 2, "must end in .safetensors"),
        ("merged", 2, "must end in .safetensors"),
        ("file/merged.safetensors", 5, "is a file; name a folder"),
        (f"{'x' * 250}.safetensors", 2, "bytes"),
    ],
)
def test_outputs_that_cannot_be_written_or_read_again_are_refused(
    merge_words: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    output: str,
    code: int,
    said: str,
) -> None:
    (tmp_path / "file").write_bytes(b"")
    place = str(tmp_path / output)
    found, text = fails(merge_lora.main, words_of({**merge_words, "--save_merged_model": place}), capsys)
    assert (found, said in text) == (code, True)
    lora = merge_words["--lora_weight"]
    words = ["--input", lora, "--output", place, "--target", "comfy"]
    found, text = fails(convert_lora.main, words, capsys)
    assert (found, said in text) == (code, True)
    found, text = fails(post_hoc_ema.main, [lora, lora, "--output_file", place], capsys)
    assert (found, said in text) == (code, True)


def test_a_full_disk_is_told_by_every_tool(
    merge_words: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora, place = merge_words["--lora_weight"], str(tmp_path / "new.safetensors")
    commands = (
        (merge_lora.main, words_of({**merge_words, "--save_merged_model": place})),
        (convert_lora.main, ["--input", lora, "--output", place, "--target", "comfy"]),
        (convert_lora.main, ["--input", lora, "--output", place, "--target", "default"]),
        (post_hoc_ema.main, [lora, lora, "--output_file", place]),
    )
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
        code, text = fails(*commands[0], capsys)
        assert (code, "MB are free on this disk" in text) == (5, True)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for main, words in commands:
        code, text = fails(main, words, capsys)
        assert (code, "new.safetensors cannot be written: No space left" in text) == (5, True)
        assert not Path(place).exists()
    assert not list(tmp_path.glob(".k5tmp-*"))


def test_a_prefix_is_taken_with_the_target_that_has_one(
    merge_words: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--input", merge_words["--lora_weight"], "--output", str(tmp_path / "new.safetensors")]
    words += ["--target", "diffusers", "--diffusers_prefix", "foo"]
    code, text = fails(convert_lora.main, words, capsys)
    assert (code, "use --target other" in text) == (2, True)


def test_a_scale_that_the_dtype_cannot_take_is_not_folded(
    network: LoRANetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_lora(network, source, lora_format="kohya", save_precision=torch.float16)
    tensors, _ = read_tensors(source)
    alphas = {key: torch.tensor(1e7) for key in tensors if key.endswith(".alpha")}
    write_tensors(source, tensors | alphas)
    words = ["--input", str(source), "--output", str(output), "--target", "comfy"]
    code, text = fails(convert_lora.main, words, capsys)
    assert (code, "too large for float16" in text) == (4, True)
    assert not output.exists()


def test_averages_follow_the_closed_form(network: LoRANetwork, tmp_path: Path) -> None:
    names = [tmp_path / f"{index}.safetensors" for index in range(3)]
    key = "lora_unet_visual_transformer_blocks_0_feed_forward_in_layer.lora_up.weight"
    values = []
    for index, path in enumerate(names):
        save_lora(network, path, lora_format="kohya", save_precision=torch.float32)
        tensors, _ = read_tensors(path)
        tensors[key] += index
        values.append(tensors[key])
        write_tensors(path, tensors, {"ss_epoch": str(index)})
        os.utime(path, (100 - index, 100 - index))  # the last written is the oldest
    output = tmp_path / "ema.safetensors"
    argv = [*map(str, names), "--output_file", str(output)]
    post_hoc_ema.main([*argv, "--beta", "0.9", "--no_sort"])
    averaged, metadata = read_tensors(output)
    torch.testing.assert_close(averaged[key], 0.81 * values[0] + 0.09 * values[1] + 0.1 * values[2])
    assert metadata["ss_epoch"] == "2"
    post_hoc_ema.main([*argv, "--beta", "0.5", "--beta2", "0.75", "--overwrite"])
    averaged, metadata = read_tensors(output)
    torch.testing.assert_close(averaged[key], 0.75 * (values[2] + values[1]) / 2 + 0.25 * values[0])
    assert metadata["ss_epoch"] == "0"


def test_sigma_rel_gives_the_power_function_of_the_paper() -> None:
    for sigma_rel in (0.05, 0.15, 0.25):
        gamma = power_of_sigma_rel(sigma_rel)
        width = (
            (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))
        ) ** 0.5  # std of t with density ~ t^gamma on 0..1
        assert width == pytest.approx(sigma_rel)
        rates = decay_rates(3, beta=0.0, beta2=None, sigma_rel=sigma_rel)
        assert rates == pytest.approx([0.0, 0.5 ** (gamma + 1), (2 / 3) ** (gamma + 1)])


def test_averaging_refuses_what_does_not_belong_together(
    network: LoRANetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, output = (tmp_path / f"{name}.safetensors" for name in "abc")
    for path in (first, second):
        save_lora(network, path, lora_format="kohya")
    tensors, _ = read_tensors(second)
    alpha = next(key for key in tensors if key.endswith(".alpha"))
    argv = [str(first), str(second), "--output_file", str(output)]
    for change, words in (({alpha: torch.tensor(7.0)}, alpha), ({"extra": torch.ones(1)}, "extra")):
        write_tensors(second, {**tensors, **change})
        code, text = fails(post_hoc_ema.main, argv, capsys)
        assert (code, words in text) == (4, True)
    for bad in ([argv[0], *argv[2:]], [*argv, "--sigma_rel", "0.9"], [*argv, "--sigma_rel", "nan"]):
        assert fails(post_hoc_ema.main, bad, capsys)[0] == 2
    for bad in ([*argv, "--beta", "2"], [*argv, "--sigma_rel", "0.1", "--beta2", "0.5"]):
        assert fails(post_hoc_ema.main, bad, capsys)[0] == 2
    assert not output.exists()


def test_the_report_names_ranks_norms_and_readers(
    network: LoRANetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lora.safetensors"
    save_lora(network, path, metadata={"trigger": "dolly in", "note": "a\x1b[2Jb"})
    inspect_lora.main([str(path)])
    text = capsys.readouterr().out
    assert "ranks: 4" in text
    assert "trigger words: dolly in" in text
    assert "diffusers layout" in text
    assert "\x1b" not in text
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert rows["diffusers"].endswith("yes")
    assert "convert" in rows["musubi-tuner"]
    norm = float(rows["text_transformer_blocks.0"].split()[-1])
    inside = [
        a.factors().delta().square().sum() for name, a in network.adapters.items() if name.startswith("text")
    ]
    assert norm == pytest.approx(float(sum(inside)) ** 0.5, rel=1e-2)  # the file is bfloat16
    code, _ = fails(inspect_lora.main, [str(tmp_path / "none.safetensors")], capsys)
    assert code == 4
