"""The judge names what drawn clips show, and sees nothing where there is nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky5.sampling.video_files import write_png, write_video
from kandinsky5.small_world.judge import NOTHING, Verdict, judge, main
from kandinsky5.small_world.world import ALL_SCENES, COLOURS, FRAMES, LENGTHS, MOTIONS, SHAPES, Scene, draw

VISIBLE = [scene for scene in ALL_SCENES if scene.is_visible]
SOME = VISIBLE[::7]
"""A seventh of them, with every shape, colour and motion."""


def drawn(scenes: Sequence[Scene], seed: int = 0) -> Tensor:
    """Every scene once, [N, 3, 17, 64, 64]."""
    return draw(scenes, torch.Generator().manual_seed(seed))


def blurred(clips: Tensor) -> Tensor:
    """Twice through a binomial filter of three pixels, softer than the small VAE leaves edges."""
    binomial = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(binomial, binomial)[None, None]
    frames = clips.reshape(-1, 1, *clips.shape[-2:])
    for _ in range(2):
        frames = F.conv2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), kernel)
    return frames.view_as(clips)


def shifted(clips: Tensor) -> Tensor:
    """Two pixels to the right and one down; the border is repeated."""
    padded = F.pad(clips.flatten(0, 1), (2, 0, 1, 0), mode="replicate").view(*clips.shape[:3], 65, 66)
    return padded[..., :64, :64]


def paled(clips: Tensor) -> Tensor:
    """A quarter less contrast."""
    return 0.75 * clips + 0.1


def doubled(clips: Tensor) -> Tensor:
    """At 128 x 128 pixels."""
    return F.interpolate(clips.flatten(0, 1), scale_factor=2, mode="bilinear").view(
        *clips.shape[:3], 128, 128
    )


def misjudged(scenes: Sequence[Scene], clips: Tensor) -> list[tuple[Scene, Verdict]]:
    verdicts = [(scene, judge(clip)) for scene, clip in zip(scenes, clips, strict=True)]
    return [(scene, verdict) for scene, verdict in verdicts if not verdict.matches(scene)]


def test_every_drawn_clip_is_named_as_it_was_drawn() -> None:
    assert not misjudged(VISIBLE, drawn(VISIBLE))


@pytest.mark.parametrize("change", [blurred, shifted, paled, doubled])
def test_changed_clips_are_named_as_they_were_drawn(change: Callable[[Tensor], Tensor]) -> None:
    assert {scene.shape for scene in SOME} == set(SHAPES)
    assert {scene.colour for scene in SOME} == set(COLOURS)
    assert {scene.motion for scene in SOME} == set(MOTIONS)
    assert not misjudged(SOME, change(drawn(SOME, 1)))


@pytest.mark.parametrize("length", LENGTHS[1:3])
def test_the_beginning_of_a_clip_shows_the_same_motion(length: int) -> None:
    assert not misjudged(SOME, drawn(SOME, 2)[:, :, :length])


def test_a_picture_shows_shape_and_colour_and_no_motion() -> None:
    for scene, clip in zip(SOME, drawn(SOME, 3)[:, :, :1], strict=True):
        verdict = judge(clip)
        assert (verdict.shape, verdict.colour, verdict.motion) == (scene.shape, scene.colour, "still")


def test_a_clip_played_backwards_shows_the_opposite_motion() -> None:
    opposite = {
        "left": "right",
        "right": "left",
        "up": "down",
        "down": "up",
        "grows": "shrinks",
        "shrinks": "grows",
    }
    for motion, backwards in opposite.items():
        clip = draw([Scene("square", "blue", motion)], torch.Generator().manual_seed(0))[0]
        assert judge(clip.flip(1)).motion == backwards


def test_nothing_is_seen_in_noise_and_in_empty_or_even_clips() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 2 * torch.rand(3, FRAMES, 64, 64, generator=generator) - 1
    smooth = F.interpolate(
        torch.randn(1, 3, 5, 8, 8, generator=generator), (FRAMES, 64, 64), mode="trilinear"
    )[0]
    grey = torch.full((3, FRAMES, 64, 64), 0.4)
    red = torch.tensor([0.8, -0.8, -0.8])[:, None, None, None].expand(3, FRAMES, 64, 64)
    for clip in (noise, smooth, grey, red):
        assert judge(clip).shape == NOTHING


def test_a_shape_that_vanishes_halfway_is_not_found() -> None:
    clip = draw([Scene("circle", "red", "right")], torch.Generator().manual_seed(0))[0]
    clip[:, 8:] = 0.5
    assert judge(clip).shape == NOTHING


def test_the_command_prints_one_json_line_per_clip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = Scene("triangle", "green", "up")
    clip = draw([scene], torch.Generator().manual_seed(0))[0]
    frames = ((clip.permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    video, picture = tmp_path / "clip.mp4", tmp_path / "picture.png"
    write_video(video, frames, fps=24)
    write_png(picture, frames[0])
    main([str(video), str(picture)])
    of_video, of_picture = map(json.loads, capsys.readouterr().out.splitlines())
    assert (of_video["clip"], of_video["shape"], of_video["colour"], of_video["motion"]) == (
        str(video),
        "triangle",
        "green",
        "up",
    )
    assert (of_picture["shape"], of_picture["motion"]) == ("triangle", "still")


def test_the_command_names_a_file_that_is_no_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.mp4"
    path.write_text("no video", encoding="utf-8")
    with pytest.raises(SystemExit) as error:
        main([str(path)])
    assert error.value.code == 3
    assert "notes.mp4" in capsys.readouterr().err
