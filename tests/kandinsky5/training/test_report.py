"""The report of a run: what it shows, what it keeps to itself, and what it survives."""

from __future__ import annotations

import json
import random
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kandinsky5.cli.train import default_options
from kandinsky5.report import main
from kandinsky5.training import memory as train_memory
from kandinsky5.training.report import page as page_module
from kandinsky5.training.report.charts import averaged, loss_picture, rate_picture
from kandinsky5.training.report.page import report_page, without_places
from kandinsky5.training.report.records import read_run, run_names
from kandinsky5.training.report.write import write_report
from kandinsky5.training.results.names import ResultNames
from kandinsky5.training.results.output_files import FILE_KINDS, kind_of, sample_kind
from kandinsky5.training.sample_files import SampledPrompt, SampleNames, write_sample
from kandinsky5.training.tracking.metrics import FILE_NAME, Metrics
from modules.byte_sizes import size_text
from tests.kandinsky5.training.training_runs import metrics, train, write_dataset

PROMPT = "<script>alert('k5')</script> a 兎 & a \"cup\""
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags of a page; fails on one that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def output(dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with validation, states and an average; and samples of one prompt."""
    folder = tmp_path_factory.mktemp("run")
    data = write_dataset(folder / "data", batch_size=2)
    train(
        *(dit, data, folder / "out", "--max_train_steps", 4, "--gradient_accumulation_steps", 2),
        *("--validation_split", 0.3, "--validate_every_n_steps", 2, "--save_every_n_steps", 2),
        *(
            "--save_state",
            "--ema_decay",
            0.5,
            "--training_comment",
            "of /home/me/secret and C:\\Users\\me\\x",
        ),
    )
    names = SampleNames(folder / "out" / "sample", "lora", "a")
    log = Metrics(folder / "out", "lora", start_step=4)
    for step in (0, 4):
        frames = np.full((5, 16, 24, 3), 60 * step, np.uint8)
        path = write_sample(names, frames, SampledPrompt(0, PROMPT, 7), step=step, epoch=None)
        log.write("sample", step, {"prompt": 0, "file": f"sample/{path.name}"})
    return folder / "out"


def test_the_report_shows_the_run_and_keeps_places_to_itself(output: Path) -> None:
    text = write_report(output, "lora").read_text(encoding="utf-8")
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link"} & set(tags)
    assert (tags.count("video"), tags.count("img")) == (1, 2)
    addresses = [attrs["src"] or "" for tag, attrs in page.tags if tag in ("video", "img")]
    assert all(address.startswith("data:") for address in addresses)
    words = " ".join(" ".join(page.text).split())
    for shown in (
        *(PROMPT, "4 steps", "validation loss", "--network_alpha 4.0", "--learning_rate 0.001", "s per step"),
        *("lora.safetensors", "change of the weights", "prediction at 500", "64x16x9"),
        *(kind.meaning for name, kind in FILE_KINDS.items() if name not in ("timesteps", "control", "lock")),
    ):
        assert shown in words, shown
    assert "This report is incomplete" not in text
    for hidden in (str(output), str(output.parent), "/home/me", "Users", "--max_grad_norm"):
        assert hidden not in words, hidden
    for attrs in (attrs for tag, attrs in page.tags if tag == "a"):
        assert (output / (attrs["href"] or "")).is_file()


def test_everything_in_the_output_folder_has_a_meaning(output: Path, root: Path) -> None:
    """Also in the guide; a file of another run is not taken for one of this run."""
    write_report(output, "lora")
    assert {kind_of(path.name, "lora") for path in output.iterdir() if path.name != "sample"} == {
        *("final", "lora", "average", "settings", "effect", "state", "report", "config", "validation"),
        "metrics",
    }
    kinds = [sample_kind(path.name, "lora") for path in (output / "sample").iterdir()]
    assert set(kinds) == {"sample", "grid", "steps"}
    assert kind_of("lora-2.safetensors", "lora") is None
    assert kind_of("lora2_config.toml", "lora") is None
    assert sample_kind("lora-2_grid_00.png", "lora") is None
    guide = (root / "docs" / "kandinsky5.md").read_text(encoding="utf-8")
    section = guide.partition("### What is in the output folder\n")[2].partition("\n#")[0]
    for kind in FILE_KINDS.values():
        assert kind.meaning.replace("this page", "the report of the run") in section.replace("`", "")
        assert all(f"`{example}`" in section for example in kind.example.split(", "))


def test_the_loss_of_a_step_is_the_mean_of_its_clips(output: Path) -> None:
    """Two micro-batches of two clips: only clip by clip can a loss be counted to its timestep."""
    for record in metrics(output, "step"):
        assert len(record["losses"]) == len(record["sigma"]) == len(record["items"]) > 1
        assert record["loss"] == pytest.approx(sum(record["losses"]) / len(record["losses"]))
        assert record["seconds"] > 0
    assert any(len(set(record["losses"])) > 1 for record in metrics(output, "step"))


def test_a_run_ends_with_its_report(dit: Path, dataset: Path, tmp_path: Path, with_report: None) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 1)
    assert "<h1>lora</h1>" in (tmp_path / "lora_report.html").read_text(encoding="utf-8")


def test_on_a_card_the_plan_stands_against_the_highest_peak_of_a_step(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is that of the real run; the card and its peaks are made up."""
    plain = train_memory.memory_record
    card = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "A card <1>")
    monkeypatch.setattr(train_memory, "memory_record", lambda planner, data, _: plain(planner, data, card))
    train(dit, dataset, tmp_path, "--max_train_steps", 2)
    (start,) = metrics(tmp_path, "start")
    planned = start["memory"]["planned_bytes"]
    assert planned == sum(start["memory"]["parts"].values())
    assert start["memory"]["batch"] == "1 x 64x16x9"
    records = metrics(tmp_path)
    for record in records:
        if record["kind"] == "step":
            record["peak_bytes"] = planned // (2 * record["step"])
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / FILE_NAME).write_text(lines, encoding="utf-8")
    text = " ".join(Page(report_page(read_run(tmp_path, "lora"), default_options(), {})).text)
    words = " ".join(text.split())
    assert "memory of A card <1>" in words
    assert f"planned for 1 x 64x16x9 {size_text(planned)}" in words
    assert f"highest peak of a step {size_text(planned // 2)} 50 %" in words


def damaged(output: Path, folder: Path) -> Path:
    shutil.copytree(output, folder)
    return folder / FILE_NAME


def test_what_is_missing_or_damaged_is_named(output: Path, tmp_path: Path) -> None:
    path = damaged(output, tmp_path / "out")
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if '"kind": "start"' not in line]
    path.write_bytes(
        "\n".join(["[1, 2]", '{"run": "lora", "kind": "step"}', *kept, kept[0][:30]]).encode()[:-1]
    )
    (tmp_path / "out/lora_config.toml").write_text("a = = 1", encoding="utf-8")
    for file in (tmp_path / "out/sample").glob("lora_000004*.mp4"):
        file.unlink()
    problems = " ".join(read_run(tmp_path / "out", "lora").problems)
    for words in (
        f"{FILE_NAME}: 2 lines cannot be read, numbers 1, {len(kept) + 3}",
        *("1 line lacks values and is left out", "no line of kind start", "lora_config.toml cannot be read"),
        "1 sample is no longer there: lora_000004",
    ):
        assert words in problems, words
    text = write_report(tmp_path / "out", "lora").read_text(encoding="utf-8")
    assert "This report is incomplete" in text
    assert Page(text).tags
    path.unlink()
    assert "metrics.jsonl is missing" in " ".join(read_run(tmp_path / "out", "lora").problems)


def test_no_content_of_the_metrics_file_stops_the_report(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of every record replaced by others of every type; charts are drawn for some of them."""
    path = damaged(output, tmp_path / "out")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    junk: list[Any] = [
        *(
            None,
            True,
            -1,
            1e308,
            "nan",
            "",
            "../../etc/passwd",
            "/etc/passwd",
            [],
            [None],
            {},
            [[1]],
            {"a": {}},
        ),
        *(10**400, "<b>", "x" * 300, [{"from": 0, "to": "<i>", "loss": "inf", "base_loss": None}], "a\0b"),
    ]
    draw = random.Random(0)
    defaults = default_options()
    for number in range(120):
        text = []
        for record in records:
            changed = dict(record)
            for key in draw.sample(sorted(changed), k=draw.randint(0, 3)):
                if key != "run":
                    changed[key] = draw.choice(junk)
            text.append(json.dumps(changed))
        path.write_text("\n".join(text), encoding="utf-8")
        run = read_run(tmp_path / "out", "lora")
        with monkeypatch.context() as patch:
            if number % 40:
                patch.setattr(page_module, "loss_picture", lambda *_: None)
                patch.setattr(page_module, "rate_picture", lambda *_: None)
            page = Page(report_page(run, defaults, {}))
        assert "script" not in [tag for tag, _ in page.tags]
        hrefs = [attrs["href"] or "" for tag, attrs in page.tags if tag == "a"]
        assert all(href.startswith("sample/") for href in hrefs)


def test_a_damaged_metrics_file_does_not_stop_a_resumed_run(tmp_path: Path) -> None:
    lines = [
        "5",
        "[]",
        "null",
        '{"run": "a", "step": "x"}',
        '{"run": "a", "kind": "step", "step": 1}',
        '{"ru',
    ]
    (tmp_path / FILE_NAME).write_text("\n".join(lines), encoding="utf-8")
    assert Metrics(tmp_path, "a", start_step=1).records("step") == [{"run": "a", "kind": "step", "step": 1}]


def test_the_command_writes_the_reports_of_all_runs_or_one(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = damaged(output, tmp_path / "out")
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"run": "other & <b>", "kind": "step", "step": 1, "loss": 2.0, "sigma": [0.5]}\n')
    assert run_names(tmp_path / "out") == ["lora", "other & <b>"]
    monkeypatch.setattr(page_module, "loss_picture", lambda *_: None)
    main([str(tmp_path / "out")])
    reports = [ResultNames(tmp_path / "out", name).report for name in ("lora", "other & <b>")]
    assert capsys.readouterr().out.split("\n")[:-1] == [str(path) for path in reports]
    assert "<h1>other &amp; &lt;b&gt;</h1>" in reports[1].read_text(encoding="utf-8")
    for words in ((str(tmp_path / "none"),), (str(tmp_path),), (str(tmp_path / "out"), "--name", "lor")):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
    assert "--name lor: not in" in capsys.readouterr().err


def test_curves_of_long_runs_are_averaged_and_of_odd_numbers_drawn() -> None:
    assert averaged([(1, 1.0), (2, float("nan")), (3, 3.0)]) == [(1.0, 1.0), (3.0, 3.0)]
    points = averaged([(step, float(step % 2)) for step in range(1, 10_001)])
    assert len(points) == 100
    assert {value for _, value in points} == {0.5}
    assert loss_picture([], []) is None
    assert rate_picture([]) is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/clips/a.mp4 is gone", "a.mp4 is gone"),
        (r"C:\Users\me\a.mp4, D:/x/b.toml", "a.mp4, b.toml"),
        ("owner/model and 3/4, https://a.b/c", "owner/model and 3/4, https://a.b/c"),
    ],
)
def test_absolute_paths_are_shortened(text: str, shown: str) -> None:
    assert without_places(text) == shown
