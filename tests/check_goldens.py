"""Compares the project with the outputs of the official code: `python tests/check_goldens.py FOLDER`.

Each golden is a safetensors file whose metadata entry `config` (JSON) says how it was made; what a file is,
is recognised from its tensors and its config. Prints one row per quantity and exits 0 only if all pass; a
file or quantity that is not known is a FAIL.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kandinsky5.model.conditioning import (
    FrameConditioning,
    TextBatch,
    VelocityModel,
    build_model_input,
    condition_frames,
)
from kandinsky5.model.dit import DiffusionTransformer3D, is_float32_island
from kandinsky5.model.flow_matching import flow_matching_loss
from kandinsky5.model.layers import RotaryAngles, TimeEmbeddings
from kandinsky5.model.magcache import MagCache, effective_ratios, resample_nearest
from kandinsky5.model.nabla import NablaPlan, dense_masked_attention, select_blocks, sta_mask, to_fractal
from kandinsky5.sampling.images import image_clip_size
from kandinsky5.sampling.sampler import (
    GuidedVelocity,
    euler_sample,
    finish_image_to_video,
    normalise_first_frames,
    sigma_schedule,
    uses_guidance,
)
from kandinsky5.tasks import NablaParams
from kandinsky5.vae.tiles import TileGrid, Tiling
from kandinsky5.vae.video_vae import VideoVAE, vae_from_config
from modules.attention import KeyMask
from modules.logs import format_table
from modules.tensor_files import read_tensors

TOLERANCES = {
    # kind: (measure, largest allowed). No looser than the README of the goldens; float32 is held to 1e-5.
    "fp32": ("relative", 1e-5),
    "mixed": ("relative", 1.5e-2),
    "nabla mixed": ("relative", 3e-2),
    "gradient": ("relative", 1e-5),
    "sampler fp32": ("relative", 1e-5),
    "sampler mixed": ("relative", 3e-2),
    "table": ("absolute", 1e-5),
    "exact": ("flips", 0.0),
    "block mask mixed": ("flips", 2e-2),
    "first frames fp32": ("relative", 1e-5),
    "first frames bf16": ("relative", 2e-2),
    "vae": ("relative", 1e-5),
    "vae fp16 storage": ("relative", 1e-4),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One compared quantity."""

    file: str
    quantity: str
    kind: str
    error: float

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.kind][1]

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for nan


@dataclass(frozen=True, slots=True)
class Golden:
    """One golden file."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def weights(self) -> dict[str, Tensor]:
        return {
            key.removeprefix("weight."): t for key, t in self.tensors.items() if key.startswith("weight.")
        }


Result = tuple[str, str, Tensor]
"""Quantity, kind, our value."""


def measure(kind: str, ours: Tensor, golden: Tensor) -> float:
    """The error of ours in the measure of `kind`; infinite when the shapes differ."""
    if ours.shape != golden.shape:
        return float("inf")
    how = TOLERANCES[kind][0]
    if how == "flips":
        return (ours != golden).double().mean().item()
    difference = ours.double() - golden.double()
    if how == "absolute":
        return difference.abs().max().item()
    return (difference.norm() / golden.double().norm().clamp_min(1e-30)).item()


def load_dit(
    weights: dict[str, Tensor], params: dict[str, Any], dtype: torch.dtype
) -> DiffusionTransformer3D:
    """The project's DiT with a golden's weights, all but the float32 islands in `dtype`."""
    dit = DiffusionTransformer3D(**params, compute_dtype=dtype)
    dit.load_state_dict(weights, strict=True)
    for key, parameter in dit.named_parameters():
        if not is_float32_island(key):
            parameter.data = parameter.data.to(dtype)
    return dit.requires_grad_(False)


def channels_first(x: Tensor) -> Tensor:
    """[F, H, W, C] -> [1, C, F, H, W]."""
    return rearrange(x, "f h w c -> 1 c f h w")


def channels_last(x: Tensor) -> Tensor:
    """[1, C, F, H, W] -> [F, H, W, C]."""
    return rearrange(x, "1 c f h w -> f h w c")


# DiT forward passes


def dit_call(
    golden: Golden, dtype: torch.dtype, **changes: Any
) -> tuple[DiffusionTransformer3D, dict[str, Any]]:
    """The model and the arguments of one forward pass of a `dit_*` golden."""
    dit = load_dit(golden.weights(), golden.config["dit_params"], dtype)
    x = golden["x"]
    missing = dit.dit_params.in_channels - x.shape[-1]
    if missing:
        x = torch.cat([x, x.new_zeros(*x.shape[:-1], missing)], dim=-1)
    arguments: dict[str, Any] = {
        "x": x[None],
        "text_embed": golden["text_embed"],
        "pooled_text_embed": golden["pooled_text_embed"],
        "timestep": golden["time"],
        "scale_factor": tuple(golden.config["scale_factor"]),
        "text_mask": golden.tensors.get("attention_mask"),
    }
    return dit, arguments | changes


def nabla_params(config: dict[str, Any]) -> NablaParams:
    names = ("P", "wT", "wH", "wW", "add_sta", "method")
    return NablaParams(**{name: config[name] for name in names if name in config})


def check_dense_dit(golden: Golden) -> Iterator[Result]:
    """dit_t2v, dit_visual_cond, dit_visual_cond_i2v: outputs and intermediates."""
    dit, call = dit_call(golden, torch.float32)
    recorded: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: Tensor) -> None:
            recorded.setdefault(name, output)

        return hook

    dit.time_embeddings.register_forward_hook(record("mid_time_embed"))
    dit.text_embeddings.register_forward_hook(record("mid_text_embedded"))
    dit.visual_embeddings.register_forward_hook(record("mid_visual_embedded"))
    dit.visual_transformer_blocks[0].register_forward_hook(record("mid_visual_after_block0"))
    yield "out_fp32", "fp32", dit(**call)[0]
    for name in ("mid_time_embed", "mid_text_embedded"):
        yield name, "fp32", recorded[name]
    for name in ("mid_visual_embedded", "mid_visual_after_block0"):
        yield name, "fp32", recorded[name][0]
    time_embed = dit.embed_time(call["timestep"], call["pooled_text_embed"])
    yield "mid_time_plus_pooled", "fp32", time_embed
    yield (
        "mid_text_refined",
        "fp32",
        dit.refine_text(call["text_embed"], F.silu(time_embed), KeyMask(call["text_mask"])),
    )
    real = call["text_mask"][0]
    packed = call | {"text_embed": call["text_embed"][:, real], "text_mask": None}
    yield "out_fp32_packed", "fp32", dit(**packed)[0]
    mixed, call = dit_call(golden, torch.bfloat16)
    yield "out_mixed", "mixed", mixed(**call)[0]


def check_nabla_dit(golden: Golden) -> Iterator[Result]:
    """dit_nabla*: sparse and dense outputs, block decisions."""
    params = nabla_params(golden.config)
    masks: list[Tensor] = []
    dit, call = dit_call(golden, torch.float32)
    dit.nabla_observer = lambda mask: masks.append(mask[0])
    yield "out_fp32", "fp32", dit(**call, nabla=params)[0]
    yield "block_masks_fp32", "exact", torch.stack(masks)
    yield "out_fp32_dense", "fp32", dit(**call)[0]
    f, h, w, _ = golden["x"].shape
    yield "sta_mask", "exact", sta_mask((f, h // 16, w // 16), params, "cpu")[None, None]
    masks.clear()
    dit, call = dit_call(golden, torch.bfloat16)
    dit.nabla_observer = lambda mask: masks.append(mask[0])
    yield "out_mixed", "nabla mixed", dit(**call, nabla=params)[0]
    yield "block_masks_mixed", "block mask mixed", torch.stack(masks)


def check_dit_gradients(golden: Golden) -> Iterator[Result]:
    """dit_t2v_grad: loss and gradients of the model in another golden."""
    base = read_golden(golden.path.with_name(golden.config["uses"]))
    dit, call = dit_call(base, torch.float32)
    dit.requires_grad_(True)
    call["x"].requires_grad_(True)
    loss = (dit(**call)[0] - golden["target"]).square().mean()
    loss.backward()
    yield "loss", "fp32", loss.detach()
    yield "grad_x", "gradient", call["x"].grad[0]
    for name in golden.tensors:
        if name.startswith("grad."):
            parameter = dit.get_parameter(name.removeprefix("grad."))
            assert parameter.grad is not None
            yield name, "gradient", parameter.grad


# Training


def check_training(golden: Golden) -> Iterator[Result]:
    """train_t2v, train_i2v: model input, target, prediction, loss."""
    latents, noise = channels_first(golden["x0"]), channels_first(golden["noise"])
    sigma = golden["t"]
    model = golden_model(golden, torch.float32)
    text = TextBatch(golden["text_embed"], golden["pooled"], None)
    frames = None
    if golden.config["i2v"]:
        ends = latents[:, :, [0, -1]]
        frames = condition_frames(ends, latents.shape[2])
    yield from training_quantities(model, text, latents, noise, sigma, frames)
    yield "target", "fp32", channels_last(noise - latents)
    if golden.config["i2v"]:
        channels = condition_frames(latents[:, :, [0, -1]], latents.shape[2], form="channels")
        for name, kind, value in training_quantities(model, text, latents, noise, sigma, channels):
            if name != "loss":  # all frames count in this form
                yield f"channel_{name}", kind, value


def training_quantities(
    model: VelocityModel,
    text: TextBatch,
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    frames: FrameConditioning | None,
) -> Iterator[Result]:
    """What one training step computes."""
    seen: dict[str, Tensor] = {}

    def predict(noisy: Tensor, sigma: Tensor) -> Tensor:
        seen["model_input"] = build_model_input(noisy, frames, has_channels=True)[0]
        velocity = model(noisy, sigma, text, frames)
        seen["pred_fp32"] = channels_last(velocity)
        return velocity

    counted = None if frames is None else frames.predicted_frames()
    yield "loss", "fp32", flow_matching_loss(predict, latents, noise, sigma, counted)[0]
    yield "loss_all_frames", "fp32", flow_matching_loss(predict, latents, noise, sigma)[0]
    for name, value in seen.items():
        yield name, "fp32", value


# Sampling


def golden_model(golden: Golden, dtype: torch.dtype) -> VelocityModel:
    """The golden's DiT with its task settings."""
    attention = golden.config.get("attention", {})
    nabla = nabla_params(attention) if attention.get("type") == "nabla" else None
    dit = load_dit(golden.weights(), golden.config["dit_params"], dtype)
    return VelocityModel(dit, tuple(golden.config["scale_factor"]), nabla)


def check_sampling(golden: Golden) -> Iterator[Result]:
    """sample_*: the whole sampling loop, with image conditioning and MagCache where the golden has them."""
    for suffix, dtype, kind in (
        ("fp32", torch.float32, "sampler fp32"),
        ("mixed", torch.bfloat16, "sampler mixed"),
    ):
        if f"latents_{suffix}" in golden:
            yield from sample(golden, dtype, suffix, kind)


def sample(golden: Golden, dtype: torch.dtype, suffix: str, kind: str) -> Iterator[Result]:
    """One run of the sampler in `dtype`."""
    config = golden.config
    noise = channels_first(golden["noise"].float())
    num_steps, guidance = config["num_steps"], config["guidance_weight"]
    magcache = None
    if "mag_ratios" in config:
        magcache = MagCache(config["mag_ratios"], num_steps, uses_guidance=uses_guidance(guidance))
    frames = None
    if config["first_frame"]:
        image = channels_first(golden["first_frame"]).float()
        frames = condition_frames(image.repeat(1, 1, 2, 1, 1), noise.shape[2])
    velocity = GuidedVelocity(
        golden_model(golden, dtype),
        TextBatch(golden["text_embed"], golden["pooled"], None),
        TextBatch(golden["null_text_embed"], golden["null_pooled"], None),
        guidance,
        frames,
        magcache,
    )
    schedule = sigma_schedule(num_steps, config["scheduler_scale"])
    before_restore = euler_sample(velocity, noise, schedule, frames=frames)
    yield f"latents_{suffix}", kind, channels_last(before_restore)
    if frames is not None:
        yield f"latents_final_{suffix}", kind, channels_last(finish_image_to_video(before_restore, frames))
    if magcache is not None:
        yield "skipped", "exact", torch.tensor(magcache.skipped).long()
        ratios = effective_ratios(config["mag_ratios"], num_steps)
        yield "mag_ratios_effective", "table", torch.tensor(ratios, dtype=torch.float64)


def check_schedules(golden: Golden) -> Iterator[Result]:
    """schedule: noise levels and MagCache's resampling."""
    for name, settings in golden.config.items():
        if name.startswith("schedule_"):
            schedule = sigma_schedule(settings["num_steps"], settings["scheduler_scale"])
            yield name, "table", schedule
            yield f"{name}_diff", "table", schedule.diff()
        else:
            values = golden[f"{name}_in"].tolist()
            resampled = resample_nearest(values, settings["target"])
            yield f"{name}_out", "exact", torch.tensor(resampled, dtype=torch.float64)


def check_first_frames(golden: Golden) -> Iterator[Result]:
    """first_frame_norm: the normalisation after image-to-video sampling."""
    for name in golden.tensors:
        if not name.endswith("_in"):
            continue
        case = name.removesuffix("_in")
        latents = channels_first(golden[name])
        yield f"{case}_out", "first frames fp32", channels_last(normalise_first_frames(latents))
        rounded = normalise_first_frames(latents.bfloat16().float())
        yield f"{case}_out_bf16", "first frames bf16", channels_last(rounded)


# Pieces


def check_pieces(golden: Golden) -> Iterator[Result]:
    """pieces: rotary tables, time embedding, fractal order, windows, block selection."""
    checks = {
        "rope1d": piece_rope1d,
        "rope3d": piece_rope3d,
        "time": piece_time,
        "fractal": piece_fractal,
        "sta": piece_sta,
        "nabla": piece_nabla,
    }
    for name, settings in golden.config.items():
        yield from checks[name.rsplit("_", 1)[0]](golden, name, settings)


def rotation_matrices(rotary: Tensor) -> Tensor:
    """Cosines and sines [..., d/2, 2] -> [..., d/2, 2, 2] as the official tables hold them."""
    cos, sin = rotary.unbind(-1)
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


def piece_rope1d(golden: Golden, name: str, settings: dict[str, Any]) -> Iterator[Result]:
    positions = golden[f"{name}_pos"]
    table = RotaryAngles((settings["dim"],), 1024)((int(positions.max()) + 1,), (1.0,))
    yield f"{name}_out", "table", rotation_matrices(table[positions])


def piece_rope3d(golden: Golden, name: str, settings: dict[str, Any]) -> Iterator[Result]:
    offset = settings["pos_offset"]
    shape = tuple(size + offset for size in settings["shape"])
    table = RotaryAngles(tuple(settings["axes_dims"]), 128)(shape, tuple(settings["scale_factor"]))
    yield f"{name}_out", "table", rotation_matrices(table[offset:, offset:, offset:])


def piece_time(golden: Golden, name: str, settings: dict[str, Any]) -> Iterator[Result]:
    embeddings = TimeEmbeddings(settings["model_dim"], settings["time_dim"])
    prefix = f"{name}_weight."
    embeddings.load_state_dict({
        key.removeprefix(prefix): t for key, t in golden.tensors.items() if key.startswith(prefix)
    })
    times = golden[f"{name}_in"]
    yield f"{name}_sinusoid", "table", embeddings.sinusoid(times)
    yield f"{name}_out", "fp32", embeddings(times).detach()


def piece_fractal(_golden: Golden, name: str, settings: dict[str, Any]) -> Iterator[Result]:
    f, h, w = settings["shape"]
    yield f"{name}_perm", "exact", to_fractal(torch.arange(f * h * w).view(f, h, w, 1))[:, 0]


def piece_sta(_golden: Golden, name: str, settings: dict[str, Any]) -> Iterator[Result]:
    yield (
        f"{name}_mask",
        "exact",
        sta_mask((settings["T"], settings["H"], settings["W"]), nabla_params(settings), "cpu"),
    )


def piece_nabla(golden: Golden, name: str, settings: dict[str, Any]) -> Iterator[Result]:
    query, key, value = (golden[f"{name}_{part}"].float().transpose(1, 2) for part in "qkv")
    params = nabla_params(settings)
    window = sta_mask((settings["T"], settings["H"], settings["W"]), params, "cpu")
    yield f"{name}_sta", "exact", window[None, None]
    mask = select_blocks(query, key, NablaPlan(params, window))
    yield f"{name}_block_mask", "exact", mask
    yield f"{name}_num_blocks", "exact", mask.sum(-1, dtype=torch.int32)
    yield f"{name}_attn_out", "fp32", dense_masked_attention(query, key, value, mask).transpose(1, 2)


# VAE


def check_vae(golden: Golden) -> Iterator[Result]:
    """vae_tiny: moments, latents and decoded pixels, whole and in windows and tiles."""
    vae = VideoVAE(vae_from_config(golden.config["vae_config"], golden.weights()))
    for case, settings in golden.config["cases"].items():
        pixels = golden[f"{case}.pixels_u8"].float() / 127.5 - 1
        tile, stride = settings["tile"], settings["stride"]
        grid = None if tile is None else TileGrid(Tiling(tile[2], stride[1]), Tiling(tile[3], stride[2]))
        moments = vae.encode_moments(pixels, tiles=grid)
        yield f"{case}.moments", "vae", moments
        latents = moments.chunk(2, dim=1)[0] * vae.scaling_factor
        yield f"{case}.latent_scaled_mode", "vae", latents
        pieces = vae.decode_windows(golden[f"{case}.latent_scaled_mode"], tiles=grid)
        decoded = torch.cat(list(pieces), dim=2)
        if golden[f"{case}.decoded"].dtype == torch.float16:
            yield f"{case}.decoded", "vae fp16 storage", decoded.half()
        else:
            yield f"{case}.decoded", "vae", decoded


INPUTS = {
    "x", "text_embed", "pooled_text_embed", "time", "attention_mask", "target", "x0", "noise", "t", "pooled",
    "null_text_embed", "null_pooled", "first_frame",
}  # fmt: skip
INPUT_SUFFIXES = ("_in", "_pos", "_q", "_k", "_v", ".pixels_u8")


def find_check(golden: Golden) -> Callable[[Golden], Iterator[Result]] | None:
    """Recognise a golden by its tensors and its config."""
    config = golden.config
    if "vae_config" in config:
        return check_vae
    if "uses" in config and "grad_x" in golden:
        return check_dit_gradients
    if "dit_params" in config:
        if "num_steps" in config:
            return check_sampling
        if "i2v" in config:
            return check_training
        if "block_masks_fp32" in golden:
            return check_nabla_dit
        if "out_fp32" in golden:
            return check_dense_dit
    if any(name.startswith("ffn_") for name in golden.tensors):
        return check_first_frames
    if any(name.startswith("schedule_") for name in config):
        return check_schedules
    if any(name.startswith(("rope1d_", "rope3d_", "nabla_")) for name in config):
        return check_pieces
    return None


def is_input(name: str, golden: Golden) -> bool:
    """Whether a tensor is given rather than compared."""
    if name == "target":  # an input of the gradient golden, a result of the training ones
        return "uses" in golden.config
    return name in INPUTS or name.startswith("weight.") or "_weight." in name or name.endswith(INPUT_SUFFIXES)


def read_golden(path: Path) -> Golden:
    """Load one golden file."""
    tensors, metadata = read_tensors(path)
    return Golden(path, tensors, json.loads(metadata.get("config", "{}")))


def check_file(path: Path) -> list[Row]:
    """Compare everything in one file; quantities nobody computes are infinite errors."""
    if path.suffix == ".json":
        return check_resize_cases(path)
    golden = read_golden(path)
    check = find_check(golden)
    if check is None:
        return [Row(path.name, "(unknown file)", "exact", float("inf"))]
    rows = []
    for name, kind, ours in check(golden):
        # Quantities that a golden of this kind may leave out are only compared where it has them.
        if name in golden:
            rows.append(Row(path.name, name, kind, measure(kind, ours.detach(), golden[name])))
    compared = {row.quantity for row in rows}
    unknown = [name for name in golden.tensors if name not in compared and not is_input(name, golden)]
    return rows + [Row(path.name, f"{name} (unknown)", "exact", float("inf")) for name in unknown]


def check_resize_cases(path: Path) -> list[Row]:
    """resize_cases.json: the size of an image-to-video clip."""
    cases = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for case in cases:
        ours = image_clip_size(
            case["height"], case["width"], max_area=case["max_area"], divisor=case["divisibility"]
        )
        quantity = f"{case['height']}x{case['width']} at {case['resolution']}"
        rows.append(Row(path.name, quantity, "exact", float(list(ours) != list(case["out"]))))
    return rows


def check_folder(folder: Path) -> list[Row]:
    """All goldens of a folder, in the order of their names."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
    return [row for path in files for row in check_file(path)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder with golden files")
    parser.add_argument("--failures", action="store_true", help="list only the rows that fail")
    args = parser.parse_args()
    rows = check_folder(args.folder)
    listed = [row for row in rows if not (args.failures and row.passed)]
    if listed:
        table = [
            (r.file, r.quantity, f"{r.error:.2e}", f"{r.tolerance:.1e}", "PASS" if r.passed else "FAIL")
            for r in listed
        ]
        print(format_table(["file", "quantity", "error", "tolerance", "verdict"], table))
    worst = {
        kind: max((r.error for r in rows if r.kind == kind), default=0.0) for kind in {r.kind for r in rows}
    }
    print()
    print(
        format_table(
            ["kind", "measure", "tolerance", "worst error"],
            [
                (kind, TOLERANCES[kind][0], f"{TOLERANCES[kind][1]:.1e}", f"{worst[kind]:.2e}")
                for kind in sorted(worst)
            ],
        )
    )
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed")
    raise SystemExit(1 if failed or not rows else 0)


if __name__ == "__main__":
    main()
