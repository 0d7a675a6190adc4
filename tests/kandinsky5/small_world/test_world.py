"""What is drawn is what the captions say, and the base's share of the world leaves the held-out part out."""

from __future__ import annotations

import torch

from kandinsky5.small_world.world import (
    ALL_SCENES,
    BASE_SCENES,
    COLOURS,
    FRAMES,
    SHAPES,
    SIZE,
    WORDINGS,
    Scene,
    coverage,
    draw,
)


def test_the_same_seed_draws_the_same_clip_and_another_seed_another_one() -> None:
    scene = Scene("square", "red", "left")
    first, again, other = (draw([scene], torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == (1, 3, FRAMES, SIZE, SIZE)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= -1
    assert first.max() <= 1


def test_times_choose_frames_of_the_same_motion() -> None:
    scene = Scene("circle", "blue", "right")
    whole = draw([scene], torch.Generator().manual_seed(0))
    ends = draw([scene], torch.Generator().manual_seed(0), times=torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, whole[:, :, [0, -1]])


def test_all_shapes_cover_about_the_same_area() -> None:
    grid = torch.arange(-31.5, 32)
    areas = {
        shape: float(
            coverage(shape, grid[None, :], grid[:, None], torch.tensor(10.0), torch.tensor(0.0)).sum()
        )
        for shape in SHAPES
    }
    assert max(areas.values()) < 1.6 * min(areas.values()), areas


def test_captions_differ_between_scenes_in_every_wording() -> None:
    captions = {scene.caption(wording) for scene in ALL_SCENES for wording in range(len(WORDINGS))}
    assert len(captions) == len(ALL_SCENES) * len(WORDINGS)


def test_the_base_does_not_see_what_is_held_out_and_sees_every_other_word() -> None:
    assert {scene.shape for scene in BASE_SCENES} == {"circle", "square", "triangle"}
    assert "spins" not in {scene.motion for scene in BASE_SCENES}
    assert not any((scene.colour, scene.shape) == ("red", "triangle") for scene in BASE_SCENES)
    assert {scene.colour for scene in BASE_SCENES} == set(COLOURS)
    assert len(BASE_SCENES) == (3 * 6 - 1) * 7


def test_a_share_of_the_colours_can_be_drawn_from_all_hues() -> None:
    scenes = [Scene("square", "red", "still")] * 40
    named = draw(scenes, torch.Generator().manual_seed(0))[:, :, 0, 32, 32]
    mixed = draw(scenes, torch.Generator().manual_seed(0), any_colour=0.5)[:, :, 0, 32, 32]
    assert (named[:, 0] > 0.6).all()
    assert 8 < (mixed[:, 0] < 0.6).sum() < 32
