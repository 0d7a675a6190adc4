"""`--check` and `--preview`: an untidy folder is seen before anything is encoded; nothing in it runs."""

from __future__ import annotations

import html.parser
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import kandinsky5_cache_latents
import kandinsky5_cache_text_encoder_outputs
from dataset.media import scenes
from dataset.sources.items import OTHER_CONTENT
from kandinsky5.caching import captions, latents
from tests.dataset.untidy import write_untidy


@pytest.fixture(scope="module")
def untidy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset file with one of each fault. Read only."""
    return write_untidy(tmp_path_factory.mktemp("untidy"))


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(latents, "load_vae")
    monkeypatch.delattr(captions, "load_text_encoders")


def check(script: object, *words: object) -> int:
    try:
        script.main(["--device", "cpu", *map(str, words)])  # type: ignore[attr-defined]
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


def test_a_check_names_everything_and_writes_nothing(
    untidy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scenedetect")
    before = files(untidy.parent)
    assert check(kandinsky5_cache_latents, "--dataset_config", untidy, "--check") == 3
    shown = capsys.readouterr()
    for line in (
        "dataset 0 (videos): found 14, used 7",
        "  skipped, cannot be opened: 2\n    cut off.mp4",
        "  skipped, caption is not UTF-8: 1\n    latin.mp4 (latin.txt, byte 3; save it as UTF-8)",
        "  skipped, format is not read: 1\n    scan.psd (extension .psd)",
        f"  skipped, {OTHER_CONTENT['image']}: 1\n    photo.jpg",
        "  skipped, no caption: 1\n    no caption.mp4",
        "  skipped, too short: 1\n    short.mp4 (4 frames, the smallest of target_frames is 5)",
        "  80x48x17      6        6\n  80x48x5       7        7",
        "  used: 107 of 133 frames (80 %), 0:04.3 of 0:05.3 minutes",
        "  frame rates: 24 (7), 30 (1)",
        "  empty caption: 1\n    no words.mp4",
        "  only shorter cuts: 1\n    half.mp4: 5 of 17 frames",
        "  other frame rate: 1\n    phone 30 fps.mp4: 30 frames a second, trained as 24",
        "  same pixels: 1\n    good.mp4: as copy of good.mp4",
        "  scene cut inside: 1\n    two scenes.mp4: frames 0 to 16: new scene at 7",
        "  disk: 13 latent caches of 0.26 MiB together; ",
        "  time: decoding took ",
    ):
        assert line in shown.out, line
    assert "3 damaged items were left out, nothing was encoded" in shown.err
    assert files(untidy.parent) == before
    assert check(kandinsky5_cache_latents, "--dataset_config", untidy, "--check", "--skip_bad") == 0
    assert check(kandinsky5_cache_latents, "--dataset_config", untidy, "--check", "--strict") == 3


def test_a_tidy_folder_ends_with_0_and_a_missing_package_is_said(
    untidy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "PACKAGE", "no_such_package")
    for name in ("good.mp4", "good.txt"):
        shutil.copy(untidy.parent / "clips" / name, tmp_path / name)
    file = tmp_path / "dataset.toml"
    text = untidy.read_text(encoding="utf-8").replace(
        (untidy.parent / "clips").as_posix(), tmp_path.as_posix()
    )
    file.write_text(text, encoding="utf-8")
    assert check(kandinsky5_cache_latents, "--dataset_config", file, "--check") == 0
    shown = capsys.readouterr().out
    assert "found 1, used 1" in shown
    assert "scene cuts were not looked for: pip install" in shown


def test_captions_are_counted_without_an_encoder(
    untidy: Path, tiny_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = kandinsky5_cache_text_encoder_outputs
    words = ("--dataset_config", untidy, "--check")
    assert check(script, *words) == 3
    shown = capsys.readouterr().out
    assert "dataset 0 (videos): found 14, used 10" in shown
    assert "tokens were not counted" in shown
    encoders = (
        "--text_encoder_qwen",
        tiny_models / "text_encoder",
        "--text_encoder_clip",
        tiny_models / "text_encoder2",
    )
    assert check(script, *words, *encoders, "--qwen_max_length", "20") == 3
    shown = capsys.readouterr().out
    assert "  caption cut off: " in shown
    assert "good.mp4: Qwen: " in shown
    assert "  empty caption: 1\n    no words.mp4" in shown
    assert "  disk: 10 text caches of " in shown
    assert not (untidy.parent / "cache").exists()


class _Page(html.parser.HTMLParser):
    """What is on a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def page(untidy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview") / "page"
    assert check(kandinsky5_cache_latents, "--dataset_config", untidy, "--preview", folder) == 3
    return folder / "index.html"


def test_the_page_shows_clips_and_reasons_and_holds_no_script(page: Path) -> None:
    found = _Page(page)
    assert found.tags.count("article") == 13 + 7
    assert set(found.tags).isdisjoint({"script", "iframe", "object", "link", "b onerror"})
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    sources = [value for name, value in found.attributes if name == "src"]
    assert len(sources) == 13 * 3 == len(list((page.parent / "pictures").iterdir()))
    assert all((page.parent / str(source)).is_file() for source in sources)
    assert Image.open(page.parent / "pictures" / "000001.jpg").size == (80, 48)
    for words in (
        '<script>document.title = "run"</script><img src=x onerror=alert(1)> "quoted" &',
        "\\u202egpj.exe \\x1b[31m",
        "markup <b>.mp4",
        "skipped: no caption (1)",
        *(("scene cut inside: frames 0 to 16: new scene at 7",) if scenes.has_detector() else ()),
        "same pixels: as copy of good.mp4",
    ):
        assert words in found.words
    assert "\x1b" not in found.words
    assert "\u202e" not in found.words


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_opens_the_page_from_the_disk_and_nothing_on_it_runs(page: Path, tmp_path: Path) -> None:
    # `--dump-dom` prints the page after whatever would run has run.
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    result = subprocess.run(
        [*command, "--dump-dom", page.as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    assert "<title>Dataset preview</title>" in result.stdout
    assert result.stdout.count("<article") == 20


def test_a_preview_is_renewed_but_replaces_nothing_else(
    untidy: Path, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--dataset_config", untidy, "--preview")
    before = json.dumps(sorted(files(page.parent)))
    assert check(kandinsky5_cache_latents, *words, page.parent) == 3
    assert json.dumps(sorted(files(page.parent))) == before
    (tmp_path / "index.html").write_text("<h1>mine</h1>", encoding="utf-8")
    for folder, message in (
        (tmp_path, "of something else"),
        (untidy.parent / "clips", "takes media from there"),
    ):
        capsys.readouterr()
        assert check(kandinsky5_cache_latents, *words, folder) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == "<h1>mine</h1>"


def test_a_check_contradicts_a_debug_mode(untidy: Path) -> None:
    words = ("--dataset_config", untidy, "--check", "--debug_mode", "video")
    assert check(kandinsky5_cache_latents, *words) == 2
