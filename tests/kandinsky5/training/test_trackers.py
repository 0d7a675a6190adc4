"""Trackers: what they are given, that they continue, and that one which fails costs curves and nothing else.

wandb is no dependency: a stand-in with the signatures of its version 0.31 takes its place, unless it is
installed and a test asks for the real one.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kandinsky5.training import control
from kandinsky5.training import trainer as training
from kandinsky5.training.results.names import ResultNames
from kandinsky5.training.sample_files import SampledPrompt, SampleNames, write_sample
from kandinsky5.training.tracking import trackers
from kandinsky5.training.tracking.animation import animate
from tests.kandinsky5.training.training_runs import SMALLER, lora_bytes, metrics, train

KEY = "canary0123456789canary0123456789canary00"
SETTINGS = ("api_key", "base_url", "console", "disable_git", "save_code", "x_disable_meta")
"""Names that `wandb.Settings` of version 0.31.0 has, read there; it refuses all others with a ValueError."""


class FakeError(Exception):
    """`wandb.Error`."""


class FakeRun:
    """What the tracker uses of `wandb.sdk.wandb_run.Run`."""

    def __init__(self, arguments: dict[str, Any], starting_step: int) -> None:
        self.arguments, self.starting_step = arguments, starting_step
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.exit_code: int | None = None
        self.fails_from = 10**9

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        assert step is not None
        assert not self.logged or step >= self.logged[-1][0], "wandb drops steps that go back"  # pyright: ignore
        if step >= self.fails_from:
            raise FakeError("the service is gone")
        self.logged.append((step, data))

    def finish(self, exit_code: int | None = None) -> None:
        self.exit_code = exit_code

    def steps(self, name: str) -> list[int | None]:
        return [step for step, data in self.logged if name in data]


class FakeWandb(ModuleType):
    """The module; remembers the last step of every run id, as the server does."""

    Error = FakeError

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)
        self.runs: list[FakeRun] = []
        self.refuses = False

    def Settings(self, **settings: Any) -> dict[str, Any]:
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            # In pydantic's words, which shorten long values in the middle.
            raise ValueError(
                f"1 validation error for Settings\n{unknown[0]}\n  Extra inputs are not permitted "
                f"[type=extra_forbidden, input_value='{KEY[:23]}...{KEY[-23:]}', input_type=str]"
            )
        return settings

    def Video(
        self, data_or_path: str, caption: str | None = None, format: str | None = None
    ) -> tuple[str, ...]:
        assert Path(data_or_path).is_file()
        return "video", data_or_path, str(format)

    def Image(self, data_or_path: str, mode: str | None = None) -> tuple[str, str]:
        assert Path(data_or_path).is_file()
        return "image", data_or_path

    def init(
        self,
        entity: str | None = None,
        project: str | None = None,
        dir: str | None = None,
        id: str | None = None,
        name: str | None = None,
        tags: list[str] | None = None,
        config: dict[str, Any] | None = None,
        mode: str | None = None,
        resume: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> FakeRun:
        arguments = dict(locals())
        if self.refuses:
            raise FakeError(f"no permission for {settings}")
        earlier = [run for run in self.runs if run.arguments["id"] == id and resume == "allow"]
        steps = [step for run in earlier for step, _ in run.logged if step is not None]
        self.runs.append(FakeRun(arguments, max(steps, default=-1) + 1))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int | str | None, str]:
    with pytest.raises(SystemExit) as caught:
        train(*words)
    return caught.value.code, capsys.readouterr().err


def test_wandb_gets_the_curves_of_a_run_and_no_key_is_kept(
    dit: Path, dataset: Path, tmp_path: Path, wandb: FakeWandb, said: pytest.LogCaptureFixture
) -> None:
    settings = tmp_path / "tracker.toml"
    settings.write_text('[wandb]\nentity = "me"\ntags = ["a", "b"]\n', encoding="utf-8")
    words = ("--log_with", "wandb", "--wandb_api_key", KEY, "--log_tracker_config", settings, "--log_config")
    words = (*words, "--log_tracker_name", "project", "--wandb_run_name", "my run", "--save_state")
    train(dit, dataset, tmp_path / "out", "--max_train_steps", 6, *words, "--validation_split", 0.4)
    (run,) = wandb.runs
    given = run.arguments
    assert (given["project"], given["name"], given["entity"], given["tags"]) == (
        *("project", "my run", "me"),
        ["a", "b"],
    )
    assert given["settings"]["api_key"] == KEY
    assert given["settings"]["x_disable_meta"]
    assert given["config"]["network_dim"] == 4
    assert str(tmp_path) not in str(given["config"])
    assert given["dir"] == str(tmp_path / "out")
    assert run.steps("loss/current") == [1, 2, 3, 4, 5, 6]
    assert run.steps("loss/epoch") == [3, 6]
    assert run.steps("validation/timestep_0_250") == [6]
    assert run.steps("validation_base/bucket_32x32x5") == [6]
    assert run.steps("lora/prediction_500") == [6]
    assert run.exit_code == 0
    assert KEY not in said.text
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_resumed_run_continues_its_wandb_run_without_a_step_twice(
    dit: Path, dataset: Path, tmp_path: Path, wandb: FakeWandb
) -> None:
    """Killed after step 4, resumed from the state of step 2."""
    words = ("--max_train_steps", 6, "--log_with", "wandb")
    with pytest.MonkeyPatch.context() as patch:
        steps = iter(range(1, 99))

        def die(_names: ResultNames) -> str:
            if next(steps) == 5:
                raise KeyboardInterrupt
            return ""

        patch.setattr(control, "take_control_word", die)
        with pytest.raises(KeyboardInterrupt):
            train(dit, dataset, tmp_path, *words, "--save_state", "--save_every_n_steps", 2)
    (tmp_path / "lora-step00000004-state").rename(tmp_path / "gone")
    train(dit, dataset, tmp_path, *words, "--resume", "auto")
    first, second = wandb.runs
    assert first.arguments["id"] == second.arguments["id"]
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert first.steps("loss/current") == [1, 2, 3, 4]
    assert second.steps("loss/current") == [5, 6]
    assert [record["step"] for record in metrics(tmp_path, "step")] == [1, 2, 3, 4, 5, 6]


def test_both_trackers_can_be_used_and_one_that_fails_warns_once(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    wandb: FakeWandb,
    said: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = wandb.init

    def init(**arguments: Any) -> FakeRun:
        run = plain(**arguments)
        run.fails_from = 5
        return run

    init.__signature__ = trackers.inspect.signature(plain)  # pyright: ignore
    monkeypatch.setattr(wandb, "init", init)
    words = ("--log_with", "all", "--logging_dir", tmp_path / "logs")
    train(dit, dataset, tmp_path / "one", "--max_train_steps", 8, *words)
    train(dit, dataset, tmp_path / "two", "--max_train_steps", 8)
    assert said.text.count("Wandb fails and its curves have gaps; training goes on: the service is gone") == 1
    curves = EventAccumulator(str(next((tmp_path / "logs").iterdir()))).Reload()
    assert [event.step for event in curves.Scalars("loss/current")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [event.step for event in curves.Scalars("loss/epoch")] == [5]
    assert wandb.runs[0].steps("loss/current") == [1, 2, 3, 4]
    assert lora_bytes(tmp_path / "one/lora.safetensors") == lora_bytes(tmp_path / "two/lora.safetensors")


def test_tensorboard_that_fails_warns_once(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    plain = SummaryWriter.add_scalar

    def failing(self: SummaryWriter, tag: str, value: float, step: int) -> None:
        if step >= 5:
            raise OSError(28, "No space left on device")
        plain(self, tag, value, step)

    monkeypatch.setattr(SummaryWriter, "add_scalar", failing)
    train(dit, dataset, tmp_path / "out", "--max_train_steps", 7, "--logging_dir", tmp_path / "logs")
    assert said.text.count("TensorBoard fails") == 1
    assert len(metrics(tmp_path / "out", "step")) == 7


@pytest.mark.parametrize(
    ("package", "words"), [("wandb", ("--log_with", "wandb")), ("tensorboard", ("--logging_dir", "logs"))]
)
def test_a_missing_package_ends_with_code_5_and_the_command_that_installs_it(
    package: str,
    words: tuple[str, ...],
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == package else plain(name))
    code, message = refused(capsys, dit, dataset, tmp_path / "out", *words)
    assert code == 5
    assert f"pip install {package}" in message
    assert not (tmp_path / "out").exists()


def key_as_option(_folder: Path) -> tuple[Any, ...]:
    return ("--wandb_api_key", KEY)


def key_in_settings(folder: Path) -> tuple[Any, ...]:
    (folder / "t.toml").write_text(f'[wandb.settings]\napi_key = "{KEY}"\n', encoding="utf-8")
    return ("--log_tracker_config", folder / "t.toml")


@pytest.mark.parametrize("key_words", [key_as_option, key_in_settings])
def test_a_run_that_wandb_refuses_is_said_before_a_model_is_loaded_and_without_the_key(
    key_words: Callable[[Path], tuple[Any, ...]],
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    wandb: FakeWandb,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wandb.refuses = True
    monkeypatch.setattr(training, "Trainer", None)
    words = ("--log_with", "wandb", *key_words(tmp_path))
    code, message = refused(capsys, dit, dataset, tmp_path / "out", *words)
    assert code == 5
    assert 'mode = "offline"' in message
    assert "***" in message
    assert KEY not in message


def test_a_setting_that_wandb_does_not_know_is_said_without_its_value(
    dit: Path, dataset: Path, tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.toml").write_text(f'[wandb.settings]\napikey = "{KEY}"\n', encoding="utf-8")
    words = ("--log_with", "wandb", "--log_tracker_config", tmp_path / "t.toml")
    code, message = refused(capsys, dit, dataset, tmp_path / "out", *words)
    assert code == 5
    assert "apikey\n  Extra inputs are not permitted [type=extra_forbidden, input_value=***" in message
    assert KEY[:10] not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('mode = "offline"\n', "put arguments under [tensorboard] or [wandb]"),
        ('[wandb]\nentty = "me"\n', "takes no entty; it takes entity"),
        ('[wandb]\nproject = "me"\n', "takes no project"),
        ("[wandb]\nsettings = 3\n", "must be a table"),
        ("[wandb\n", "cannot be read"),
    ],
)
def test_wrong_tracker_settings_are_refused(
    text: str,
    message: str,
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    wandb: FakeWandb,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "t.toml").write_text(text, encoding="utf-8")
    words = ("--log_with", "wandb", "--log_tracker_config", tmp_path / "t.toml")
    code, said = refused(capsys, dit, dataset, tmp_path / "out", *words)
    assert code == 2
    assert message in said
    assert not wandb.runs


def test_a_run_that_went_back_is_another_run_for_wandb(
    dit: Path, dataset: Path, tmp_path: Path, wandb: FakeWandb
) -> None:
    words = ("--max_train_steps", 4, "--log_with", "wandb", "--save_every_n_steps", 2, "--save_state")
    train(dit, dataset, tmp_path, *words)
    train(dit, dataset, tmp_path, *words, "--resume", tmp_path / "lora-step00000002-state")
    train(dit, dataset, tmp_path, *words, "--resume", "auto", "--max_train_steps", 5)
    first, second, third = wandb.runs
    assert second.arguments["id"] == third.arguments["id"] == f"{first.arguments['id']}-1"
    assert second.steps("loss/current") == [3, 4]
    assert third.steps("loss/current") == [5]


def test_samples_are_shown_under_their_number(tmp_path: Path, wandb: FakeWandb) -> None:
    run = FakeRun({}, 0)
    tracker = trackers.WandbTracker.__new__(trackers.WandbTracker)
    tracker._wandb, tracker._run = wandb, run
    names = SampleNames(tmp_path, "a", "run")
    for number, frames in enumerate((np.zeros((5, 32, 32, 3), np.uint8), np.zeros((1, 32, 32, 3), np.uint8))):
        path = write_sample(names, frames, SampledPrompt(number, "x", 1), step=3, epoch=None)
        tracker.sample(3, trackers.ShownSample(f"sample_{number}", path, animate(frames)))
    (_, video), (_, image) = run.logged
    assert video["sample_0"][::2] == ("video", "mp4")
    assert image["sample_1"][0] == "image"


class WithD(torch.optim.SGD):
    """As Prodigy and D-adaptation: an estimate of the distance in the groups, which grows."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["d"] = 1e-6

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["d"] *= 2
        return super().step(closure)


def test_rates_of_optimizers_that_find_their_own_are_logged(dit: Path, dataset: Path, tmp_path: Path) -> None:
    words = ("--optimizer_type", f"{__name__}.WithD", "--learning_rate", 0.5, "--max_train_steps", 3)
    words = (*words, "--network_args", "loraplus_lr_ratio=4", "--logging_dir", tmp_path / "logs")
    records = train(dit, dataset, tmp_path / "out", *words)
    curves = EventAccumulator(str(next((tmp_path / "logs").iterdir()))).Reload()
    expected = {"lr/d*lr/unet": [5e-7, 1e-6, 2e-6], "lr/d*lr/unet plus": [2e-6, 4e-6, 8e-6]}
    for name, rates in expected.items():
        assert [event.value for event in curves.Scalars(name)] == pytest.approx(rates)
        steps = [record for record in records if record["kind"] == "step"]
        assert [record[name] for record in steps] == pytest.approx(rates)


def test_norms_that_are_limited_are_logged_for_their_own_step(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    words = ("--scale_weight_norms", 0.05, "--learning_rate", 0.01, "--logging_dir", tmp_path / "logs")
    train(dit, dataset, tmp_path / "out", "--max_train_steps", 4, *words)
    records = metrics(tmp_path / "out", "norms")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["keys_scaled"] == 16
    assert records[0]["max_key_norm"] <= 0.05 * (1 + 1e-6)
    assert 0 < records[0]["average_key_norm"] <= records[0]["max_key_norm"] * (1 + 1e-6)
    curves = EventAccumulator(str(next((tmp_path / "logs").iterdir()))).Reload()
    for name in ("keys_scaled", "average_key_norm", "max_key_norm"):
        events = curves.Scalars(f"max_norm/{name}")
        assert [event.step for event in events] == [1, 2, 3, 4]
        assert [event.value for event in events] == pytest.approx([record[name] for record in records])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_the_real_wandb_keeps_a_run_offline(dit: Path, dataset: Path, tmp_path: Path, root: Path) -> None:
    """In a process of its own, with everything that it writes searched for the key and for folders."""
    (tmp_path / "t.toml").write_text('[wandb]\nmode = "offline"\n', encoding="utf-8")
    words = (
        *(sys.executable, root / "kandinsky5_train_network.py", "--task", "k5-tiny-t2v", "--dit", dit),
        *("--dataset_config", dataset, "--output_dir", tmp_path / "out", "--output_name", "lora"),
        *("--max_data_loader_n_workers", 0, "--max_train_steps", 3, *SMALLER, "--log_config"),
        *("--log_with", "wandb", "--wandb_api_key", KEY, "--log_tracker_config", tmp_path / "t.toml"),
    )
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
    assert KEY not in result.stdout + result.stderr
    (run,) = (tmp_path / "out/wandb").glob("offline-run-*")
    assert list(run.glob("run-*.wandb"))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
