"""Datasets of drawn clips, and the score and the page of generated ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from kandinsky5.sampling.video_files import write_video
from kandinsky5.small_world.clips import main as draw_clips
from kandinsky5.small_world.clips import spread_scenes
from kandinsky5.small_world.page import PAGE_NAME, SHEET_NAME
from kandinsky5.small_world.page import main as make_page
from kandinsky5.small_world.score import main as score
from kandinsky5.small_world.score import scene_of_prompt
from kandinsky5.small_world.world import ALL_SCENES, WORDINGS, Scene, draw
from kandinsky5.vae.video_vae import pixels_to_uint8

RED_STAR = Scene("star", "red", "left")
BLUE_CIRCLE = Scene("circle", "blue", "grows")


def write_generated(folder: Path, shown: Scene, prompt: str) -> None:
    """A clip that carries its prompt as the generation script writes it."""
    folder.mkdir(exist_ok=True)
    clip = draw([shown], torch.Generator().manual_seed(0))[0]
    frames = pixels_to_uint8(clip).permute(1, 2, 3, 0).numpy()
    name = f"{len(list(folder.iterdir())):02d}.mp4"
    write_video(folder / name, frames, fps=24, metadata={"prompt": prompt})


def test_every_caption_names_its_scene() -> None:
    for scene in ALL_SCENES:
        assert {scene_of_prompt(scene.caption(wording)) for wording in range(len(WORDINGS))} == {scene}
    assert scene_of_prompt("a red house moves left") is None
    assert scene_of_prompt("a hundred circles") is None


def test_drawn_clips_come_with_captions_and_show_many_colours_and_motions(tmp_path: Path) -> None:
    draw_clips([str(tmp_path), "--shape", "star", "--clips", "12"])
    captions = [path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("*.txt"))]
    scenes = [scene_of_prompt(caption) for caption in captions]
    assert len(scenes) == len(list(tmp_path.glob("*.mp4"))) == 12
    assert {scene.shape for scene in scenes if scene} == {"star"}
    assert len({scene.colour for scene in scenes if scene}) == 6
    assert len({scene.motion for scene in scenes if scene}) == 7


def test_a_spread_takes_every_scene_once_before_any_twice() -> None:
    for count in (1, 2, 3, 12, 42):
        scenes = list(ALL_SCENES[:count])
        assert set(spread_scenes(scenes, count)) == set(scenes)


def test_spinning_circles_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        draw_clips([str(tmp_path), "--shape", "circle", "--motion", "spins"])
    assert error.value.code == 2
    assert "do not visibly spin" in capsys.readouterr().err


def test_the_score_counts_what_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made"
    for shown in (RED_STAR, Scene("circle", "red", "left")):
        write_generated(folder, shown, RED_STAR.caption())
    write_generated(folder, RED_STAR, "a house")
    score([str(folder)])
    of_prompt, of_all = map(json.loads, capsys.readouterr().out.splitlines())
    assert of_prompt == {
        "folder": "made",
        "prompt": "a red star moves left",
        "clips": 2,
        "shape": 0.5,
        "colour": 1.0,
        "motion": 1.0,
        "all_three": 0.5,
    }
    assert of_all == {**of_prompt, "prompt": "all"}


def test_the_page_shows_both_sides_without_scripts_and_links_files_that_exist(tmp_path: Path) -> None:
    taught, before, after, page = (tmp_path / name for name in ("taught", "before", "after", "page"))
    draw_clips([str(taught), "--shape", "star", "--clips", "2"])
    for scene in (RED_STAR, BLUE_CIRCLE):
        write_generated(before, BLUE_CIRCLE, scene.caption())
        write_generated(after, scene, scene.caption())
    make_page([str(page), "--taught", str(taught), "--without", str(before), "--with", str(after)])
    text = (page / PAGE_NAME).read_text(encoding="utf-8")
    links = re.findall(r'src="([^"]+)"', text)
    assert len(links) == 2 + 4
    assert all((page / link).is_file() for link in links)
    assert "<script" not in text
    assert text.count('class="yes"') == 3
    assert text.count('class="no"') == 1
    assert (page / SHEET_NAME).is_file()
