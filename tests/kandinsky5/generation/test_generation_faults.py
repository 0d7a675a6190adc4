"""Generation with wrong input, on full disks and without memory: found early, and nothing lost."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import kandinsky5.generation.interactive as interactive
import kandinsky5.generation.outputs as outputs
import kandinsky5.sampling.pipeline as pipeline
from kandinsky5.generation.outputs import write_latents
from kandinsky5.model import precision
from kandinsky5.model.dit import DiffusionTransformer3D
from modules.errors import ResourceError
from modules.tensor_files import write_tensors
from tests.kandinsky5.generation.generation_kit import SMALL, Generate, frames_of, latents_of, refused

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("bare.mp4", "bare.mp4"),
        ("missing/deep/x.mp4", "missing/deep/x.mp4"),
        ("x", "x.mp4"),
        ("v1.5", "v1.5.mp4"),
    ],
)
def test_names_without_folder_or_extension_work(
    run: Generate, tmp_path: Path, word: str, expected: str
) -> None:
    run("--prompt", "x", "--output", word, "--steps", 1)
    assert (tmp_path / expected).is_file()


def test_a_folder_gets_a_name_from_time_and_seed(run: Generate, tmp_path: Path) -> None:
    run("--prompt", "x", "--output", "new_folder/", "--seed", 9, "--steps", 1)
    (made,) = (tmp_path / "new_folder").iterdir()
    assert made.name.endswith("_9.mp4")


def test_an_existing_file_is_kept_unless_told_otherwise(run: Generate, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"old")
    run("--prompt", "x", "--output", "x.mp4", "--steps", 1)
    assert (tmp_path / "x.mp4").read_bytes() == b"old"
    assert (tmp_path / "x-1.mp4").is_file()
    run("--prompt", "x", "--output", "x.mp4", "--steps", 1, "--overwrite")
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "x-1.mp4").read_bytes()


@pytest.mark.usefixtures("no_models")
def test_a_device_that_cannot_compute_the_vae_is_refused_before_anything_is_loaded(
    run: Generate, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: torch.device, dtype: torch.dtype) -> None:
        raise ResourceError(f"no convolution on {device} for {dtype}")

    monkeypatch.setattr(precision, "check_conv3d", refuse)
    write_latents(Path("l.safetensors"), torch.zeros(1, 16, 2, 4, 4), {})
    words = ("--output", "x.mp4", "--vae_dtype", "float16")
    for asked in (("--prompt", "x"), ("--latent_path", "l.safetensors")):
        size = SMALL if "--prompt" in asked else ()
        message = refused(run, 5, capsys, *asked, *words, size=size)
        assert "no convolution on cpu for torch.float16" in message


def test_a_latent_needs_no_vae(run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "check_conv3d", None)
    run("--prompt", "x", "--output", "x.safetensors", "--output_type", "latent", "--steps", 1)
    assert (tmp_path / "x.safetensors").is_file()


@pytest.mark.usefixtures("no_models")
def test_a_place_that_cannot_be_written_is_found_first(
    run: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    said = refused(run, 5, capsys, "--prompt", "x", "--output", "file/x.mp4")
    assert "file is a file; name a folder" in said


@pytest.mark.parametrize(
    "error", [av.FFmpegError(1, "broken"), OSError("disk full"), RuntimeError("patched")]
)
def test_a_failing_encoder_never_loses_the_frames(
    run: Generate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(outputs, "write_video", fail)
    message = refused(run, 5, capsys, "--prompt", "x", "--output", "x.mp4", "--steps", 1)
    assert str(Path("x_frames")) in message
    assert len(list((tmp_path / "x_frames").glob("*.png"))) == 5


def test_running_out_of_memory_decodes_in_smaller_tiles_and_at_last_keeps_the_latents(
    run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[int | None] = []
    decode, limit = pipeline.decode_at_tile_size, 128

    def decode_small_tiles_only(vae: Any, latents: Tensor, tile_px: int | None) -> np.ndarray:
        tried.append(tile_px)
        if tile_px is None or tile_px > limit:
            raise torch.OutOfMemoryError("patched")
        return decode(vae, latents, tile_px)

    monkeypatch.setattr(pipeline, "decode_at_tile_size", decode_small_tiles_only)
    run("--prompt", "x", "--output", "x.mp4", "--steps", 1)
    assert tried == [None, 512, 256, 128]
    limit = 0
    message = refused(run, 5, capsys, "--prompt", "x", "--output", "y.mp4", "--steps", 1)
    assert "--latent_path" in message
    assert latents_of(tmp_path / "y_latent.safetensors").shape == (1, 16, 2, 6, 4)


def test_pixels_that_are_not_finite_keep_the_latents(
    run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        pipeline.VideoVAE, "decode_windows", lambda *_, **__: [torch.full((1, 3, 5, 8, 8), torch.nan)]
    )
    assert "--vae_dtype float32" in refused(run, 5, capsys, "--prompt", "x", "--output", "y.mp4")
    assert (tmp_path / "y_latent.safetensors").is_file()


def test_latents_that_are_not_finite_stop_and_name_the_step(
    run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    forward = DiffusionTransformer3D.forward

    def nan_in_step_2(self: DiffusionTransformer3D, *args: Any, **options: Any) -> Tensor:
        calls.append(1)
        velocity = forward(self, *args, **options)
        return velocity * float("nan") if len(calls) > 2 else velocity

    monkeypatch.setattr(DiffusionTransformer3D, "forward", nan_in_step_2)
    message = refused(run, 6, capsys, "--prompt", "x", "--output", "x.mp4", "--steps", 4)
    assert "step 2 of 4" in message
    assert len(calls) == 4
    assert not list(tmp_path.glob("*.mp4"))


# Refusals before any model is loaded


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("words", "hints"),
    [
        (("--width", "511"), ("496 or 512",)),
        (("--height", "0"), ("--height: must lie within 1 .. 2048",)),
        (("--width", "-1"), ("must lie within 1 .. 2048",)),
        (("--width", "10000"), ("must lie within 1 .. 2048",)),
        (("--frames", "0"), ("must lie within 1 .. 509",)),
        (("--image", "x.png"), ("k5-pro-i2v-5s-sd",)),
        (("--blocks_to_swap", "60"), ("at most",)),
        (("--magcache",), ("no official ratios for k5-tiny-t2v",)),
        (("--flash_attn", "--dtype", "float32"), ("--dtype bfloat16",)),
        (("--trim_tail_frames", "5"), ("leaves nothing",)),
        (("--output", "x.png"), ("--frames 1",)),
    ],
)
def test_impossible_requests_say_what_is_possible(
    run: Generate, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], hints: tuple[str, ...]
) -> None:
    message = refused(run, 2, capsys, "--prompt", "x", "--output", "x.mp4", *words)
    assert all(hint in message for hint in hints)


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("option", ["--prompt", "--negative_prompt"])
def test_bytes_that_are_no_text_are_refused_as_a_prompt(
    run: Generate, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """As the system hands over bytes that are not UTF-8."""
    words = ("--prompt", "x", "--output", "x.mp4", option, "bad \udcff")
    assert f"{option}: U+DCFF at character 5" in refused(run, 2, capsys, *words)


def test_a_line_that_is_no_text_is_reported_and_the_session_goes_on(
    run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    lines = iter([b"bad \xff", b"\xff", b"good"])

    def read() -> str:
        try:
            line = next(lines)
        except StopIteration:
            raise EOFError from None
        return line.decode("utf-8", "surrogateescape" if b"bad" in line else "strict")  # as locales differ

    monkeypatch.setattr(interactive, "console_reader", lambda: read)
    run("--interactive", "--output", "out", "--output_type", "latent", "--steps", 1)
    assert "prompt: prompt: U+DCFF at character 5" in said.text
    assert "prompt: the line is not valid UTF-8" in said.text
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.usefixtures("no_models")
def test_image_to_video_needs_its_image(
    run: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str], media: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    base = ("--prompt", "x", "--output", "x.mp4")
    task, size = "k5-tiny-i2v", ("--frames", "9")
    assert "--image" in refused(run, 2, capsys, *base, task=task, size=size)
    assert "no such file" in refused(run, 2, capsys, *base, "--image", "gone.png", task=task, size=size)
    assert "broken.png" in refused(run, 3, capsys, *base, "--image", "broken.png", task=task, size=size)
    image = media / "chelsea.jpg"
    assert "at least 5" in refused(run, 2, capsys, *base, "--image", image, task=task, size=("--frames", "1"))


def cut_image(folder: Path, source: Path) -> Path:
    """A PNG with a whole header whose pixels end halfway."""
    with Image.open(source) as image:
        image.convert("RGB").resize((64, 64)).save(folder / "ok.png")
    content = (folder / "ok.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    return folder / "cut.png"


def test_an_image_that_ends_halfway_costs_only_its_prompt(
    run: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str], media: Path
) -> None:
    cut_image(tmp_path, media / "chelsea.jpg")
    lines = "one --i ok.png\ntwo --i cut.png\nthree --i ok.png --ei cut.png\n"
    (tmp_path / "p.txt").write_text(lines, encoding="utf-8")
    words = ("--from_file", "p.txt", "--output", "many", "--output_type", "latent")
    size = ("--width", "32", "--height", "32", "--frames", "9", "--steps", "1")
    message = refused(run, 3, capsys, *words, task="k5-tiny-i2v", size=size)
    assert "1 of 3 prompts were made" in message
    assert all(f"p.txt line {number}: cut.png: damaged" in message for number in (2, 3))
    assert len(list((tmp_path / "many").iterdir())) == 1


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("words", [("--image", "cut.png"), ("--image", "ok.png", "--image_last", "cut.png")])
def test_an_image_that_ends_halfway_is_found_before_anything_loads(
    run: Generate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    media: Path,
    words: tuple[str, ...],
) -> None:
    cut_image(tmp_path, media / "chelsea.jpg")
    size = ("--frames", "9")
    base = ("--prompt", "x", "--output", "x.mp4")
    assert "cut.png: damaged" in refused(run, 3, capsys, *base, *words, task="k5-tiny-i2v", size=size)
    (tmp_path / "p.txt").write_text("two --i cut.png\n", encoding="utf-8")
    words = ("--from_file", "p.txt", "--output", "many")
    assert "line 1: cut.png: damaged" in refused(run, 3, capsys, *words, task="k5-tiny-i2v", size=size)


@pytest.mark.usefixtures("no_models")
def test_wrong_model_files_are_all_named_at_once(
    run: Generate, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models["--dit"], models["--vae"] = (
        models["--vae"] / "diffusion_pytorch_model.safetensors",
        models["--dit"],
    )
    models["--text_encoder_clip"] = tmp_path / "no_clip"
    message = refused(run, 4, capsys, "--prompt", "x", "--output", "x.mp4")
    assert all(name in message for name in ("diffusion_pytorch_model", "tiny.safetensors", "no_clip"))
    models["--dit"] = tmp_path / "none.safetensors"
    assert "none.safetensors: no such file" in refused(run, 4, capsys, "--prompt", "x", "--output", "x.mp4")


@pytest.mark.usefixtures("no_models")
def test_wrong_loras_are_refused_before_anything_loads(
    run: Generate, tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--prompt", "x", "--output", "x.mp4", "--lora_weight")
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:100])
    write_tensors(
        tmp_path / "other.safetensors", {"transformer.blocks.0.attn.lora_A.weight": torch.zeros(4, 8)}
    )
    for name in ("missing.safetensors", "cut.safetensors", "other.safetensors"):
        assert name in refused(run, 4, capsys, *base, name)


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("new/x.txt", 2, "must end in .safetensors"),
        ("style.safetensors", 2, "exists already"),
        ("style.safetensors/x.safetensors", 5, "is a file; name a folder"),
    ],
)
def test_a_merged_model_needs_a_place_where_it_can_be_written_and_read(
    run: Generate,
    tmp_path: Path,
    lora: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    code: int,
    said: str,
) -> None:
    words = ("--lora_weight", lora, "--save_merged_model", name)
    assert said in refused(run, code, capsys, *words, size=())
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_models")
def test_a_latent_file_must_hold_a_latent(
    run: Generate, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(run, 4, capsys, "--latent_path", models["--dit"], "--output", "x.mp4", size=())
    assert "no saved latent" in message


@pytest.mark.usefixtures("no_models")
def test_a_saved_latent_is_not_decoded_into_less_than_it_holds(
    run: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tensors(tmp_path / "l.safetensors", {"latent": torch.zeros(16, 2, 6, 4)})
    words = ("--latent_path", "l.safetensors", "--output")
    assert "one image, not 5 frames" in refused(run, 2, capsys, *words, "x.png", size=())
    message = refused(run, 2, capsys, *words, "x.mp4", "--trim_tail_frames", 5, size=())
    assert "leaves nothing of 5 frames" in message
    assert [path.name for path in tmp_path.iterdir()] == ["l.safetensors"]


def test_decoding_with_output_type_both_says_where_the_latent_is(run: Generate, tmp_path: Path) -> None:
    write_tensors(tmp_path / "l.safetensors", {"latent": torch.zeros(16, 2, 6, 4)})
    words = ("--latent_path", "l.safetensors", "--output", "x.mp4", "--output_type", "both")
    said = said_by(run, *words, "--trim_tail_frames", 4, size=())
    assert "the latent is in l.safetensors already and is not written again" in said
    assert len(frames_of(tmp_path / "x.mp4")) == 1


@pytest.mark.usefixtures("no_models")
def test_a_device_that_holds_no_data_is_refused(run: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device meta" in refused(
        run, 5, capsys, "--prompt", "x", "--output", "x.mp4", "--device", "meta"
    )


def said_by(run: Generate, *words: object, **options: Any) -> list[str]:
    """All log lines of a run."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep()
    logging.getLogger("k5").addHandler(handler)
    try:
        run(*words, **options)
    finally:
        logging.getLogger("k5").removeHandler(handler)
    return lines


def test_a_lora_without_a_multiplier_has_1_and_that_is_said(
    run: Generate, tmp_path: Path, lora: Path
) -> None:
    words = ("--prompt", "x", "--steps", 1, "--output_type", "latent", "--lora_weight", lora, lora)
    said = said_by(run, *words, "--lora_multiplier", 0.5, "--output", "short.safetensors")
    assert "1 multipliers for 2 LoRAs: the rest are 1.0" in said
    run(*words, "--lora_multiplier", 0.5, 1, "--output", "whole.safetensors")
    assert torch.equal(*(latents_of(tmp_path / f"{name}.safetensors") for name in ("short", "whole")))


@pytest.mark.parametrize(
    ("frames", "made"), [(1, 1), (2, 1), (4, 1), (5, 5), (8, 5), (9, 9)], ids=lambda count: str(count)
)
def test_frames_are_rounded_down_to_4k_plus_1_and_that_is_said(
    run: Generate, tmp_path: Path, frames: int, made: int
) -> None:
    words = ("--prompt", "x", "--output_type", "latent", "--output", "x.safetensors")
    size = ("--width", "32", "--height", "32", "--steps", "1", "--frames", str(frames))
    said = said_by(run, *words, size=size)
    assert latents_of(tmp_path / "x.safetensors").shape[2] == (made - 1) // 4 + 1
    assert any(f"{frames}" in line and f"{made}" in line and "4k" in line for line in said) == (
        frames != made
    )


def test_prompts_of_nothing_and_of_thousands_of_words_are_used(run: Generate, tmp_path: Path) -> None:
    words = ("--output_type", "latent", "--steps", 1, "--output")
    run("--prompt", "", *words, "empty.safetensors")
    run("--prompt", "  \t ", *words, "spaces.safetensors")
    said = said_by(run, "--prompt", "rabbit " * 3000, *words, "long.safetensors")
    empty, spaces, long = (
        latents_of(tmp_path / f"{name}.safetensors") for name in ("empty", "spaces", "long")
    )
    assert torch.equal(empty, spaces)
    assert not torch.equal(empty, long)
    assert any("tokens and was cut" in line for line in said)


def test_one_bad_line_of_a_hundred_costs_only_itself(
    run: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"rabbit {number} --d {number}" for number in range(100)]
    lines[41] = "rabbit --w wide"
    (tmp_path / "p.txt").write_text("\n".join(lines), encoding="utf-8")
    words = ("--from_file", "p.txt", "--output", "many", "--output_type", "latent", "--guidance", 1)
    size = ("--width", "16", "--height", "16", "--frames", "1", "--steps", "1")
    message = refused(run, 3, capsys, *words, size=size)
    assert "99 of 100 prompts were made" in message
    assert "line 42" in message
    assert len(list((tmp_path / "many").iterdir())) == 99


def test_qwen_in_float8_changes_the_clip_a_little(script: Generate, tmp_path: Path) -> None:
    words = ("--prompt", "a fox", "--steps", 1, "--output_type", "latent", "--guidance", 1)
    script(*words, "--output", "a.safetensors")
    script(*words, "--output", "b.safetensors", "--fp8_llm")
    plain, fp8 = (latents_of(tmp_path / f"{name}.safetensors") for name in "ab")
    assert 0 < (fp8 - plain).norm() < 0.05 * plain.norm()
