"""Frozen weights in float8, int8 and NF4: what a LoRA step makes and keeps, and what the scripts refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kandinsky5.configs.text_encoders import TextEncodersConfig
from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.model.checkpoints import load_dit
from kandinsky5.model.conditioning import TextConditioning, VelocityModel, pad_text
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.flow_matching import flow_matching_loss
from kandinsky5.text.encoders import TextEncoders, load_text_encoders
from kandinsky5.training import samples as train_samples
from kandinsky5_generate_video import main as generate
from modules import fused_ops, int8
from modules.tensor_files import read_tensors, write_tensors
from networks.lora import LoRANetwork
from networks.lora_effect import weight_norms
from networks.lora_kandinsky import create_network
from tests.float8_products import needs_float8_products
from tests.kandinsky5.generation.generation_kit import SMALL, latents_of
from tests.kandinsky5.training.training_runs import metrics, train, write_dataset, write_dit
from tests.tiny import tiny_dit

CPU = torch.device("cpu")
WIDTH = 256
SHAPE = (4, 32, 32)
NUM_TOKENS = 4 * 16 * 16
"""So many that the smallest activation, [NUM_TOKENS, WIDTH], is larger than any weight or latent."""
HELD = [
    pytest.param({}, id="bf16"),
    pytest.param({"fp8_base": True}, id="fp8"),
    pytest.param({"int8_base": True}, id="int8"),
]
FAST = [
    pytest.param({"fp8_base": True, "fp8_fast": True}, id="fp8_fast", marks=needs_float8_products),
    pytest.param({"int8_base": True, "int8_fast": True}, id="int8_fast"),
]


@pytest.fixture(scope="module")
def wide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dit") / "wide.safetensors"
    dit = tiny_dit(model_dim=WIDTH, num_text_blocks=1, num_visual_blocks=2)
    write_tensors(path, {key: value.detach().bfloat16() for key, value in dit.state_dict().items()})
    return path


def load(path: Path, held: dict[str, bool]) -> tuple[DiffusionTransformer3D, LoRANetwork]:
    params = tiny_dit(model_dim=WIDTH, num_text_blocks=1, num_visual_blocks=2).dit_params
    dit = load_dit(path, params, WeightsConfig(**held), device=CPU, compute_dtype=torch.bfloat16)
    network = create_network(
        dit, network_dim=4, network_alpha=4, network_dropout=None, network_args={}, seed=0
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return dit, network


def lora_step(dit: DiffusionTransformer3D) -> None:
    """Loss and backward pass of a training step."""
    generator = torch.Generator().manual_seed(3)
    caption = TextConditioning(torch.randn(7, 64, generator=generator), torch.randn(32, generator=generator))
    text = pad_text([caption], device=CPU, dtype=torch.bfloat16)
    latents, noise = torch.randn(2, 1, 16, *SHAPE, generator=generator)
    model = VelocityModel(dit, (1.0, 2.0, 2.0))
    loss = flow_matching_loss(
        lambda noisy, sigma: model(noisy, sigma, text), latents, noise, torch.tensor([0.6])
    )
    loss.sum().backward()


class WideActivations(TorchDispatchMode):
    """Notes operators that make a tensor of an activation's size in more than two bytes per element."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.narrow = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.numel() >= NUM_TOKENS * WIDTH:
                is_wide = tensor.dtype.itemsize > 2
                self.narrow += not is_wide
                if is_wide:
                    self.found.append(f"{func} {tensor.dtype} {list(tensor.shape)}")
        return out


@pytest.mark.parametrize(
    "checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["checkpointed", "plain"]
)
@pytest.mark.parametrize("held", [*HELD, *FAST])
def test_a_whole_lora_step_makes_no_activation_wider_than_the_compute_dtype(
    wide_file: Path, held: dict[str, bool], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fused_ops, int8):  # their scratch space is bounded; here below an activation's size
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", NUM_TOKENS * WIDTH // 4)
    # As on a GPU, where the layer norm of narrow activations is no single kernel.
    monkeypatch.setattr(fused_ops, "kernel_rounds_once", lambda x: x.dtype == torch.float32)
    dit, network = load(wide_file, held)
    dit.gradient_checkpointing = checkpointing
    with WideActivations() as seen:
        lora_step(dit)
    assert seen.found == []
    assert seen.narrow > 100
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("held", [*HELD, *FAST])
def test_the_backward_pass_keeps_the_frozen_weights_themselves_and_no_copies(
    wide_file: Path, held: dict[str, bool]
) -> None:
    """One byte per weight in float8 and int8, and two in bfloat16."""
    dit, network = load(wide_file, held)
    weights = {
        name: dit.get_submodule(name) for name in network.adapters
    }  # adapters lie over the frozen layers
    frozen = {name: layer.base.weight for name, layer in weights.items()}  # type: ignore[union-attr]
    shapes = {tuple(sorted(weight.shape)) for weight in frozen.values()}
    own = {parameter.data_ptr() for parameter in dit.parameters()}
    copies = []

    def pack(tensor: Tensor) -> Tensor:
        if tuple(sorted(tensor.shape)) in shapes and tensor.data_ptr() not in own:
            copies.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_step(dit)
    assert copies == []
    size = sum(weight.numel() for weight in frozen.values())
    held_bytes = sum(weight.untyped_storage().nbytes() for weight in frozen.values())
    assert held_bytes == size * (1 if held else 2)


@pytest.mark.parametrize("held", [*HELD, pytest.param({"nf4_base": True}, id="nf4", marks=pytest.mark.slow)])
def test_gradients_with_and_without_checkpointing_are_equal_to_the_bit(
    wide_file: Path, held: dict[str, bool]
) -> None:
    dit, network = load(wide_file, held)
    gradients = []
    for checkpointing in (False, True):
        dit.gradient_checkpointing = checkpointing
        lora_step(dit)
        gradients.append([parameter.grad for parameter in network.parameters()])
        network.zero_grad()
    assert len(gradients[0]) == 2 * (6 + 2 * 10)
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        assert plain.any()
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize(("form", "limit"), [("int8_base", 1e-3), ("nf4_base", 2e-2)])
def test_norms_of_rounded_weights_are_those_of_the_weights_they_stand_for(
    wide_file: Path, form: str, limit: float
) -> None:
    exact, rounded = (weight_norms(load(wide_file, held)[1], CPU) for held in ({}, {form: True}))
    assert rounded == pytest.approx(exact, rel=limit)


@pytest.fixture(scope="module")
def small_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dit(tmp_path_factory.mktemp("small"))


def refused(capsys: pytest.CaptureFixture[str], stop: pytest.ExceptionInfo[SystemExit]) -> tuple[object, str]:
    return stop.value.code, capsys.readouterr().err


REFUSALS = [
    (("--fp8_base", "--int8_base"), 2, "--fp8_base and --int8_base select a format for the same weights"),
    (("--int8_base", "--nf4_base"), 2, "--int8_base and --nf4_base select a format for the same weights"),
    (("--int8_base", "--int8_fast"), 5, "--int8_fast needs a CUDA device with int8 units, not cpu"),
    (("--fp8_base", "--fp8_fast"), 5, "--fp8_fast needs a CUDA device with float8 units, not cpu"),
]


@pytest.mark.parametrize(("words", "code", "message"), REFUSALS)
def test_what_cannot_be_is_refused_before_anything_loads(
    words: tuple[str, ...],
    code: int,
    message: str,
    small_dit: Path,
    tiny_models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.toml").touch()
    with pytest.raises(SystemExit) as stop:
        train(small_dit, tmp_path / "empty.toml", tmp_path / "out", *words)
    found = refused(capsys, stop)
    assert found[0] == code
    assert message in found[1]
    models = (
        *("--vae", tiny_models / "vae", "--dit", tiny_models / "model" / "tiny.safetensors"),
        *("--text_encoder_qwen", tiny_models / "text_encoder"),
        *("--text_encoder_clip", tiny_models / "text_encoder2"),
    )
    given = ("--task", "k5-tiny-t2v", *models, "--prompt", "a", "--output", tmp_path / "a.mp4", *words)
    with pytest.raises(SystemExit) as stop:
        generate([str(word) for word in given])
    found = refused(capsys, stop)
    assert found[0] == code
    assert message in found[1]


def test_training_and_generation_run_in_few_bits(tiny_models: Path, tmp_path: Path) -> None:
    dit = tiny_models / "model" / "tiny.safetensors"
    dataset = write_dataset(tmp_path)
    losses = {}
    for name, words in (("plain", ()), ("int8", ("--int8_base",)), ("nf4", ("--nf4_base",))):
        given = ("--override_dit", "{}", "--mixed_precision", "bf16", "--max_train_steps", 2, *words)
        train(dit, dataset, tmp_path / name, *given)
        losses[name] = [record["loss"] for record in metrics(tmp_path / name, "step")]
    assert losses["int8"] != losses["plain"]
    assert losses["int8"] == pytest.approx(losses["plain"], rel=2e-2)
    assert losses["nf4"] != losses["int8"]
    assert losses["nf4"] == pytest.approx(losses["plain"], rel=0.1)
    lora = tmp_path / "int8" / "lora.safetensors"
    metadata = read_tensors(lora)[1]
    assert (metadata["ss_int8_base"], metadata["ss_fp8_base"]) == ("True", "False")

    latents = {}
    for name, words in (
        ("plain", ()),
        ("int8", ("--int8_base",)),
        ("fp8", ("--fp8_base",)),
    ):
        output = tmp_path / f"{name}.safetensors"
        models = (
            *("--dit", dit, "--vae", tiny_models / "vae", "--lora_weight", lora),
            *("--text_encoder_qwen", tiny_models / "text_encoder"),
            *("--text_encoder_clip", tiny_models / "text_encoder2"),
        )
        given = ("--task", "k5-tiny-t2v", *models, "--prompt", "a cat", *SMALL, *words)
        generate([str(word) for word in (*given, "--output_type", "latent", "--output", output)])
        latents[name] = latents_of(output)
        assert (f"{name} weights" in read_tensors(output)[1]["dtype"]) is (name != "plain")
    errors = [(latents[name] - latents["plain"]).norm() for name in ("int8", "fp8")]
    assert 0 < errors[0] < errors[1]


@pytest.mark.parametrize(("flag", "how"), [("--quantized_qwen", "nf4"), ("--fp8_llm", "fp8")])
def test_sample_prompts_are_encoded_by_qwen_in_fewer_bits(
    small_dit: Path,
    tiny_models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    how: str,
) -> None:
    asked = []

    def load_and_note(config: TextEncodersConfig, **settings: Any) -> TextEncoders:
        asked.append(config.quantization)
        return load_text_encoders(config, **settings)

    monkeypatch.setattr(train_samples, "load_text_encoders", load_and_note)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 32 --h 32 --f 1 --s 1", encoding="utf-8")
    models = (
        *("--vae", tiny_models / "vae", "--text_encoder_qwen", tiny_models / "text_encoder"),
        *("--text_encoder_clip", tiny_models / "text_encoder2"),
    )
    samples = ("--sample_prompts", prompts, "--sample_at_first", "--max_train_steps", 1, flag)
    train(small_dit, write_dataset(tmp_path), tmp_path / "out", *models, *samples)
    assert asked == [how]
    assert len(list((tmp_path / "out" / "sample").glob("lora_000000_00_*.png"))) == 1
