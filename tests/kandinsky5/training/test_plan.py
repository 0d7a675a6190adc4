"""Batches read ahead in threads: the same ones whatever their number, errors in place, no shared memory."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dataset.cache.cached_dataset import BatchPlan, CachedBatch, CachedDataset
from dataset.config.config import load_dataset_config
from kandinsky5.training.plan import PlanSequence, TrainingLength, batch_loader
from modules.errors import CacheError
from tests.kandinsky5.training import fault_kit
from tests.kandinsky5.training.training_runs import lora_bytes, train, write_dataset

pytestmark = pytest.mark.fast

LENGTH = TrainingLength(batches_per_epoch=5, gradient_accumulation_steps=2, num_processes=1, total_steps=7)
START = 2


@pytest.fixture
def data(tmp_path: Path) -> CachedDataset:
    return CachedDataset(load_dataset_config(write_dataset(tmp_path)), seed=3)


def loader(data: CachedDataset, num_workers: int) -> Iterator[CachedBatch]:
    return batch_loader(data, LENGTH, 0, start_step=START, num_workers=num_workers)


def plans(data: CachedDataset) -> list[BatchPlan]:
    steps = PlanSequence(data, LENGTH, 0).steps(START)
    return [micro_batch.plan for step in steps for micro_batch in step.micro_batches]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_any_number_of_threads_gives_the_same_batches_in_order(data: CachedDataset, num_workers: int) -> None:
    expected = [data.load_batch(plan) for plan in plans(data)]
    found = list(loader(data, num_workers))
    assert [batch.item_keys for batch in found] == [batch.item_keys for batch in expected]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cache_cut_during_training_is_named_where_its_batch_would_come(
    data: CachedDataset, num_workers: int
) -> None:
    order = plans(data)
    path = data.items[order[1].items[0]].latent_path
    path.write_bytes(path.read_bytes()[:-7])
    batches = loader(data, num_workers)
    assert next(batches).item_keys == order[0].item_keys
    with pytest.raises(CacheError, match=path.name):
        next(batches)


def test_a_closed_loader_leaves_no_thread_reading(data: CachedDataset) -> None:
    batches = batch_loader(data, LENGTH, 0, start_step=0, num_workers=2)
    next(batches)
    batches.close()
    readers = [thread for thread in threading.enumerate() if thread.name.startswith("read-caches")]
    for thread in readers:
        thread.join(30)
    assert not any(thread.is_alive() for thread in readers)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
def test_a_full_shared_memory_folder_does_not_stop_the_training(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    """Containers give /dev/shm 64 MB; here it has one page, of which nothing is free."""
    words = ("--max_train_steps", 4)
    train(dit, dataset, tmp_path / "plenty", *words)

    def run() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        new_namespace, recursive_and_private = 0x20000, 0x44000  # CLONE_NEWNS, MS_REC | MS_PRIVATE
        if libc.unshare(new_namespace) or libc.mount(b"none", b"/", None, recursive_and_private, None):
            raise SystemExit(77)
        if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=4k"):
            raise SystemExit(77)
        Path("/dev/shm/full").write_bytes(bytes(4096))
        train(dit, dataset, tmp_path / "none", *words, "--max_data_loader_n_workers", 2)

    log = tmp_path / "log.txt"
    code = fault_kit.wait(fault_kit.start(run, log), 60)
    if code == 77:
        pytest.skip("the system does not let this process mount")
    assert code == 0, log.read_text(encoding="utf-8")
    assert lora_bytes(tmp_path / "none/lora.safetensors") == lora_bytes(tmp_path / "plenty/lora.safetensors")
