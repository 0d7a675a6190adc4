"""Prompt lines and prompt files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kandinsky5.prompts import PromptSpec, parse_prompt_line, read_prompt_file
from modules.errors import ConfigError


def one(line: str) -> PromptSpec:
    (spec,) = parse_prompt_line(line, "line").checked()
    return spec


def test_settings_follow_the_prompt_in_any_case() -> None:
    spec = one("a cat, two-toned --W 512 --h 256 --F 17 --d 7 --s 20 --g 3.5 --fs 5 --i a b.png")
    assert (spec.width, spec.height, spec.frames, spec.seed, spec.steps) == (512, 256, 17, 7, 20)
    assert (spec.guidance, spec.scheduler_scale, spec.image) == (3.5, 5.0, Path("a b.png"))
    assert spec.prompt == "a cat, two-toned"


def test_an_empty_negative_prompt_is_not_a_missing_one() -> None:
    assert one("a cat --n").negative_prompt == ""
    assert one("a cat").negative_prompt is None
    assert one("a cat --n low quality, blurry --d 1").negative_prompt == "low quality, blurry"


def test_l_wins_over_g_wherever_it_stands() -> None:
    assert one("a --l 2 --g 7").guidance == 2.0
    assert one("a --g 7 --l 2").guidance == 2.0


def test_a_prompt_may_be_empty() -> None:
    assert one("--w 64").prompt == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("cat --w wide", ("--w", "'wide'")),
        ("cat --q 3", ("--q", "use one of")),
        ("cat --g nan", ("--g", "must lie within")),
    ],
)
def test_wrong_settings_name_the_line_and_the_flag(line: str, words: tuple[str, ...]) -> None:
    (problem,) = parse_prompt_line(line, "p.txt line 3").problems
    assert problem.startswith("p.txt line 3: ")
    assert all(word in problem for word in words)


def test_a_text_file_keeps_good_lines_and_reports_bad_ones(tmp_path: Path) -> None:
    path = tmp_path / "プロンプト.txt"
    path.write_text("\ufeff# comment\n猫が歩く --d 3\n\nbad --f x\nlast --cn c.mp4\n", encoding="utf-8")
    result = read_prompt_file(path)
    assert [spec.prompt for spec in result.specs] == ["猫が歩く", "last"]
    assert [problem.split(": ")[0] for problem in result.problems] == [f"{path} line 4"]
    assert "no effect" in result.notes[0]
    with pytest.raises(ConfigError):
        result.checked()


def test_json_and_toml_say_the_same(tmp_path: Path) -> None:
    entries = [
        {"prompt": "a", "width": 64, "negative_prompt": ""},
        {"prompt": "b", "width": 32, "lora_multiplier": [0.5, 1]},
    ]
    (tmp_path / "p.json").write_text(json.dumps([*entries, "c --d 5"]), encoding="utf-8")
    toml = '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a"\nnegative_prompt = ""\n'
    toml += '[[prompt.subset]]\nprompt = "b"\nwidth = 32\nlora_multiplier = [0.5, 1]\n'
    (tmp_path / "p.toml").write_text(toml, encoding="utf-8")
    from_json = read_prompt_file(tmp_path / "p.json").checked()
    from_toml = read_prompt_file(tmp_path / "p.toml").checked()
    assert [(s.prompt, s.width, s.negative_prompt, s.lora_multiplier) for s in from_toml] == [
        ("a", 64, "", None),
        ("b", 32, None, (0.5, 1.0)),
    ]
    assert [s.prompt for s in from_json] == ["a", "b", "c"]
    assert (from_json[1].lora_multiplier, from_json[2].seed) == ((0.5, 1.0), 5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "# nothing\n"),
        ("p.json", "{}"),
        ("p.json", "[" * 100_000),
        ("p.toml", "a = "),
        ("p.toml", "[prompt]\n"),
        ("p.csv", "a"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        read_prompt_file(tmp_path / name)


def test_unknown_keys_and_wrong_types_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(
        json.dumps([{"prompt": "a", "wdth": 3}, {"prompt": "b", "width": True}, 7]), encoding="utf-8"
    )
    problems = read_prompt_file(path).problems
    assert len(problems) == 3
    assert "wdth" in problems[0]
    assert "prompt 1" in problems[1]


def test_the_command_line_fills_the_gaps() -> None:
    merged = one("a --w 64").over(PromptSpec(width=512, height=256, negative_prompt="bad", where="elsewhere"))
    assert (merged.width, merged.height, merged.negative_prompt, merged.where) == (64, 256, "bad", "line")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("cat \udcff", ("prompt: U+DCFF at character 5",)),
        ("cat --n bad \ud800", ("--n: U+D800",)),
        ("cat --i \udcff.png", ("--i: U+DCFF",)),
    ],
)
def test_texts_that_are_no_text_are_refused(line: str, words: tuple[str, ...]) -> None:
    result = parse_prompt_line(line, "prompt")
    assert not result.specs
    assert all(word in result.problems[0] for word in words)


def test_half_a_character_in_json_costs_its_prompt_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(
        '["a", "bad \\ud800", {"prompt": "c", "negative_prompt": "\\udfff"}, "\\ud83d\\ude00"]', "utf-8"
    )
    result = read_prompt_file(path)
    assert [spec.prompt for spec in result.specs] == ["a", "\N{GRINNING FACE}"]
    assert ["prompt 1" in result.problems[0], "prompt 2" in result.problems[1]] == [True, True]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x0c", "\x0b", "\x85", "\x1c"])
def test_a_text_file_is_cut_at_line_ends_alone(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(f"one{mark}still one --d 1\r\ntwo\n".encode())
    specs = read_prompt_file(path).checked()
    assert [(spec.prompt, spec.seed) for spec in specs] == [(f"one{mark}still one", 1), ("two", None)]
    assert [spec.where for spec in specs] == [f"{path} line 1", f"{path} line 2"]


@pytest.mark.parametrize(
    "space", [" ", "\t", "  ", "\u3000", "\u00a0"], ids=["space", "tab", "two", "wide", "no-break"]
)
def test_any_white_space_stands_before_an_option_and_its_value(space: str) -> None:
    (spec,) = parse_prompt_line(f"a cat{space}--w{space}64{space}--n{space}a{space}dog", "here").checked()
    assert (spec.prompt, spec.width) == ("a cat", 64)
    assert spec.negative_prompt == f"a{space}dog"


@pytest.mark.parametrize(
    "text", ["a cat -- a large one -- sleeps", "a cat --", "a cat --- asleep", "a well--known cat"]
)
def test_dashes_between_words_are_prose(text: str) -> None:
    (spec,) = parse_prompt_line(f"{text} --w 64", "here").checked()
    assert (spec.prompt, spec.width) == (text, 64)
