"""Options that save memory change no number of a training run."""

from __future__ import annotations

from pathlib import Path

import pytest

from modules.tensor_files import write_tensors
from tests.kandinsky5.training.training_runs import lora_bytes, metrics, train, write_dataset
from tests.tiny import tiny_dit

WHOLE = ("--override_dit", "{}", "--gradient_checkpointing", "--max_train_steps", 3)
SAVINGS = (
    ("--blocks_to_swap", 2),
    ("--blocks_to_swap", 1, "--block_swap_ring_size", 1, "--use_pinned_memory_for_block_swap"),
    ("--gradient_checkpointing_cpu_offload",),
    ("--gradient_checkpointing_keep_attention", 4),
    ("--sdpa", "--blocks_to_swap", 2, "--gradient_checkpointing_cpu_offload"),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("memory")
    dit = folder / "tiny.safetensors"
    write_tensors(dit, {key: value.detach() for key, value in tiny_dit().state_dict().items()})
    return dit, write_dataset(folder)


@pytest.mark.parametrize(
    "base",
    [(), ("--fp8_base", "--mixed_precision", "bf16"), ("--int8_base", "--mixed_precision", "bf16")],
    ids=["fp32", "fp8", "int8"],
)
def test_the_lora_is_the_same_to_the_bit(
    files: tuple[Path, Path], tmp_path: Path, base: tuple[object, ...]
) -> None:
    train(*files, tmp_path / "plain", *WHOLE, *base)
    expected = lora_bytes(tmp_path / "plain" / "lora.safetensors")
    losses = [record["loss"] for record in metrics(tmp_path / "plain", "step")]
    for number, saving in enumerate(SAVINGS):
        output = tmp_path / str(number)
        train(*files, output, *WHOLE, *base, *saving)
        assert [record["loss"] for record in metrics(output, "step")] == losses, saving
        assert lora_bytes(output / "lora.safetensors") == expected, saving


def test_a_dora_is_the_same_to_the_bit_on_swapped_float8_weights(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    words = (*WHOLE, "--fp8_base", "--mixed_precision", "bf16", "--network_args", "use_dora=True")
    outputs = []
    for number, saving in enumerate(((), ("--blocks_to_swap", 2, "--gradient_checkpointing_cpu_offload"))):
        train(*files, tmp_path / str(number), *words, *saving)
        outputs.append(lora_bytes(tmp_path / str(number) / "lora.safetensors"))
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) % 3 == 0
    assert any(name.endswith("lora_magnitude_vector") for name in outputs[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--blocks_to_swap", 3), "at most 2"),
        (("--gradient_checkpointing_keep_attention", 5), "at most 4"),
    ],
)
def test_more_than_the_model_has_is_refused_with_the_maximum(
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[object, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        train(*files, tmp_path / "out", *WHOLE, *words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_losses(files: tuple[Path, Path], tmp_path: Path) -> None:
    losses = []
    for name, words in (("eager", ()), ("compiled", ("--dynamo_backend", "EAGER"))):
        train(*files, tmp_path / name, *WHOLE, "--blocks_to_swap", 2, *words)
        losses.append([record["loss"] for record in metrics(tmp_path / name, "step")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dynamo_backend", "FX2TRT"), "torch has no compiler back end 'fx2trt'; it has: cudagraphs"),
        (("--compile", "--compile_backend", "inductr"), "torch has no compiler back end 'inductr'"),
        (("--dynamo_backend", "inductor", "--compile"), "give only one of them"),
        (
            ("--dynamo_backend", "inductor", "--dynamo_fullgraph", "--fp8_base"),
            "stay outside compiled graphs",
        ),
        (("--compile", "--compile_fullgraph", "--vram_budget", "8"), "--vram_budget may add --fp8_base"),
        (("--dynamo_backend", "eager", "--gradient_checkpointing_keep_attention", "1"), "compiled blocks"),
        (("--gradient_checkpointing_keep_attention", "1", "--force_nabla_attention"), "NABLA's compiled"),
        (("--compile", "--compile_fullgraph", "--force_nabla_attention"), "NABLA's attention stays outside"),
        (
            ("--compile", "--compile_mode", "reduce-overhead"),
            "--compile_mode reduce-overhead records CUDA graphs, which have not been tested in training; use "
            "--compile_backend inductor --compile_mode max-autotune-no-cudagraphs",
        ),
        (
            ("--dynamo_backend", "inductor", "--dynamo_mode", "max-autotune"),
            "use --dynamo_backend inductor --dynamo_mode max-autotune-no-cudagraphs",
        ),
        (("--dynamo_backend", "cudagraphs"), "--dynamo_backend cudagraphs records CUDA graphs"),
    ],
)
def test_compilers_that_cannot_act_are_refused_before_anything_loads(
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        train(*files, tmp_path / "out", *WHOLE, *words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_launcher_that_compiles_is_told_where_the_option_belongs(
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(SystemExit) as stop:
        train(*files, tmp_path / "out", *WHOLE)
    assert stop.value.code == 2
    assert "give the option to the training script" in capsys.readouterr().err
