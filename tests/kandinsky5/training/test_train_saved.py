"""What is said and kept beside a saved LoRA: its effect on the model, and the average of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kandinsky5.configs.train import ROOM_FOR_ENDINGS
from kandinsky5.training import control
from kandinsky5.training.results.names import ResultNames, average_path, effect_path
from kandinsky5.training.results.state import read_state
from kandinsky5.training.sample_files import SampledPrompt, SampleNames
from modules.file_names import MAX_NAME_BYTES
from modules.tensor_files import read_header, read_tensors
from networks.lora_scales import lora_config_path
from tests.kandinsky5.training.training_runs import exit_code, lora_bytes, metrics, train


class ThirdsScheduleFree(torch.optim.SGD):
    """Its "average" is three times the trained weights; the way there and back rounds."""

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(3.0)

    @torch.no_grad()
    def train(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.div_(3.0)


def test_every_save_reports_how_much_the_lora_changes(
    dit: Path, dataset: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    words = ("--max_train_steps", 4, "--save_every_n_steps", 2, "--fp8_base", "--gradient_checkpointing")
    train(dit, dataset, tmp_path, *words, "--logging_dir", tmp_path / "logs")
    records = metrics(tmp_path, "lora")
    assert [(r["step"], r["file"]) for r in records] == [
        (2, "lora-step00000002.safetensors"),
        (4, "lora-step00000004.safetensors"),
        (4, "lora.safetensors"),
    ]
    assert 0 < records[0]["change"] < records[1]["change"] < 0.1
    assert set(records[0]["blocks"]) == {"text_transformer_blocks.0", "visual_transformer_blocks.0"}
    assert (records[0]["layers"], records[0]["unchanged"]) == (16, [])
    assert "0 of 16 layers are unchanged" in said.text
    assert "DOES NOTHING" not in said.text


def test_a_lora_that_does_nothing_is_a_loud_warning(
    dit: Path, dataset: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    warm_up = ("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 5)
    train(dit, dataset, tmp_path, "--max_train_steps", 1, *warm_up)
    assert "lora.safetensors DOES NOTHING" in said.text
    (record,) = metrics(tmp_path, "lora")
    assert record["change"] == 0.0
    assert len(record["unchanged"]) == record["layers"]


def test_the_average_is_saved_beside_and_resumed_to_the_same_bytes(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--max_train_steps", 5, "--ema_decay", 0.7, "--save_state", "--save_every_n_steps", 2)
    words = (*words, "--save_last_n_steps", 1)
    train(dit, dataset, tmp_path / "plain", "--max_train_steps", 5)
    train(dit, dataset, tmp_path / "whole", *words)
    plain_word = control.take_control_word
    calls = iter(range(1, 99))
    with monkeypatch.context() as patch:
        patch.setattr(control, "take_control_word", lambda n: "stop" if next(calls) == 3 else plain_word(n))
        train(dit, dataset, tmp_path / "parts", *words)
    train(dit, dataset, tmp_path / "parts", *words, "--resume", "auto")
    for name in ("lora.safetensors", "lora-ema.safetensors"):
        assert lora_bytes(tmp_path / "whole" / name) == lora_bytes(tmp_path / "parts" / name)
    averages = [read_state(tmp_path / name / "lora-state").average for name in ("whole", "parts")]
    assert averages[0] is not None
    assert averages[1] is not None
    assert all(torch.equal(averages[0][key], averages[1][key]) for key in averages[0])

    whole = tmp_path / "whole"
    assert lora_bytes(tmp_path / "plain/lora.safetensors") == lora_bytes(whole / "lora.safetensors")
    assert lora_bytes(whole / "lora-ema.safetensors") != lora_bytes(whole / "lora.safetensors")
    assert read_header(whole / "lora-ema.safetensors").metadata["ss_ema_decay"] == "0.7"
    assert (
        read_tensors(whole / "lora-ema.safetensors")[0].keys()
        == lora_bytes(whole / "lora.safetensors").keys()
    )
    kept = sorted(path.name for path in whole.glob("lora-step*.safetensors"))
    assert kept == ["lora-step00000004-ema.safetensors", "lora-step00000004.safetensors"]
    train(dit, dataset, whole, "--max_train_steps", 1, "--overwrite")
    assert not list(whole.glob("*-ema*"))


def test_saving_averaged_weights_does_not_move_those_in_training(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    optimizer = f"{ThirdsScheduleFree.__module__}.ThirdsScheduleFree"
    words = ("--optimizer_type", optimizer, "--learning_rate", 0.1, "--max_train_steps", 4)
    train(dit, dataset, tmp_path / "once", *words)
    train(dit, dataset, tmp_path / "often", *words, "--save_every_n_steps", 1)
    assert lora_bytes(tmp_path / "once/lora.safetensors") == lora_bytes(tmp_path / "often/lora.safetensors")
    losses = [[r["loss"] for r in metrics(tmp_path / name, "step")] for name in ("once", "often")]
    assert losses[0] == losses[1]
    with pytest.raises(SystemExit) as caught:
        train(dit, dataset, tmp_path / "ema", *words, "--ema_decay", 0.9)
    assert caught.value.code == 2


def test_the_average_can_begin_in_a_resumed_run(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state")
    train(dit, dataset, tmp_path, "--max_train_steps", 2, "--resume", "auto", "--ema_decay", 0.9)
    assert (tmp_path / "lora-ema.safetensors").is_file()


@pytest.mark.parametrize("words", [("--ema_decay", 1), ("--ema_decay", 0)])
def test_shares_without_sense_are_refused(
    words: tuple[object, ...], dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        train(dit, dataset, tmp_path, *words)
    assert caught.value.code == 2
    assert "--ema_decay: must lie between 0 and 1" in capsys.readouterr().err


def test_the_longest_output_name_leaves_room_for_every_file_of_a_run(tmp_path: Path) -> None:
    name = "x" * (MAX_NAME_BYTES - ROOM_FOR_ENDINGS)
    outputs = ResultNames(tmp_path, name)
    samples = SampleNames(tmp_path, name, "id")
    step = 10**9  # one digit more than the pattern has
    paths = [outputs.config, outputs.validation_plot, outputs.report, outputs.control, outputs.lock]
    for lora in (outputs.lora("step", step), outputs.lora("epoch", step)):
        for file in (lora, average_path(lora)):
            paths += [file, effect_path(file), lora_config_path(file)]
    paths.append(tmp_path / f".k5old-4294967295-{outputs.state('step', step).name}")
    stem = samples.stem(0, step, SampledPrompt(999, "x", 2**63))
    paths.append(tmp_path / f"{stem}.mp4")
    paths += [samples.grid(999), samples.steps_video(999)]
    too_long = [path.name for path in paths if len(path.name.encode()) > MAX_NAME_BYTES]
    assert not too_long


@pytest.mark.parametrize("name", ["日" * 78, "CON", "nul", "lora.", "a\x01b", "a\0b"])
def test_a_name_that_could_not_be_saved_is_refused_at_the_start(
    name: str, dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(dit, dataset, tmp_path / "out", "--output_name", name) == 2
    assert "--output_name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
