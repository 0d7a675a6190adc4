"""The generation script from its command line to its files, on the small models."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import kandinsky5.generation.clips as clips
import kandinsky5.generation.session as generation
import kandinsky5.sampling.pipeline as pipeline
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5_generate_video import main
from modules.tensor_files import read_header, read_tensors, write_tensors
from tests.kandinsky5.generation.generation_kit import Generate, frames_of, latents_of, refused

pytestmark = pytest.mark.usefixtures("one_thread")
BT709_LUMA = np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.fast
def test_a_prompt_becomes_a_video_that_reads_back(
    script: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[np.ndarray] = []
    decode = clips.decode_frames
    monkeypatch.setattr(clips, "decode_frames", lambda *a, **k: made.append(decode(*a, **k)) or made[0])
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
        "--verbose",
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
