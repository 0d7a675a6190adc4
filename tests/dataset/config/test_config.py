"""Dataset files: what loads, and every problem named with its place."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from dataset.config.config import ImageDatasetConfig, VideoDatasetConfig, load_dataset_config
from dataset.media.frames import Resampling
from modules.errors import ConfigError

VIDEO = '[[datasets]]\nvideo_directory = "clips"\ncaption_extension = ".txt"\n'
IMAGE = '[[datasets]]\nimage_directory = "photos"\ncaption_extension = ".txt"\n'


def write(tmp_path: Path, text: str, name: str = "dataset.toml") -> Path:
    """A dataset file."""
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(tmp_path: Path, text: str, name: str = "dataset.toml") -> str:
    """The message about a bad file; it must end with exit code 2."""
    with pytest.raises(ConfigError) as caught:
        load_dataset_config(write(tmp_path, text, name))
    assert caught.value.exit_code == 2
    return str(caught.value)


def video(tmp_path: Path, text: str = "") -> VideoDatasetConfig:
    """The one video dataset of a file."""
    dataset = load_dataset_config(write(tmp_path, VIDEO + text)).datasets[0]
    assert isinstance(dataset, VideoDatasetConfig)
    return dataset


def test_defaults_are_the_ones_users_know(tmp_path: Path) -> None:
    dataset = video(tmp_path)
    assert dataset.resolution == (960, 544)
    assert (dataset.batch_size, dataset.num_repeats, dataset.max_frames) == (1, 1, 129)
    assert (dataset.target_frames, dataset.frame_extraction) == ((1,), "head")
    assert dataset.cache_directory == Path("clips")
    assert dataset.resampling is None


def test_a_value_comes_from_the_table_then_general_then_the_command_line(tmp_path: Path) -> None:
    general = "[general]\nbatch_size = 3\n"
    path = write(tmp_path, IMAGE + "batch_size = 2\n" + VIDEO)
    assert [d.batch_size for d in load_dataset_config(path, batch_size=7).datasets] == [2, 7]
    path = write(tmp_path, general + IMAGE + "batch_size = 2\n" + VIDEO)
    assert [d.batch_size for d in load_dataset_config(path, batch_size=7).datasets] == [2, 3]
    path = write(tmp_path, IMAGE + "caption_dropout_rate = 0\n" + VIDEO)
    datasets = load_dataset_config(path, caption_dropout_rate=0.1).datasets
    assert [d.caption_dropout_rate for d in datasets] == [0.0, 0.1]


def test_caption_lines_are_for_files_and_name_an_index_entry_of_their_own(tmp_path: Path) -> None:
    assert video(tmp_path, "caption_lines = true").text_settings_hash != video(tmp_path).text_settings_hash
    assert video(tmp_path, "caption_lines = false").text_settings_hash == video(tmp_path).text_settings_hash
    table = '[[datasets]]\nvideo_jsonl_file = "v.jsonl"\ncache_directory = "c"\n'
    assert load_dataset_config(write(tmp_path, "[general]\ncaption_lines = true\n" + table)).datasets
    with pytest.raises(ConfigError, match='write "caption"'):
        load_dataset_config(write(tmp_path, table + "caption_lines = true\n"))


def test_json_means_the_same_as_toml(tmp_path: Path) -> None:
    value = {
        "general": {"resolution": 512},
        "datasets": [{"image_directory": "photos", "caption_extension": ".txt"}],
    }
    from_json = load_dataset_config(write(tmp_path, json.dumps(value), "d.json")).datasets[0]
    from_toml = load_dataset_config(write(tmp_path, "[general]\nresolution = 512\n" + IMAGE)).datasets[0]
    assert isinstance(from_json, ImageDatasetConfig)
    assert from_json.resolution == from_toml.resolution == (512, 512)
    assert from_json.settings_hash == from_toml.settings_hash


def test_a_mistyped_key_is_named_with_line_dataset_and_the_nearest_key(tmp_path: Path) -> None:
    text = problems(tmp_path, IMAGE + VIDEO + "resoluton = 512\n")
    assert "line 7" in text
    assert "dataset 1" in text
    assert "did you mean resolution?" in text


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    text = problems(
        tmp_path, "top = 1\n[general]\nbatch_size = 0\n" + IMAGE + "num_repeats = 0\nenabel = true\n"
    )
    assert all(word in text for word in ("top", "batch_size", "num_repeats", "enabel"))


@pytest.mark.parametrize(
    "line",
    [
        'batch_size = "2"',
        "batch_size = true",
        "batch_size = -1",
        "batch_size = 0",
        "batch_size = 1e3",
        "batch_size = nan",
        "num_repeats = 0",
        "resolution = [512]",
        "resolution = [512, 512, 512]",
        "resolution = [512.0, 512]",
        "resolution = 500",
        "resolution = 0",
        "enable_bucket = 1",
        "target_frames = 25",
        "target_frames = []",
        "target_frames = [0]",
        "target_frames = [true]",
        'frame_extraction = "heads"',
        "source_fps = 0",
        "source_fps = nan",
        "source_fps = inf",
        "source_fps = true",
        "caption_dropout_rate = 1.5",
        'caption_extension = "txt"',
        "cache_directory = 5",
        'cache_directory = ""',
        "target_fps = 12",
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    body = '[[datasets]]\nvideo_directory = "clips"\n'
    if "caption_extension" not in line:
        body += 'caption_extension = ".txt"\n'
    text = problems(tmp_path, body + line + "\n")
    assert line.split(" ")[0] in text
    assert "dataset 0" in text


def test_a_resolution_off_the_grid_names_the_nearest(tmp_path: Path) -> None:
    assert "[512, 304]" in problems(tmp_path, IMAGE + "resolution = [510, 300]\n")


@pytest.mark.parametrize("word", ["30", "30.0"])
def test_source_fps_may_be_a_whole_number(tmp_path: Path, word: str) -> None:
    assert video(tmp_path, f"source_fps = {word}\n").source_fps == 30.0


@pytest.mark.parametrize("other", ["c", "./c", "link", "c/../c"])
def test_one_cache_folder_for_two_datasets_is_refused_where_they_hold_the_same_media(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    text = problems(tmp_path, IMAGE + 'cache_directory = "c"\n' + IMAGE + f'cache_directory = "{other}"\n')
    assert "datasets 0 and 1 have the same images and the same cache_directory" in text
    (tmp_path / "d.toml").write_text(
        IMAGE + 'cache_directory = "c"\n' + VIDEO + f'cache_directory = "{other}"\n', encoding="utf-8"
    )
    assert len(load_dataset_config(tmp_path / "d.toml").datasets) == 2


def test_syntax_errors_tell_line_and_column(tmp_path: Path) -> None:
    assert "line 2, column" in problems(tmp_path, "[general]\nbatch_size =\n")
    assert "line 2, column" in problems(tmp_path, '{"general": {},\n bad}', "d.json")


def test_files_that_cannot_be_configs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_dataset_config(tmp_path / "x.toml")
    assert ".toml or a .json" in problems(tmp_path, "", "d.yaml")
    assert "[[datasets]]" in problems(tmp_path, "[general]\n")
    assert "nested" in problems(tmp_path, "[" * 100_000, "deep.json")
    (tmp_path / "latin.toml").write_bytes("# café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="byte 5"):
        load_dataset_config(tmp_path / "latin.toml")


def test_a_byte_order_mark_and_crlf_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbf" + IMAGE.replace("\n", "\r\n").encode())
    assert len(load_dataset_config(path).datasets) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[datasets]]\nbatch_size = 1\n", "no source"),
        ('[[datasets]]\nimage_jsonl_file = "a.jsonl"\n', "cache_directory"),
        ('[[datasets]]\nimage_directory = "a"\n', "caption_extension"),
        (IMAGE + 'image_jsonl_file = "a.jsonl"\ncache_directory = "c"\n', "both"),
        (IMAGE + "target_frames = [1]\n", "key of video datasets"),
        (VIDEO + 'image_directory = "a"\n', "key of image datasets"),
        ("[general]\ntarget_frames = [1]\n" + VIDEO, "belongs in a [[datasets]] table"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in problems(tmp_path, text)


def test_settings_of_other_models_are_ignored_with_one_line(tmp_path: Path) -> None:
    text = (
        IMAGE + 'control_directory = "x"\nmultiple_target = true\nqwen_image_edit_control_resolution = 512\n'
    )
    config = load_dataset_config(write(tmp_path, text))
    assert sum("ignored" in note for note in config.notes) == 1
    assert any("old spelling of control_resolution" in note for note in config.notes)


def test_lengths_are_rounded_and_said(tmp_path: Path) -> None:
    config = load_dataset_config(write(tmp_path, VIDEO + "target_frames = [25, 24, 27, 1]\n"))
    assert isinstance(config.datasets[0], VideoDatasetConfig)
    assert config.datasets[0].target_frames == (1, 21, 25)
    assert any("[1, 21, 25]" in note for note in config.notes)


def test_uniform_with_one_sample_is_head(tmp_path: Path) -> None:
    assert video(tmp_path, 'frame_extraction = "uniform"\n').frame_extraction == "head"


def test_the_settings_hash_changes_with_what_the_latents_depend_on_only(tmp_path: Path) -> None:
    base = video(tmp_path).settings_hash
    for line in ("batch_size = 4", "num_repeats = 3", "caption_dropout_rate = 0.1", "frame_stride = 5"):
        assert video(tmp_path, line + "\n").settings_hash == base, line
    for line in ("resolution = 512", "enable_bucket = true", "target_frames = [5]", "source_fps = 30"):
        assert video(tmp_path, line + "\n").settings_hash != base, line
    moved = VIDEO.replace("clips", "elsewhere")
    assert load_dataset_config(write(tmp_path, moved)).datasets[0].settings_hash == base


def test_videos_cut_into_single_frames_take_the_image_template(tmp_path: Path) -> None:
    assert video(tmp_path).template == "image"
    assert video(tmp_path, "target_frames = [1, 25]\n").template == "video"
    assert video(tmp_path, 'frame_extraction = "full"\n').template == "video"


def test_reading_a_config_does_not_load_torch(root: Path) -> None:
    code = "import sys, dataset.config, dataset.sources, dataset.buckets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_settings_that_change_nothing_are_said(tmp_path: Path) -> None:
    text = VIDEO + "frame_stride = 3\nframe_sample = 7\nmax_frames = 33\nbucket_no_upscale = true\n"
    notes = load_dataset_config(write(tmp_path, text)).notes
    assert notes == (
        "dataset 0: bucket_no_upscale has no effect without enable_bucket = true",
        'dataset 0: frame_stride, frame_sample, max_frames: no effect with frame_extraction = "head"',
    )
    text = VIDEO + 'frame_extraction = "full"\nmax_frames = 33\ntarget_frames = [5]\n'
    (note,) = load_dataset_config(write(tmp_path, text)).notes
    assert note == 'dataset 0: target_frames: no effect with frame_extraction = "full"'
    used = (
        VIDEO
        + 'frame_extraction = "slide"\nframe_stride = 3\nenable_bucket = true\nbucket_no_upscale = true\n'
    )
    assert load_dataset_config(write(tmp_path, used)).notes == ()


def test_a_general_target_fps_holds_for_the_datasets_that_have_a_source_fps(tmp_path: Path) -> None:
    text = "[general]\ntarget_fps = 12\n" + VIDEO + 'source_fps = 24\ncache_directory = "c"\n' + VIDEO
    config = load_dataset_config(write(tmp_path, text))
    first, second = config.datasets
    assert isinstance(first, VideoDatasetConfig)
    assert isinstance(second, VideoDatasetConfig)
    assert first.resampling == Resampling(Fraction(24), Fraction(12))
    assert second.resampling is None
    assert config.notes == ("dataset 1: target_fps has no effect without source_fps",)
