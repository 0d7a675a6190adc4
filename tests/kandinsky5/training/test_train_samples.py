"""Samples while training: what is written, that training does not notice, and what is refused beforehand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kandinsky5.model import assembly, precision
from kandinsky5.text.encoders import TextEncoders
from kandinsky5.text.templates import PromptTemplates, load_prompt_templates
from kandinsky5.training import control
from kandinsky5.training import samples as train_samples
from kandinsky5.training.effects import EffectReporter
from kandinsky5.training.evaluation import Evaluation
from kandinsky5.training.sample_files import SampledPrompt, SampleNames, write_pictures, write_sample
from kandinsky5.training.tracking.metrics import Metrics
from kandinsky5.training.training_log import TrainingLog
from modules.errors import DivergedError, ResourceError
from tests.kandinsky5.generation.generation_kit import frames_of
from tests.kandinsky5.training.training_runs import (
    exit_code,
    lora_bytes,
    metrics,
    train,
    write_dataset,
    write_word_while_loading,
)

SMALL = "--w 32 --h 32 --f 5 --s 2 --g 1"


@pytest.fixture(scope="module")
def templates() -> PromptTemplates:
    return load_prompt_templates()


@pytest.fixture
def models(
    tiny_models: Path, encoders: TextEncoders, templates: PromptTemplates, monkeypatch: pytest.MonkeyPatch
) -> tuple[object, ...]:
    """The options that name VAE and encoders; the encoders are loaded once for all tests."""
    monkeypatch.setattr(encoders, "free", lambda: None)
    monkeypatch.setattr(train_samples, "load_text_encoders", lambda *_, **__: encoders)
    monkeypatch.setattr(train_samples, "load_prompt_templates", lambda _: templates)
    return (
        *("--vae", tiny_models / "vae", "--text_encoder_qwen", tiny_models / "text_encoder"),
        *("--text_encoder_clip", tiny_models / "text_encoder2"),
    )


def prompt_file(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def names_in(output: Path, suffix: str) -> list[str]:
    """Of the samples; not of the pictures that show them over the steps."""
    pictures = re.compile(r"lora_(grid|steps)_\d\d")
    names = [path.name for path in (output / "sample").iterdir() if path.suffix == suffix]
    return sorted(name for name in names if not pictures.match(name))


def test_a_run_with_samples_and_one_without_end_in_the_same_bytes(
    dit: Path, dataset: Path, models: tuple[object, ...], tmp_path: Path
) -> None:
    """With everything that draws: dropout, shuffling, noise; and files under the documented names."""
    options = ("--max_train_steps", 6, "--network_dropout", 0.3, "--save_state_on_train_end")
    options = (*options, "--network_args", "rank_dropout=0.2", "module_dropout=0.2")
    train(dit, dataset, tmp_path / "without", *options)
    before = torch.get_rng_state()
    prompts = prompt_file(tmp_path, f"走る兎 {SMALL} --d 7", f"a cup {SMALL} --f 1 --m 0", "# none")
    with_samples = (
        *(*options, *models, "--sample_prompts", prompts, "--sample_at_first"),
        *("--sample_every_n_steps", 4, "--sample_every_n_epochs", 1, "--logging_dir", tmp_path / "logs"),
    )
    train(dit, dataset, tmp_path / "with", *with_samples)
    assert torch.equal(before, torch.get_rng_state())
    losses = [[r["loss"] for r in metrics(tmp_path / name, "step")] for name in ("with", "without")]
    assert losses[0] == losses[1]
    for file in ("lora.safetensors", "lora-state/lora.safetensors"):
        assert lora_bytes(tmp_path / "with" / file) == lora_bytes(tmp_path / "without" / file)

    videos = names_in(tmp_path / "with", ".mp4")
    assert [name[:17] for name in videos] == ["lora_000000_00_20", "lora_000004_00_20", "lora_e000001_00_2"]
    assert all(name.endswith("_7.mp4") for name in videos)
    pictures = names_in(tmp_path / "with", ".png")
    assert {name.replace(".mp4", ".png") for name in videos} < set(pictures)
    assert sum(name.endswith("_42_000.png") for name in pictures) == 3
    frames = frames_of(tmp_path / "with/sample" / videos[0])
    assert (len(frames), frames[0].shape) == (5, (32, 32, 3))
    assert rows_of(tmp_path / "with/sample/lora_grid_00.png") == 3
    assert frames_of(tmp_path / "with/sample/lora_steps_00.mp4")[0].shape == (20 + 192, 3 * 192 + 2 * 4, 3)
    assert not (tmp_path / "with/sample/lora_steps_01.mp4").exists()  # an image
    records = metrics(tmp_path / "with", "sample")
    assert [(r["step"], r["prompt"]) for r in records] == [(s, p) for s in (0, 4, 5) for p in (0, 1)]
    curves = EventAccumulator(str(next((tmp_path / "logs").iterdir()))).Reload()
    assert [event.step for event in curves.Images("sample_0")] == [0, 4, 5]


def test_a_resumed_run_goes_on_with_its_grid_and_ends_in_the_same_bytes(
    dit: Path,
    dataset: Path,
    models: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: pytest.LogCaptureFixture,
) -> None:
    prompts = prompt_file(tmp_path, f"a {SMALL} --f 1")
    words = (*models, "--sample_prompts", prompts, "--sample_every_n_steps", 1, "--max_train_steps", 4)
    train(dit, dataset, tmp_path / "whole", *words)
    plain = control.take_control_word
    calls = iter(range(1, 9))
    with monkeypatch.context() as patch:
        patch.setattr(control, "take_control_word", lambda n: "stop" if next(calls) == 3 else plain(n))
        train(dit, dataset, tmp_path / "parts", *words)
    # Stopping is quick: the samples of the last step are left to the resumed run.
    assert [record["step"] for record in metrics(tmp_path / "parts", "sample")] == [1, 2]
    assert "continues from there with its samples" in said.text
    train(dit, dataset, tmp_path / "parts", *words, "--resume", "auto")
    assert [record["step"] for record in metrics(tmp_path / "parts", "sample")] == [1, 2, 3, 4]
    assert lora_bytes(tmp_path / "parts/lora.safetensors") == lora_bytes(tmp_path / "whole/lora.safetensors")
    assert rows_of(tmp_path / "parts/sample/lora_grid_00.png") == 4


def test_samples_show_the_lora_and_a_strength_of_zero_the_base_model(
    dit: Path, dataset: Path, models: tuple[object, ...], tmp_path: Path
) -> None:
    prompts = prompt_file(tmp_path, f"a {SMALL} --f 1", f"a {SMALL} --f 1 --m 0")
    train(
        *(dit, dataset, tmp_path / "out", *models, "--sample_prompts", prompts, "--max_train_steps", 2),
        *("--learning_rate", 0.5, "--sample_at_first", "--sample_every_n_steps", 2),
        *("--fp8_base", "--gradient_checkpointing", "--offload_dit_during_sampling"),
    )
    images = [np.asarray(Image.open(tmp_path / "out/sample" / n)) for n in names_in(tmp_path / "out", ".png")]
    start, start_off, end, end_off = images[:4]
    assert np.array_equal(start, start_off)
    assert np.array_equal(start, end_off)
    assert not np.array_equal(start, end)


@pytest.mark.parametrize(
    ("task", "words", "clips"),
    [
        ("k5-tiny-i2v", "--i {image} --w 32 --h 32 --f 9", ((3, 4, 4, 5),)),
        ("k5-tiny-i2v", "--i {image} --ei {image} --w 32 --h 32 --f 9", ((3, 4, 4, 5),)),
        ("k5-tiny-nabla", "--w 128 --h 130 --f 5", ((2, 16, 16, 5),)),
    ],
)
def test_image_to_video_and_nabla_tasks_are_sampled(
    task: str,
    words: str,
    clips: tuple[tuple[int, int, int, int], ...],
    dit: Path,
    models: tuple[object, ...],
    media: Path,
    tmp_path: Path,
) -> None:
    data = write_dataset(tmp_path, clips, resolution=clips[0][1] * 8)
    prompts = prompt_file(tmp_path, f"a {words.format(image=media / 'coffee.jpg')} --s 2")
    train(
        *(dit, data, tmp_path / "out", *models, "--sample_prompts", prompts, "--max_train_steps", 1),
        *("--sample_every_n_steps", 1),
        task=task,
    )
    (video,) = names_in(tmp_path / "out", ".mp4")
    side = clips[0][1] * 8
    assert frames_of(tmp_path / "out/sample" / video)[0].shape == (side, side, 3)


def test_samples_and_lora_are_the_same_with_blocks_that_are_swapped(
    dataset: Path, models: tuple[object, ...], tiny_models: Path, tmp_path: Path
) -> None:
    prompts = prompt_file(tmp_path, f"a {SMALL} --f 1")
    shared = ("--sample_prompts", prompts, "--sample_every_n_steps", 2, "--max_train_steps", 3)
    shared = (*shared, "--override_dit", "{}", "--fp8_base", "--gradient_checkpointing")
    found = []
    for name, words in (("plain", ()), ("swap", ("--blocks_to_swap", 2, "--offload_dit_during_sampling"))):
        train(tiny_models / "model/tiny.safetensors", dataset, tmp_path / name, *models, *shared, *words)
        picture = next(iter(names_in(tmp_path / name, ".png")))
        with Image.open(tmp_path / name / "sample" / picture) as image:
            found.append((np.asarray(image).tobytes(), lora_bytes(tmp_path / name / "lora.safetensors")))
    assert found[0] == found[1]


@pytest.mark.parametrize("error", [DivergedError("latents are not finite"), RuntimeError("cuDNN error")])
def test_an_error_while_sampling_costs_the_samples_and_not_the_run(
    dit: Path,
    dataset: Path,
    models: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    networks = []

    def fail(dit: torch.nn.Module, *_: object, **__: object) -> None:
        networks.extend(m.adapter for m in dit.modules() if hasattr(m, "adapter"))
        assert not networks[0].training
        raise error

    monkeypatch.setattr(train_samples, "sample_latents", fail)
    options = ("--max_train_steps", 2, "--sample_every_n_steps", 1, "--network_dropout", 0.2)
    prompts = prompt_file(tmp_path, f"a {SMALL}")
    train(dit, dataset, tmp_path / "out", *models, "--sample_prompts", prompts, *options)
    assert networks[0].training
    assert (tmp_path / "out/lora.safetensors").is_file()
    assert f"samples are missing, training goes on: {error}" in said.text


def test_a_device_that_cannot_compute_the_vae_is_refused_before_anything_is_loaded(
    dit: Path,
    dataset: Path,
    models: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only where samples need the VAE: training itself reads caches."""

    def refuse(device: torch.device, dtype: torch.dtype) -> None:
        raise ResourceError(f"no convolution on {device} for {dtype}")

    monkeypatch.setattr(precision, "check_conv3d", refuse)
    train(dit, dataset, tmp_path / "plain", "--max_train_steps", 1)
    monkeypatch.setattr(assembly, "load_model", None)
    prompts = prompt_file(tmp_path, f"a {SMALL}")
    words = (*models, "--sample_prompts", prompts, "--sample_every_n_steps", 1, "--vae_dtype", "float16")
    assert exit_code(dit, dataset, tmp_path / "out", *words, "--max_train_steps", 2) == 5
    assert "no convolution on cpu for torch.float16" in capsys.readouterr().err


class Died(BaseException):
    """The process is gone: nothing handles that."""


@pytest.mark.parametrize(
    "owner", ["report", "decode_frames", "load_vae", "log_samples", "validation", "done"]
)
def test_a_run_that_dies_after_its_last_step_has_its_files_and_makes_up_for_the_rest(
    owner: str,
    dit: Path,
    dataset: Path,
    models: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: pytest.LogCaptureFixture,
) -> None:
    def die(*_: object, **__: object) -> None:
        raise Died

    prompts = prompt_file(tmp_path, f"a {SMALL} --f 1", f"b {SMALL} --f 1")
    words = (*models, "--sample_prompts", prompts, "--sample_every_n_steps", 3, "--max_train_steps", 3)
    words = (*words, "--validation_split", 0.4, "--save_state_on_train_end")
    plain = train_samples.decode_frames
    calls = iter([True, False])
    with monkeypatch.context() as patch:
        if owner == "decode_frames":  # of the second prompt
            patch.setattr(train_samples, owner, lambda *given: plain(*given) if next(calls) else die())
        elif owner == "load_vae":
            patch.setattr(train_samples, owner, die)
        elif owner == "report":
            patch.setattr(EffectReporter, "report", die)
        elif owner == "validation":
            patch.setattr(Evaluation, "validate", die)
        elif owner == "log_samples":
            patch.setattr(TrainingLog, "write_samples", die)
        else:
            patch.setattr(Metrics, "flush", die)
        with pytest.raises(Died):
            train(dit, dataset, tmp_path / "out", *words)
    before = lora_bytes(tmp_path / "out/lora.safetensors")
    assert (tmp_path / "out/lora-state").is_dir()
    train(dit, dataset, tmp_path / "out", *words, "--resume", "auto")
    assert lora_bytes(tmp_path / "out/lora.safetensors") == before
    assert [(r["step"], r["prompt"]) for r in metrics(tmp_path / "out", "sample")] == [(3, 0), (3, 1)]
    assert [record["step"] for record in metrics(tmp_path / "out", "validation")] == [3]
    assert (tmp_path / "out/lora_effect.txt").is_file()
    assert ("nothing to do" in said.text) == (owner == "done")
    train(dit, dataset, tmp_path / "out", *words, "--resume", "auto")
    assert "nothing to do" in said.text
    assert len(metrics(tmp_path / "out", "sample")) == 2


@pytest.mark.parametrize("name", ["sample_latents", "decode_frames"])
def test_the_word_stop_interrupts_samples_and_the_resumed_run_makes_them(
    name: str,
    dit: Path,
    dataset: Path,
    models: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The state is saved at once, without another step."""
    prompts = prompt_file(tmp_path, f"a {SMALL} --f 1", f"b {SMALL} --f 1")
    words = (*models, "--sample_prompts", prompts, "--sample_every_n_steps", 2, "--max_train_steps", 4)
    plain = getattr(train_samples, name)

    def write_word(*given: Any, **named: Any) -> Any:
        (tmp_path / "out/lora.control").write_text("stop", encoding="utf-8")
        return plain(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(train_samples, name, write_word)
        train(dit, dataset, tmp_path / "out", *words)
    assert [record["step"] for record in metrics(tmp_path / "out", "step")] == [1, 2]
    assert (tmp_path / "out/lora-step00000002-state").is_dir()
    made = [(record["step"], record["prompt"]) for record in metrics(tmp_path / "out", "sample")]
    assert made == ([] if name == "sample_latents" else [(2, 0)])
    train(dit, dataset, tmp_path / "out", *words, "--resume", "auto")
    made = [(record["step"], record["prompt"]) for record in metrics(tmp_path / "out", "sample")]
    assert made == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert len(names_in(tmp_path / "out", ".png")) == 4
    assert [rows_of(tmp_path / f"out/sample/lora_grid_{number:02d}.png") for number in (0, 1)] == [2, 2]


def test_the_word_sample_in_the_control_file_makes_samples(
    dit: Path, dataset: Path, models: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_word_while_loading(tmp_path / "out", "sample", monkeypatch)
    prompts = prompt_file(tmp_path, f"a {SMALL}")
    train(dit, dataset, tmp_path / "out", *models, "--sample_prompts", prompts, "--max_train_steps", 3)
    assert [record["step"] for record in metrics(tmp_path / "out", "sample")] == [1]


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for name in ("load_text_encoders", "load_vae"):
        monkeypatch.setattr(train_samples, name, fail)


@pytest.mark.parametrize(
    ("lines", "task", "code", "message"),
    [
        (["a --w x", "b --zz 3"], "k5-tiny-t2v", 2, "line 2: --zz is not a prompt setting"),
        (["a"], "k5-tiny-i2v", 2, "line 1: --task k5-tiny-i2v needs a first frame"),
        (["a --i none.png"], "k5-tiny-i2v", 2, "none.png: no such file"),
        (["a --i {cut} --f 9"], "k5-tiny-i2v", 3, "line 1: "),
        (["a --w x", "a --i {cut} --f 9"], "k5-tiny-i2v", 2, "cut.png: damaged"),
        (["a --f 9", "--vae missing"], "k5-tiny-t2v", 4, "missing"),
    ],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_prompts_and_models_are_checked_before_anything_is_loaded(
    lines: list[str],
    task: str,
    code: int,
    message: str,
    dit: Path,
    dataset: Path,
    models: tuple[object, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word for line in lines if line.startswith("--") for word in line.split()]
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])  # the header stays whole
    texts = [line.format(cut=tmp_path / "cut.png") for line in lines if not line.startswith("--")]
    prompts = prompt_file(tmp_path, *texts)
    with pytest.raises(SystemExit) as caught:
        train(
            *(dit, dataset, tmp_path, *models, "--sample_prompts", prompts, "--sample_at_first", *words),
            task=task,
        )
    assert caught.value.code == code
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_is_loaded")
def test_all_model_files_that_are_missing_are_told_at_once(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name for name in ("vae", "text_encoder_qwen", "text_encoder_clip")}
    words = [word for name, place in places.items() for word in (f"--{name}", place)]
    weights = ("--network_weights", tmp_path / "lora", "--sample_prompts", prompt_file(tmp_path, "a"))
    with pytest.raises(SystemExit) as caught:
        train(tmp_path / "dit", dataset, tmp_path / "out", *words, *weights)
    assert caught.value.code == 4
    message = capsys.readouterr().err
    for place in (tmp_path / "dit", tmp_path / "lora", *places.values()):
        assert str(place) in message


def test_the_grid_grows_by_steps_and_knows_its_own_run(tmp_path: Path) -> None:
    """Step 20 belongs to a part that a resumed run has left; another run's files are not taken."""
    picture = np.zeros((1, 8, 16, 3), np.uint8)
    for run, step in (("b", 0), ("a", 10), ("a", 5), ("a", 20), ("a", 10)):
        names = SampleNames(tmp_path, "my [lora]", run)
        write_sample(names, picture + step, SampledPrompt(1, "x", 42), step=step, epoch=None)
    write_pictures(names, SampledPrompt(1, "x", 42), last_step=10)
    assert rows_of(names.grid(1)) == 2
    with Image.open(names.grid(1)) as grid:
        assert [grid.getpixel((300, y)) for y in (100, 300)] == [(5, 5, 5), (10, 10, 10)]


def test_pictures_over_the_steps_show_each_clip_from_its_first_to_its_last_frame(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    """Grid: four frames of every step. Video: all frames of every step, a shorter clip stays at its last.

    A clip of another size, one that is damaged, and a prompt of many lines are part of a user's week.
    """
    names = SampleNames(tmp_path, "lora", "a")
    prompt = SampledPrompt(0, "走る兎と кот, " * 60, 42)
    sizes = {0: (9, 32, 48), 10: (5, 32, 32), 20: (9, 32, 32), 30: (9, 32, 32)}
    for step, (count, height, width) in sizes.items():
        frames = np.broadcast_to(np.arange(count)[:, None, None, None] * 25, (count, height, width, 3))
        path = write_sample(names, frames.astype(np.uint8), prompt, step=step, epoch=None)
        if step == 20:
            path.write_bytes(path.read_bytes()[:200])
    write_pictures(names, prompt, last_step=30)
    assert "cannot be read and is left out" in said.text
    with Image.open(names.grid(0)) as grid:
        lefts = [grid.width - 16 - (4 - number) * (288 + 4) + 4 for number in range(4)]
        pixels = np.asarray(grid)
    row = pixels[grid.height - 16 - 3 * 196 + 100, [left + 100 for left in lefts], 0].tolist()
    assert pixels[8, 8].tolist() == [255, 255, 255]
    assert row == pytest.approx([0, 50, 125, 200], abs=4)
    assert rows_of(names.grid(0)) == 3
    video = frames_of(names.steps_video(0))
    assert (len(video), video[0].shape) == (9, (20 + 192, 288 + 2 * 192 + 2 * 4, 3))
    assert [int(video[8][100, x, 0]) for x in (100, 400, 600)] == pytest.approx([200, 100, 200], abs=4)


def rows_of(path: Path) -> int:
    """The steps that a grid shows: rows of 192 pixels with gaps between, below the prompt."""
    with Image.open(path) as grid:
        pixels = np.asarray(grid.convert("L"))
    column = "".join("#" if value < 250 else " " for value in pixels[:, 150])  # across the first frames
    return sum(len(run) > 150 for run in column.split())
