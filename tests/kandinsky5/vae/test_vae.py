"""The VAE: the official numbers, no lost frames, draws that belong to the item, files of every kind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kandinsky5.tiny_models import VAE_CONFIG
from kandinsky5.vae.tiles import TileGrid, Tiling
from kandinsky5.vae.video_vae import (
    VideoVAE,
    check_vae_file,
    encode_or_tile,
    load_vae,
    pixels_to_uint8,
    square_tiles,
    uint8_to_pixels,
    vae_from_config,
)
from modules.errors import DataError, ModelFileError
from modules.seeding import generator_for
from modules.tensor_files import read_tensors, write_tensors

CASES = ("image", "video9", "video25_tiled", "video25_tiled_sp")


@pytest.fixture(scope="module")
def golden(root: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = read_tensors(root / "tests" / "goldens" / "vae_tiny.safetensors")
    return tensors, json.loads(metadata["config"])


@pytest.fixture(scope="module")
def golden_vae(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> VideoVAE:
    tensors, config = golden
    weights = {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
    return VideoVAE(vae_from_config(config["vae_config"], weights))


@pytest.fixture(scope="module")
def vae(tiny_models: Path) -> VideoVAE:
    return load_vae(tiny_models / "vae", dtype=torch.float32, device="cpu")


def _clip(num_frames: int, height: int = 16, width: int = 16, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.rand(batch, 3, num_frames, height, width, generator=generator) * 2 - 1


def _grid(case: dict[str, Any]) -> TileGrid | None:
    if case["tile"] is None:
        return None
    (_, _, tile_height, tile_width), (_, row_stride, column_stride) = case["tile"], case["stride"]
    return TileGrid(Tiling(tile_height, row_stride), Tiling(tile_width, column_stride))


@pytest.mark.parametrize("case", CASES)
def test_encoding_and_decoding_give_the_official_numbers(
    case: str, golden: tuple[dict[str, Tensor], dict[str, Any]], golden_vae: VideoVAE
) -> None:
    tensors, config = golden
    grid = _grid(config["cases"][case])
    pixels = tensors[f"{case}.pixels_u8"].float() / 127.5 - 1
    moments = golden_vae.encode_moments(pixels, tiles=grid)
    torch.testing.assert_close(moments, tensors[f"{case}.moments"], rtol=1e-4, atol=1e-5)
    latents = tensors[f"{case}.latent_scaled_mode"]
    torch.testing.assert_close(moments.chunk(2, 1)[0] * golden_vae.scaling_factor, latents)
    decoded = torch.cat(list(golden_vae.decode_windows(latents, tiles=grid)), dim=2)
    expected = tensors[f"{case}.decoded"]
    tolerance = 5e-3 if expected.dtype == torch.float16 else 1e-5
    torch.testing.assert_close(decoded, expected.float(), rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("num_frames", [1, 5, 17, 21, 25, 29, 37])
def test_every_length_of_4k_plus_1_frames_goes_there_and_back_whole(num_frames: int, vae: VideoVAE) -> None:
    latents = vae.encode(_clip(num_frames), [generator_for("item")])
    assert latents.shape == (1, 16, (num_frames - 1) // 4 + 1, 2, 2)
    assert latents.dtype == torch.float32
    assert vae.decode(latents).shape == (1, 3, num_frames, 16, 16)


def test_windows_stop_with_the_first_that_reaches_the_end() -> None:
    frames = Tiling(17, 8)
    assert [list(frames.starts(n)) for n in (1, 17, 21, 25, 37)] == [[0], [0], [0, 8], [0, 8], [0, 8, 16, 24]]
    latents = Tiling(5, 2)
    assert [len(latents.starts(n)) for n in (1, 5, 6, 7, 10)] == [1, 1, 2, 2, 4]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 136), (168, 64)])
def test_tiles_cover_every_size(height: int, width: int, vae: VideoVAE) -> None:
    pixels = _clip(1, height, width)
    latents = vae.encode_moments(pixels, tiles=square_tiles(64))[:, :16]
    assert latents.shape[-2:] == (height // 8, width // 8)
    assert vae.decode(latents, tile_px=64).shape == pixels.shape


def test_the_first_tile_begins_as_the_frame_encoded_alone_does(vae: VideoVAE) -> None:
    pixels = _clip(1, 64, 96)
    tiled = vae.encode_moments(pixels, tiles=square_tiles(64))
    alone = vae.encode_moments(pixels[..., :64])
    torch.testing.assert_close(tiled[..., :4], alone[..., :4])


def test_pieces_of_a_long_decode_join_to_the_whole(vae: VideoVAE) -> None:
    latents = vae.encode(_clip(37), [generator_for("item")])
    pieces = list(vae.decode_windows(latents))
    assert [piece.shape[2] for piece in pieces] == [9, 8, 8, 12]
    assert torch.equal(torch.cat(pieces, dim=2), vae.decode(latents))


def test_frames_attend_to_themselves_and_earlier_frames_as_with_the_mask(tiny_models: Path) -> None:
    """The blocks that replace diffusers' masked attention give its numbers."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    masked = AutoencoderKLHunyuanVideo(**VAE_CONFIG).eval()
    vae = load_vae(tiny_models / "vae", dtype=torch.float32, device="cpu")
    masked.load_state_dict(read_tensors(tiny_models / "vae" / "diffusion_pytorch_model.safetensors")[0])
    pixels = _clip(9, 32, 48, batch=2)
    with torch.no_grad():
        expected = masked.quant_conv(masked.encoder(pixels))
    torch.testing.assert_close(vae.encode_moments(pixels), expected, rtol=1e-4, atol=1e-5)


def test_a_draw_belongs_to_the_item_and_not_to_its_batch(vae: VideoVAE) -> None:
    pixels = _clip(5, batch=3)
    together = vae.encode(pixels, [generator_for("vae", name) for name in "abc"])
    alone = vae.encode(pixels[1:2], [generator_for("vae", "b")])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)
    other = vae.encode(pixels[1:2], [generator_for("vae", "another")])
    assert not torch.allclose(alone, other)


def test_the_draw_is_around_the_mean_with_the_posteriors_width(vae: VideoVAE) -> None:
    pixels = _clip(5, 32, 32)
    mean, logvar = vae.encode_moments(pixels).chunk(2, dim=1)
    drawn = vae.encode(pixels, [generator_for("vae", "x")]) / vae.scaling_factor
    unit = (drawn - mean) / torch.exp(0.5 * logvar)
    assert abs(unit.mean().item()) < 0.15
    assert abs(unit.std().item() - 1) < 0.15


def test_a_clip_that_does_not_fit_whole_is_encoded_in_tiles_with_the_same_draw(
    vae: VideoVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = _clip(1, 32, 32)
    whole = VideoVAE.encode

    def full_memory(
        self: VideoVAE, pixels: Tensor, generators: list[torch.Generator], *, tile_px: int | None = None
    ) -> Tensor:
        if tile_px is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, pixels, generators, tile_px=tile_px)

    expected = vae.encode(pixels, [generator_for("x")])
    monkeypatch.setattr(VideoVAE, "encode", full_memory)
    # One tile of the fallback size covers this frame, so the numbers must agree.
    torch.testing.assert_close(
        encode_or_tile(vae, pixels, [generator_for("x")], tile_px=None), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(2, 32, 32), (24, 32, 32), (5, 36, 32)])
def test_sizes_that_would_lose_pixels_are_refused(shape: tuple[int, int, int], vae: VideoVAE) -> None:
    with pytest.raises(DataError, match="cannot be encoded"):
        vae.encode(_clip(*shape), [generator_for("x")])


def test_bytes_become_pixels_and_come_back_by_truncation() -> None:
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    pixels = uint8_to_pixels(frames)
    assert pixels.shape == (3, 1, 16, 16)
    assert pixels.min() == -1
    assert pixels.max() == 1
    assert torch.equal(pixels_to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])).int(),
                       torch.tensor([0, 0, 127, 254, 255, 255], dtype=torch.int32))  # fmt: skip


def test_folder_file_parent_folder_and_original_file_are_one_vae(tiny_models: Path, tmp_path: Path) -> None:
    folder = tiny_models / "vae"
    tensors, _ = read_tensors(folder / "diffusion_pytorch_model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    original = tmp_path / "pytorch_model.pt"
    torch.save({"state_dict": {f"vae.{name}": tensor for name, tensor in tensors.items()}}, original)
    paths = [folder, tiny_models, folder / "diffusion_pytorch_model.safetensors", original, tmp_path]
    for path in paths:
        check_vae_file(path)
    loaded = [load_vae(path, dtype=torch.float32, device="cpu") for path in paths]
    assert len({vae.fingerprint for vae in loaded}) == 1
    pixels = _clip(1)
    assert all(torch.equal(vae.encode_moments(pixels), loaded[0].encode_moments(pixels)) for vae in loaded)


def test_other_weights_have_another_fingerprint(tiny_models: Path, tmp_path: Path, vae: VideoVAE) -> None:
    shutil.copytree(tiny_models / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors, _ = read_tensors(file)
    tensors["quant_conv.bias"] += 1
    write_tensors(file, tensors)
    assert load_vae(tmp_path, dtype=torch.float32, device="cpu").fingerprint != vae.fingerprint


def test_a_config_of_something_else_beside_the_file_is_named_and_ignored(
    tiny_models: Path, tmp_path: Path
) -> None:
    """The tiny file then does not fit the real configuration, which shows that the config was not used."""
    shutil.copy(tiny_models / "vae" / "diffusion_pytorch_model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}', encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"of another shape: .* instead of \[128"):
        check_vae_file(tmp_path)


def test_the_dtype_is_the_one_asked_for(tiny_models: Path) -> None:
    vae = load_vae(tiny_models / "vae", dtype=torch.bfloat16, device="cpu")
    assert vae.dtype == torch.bfloat16
    assert vae.encode(_clip(1), [generator_for("x")]).dtype == torch.float32


class _Payload:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (str(self._marker),)


def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.pt"
    torch.save({"state_dict": _Payload(tmp_path / "marker")}, file)
    for act in (check_vae_file, lambda path: load_vae(path, dtype=torch.float32, device="cpu")):
        with pytest.raises(ModelFileError, match="could run code"):
            act(file)
    assert not (tmp_path / "marker").exists()


def test_a_dit_given_as_vae_is_called_by_its_name(tiny_models: Path) -> None:
    with pytest.raises(ModelFileError, match="looks like a Kandinsky 5 DiT"):
        check_vae_file(tiny_models / "model" / "tiny.safetensors")


def test_missing_extra_and_reshaped_tensors_are_listed(tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors, _ = read_tensors(file)
    del tensors["quant_conv.bias"]
    tensors["foreign"] = torch.zeros(1)
    tensors["post_quant_conv.bias"] = torch.zeros(3)
    write_tensors(file, tensors)
    with pytest.raises(ModelFileError) as caught:
        check_vae_file(tmp_path)
    for part in (
        "1 missing: quant_conv.bias",
        "1 not part of the model: foreign",
        "post_quant_conv.bias [3]",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("size", [0, 6, 300, -1])
def test_cut_files_are_refused(size: int, tiny_models: Path, tmp_path: Path) -> None:
    content = (tiny_models / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    for name in ("diffusion_pytorch_model.safetensors", "pytorch_model.pt"):
        file = tmp_path / name
        file.write_bytes(content[:size])
        with pytest.raises(ModelFileError, match=re.escape(str(file))):
            check_vae_file(file)


def test_nothing_there_is_said_with_what_is_expected(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors", tmp_path / "none"):
        with pytest.raises(ModelFileError, match="expected HunyuanVideo's VAE"):
            check_vae_file(path)
