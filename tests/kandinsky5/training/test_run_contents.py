"""A resumed run notices that what it reads has been replaced, and does not need what it does not read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dataset.cache.files import TextCacheMeta, write_text_cache
from dataset.cache.mask_cache import MaskCacheMeta, write_mask_cache
from dataset.cache.names import empty_text_cache_name, mask_cache_name
from kandinsky5.training import control
from kandinsky5.training.run_contents import changed
from modules.tensor_files import read_tensors, write_tensors
from tests.kandinsky5.training.training_runs import exit_code, lora_bytes, metrics, train, write_dataset

WORDS = ("--masked_loss", "--caption_dropout_rate", 0.3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Caches of clips, one of them with a mask, and of the empty caption."""
    path = write_dataset(tmp_path / "data")
    cache = tmp_path / "data/cache"
    meta = MaskCacheMeta(width=32, height=32, frames="", mask_fingerprint="none")
    latents = next(cache.glob("clip0_*k5.safetensors"))
    write_mask_cache(cache / mask_cache_name(latents.name), torch.ones(2, 4, 4), meta)
    empty = TextCacheMeta(
        caption1="", template="video", qwen_max_length=256, clip_max_length=77, encoder_fingerprint="none"
    )
    write_text_cache(cache / empty_text_cache_name("video"), torch.ones(3, 64), torch.ones(32), empty)
    return path


def cache_again(path: Path, **changes: str) -> None:
    """Write a cache once more, with some of its metadata changed."""
    tensors, metadata = read_tensors(path)
    assert changes.keys() <= metadata.keys()
    path.unlink()
    write_tensors(path, tensors, {**metadata, **changes})


@pytest.mark.parametrize(
    ("pattern", "key", "what"),
    [
        ("clip1_*k5.safetensors", "source_fingerprint", "the latents have"),
        ("clip1_*k5_te.safetensors", "caption1", "the captions have"),
        ("clip0_*mask*", "mask_fingerprint", "the masks have"),
        ("k5_empty_*", "qwen_max_length", "the empty caption or prior_caption have"),
    ],
)
def test_caches_made_again_from_something_else_are_not_the_same_run(
    pattern: str,
    key: str,
    what: str,
    dit: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (path,) = (data.parent / "cache").glob(pattern)
    output = tmp_path / "out"
    train(dit, data, output, *WORDS, "--max_train_steps", 1, "--save_state")
    cache_again(path)
    words = (*WORDS, "--save_state", "--resume", "auto")
    train(dit, data, output, *words, "--max_train_steps", 2)
    cache_again(path, **{key: "other"})
    assert exit_code(dit, data, output, *words, "--max_train_steps", 3) == 2
    assert f"{what} been cached again from other inputs" in capsys.readouterr().err
    train(dit, data, output, *words, "--max_train_steps", 3, "--allow_changed_data")
    train(dit, data, output, *words, "--max_train_steps", 4)
    assert [record["step"] for record in metrics(output, "step")] == [1, 2, 3, 4]


def test_another_model_under_the_same_name_is_said(
    dit: Path, data: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / dit.name
    shutil.copy(dit, moved)
    train(dit, data, tmp_path / "out", "--max_train_steps", 1, "--save_state")
    train(moved, data, tmp_path / "out", "--max_train_steps", 2, "--save_state", "--resume", "auto")
    assert "is not exact" not in said.text
    tensors, metadata = read_tensors(dit)
    write_tensors(moved, {name: tensor * 1.01 for name, tensor in tensors.items()}, metadata)
    train(moved, data, tmp_path / "out", "--max_train_steps", 3, "--save_state", "--resume", "auto")
    assert "the input of --dit has changed; the run continues with it and is not exact" in said.text


def test_only_what_both_parts_of_a_run_know_is_compared() -> None:
    """Earlier versions wrote nothing, and an option may bring masks in or leave them out."""
    names = {"a": "A", "b": "B", "c": "C"}
    assert changed({}, {"a": "1"}, names) == []
    assert changed({"a": "1", "b": "1"}, {"a": "2", "c": "1"}, names) == ["A"]


def test_epochs_that_are_counted_anew_overwrite_no_file_of_the_earlier_part(
    dit: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, large = (
        write_dataset(tmp_path / name, ((2, 4, 4, 5),) * count) for name, count in (("a", 2), ("b", 3))
    )
    output = tmp_path / "out"
    words = ("--save_every_n_epochs", 1, "--max_train_steps", 8)
    with monkeypatch.context() as patch:
        seen = iter(range(1, 99))
        patch.setattr(control, "take_control_word", lambda _: "stop" if next(seen) == 4 else "")
        train(dit, small, output, *words)
    earlier = (output / "lora-000002.safetensors").read_bytes()
    words = (*words, "--resume", "auto", "--allow_changed_data")
    assert exit_code(dit, large, output, *words) == 2
    said = capsys.readouterr().err
    assert "an epoch had 2 steps and now has 3" in said
    assert "the next one would be number 2 and lora-000002.safetensors" in said
    assert (output / "lora-000002.safetensors").read_bytes() == earlier
    (output / "lora-000002.safetensors").rename(output / "kept.safetensors")
    train(dit, large, output, *words)
    assert (output / "lora-000002.safetensors").is_file()


def test_a_resumed_run_does_not_need_the_weights_it_began_with(dit: Path, data: Path, tmp_path: Path) -> None:
    train(dit, data, tmp_path / "first", "--max_train_steps", 1)
    weights = (tmp_path / "first/lora.safetensors").rename(tmp_path / "begin.safetensors")
    words = ("--network_weights", weights, "--save_state")
    train(dit, data, tmp_path / "out", *words, "--max_train_steps", 1)
    shutil.copytree(tmp_path / "out", tmp_path / "with")
    words = (*words, "--resume", "auto")
    train(dit, data, tmp_path / "with", *words, "--max_train_steps", 2)
    weights.unlink()
    assert exit_code(dit, data, tmp_path / "new", *words) == 4
    train(dit, data, tmp_path / "out", *words, "--max_train_steps", 2)
    assert lora_bytes(tmp_path / "out/lora.safetensors") == lora_bytes(tmp_path / "with/lora.safetensors")
