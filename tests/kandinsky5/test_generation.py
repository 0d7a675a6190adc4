"""The generation script from its command line to its files, on the small models."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import kandinsky5.generation as generation
import kandinsky5.outputs as outputs
import kandinsky5.sampling_pipeline as pipeline
from kandinsky5.dit import DiffusionTransformer3D
from kandinsky5.outputs import read_latents
from kandinsky5.text_encoders import TextEncoders, load_text_encoders
from kandinsky5_generate_video import main
from modules.tensor_files import read_header, read_tensors, write_tensors

SMALL = ("--width", "32", "--height", "48", "--frames", "5", "--steps", "2")
LAYER = "visual_transformer_blocks.0.self_attention.to_query"

BT709_LUMA = np.array([0.2126, 0.7152, 0.0722])

Generate = Callable[..., None]


@pytest.fixture
def models(tiny_models: Path) -> dict[str, Path]:
    return {
        "--dit": tiny_models / "model" / "tiny.safetensors",
        "--vae": tiny_models / "vae",
        "--text_encoder_qwen": tiny_models / "text_encoder",
        "--text_encoder_clip": tiny_models / "text_encoder2",
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and wait long for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoders(tiny_models: Path) -> TextEncoders:
    folders = str(tiny_models / "text_encoder"), str(tiny_models / "text_encoder2")
    return load_text_encoders(*folders, device="cpu", dtype=torch.float32)


@pytest.fixture
def run(script: Generate, encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch) -> Generate:
    """`script` with text encoders that were loaded once for all tests."""
    monkeypatch.setattr(encoders, "free", lambda: None)
    monkeypatch.setattr(generation.ModelLoader, "text_encoders", lambda _self: encoders)
    return script


@pytest.fixture
def script(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generate:
    """main() with the small models and sizes; options given again win."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object, task: str = "k5-tiny-t2v", size: Sequence[str] = SMALL) -> None:
        paths = [str(word) for pair in models.items() for word in pair]
        main(["--task", task, *paths, "--device", "cpu", *size, *map(str, words)])

    return call


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA that changes one layer noticeably, with trigger words."""
    generator = torch.Generator().manual_seed(1)
    factors = {
        f"transformer.{LAYER}.lora_A.weight": torch.randn(4, 128, generator=generator) * 0.3,
        f"transformer.{LAYER}.lora_B.weight": torch.randn(128, 4, generator=generator) * 0.3,
    }
    write_tensors(tmp_path / "style.safetensors", factors)
    return tmp_path / "style.safetensors"


def latents_of(path: Path) -> Tensor:
    return read_latents(path)[0]


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def refused(
    run: Generate, code: int, capsys: pytest.CaptureFixture[str], *words: object, **options: Any
) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*words, **options)
    message = capsys.readouterr().err
    assert caught.value.code == code, message
    return message


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading anything is a failure."""

    def fail(*_args: object, **_options: object) -> None:
        raise AssertionError("a model was loaded")

    for name in ("text_encoders", "vae", "dit"):
        monkeypatch.setattr(generation.ModelLoader, name, fail)


@pytest.fixture
def loads(run: Generate, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills up with the models that are loaded."""
    names: list[str] = []
    for name in ("text_encoders", "vae", "dit"):
        load = getattr(generation.ModelLoader, name)
        monkeypatch.setattr(
            generation.ModelLoader, name, lambda self, n=name, f=load: names.append(n) or f(self)
        )
    return names


def test_a_prompt_becomes_a_video_that_reads_back(
    script: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[np.ndarray] = []
    decode = generation.decode_frames
    monkeypatch.setattr(generation, "decode_frames", lambda *a, **k: made.append(decode(*a, **k)) or made[0])
    script("--prompt", "猫 cat", "--output", "新しい/動画.mp4", "--fps", 12)
    path = tmp_path / "新しい" / "動画.mp4"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.width, stream.height) == (5, 12, 32, 48)
        settings = json.loads(container.metadata["comment"])
    assert settings["prompt"] == "猫 cat"
    assert settings["seed"] == "42"
    assert settings["dit"] == "tiny.safetensors"
    assert str(tmp_path) not in json.dumps(settings, ensure_ascii=False)
    # Brightness alone: these models make noise, whose colours yuv420p cannot hold.
    assert np.abs((frames_of(path)[0] - made[0][0].astype(float)) @ BT709_LUMA).mean() < 6


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_video(
    run: Generate, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("--prompt", "cat", "--seed", seed, "--output", f"{name}.mp4")
    first, second, third = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert first == second
    assert first != third


def test_the_printed_command_repeats_the_video(
    run: Generate, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, media: Path
) -> None:
    said: list[str] = []
    monkeypatch.setattr(generation.log, "info", lambda text, *values: said.append(text % values))
    image = media / "chelsea.jpg"
    size = ("--frames", "9", "--steps", "2")
    words = (
        "--image",
        image,
        "--lora_weight",
        lora,
        "--lora_multiplier",
        0.5,
        "--cpu_noise",
        "--output_type",
        "latent",
    )
    run(
        "--prompt",
        "-- it's",
        "--negative_prompt",
        "",
        *words,
        "--output",
        "a.mp4",
        task="k5-tiny-i2v",
        size=size,
    )
    command = next(line for line in said if line.startswith("to make this again")).split("\n")[1]
    main([*shlex.split(command)[2:], "--output", "b.mp4"])
    assert torch.equal(
        latents_of(tmp_path / "a_latent.safetensors"), latents_of(tmp_path / "b_latent.safetensors")
    )


def test_a_png_is_one_image_by_the_image_template(run: Generate, tmp_path: Path) -> None:
    run("--prompt", "cat", "--output", "one.png", size=("--width", "32", "--height", "48", "--steps", "1"))
    with Image.open(tmp_path / "one.png") as image:
        assert image.size == (32, 48)
        assert image.info["frames"] == "1"


def test_output_types_write_what_they_say(run: Generate, tmp_path: Path) -> None:
    run("--prompt", "cat", "--output", "both.mp4", "--output_type", "both", "--trim_tail_frames", 2)
    run("--prompt", "cat", "--output", "set", "--output_type", "latent_images")
    assert len(frames_of(tmp_path / "both.mp4")) == 3
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [f"{i:05d}.png" for i in range(5)]
    header = read_header(tmp_path / "set_latent.safetensors")
    assert header.tensors["latent"].shape == (16, 2, 6, 4)
    assert {
        "seeds",
        "prompt",
        "negative_prompt",
        "height",
        "width",
        "video_length",
        "infer_steps",
        "guidance_scale",
    } <= set(header.metadata)


def test_saved_latents_decode_to_the_same_frames_without_a_dit(
    run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--prompt", "cat", "--output", "a.mp4", "--output_type", "both")
    monkeypatch.setattr(generation.ModelLoader, "dit", None)
    monkeypatch.setattr(generation.ModelLoader, "text_encoders", None)
    run("--latent_path", "a_latent.safetensors", "--output", "b.mp4")
    assert np.array_equal(frames_of(tmp_path / "a.mp4"), frames_of(tmp_path / "b.mp4"))


def test_no_metadata_stores_nothing_of_the_prompt(run: Generate, tmp_path: Path) -> None:
    run("--prompt", "secretcat", "--output", "a.mp4", "--output_type", "both", "--no_metadata")
    for path in (tmp_path / "a.mp4", tmp_path / "a_latent.safetensors"):
        assert b"secretcat" not in path.read_bytes()


def test_a_prompt_file_loads_each_model_once_and_equals_single_runs(
    run: Generate, tmp_path: Path, loads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "a dog --d 7 --n\nbad --w x\na cat --w 48 --f 6 --s 1 --g 1\nno room --w 5000\n"
    (tmp_path / "p.txt").write_text(lines, encoding="utf-8")
    single = ("--prompt", "a dog", "--seed", 7, "--negative_prompt", "", "--output_type", "latent")
    run(*single, "--output", "one.safetensors")
    message = refused(run, 3, capsys, "--from_file", "p.txt", "--output", "many", "--output_type", "both")
    assert loads[-3:] == ["text_encoders", "dit", "vae"]
    assert len(loads) == 5  # two of them for the single run
    assert "2 of 4 prompts were made" in message
    assert "line 2" in message
    assert "line 4" in message
    assert len(list((tmp_path / "many").glob("*.mp4"))) == 2
    (dog,) = (tmp_path / "many").glob("*_7_latent.safetensors")
    assert torch.equal(latents_of(dog), latents_of(tmp_path / "one.safetensors"))
    (cat,) = (tmp_path / "many").glob("*_42_latent.safetensors")
    assert latents_of(cat).shape == (1, 16, 2, 6, 6)


def test_without_guidance_there_is_one_pass_per_step(run: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = DiffusionTransformer3D.forward
    monkeypatch.setattr(
        DiffusionTransformer3D, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k)
    )
    for guidance, passes in ((1, 2), (0, 4), (5, 4)):
        calls.clear()
        run(
            "--prompt",
            "x",
            "--guidance",
            guidance,
            "--output",
            f"g{guidance}.safetensors",
            "--output_type",
            "latent",
        )
        assert len(calls) == passes


def test_an_image_stays_the_first_frame_and_a_last_one_the_last(
    run: Generate, tmp_path: Path, media: Path
) -> None:
    images = ("--image", media / "chelsea.jpg", "--image_last", media / "coffee.jpg")
    size = ("--width", "48", "--height", "32", "--frames", "13", "--steps", "2")
    for name, words in (("first", images[:2]), ("both", images)):
        run(
            "--prompt",
            "x",
            *words,
            "--output",
            f"{name}.safetensors",
            "--output_type",
            "latent",
            task="k5-tiny-i2v",
            size=size,
        )
    first, both = (latents_of(tmp_path / f"{name}.safetensors") for name in ("first", "both"))
    assert torch.equal(first[:, :, 0], both[:, :, 0])  # four latent frames: too few for the normalisation
    assert not torch.equal(first[:, :, 1:], both[:, :, 1:])
    assert first[0, :, 0].std() > 0.1


def test_the_size_follows_from_the_image(run: Generate, tmp_path: Path) -> None:
    Image.new("RGB", (300, 150), "red").save(tmp_path / "wide.png")
    words = ("--image", "wide.png", "--output", "a.safetensors", "--output_type", "latent")
    run("--prompt", "x", *words, task="k5-tiny-i2v", size=("--frames", "9", "--steps", "1"))
    assert latents_of(tmp_path / "a.safetensors").shape == (
        1,
        16,
        3,
        12,
        22,
    )  # 176 x 96 from the area of 128 x 128


def test_a_multiplier_of_0_is_no_lora_and_both_modes_agree(run: Generate, tmp_path: Path, lora: Path) -> None:
    cases = {
        "none": (),
        "zero": ("--lora_weight", lora, "--lora_multiplier", 0),
        "merged": ("--lora_weight", lora, "--lora_multiplier", 0.5),
        "beside": ("--lora_weight", lora, "--lora_multiplier", 0.5, "--lora_mode", "runtime"),
    }
    for name, words in cases.items():
        run("--prompt", "x", *words, "--output", f"{name}.safetensors", "--output_type", "latent")
    latents = {name: latents_of(tmp_path / f"{name}.safetensors") for name in cases}
    assert torch.equal(latents["none"], latents["zero"])
    effect = (latents["merged"] - latents["none"]).norm()
    assert effect > 1e-3
    assert (latents["merged"] - latents["beside"]).norm() < 0.01 * effect


def test_trigger_words_come_before_the_prompt_unless_declined(
    run: Generate, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors(lora, read_tensors(lora)[0], {"trigger": "arcshot"})
    seen: list[str] = []
    encode = pipeline.TextEncoders.encode
    monkeypatch.setattr(
        pipeline.TextEncoders,
        "encode",
        lambda self, captions, content: seen.extend(captions) or encode(self, captions, content),
    )
    run("--prompt", "a cat", "--guidance", 1, "--lora_weight", lora, "--output", "a.mp4")
    run("--prompt", "a cat", "--guidance", 1, "--lora_weight", lora, "--no_lora_trigger", "--output", "b.mp4")
    assert seen == ["arcshot a cat", "a cat"]


def test_the_merged_model_makes_the_same_video(
    run: Generate, models: dict[str, Path], tmp_path: Path, lora: Path
) -> None:
    run("--lora_weight", lora, "--save_merged_model", "merged.safetensors", size=())
    run("--prompt", "x", "--lora_weight", lora, "--output", "a.safetensors", "--output_type", "latent")
    models["--dit"] = tmp_path / "merged.safetensors"
    run("--prompt", "x", "--output", "b.safetensors", "--output_type", "latent")
    a, b = (latents_of(tmp_path / f"{name}.safetensors") for name in "ab")
    assert (a - b).norm() < 1e-2 * a.norm()  # the merged file is rounded to bfloat16


def test_fp8_keeps_the_effect_of_a_lora(run: Generate, tmp_path: Path, lora: Path) -> None:
    for fp8 in ((), ("--fp8_base",)):
        for words in ((), ("--lora_weight", lora)):
            name = f"{len(fp8)}{len(words)}.safetensors"
            run("--prompt", "x", *fp8, *words, "--steps", 1, "--output", name, "--output_type", "latent")
    plain, plain_lora, fp8, fp8_lora = (
        latents_of(tmp_path / f"{n}.safetensors") for n in ("00", "02", "10", "12")
    )
    effect, fp8_effect = plain_lora - plain, fp8_lora - fp8
    assert (fp8_effect - effect).norm() < 0.5 * effect.norm()
    assert fp8_effect.norm() > 0.7 * effect.norm()


def test_nabla_attention_makes_a_video(run: Generate, tmp_path: Path) -> None:
    size = ("--width", "128", "--height", "128", "--frames", "5", "--steps", "1")
    run(
        "--prompt",
        "x",
        "--output",
        "a.safetensors",
        "--output_type",
        "latent",
        task="k5-tiny-nabla",
        size=size,
    )
    assert torch.isfinite(latents_of(tmp_path / "a.safetensors")).all()


def test_swapped_blocks_change_nothing(run: Generate, tmp_path: Path, lora: Path) -> None:
    words = ("--prompt", "x", "--lora_weight", lora, "--lora_mode", "runtime", "--output_type", "latent")
    run(*words, "--output", "a.safetensors")
    run(*words, "--output", "b.safetensors", "--blocks_to_swap", 2)
    assert torch.equal(*(latents_of(tmp_path / f"{name}.safetensors") for name in "ab"))


def test_magcache_skips_passes(run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[generation.MagCache] = []
    build = generation.MagCache
    monkeypatch.setattr(generation, "MagCache", lambda *a, **k: made.append(build(*a, **k)) or made[-1])
    ratios = ("--magcache", "--magcache_mag_ratios", *[1.0] * 14)
    run("--prompt", "x", "--steps", 8, *ratios, "--output", "a.mp4")
    assert len(made[0].skipped) == 16
    assert sum(made[0].skipped) > 4


# Names and what happens to files


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
def test_a_place_that_cannot_be_written_is_found_first(
    run: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "cannot write" in refused(run, 5, capsys, "--prompt", "x", "--output", "file/x.mp4")


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
    decode, limit = pipeline._decode, 128

    def decode_small_tiles_only(vae: Any, latents: Tensor, tile_px: int | None) -> np.ndarray:
        tried.append(tile_px)
        if tile_px is None or tile_px > limit:
            raise torch.OutOfMemoryError("patched")
        return decode(vae, latents, tile_px)

    monkeypatch.setattr(pipeline, "_decode", decode_small_tiles_only)
    run("--prompt", "x", "--output", "x.mp4", "--steps", 1)
    assert tried == [None, 512, 256, 128]
    limit = 0
    message = refused(run, 5, capsys, "--prompt", "x", "--output", "y.mp4", "--steps", 1)
    assert "--latent_path" in message
    assert latents_of(tmp_path / "y_latent.safetensors").shape == (1, 16, 2, 6, 4)


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
        (("--height", "0"), ("from 16 to 2048",)),
        (("--width", "-1"), ("from 16 to 2048",)),
        (("--width", "10000"), ("from 16 to 2048",)),
        (("--frames", "0"), ("1 to 509",)),
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
def test_a_latent_file_must_hold_a_latent(
    run: Generate, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(run, 4, capsys, "--latent_path", models["--dit"], "--output", "x.mp4", size=())
    assert "no saved latent" in message


def test_interactive_keeps_the_models_and_survives_wrong_lines(
    run: Generate, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["a cat --d 1", "", "a dog --q 3", "a dog --d 2 --s 1"])

    def console(_prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", console)
    run("--interactive", "--output", "out")
    assert sorted(loads) == ["dit", "text_encoders", "vae"]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name.rsplit("_", 1)[1] for name in names] == ["1.mp4", "2.mp4"]
