"""A share of the source files is held out by a hash of their names alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset.cache.cached_dataset import CachedDataset
from dataset.cache.held_out import hash_position, hold_out
from dataset.cache.names import empty_text_cache_name
from modules.errors import ConfigError
from tests.dataset.cache.test_cached_dataset import fill, make_config
from tests.dataset.cache_tools import add_text


def dataset(folder: Path, names: str = "abcde") -> CachedDataset:
    """The first two files have two cuts each."""
    folder.mkdir(exist_ok=True)
    config = make_config(folder)
    fill(config, names=names)
    return CachedDataset(config, seed=1)


def sources(data: CachedDataset) -> set[str]:
    return {item.source for item in data.items}


def test_all_cuts_of_a_file_stay_on_one_side_and_nothing_is_lost(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    for share in (0.45, 0.5, 0.9):
        trained, held = hold_out(data, share)
        assert not sources(trained) & sources(held)
        assert sorted(item.key for item in (*trained.items, *held.items)) == sorted(i.key for i in data.items)
        seen = {key for plan in trained.epoch_batches(3) for key in plan.item_keys}
        assert seen == {item.key for item in trained.items}
    assert len(data.items) == 7


def test_neither_order_nor_seed_nor_other_files_decide(tmp_path: Path) -> None:
    small, large = dataset(tmp_path / "small"), dataset(tmp_path / "large", "zaybxcwdev")
    for share in (0.45, 0.8):
        held_small, held_large = (sources(hold_out(data, share)[1]) for data in (small, large))
        assert held_small == held_large & sources(small)
    assert sum(hash_position(f"clip{number}") < 0.25 for number in range(2000)) == pytest.approx(500, abs=60)


def test_tables_and_lengths_count_what_is_left(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    trained, held = hold_out(data, 0.5)
    for part in (trained, held):
        (summary,) = part.summaries
        assert (summary.used, summary.clips) == (len(sources(part)), len(part.items))
        assert summary.batches == len(part.epoch_batches(1))
        assert part.num_items == len(part.items)
    assert f"{len(sources(held))} of 5 source files ({len(held.items)} clips)" in trained.notes[-1]
    assert data.summaries[0].clips == 7


def test_an_empty_side_is_refused_with_a_share_that_works(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    with pytest.raises(ConfigError, match="holds out none of the 5") as caught:
        hold_out(data, 0.001)
    share = float(str(caught.value).rpartition("From ")[2].split()[0])
    assert len(sources(hold_out(data, share)[1])) == 1
    with pytest.raises(ConfigError, match="holds out all"):
        hold_out(data, 0.999)
    with pytest.raises(ConfigError, match="only one source file"):
        hold_out(dataset(tmp_path / "one", "a"), 0.5)


def test_measured_batches_hold_every_clip_once_with_its_caption(tmp_path: Path) -> None:
    config = make_config(tmp_path, "num_repeats = 3\ncaption_dropout_rate = 0.5")
    fill(config)
    folder = config.datasets[0].cache_directory
    add_text(folder, "empty", tokens=1, caption="", file_name=empty_text_cache_name("video"))
    orders = []
    for seed in (1, 2):
        plans = CachedDataset(config, seed=seed).measured_batches()
        orders.append([plan.item_keys for plan in plans])
        assert not any(dropped for plan in plans for dropped in plan.drops_caption)
        assert max(len(plan.items) for plan in plans) == 2
    assert orders[0] == orders[1]
    keys = [key for batch in orders[0] for key in batch]
    assert len(keys) == len(set(keys)) == 7
