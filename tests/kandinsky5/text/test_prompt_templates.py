"""The official texts: found in diffusers, checked by hash, readable from a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from kandinsky5.prompt_templates import main
from kandinsky5.text.templates import load_prompt_templates, save_prompt_templates
from modules.errors import ConfigError, ResourceError

# Of the official code's texts, with {} where the caption goes.
OFFICIAL = {
    "video": "09efacd0c7584e236b605dfa1d8b76e87051f5d4ca99f79243e46cbec993c3bc",
    "image": "04de998d6e835997641241c6d0ec3dc0fab9e8c70f87dccf98333822ccdff04f",
    "negative_prompt": "0c7acab80fec7c0fc9195770616e90570e9a33cb4a1826f11a65215582119e82",
}


def test_the_texts_are_the_official_ones_to_the_byte() -> None:
    templates = load_prompt_templates()
    texts = {
        "video": templates.video,
        "image": templates.image,
        "negative_prompt": templates.negative_prompt,
    }
    assert {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()} == OFFICIAL


def test_the_caption_goes_between_the_two_parts() -> None:
    templates = load_prompt_templates()
    before, after = templates.parts("video")
    assert before + "{}" + after == templates.video
    assert before.endswith("<|im_start|>user\n")
    assert after == "<|im_end|>"


def test_a_changed_diffusers_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.kandinsky5 import pipeline_kandinsky

    monkeypatch.setattr(pipeline_kandinsky, "EXAMPLE_DOC_STRING", "nothing here")
    with pytest.raises(ResourceError, match=r"negative_prompt is not the text .*\n.*diffusers>=0.42,<0.43"):
        load_prompt_templates()


def test_saved_texts_are_accepted_and_changed_ones_are_not(tmp_path: Path) -> None:
    file = tmp_path / "templates.json"
    save_prompt_templates(file, load_prompt_templates())
    assert load_prompt_templates(file) == load_prompt_templates()
    texts = json.loads(file.read_text(encoding="utf-8"))
    texts["image"] = texts["image"].replace("promt", "prompt")
    file.write_text(json.dumps(texts), encoding="utf-8")
    with pytest.raises(ConfigError, match="image is not the text"):
        load_prompt_templates(file)


@pytest.mark.parametrize("content", ["", "[]", '{"video": 3}', "{}"])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "templates.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="--prompt_templates"):
        load_prompt_templates(file)


def test_the_command_saves_what_the_option_reads(tmp_path: Path) -> None:
    main([str(tmp_path / "out.json")])
    assert load_prompt_templates(tmp_path / "out.json") == load_prompt_templates()
