"""Whatever stands in the header or settings of a file: a value or one message, never a traceback."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dataset.cache.cached_dataset import CachedDataset
from dataset.cache.files import (
    inspect_text_cache,
    read_latent_cache,
    read_text_cache,
)
from dataset.cache.mask_cache import MaskCacheMeta, mask_cache_problem, read_mask_cache, write_mask_cache
from dataset.cache.unused import unused_caches
from dataset.config.config import load_dataset_config
from kandinsky5.generation.outputs import read_latents, write_latents
from kandinsky5.model.checkpoints import check_dit_file
from kandinsky5.tasks import TINY_PARAMS
from kandinsky5.text.files import EncoderKind, check_text_encoder, encoder_bytes, encoder_fingerprint
from kandinsky5.training.results.ownership import maker
from kandinsky5.training.results.state import TrainingState, find_state, read_mark, read_state, write_state
from kandinsky5.training.tracking.metrics import Metrics, read_records
from kandinsky5.vae.files import check_vae_file, vae_fingerprint
from modules.tensor_files import TensorFile, write_tensors
from networks.inspect_lora import report
from networks.lora_files import read_lora
from networks.lora_kandinsky import known_layer_names
from tests.kandinsky5.training.training_runs import write_dataset
from tests.mutations import DIGITS, mutated, tensor_file_variants, tracebacks

LAYER = "visual_transformer_blocks.0.self_attention.to_query"


def read_all(path: Path) -> None:
    with TensorFile(path) as file:
        for name in file.header.tensors:
            file.read(name)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset file with the caches of one clip and an index."""
    return write_dataset(tmp_path_factory.mktemp("data"), [(2, 4, 4, 3)])


def use_caches(dataset_file: Path) -> Callable[[], object]:
    config = load_dataset_config(dataset_file)
    folder = config.datasets[0].cache_directory

    def use() -> None:
        unused_caches(folder, "latents", ["video"])
        unused_caches(folder, "text", ["video"])
        dataset = CachedDataset(config, seed=0)
        for plan in dataset.epoch_batches(1):
            dataset.load_batch(plan)

    return use


@pytest.mark.parametrize("kind", ["clip0_0*_k5.safetensors", "clip0_k5_te.safetensors"])
def test_headers_of_caches(caches: Path, kind: str) -> None:
    (path,) = (caches.parent / "cache").glob(kind)
    use = use_caches(caches)
    use()

    def each() -> None:
        for read in (inspect_text_cache, read_text_cache) if "te" in kind else (read_latent_cache,):
            read(path)

    assert tracebacks(path, tensor_file_variants(path, 200), use) == []
    assert tracebacks(path, tensor_file_variants(path, 200), each) == []


def test_headers_of_masks_and_saved_latents(tmp_path: Path) -> None:
    meta = MaskCacheMeta(width=32, height=32, frames="5-a", mask_fingerprint="1-b")
    path = tmp_path / "a_00000-005_0032x0032_k5_mask.safetensors"
    write_mask_cache(path, torch.ones(2, 4, 4), meta)
    assert tracebacks(path, tensor_file_variants(path, 200), lambda: mask_cache_problem(path, meta)) == []
    assert tracebacks(path, tensor_file_variants(path, 200), lambda: read_mask_cache(path)) == []
    path = tmp_path / "latent.safetensors"
    write_latents(path, torch.zeros(1, 16, 1, 2, 2), {"seeds": "3", "prompt": "a cat"})
    assert tracebacks(path, tensor_file_variants(path, 200), lambda: read_latents(path)) == []


def test_headers_and_settings_of_loras(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    settings = {"r": 2, "lora_alpha": 4, "alpha_pattern": {LAYER: 2}, "use_rslora": False, "use_dora": False}
    factors = {
        f"transformer.{LAYER}.lora_A.weight": torch.ones(2, 8),
        f"transformer.{LAYER}.lora_B.weight": torch.ones(8, 2),
    }
    metadata = {"ss_output_name": "lora", "trigger": "word", "ss_network_alpha": "2", "ss_network_dim": "2"}

    names = known_layer_names()

    def use() -> None:
        read_lora(path, names)
        maker(path)

    write_tensors(path, factors, {**metadata, "lora_adapter_metadata": json.dumps(settings)})
    use()
    assert tracebacks(path, tensor_file_variants(path, 150), use) == []
    assert tracebacks(path, tensor_file_variants(path, 40), lambda: report(path)) == []

    def with_settings() -> Iterator[bytes]:
        for text in mutated(settings, 150):
            write_tensors(path, factors, {**metadata, "lora_adapter_metadata": text})
            yield path.read_bytes()

    assert tracebacks(path, with_settings(), use) == []
    write_tensors(path, factors, metadata)
    beside = tmp_path / "lora_config_lora.json"
    beside.write_text(json.dumps(settings), encoding="utf-8")
    variants = (text.encode("utf-8", "surrogatepass") for text in mutated(settings, 150))
    assert tracebacks(beside, variants, use) == []
    kohya = {
        f"lora_unet_{LAYER.replace('.', '_')}.{name}": tensor
        for name, tensor in {
            "lora_down.weight": torch.ones(2, 8),
            "lora_up.weight": torch.ones(8, 2),
            "alpha": torch.tensor(2.0),
        }.items()
    }
    beside.unlink()
    write_tensors(path, kohya, metadata)
    assert tracebacks(path, tensor_file_variants(path, 150), use) == []


def test_headers_and_indexes_of_model_files(tiny_models: Path, tmp_path: Path) -> None:
    for name in ("model", "vae", "text_encoder", "text_encoder2"):
        shutil.copytree(tiny_models / name, tmp_path / name)
    dit = tmp_path / "model" / "tiny.safetensors"
    check_dit_file(dit, TINY_PARAMS)
    assert tracebacks(dit, tensor_file_variants(dit, 60), lambda: check_dit_file(dit, TINY_PARAMS)) == []
    index = tmp_path / "model" / "tiny.safetensors.index.json"
    value = {"metadata": {"total_size": 5}, "weight_map": {"a": "tiny.safetensors", "b": "tiny.safetensors"}}
    index.write_text(json.dumps(value), encoding="utf-8")
    variants = (text.encode("utf-8", "surrogatepass") for text in mutated(value, 150))
    assert tracebacks(index, variants, lambda: check_dit_file(index, TINY_PARAMS)) == []
    folder = tmp_path / "vae"
    weights = next(folder.glob("*.safetensors"))

    def use_vae() -> None:
        check_vae_file(folder)
        vae_fingerprint(folder)

    use_vae()
    assert tracebacks(weights, tensor_file_variants(weights, 30), use_vae) == []
    config = folder / "config.json"
    value = json.loads(config.read_text(encoding="utf-8"))
    variants = (text.encode("utf-8", "surrogatepass") for text in mutated(value, 100))
    assert tracebacks(config, variants, use_vae) == []
    encoders: tuple[tuple[EncoderKind, str], ...] = (("qwen", "text_encoder"), ("clip", "text_encoder2"))
    for kind, name in encoders:
        for file in ("config.json", "tokenizer_config.json", "model.safetensors.index.json"):
            path = tmp_path / name / file
            if not path.is_file():
                continue
            value = json.loads(path.read_text(encoding="utf-8"))
            variants = (text.encode("utf-8", "surrogatepass") for text in mutated(value, 25))
            use = functools.partial(_use_encoder, tmp_path / name, kind)
            assert tracebacks(path, variants, use) == [], path


def _use_encoder(folder: Path, kind: EncoderKind) -> None:
    if not check_text_encoder(str(folder), kind, 64):
        encoder_bytes(str(folder), kind)
        encoder_fingerprint(str(folder), kind)


def test_indexes_of_cache_folders(caches: Path) -> None:
    # Written as the scripts do, so that there is one.
    from dataset.cache.index import index_path
    from tests.dataset.cache_tools import write_indexes

    config = load_dataset_config(caches)
    (dataset,) = config.datasets
    name = next((caches.parent / "cache").glob("clip0_0*")).name
    write_indexes(dataset, {"clip0": [name]}, with_digests=True)
    for kind in ("latents", "text"):
        path = index_path(dataset.cache_directory, kind)
        value = json.loads(path.read_text(encoding="utf-8"))
        variants = (text.encode("utf-8", "surrogatepass") for text in mutated(value, 300))
        assert tracebacks(path, variants, use_caches(caches)) == []
        path.unlink()


def test_lines_of_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = {"run": "lora", "kind": "validation", "step": 3, "loss": 0.5, "by_sigma": [0.1, 0.2]}
    lines = [
        "null",
        "5",
        '"x"',
        "[]",
        "[null]",
        "{}",
        DIGITS,
        f'{{"run": "lora", "step": {DIGITS}}}',
        "\ud800",
    ]
    lines += mutated(record, 200)
    foreign = "\n".join(lines).encode("utf-8", "surrogatepass")
    path.write_bytes(foreign + b"\nmine: a line of another program\n")
    read_records(path, "lora", "validation")
    Metrics(tmp_path, "lora", start_step=2).write("step", 3, {"loss": 1.0})
    kept = path.read_text(encoding="utf-8", errors="replace").split("\n")
    assert {"null", "5", '"x"', "[]", "{}", "mine: a line of another program"} <= set(kept)
    Metrics(tmp_path, "lora").write("step", 1, {"loss": 1.0})
    assert [record["step"] for record in read_records(path, "lora", "step")] == [1]


def test_states_with_wrong_values_even_where_the_manifest_was_made_to_fit(tmp_path: Path) -> None:
    state = tmp_path / "lora-step00000003-state"
    run = TrainingState(
        output_name="lora", task="k5-tiny-t2v", seed=1, step=3, total_steps=5, steps_per_epoch=2,
        gradient_accumulation_steps=1, num_processes=1, data_order="a", network={"rank": 4},
        optimizer="AdamW", learning_rate=1e-4, recent_losses=(0.5, 0.25),
    )  # fmt: skip
    write_state(state, run, {"a": torch.ones(2)}, {"state": {}})
    assert read_state(state).run.epoch == 1
    manifest = json.loads((state / "manifest.json").read_text(encoding="utf-8"))

    def use() -> None:
        read_mark(state)
        find_state(tmp_path, "lora", "auto")
        read_state(state)

    def use_fitting() -> None:
        raw = (state / "state.json").read_bytes()
        entry = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        fitting = {**manifest, "files": {**manifest["files"], "state.json": entry}}
        (state / "manifest.json").write_text(json.dumps(fitting), encoding="utf-8")
        use()
        assert isinstance(read_state(state).run.epoch, int)

    for name, action in (("manifest.json", use), ("state.json", use_fitting)):
        path = state / name
        value = json.loads(path.read_text(encoding="utf-8"))
        variants = (text.encode("utf-8", "surrogatepass") for text in mutated(value, 250))
        assert tracebacks(path, variants, action) == []
