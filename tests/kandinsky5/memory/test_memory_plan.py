"""A plan says what a run will hold: to the byte where bytes can be counted, within 3 % for activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kandinsky5.cli.train import parse_train
from kandinsky5.configs.train import ModelConfig, TrainConfig
from kandinsky5.memory.activations import META, BatchShape, EqualOnMeta, HostLedger, peak_of_step
from kandinsky5.memory.plan import MemoryUsage, TrainingPlanner, weights_usage
from kandinsky5.model import assembly, offload
from kandinsky5.model.conditioning import VelocityModel
from kandinsky5.model.offload import stream_weights
from kandinsky5.tasks import TASKS, TINY_PARAMS
from modules import fused_ops
from modules.activation_offload import ActivationOffload
from modules.block_swap import DirectCopies
from modules.optimizers import build_optimizer, moments_on_device
from modules.tensor_files import write_tensors
from networks.lora import LoRANetwork
from tests.tiny import tiny_dit

CPU = torch.device("cpu")
ACTIVATION_TOLERANCE = 0.03
BATCHES = (
    BatchShape(clips=1, latent_frames=3, latent_height=16, latent_width=16, text_tokens=20),
    BatchShape(clips=2, latent_frames=2, latent_height=8, latent_width=12, text_tokens=9),
)
BLOCKS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    dit = tmp_path_factory.mktemp("plan") / "tiny.safetensors"
    weights = tiny_dit(num_visual_blocks=BLOCKS).state_dict()
    write_tensors(dit, {key: value.detach() for key, value in weights.items()})
    words = ["--task", "k5-tiny-t2v", "--dit", dit, "--dataset_config", "x", "--output_dir", "x"]
    words += [
        "--output_name",
        "x",
        "--network_dim",
        8,
        "--override_dit",
        f'{{"num_visual_blocks": {BLOCKS}}}',
    ]
    parsed = parse_train([str(word) for word in words])
    assert isinstance(parsed, TrainConfig)
    return parsed


def with_model(config: TrainConfig, **changes: object) -> TrainConfig:
    return replace(config, model=replace(config.model, **changes))  # pyright: ignore[reportArgumentType]


def size(tensors: object) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)  # pyright: ignore[reportGeneralTypeIssues]


@pytest.mark.parametrize(
    ("base", "dtype", "swapped", "ring"),
    [
        ((), torch.float32, 0, 2),
        ((), torch.float32, 1, 2),
        ((), torch.bfloat16, 3, 1),
        (("fp8_base",), torch.float32, 3, 2),
        (("fp8_base",), torch.bfloat16, 1, 2),
        (("int8_base",), torch.float32, 1, 2),
        (("int8_base",), torch.bfloat16, 3, 2),
        (("int8_base",), torch.bfloat16, 0, 2),
        (("int8_base", "int8_fast"), torch.bfloat16, 1, 2),
        (("nf4_base",), torch.bfloat16, 2, 2),
    ],
)
def test_weights_ring_and_host_copies_are_planned_to_the_byte(
    config: TrainConfig, dtype: torch.dtype, base: tuple[str, ...], swapped: int, ring: int
) -> None:
    options = dict.fromkeys(base, True) | {"blocks_to_swap": swapped, "block_swap_ring_size": ring}
    model = with_model(config, **options).model
    plan = TrainingPlanner(replace(config, model=model), CPU, dtype).plan(model, BATCHES[1])
    dit = assembly.load_model(model, CPU, dtype)
    assembly.build_network(config.network, dit, 0, allow_partial=False)
    assembly.finish_model(model, dit, CPU)
    resident = size([*dit.parameters(), *dit.buffers()])  # what streams is nowhere before the first pass
    usage = plan.usage.device
    assert usage["weights"] + usage["modulation"] == resident
    streams = dit.weight_streams
    assert usage.get("buffers of blocks", 0) == sum(stream.device_bytes for stream in streams)
    assert plan.usage.pageable.get("blocks", 0) == sum(stream.host_bytes for stream in streams)
    assert bool(streams) == (swapped > 0)


def test_streamed_modulation_is_planned_to_the_byte(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "available_memory", lambda: 0)
    model = replace(config.model, fp8_base=True, blocks_to_swap=2)
    usage = planned_usage(model, torch.device("cuda"))
    dit = assembly.load_model(model, CPU, torch.bfloat16)
    stream_weights(dit, 2, CPU, engine=DirectCopies())
    blocks, modulation = dit.weight_streams
    assert usage.device["weights"] == size([*dit.parameters(), *dit.buffers()])
    assert "modulation" not in usage.device
    assert usage.device["buffers of blocks"] == blocks.device_bytes
    assert usage.device["buffers of modulation layers"] == modulation.device_bytes
    assert usage.pageable == {"blocks": blocks.host_bytes, "modulation layers": modulation.host_bytes}
    assert set(usage.pinned) == {"staging of blocks", "staging of modulation layers"}


def planned_usage(model: ModelConfig, device: torch.device) -> MemoryUsage:
    with EqualOnMeta():
        dit = assembly.load_model(model, META, torch.bfloat16)
    return weights_usage(
        dit,
        device,
        blocks_to_swap=model.blocks_to_swap,
        modulation_on_host=model.modulation_on_host,
        ring_size=model.block_swap_ring_size,
        force_pin=model.use_pinned_memory_for_block_swap,
    )


def test_page_locked_copies_are_planned_as_the_allocator_takes_them(config: TrainConfig) -> None:
    model = replace(config.model, fp8_base=True, blocks_to_swap=2, use_pinned_memory_for_block_swap=True)
    usage = planned_usage(model, torch.device("cuda"))
    assert not usage.pageable
    assert usage.pinned["blocks"].bit_count() == 1  # two blocks of one size, each a power of two
    assert usage.pinned["blocks"] >= usage.device["buffers of blocks"]


@pytest.mark.parametrize(
    ("module", "kind", "arguments"),
    [
        ("networks.lora_kandinsky", "AdamW", {}),
        ("networks.lora_kandinsky", "SGD", {"momentum": 0.9}),
        ("networks.lora_kandinsky", "RMSprop", {}),
        ("networks.lora_kandinsky", "SGD", {}),
        ("networks.loha", "AdamW", {}),
        ("networks.lokr", "AdaFactor", {}),
        ("networks.lora_kandinsky", "AdaFactor", {}),
    ],
)
def test_lora_and_optimizer_are_planned_to_the_byte(
    config: TrainConfig, kind: str, arguments: dict[str, object], module: str
) -> None:
    optimizer_config = replace(
        config.optimizer, optimizer_type=kind, optimizer_args=arguments, learning_rate=1e-3
    )
    network_config = replace(config.network, network_module=module, ema_decay=0.9)
    changed = replace(config, optimizer=optimizer_config, network=network_config)
    usage = TrainingPlanner(changed, CPU, torch.float32).plan(changed.model, BATCHES[1]).usage
    network = real_network(changed)
    optimizer = build_optimizer(kind, network.parameter_groups(1e-3), 1e-3, arguments)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert usage.device["LoRA"] == usage.device["gradients"] == size(network.parameters())
    assert usage.device["average of the LoRA"] == size(network.parameters())
    assert usage.device["optimizer"] == size(t for t in moments_on_device(optimizer) if t.ndim)


def real_network(config: TrainConfig) -> LoRANetwork:
    dit = assembly.load_model(config.model, CPU, torch.float32)
    return assembly.build_network(config.network, dit, 0, allow_partial=False)


@pytest.mark.parametrize(
    ("batch", "dtype", "options"),
    [
        (BATCHES[0], torch.float32, {"gradient_checkpointing": True}),
        (BATCHES[1], torch.bfloat16, {"gradient_checkpointing": True}),
        (
            BATCHES[0],
            torch.bfloat16,
            {"gradient_checkpointing": True, "gradient_checkpointing_keep_attention": 3},
        ),
        (
            BATCHES[1],
            torch.float32,
            {"gradient_checkpointing": True, "gradient_checkpointing_keep_attention": BLOCKS},
        ),
        (BATCHES[0], torch.bfloat16, {"gradient_checkpointing": True, "fp8_base": True}),
        (BATCHES[1], torch.bfloat16, {"gradient_checkpointing": True, "int8_base": True}),
        (BATCHES[0], torch.float32, {}),
        (BATCHES[1], torch.bfloat16, {}),
    ],
)
def test_planned_activations_are_those_of_a_real_step(
    config: TrainConfig,
    batch: BatchShape,
    dtype: torch.dtype,
    options: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan runs two and three blocks without data and extends them; here all six compute, as on a GPU."""
    monkeypatch.setattr(fused_ops, "kernel_rounds_once", lambda x: x.dtype == torch.float32)
    changed = with_model(config, **options)
    planned = TrainingPlanner(changed, CPU, dtype).plan(changed.model, batch).usage.device["activations"]
    dit = assembly.load_model(changed.model, CPU, dtype)
    network = assembly.build_network(changed.network, dit, 0, allow_partial=False)
    model = VelocityModel(dit, changed.model.task.scale_factor, None, network)
    real = peak_of_step(model, network, changed.model.task, batch)
    assert planned == pytest.approx(real, rel=ACTIVATION_TOLERANCE)


def test_offloaded_block_inputs_are_planned_in_host_memory(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "OFFLOADED_BYTES", 1024)
    kept = with_model(config, gradient_checkpointing=True)
    away = with_model(kept, gradient_checkpointing_cpu_offload=True)
    batch = BATCHES[0]
    plans = [TrainingPlanner(c, CPU, torch.float32).plan(c.model, batch) for c in (kept, away)]
    tokens = batch.video_tokens(TINY_PARAMS.patch_size) * TINY_PARAMS.model_dim * 4
    # The first block's input needs no gradient; the text blocks' second input and the rest of it do.
    assert plans[1].usage.pageable["activations"] >= (BLOCKS - 1) * tokens
    saved = plans[0].peak - plans[1].peak
    assert saved >= (BLOCKS - 4) * tokens


@pytest.mark.parametrize("kept", [0, BLOCKS])
def test_the_block_input_that_returns_ahead_is_planned_once_and_not_per_block(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(assembly, "OFFLOADED_BYTES", 1024)
    changed = with_model(
        config,
        gradient_checkpointing=True,
        gradient_checkpointing_cpu_offload=True,
        gradient_checkpointing_keep_attention=kept,
    )
    planned = TrainingPlanner(changed, CPU, torch.float32).plan(changed.model, BATCHES[0]).usage
    dit = assembly.load_model(changed.model, CPU, torch.float32)
    network = assembly.build_network(changed.network, dit, 0, allow_partial=False)
    ledger = HostLedger()
    dit.activation_offload = ActivationOffload(ledger, min_bytes=1024)
    model = VelocityModel(dit, changed.model.task.scale_factor, None, network)
    real = peak_of_step(model, network, changed.model.task, BATCHES[0])
    assert planned.device["activations"] == pytest.approx(real, rel=ACTIVATION_TOLERANCE)
    assert planned.pageable["activations"] == ledger.bytes


def test_what_travels_is_counted_without_the_roundings_of_host_memory(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "OFFLOADED_BYTES", 1024)
    changed = with_model(
        config,
        blocks_to_swap=3,
        gradient_checkpointing=True,
        gradient_checkpointing_cpu_offload=True,
        use_pinned_memory_for_block_swap=True,
    )
    clips = replace(BATCHES[1], clips=3)
    on_cuda, on_cpu = (
        TrainingPlanner(changed, device, torch.bfloat16).plan(changed.model, clips).usage
        for device in (torch.device("cuda"), CPU)
    )
    dit = assembly.load_model(changed.model, CPU, torch.bfloat16)
    stream_weights(dit, 3, CPU, engine=DirectCopies())
    blocks, modulation = dit.weight_streams
    activations = on_cpu.pageable["activations"]
    assert on_cuda.moved == {
        "blocks": blocks.host_bytes,
        "modulation layers": modulation.host_bytes,
        "activations": activations,
    }
    assert on_cuda.pinned["activations"] > activations > 0
    assert on_cuda.moved_bytes == sum(on_cuda.moved.values()) < on_cuda.host_bytes


def test_nabla_is_planned_without_computing_its_blocks(config: TrainConfig) -> None:
    task = TASKS["k5-tiny-nabla"]
    changed = with_model(config, task=task, nabla=task.nabla, gradient_checkpointing=True)
    batch = BatchShape(clips=1, latent_frames=2, latent_height=16, latent_width=16, text_tokens=9)
    plan = TrainingPlanner(changed, CPU, torch.float32).plan(changed.model, batch)
    dense = with_model(config, gradient_checkpointing=True)
    other = TrainingPlanner(dense, CPU, torch.float32).plan(dense.model, batch)
    assert plan.usage.device["activations"] > 0
    assert plan.flops < other.flops
