"""Every way to save memory gives the output and the gradients of the plain step, bit for bit.

The copies are made by engines that delay them at random and fill what must not be read with NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.offload import stream_weights
from modules.activation_offload import ActivationOffload
from modules.fp8 import Fp8Linear
from modules.quantised_linear import finish
from tests.kandinsky5.training.lora_steps import Base, LoraModel, equal
from tests.modules.test_activation_offload import LateMover
from tests.modules.test_block_swap import LateCopies

CPU = torch.device("cpu")


def no_checkpointing(dit: DiffusionTransformer3D) -> None:
    dit.gradient_checkpointing = False


def keep_some_attention(dit: DiffusionTransformer3D) -> None:
    dit.kept_attention_blocks = 3


def keep_all_attention(dit: DiffusionTransformer3D) -> None:
    dit.kept_attention_blocks = 6


def offload_activations(dit: DiffusionTransformer3D) -> None:
    dit.activation_offload = ActivationOffload(LateMover(0), min_bytes=1)


def swap_one_buffer(dit: DiffusionTransformer3D) -> None:
    stream_weights(dit, 4, CPU, ring_size=1, engine=LateCopies(0))


def swap_two_buffers(dit: DiffusionTransformer3D) -> None:
    stream_weights(dit, 4, CPU, engine=LateCopies(1))


def swap_three_buffers(dit: DiffusionTransformer3D) -> None:
    stream_weights(dit, 5, CPU, ring_size=3, engine=LateCopies(2))


def modulation_from_host(dit: DiffusionTransformer3D) -> None:
    stream_weights(dit, 0, CPU, engine=LateCopies(3))


def everything(dit: DiffusionTransformer3D) -> None:
    swap_two_buffers(dit)
    keep_some_attention(dit)
    offload_activations(dit)


def widen_once(dit: DiffusionTransformer3D) -> None:
    """Float8 layers keep their widened weight instead of widening it again for the gradient."""

    def kept(layer: Fp8Linear) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        wide, scale = layer.weight.to(torch.bfloat16), layer.scale_weight
        return (
            lambda x: finish((x.flatten(0, -2) @ wide.t()), scale, layer.bias).unflatten(0, x.shape[:-1]),
            lambda grad: (grad * scale) @ wide,
        )

    for layer in dit.modules():
        if isinstance(layer, Fp8Linear):
            layer.forward, layer.input_gradient = kept(layer)


SAVINGS = (
    no_checkpointing,
    keep_some_attention,
    keep_all_attention,
    offload_activations,
    swap_one_buffer,
    swap_two_buffers,
    swap_three_buffers,
    modulation_from_host,
    everything,
)


@cache
def plain_step(base: Base) -> list[Tensor]:
    return LoraModel(base).step()


@pytest.mark.parametrize("saving", SAVINGS)
@pytest.mark.parametrize("base", ["fp32", "bf16", "fp8"])
def test_output_and_gradients_are_those_of_the_plain_step(
    base: Base, saving: Callable[[DiffusionTransformer3D], None]
) -> None:
    model = LoraModel(base)
    saving(model.dit)
    for _ in range(2):  # the second step begins with rings that the first has filled
        assert equal(model.step(), plain_step(base))


def test_widening_float8_weights_again_for_the_gradient_changes_nothing() -> None:
    model = LoraModel("fp8")
    widen_once(model.dit)
    assert equal(model.step(), plain_step("fp8"))


def test_samples_and_errors_between_steps_leave_the_streams_usable() -> None:
    expected, sampled = plain_step("bf16"), LoraModel("bf16").sample()
    model = LoraModel("bf16")
    everything(model.dit)

    def fail(*_: object) -> None:
        raise RuntimeError("stop here")

    offload = model.dit.activation_offload
    assert offload is not None
    for run, index in ((model.step, 3), (model.sample, 4), (model.step, 0)):
        # In the middle of a block: after its weights have come, before they are all used.
        hook = model.dit.visual_blocks()[index].feed_forward.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop here"):
            run()
        hook.remove()
        assert equal(model.sample(), sampled)
        assert equal(model.step(), expected)
        assert offload.count_away() == 0


def test_an_error_in_the_backward_pass_leaves_the_streams_usable() -> None:
    model = LoraModel("bf16")
    everything(model.dit)
    calls: list[int] = []

    def fail_in_the_recompute(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop here")

    hook = model.dit.visual_blocks()[2].cross_attention.register_forward_pre_hook(fail_in_the_recompute)
    with pytest.raises(RuntimeError, match="stop here"):
        model.step()
    hook.remove()
    assert equal(model.step(), plain_step("bf16"))


@pytest.mark.parametrize("kind", ["step", "sample"])
def test_leaving_out_any_one_wait_of_the_streams_is_noticed(kind: str) -> None:
    """Forward, recompute and the next pass: each wait guards something."""

    def run(engine: LateCopies | None) -> list[Tensor]:
        model = LoraModel()
        if engine is not None:
            stream_weights(model.dit, 4, CPU, engine=engine)
        return model.sample() if kind == "sample" else model.step()

    expected, counting = run(None), LateCopies(0, early=0)
    assert equal(run(counting), expected)
    # Nine modulation layers and four blocks, up and down again, or twice up.
    assert counting.waits == (9 + 4 + 2 if kind == "step" else 2 * (9 + 4))
    for forgotten in range(1, counting.waits + 1):
        engine = LateCopies(0, early=0)
        engine.forget_wait = forgotten
        assert not equal(run(engine), expected), f"wait {forgotten} of {counting.waits}"


def test_leaving_out_any_one_wait_of_offloaded_activations_is_noticed() -> None:
    def run(mover: LateMover) -> list[Tensor]:
        model = LoraModel()
        model.dit.activation_offload = ActivationOffload(mover, min_bytes=1)
        return model.step()

    expected, counting = plain_step("fp32"), LateMover(0, early=0)
    assert equal(run(counting), expected)
    # Inputs that need gradients: of the second text block, video, and the text, which all blocks share.
    assert counting.waits == 1 + 5 + 1
    for forgotten in range(1, counting.waits + 1):
        mover = LateMover(0, early=0)
        mover.forget_wait = forgotten
        assert not equal(run(mover), expected), f"wait {forgotten} of {counting.waits}"


def test_the_recompute_of_a_block_leaves_out_its_last_product() -> None:
    model = LoraModel()
    calls: list[str] = []
    for name in ("in_layer", "out_layer"):
        layer = model.dit.visual_blocks()[1].feed_forward.get_submodule(name).get_submodule("base")
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.step()
    assert calls == ["in_layer", "out_layer", "in_layer"]


def test_a_block_keeps_no_value_of_a_layer_norm() -> None:
    """Without checkpointing; of the feed-forward branch only the widest activation is kept."""
    model = LoraModel()
    model.dit.gradient_checkpointing = False
    params, tokens = model.dit.dit_params, 2 * 4 * 4
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    seen: list[int] = []
    for block in model.dit.visual_blocks()[2:4]:
        block.register_forward_pre_hook(lambda *_: seen.append(len(kept)))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.predict()
    sizes = [tensor.numel() for tensor in list(kept.values())[slice(*seen)]]
    # Inputs of the three branches; queries and keys before and after their norms, value and result of
    # self-attention; query before and after, and result of cross-attention.
    assert sizes.count(tokens * params.model_dim) == 3 + 6 + 3
    assert sizes.count(tokens * params.ff_dim) == 1
