"""Names that no file can have, links that somebody planted, and characters that would steer a terminal."""

from __future__ import annotations

import json
import logging
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

import kandinsky5_cache_latents
import kandinsky5_cache_text_encoder_outputs
import kandinsky5_generate_video
import kandinsky5_train_network
from dataset.config.config import ImageDatasetConfig, load_dataset_config
from dataset.sources.items import SkippedItem
from dataset.sources.listing import list_items
from kandinsky5.cli.caching import parse_cache_latents
from kandinsky5.prompts import read_prompt_file
from kandinsky5.training.tracking.metrics import FILE_NAME, Metrics
from modules.command_line import Parser, user_errors
from modules.errors import ConfigError, DataError, ResourceError
from modules.files import open_own_file
from modules.locks import folder_lock, sole_user
from modules.logs import get_logger, print_report, setup_logging
from modules.messages import visible, visible_name
from modules.path_kinds import file_problem, name_length_problem, path_kind
from networks import convert_lora, inspect_lora, merge_lora

LONG = "a woman walks along a beach at sunset, " * 8
"""A caption where a path should be: over 255 bytes."""
STEER = "a\x1b]0;owned\x07\x1b[2Jb\x9bc\u202etxt.exe"


def test_a_path_is_looked_at_without_an_error_whatever_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    found = {
        name: path_kind(tmp_path / name).kind
        for name in ("file", ".", "circle", "gone", "pipe", "no", "file/x", "a\0b", LONG, "x/" * 3000)
    }
    assert list(found.values()) == [
        *("file", "folder", "unreachable", "missing", "special", "missing", "missing"),
        *("unreachable", "unreachable", "unreachable"),
    ]
    assert file_problem(Path("/dev/zero")) == "a device, not a file"
    assert name_length_problem(tmp_path / ("日" * 85)) is None
    assert "has 258 bytes, file names have at most 255" in (name_length_problem(tmp_path / ("日" * 86)) or "")
    assert "caption or a prompt in the place of a path" in (name_length_problem(Path(LONG)) or "")
    assert "has 6001 characters" in (name_length_problem(Path("x/" * 3000 + "y")) or "")


@pytest.mark.parametrize(
    ("main", "given"),
    [
        (kandinsky5_cache_latents.main, {"--vae": "v", "--dataset_config": "d.toml"}),
        (
            kandinsky5_cache_text_encoder_outputs.main,
            {"--dataset_config": "d.toml", "--text_encoder_qwen": "q", "--text_encoder_clip": "c"},
        ),
        (
            kandinsky5_generate_video.main,
            {
                "--prompt": "a", "--dit": "d", "--vae": "v", "--text_encoder_qwen": "q", "--image": "i",
                "--text_encoder_clip": "c", "--lora_weight": "l", "--output": "o", "--save_path": "o",
                "--latent_path": "x", "--from_file": "p.txt", "--save_merged_model": "m",
            },
        ),
        (
            kandinsky5_train_network.main,
            {
                "--dit": "d", "--dataset_config": "d", "--output_dir": "o", "--network_weights": "n",
                "--vae": "v", "--text_encoder_qwen": "q", "--text_encoder_clip": "c", "--resume": "r",
                "--sample_prompts": "p.txt", "--logging_dir": "l", "--config_file": "c.toml",
                "--log_prefix": "x", "--output_dir_fallback": "f",
            },
        ),
        (convert_lora.main, {"--input": "i", "--output": "o"}),
        (merge_lora.main, {"--dit": "d", "--lora_weight": "l", "--save_merged_model": "m"}),
        (inspect_lora.main, {"path": "p"}),
    ],
    ids=["cache_latents", "cache_text", "generate", "train", "convert", "merge", "inspect"],
)  # fmt: skip
def test_every_path_option_answers_a_text_in_the_place_of_a_path(
    main: object, given: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in given:
        if name == "--prompt":
            continue
        words = [LONG] if name == "path" else [f"{name}={LONG}"]
        with pytest.raises(SystemExit) as caught:
            main(words)  # type: ignore[operator]
        error = capsys.readouterr().err
        assert caught.value.code == 2, (name, error)
        assert "is no path: a woman walks along" in error, name
        assert "Is this a caption or a prompt in the place of a path?" in error, name


def test_files_that_name_paths_answer_texts_in_their_place(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text(
        f'[[datasets]]\nimage_directory = "{LONG}"\ncaption_extension = ".txt"\n', encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="line 2: dataset 0: image_directory is no path"):
        load_dataset_config(tmp_path / "d.toml")
    (tmp_path / "p.txt").write_text(f"a cat --i {LONG}\nb\n", encoding="utf-8")
    prompts = read_prompt_file(tmp_path / "p.txt")
    assert [spec.prompt for spec in prompts.specs] == ["b"]
    assert "p.txt line 1: --i: is no path" in prompts.problems[0]
    config = ImageDatasetConfig(
        index=0, origin="d.toml line 2", cache_directory=tmp_path, image_jsonl_file=tmp_path / "m.jsonl"
    )
    for key, other in (("image_path", "caption"), ("mask_path", "caption")):
        line = {"image_path": "a.png", "caption": "x", key: LONG, other: "photo.png"}
        (tmp_path / "m.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
        (tmp_path / "a.png").write_bytes(b"x")
        with pytest.raises(ConfigError, match=f"line 1: {key} is no path"):
            list_items(config)


def test_what_is_planted_at_a_lock_is_neither_followed_nor_changed(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    for number, plant in enumerate((os.symlink, os.link, None)):
        precious.write_text("mine", encoding="utf-8")
        folder = tmp_path / f"folder{number}"
        folder.mkdir()
        for name, lock in (
            (".k5_lock", folder_lock(folder)),
            ("lora.lock", sole_user(folder / "lora.lock", "x")),
        ):
            if plant is None:
                (folder / name).write_text("my own notes", encoding="utf-8")
            else:
                plant(precious, folder / name)
            with pytest.raises(ResourceError, match=name), lock:
                pass
            assert (folder / name).read_text(encoding="utf-8") in {"mine", "my own notes"}
        assert precious.read_text(encoding="utf-8") == "mine"
    Path(tmp_path / ".k5_lock").symlink_to(tmp_path / "not there")
    with pytest.raises(ResourceError, match="is a link"), folder_lock(tmp_path):
        pass
    assert not (tmp_path / "not there").exists()
    (tmp_path / ".k5_lock").unlink()
    os.mkfifo(tmp_path / ".k5_lock")
    with pytest.raises(ResourceError, match="no regular file"), folder_lock(tmp_path):
        pass


def test_a_lock_of_an_earlier_run_is_taken_over(tmp_path: Path) -> None:
    for content in (b"", b" 123"):
        (tmp_path / ".k5_lock").write_bytes(content)
        with folder_lock(tmp_path):
            assert (tmp_path / ".k5_lock").read_bytes() == f" {os.getpid()}".encode()


@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_what_is_planted_at_the_log_of_a_run_is_neither_followed_nor_copied(
    plant: object, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("k5"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("k5"), "propagate", False)
    precious = tmp_path / "precious.txt"
    precious.write_text('{"run": "lora"}\nmine\n', encoding="utf-8")
    output = tmp_path / "out"
    output.mkdir()
    plant(precious, output / FILE_NAME)  # type: ignore[operator]
    metrics = Metrics(output, "lora")
    metrics.write("step", 1, {"loss": 0.5})
    assert precious.read_text(encoding="utf-8") == '{"run": "lora"}\nmine\n'
    assert (output / FILE_NAME).read_bytes() == precious.read_bytes()
    assert caplog.text.count("the log of the run cannot be written and has gaps") == 1


def test_an_own_file_is_appended_to_from_any_position(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for word in (b"one\n", b"two\n"):
        with open_own_file(path) as stream:
            stream.seek(0)
            stream.write(word)
    assert path.read_bytes() == b"one\ntwo\n"


def test_nothing_reaches_the_console_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("k5")
    handlers, logger.handlers = logger.handlers, []
    try:
        setup_logging()
        log = get_logger(__name__)
        log.warning("skipped: %s", SkippedItem(name=f"{STEER}\n.png", reason="damaged", detail=STEER))
        print_report(f"caption: {STEER} 猫 é\n\tsecond line")
        with pytest.raises(SystemExit), user_errors(["--traceback"]):
            raise DataError(f"{tmp_path / STEER}: no such file")
        with pytest.raises(SystemExit):
            Parser("program", "text").parse_args([f"--{STEER}"])
        with pytest.raises(SystemExit), user_errors([]):
            parse_cache_latents(["--dataset_config", STEER, "--vae", STEER])
    finally:
        logger.handlers = handlers
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        kinds = {unicodedata.category(character) for character in text} - {"Cc"}
        assert "Cf" not in kinds
        assert {c for c in text if unicodedata.category(c) == "Cc"} <= {"\n", "\t"}
    assert "caption: a\\x1b]0;owned\\x07\\x1b[2Jb\\x9bc\\u202etxt.exe 猫 é\n\tsecond line" in shown.out
    assert "\\x0a.png: damaged" in shown.err
    assert visible("plain 猫 👩‍🚀\n") == "plain 猫 👩‍🚀\n"
    assert visible_name("a\nb") == "a\\x0ab"


def test_twins_that_look_alike_are_refused_by_their_code_points(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "café")
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(form, encoding="utf-8")
    config = ImageDatasetConfig(
        index=0, origin="", cache_directory=tmp_path, image_directory=tmp_path, caption_extension=".txt"
    )
    with pytest.raises(DataError, match=r"only in how their accents are coded, 'cafe\\u0301' and 'caf\\xe9'"):
        list_items(config)
