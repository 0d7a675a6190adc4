"""The DiT against diffusers, against the published key lists, and its batch axis against single clips."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel
from diffusers.models.transformers import transformer_kandinsky
from torch import Tensor

from kandinsky5.model.conditioning import TextConditioning, VelocityModel, condition_frames, pad_text
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.tasks import (
    IMAGE_EDIT_LITE_PARAMS,
    IMAGE_LITE_PARAMS,
    LITE_PARAMS,
    PRO_PARAMS,
    TINY_PARAMS,
    DitParams,
)
from tests.tiny import tiny_dit

# SHA-256 over the sorted "key shape" lines of the published checkpoints' state dicts.
PUBLISHED_KEYS = {
    "Pro": (
        PRO_PARAMS,
        1514,
        19_311_325_248,
        "2a3ccc56b057a3590b2cc17075780882a06aee8a7602fa5406a862ad4f565413",
    ),
    "Lite": (
        LITE_PARAMS,
        814,
        2_007_702_848,
        "62a76e3cf51b01c631fc415328e8a74be8ed940b679e2fe8bc7ec2ed4dfcc263",
    ),
    "Image Lite": (
        IMAGE_LITE_PARAMS,
        1246,
        6_022_080_576,
        "49397e1f438af35319a2793f90a614362a4ad9508c39548f4e3e63838f8fef29",
    ),
    "Image Lite edit": (
        IMAGE_EDIT_LITE_PARAMS,
        1246,
        6_022_254_656,
        "17411494cd916b7955d0abbef585344f588e9ec9847e3f6b752abb279fd3f0cb",
    ),
}


def keys_hash(shapes: dict[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("variant", PUBLISHED_KEYS)
def test_keys_and_shapes_equal_the_published_checkpoints(variant: str) -> None:
    params, count, parameters, digest = PUBLISHED_KEYS[variant]
    with torch.device("meta"):
        dit = DiffusionTransformer3D(**params.as_kwargs())
    state = dit.state_dict()
    assert len(state) == count
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    assert keys_hash({key: list(tensor.shape) for key, tensor in state.items()}) == digest
    assert not any(buffer.is_meta for buffer in dit.buffers())


def diffusers_twin(dit: DiffusionTransformer3D) -> Kandinsky5Transformer3DModel:
    kwargs = dit.dit_params.as_kwargs()
    del kwargs["instruct_type"]
    twin = Kandinsky5Transformer3DModel(**kwargs)
    twin.load_state_dict(dit.state_dict(), strict=True)
    return twin.eval()


def random_inputs(params: DitParams, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    length, frames, height, width = (
        sizes.get(name, default) for name, default in (("L", 7), ("F", 3), ("H", 8), ("W", 12))
    )
    return {
        "noisy": torch.randn(1, params.in_visual_dim, frames, height, width, generator=generator),
        "text": torch.randn(length, params.in_text_dim, generator=generator),
        "pooled": torch.randn(params.in_text_dim2, generator=generator),
        "image": torch.randn(1, params.in_visual_dim, 2, height, width, generator=generator),
    }


def relative(ours: Tensor, other: Tensor) -> float:
    return ((ours.double() - other.double()).norm() / other.double().norm()).item()


class TorchWithoutBfloat16:
    """Stands in for torch where diffusers rounds rotated queries to bfloat16 even in float32 runs."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


@pytest.mark.parametrize("head_dims", [(16, 24, 24), (32, 48, 48)], ids=["64", "128"])
@pytest.mark.parametrize("layout", ["t2v", "i2v"])
def test_float32_output_equals_diffusers(
    layout: str, head_dims: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer_kandinsky, "torch", TorchWithoutBfloat16())
    dit = tiny_dit(axes_dims=head_dims)
    inputs = random_inputs(dit.dit_params)
    caption = TextConditioning(inputs["text"], inputs["pooled"])
    text = pad_text([caption], device="cpu", dtype=torch.float32)
    frames = condition_frames(inputs["image"], 3) if layout == "i2v" else None
    sigma = torch.tensor([0.7])
    model = VelocityModel(dit, (1.0, 2.0, 2.0))
    seen: list[Tensor] = []
    dit.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        ours = model(inputs["noisy"], sigma, text, frames)
        theirs = diffusers_twin(dit)(
            hidden_states=seen[0],
            encoder_hidden_states=text.text_embed,
            pooled_projections=text.pooled_text_embed,
            timestep=1000 * sigma,
            visual_rope_pos=[torch.arange(3), torch.arange(4), torch.arange(6)],
            text_rope_pos=torch.arange(text.text_embed.shape[1]),
            scale_factor=(1.0, 2.0, 2.0),
            return_dict=False,
        )[0]
    assert relative(ours, theirs.reshape(1, 3, 8, 12, -1).permute(0, 4, 1, 2, 3)) < 2e-6


def test_a_batch_of_captions_of_different_lengths_equals_one_clip_at_a_time() -> None:
    dit = tiny_dit()
    model = VelocityModel(dit, (1.0, 2.0, 2.0))
    clips = [random_inputs(TINY_PARAMS, seed, L=length) for seed, length in enumerate((5, 11, 8))]
    captions = [TextConditioning(clip["text"], clip["pooled"]) for clip in clips]
    sigma = torch.tensor([0.2, 0.5, 0.9])
    calls = []
    dit.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        noisy = torch.cat([clip["noisy"] for clip in clips])
        together = model(noisy, sigma, pad_text(captions, device="cpu", dtype=torch.float32))
        assert len(calls) == 1
        for i, clip in enumerate(clips):
            text = pad_text([captions[i]], device="cpu", dtype=torch.float32)
            alone = model(clip["noisy"], sigma[i : i + 1], text)
            assert relative(together[i : i + 1], alone) < 1e-6


def test_gradient_checkpointing_changes_nothing() -> None:
    dit = tiny_dit()
    inputs = random_inputs(TINY_PARAMS)
    text = pad_text([TextConditioning(inputs["text"], inputs["pooled"])], device="cpu", dtype=torch.float32)
    gradients = []
    for checkpointing in (False, True):
        dit.gradient_checkpointing = checkpointing
        noisy = inputs["noisy"].clone().requires_grad_(True)
        VelocityModel(dit, (1.0, 2.0, 2.0))(noisy, torch.tensor([0.5]), text).square().sum().backward()
        gradients.append(noisy.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_bfloat16_output_stays_near_float32() -> None:
    exact, rounded = tiny_dit(), tiny_dit(compute_dtype=torch.bfloat16)
    inputs = random_inputs(TINY_PARAMS)
    caption = [TextConditioning(inputs["text"], inputs["pooled"])]
    with torch.no_grad():
        outputs = [
            VelocityModel(dit, (1.0, 2.0, 2.0))(
                inputs["noisy"], torch.tensor([0.5]), pad_text(caption, device="cpu", dtype=dit.compute_dtype)
            )
            for dit in (exact, rounded)
        ]
    assert outputs[1].dtype == torch.bfloat16
    assert relative(outputs[1], outputs[0]) < 1.5e-2


def test_a_clip_longer_than_the_position_tables_is_an_error() -> None:
    dit = tiny_dit()
    inputs = random_inputs(TINY_PARAMS, F=129, H=2, W=2)
    text = pad_text([TextConditioning(inputs["text"], inputs["pooled"])], device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="128 positions"):
        VelocityModel(dit, (1.0, 2.0, 2.0))(inputs["noisy"], torch.tensor([0.5]), text)
