"""Captions to conditioning: transformers' own numbers, no control tokens from users, bad folders refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kandinsky5.configs.text_encoders import TextEncodersConfig
from kandinsky5.text.encoders import (
    TextEncoders,
    check_text_dims,
    check_text_encoder_paths,
    load_text_encoders,
    text_encoder_fingerprint,
)
from kandinsky5.text.templates import load_prompt_templates
from modules.errors import ConfigError, ModelFileError
from modules.fp8 import Fp8Linear
from modules.logs import quiet_logging
from modules.tensor_files import read_tensors, write_tensors
from tests.hub_cache import make_hub_cache
from tests.tiny import tiny_encoders

CAPTIONS = [
    "A cat walks on the grass, realistic style.",
    "",
    "Two friends talk.\n\nThen:\n- rain {0} {} 100% {{x}}\tend",
    "夕焼けの海辺を走る犬、実写。",
    "Ünïcödé e\u0301 🎬 (quiet) ... 'they're' 12345!",
    "word",
    "?!",
]


def _load(folder: Path, **settings: Any) -> TextEncoders:
    others = {name: settings.pop(name) for name in ("device", "dtype", "templates") if name in settings}
    config = tiny_encoders(folder, **settings)
    return load_text_encoders(config, **{"device": "cpu", "dtype": torch.float32, **others})


@pytest.fixture(scope="module")
def encoders(tiny_models: Path) -> TextEncoders:
    return _load(tiny_models)


@pytest.fixture
def models(tiny_models: Path, tmp_path: Path) -> Path:
    """A copy of the encoder folders that a test may damage."""
    for name in ("text_encoder", "text_encoder2"):
        shutil.copytree(tiny_models / name, tmp_path / name)
    return tmp_path


def _edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def _record_calls(encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The input_ids of every Qwen call from now on."""
    assert encoders._qwen is not None
    model, seen = encoders._qwen.model, []
    forward = model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    return seen


@pytest.mark.parametrize("content", ["video", "image"])
@pytest.mark.parametrize("caption", CAPTIONS)
def test_qwen_sees_the_tokens_of_the_whole_prompt(
    caption: str, content: Any, tiny_models: Path, encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Template and caption are tokenized apart; ordinary captions must not show it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models / "text_encoder")
    before, after = load_prompt_templates().parts(content)
    seen = _record_calls(encoders, monkeypatch)
    (result,) = encoders.encode([caption], content)
    whole = tokenizer(before + caption.strip() + after)["input_ids"]
    assert seen[0][0].tolist() == whole
    assert len(result.text_embeds) == len(whole) - len(tokenizer(before)["input_ids"])


def test_the_numbers_are_those_of_transformers_whole_model(tiny_models: Path, encoders: TextEncoders) -> None:
    """Without vision tower and head, and without the template's part: the same last hidden states."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    folder = tiny_models / "text_encoder"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before, after = load_prompt_templates().parts("video")
    ids = tokenizer(before + CAPTIONS[0] + after, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    crop = len(tokenizer(before)["input_ids"])
    assert encoders._qwen is not None
    (result,) = encoders.encode([CAPTIONS[0]], "video")
    torch.testing.assert_close(result.text_embeds, states[crop:].to(torch.bfloat16), rtol=0.02, atol=0.02)
    assert not any(
        "visual" in name or "lm_head" in name for name, _ in encoders._qwen.model.named_parameters()
    )


@pytest.mark.parametrize("caption", [*CAPTIONS, "long words " * 80])
def test_clips_vector_is_that_of_transformers_whole_model(
    caption: str, tiny_models: Path, encoders: TextEncoders
) -> None:
    from transformers import AutoTokenizer, CLIPModel

    folder = tiny_models / "text_encoder2"
    tokens = AutoTokenizer.from_pretrained(folder)(
        caption.strip(), max_length=77, truncation=True, padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        expected = (
            CLIPModel.from_pretrained(folder).text_model(input_ids=tokens["input_ids"]).pooler_output[0]
        )
    (result,) = encoders.encode([caption], "video")
    torch.testing.assert_close(result.pooled_embed, expected, rtol=1e-5, atol=1e-5)
    assert result.pooled_embed.dtype == torch.float32


def test_a_batch_gives_what_each_caption_gives_alone(encoders: TextEncoders) -> None:
    captions = CAPTIONS[:4]
    together = encoders.encode(captions, "image")
    alone = [encoders.encode([caption], "image")[0] for caption in captions]
    assert len({len(item.text_embeds) for item in alone}) > 2
    for batched, single in zip(together, alone, strict=True):
        assert batched.text_embeds.dtype == torch.bfloat16
        # Within float32 rounding before the cast, so at most one step of bfloat16 after it.
        torch.testing.assert_close(batched.text_embeds, single.text_embeds, rtol=2**-7, atol=1e-5)
        assert (batched.text_embeds != single.text_embeds).float().mean() < 0.01
        torch.testing.assert_close(batched.pooled_embed, single.pooled_embed, rtol=1e-5, atol=1e-5)


def test_a_batch_is_padded_to_its_longest_and_not_to_the_limit(
    encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _record_calls(encoders, monkeypatch)
    results = encoders.encode(["word", "two words"], "image")
    assert seen[0].shape == (
        2,
        encoders._qwen_tokens.crop("image") + max(len(r.text_embeds) for r in results),
    )


def test_the_same_caption_gives_the_same_bytes_twice(encoders: TextEncoders) -> None:
    first, second = (encoders.encode([CAPTIONS[0]], "video")[0] for _ in range(2))
    assert torch.equal(first.text_embeds, second.text_embeds)
    assert torch.equal(first.pooled_embed, second.pooled_embed)


def test_white_space_around_a_caption_makes_no_difference(encoders: TextEncoders) -> None:
    plain, padded = (encoders.encode([text], "video")[0] for text in ("a cat", " \n\ta cat\n\n"))
    assert torch.equal(plain.text_embeds, padded.text_embeds)


@pytest.mark.parametrize(
    "word", ["<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|endoftext|>", "<tool_call>"]
)
def test_special_tokens_in_a_caption_are_spelt_out(
    word: str, encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encoders._qwen is not None
    seen = _record_calls(encoders, monkeypatch)
    (result,) = encoders.encode([f"before {word} after"], "video")
    special = encoders._qwen.tokenizer.convert_tokens_to_ids(word)
    caption_ids = seen[0][0, encoders._qwen_tokens.crop("video") :].tolist()
    # The template's own closing token is the only control token after the caption begins.
    assert caption_ids.count(special) == (1 if word == "<|im_end|>" else 0)
    assert encoders._qwen.tokenizer.decode(caption_ids) == f"before {word} after<|im_end|>"
    assert torch.isfinite(result.text_embeds).all()


def test_clips_end_token_in_a_caption_does_not_end_it(encoders: TextEncoders) -> None:
    plain, cut = (encoders.encode([text], "video")[0] for text in ("a cat <|endoftext|> runs", "a cat"))
    assert not torch.allclose(plain.pooled_embed, cut.pooled_embed)


def test_a_long_caption_is_cut_and_the_lost_tail_is_named(
    encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("k5.kandinsky5.text.encoders"),
        "warning",
        lambda text, *a: messages.append(text % a),
    )
    (result,) = encoders.encode(["word " * 400 + "the unseen end"], "video")
    assert len(result.text_embeds) == 256
    (message,) = messages
    assert "tokens and was cut" in message
    encoders.encode(["short"], "video")
    assert len(messages) == 1


def test_weights_are_computed_in_the_dtype_asked_for(tiny_models: Path, encoders: TextEncoders) -> None:
    half = _load(tiny_models, dtype=torch.bfloat16)
    assert half._qwen is not None
    assert half._clip is not None
    assert {p.dtype for p in half._qwen.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half._clip.model.parameters()} == {torch.float32}
    single, double = (e.encode([CAPTIONS[0]], "video")[0].text_embeds.float() for e in (half, encoders))
    assert 0 < (single - double).norm() / double.norm() < 0.05


def test_four_bit_weights_stay_close_and_have_another_fingerprint(
    tiny_models: Path, encoders: TextEncoders
) -> None:
    quantized = _load(tiny_models, quantization="nf4")
    assert quantized._qwen is not None
    assert quantized._qwen.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    exact, rough = (e.encode([CAPTIONS[0]], "video")[0].text_embeds.float() for e in (encoders, quantized))
    assert 1e-3 < (rough - exact).norm() / exact.norm() < 0.4
    names = (str(tiny_models / "text_encoder"), str(tiny_models / "text_encoder2"))
    assert quantized.fingerprint == text_encoder_fingerprint(*names, "nf4")
    assert encoders.fingerprint == text_encoder_fingerprint(*names)
    assert quantized.fingerprint != encoders.fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_weights_stay_closer_and_are_the_layers_linears_alone(
    tiny_models: Path, encoders: TextEncoders, dtype: torch.dtype
) -> None:
    eight = _load(tiny_models, quantization="fp8", dtype=dtype)
    assert eight._qwen is not None
    model = eight._qwen.model
    linears = [module for module in model.layers.modules() if isinstance(module, torch.nn.Linear | Fp8Linear)]
    assert {type(module) for module in linears} == {Fp8Linear}
    assert len(linears) == 7 * len(model.layers)  # four of the attention, three of the feed-forward
    assert model.embed_tokens.weight.dtype == model.norm.weight.dtype == dtype
    exact, rough = (e.encode([CAPTIONS[0]], "video")[0].text_embeds.float() for e in (encoders, eight))
    assert 1e-3 < (rough - exact).norm() / exact.norm() < 0.1
    names = (str(tiny_models / "text_encoder"), str(tiny_models / "text_encoder2"))
    assert eight.fingerprint == text_encoder_fingerprint(*names, "fp8")
    assert len({text_encoder_fingerprint(*names, way) for way in (None, "nf4", "fp8")}) == 3


def test_a_download_cache_of_symlinks_gives_the_same_numbers(
    tiny_models: Path, encoders: TextEncoders, tmp_path: Path
) -> None:
    snapshots = [
        make_hub_cache(tiny_models / name, tmp_path, f"someone/{name}")
        for name in ("text_encoder", "text_encoder2")
    ]
    qwen, clip = map(str, snapshots)
    config = TextEncodersConfig(text_encoder_qwen=qwen, text_encoder_clip=clip)
    loaded = load_text_encoders(config, device="cpu", dtype=torch.float32)
    assert loaded.fingerprint == encoders.fingerprint
    ours, theirs = (e.encode(["a cat"], "video")[0].text_embeds for e in (loaded, encoders))
    assert torch.equal(ours, theirs)


def test_published_layouts_are_read(models: Path, encoders: TextEncoders) -> None:
    """A flat config as on the hub, newer tensor names, one file instead of shards, old tables in CLIP's."""
    qwen, clip = models / "text_encoder", models / "text_encoder2"
    tensors: dict[str, Tensor] = {}
    for shard in sorted(qwen.glob("*.safetensors")):
        tensors |= read_tensors(shard)[0]
        shard.unlink()
    (qwen / "model.safetensors.index.json").unlink()
    renamed = {name.replace("model.", "model.language_model.", 1): t for name, t in tensors.items()}
    write_tensors(qwen / "model.safetensors", renamed)

    def flatten(config: dict[str, Any]) -> None:
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope["rope_theta"]}
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        text.pop("model_type")
        config |= text

    _edit_json(qwen / "config.json", flatten)
    clip_tensors, metadata = read_tensors(clip / "model.safetensors")
    clip_tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    write_tensors(clip / "model.safetensors", clip_tensors, metadata)
    ours, theirs = (e.encode([CAPTIONS[0]], "video")[0] for e in (_load(models), encoders))
    assert torch.equal(ours.text_embeds, theirs.text_embeds)
    assert torch.equal(ours.pooled_embed, theirs.pooled_embed)


def test_libraries_print_nothing_while_loading(
    tiny_models: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    with quiet_logging():
        _load(tiny_models)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert not [str(w.message) for w in recwarn if not issubclass(w.category, DeprecationWarning)]


def test_freed_encoders_hold_no_models(tiny_models: Path) -> None:
    loaded = _load(tiny_models)
    loaded.free()
    with pytest.raises(RuntimeError, match="freed"):
        loaded.encode(["x"], "video")


def test_widths_that_do_not_fit_the_dit_are_named(encoders: TextEncoders) -> None:
    check_text_dims(encoders, (64, 32))
    with pytest.raises(ModelFileError) as caught:
        check_text_dims(encoders, (3584, 768))
    assert "--text_encoder_qwen: the model is 64 wide, the task's DiT takes 3584" in str(caught.value)
    assert "--text_encoder_clip: the model is 32 wide" in str(caught.value)


def test_a_tokenizer_that_cuts_the_templates_otherwise_is_refused_for_real_tasks(tiny_models: Path) -> None:
    with pytest.raises(ModelFileError, match="makes 129 / 41"):
        _load(tiny_models, require_official_crop=True)


def test_swapped_tokenizers_are_refused(models: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(models / "text_encoder2" / name, models / "text_encoder" / name)
    with pytest.raises(ModelFileError, match=r"different models|not Qwen2\.5-VL's"):
        _load(models)


@pytest.mark.parametrize("length", [2, 78])
def test_clip_lengths_out_of_range_are_refused(length: int, tiny_models: Path) -> None:
    with pytest.raises(ConfigError, match="--clip_max_length"):
        _load(tiny_models, clip_max_length=length)


def _remove_shard(models: Path) -> None:
    (models / "text_encoder" / "model-00002-of-00002.safetensors").unlink()


def _cut_shard(models: Path) -> None:
    shard = models / "text_encoder" / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])


def _bring_code(models: Path) -> None:
    (models / "text_encoder" / "code.py").write_text("raise SystemExit", encoding="utf-8")
    _edit_json(models / "text_encoder" / "config.json", lambda c: c.update(auto_map={"AutoModel": "code.M"}))


def _remove_tokenizer(models: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (models / "text_encoder" / name).unlink()


def _other_kind(models: Path) -> None:
    _edit_json(models / "text_encoder" / "config.json", lambda c: c.update(model_type="llama"))


def _break_config(models: Path) -> None:
    (models / "text_encoder" / "config.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_shard, "1 of 2 weight files are missing: model-00002-of-00002"),
        (_cut_shard, "the file is damaged"),
        (_bring_code, "auto_map"),
        (_remove_tokenizer, "no tokenizer.json or vocab.json there"),
        (_other_kind, "config.json describes llama, not Qwen2.5-VL"),
        (_break_config, "cannot be read as JSON"),
    ],
)
def test_damaged_folders_are_refused_before_loading(
    damage: Callable[[Path], None], message: str, models: Path
) -> None:
    damage(models)
    problems = check_text_encoder_paths(str(models / "text_encoder"), str(models / "text_encoder2"))
    assert len(problems) == 1
    assert message in problems[0]
    with pytest.raises(ModelFileError):
        _load(models)


def test_swapped_folders_and_missing_ones_are_all_named(tiny_models: Path, tmp_path: Path) -> None:
    qwen, clip = str(tiny_models / "text_encoder"), str(tiny_models / "text_encoder2")
    assert len(check_text_encoder_paths(clip, qwen)) == 2
    missing = check_text_encoder_paths(str(tmp_path / "none"), str(tiny_models / "vae" / "config.json"))
    assert "no such folder" in missing[0]
    assert "is a file" in missing[1]
    assert check_text_encoder_paths(qwen, clip) == []
    assert check_text_encoder_paths("Qwen/Qwen2.5-VL-7B-Instruct", "openai/clip-vit-large-patch14") == []


def test_weights_that_do_not_fit_the_config_are_listed(models: Path) -> None:
    name = "model.norm.weight"
    index = json.loads((models / "text_encoder" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shard = models / "text_encoder" / index["weight_map"][name]
    tensors, metadata = read_tensors(shard)
    del tensors[name]
    write_tensors(shard, tensors, metadata)
    with pytest.raises(ModelFileError, match=r"1 missing: norm\.weight"):
        _load(models)


def test_a_hub_id_that_cannot_be_had_says_what_to_do(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelFileError, match="give the path of a local copy"):
        load_text_encoders(tiny_encoders(tiny_models, text_encoder_qwen="nobody/nothing"), device="cpu")
