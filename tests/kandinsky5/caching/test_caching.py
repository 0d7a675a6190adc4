"""The two cache scripts: the same bytes however they are run, nothing left out in silence, clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kandinsky5_cache_latents
import kandinsky5_cache_text_encoder_outputs
from dataset.cache.files import read_text_cache
from kandinsky5.caching import latents as caching
from kandinsky5.caching.preview import ascii_picture
from kandinsky5.model import precision
from kandinsky5.sampling.video_files import write_video
from kandinsky5.text.encoders import load_text_encoders
from kandinsky5.vae.video_vae import VideoVAE, load_vae, uint8_to_pixels
from modules.errors import ResourceError
from modules.seeding import generator_for
from modules.tensor_files import read_header, read_tensors
from tests.tiny import tiny_encoders


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Three tiny images and two tiny videos with captions, and a dataset file for them."""
    rng = np.random.default_rng(0)
    for folder in ("images", "videos"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b", "猫"):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
            tmp_path / "images" / f"{name}.png"
        )
        (tmp_path / "images" / f"{name}.txt").write_text(f"photo {name}", encoding="utf-8")
    for name in ("one", "two"):
        frames = rng.integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
        write_video(tmp_path / "videos" / f"{name}.mp4", frames, fps=24)
        (tmp_path / "videos" / f"{name}.txt").write_text(f"a video of {name} 走る", encoding="utf-8")
    write_dataset(tmp_path)
    return tmp_path


def write_dataset(project: Path, *, resolution: int = 32, extra: str = "") -> None:
    project.joinpath("dataset.toml").write_text(
        f"""
[general]
resolution = [{resolution}, {resolution}]
caption_extension = ".txt"
{extra}
[[datasets]]
image_directory = "{(project / "images").as_posix()}"
cache_directory = "{(project / "cache_images").as_posix()}"
[[datasets]]
video_directory = "{(project / "videos").as_posix()}"
cache_directory = "{(project / "cache_videos").as_posix()}"
target_frames = [1, 5]
""",
        encoding="utf-8",
    )


def cache_latents(project: Path, models: Path, *options: str) -> None:
    kandinsky5_cache_latents.main([
        "--dataset_config", str(project / "dataset.toml"), "--vae", str(models / "vae"),
        "--device", "cpu", *options,
    ])  # fmt: skip


def cache_text(project: Path, models: Path, *options: str) -> None:
    kandinsky5_cache_text_encoder_outputs.main([
        "--dataset_config", str(project / "dataset.toml"), "--device", "cpu",
        "--text_encoder_qwen", str(models / "text_encoder"),
        "--text_encoder_clip", str(models / "text_encoder2"), *options,
    ])  # fmt: skip


def contents(project: Path) -> dict[str, bytes]:
    files = [*project.glob("cache_*/*.safetensors"), *project.glob("cache_*/k5_index*.json")]
    return {path.relative_to(project).as_posix(): path.read_bytes() for path in sorted(files)}


def times(project: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in project.glob("cache_*/*.safetensors")}


def test_latents_are_the_vaes_draw_of_the_clip_and_of_its_end_frames(
    project: Path, tiny_models: Path
) -> None:
    cache_latents(project, tiny_models)
    names = sorted(path.name for path in (project / "cache_videos").glob("*.safetensors"))
    assert names == [f"{n}_00000-{f:03d}_0032x0032_k5.safetensors" for n in ("one", "two") for f in (1, 5)]
    tensors, metadata = read_tensors(project / "cache_videos" / names[1])
    latents = tensors["latents_2x4x4_float32"]
    ends = tensors["latents_image_2x4x4_float32"]
    assert latents.shape == ends.shape == (16, 2, 4, 4)
    assert metadata["architecture"] == "kandinsky5"
    assert metadata["latents_image"] == "single_image_encodes"

    from dataset.clips import load_clip, plan_clips
    from dataset.config.config import load_dataset_config
    from dataset.sources.listing import list_items

    dataset = load_dataset_config(project / "dataset.toml").datasets[1]
    clip = plan_clips(dataset, list_items(dataset), nabla_resize=False).clips[-2]
    assert clip.cache_name == names[1]
    pixels = uint8_to_pixels(torch.from_numpy(load_clip(clip)))[None]
    vae = load_vae(tiny_models / "vae", dtype=torch.float32, device="cpu")
    expected = vae.encode(pixels, [generator_for("vae", clip.item_key, "clip")])[0]
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    first = vae.encode(pixels[:, :, :1], [generator_for("vae", clip.item_key, "first")])[0]
    last = vae.encode(pixels[:, :, -1:], [generator_for("vae", clip.item_key, "last")])[0]
    torch.testing.assert_close(ends, torch.cat([first, last], dim=1), rtol=1e-5, atol=1e-5)


def test_caching_twice_and_with_more_threads_gives_the_same_bytes(project: Path, tiny_models: Path) -> None:
    cache_latents(project, tiny_models, "--num_workers", "1")
    cache_text(project, tiny_models)
    first = contents(project)
    cache_latents(project, tiny_models, "--num_workers", "4")
    cache_text(project, tiny_models)
    assert contents(project) == first
    assert len(first) == 3 + 4 + 3 + 2 + 2 + 4  # latents and texts of both datasets, empty captions, indexes


def test_another_batch_size_makes_fewer_calls_and_the_same_draw(
    project: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_latents(project, tiny_models)
    paths = sorted(project.glob("cache_*/*_k5.safetensors"))
    alone = [read_tensors(path)[0] for path in paths]
    calls: list[int] = []
    encode = VideoVAE.encode

    def counted(self: VideoVAE, pixels: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(pixels))
        return encode(self, pixels, *args, **kwargs)

    monkeypatch.setattr(VideoVAE, "encode", counted)
    cache_latents(project, tiny_models, "--batch_size", "3")
    assert sorted(calls) == [2, 2, 2, 2, 3]  # images; single frames; clips with their first and last frames
    for path, before in zip(paths, alone, strict=True):
        for name, tensor in read_tensors(path)[0].items():
            torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-5)


def test_existing_caches_are_kept_until_something_they_depend_on_changes(
    project: Path, tiny_models: Path
) -> None:
    cache_latents(project, tiny_models)
    cache_text(project, tiny_models)
    before, whole = times(project), contents(project)
    (project / "images" / "a.txt").write_text("another caption", encoding="utf-8")
    Image.new("RGB", (40, 40), "red").save(project / "images" / "b.png")
    damaged = project / "cache_videos" / "one_00000-005_0032x0032_k5.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:200])
    cache_latents(project, tiny_models, "--skip_existing")
    cache_text(project, tiny_models, "--skip_existing")
    after = times(project)
    assert {name for name in after if after[name] != before[name]} == {
        "a_k5_te.safetensors", "b_0040x0040_k5.safetensors", damaged.name,
    }  # fmt: skip
    assert damaged.read_bytes() == whole[f"cache_videos/{damaged.name}"]


def test_nothing_is_loaded_when_every_cache_is_fresh(
    project: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_latents(project, tiny_models)
    cache_text(project, tiny_models)
    for name in ("latents.load_vae", "captions.load_text_encoders"):
        monkeypatch.delattr(f"kandinsky5.caching.{name}")
    cache_latents(project, tiny_models, "--skip_existing")
    cache_text(project, tiny_models, "--skip_existing")


def test_a_cached_caption_is_what_generation_encodes(project: Path, tiny_models: Path) -> None:
    cache_text(project, tiny_models, "--batch_size", "1")
    encoders = load_text_encoders(tiny_encoders(tiny_models), device="cpu", dtype=torch.float32)
    for path, caption, content in (
        ("cache_videos/one_k5_te.safetensors", "a video of one 走る", "video"),
        ("cache_images/猫_k5_te.safetensors", "photo 猫", "image"),
    ):
        tensors, metadata = read_tensors(project / path)
        (expected,) = encoders.encode([caption], content)
        assert torch.equal(tensors["text_embeds_bfloat16"], expected.text_embeds)
        assert torch.equal(tensors["pooled_embed_float32"], expected.pooled_embed)
        assert tensors["attention_mask"].all()
        assert metadata["caption1"] == caption
        assert metadata["template"] == content


def test_the_empty_caption_is_cached_with_each_datasets_template(project: Path, tiny_models: Path) -> None:
    cache_text(project, tiny_models)
    encoders = load_text_encoders(tiny_encoders(tiny_models), device="cpu", dtype=torch.float32)
    for kind in ("image", "video"):
        path = project / f"cache_{kind}s" / f"k5_empty_{kind}.safetensors"
        before = path.stat().st_mtime_ns
        (expected,) = encoders.encode([""], "image" if kind == "image" else "video")
        assert torch.equal(read_text_cache(path).text_embeds, expected.text_embeds)
        cache_text(project, tiny_models, "--skip_existing", "--prune")
        assert path.stat().st_mtime_ns == before


def test_more_captions_leave_the_first_ones_bytes_and_an_edited_line_makes_that_item_again(
    project: Path, tiny_models: Path
) -> None:
    cache_text(project, tiny_models, "--batch_size", "2")
    single = {path.name: read_tensors(path)[0] for path in project.glob("cache_images/*_k5_te.safetensors")}
    write_dataset(project, extra="caption_lines = true")
    (project / "images" / "a.txt").write_text("photo a\n\n a red square \n", encoding="utf-8")
    cache_text(project, tiny_models, "--batch_size", "2")
    path = project / "cache_images" / "a_k5_te.safetensors"
    tensors, metadata = read_tensors(path)
    assert (metadata["caption1"], metadata["caption2"]) == ("photo a", "a red square")
    assert all(torch.equal(tensors[key], value) for key, value in single[path.name].items())
    assert not torch.equal(tensors["caption2_pooled_embed_float32"], tensors["pooled_embed_float32"])
    before = times(project)
    for text in ("photo a\na blue square", "photo a"):
        (project / "images" / "a.txt").write_text(text, encoding="utf-8")
        cache_text(project, tiny_models, "--skip_existing", "--batch_size", "2")
        after = times(project)
        assert {name for name in after if after[name] != before[name]} == {path.name}
        before = after
    assert read_tensors(path)[0].keys() == single[path.name].keys()


def test_nabla_resize_reaches_multiples_of_128_and_keeps_the_name(project: Path, tiny_models: Path) -> None:
    for name in ("images/a", "images/b", "videos/two"):
        (project / f"{name}.txt").unlink()
    cache_latents(project, tiny_models, "--nabla_resize")
    header = read_header(project / "cache_videos" / "one_00000-005_0032x0032_k5.safetensors")
    assert header.tensors["latents_2x16x16_float32"].shape == (16, 2, 16, 16)


def test_what_is_skipped_is_listed_with_its_reason(
    project: Path, tiny_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "images" / "a.txt").unlink()
    (project / "images" / "b.png").write_bytes(b"not an image")
    with pytest.raises(SystemExit) as caught:
        cache_latents(project, tiny_models)
    assert caught.value.code == 3
    assert "1 damaged item was left out, everything else is cached" in capsys.readouterr().err
    index = json.loads((project / "cache_images" / "k5_index_latents.json").read_text(encoding="utf-8"))
    (entry,) = index["entries"].values()
    assert sorted(item["name"] for item in entry["skipped"]) == ["a.png", "b.png"]
    assert [item["name"] for item in entry["items"]] == ["猫"]
    cache_latents(project, tiny_models, "--skip_bad", "--skip_existing")
    with pytest.raises(SystemExit) as caught:
        cache_latents(project, tiny_models, "--strict")
    assert caught.value.code == 3


def test_media_of_other_formats_beside_good_ones_stand_in_the_table_and_are_an_error_with_strict(
    project: Path, tiny_models: Path, said: pytest.LogCaptureFixture
) -> None:
    for name in ("scan.psd", "photo.cr2", "._a.png"):
        (project / "images" / name).write_bytes(b"x")
        (project / "images" / name).with_suffix(".txt").write_bytes(b"\xff")
    cache_latents(project, tiny_models)
    (table,) = (record.getMessage() for record in said.records if record.getMessage().startswith("done"))
    assert table.splitlines()[3].split() == [
        "0",
        "(images)",
        "5",
        "3",
        "3",
        "0",
        "2",
        "format",
        "is",
        "not",
        "read",
    ]
    assert "scan.psd: format is not read (extension .psd)" in said.text
    assert "2 hidden files are left out: ._a.png, ._a.txt" in said.text
    with pytest.raises(SystemExit) as caught:
        cache_latents(project, tiny_models, "--strict")
    assert caught.value.code == 3


def test_unused_caches_stay_until_prune(project: Path, tiny_models: Path) -> None:
    cache_latents(project, tiny_models)
    for suffix in (".png", ".txt"):
        (project / "images" / f"a{suffix}").unlink()
    unused = project / "cache_images" / "a_0040x0040_k5.safetensors"
    foreign = project / "cache_images" / "mine_0040x0040_k5.safetensors"
    foreign.write_bytes(b"something else")
    cache_latents(project, tiny_models, "--skip_existing", "--keep_cache")
    assert unused.is_file()
    cache_latents(project, tiny_models, "--skip_existing", "--prune")
    assert not unused.exists()
    assert foreign.is_file()


def test_prune_keeps_the_caches_of_a_video_that_cannot_be_read_this_time(
    project: Path, tiny_models: Path
) -> None:
    cache_latents(project, tiny_models)
    cache_text(project, tiny_models)
    before = times(project)
    video, caption = project / "videos" / "one.mp4", project / "videos" / "one.txt"
    whole = video.read_bytes()
    video.write_bytes(b"")
    caption.write_bytes(b"\xff\xfe")
    cache_latents(project, tiny_models, "--skip_existing", "--prune", "--skip_bad")
    cache_text(project, tiny_models, "--skip_existing", "--prune", "--skip_bad")
    assert times(project) == before
    video.write_bytes(whole)
    caption.write_text("a video of one 走る", encoding="utf-8")
    cache_latents(project, tiny_models, "--skip_existing", "--prune")
    cache_text(project, tiny_models, "--skip_existing", "--prune")
    assert times(project) == before


def test_prune_deletes_the_caches_of_earlier_settings_of_the_same_dataset_file_only(
    project: Path, tiny_models: Path
) -> None:
    dataset = project / "dataset.toml"
    text = dataset.read_text(encoding="utf-8")
    other = project / "other.toml"

    def clips() -> list[str]:
        names = (path.name for path in (project / "cache_videos").glob("one_*"))
        return sorted(name[4:13] for name in names)

    other.write_text(text.replace("[1, 5]", "[1]"), encoding="utf-8")
    cache_latents(project, tiny_models)
    cache_latents(project, tiny_models, "--dataset_config", str(other), "--prune")
    assert clips() == ["00000-001", "00000-005"]  # the first dataset file uses both
    dataset.write_text(text.replace("[1, 5]", "[5]"), encoding="utf-8")
    cache_latents(project, tiny_models, "--prune")
    assert clips() == ["00000-001", "00000-005"]
    other.write_text(text.replace("[1, 5]", "[5]"), encoding="utf-8")
    cache_latents(project, tiny_models, "--dataset_config", str(other))
    assert clips() == ["00000-001", "00000-005"]
    cache_latents(project, tiny_models, "--dataset_config", str(other), "--prune")
    assert clips() == ["00000-005"]


def test_numbers_that_are_not_finite_stop_the_run_and_write_nothing(
    project: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = VideoVAE.encode
    monkeypatch.setattr(VideoVAE, "encode", lambda *args, **kwargs: encode(*args, **kwargs) * float("nan"))
    with pytest.raises(SystemExit) as caught:
        cache_latents(project, tiny_models)
    assert caught.value.code == 3
    assert "a_0040x0040_k5.safetensors" in capsys.readouterr().err
    assert contents(project) == {}


def test_a_device_that_cannot_compute_the_vae_is_refused_before_anything_is_loaded_or_written(
    project: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(device: torch.device, dtype: torch.dtype) -> None:
        raise ResourceError(f"no convolution on {device} for {dtype}")

    monkeypatch.setattr(precision, "check_conv3d", refuse)
    monkeypatch.setattr(caching, "load_vae", None)
    with pytest.raises(SystemExit) as caught:
        cache_latents(project, tiny_models, "--vae_dtype", "bfloat16")
    assert caught.value.code == 5
    assert "no convolution on cpu for torch.bfloat16" in capsys.readouterr().err
    assert contents(project) == {}


def test_a_full_disk_names_the_folder_and_leaves_no_cut_file(
    project: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("modules.files.os.fsync", full)
        with pytest.raises(SystemExit) as caught:
            cache_latents(project, tiny_models)
    assert caught.value.code == 5
    assert "No space left on device" in capsys.readouterr().err
    assert contents(project) == {}
    assert not list(project.glob("cache_*/.k5tmp-*"))
    cache_latents(project, tiny_models, "--skip_existing")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--vae", "nowhere"], 2, "--vae nowhere: no such file or folder"),
        (["--debug_mode", "image"], 2, "--debug_mode image opens windows"),
        (["--prune", "--keep_cache"], 2, "contradict each other"),
        (["--strict", "--skip_bad"], 2, "contradict each other"),
        (["--device", "nonsense"], 5, "--device nonsense cannot be used"),
        (["--dataset_config", "nowhere.toml"], 2, "nowhere.toml: no such file"),
        (["--vae_spatial_tile_sample_min_size", "30"], 2, "multiple of 8"),
    ],
)
def test_wrong_options_end_with_their_code_and_one_message(
    options: list[str], code: int, message: str, project: Path, tiny_models: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        cache_latents(project, tiny_models, *options)
    assert caught.value.code == code
    assert message in capsys.readouterr().err
    assert contents(project) == {}


def test_wrong_models_are_refused_before_anything_is_written(
    project: Path, tiny_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dit = str(tiny_models / "model" / "tiny.safetensors")
    with pytest.raises(SystemExit) as caught:
        cache_latents(project, tiny_models, "--vae", dit)
    assert caught.value.code == 4
    with pytest.raises(SystemExit) as caught:
        cache_text(project, tiny_models, "--text_encoder_qwen", str(tiny_models / "vae"))
    assert caught.value.code == 4
    errors = capsys.readouterr().err
    assert "looks like a Kandinsky 5 DiT" in errors
    assert "not Qwen2.5-VL" in errors
    assert contents(project) == {}


def test_debug_video_writes_files_to_look_at_and_needs_no_vae(project: Path) -> None:
    kandinsky5_cache_latents.main([
        "--dataset_config",
        str(project / "dataset.toml"),
        "--debug_mode",
        "video",
    ])
    assert (project / "cache_videos" / "k5_preview" / "one_00000-005_0032x0032_k5.mp4").is_file()
    assert (project / "cache_images" / "k5_preview" / "a_0040x0040_k5.jpg").is_file()
    assert contents(project) == {}


def test_debug_console_prints_the_chosen_number_of_clips(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kandinsky5_cache_latents.main([
        "--dataset_config", str(project / "dataset.toml"), "--debug_mode", "console",
        "--console_num_images", "1", "--console_width", "20",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count("caption: ") == 2
    assert max(len(line) for line in printed.splitlines() if set(line) <= set(" .:-=+*#%@")) == 20


def test_a_picture_in_characters_goes_from_dark_to_light() -> None:
    ramp = np.repeat(np.linspace(0, 255, 40, dtype=np.uint8)[None, :, None], 20, axis=0).repeat(3, axis=2)
    lines = ascii_picture(ramp, 20).splitlines()
    assert len(lines) == 5
    assert lines[0][0] == " "
    assert lines[0][-1] == "@"


@pytest.mark.parametrize(
    "script", ["kandinsky5_cache_latents.py", "kandinsky5_cache_text_encoder_outputs.py"]
)
def test_help_comes_without_torch(script: str, root: Path) -> None:
    code = (
        f"import sys, runpy; sys.argv = [{script!r}, '--help']\n"
        f"try: runpy.run_path({str(root / script)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result.stderr
    assert "--skip_existing" in result.stdout
