"""What only a CUDA device can show: `pytest -m gpu`. Sizes are small; any card of the last years will do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dataset.cache.cached_dataset import CachedBatch
from kandinsky5.configs.train import ConditioningConfig, LossConfig, TimestepConfig
from kandinsky5.model.conditioning import TextBatch, VelocityModel
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.offload import stream_weights
from kandinsky5.tasks import NablaParams
from kandinsky5.training.loss.objective import Objective
from modules.activation_offload import ActivationOffload, tensor_mover
from modules.block_sparse import block_sparse_attention
from modules.block_swap import BlockSwap, StreamCopies
from modules.errors import ResourceError
from modules.fp8 import Fp8Linear, check_fp8_matmul, quantise_rows
from modules.fused_ops import ModulatedLayerNorm, modulated_layer_norm, rms_norm_rotate
from modules.int8 import Int8Linear, RotatedInt8Linear, check_int8_matmul
from modules.staged_copies import StagedCopies
from networks.lora import LoRANetwork
from networks.lora_kandinsky import create_network, is_target_name
from tests.tiny import tiny_dit

pytestmark = pytest.mark.gpu

Prepare = Callable[[DiffusionTransformer3D, torch.device], object]


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_sync_debug_mode("default")


def lora_model(
    device: torch.device, dtype: torch.dtype, *, fp8: bool = False
) -> tuple[DiffusionTransformer3D, LoRANetwork]:
    dit = tiny_dit(compute_dtype=dtype, num_visual_blocks=6)
    if fp8:
        for name, layer in list(dit.named_modules()):
            if is_target_name(name):
                weight, scale = quantise_rows(layer.get_parameter("weight"))
                dit.set_submodule(name, Fp8Linear(weight, scale, layer.bias, compute_dtype=dtype))
    dit.to(device)
    network = create_network(
        dit, network_dim=8, network_alpha=8, network_dropout=None, network_args={}, seed=0
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    dit.gradient_checkpointing = True
    return dit, network.to(device)


def inputs(device: torch.device) -> tuple[Tensor, Tensor, TextBatch]:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 16, 3, 16, 16, generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    text = TextBatch(
        torch.randn(2, 9, 64, generator=generator).to(device),
        torch.randn(2, 32, generator=generator).to(device),
        mask.to(device),
    )
    return latents.to(device), torch.tensor([0.3, 0.8]).to(device), text


def step(
    dit: DiffusionTransformer3D, network: LoRANetwork, device: torch.device, nabla: NablaParams | None = None
) -> list[Tensor]:
    """Velocity and the LoRA's gradients, on the CPU."""
    network.zero_grad(set_to_none=True)
    velocity = VelocityModel(dit, (1.0, 2.0, 2.0), nabla)(*inputs(device))
    velocity.float().square().mean().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return [value.detach().float().cpu() for value in (velocity, *gradients)]


def train_step(
    dit: DiffusionTransformer3D, network: LoRANetwork, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """What a run does with a batch as it comes from the caches: images to video, captions of two lengths."""
    latents, _, _ = inputs(torch.device("cpu"))
    batch = CachedBatch(
        latents=latents,
        latents_image=latents[:, :, :2],
        text_embeds=(torch.ones(9, 64, dtype=torch.bfloat16), torch.ones(5, 64, dtype=torch.bfloat16)),
        pooled_embed=torch.ones(2, 32),
        item_keys=("a", "b"),
        contents=("video", "video"),
        num_frames=(9, 9),
        dataset_index=0,
        timestep_quantiles=None,
        loss_mask=torch.ones(2, 3, 16, 16),
    )
    model = VelocityModel(dit, (1.0, 2.0, 2.0), None)
    loss = LossConfig(masked_loss=True)
    objective = Objective(model, TimestepConfig(), ConditioningConfig(), True, 0, device, loss)
    objective.training_losses(batch, objective.draw(batch, 0)).sum().backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def assert_near(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_float32_is_what_the_cpu_computes(cuda: torch.device) -> None:
    cpu = torch.device("cpu")
    expected = step(*lora_model(cpu, torch.float32), cpu)
    assert_near(step(*lora_model(cuda, torch.float32), cuda), expected, 1e-4)


def test_bfloat16_is_near_to_float32(cuda: torch.device) -> None:
    expected = step(*lora_model(cuda, torch.float32), cuda)
    assert_near(step(*lora_model(cuda, torch.bfloat16), cuda), expected, 5e-2)


def pinned(dit: DiffusionTransformer3D, device: torch.device) -> None:
    modulation_to_host(dit)
    stream_weights(dit, 4, device, force_pin=True)
    assert len(dit.weight_streams) == 2


def pageable(dit: DiffusionTransformer3D, device: torch.device) -> None:
    copies = StagedCopies(StreamCopies(device), 2**22, pin=True)
    stream_weights(dit, 4, device, engine=copies)


def three_buffers(dit: DiffusionTransformer3D, device: torch.device) -> None:
    stream_weights(dit, 4, device, ring_size=3, force_pin=True)


def activations_on_host(dit: DiffusionTransformer3D, device: torch.device) -> None:
    dit.activation_offload = ActivationOffload(tensor_mover(device), min_bytes=1)


def kept_attention(dit: DiffusionTransformer3D, _device: torch.device) -> None:
    dit.kept_attention_blocks = 3


def no_checkpointing(dit: DiffusionTransformer3D, _device: torch.device) -> None:
    dit.gradient_checkpointing = False


def modulation_to_host(dit: DiffusionTransformer3D) -> None:
    for name, parameter in dit.named_parameters():
        if "modulation" in name:
            parameter.data = parameter.data.cpu()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    "prepare",
    [pinned, pageable, three_buffers, activations_on_host, kept_attention, no_checkpointing],
    ids=lambda prepare: prepare.__name__,
)
def test_ways_to_keep_memory_low_change_no_number(cuda: torch.device, prepare: Prepare, fp8: bool) -> None:
    expected = step(*lora_model(cuda, torch.bfloat16, fp8=fp8), cuda)
    dit, network = lora_model(cuda, torch.bfloat16, fp8=fp8)
    prepare(dit, cuda)
    for _ in range(3):  # later passes find the buffers in another state
        # Some backward kernels of attention add in no fixed order, which bfloat16 shows; a weight or an
        # activation of another block would be wrong by about 1.
        assert_near(step(dit, network, cuda), expected, 1e-2)


@pytest.mark.parametrize("prepare", [pinned, activations_on_host], ids=lambda prepare: prepare.__name__)
def test_a_step_never_waits_for_the_device(cuda: torch.device, prepare: Prepare) -> None:
    dit, network = lora_model(cuda, torch.bfloat16, fp8=True)
    prepare(dit, cuda)
    optimizer = torch.optim.AdamW(network.parameters())
    train_step(dit, network, optimizer, cuda)  # libraries initialise at first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    train_step(dit, network, optimizer, cuda)


def test_swapped_blocks_take_no_more_than_their_ring(cuda: torch.device) -> None:
    blocks = [torch.nn.Linear(2048, 2048, device=cuda).requires_grad_(False) for _ in range(8)]
    before = torch.cuda.memory_allocated(cuda)
    swap = BlockSwap(blocks, cuda, travels=lambda _: True, pin=True)
    assert before - torch.cuda.memory_allocated(cuda) >= 5 * 2048 * 2048 * 4
    assert swap.device_bytes <= 2.1 * 2048 * 2048 * 4


def test_sparse_attention_is_dense_attention_under_its_mask(cuda: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 512, 4, 64, generator=generator).to(cuda) for _ in range(3))
    mask = torch.rand(1, 4, 8, 8, generator=generator) < 0.4
    mask |= torch.eye(8, dtype=torch.bool)
    elements = mask.repeat_interleave(64, 2).repeat_interleave(64, 3).to(cuda)
    tensors = [t.requires_grad_(True) for t in (query, key, value)]
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in tensors), attn_mask=elements
    ).transpose(1, 2)
    sparse = block_sparse_attention(query, key, value, mask.to(cuda), 64)
    wanted = torch.autograd.grad(dense.square().sum(), tensors)
    got = torch.autograd.grad(sparse.square().sum(), tensors)
    assert_near([sparse, *got], [dense, *wanted], 1e-3)


def test_nabla_trains(cuda: torch.device) -> None:
    cpu = torch.device("cpu")
    nabla = NablaParams(P=0.5, wT=1, wH=1, wW=1)
    expected = step(*lora_model(cpu, torch.float32), cpu, nabla)
    assert_near(step(*lora_model(cuda, torch.float32), cuda, nabla), expected, 1e-3)


def skip_without(check: Callable[[torch.device], None], device: torch.device) -> None:
    """A card or build of torch without a fast product has to be refused in words."""
    try:
        check(device)
    except ResourceError as error:
        pytest.skip(str(error))


def test_products_in_float8_are_near_to_those_in_bfloat16(cuda: torch.device) -> None:
    skip_without(check_fp8_matmul, cuda)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(256, 512, generator=generator), torch.randn(64, 512, generator=generator)
    weight8, scale = quantise_rows(weight.to(cuda))
    layers = [
        Fp8Linear(weight8, scale, None, compute_dtype=torch.bfloat16, use_fast=fast) for fast in (False, True)
    ]
    assert layers[1].use_fast
    plain, fast = (layer(x.to(cuda, torch.bfloat16)).float() for layer in layers)
    assert (fast - plain).norm() <= 5e-2 * plain.norm()


@pytest.mark.parametrize("kind", [Int8Linear, RotatedInt8Linear])
@pytest.mark.parametrize("num_tokens", [1, 17, 200])
def test_products_in_int8_are_those_of_the_cpu(
    cuda: torch.device, num_tokens: int, kind: type[Int8Linear]
) -> None:
    """The sums are exact whole numbers on both, whatever the number of tokens."""
    skip_without(check_int8_matmul, cuda)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(264, 512, generator=generator), torch.randn(num_tokens, 512, generator=generator)
    weight8, scale = kind.quantise(weight)
    on_device8, on_device = kind.quantise(weight.to(cuda))
    assert torch.equal(on_device8.cpu(), weight8)
    assert torch.equal(on_device.cpu(), scale)
    layer = kind(weight8, scale, None, compute_dtype=torch.bfloat16, use_fast=True)
    assert layer.use_fast
    expected = layer(x.bfloat16()).float()
    got = layer.to(cuda)(x.to(cuda, torch.bfloat16)).float().cpu()
    assert (got - expected).norm() <= 1e-2 * expected.norm()


def test_fused_pieces_round_once(cuda: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 4, 32, generator=generator)
    weight = torch.rand(32, generator=generator) + 0.5
    angles = torch.randn(64, 1, 16, generator=generator)
    rotary = torch.stack([angles.cos(), angles.sin()], dim=-1)
    wide = rms_norm_rotate(x, weight, 1e-7, rotary)
    narrow = rms_norm_rotate(x.to(cuda, torch.bfloat16), weight.to(cuda), 1e-7, rotary.to(cuda))
    assert (narrow.cpu().float() - wide).norm() <= 6e-3 * wide.norm()
    tokens = torch.randn(2, 64, 128, generator=generator)
    scale, shift = torch.randn(2, 2, 128, generator=generator)
    wide = modulated_layer_norm(tokens.bfloat16().float(), scale, shift)
    narrow = modulated_layer_norm(tokens.to(cuda, torch.bfloat16), scale.to(cuda), shift.to(cuda))
    assert (narrow.cpu().float() - wide).norm() <= 1.8e-3 * wide.norm()  # bfloat16 itself has 1.66e-3


def test_gradients_of_masters_are_not_rounded_to_bfloat16(cuda: torch.device) -> None:
    dit, network = lora_model(cuda, torch.bfloat16)
    _, *gradients = step(dit, network, cuda)
    assert all(not torch.equal(gradient, gradient.bfloat16().float()) for gradient in gradients)


def test_a_modulated_norm_is_computed_again_to_the_bit(cuda: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, grad = torch.randn(2, 2, 64, 128, generator=generator).to(cuda, torch.bfloat16)
    norm = ModulatedLayerNorm(*torch.randn(2, 2, 128, generator=generator).to(cuda))
    value = norm.value(tokens.requires_grad_())
    value.backward(grad)
    with torch.no_grad():
        again, gradient = norm.again(tokens)
        assert torch.equal(again, value)
        assert torch.equal(gradient(grad), tokens.grad)
