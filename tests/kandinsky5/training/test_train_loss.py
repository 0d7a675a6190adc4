"""Training with several captions, caption dropout, masks and the prior term."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataset.cache.files import TextCacheMeta, write_text_cache
from dataset.cache.mask_cache import MaskCacheMeta, write_mask_cache
from dataset.cache.names import empty_text_cache_name, mask_cache_name, prior_text_cache_name, text_cache_name
from kandinsky5.model import assembly
from kandinsky5.training import control
from modules.tensor_files import read_header, read_tensors, write_tensors
from tests.kandinsky5.training.training_runs import (
    CLIPS,
    SMALLER,
    lora_bytes,
    metrics,
    train,
    write_dataset,
)
from tests.tiny import tiny_dit

PRIOR = ("--prior_loss_weight", 0.5)
ALL = (*PRIOR, "--caption_dropout_rate", 0.3, "--masked_loss", "--mask_min_weight", 0.1)


def write_text(folder: Path, file_name: str, *captions: str) -> None:
    generator = torch.Generator().manual_seed(len(file_name))
    pairs = [
        (torch.randn(2 + n, 64, generator=generator), torch.randn(32, generator=generator))
        for n in range(len(captions))
    ]
    meta = TextCacheMeta(
        caption1=captions[0],
        more_captions=captions[1:],
        template="video",
        qwen_max_length=256,
        clip_max_length=77,
        encoder_fingerprint="none",
    )
    write_text_cache(folder / file_name, *pairs[0], meta, pairs[1:])


def write_rich_dataset(folder: Path, extra: str = "", *, batch_size: int = 2) -> Path:
    """The usual caches; two clips have three captions and a mask; with the captions of no clip."""
    path = write_dataset(folder, batch_size=batch_size)
    cache = folder / "cache"
    for number in (0, 3):
        write_text(cache, text_cache_name(f"clip{number}"), "one", "two", "three")
    write_text(cache, empty_text_cache_name("video"), "")
    write_text(cache, prior_text_cache_name("video"), "a dog")
    for latents in sorted(cache.glob("clip[03]*_k5.safetensors")):
        frames, height, width, _ = CLIPS[int(latents.name[4])]
        weights = torch.rand(frames, height, width, generator=torch.Generator().manual_seed(1))
        meta = MaskCacheMeta(width=width * 8, height=height * 8, frames="", mask_fingerprint="none")
        write_mask_cache(cache / mask_cache_name(latents.name), weights, meta)
    path.write_text(path.read_text(encoding="utf-8") + extra, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rich_dataset(tmp_path_factory.mktemp("data"))


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter(range(1, 99))
    monkeypatch.setattr(control, "take_control_word", lambda _: "stop" if next(seen) == step else "")


@pytest.mark.parametrize("task", ["k5-tiny-t2v", "k5-tiny-i2v"])
def test_with_all_of_them_a_resumed_run_equals_an_uninterrupted_one(
    task: str, dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*ALL, "--max_train_steps", 9, "--network_dropout", 0.2)
    train(dit, dataset, tmp_path / "whole", *options, task=task)
    stop_at(4, monkeypatch)
    train(dit, dataset, tmp_path / "parts", *options, task=task)
    monkeypatch.undo()
    train(dit, dataset, tmp_path / "parts", *options, "--resume", "auto", task=task)
    parts, whole = (metrics(tmp_path / name, "step") for name in ("parts", "whole"))
    assert [{**step, "seconds": 0} for step in parts] == [{**step, "seconds": 0} for step in whole]
    assert lora_bytes(tmp_path / "parts/lora.safetensors") == lora_bytes(tmp_path / "whole/lora.safetensors")


@pytest.mark.parametrize(
    "words", [("--masked_loss",), ("--caption_dropout_rate", 0.5), PRIOR], ids=lambda words: words[0]
)
def test_each_of_them_changes_what_is_learned(
    words: tuple[object, ...], dit: Path, dataset: Path, tmp_path: Path
) -> None:
    for name, options in (("plain", ()), ("with", words)):
        train(dit, dataset, tmp_path / name, "--max_train_steps", 4, *options)
    plain, changed = (lora_bytes(tmp_path / name / "lora.safetensors") for name in ("plain", "with"))
    assert plain != changed


def test_the_prior_term_is_logged_and_begins_at_zero(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(dit, dataset, tmp_path / "plain", "--max_train_steps", 3)
    train(dit, dataset, tmp_path / "prior", "--max_train_steps", 3, *PRIOR)
    plain, records = (metrics(tmp_path / name, "step") for name in ("plain", "prior"))
    assert "prior_loss" not in plain[0]
    assert records[0]["prior_loss"] == 0
    assert records[0]["loss"] == plain[0]["loss"]
    assert all(0 < record["prior_loss"] < record["loss"] for record in records[1:])


def test_a_lora_names_what_it_was_trained_with_but_no_caption(dit: Path, tmp_path: Path) -> None:
    data = write_rich_dataset(tmp_path, 'prior_caption = "a dog"\n')
    train(dit, data, tmp_path / "out", "--max_train_steps", 1, *ALL)
    metadata = read_header(tmp_path / "out/lora.safetensors").metadata
    assert (metadata["ss_masked_loss"], metadata["ss_prior_loss_weight"]) == ("True", "0.5")
    assert json.loads(metadata["ss_datasets"])[0]["caption_dropout_rate"] == 0.3
    assert "a dog" not in str(metadata)


def test_a_strong_prior_keeps_the_lora_near_the_base_model(dit: Path, dataset: Path, tmp_path: Path) -> None:
    """On the prior's own caption; the weight is what decides."""
    drift = []
    for weight in (1e-6, 100.0):
        output = tmp_path / str(weight)
        train(dit, dataset, output, "--max_train_steps", 12, "--prior_loss_weight", weight)
        drift.append(metrics(output, "step")[-1]["prior_loss"] / weight)
    assert drift[1] < 0.5 * drift[0]


def test_what_saves_memory_changes_no_bit_of_it(dataset: Path, tmp_path: Path) -> None:
    dit = tmp_path / "dit.safetensors"
    write_tensors(dit, {key: value.detach() for key, value in tiny_dit().state_dict().items()})
    common = (*ALL, "--override_dit", "{}", "--max_train_steps", 3, "--gradient_checkpointing")
    train(dit, dataset, tmp_path / "plain", *common)
    expected = lora_bytes(tmp_path / "plain/lora.safetensors")
    for number, saving in enumerate((("--blocks_to_swap", 1), ("--gradient_checkpointing_cpu_offload",))):
        train(dit, dataset, tmp_path / str(number), *common, *saving)
        assert lora_bytes(tmp_path / str(number) / "lora.safetensors") == expected, saving


def marked(folder: Path) -> Path:
    """A second dataset whose captions are the prior."""
    write_rich_dataset(folder / "prior")
    extra = (
        f"\n[[datasets]]\nvideo_directory = {json.dumps((folder / 'prior/clips').as_posix())}\n"
        f"cache_directory = {json.dumps((folder / 'prior/cache').as_posix())}\n"
        'caption_extension = ".txt"\ntarget_frames = [5, 9]\nis_prior = true\n'
    )
    return write_rich_dataset(folder, extra)


def test_a_marked_dataset_has_the_prior_term_alone_and_the_others_do_not(dit: Path, tmp_path: Path) -> None:
    data = marked(tmp_path)
    train(dit, data, tmp_path / "out", "--max_train_steps", 8, *PRIOR)
    seen = set()
    for record in metrics(tmp_path / "out", "step"):
        is_prior = record["items"][0].startswith("1/")
        seen.add(is_prior)
        assert record["prior_loss"] == (record["loss"] if is_prior else 0)
    assert seen == {True, False}


def remove(caches: Path, names: str) -> None:
    for path in caches.glob(f"clip[{names}]_*"):
        path.unlink()


def test_a_run_that_would_learn_nothing_is_refused_before_a_model_loads(
    dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the only learned clip is held out, once there is none."""
    monkeypatch.setattr(assembly, "load_model", None)
    data, output = marked(tmp_path), tmp_path / "out"
    remove(tmp_path / "cache", "0134")
    remove(tmp_path / "prior/cache", "2")
    assert refusal(dit, data, output, *PRIOR, "--validation_split", 0.1) == 2
    assert "--validation_split 0.1 holds out every clip that is learned" in capsys.readouterr().err
    remove(tmp_path / "cache", "2")
    assert refusal(dit, data, output, *PRIOR) == 3
    assert "only datasets with is_prior have items that can be used" in capsys.readouterr().err


def refusal(dit: Path, data: Path, output: Path, *words: object) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        train(dit, data, output, *words)
    return stop.value.code


def test_what_cannot_work_is_refused_in_words(
    dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = marked(tmp_path), tmp_path / "out"
    assert refusal(dit, data, output) == 2
    assert "dataset 1 has is_prior, which needs --prior_loss_weight" in capsys.readouterr().err
    data = write_rich_dataset(tmp_path, 'prior_caption = "a cat"\n')
    assert refusal(dit, data, output, *PRIOR) == 3
    assert "k5_prior_video.safetensors: the caption was 'a dog', is 'a cat'" in capsys.readouterr().err
    (tmp_path / "cache/k5_prior_video.safetensors").unlink()
    (tmp_path / "cache/k5_empty_video.safetensors").unlink()
    assert refusal(dit, data, output, *PRIOR, "--caption_dropout_rate", 0.1) == 3
    message = capsys.readouterr().err
    assert "k5_prior_video.safetensors: prior_caption, which --prior_loss_weight needs" in message
    assert "k5_empty_video.safetensors: the empty caption, which caption dropout needs" in message
    assert "kandinsky5_cache_text_encoder_outputs.py" in message


def test_a_resumed_run_says_which_weights_changed_and_keeps_its_captions(
    dit: Path, dataset: Path, tmp_path: Path, said: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state", *PRIOR)
    more = ("--max_train_steps", 2, "--save_state", "--resume", "auto")
    assert refusal(dit, dataset, tmp_path, *more, *PRIOR, "--caption_dropout_rate", 0.1) == 2
    assert "the dataset or its batch sizes have changed" in capsys.readouterr().err
    train(dit, dataset, tmp_path, *more, "--prior_loss_weight", 0.25)
    assert "--prior_loss_weight changes from 0.5 to 0.25" in said.text


def test_the_validation_loss_knows_neither_masks_nor_dropout(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    options = ("--validation_dataset_config", dataset, "--max_train_steps", 1, "--learning_rate", 1e-12)
    for name, words in (("plain", ()), ("all", ALL)):
        train(dit, dataset, tmp_path / name, *options, *words)
    plain, other = (metrics(tmp_path / name, "validation")[0]["base_loss"] for name in ("plain", "all"))
    assert plain == other


@pytest.mark.slow
def test_two_processes_train_as_one_with_all_of_them(
    dit: Path, dataset: Path, tmp_path: Path, root: Path
) -> None:
    options = (*ALL, "--max_train_steps", 4, "--save_precision", "fp32", "--timestep_sampling", "shift")
    train(dit, dataset, tmp_path / "one", *options, "--gradient_accumulation_steps", 2)
    words = (
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2),
        *("--num_machines", 1, "--num_cpu_threads_per_process", 1, root / "kandinsky5_train_network.py"),
        *("--task", "k5-tiny-t2v", "--dit", dit, "--dataset_config", dataset, "--output_name", "lora"),
        *("--output_dir", tmp_path / "two", "--network_dim", 4, "--network_alpha", 4, "--seed", 3),
        *("--learning_rate", 1e-3, "--discrete_flow_shift", 5.0),
        *("--max_data_loader_n_workers", 0, *SMALLER, *options),
    )
    subprocess.run([str(word) for word in words], check=True, timeout=300)
    for name in ("loss", "prior_loss"):
        one, two = ([r[name] for r in metrics(tmp_path / n, "step")] for n in ("one", "two"))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    one, two = (read_tensors(tmp_path / name / "lora.safetensors")[0] for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
