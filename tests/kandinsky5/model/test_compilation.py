"""Compiled blocks compute what eager ones do, in few graphs, and keep float8 out where it must stay out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import register_backend

from kandinsky5.configs.compilation import CompileConfig
from kandinsky5.model.compilation import compile_blocks, float8_may_be_compiled
from kandinsky5.model.conditioning import TextConditioning, VelocityModel, pad_text
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.offload import stream_weights
from kandinsky5.tasks import NablaParams
from kandinsky5_generate_video import main as generate
from modules.fp8 import Fp8Linear
from modules.int8 import Int8Linear, RotatedInt8Linear
from modules.quantised_linear import QuantisedLinear
from networks.lora import LoRANetwork
from networks.lora_kandinsky import create_network, is_target_name
from tests.kandinsky5.generation.generation_kit import SMALL, latents_of
from tests.tiny import tiny_dit

BUCKETS = ((2, 8, 12), (3, 4, 8), (1, 12, 12))
"""[F, H, W]; token counts that equal no other size, which the compiler would take for one."""
LENGTHS = (5, 9)
SPARSE = NablaParams(P=0.5, wT=1, wH=1, wW=1)


class GraphRecorder:
    """A compiler back end that runs graphs as they are and remembers what enters them."""

    def __init__(self) -> None:
        self.graphs = 0
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        self.graphs += 1
        self.dtypes |= {value.dtype for value in inputs if isinstance(value, Tensor)}
        return make_boxed_func(graph.forward)


@pytest.fixture
def recorder() -> Iterator[GraphRecorder]:
    torch._dynamo.reset()
    recorder = GraphRecorder()
    backend = aot_autograd(fw_compiler=recorder, bw_compiler=recorder)
    register_backend(backend, name="recorder")
    yield recorder
    torch._dynamo.reset()
    torch._dynamo.backends.registry._COMPILER_FNS.pop("recorder")


@pytest.fixture
def counted_graphs() -> Iterator[list[Any]]:
    """What the back end `counter` is given; it derives no graphs for the backward, which is slow."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def count(graph: Any, _: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    register_backend(count, name="counter")
    yield graphs
    torch._dynamo.reset()
    torch._dynamo.backends.registry._COMPILER_FNS.pop("counter")


def model(
    held: type[QuantisedLinear] | None = None, *, use_fast: bool = False, visual_blocks: int = 3
) -> tuple[DiffusionTransformer3D, LoRANetwork]:
    dit = tiny_dit(compute_dtype=torch.bfloat16, num_text_blocks=1, num_visual_blocks=visual_blocks)
    if held is not None:
        for name, layer in list(dit.named_modules()):
            if isinstance(layer, nn.Linear) and is_target_name(name):
                weight, scale = held.quantise(layer.weight.data)
                small = held(weight, scale, layer.bias, compute_dtype=torch.bfloat16, use_fast=use_fast)
                dit.set_submodule(name, small)
    network = create_network(
        dit, network_dim=4, network_alpha=4, network_dropout=None, network_args={}, seed=0
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    dit.gradient_checkpointing = True
    return dit, network


def lora_steps(
    dit: DiffusionTransformer3D,
    network: LoRANetwork,
    nabla: NablaParams | None = None,
    lengths: tuple[int, ...] = LENGTHS,
) -> list[Tensor]:
    """Gradients of the adapters for every bucket and caption length."""
    gradients = []
    buckets = BUCKETS if nabla is None else ((2, 16, 16),)
    for shape in buckets:
        for length in lengths:
            generator = torch.Generator().manual_seed(length)
            caption = TextConditioning(
                torch.randn(length, 64, generator=generator), torch.randn(32, generator=generator)
            )
            velocity = VelocityModel(dit, (1.0, 2.0, 2.0), nabla)(
                torch.randn(1, 16, *shape, generator=generator),
                torch.tensor([0.4]),
                pad_text([caption], device="cpu", dtype=torch.bfloat16),
            )
            velocity.float().square().mean().backward()
            gradients.append(
                torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
            )
            network.zero_grad()
    return gradients


def assert_near(compiled: list[Tensor], eager: list[Tensor]) -> None:
    for ours, plain in zip(compiled, eager, strict=True):
        assert (ours - plain).norm() / plain.norm() < 1.5e-2  # bfloat16 rounding


@pytest.mark.parametrize(
    "held",
    [
        None,
        pytest.param(Fp8Linear, marks=pytest.mark.slow),
        pytest.param(Int8Linear, marks=pytest.mark.slow),
    ],
    ids=["bf16", "fp8", "int8"],
)
def test_gradients_are_those_of_eager_blocks_and_lengths_compile_nothing_anew(
    recorder: GraphRecorder, held: type[QuantisedLinear] | None
) -> None:
    eager = lora_steps(*model(held))
    dit, network = model(held)
    compile_blocks(dit, CompileConfig(compile_backend="recorder"), torch.device("cpu"))
    first = lora_steps(dit, network)
    graphs = recorder.graphs
    assert_near(first, eager)
    lora_steps(dit, network)
    assert recorder.graphs == graphs
    if held is not Fp8Linear:
        # Forward and backward, whatever the lengths, of: the text block, the first visual block, whose input
        # needs no gradient, and the other visual blocks.
        assert graphs == 6
    assert torch.float8_e4m3fn not in recorder.dtypes
    assert (torch.int8 in recorder.dtypes) is (held is Int8Linear)


@pytest.mark.slow
@pytest.mark.parametrize("held", [Int8Linear, RotatedInt8Linear])
def test_integer_products_compile(recorder: GraphRecorder, held: type[QuantisedLinear]) -> None:
    eager = lora_steps(*model(held, use_fast=True))
    dit, network = model(held, use_fast=True)
    compile_blocks(dit, CompileConfig(compile_backend="recorder"), torch.device("cpu"))
    assert_near(lora_steps(dit, network), eager)
    assert torch.int8 in recorder.dtypes


@pytest.mark.slow
def test_swapped_blocks_compile(recorder: GraphRecorder) -> None:
    eager = lora_steps(*model(Fp8Linear))
    dit, network = model(Fp8Linear)
    stream_weights(dit, 1, torch.device("cpu"))
    compile_blocks(dit, CompileConfig(compile_backend="recorder"), torch.device("cpu"))
    assert_near(lora_steps(dit, network), eager)
    assert torch.float8_e4m3fn not in recorder.dtypes


@pytest.mark.slow
def test_sparse_attention_stays_eager_inside_compiled_blocks(recorder: GraphRecorder) -> None:
    eager = lora_steps(*model(), nabla=SPARSE)
    dit, network = model()
    compile_blocks(dit, CompileConfig(compile_backend="recorder"), torch.device("cpu"))
    assert_near(lora_steps(dit, network, SPARSE), eager)


@pytest.mark.parametrize(("nabla", "graphs"), [(None, 3), (SPARSE, 6)], ids=["dense", "nabla"])
def test_a_deep_model_has_no_more_graphs_than_a_shallow_one(
    counted_graphs: list[Any], nabla: NablaParams | None, graphs: int
) -> None:
    """Twelve blocks: past torch's limit of eight graphs per function blocks would run uncompiled."""
    dit, network = model(visual_blocks=12)
    compile_blocks(dit, CompileConfig(compile_backend="counter"), torch.device("cpu"))
    lora_steps(dit, network, nabla, lengths=LENGTHS[:1])
    assert len(counted_graphs) == graphs


@pytest.mark.parametrize(("capability", "may"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_float8_is_compiled_from_ada_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], may: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert float8_may_be_compiled(torch.device("cuda")) is may


def test_generation_with_compiled_blocks_gives_the_same_latents(tmp_path: Path, tiny_models: Path) -> None:
    latents = []
    for name, words in (("eager", ()), ("compiled", ("--compile", "--compile_backend", "eager"))):
        output = tmp_path / f"{name}.safetensors"
        paths = (
            *("--dit", tiny_models / "model" / "tiny.safetensors", "--vae", tiny_models / "vae"),
            *("--text_encoder_qwen", tiny_models / "text_encoder"),
            *("--text_encoder_clip", tiny_models / "text_encoder2"),
        )
        given = ("--task", "k5-tiny-t2v", *paths, "--prompt", "a cat", *SMALL, *words)
        generate([str(word) for word in (*given, "--output_type", "latent", "--output", output)])
        latents.append(latents_of(output))
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--compile", "--compile_fullgraph", "--fp8_base"), "float8 layers"),
        (("--compile", "--compile_fullgraph", "--force_nabla_attention"), "NABLA's attention"),
        (
            ("--compile", "--compile_mode", "reduce-overhead", "--blocks_to_swap", "1"),
            "not been tested with --blocks_to_swap; use --compile_backend inductor "
            "--compile_mode max-autotune-no-cudagraphs",
        ),
        (("--compile", "--compile_mode", "max-autotune", "--vram_budget", "8"), "may add --blocks_to_swap"),
        (("--compile", "--compile_backend", "cudagraphs", "--blocks_to_swap", "1"), "records CUDA graphs"),
        (
            (
                "--compile_args",
                "inductor",
                "max-autotune",
                "true",
                "false",
                "--blocks_to_swap",
                "1",
                "--compile",
            ),
            "--compile_mode max-autotune records CUDA graphs",
        ),
    ],
)
def test_compile_settings_that_cannot_act_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        generate(["--task", "k5-tiny-t2v", "--prompt", "a", "--output", str(tmp_path / "a.mp4"), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "uses"),
    [
        ({}, False),
        ({"compile_mode": "max-autotune"}, True),
        ({"compile_mode": "reduce-overhead"}, True),
        ({"compile_mode": "max-autotune-no-cudagraphs"}, False),
        ({"compile_mode": "max-autotune", "compile_backend": "eager"}, False),
        ({"compile_backend": "cudagraphs"}, True),
    ],
)
def test_settings_that_record_cuda_graphs_are_known(settings: dict[str, Any], uses: bool) -> None:
    assert CompileConfig(**settings).uses_cuda_graphs is uses
