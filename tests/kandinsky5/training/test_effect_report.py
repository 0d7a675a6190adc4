"""The report on a saved LoRA: how far it moves weights and predictions, where it is written, when it goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kandinsky5.training import control
from kandinsky5.training.results.effect_report import EffectReport
from kandinsky5.training.validation.prediction_change import PredictionChange
from networks.lora_effect import LoraEffect
from tests.kandinsky5.training.training_runs import lora_bytes, metrics, train

SAVES = ("--max_train_steps", 4, "--save_every_n_steps", 2)


def changes(output: Path) -> list[list[float]]:
    """Of the prediction at each timestep, one list per saved file."""
    return [[part["change"] for part in record["prediction"]] for record in metrics(output, "lora")]


def test_every_saved_file_has_a_report_beside_it(
    dit: Path, dataset: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    train(dit, dataset, tmp_path, *SAVES, "--ema_decay", 0.5)
    loras = {path.stem for path in tmp_path.glob("*.safetensors")}
    assert loras == {path.name.removesuffix("_effect.txt") for path in tmp_path.glob("*_effect.txt")}
    assert len(loras) == 6
    text = (tmp_path / "lora_effect.txt").read_text(encoding="utf-8")
    for part in ("after step 4", "32x32x5", "text_transformer_blocks.0", "0 of 16", "all blocks"):
        assert part in text
    (record,) = [r for r in metrics(tmp_path, "lora") if r["file"] == "lora.safetensors"]
    for part in record["prediction"]:
        percent = f"{100 * part['change']:.3g}%"
        assert f"{part['timestep']:>8}  {percent}" in text
        assert f"{percent} at timestep {part['timestep']}" in said.text
    assert [part["timestep"] for part in record["prediction"]] == [250, 500, 750]


def test_predictions_move_further_as_training_goes_on_and_averages_lag(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    train(dit, dataset, tmp_path, *SAVES, "--ema_decay", 0.9)
    early, early_average, late, late_average, final, _ = changes(tmp_path)
    assert all(0 < a < b for a, b in zip(early, late, strict=True))
    assert all(a < b for a, b in zip(early_average, early, strict=True))
    assert all(a < b for a, b in zip(late_average, late, strict=True))
    assert final == late


@pytest.mark.parametrize(
    ("words", "task"),
    [
        (("--fp8_base", "--mixed_precision", "bf16", "--gradient_checkpointing"), "k5-tiny-t2v"),
        (("--int8_base", "--mixed_precision", "bf16"), "k5-tiny-t2v"),
        (("--gradient_checkpointing", "--blocks_to_swap", 1, "--override_dit", "{}"), "k5-tiny-t2v"),
        (("--network_module", "networks.loha", "--lora_format", "kohya"), "k5-tiny-t2v"),
        (("--network_module", "networks.lokr", "--lora_format", "kohya"), "k5-tiny-t2v"),
        (
            ("--optimizer_type", "tests.kandinsky5.training.test_train_saved.ThirdsScheduleFree"),
            "k5-tiny-t2v",
        ),
        (("--network_dropout", 0.5, "--network_args", "module_dropout=0.5"), "k5-tiny-i2v"),
    ],
    ids=["fp8", "int8", "swap", "loha", "lokr", "schedule-free", "i2v"],
)
def test_measuring_works_in_all_modes_and_moves_nothing(
    words: tuple[object, ...], task: str, dit: Path, dataset: Path, tmp_path: Path, tiny_models: Path
) -> None:
    """A run that saves after every step ends in the same bytes as one that saves once."""
    dit = tiny_models / "model" / "tiny.safetensors" if "{}" in words else dit  # blocks enough to swap
    words = ("--max_train_steps", 3, "--learning_rate", 0.02, *words)
    before = torch.get_rng_state()
    train(dit, dataset, tmp_path / "once", *words, task=task)
    train(dit, dataset, tmp_path / "often", *words, "--save_every_n_steps", 1, task=task)
    assert torch.equal(before, torch.get_rng_state())
    assert lora_bytes(tmp_path / "once/lora.safetensors") == lora_bytes(tmp_path / "often/lora.safetensors")
    first, *_, last = changes(tmp_path / "often")
    assert all(0 < change < 1 for change in last)
    assert last != first
    assert changes(tmp_path / "once") == [last]


def test_the_base_model_is_asked_once(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled: list[bool] = []
    plain = PredictionChange.predict

    def counting(self: PredictionChange, sigma: float) -> torch.Tensor:
        enabled.append(self._network.is_enabled)
        assert not self._network.training
        return plain(self, sigma)

    monkeypatch.setattr(PredictionChange, "predict", counting)
    train(dit, dataset, tmp_path, *SAVES)
    assert enabled == [False] * 3 + [True] * 9


def test_a_run_that_is_stopped_does_not_wait_for_predictions(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "take_control_word", lambda _names: "stop")
    train(dit, dataset, tmp_path, *SAVES)
    (record,) = metrics(tmp_path, "lora")
    assert record["prediction"] is None
    assert record["change"] > 0
    assert "not measured" in (tmp_path / "lora-step00000001_effect.txt").read_text(encoding="utf-8")


def test_reports_go_with_their_files(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 5, "--save_every_n_steps", 1, "--save_last_n_steps", 1)
    reports = sorted(path.name for path in tmp_path.glob("*_effect.txt"))
    assert reports == ["lora-step00000004_effect.txt", "lora-step00000005_effect.txt", "lora_effect.txt"]
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--overwrite")
    assert [path.name for path in tmp_path.glob("*_effect.txt")] == ["lora_effect.txt"]


def test_weights_that_move_too_little_for_any_prediction_are_a_warning(
    said: pytest.LogCaptureFixture,
) -> None:
    weights = LoraEffect(change=1e-9, blocks={"b.0": 1e-9}, unchanged=(), layers=("b.0.a",))
    EffectReport("x.safetensors", 1, weights, {250: 0.0, 500: 0.0}, "32x32x5").log()
    assert "x.safetensors DOES NOTHING YET" in said.text
    said.clear()
    EffectReport("x.safetensors", 1, weights, {250: 0.0, 500: 1e-9}, "32x32x5").log()
    assert "NOTHING" not in said.text


def test_layers_without_change_are_counted_by_block_and_named() -> None:
    weights = LoraEffect(
        change=0.1, blocks={"b.0": 0.2, "b.1": 0.0}, unchanged=("b.1.a",), layers=("b.0.a", "b.0.c", "b.1.a")
    )
    text = EffectReport("x.safetensors", 7, weights, None, "").text()
    lines = [line.split() for line in text.splitlines()]
    assert ["b.0", "20%", "0", "of", "2"] in lines
    assert ["b.1", "0%", "1", "of", "1"] in lines
    assert lines[-1] == ["b.1.a"]
