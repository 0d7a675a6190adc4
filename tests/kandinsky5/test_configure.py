"""Writing the files of a training: questions, what is refused, and that the scripts take the result."""

from __future__ import annotations

import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from dataset.config.config import load_dataset_config
from kandinsky5 import configure
from kandinsky5.cli.caching import parse_cache_latents, parse_cache_text
from kandinsky5.cli.generate import parse_generate
from kandinsky5.cli.train import parse_train
from kandinsky5.configs.train import TrainConfig
from kandinsky5.configure import main
from kandinsky5.prompts import read_prompt_file
from kandinsky5.recipes import RECIPES, recipe_text
from kandinsky5.small_world.clips import main as draw_clips
from kandinsky5_cache_latents import main as cache_latents
from kandinsky5_cache_text_encoder_outputs import main as cache_text
from kandinsky5_generate_video import main as generate
from kandinsky5_train_network import main as train

FILES = ("dataset.toml", "prompts.txt", "run.toml")


@pytest.fixture(scope="module")
def clips(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips and a picture with captions, one of which lacks the trigger word."""
    folder = tmp_path_factory.mktemp("clips")
    for name, caption in (
        ("bunny_25fps_49f.mp4", "zorg, a rabbit stretches"),
        ("coffee_pan_24fps_49f.mp4", "a cup of coffee"),
        ("chelsea.jpg", "Zorg, a cat"),
    ):
        shutil.copy(root / "tests" / "media" / name, folder / name)
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without decoding the clips."""
    monkeypatch.setattr(configure, "_check", lambda *_: True)


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("python ")]


@pytest.mark.parametrize("teach", RECIPES)
@pytest.mark.parametrize("task", ["k5-pro-t2v-5s-sd", "k5-lite-i2v-5s-sd", "k5-small-t2v"])
def test_the_scripts_take_what_is_written(
    teach: str, task: str, clips: Path, tmp_path: Path, unchecked: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my run"
    words = ["--clips", str(clips), "--teach", teach, "--task", task, "--trigger", "zorg", "--yes"]
    main([str(folder), *words])
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for name in FILES[::2]:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        settings = [line for line in lines if " = " in line]
        assert settings
        assert all("  # " in line for line in settings)
        tomllib.loads("\n".join(lines))
    (folder / "cache").mkdir()
    datasets = load_dataset_config(folder / "dataset.toml").datasets
    assert [dataset.content for dataset in datasets] == ["video", "image"]
    assert len(read_prompt_file(folder / "prompts.txt").specs) == 1
    latents, text, training, generation = commands(capsys.readouterr().out)
    (tmp_path / "vae").mkdir()
    latents[latents.index("--vae") + 1] = str(tmp_path / "vae")
    parse_cache_latents(latents[1:])
    parse_cache_text(text[1:])
    config = parse_train(training[1:])
    assert isinstance(config, TrainConfig)
    assert not config.notes
    assert (config.saving.output_name, config.run.vram_budget) == ("zorg", None if "small" in task else 23)
    options = parse_generate([*generation[1:], "--dry_run"])
    assert options is not None


def test_nothing_is_overwritten(
    clips: Path, tmp_path: Path, unchecked: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), "--clips", str(clips), "--yes"])
    assert caught.value.code == 2
    assert "run.toml: exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
    assert (tmp_path / "run.toml").read_text(encoding="utf-8") == "mine"


def test_all_problems_are_reported_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--clips", str(tmp_path / "none"), "--teach", "everything", "--task", "k5-pro", "--card", "1"]
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), *words, "--frames", "18", "--resolution", "100", "--name", "a/b", "--yes"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    for option in ("clips", "teach", "task", "card", "frames 18: use 4k+1, such as 17", "resolution", "name"):
        assert f"--{option}" in message


def test_without_a_terminal_the_missing_options_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "out"), "--teach", "style"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "--yes for the defaults" in message
    for name in ("clips", "task", "card", "weights", "trigger"):
        assert f"--{name}: " in message
    assert not (tmp_path / "out").exists()


def test_on_a_terminal_what_is_not_given_is_asked(
    clips: Path, tmp_path: Path, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty answer takes the default, and is asked again where there is none or it is no number."""
    answers = iter(["", str(clips), "motion", "k5-lite-t2v-5s-sd", "much", "12", "", "zorg"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _question: next(answers))
    main([str(tmp_path / "out")])
    run = tomllib.loads((tmp_path / "out/run.toml").read_text(encoding="utf-8"))
    assert (run["memory"]["vram_budget"], run["model"]["task"]) == (11, "k5-lite-t2v-5s-sd")
    data = tomllib.loads((tmp_path / "out/dataset.toml").read_text(encoding="utf-8"))
    assert (data["general"]["resolution"], data["datasets"][0]["target_frames"]) == ([256, 256], [49])
    assert next(answers, None) is None


def test_the_dataset_is_checked_and_the_trigger_word_is_looked_for(
    clips: Path, tmp_path: Path, said: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both scripts' --check; a clip that is too short for the recipe is named."""
    words = ["--clips", str(clips), "--teach", "style", "--task", "k5-small-t2v", "--trigger", "zorg"]
    main([str(tmp_path), *words, "--frames", "61", "--yes"])
    assert "1 caption without the trigger word zorg: coffee_pan_24fps_49f.txt" in said.text
    report = said.text + capsys.readouterr().out
    assert "bunny_25fps_49f" in report
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_of_the_guide_are_those_of_the_program(name: str, root: Path) -> None:
    path = root / "docs" / "recipes" / f"{name}.toml"
    assert path.read_text(encoding="utf-8") == recipe_text(RECIPES[name])


@pytest.mark.slow
def test_the_four_commands_run_on_the_small_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From drawn clips to the report and a video with the LoRA, as printed."""
    draw_clips([str(tmp_path / "clips"), "--shape", "star", "--clips", "2"])
    words = ["--clips", str(tmp_path / "clips"), "--teach", "motion", "--task", "k5-small-t2v"]
    main([str(tmp_path / "run"), *words, "--trigger", "star", "--steps", "2", "--yes"])
    monkeypatch.chdir(tmp_path)
    scripts = (cache_latents, cache_text, train, generate)
    for script, (_, *options) in zip(scripts, commands(capsys.readouterr().out), strict=True):
        script(options)
    assert (tmp_path / "run/star.mp4").is_file()
    report = (tmp_path / "run/output/star_report.html").read_text(encoding="utf-8")
    assert "This report is incomplete" not in report
    assert report.count("<video") == 1
    assert str(tmp_path) not in report
