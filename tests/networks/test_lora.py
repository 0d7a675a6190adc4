"""The LoRA layer and network on a small frozen model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from modules.fp8 import Fp8Linear, quantise_rows
from networks.lora import DropoutRates, LoRAAdapter, LoRALinear, LoRANetwork, inject

NAMES = ["blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second"]


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(dim, 2 * dim)
        self.second = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(x)))


class Model(nn.Module):
    def __init__(self, dim: int = 16, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.is_checkpointed = False
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).div(4).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x)
        return x


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def make(model: Model, *, dropout: DropoutRates | None = None, seed: int = 0) -> LoRANetwork:
    return inject(model, NAMES, rank=4, alpha=2.0, seed=seed, dropout=dropout or DropoutRates())


def wake(network: LoRANetwork) -> None:
    """Give every lora_up values, so that the adapters act."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        if "lora_up" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 5, 16), (2, 3, 4, 16)])
def test_a_new_adapter_changes_no_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model, x = Model(dtype=dtype), inputs(*shape, dtype=dtype)
    expected = model(x)
    network = make(model)
    output = network(x)
    assert output.dtype == dtype
    assert torch.equal(output, expected)


def test_the_output_follows_the_formula() -> None:
    base = nn.Linear(16, 8)
    model = nn.ModuleDict({"layer": base})
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    network = inject(model, ["layer"], rank=4, alpha=2.0, seed=0)
    wake(network)
    network.set_multiplier(0.7)
    adapter = network.adapters["layer"]
    assert isinstance(adapter, LoRAAdapter)
    delta = 0.7 * (2.0 / 4) * adapter.lora_up @ adapter.lora_down
    x = inputs(2, 5, 16)
    torch.testing.assert_close(model["layer"](x), F.linear(x, weight + delta, bias))
    torch.testing.assert_close(0.7 * adapter.factors().delta(), delta.detach())


def test_the_network_owns_the_adapters_alone_and_the_model_its_weights_alone() -> None:
    model = Model()
    before = sum(p.numel() for p in model.parameters())
    network = make(model)
    assert sum(p.numel() for p in model.parameters()) == before
    assert not any(p.requires_grad for p in model.parameters())
    names = [name for name, _ in network.named_parameters()]
    assert names[:2] == ["blocks.0.first.lora_down", "blocks.0.first.lora_up"]
    assert len(names) == 2 * len(NAMES)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in network.parameters())


def test_the_start_depends_on_the_seed_and_the_layer_alone() -> None:
    models = [Model() for _ in range(3)]
    state = torch.get_rng_state()
    first, second, other = (
        make(model, seed=seed).state_dict() for model, seed in zip(models, (0, 0, 1), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["blocks.0.first.lora_down"], other["blocks.0.first.lora_down"])
    assert not torch.equal(first["blocks.0.first.lora_down"], first["blocks.1.first.lora_down"])
    bound = 1 / math.sqrt(16)  # kaiming_uniform with a = sqrt(5)
    assert 0.9 * bound < first["blocks.0.first.lora_down"].abs().max() <= bound


def test_gradients_reach_every_factor_and_no_base_weight() -> None:
    model = Model()
    network = make(model)
    wake(network)
    network(inputs(2, 5, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_gradients_equal_those_of_plain_autograd_on_the_merged_weight() -> None:
    base = nn.Linear(16, 8)
    model = nn.ModuleDict({"layer": base})
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    network = inject(model, ["layer"], rank=4, alpha=3.0, seed=0)
    wake(network)
    x = inputs(2, 5, 16).requires_grad_()
    model["layer"](x).square().sum().backward()
    down, up = (p.detach().clone().requires_grad_() for p in network.parameters())
    x_again = x.detach().clone().requires_grad_()
    F.linear(x_again, weight + 0.75 * up @ down, bias).square().sum().backward()
    grads = [p.grad for p in network.parameters()]
    for ours, theirs in zip([*grads, x.grad], [down.grad, up.grad, x_again.grad], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_multiplier_zero_and_disabled_are_bit_equal_to_no_adapter() -> None:
    model, x = Model(), inputs(2, 5, 16)
    expected = model(x)
    network = make(model)
    wake(network)
    changed = network(x)
    assert not torch.equal(changed, expected)
    with network.disabled():
        assert torch.equal(network(x), expected)
    assert torch.equal(network(x), changed)
    network.set_multiplier(0.0)
    assert torch.equal(network(x), expected)


def test_removing_gives_the_model_its_own_layers_back_in_any_order() -> None:
    model, x = Model(), inputs(2, 5, 16)
    expected, keys = model(x), list(model.state_dict())
    first = make(model)
    second = make(model, seed=5)
    wake(first)
    wake(second)
    both = model(x)
    first.remove()
    assert not torch.equal(model(x), both)
    assert not torch.equal(model(x), expected)
    second.remove()
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    "rates",
    [DropoutRates(network_dropout=0.5), DropoutRates(rank_dropout=0.5), DropoutRates(module_dropout=0.5)],
)
def test_dropout_is_a_function_of_the_step_and_survives_recomputation(rates: DropoutRates) -> None:
    x = inputs(2, 5, 16)

    def run(step: int, *, is_checkpointed: bool) -> list[Tensor]:
        model = Model()
        model.is_checkpointed = is_checkpointed
        network = make(model, dropout=rates)
        wake(network)
        network.set_step_seed(7, step)
        output = network(x)
        output.square().mean().backward()
        return [output.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]

    plain, again, checkpointed, other = (
        run(1, is_checkpointed=False),
        run(1, is_checkpointed=False),
        run(1, is_checkpointed=True),
        run(2, is_checkpointed=False),
    )
    assert len(plain) == 1 + 2 * len(NAMES)  # a skipped layer has a gradient too: zero
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert not torch.equal(plain[0], other[0])


def test_dropout_acts_in_training_mode_only() -> None:
    model, x = Model(), inputs(2, 5, 16)
    network = make(model, dropout=DropoutRates(network_dropout=0.5, rank_dropout=0.5, module_dropout=0.5))
    wake(network)
    network.eval()
    reference = make(Model())
    wake(reference)
    assert torch.equal(network(x), reference(x))


def test_rank_dropout_draws_one_mask_per_sample() -> None:
    adapter = LoRAAdapter("layer", 16, 8, rank=8, alpha=8.0, seed=0)
    adapter.dropout = DropoutRates(rank_dropout=0.5)
    kept = adapter.drop_ranks(torch.ones(3, 5, 8), (0, 1))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert not torch.equal(kept[0], kept[1])
    flat = adapter.drop_ranks(torch.ones(5, 8), (0, 1))  # without a batch axis: one sample
    assert torch.equal(flat, flat[:1].expand_as(flat))


def test_no_activation_is_wider_than_the_compute_dtype_and_x_is_kept_once() -> None:
    class WidestActivation(TorchDispatchMode):
        wide: list[str]

        def __init__(self) -> None:
            super().__init__()
            self.wide = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and 40 in result.shape and result.dtype.itemsize > 2:
                self.wide.append(str(func))
            return result

    base = nn.Linear(16, 8, dtype=torch.bfloat16)
    model = nn.ModuleDict({"layer": base})
    network = inject(model, ["layer"], rank=4, alpha=2.0, seed=0)
    wake(network)
    x = inputs(40, 16, dtype=torch.bfloat16).requires_grad_()
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] == (40,):
            kept.add(tensor.untyped_storage().data_ptr())
            sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    sizes: list[int] = []
    watch = WidestActivation()
    with watch, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model["layer"](x).sum().backward()
    assert watch.wide == []
    assert len(kept) == 2  # x and the rank-sized activation
    assert sum(sizes) == 40 * (16 + 4) * 2


def test_loraplus_gives_lora_up_its_own_rate() -> None:
    network = inject(Model(), NAMES, rank=4, alpha=2.0, seed=0, loraplus_lr_ratio=4.0)
    plain, plus = network.parameter_groups(1e-4)
    assert (plain["lr"], plus["lr"], plus["name"]) == (1e-4, 4e-4, "unet plus")
    assert len(plain["params"]) == len(plus["params"]) == len(NAMES)
    assert all((p == 0).all() for p in plus["params"])


def test_norms_are_limited_to_the_stated_value() -> None:
    network = make(Model())
    wake(network)
    before = copy.deepcopy(network.state_dict())
    deltas = torch.stack([adapter.factors().delta().norm() for adapter in network.adapters.values()])
    limit = deltas.sort().values[1].item() * 1.001  # two of four lie above
    torch.testing.assert_close(network.scale_weight_norms(limit), deltas)
    for index, adapter in enumerate(network.adapters.values()):
        norm = adapter.factors().delta().norm()
        torch.testing.assert_close(norm, deltas[index].clamp(max=limit))
        ratio = [p / before[f"{adapter.path}.{n}"] for n, p in adapter.named_parameters()]
        torch.testing.assert_close(ratio[0].mean(), ratio[1].mean())


def test_ranks_and_alphas_may_differ_per_layer() -> None:
    rank = dict(zip(NAMES, [1, 2, 3, 4], strict=True))
    network = inject(Model(), NAMES, rank=rank, alpha=dict.fromkeys(NAMES, 0.0), seed=0)
    assert [adapter.rank for adapter in network.adapters.values()] == [1, 2, 3, 4]
    assert all(adapter.scale == 1.0 for adapter in network.adapters.values())  # alpha 0 means the rank


def test_a_layer_of_another_kind_is_wrapped_as_well() -> None:
    class Doubling(nn.Module):
        in_features = out_features = 16

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = nn.ModuleDict({"layer": Doubling()})
    network = inject(model, ["layer"], rank=4, alpha=4.0, seed=0)
    x = inputs(3, 16)
    assert isinstance(model["layer"], LoRALinear)
    assert torch.equal(model["layer"](x), 2 * x)
    wake(network)
    torch.testing.assert_close(model["layer"](x), 2 * x + x @ network.adapters["layer"].factors().delta().t())


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_fused_form_equals_the_plain_one_forward_and_backward(
    dtype: torch.dtype, is_fp8: bool, has_bias: bool
) -> None:
    base: nn.Module = nn.Linear(16, 8, bias=has_bias, dtype=dtype).requires_grad_(False)
    if is_fp8:
        bias = base.bias if has_bias else None
        base = Fp8Linear(*quantise_rows(base.weight), bias, compute_dtype=dtype)  # type: ignore[arg-type]
    adapter = LoRAAdapter("layer", 16, 8, rank=4, alpha=2.0, seed=0)
    adapter.lora_up.data = inputs(8, 4) * 0.3
    results = []
    for forward in (adapter.forward_with, lambda base, x, *rest: adapter.add_delta(base(x), x, *rest)):
        x = inputs(2, 5, 16, dtype=dtype).requires_grad_()
        adapter.zero_grad()
        output = forward(base, x, 0.7, (0,))
        output.backward(inputs(2, 5, 8, dtype=dtype))
        results.append([output, x.grad, adapter.lora_down.grad, adapter.lora_up.grad])
    fused, plain = results
    assert torch.equal(fused[0], plain[0])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(fused[1:], plain[1:], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_the_fused_form_needs_no_gradient_of_its_input() -> None:
    network = make(Model())
    wake(network)
    layer = network.host.get_submodule(NAMES[0])
    layer(inputs(3, 16)).sum().backward()
    assert all(p.grad is not None for p in network.adapters[NAMES[0]].parameters())
