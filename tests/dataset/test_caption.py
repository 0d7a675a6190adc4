"""Captions by a vision model: the form of the files, what is left alone, what the vision tower is given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import caption
from dataset.caption import CaptionOptions, load_captioner, main, media_without_captions, vision_patches
from modules.errors import ModelFileError
from modules.files import write_new_text
from tests.dataset.media_tools import numbered_frames, write_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two videos and two images, one of each with a caption, and a damaged video."""
    for name in ("new", "old"):
        write_video(tmp_path / f"{name}.mp4", numbered_frames(9))
        Image.new("RGB", (60, 40), "red").save(tmp_path / f"{name} photo.png")
    for name in ("old", "old photo"):
        (tmp_path / f"{name}.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "broken.mp4").write_bytes(b"x" * 100)
    (tmp_path / "._new.mp4").write_bytes(b"x")
    (tmp_path / "scan.psd").write_bytes(b"x")
    return tmp_path


def test_missing_captions_are_written_and_nothing_else_is_touched(
    folder: Path, tiny_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder), "--text_encoder_qwen", str(tiny_models / "text_encoder"), "--device", "cpu"]
    words += ["--trigger", "zxc", "--max_tokens", "6", "--frames", "5"]
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 3
    assert "1 file has no caption:\n  broken.mp4: " in capsys.readouterr().err
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}
    assert texts.keys() == {"new.txt", "new photo.txt", "old.txt", "old photo.txt"}
    assert texts["old.txt"] == texts["old photo.txt"] == "mine"
    for name in ("new.txt", "new photo.txt"):
        assert texts[name].startswith("zxc, ")
        assert texts[name].endswith("\n")
        assert texts[name].count("\n") == 1
        assert "<|" not in texts[name]
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.txt")}
    (folder / "broken.mp4").unlink()
    main([*words, "--text_encoder_qwen", "nowhere"])  # nothing to do: the model is not even looked for
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.txt")} == times
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == {"._new.mp4"}


def test_a_stopped_run_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "broken.mp4").unlink()

    class Stops:
        def describe(self, frames: list[np.ndarray], content: str, seconds: float) -> str:
            if content == "image":
                raise KeyboardInterrupt
            assert len(frames) == 5
            assert seconds == pytest.approx(8 / 24)
            return "a caption"

    media = media_without_captions(folder, ".txt")
    assert [path.name for path, _ in media] == ["new.mp4", "new photo.png"]
    with pytest.raises(KeyboardInterrupt):
        caption.write_captions(Stops(), media, ".txt", 5)  # type: ignore[arg-type]
    assert [path.name for path, _ in media_without_captions(folder, ".txt")] == ["new photo.png"]


def test_a_text_that_exists_is_never_replaced(tmp_path: Path) -> None:
    assert write_new_text(tmp_path / "a.txt", "first")
    assert not write_new_text(tmp_path / "a.txt", "second")
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    assert not write_new_text(tmp_path / "link.txt", "third")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "link.txt"}
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "first"


def test_the_vision_tower_gets_patches_as_of_a_video(tiny_models: Path) -> None:
    captioner = load_captioner(str(tiny_models / "text_encoder"), CaptionOptions(), "cpu", None)
    processor = captioner._processor
    frames = list(np.random.default_rng(0).integers(0, 255, (3, 56, 84, 3), dtype=np.uint8))
    patches, grid = vision_patches(processor, frames)
    assert grid == (2, 4, 6)
    mean, std = (np.array(processor.image_mean), np.array(processor.image_std))
    pixels = np.stack([
        (frame / 255 - mean) / std for frame in [*frames, frames[-1]]
    ])  # the last moment twice
    # Source of the order: transformers, Qwen2VLVideoProcessor._preprocess.
    video = pixels.transpose(0, 3, 1, 2).reshape(2, 2, 3, 2, 2, 14, 3, 2, 14)
    expected = video.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(2 * 4 * 6, 3 * 2 * 14 * 14)
    np.testing.assert_allclose(patches, expected, atol=1e-5)


def test_models_that_are_no_qwen_or_bring_code_are_refused(tiny_models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="not Qwen2"):
        load_captioner(str(tiny_models / "text_encoder2"), CaptionOptions(), "cpu", None)
    shutil.copytree(tiny_models / "text_encoder", tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "q" / "config.json").write_text(
        json.dumps(config | {"auto_map": {"a": "b.C"}}), encoding="utf-8"
    )
    with pytest.raises(ModelFileError, match="auto_map"):
        load_captioner(str(tmp_path / "q"), CaptionOptions(), "cpu", None)
