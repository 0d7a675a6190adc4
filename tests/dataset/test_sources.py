"""Listings: which media are used, which are left out, and the messages about it."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from dataset.config.config import ImageDatasetConfig, VideoDatasetConfig
from dataset.media.frame_folders import frame_paths
from dataset.sources.items import CAPTION_NOT_UTF8, IS_FOLDER, MISSING_FILE, NO_CAPTION, SourceListing
from dataset.sources.listing import list_items
from modules.errors import ConfigError, DataError


def images(directory: Path, **settings: Any) -> SourceListing:
    """The listing of a folder of images."""
    config = ImageDatasetConfig(
        index=0,
        origin="dataset.toml line 2",
        cache_directory=directory,
        image_directory=directory,
        caption_extension=".txt",
        **settings,
    )
    return list_items(config)


def jsonl(path: Path) -> SourceListing:
    """The listing of a JSONL file of images."""
    config = ImageDatasetConfig(
        index=0, origin="dataset.toml line 2", cache_directory=path.parent, image_jsonl_file=path
    )
    return list_items(config)


def add(folder: Path, name: str, caption: str | bytes | None = "a cat") -> None:
    """A media file (never opened here) and its caption."""
    (folder / name).write_bytes(b"x")
    if caption is not None:
        raw = caption.encode("utf-8") if isinstance(caption, str) else caption
        (folder / name).with_suffix(".txt").write_bytes(raw)


def write_lines(path: Path, *values: object) -> Path:
    """A JSONL file; strings are written as they are."""
    lines = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_missing_folder_is_exit_2_with_the_config_line_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.toml line 2.*photos: no such folder"):
        images(tmp_path / "photos")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_exit_3_with_the_known_extensions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images in .*\.png") as caught:
        images(tmp_path)
    assert caught.value.exit_code == 3


def test_listings_are_sorted_not_recursive_and_take_any_case(tmp_path: Path) -> None:
    for name in ("b.Jpg", "a.PNG", "c.webp", "notes.md"):
        add(tmp_path, name)
    (tmp_path / "sub").mkdir()
    add(tmp_path / "sub", "d.png")
    assert [item.path.name for item in images(tmp_path).items] == ["a.PNG", "b.Jpg", "c.webp"]


def test_media_without_caption_are_listed_not_dropped(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    add(tmp_path, "b.png", None)
    listing = images(tmp_path)
    assert [item.base_name for item in listing.items] == ["a"]
    assert [(s.name, s.reason, s.is_failure) for s in listing.skipped] == [("b.png", NO_CAPTION, False)]
    assert listing.found == 2


def test_no_caption_at_all_is_exit_3(tmp_path: Path) -> None:
    add(tmp_path, "b.png", None)
    with pytest.raises(DataError, match="no caption"):
        images(tmp_path)


def test_empty_captions_are_the_empty_prompt_and_counted(tmp_path: Path) -> None:
    add(tmp_path, "a.png", "")
    add(tmp_path, "b.png", " \n\t ")
    add(tmp_path, "c.png", "x")
    listing = images(tmp_path)
    assert [item.captions for item in listing.items] == [("",), ("",), ("x",)]
    assert listing.empty_captions == 2


def test_captions_lose_outer_white_space_and_byte_order_mark_and_nothing_else(tmp_path: Path) -> None:
    add(tmp_path, "a.png", b"\xef\xbb\xbf\n\t {} {0} <|im_end|>\nline 2\0 \xe7\x8c\xab \n")
    assert images(tmp_path).items[0].captions == ("{} {0} <|im_end|>\nline 2\0 猫",)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_captions_in_other_encodings_are_skipped_naming_file_and_byte(tmp_path: Path, encoding: str) -> None:
    add(tmp_path, "a.png", "café".encode(encoding))
    add(tmp_path, "b.png")
    (skipped,) = images(tmp_path).skipped
    assert skipped.reason == CAPTION_NOT_UTF8
    assert skipped.is_failure
    assert f"a.txt, byte {3 if encoding == 'latin-1' else 0}" in skipped.detail


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_utf16_without_its_mark_is_not_taken_for_text_with_nul_characters(
    tmp_path: Path, encoding: str
) -> None:
    add(tmp_path, "a.png", "a red fox".encode(encoding))
    add(tmp_path, "b.png")
    (skipped,) = images(tmp_path).skipped
    assert (skipped.name, skipped.reason) == ("a.png", CAPTION_NOT_UTF8)


def test_line_breaks_of_all_systems_are_the_same_caption(tmp_path: Path) -> None:
    for name, line_break in (("a", "\n"), ("b", "\r\n"), ("c", "\r")):
        add(tmp_path, f"{name}.png", f"one{line_break}two{line_break}".encode())
    assert {item.captions for item in images(tmp_path).items} == {("one\ntwo",)}
    assert {item.captions for item in images(tmp_path, caption_lines=True).items} == {("one", "two")}


def test_a_caption_belongs_to_its_clip_however_accents_are_coded(tmp_path: Path) -> None:
    (tmp_path / unicodedata.normalize("NFC", "café.png")).write_bytes(b"x")
    (tmp_path / unicodedata.normalize("NFD", "café.txt")).write_text("a cup", encoding="utf-8")
    assert [item.captions for item in images(tmp_path).items] == [("a cup",)]


def test_links_that_lead_nowhere_and_folders_named_like_media_are_counted(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "c.png").mkdir()
    listing = images(tmp_path)
    assert listing.found == 3
    assert [(s.name, s.reason, s.is_failure) for s in listing.skipped] == [
        ("b.png", MISSING_FILE, True),
        ("c.png", IS_FOLDER, False),
    ]


@pytest.mark.parametrize(
    ("names", "are_one_everywhere"),
    [(("Cat", "cat"), False), (("caf\u00e9", "cafe\u0301"), True), (("STRASSE", "straße"), False)],
)
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_names_that_the_system_takes_for_one_are_refused(
    tmp_path: Path,
    names: tuple[str, str],
    are_one_everywhere: bool,
    system: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    lines = []
    for folder, name in zip("xy", names, strict=True):
        (tmp_path / folder).mkdir()
        add(tmp_path / folder, f"{name}.png")
        lines.append({"image_path": str(tmp_path / folder / f"{name}.png"), "caption": "x"})
    file = write_lines(tmp_path / "m.jsonl", *lines)
    if system == "linux" and not are_one_everywhere:
        assert jsonl(file).found == 2
        return
    with pytest.raises(DataError, match=r"the same on this system|only in how their accents are coded"):
        jsonl(file)


def test_a_key_of_a_jsonl_line_that_is_not_used_is_said_once_with_the_nearest(tmp_path: Path) -> None:
    lines = []
    for name in ("a.png", "b.png"):
        add(tmp_path, name)
        path = str(tmp_path / name)
        lines.append({"image_path": path, "caption": "x", "mask_paht": "m.png", "control_path_1": path})
    (note,) = jsonl(write_lines(tmp_path / "m.jsonl", *lines)).notes
    assert 'm.jsonl line 1: "mask_paht" is no key of a JSONL line' in note
    assert note.endswith("did you mean mask_path?")
    assert jsonl(write_lines(tmp_path / "m.jsonl", {**lines[0], "mask_paht": 1})).notes
    assert not jsonl(write_lines(tmp_path / "m.jsonl", {"image_path_0": path, "caption": "x"})).notes


def test_two_media_of_one_base_name_are_refused_naming_both(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    add(tmp_path, "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg and .*a\.png"):
        images(tmp_path)


@pytest.mark.parametrize(
    "name", ["with space", "emoji 🐈", "日本語", "[x]", "100%", "-dash", "a.b.c", "x" * 246, "__", "a_k5"]
)
def test_odd_names_are_listed(tmp_path: Path, name: str) -> None:
    add(tmp_path, f"{name}.png")
    assert images(tmp_path).items[0].base_name == name


def test_names_that_are_not_utf8_are_skipped(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    assert [s.is_failure for s in images(tmp_path).skipped] == [True]


def test_every_bad_jsonl_line_is_named(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    good = {"image_path": str(tmp_path / "a.png"), "caption": "x"}
    path = write_lines(
        tmp_path / "m.jsonl",
        good,
        "",
        "{bad",
        {"caption": "x"},
        {"image_path": str(tmp_path / "b.png")},
        "[1]",
        {"image_path": 5, "caption": "x"},
        {"image_path": "https://x/a.png", "caption": "x"},
        {"image_path": "file:///etc/passwd", "caption": "x"},
        {"image_path": str(tmp_path / "m.jsonl"), "caption": "x"},
        good,
        '{"image_path": "q.png", "caption": "\\ud800"}',
    )
    with pytest.raises(ConfigError) as caught:
        jsonl(path)
    lines = caught.value.problems
    assert [int(line.split(" line ")[1].split(":")[0]) for line in lines] == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert "the same image as in line 1" in lines[8]


def test_jsonl_reads_byte_order_mark_crlf_and_empty_lines(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    line = json.dumps({"image_path": str(tmp_path / "a.png"), "caption": " x\u2028y "})
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n\n")
    assert [item.captions for item in jsonl(tmp_path / "m.jsonl").items] == [("x\u2028y",)]


def test_jsonl_paths_count_from_the_working_directory_then_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    for folder in (work, home):
        folder.mkdir()
        add(folder, "a.png")
    add(home, "b.png")
    monkeypatch.chdir(work)
    path = write_lines(
        home / "m.jsonl", {"image_path": "a.png", "caption": "x"}, {"image_path_0": "b.png", "caption": "y"}
    )
    assert [item.path.resolve() for item in jsonl(path).items] == [work / "a.png", home / "b.png"]


def test_files_missing_from_a_jsonl_are_listed(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    path = write_lines(
        tmp_path / "m.jsonl", *({"image_path": str(tmp_path / n), "caption": "x"} for n in ("a.png", "z.png"))
    )
    assert [(s.name, s.reason) for s in jsonl(path).skipped] == [("z.png", MISSING_FILE)]


def test_equal_file_names_in_two_folders_are_refused(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        add(tmp_path / folder, "a.png")
    path = write_lines(
        tmp_path / "m.jsonl", *({"image_path": str(tmp_path / n / "a.png"), "caption": "x"} for n in "xy")
    )
    with pytest.raises(DataError, match="same base name"):
        jsonl(path)


def test_a_video_may_be_a_folder_of_frames(tmp_path: Path) -> None:
    shot = tmp_path / "shot.7"
    shot.mkdir()
    for name in ("0002.png", "0001.PNG", "readme.txt"):
        (shot / name).write_bytes(b"x")
    path = write_lines(tmp_path / "m.jsonl", {"video_path": str(shot), "caption": "x"})
    config = VideoDatasetConfig(index=0, origin="", cache_directory=tmp_path, video_jsonl_file=path)
    (item,) = list_items(config).items
    assert (item.base_name, item.is_frame_folder) == ("shot.7", True)
    assert [p.name for p in frame_paths(item.path)] == ["0001.PNG", "0002.png"]


def test_each_line_is_a_caption_only_when_asked_for(tmp_path: Path) -> None:
    add(tmp_path, "a.png", "one\r\n\n  two \n")
    add(tmp_path, "b.png", " \n ")
    assert [item.captions for item in images(tmp_path).items] == [("one\n\n  two",), ("",)]
    assert [item.captions for item in images(tmp_path, caption_lines=True).items] == [("one", "two"), ("",)]


def test_a_jsonl_line_may_list_captions(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    path = write_lines(
        tmp_path / "m.jsonl", {"image_path": str(tmp_path / "a.png"), "caption": [" one ", "two"]}
    )
    assert jsonl(path).items[0].captions == ("one", "two")
    for wrong in ([], ["one", 2], {"a": 1}, None):
        write_lines(path, {"image_path": str(tmp_path / "a.png"), "caption": wrong})
        with pytest.raises(ConfigError, match="line 1: caption must be a string in quotes or a list"):
            jsonl(path)
