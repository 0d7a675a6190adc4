"""Training's view of the caches: what is used, what is refused, and an order fixed by seed and epoch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset.cache.cached_dataset import BatchPlan, CachedDataset
from dataset.cache.fit import MatchOptions
from dataset.cache.index import IndexEntry, IndexItem, entry_key, index_path, update_index
from dataset.cache.names import empty_text_cache_name, text_cache_name
from dataset.config.config import DatasetConfig, load_dataset_config
from dataset.sources.items import SkippedItem
from kandinsky5.training.plan import data_order_hash
from modules.errors import CacheError
from modules.tensor_files import read_tensors, write_tensors
from tests.dataset.cache_tools import add_text, add_video_latents, write_indexes


def make_config(tmp_path: Path, *tables: str) -> DatasetConfig:
    """A dataset file with one video dataset per table; caches lie in c0, c1, ...; no source exists."""
    text = ""
    for number, table in enumerate(tables or ("",)):
        folder = tmp_path / f"c{number}"
        folder.mkdir(exist_ok=True)
        text += (
            f"[[datasets]]\nvideo_directory = '{tmp_path / 'gone'}'\ncaption_extension = '.txt'\n"
            f"cache_directory = '{folder}'\n"
        )
        defaults = {"resolution": "[64, 48]", "target_frames": "[5, 9]", "batch_size": "2"}
        text += "".join(f"{key} = {value}\n" for key, value in defaults.items() if key not in table)
        text += table + "\n"
    path = tmp_path / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    return load_dataset_config(path)


def fill(
    config: DatasetConfig, number: int = 0, names: Sequence[str] = "abcde", *, with_index: bool = True
) -> None:
    """Five videos of 5 frames; the first two have a cut of 9 frames too; captions of unequal length."""
    dataset = config.datasets[number]
    files: dict[str, list[str]] = {}
    for position, name in enumerate(names):
        files[name] = [add_video_latents(dataset.cache_directory, name)]
        if position < 2:
            files[name].append(add_video_latents(dataset.cache_directory, name, num_frames=9))
        add_text(dataset.cache_directory, name, tokens=2 + position)
    if with_index:
        write_indexes(dataset, files)


@pytest.fixture
def config(tmp_path: Path) -> DatasetConfig:
    """One dataset, cached."""
    config = make_config(tmp_path)
    fill(config)
    return config


def refused(config: DatasetConfig, **options: Any) -> str:
    """The message that ends a run before its first step."""
    with pytest.raises(CacheError) as caught:
        CachedDataset(config, MatchOptions(**options), seed=0)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_a_batch_holds_equal_shapes_and_texts_of_any_length(config: DatasetConfig) -> None:
    data = CachedDataset(config, seed=1)
    seen = []
    for plan in data.epoch_batches(1):
        batch = data.load_batch(plan)
        frames = (batch.num_frames[0] - 1) // 4 + 1
        assert batch.latents.shape == (len(plan.items), 16, frames, 6, 8)
        assert batch.latents_image is not None
        assert batch.latents_image.shape == (len(plan.items), 16, 2, 6, 8)
        assert batch.pooled_embed.shape == (len(plan.items), 4)
        assert len(set(batch.num_frames)) == 1
        assert set(batch.contents) == {"video"}
        for key, embeds in zip(batch.item_keys, batch.text_embeds, strict=True):
            assert embeds.shape == (2 + "abcde".index(key[2]), 8)
            assert embeds.dtype == torch.bfloat16
        seen += batch.item_keys
    assert sorted(seen) == sorted(
        [f"0/{n}_00000-005_0064x0048" for n in "abcde"] + [f"0/{n}_00000-009_0064x0048" for n in "ab"]
    )


def test_the_order_is_a_pure_function_of_seed_and_epoch(config: DatasetConfig) -> None:
    state = torch.random.get_rng_state()
    one, two = CachedDataset(config, seed=1), CachedDataset(config, seed=1)
    two.epoch_batches(5)
    assert one.epoch_batches(2) == two.epoch_batches(2)
    assert one.epoch_batches(1) != one.epoch_batches(2)
    assert CachedDataset(config, seed=2).epoch_batches(1) != one.epoch_batches(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_order_does_not_depend_on_where_the_caches_lie(config: DatasetConfig, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(tmp_path / "c0", elsewhere / "c0")
    moved = make_config(elsewhere)
    assert CachedDataset(moved, seed=1).epoch_batches(3) == CachedDataset(config, seed=1).epoch_batches(3)


def test_repeats_give_every_clip_that_often_with_keys_of_their_own(tmp_path: Path) -> None:
    config = make_config(tmp_path, "num_repeats = 3")
    fill(config)
    data = CachedDataset(config, seed=0)
    keys = [key for plan in data.epoch_batches(1) for key in plan.item_keys]
    assert len(keys) == len(set(keys)) == 21 == data.num_items
    assert len(data.epoch_batches(1)) == 8 + 3 == data.summaries[0].batches


def test_every_item_is_in_every_epoch_and_no_batch_mixes_datasets(tmp_path: Path) -> None:
    config = make_config(tmp_path, "", "batch_size = 3")
    fill(config, 0)
    fill(config, 1)
    data = CachedDataset(config, seed=0)
    for epoch in (1, 2, 7):
        batches = data.epoch_batches(epoch)
        assert sorted(i for plan in batches for i in plan.items) == list(range(14))
        assert all(len({key.split("/")[0] for key in plan.item_keys}) == 1 for plan in batches)


def test_timestep_quantiles_fill_every_slice_evenly(tmp_path: Path) -> None:
    config = make_config(tmp_path, "num_repeats = 8\nbatch_size = 1")
    fill(config)
    data = CachedDataset(config, seed=0, num_timestep_buckets=7)
    plans = data.epoch_batches(1)
    values = [q for plan in plans for q in plan.timestep_quantiles or ()]
    assert len(values) == 56
    assert torch.histc(torch.tensor(values), 7, 0, 1).tolist() == [8] * 7
    assert data.epoch_batches(1) == plans
    assert [p.timestep_quantiles for p in data.epoch_batches(2)] != [p.timestep_quantiles for p in plans]
    assert data.load_batch(plans[0]).timestep_quantiles == plans[0].timestep_quantiles
    for buckets in (None, 1):
        plain = CachedDataset(config, seed=0, num_timestep_buckets=buckets).epoch_batches(1)
        assert all(plan.timestep_quantiles is None for plan in plain)


def test_caption_dropout_swaps_in_the_empty_caption_at_its_rate(tmp_path: Path) -> None:
    config = make_config(tmp_path, "num_repeats = 40\ncaption_dropout_rate = 0.25")
    fill(config)
    folder = config.datasets[0].cache_directory
    assert "k5_empty_video" in refused(config)
    add_text(folder, "empty", tokens=1, file_name=empty_text_cache_name("video"))
    assert "the caption was 'empty', is ''" in refused(config)
    add_text(folder, "empty", tokens=1, caption="", file_name=empty_text_cache_name("video"))
    data = CachedDataset(config, seed=0)
    plans = data.epoch_batches(1)
    drops = [drop for plan in plans for drop in plan.drops_caption]
    assert 0.15 < sum(drops) / len(drops) < 0.35
    plan = next(plan for plan in plans if plan.drops_caption == (True, False))
    lengths = [embeds.shape[0] for embeds in data.load_batch(plan).text_embeds]
    assert lengths[0] == 1
    assert lengths[1] >= 2


def test_one_of_several_captions_is_drawn_by_seed_epoch_and_item(tmp_path: Path) -> None:
    config = make_config(tmp_path, "num_repeats = 30")
    fill(config)
    folder = config.datasets[0].cache_directory
    add_text(folder, "c", tokens=3, more=(5, 7))
    data = CachedDataset(config, seed=0)
    assert [item.num_captions for item in data.items] == [1, 1, 1, 1, 3, 1, 1]
    assert "dataset 0: 1 of 5 videos have several captions, 3 in all; one is drawn each time" in data.notes
    drawn = {0: 0, 1: 0, 2: 0}
    for plan in data.epoch_batches(1):
        lengths = [len(embeds) for embeds in data.load_batch(plan).text_embeds]
        for key, number, length in zip(plan.item_keys, plan.caption_numbers, lengths, strict=True):
            if key.startswith("0/c_"):
                drawn[number] += 1
                assert length == (3, 5, 7)[number]
            else:
                assert number == 0
    assert min(drawn.values()) >= 4
    assert CachedDataset(config, seed=0).epoch_batches(1) == data.epoch_batches(1)
    numbers = [
        {
            key: number
            for plan in batches
            for key, number in zip(plan.item_keys, plan.caption_numbers, strict=True)
        }
        for batches in (data.epoch_batches(1), data.epoch_batches(2))
    ]
    assert numbers[0] != numbers[1]
    assert all(set(plan.caption_numbers) == {0} for plan in data.measured_batches())


def test_captions_and_dropout_are_part_of_what_a_run_is_resumed_with(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    fill(config)
    plain = data_order_hash(CachedDataset(config, seed=0))
    add_text(config.datasets[0].cache_directory, "c", more=(5,))
    several = data_order_hash(CachedDataset(config, seed=0))
    name = empty_text_cache_name("video")
    add_text(config.datasets[0].cache_directory, "empty", caption="", file_name=name)
    dropping = replace(config, datasets=(replace(config.datasets[0], caption_dropout_rate=0.2),))
    assert len({plain, several, data_order_hash(CachedDataset(dropping, seed=0))}) == 3


@pytest.mark.parametrize("kind", ["latents", "text"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_cache_is_found_before_the_first_step(config: DatasetConfig, kind: str, share: float) -> None:
    folder = config.datasets[0].cache_directory
    path = folder / ("a_00000-005_0064x0048_k5.safetensors" if kind == "latents" else text_cache_name("c"))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    message = refused(config)
    assert path.name in message
    script = (
        "kandinsky5_cache_latents.py" if kind == "latents" else "kandinsky5_cache_text_encoder_outputs.py"
    )
    assert script in message


def test_missing_caches_of_both_kinds_are_listed_or_counted(config: DatasetConfig) -> None:
    dataset = config.datasets[0]
    latents = {n: [f"{n}_00000-005_0064x0048_k5.safetensors"] for n in "abcd"}
    write_indexes(dataset, latents, texts="bcde")
    message = refused(config)
    assert "1 item has no latent cache:\n  e" in message
    assert "1 item has no text cache:\n  a" in message
    assert "kandinsky5_cache_latents.py" in message
    assert "kandinsky5_cache_text_encoder_outputs.py" in message
    data = CachedDataset(config, MatchOptions(allow_missing=True), seed=0)
    assert [item.key[2] for item in data.items] == ["b", "c", "d"]
    assert "1 no latent cache, 1 no text cache" in data.summary_table()


def test_a_listed_file_that_is_gone_is_named(config: DatasetConfig) -> None:
    (config.datasets[0].cache_directory / text_cache_name("c")).unlink()
    assert "c_k5_te.safetensors: no such file" in refused(config)


def test_items_that_the_cache_scripts_skipped_are_not_missing(config: DatasetConfig) -> None:
    dataset = config.datasets[0]
    skipped = SkippedItem(name="e.mp4", reason="damaged", is_failure=True)
    latents = {n: [f"{n}_00000-005_0064x0048_k5.safetensors"] for n in "abcd"}
    write_indexes(dataset, latents, texts="abcde", skipped=[skipped])
    data = CachedDataset(config, seed=0)
    (summary,) = data.summaries
    assert (summary.found, summary.used, summary.clips) == (5, 4, 4)
    assert "1 damaged" in data.summary_table()
    assert "--strict" in refused(config, strict=True)


@pytest.mark.parametrize(("key", "is_excused"), [("there", False), ("here", True), ("", True)])
def test_an_item_left_out_excuses_itself_and_no_other_of_its_name(
    config: DatasetConfig, key: str, is_excused: bool
) -> None:
    """Indexes of older versions have no keys: names are all they hold."""
    dataset = config.datasets[0]
    skipped = SkippedItem(name="c.mp4", reason="no such file", is_failure=True, key=key)
    texts = [IndexItem(name=n, files=(text_cache_name(n),), key="here") for n in "abcde"]
    latents = {n: [f"{n}_00000-005_0064x0048_k5.safetensors"] for n in "abde"}
    write_indexes(dataset, latents)
    entry = IndexEntry(items=tuple(texts), skipped=(skipped,))
    update_index(dataset.cache_directory, "text", entry_key(dataset, "text"), entry)
    if is_excused:
        assert len(CachedDataset(config, seed=0).items) == 4
    else:
        assert "1 item has no latent cache:\n  c" in refused(config)


def test_for_an_item_that_left_the_dataset_both_commands_are_given(config: DatasetConfig) -> None:
    """After the latents script only the text script helps, and the other way round."""
    latents = {n: [f"{n}_00000-005_0064x0048_k5.safetensors"] for n in "abcd"}
    for left, right in (("abcd", "abcde"), ("abcd", "abc")):
        write_indexes(config.datasets[0], {n: latents[n] for n in left}, texts=right)
        message = refused(config)
        assert "kandinsky5_cache_latents.py" in message
        assert "kandinsky5_cache_text_encoder_outputs.py" in message


@pytest.mark.parametrize(
    ("limits", "tokens", "message"),
    [
        ((256, 77), 256, None),
        ((512, 77), 257, "qwen_max_length was 512, is 256 in generation"),
        ((512, 77), 256, None),
        ((64, 77), 64, "qwen_max_length was 64, is 256 in generation"),
        ((64, 77), 63, None),
        ((256, 40), 9, "clip_max_length was 40, is 77 in generation"),
    ],
)
def test_captions_that_generation_would_cut_elsewhere_are_refused(
    config: DatasetConfig, limits: tuple[int, int], tokens: int, message: str | None
) -> None:
    add_text(config.datasets[0].cache_directory, "b", tokens=tokens, limits=limits)
    assert len(CachedDataset(config, seed=0).items) == 7
    if message is None:
        assert len(CachedDataset(config, MatchOptions(text_limits=(256, 77)), seed=0).items) == 7
    else:
        assert message in refused(config, text_limits=(256, 77))


def test_without_any_cache_the_message_says_what_to_run(tmp_path: Path) -> None:
    message = refused(make_config(tmp_path))
    assert "no item can be trained on" in message
    assert "kandinsky5_cache_latents.py --dataset_config" in message


def test_caches_of_other_settings_are_refused(config: DatasetConfig, tmp_path: Path) -> None:
    assert "other settings" in refused(make_config(tmp_path, "resolution = [96, 64]"))
    assert "other settings" in refused(make_config(tmp_path, "source_fps = 30"))


def test_files_that_left_the_dataset_are_not_trained_on(config: DatasetConfig) -> None:
    add_video_latents(config.datasets[0].cache_directory, "old")
    add_text(config.datasets[0].cache_directory, "old")
    assert "0/old" not in {item.key[:5] for item in CachedDataset(config, seed=0).items}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("resolution = [96, 64]", "resolution was 64x48"),
        ("target_frames = [5, 13]", "frame_count was 9"),
        ("source_fps = 30", "fps was 'all'"),
        ("target_frames = [1]", "template was 'video', is 'image'"),
    ],
)
def test_without_an_index_each_file_is_held_against_the_dataset_file(
    tmp_path: Path, table: str, message: str
) -> None:
    fill(make_config(tmp_path), with_index=False)
    assert message in refused(make_config(tmp_path, table))


def test_without_an_index_all_files_are_used_and_it_is_said(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    fill(config, with_index=False)
    data = CachedDataset(config, seed=0)
    assert len(data.items) == 7
    assert any("no index" in note for note in data.notes)
    (config.datasets[0].cache_directory / text_cache_name("b")).unlink()
    assert "1 item has no text cache:\n  b" in refused(config)


def test_without_an_index_two_caches_of_one_item_are_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, "enable_bucket = true\nresolution = [64, 64]")
    folder = config.datasets[0].cache_directory
    one, other = (add_video_latents(folder, "a", size=size) for size in ((64, 64), (80, 48)))
    add_text(folder, "a")
    message = refused(config)
    assert one in message
    assert other in message


def test_caches_of_two_encoders_are_not_mixed(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    folder = config.datasets[0].cache_directory
    files = {n: [add_video_latents(folder, n, vae=f"vae {n}")] for n in "ab"}
    for name in "ab":
        add_text(folder, name)
    write_indexes(config.datasets[0], files)
    assert "2 different VAEs" in refused(config)
    add_video_latents(folder, "b", vae="vae a")
    add_text(folder, "b", encoder="other")
    assert "2 different text encoders" in refused(config)


def as_upstream(path: Path) -> None:
    """Take our marks from a cache file."""
    tensors, _ = read_tensors(path)
    write_tensors(path, tensors, {"architecture": "kandinsky5", "format_version": "1.0.1"})


def upstream(tmp_path: Path, num_frames: int, *, with_upstream_text: bool = False) -> DatasetConfig:
    """One video whose latents (and text) musubi-tuner wrote."""
    config = make_config(tmp_path, f"target_frames = [{num_frames}]")
    folder = config.datasets[0].cache_directory
    as_upstream(folder / add_video_latents(folder, "a", num_frames=num_frames))
    add_text(folder, "a")
    if with_upstream_text:
        as_upstream(folder / text_cache_name("a"))
    return config


def test_long_upstream_clips_are_refused_and_short_ones_used(tmp_path: Path) -> None:
    assert "shifts the content" in refused(upstream(tmp_path, 25))
    shutil.rmtree(tmp_path / "c0")
    config = upstream(tmp_path, 21)
    data = CachedDataset(config, seed=0)
    assert data.load_batch(data.epoch_batches(1)[0]).latents_image is None
    assert "latents_image" in refused(config, needs_image_latents=True)


def test_upstream_texts_are_refused_for_videos_unless_allowed(tmp_path: Path) -> None:
    config = upstream(tmp_path, 5, with_upstream_text=True)
    assert "--allow_upstream_text_cache" in refused(config)
    data = CachedDataset(config, MatchOptions(allow_upstream_text_cache=True), seed=0)
    assert sum("musubi-tuner" in note for note in data.notes) == 1


def test_many_problems_come_in_one_message_with_ten_examples(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    fill(config, names="abcdefghijklmnop")
    for path in config.datasets[0].cache_directory.glob("*_k5.safetensors"):
        path.write_bytes(b"")
    message = refused(config)
    assert "18 latent caches cannot be used" in message
    assert "... and 8 more" in message


def test_a_file_replaced_by_another_size_during_training_is_an_error(config: DatasetConfig) -> None:
    data = CachedDataset(config, seed=0)
    plan = BatchPlan(
        items=(0,), item_keys=("x",), drops_caption=(False,), caption_numbers=(0,), timestep_quantiles=None
    )
    path = data.items[0].latent_path
    add_video_latents(path.parent, "z", size=(96, 48))
    shutil.copy(path.parent / "z_00000-005_0096x0048_k5.safetensors", path)
    with pytest.raises(CacheError, match="another size"):
        data.load_batch(plan)


def test_very_long_names_are_matched(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    fill(config, names=["é" * 120, "é" * 119 + "e"])
    assert len(CachedDataset(config, seed=0).items) == 4
    index_path(config.datasets[0].cache_directory, "latents").unlink()
    assert len(CachedDataset(config, seed=0).items) == 4


def test_the_summary_counts_buckets_and_batches(config: DatasetConfig) -> None:
    table = CachedDataset(config, seed=0).summary_table()
    assert "64x48x5" in table
    assert "64x48x9" in table
    (summary,) = CachedDataset(config, seed=0).summaries
    assert summary.buckets == (("64x48x5", 5), ("64x48x9", 2))
    assert summary.batches == 4
