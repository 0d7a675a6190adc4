"""Settings against stop points: a run that was stopped and resumed is the run that was not, step by step.

`pytest -m slow` takes every stop point of every setting and prints the matrix.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dataset.cache.files import TextCacheMeta, write_text_cache
from dataset.cache.names import empty_text_cache_name
from kandinsky5.text.encoders import TextEncoders
from kandinsky5.training import control
from kandinsky5.training import samples as train_samples
from kandinsky5.training.loss import objective
from kandinsky5.training.results.state import read_state
from modules.tensor_files import write_tensors
from tests.kandinsky5.training.step_record import (
    Record,
    assert_same_results,
    assert_same_steps,
    recorded,
    state_hashes,
)
from tests.kandinsky5.training.test_train_loss import ALL, write_rich_dataset
from tests.kandinsky5.training.training_runs import Clip, train, write_dataset, write_dit
from tests.tiny import tiny_dit

Words = tuple[object, ...]

UNEQUAL: tuple[Clip, ...] = ((2, 4, 4, 5), (2, 4, 4, 7), (2, 4, 4, 6), (3, 2, 8, 5), (1, 4, 4, 9))
BIG_LAYERS = ("--network_args", "include_patterns=['.*blocks.0.self_attention.*']")
PLAIN_LORA: Words = ("--network_dim", 40, *BIG_LAYERS)


@dataclass(frozen=True)
class Case:
    """One setting of the matrix."""

    words: Words = ()
    resumed: Words = ()
    """What is given beside `words` when the run goes on."""
    data: str = "one"
    steps: int = 11
    """Two epochs and one step more for the five clips of the small dataset."""
    task: str = "k5-tiny-t2v"


MATRIX = {
    "plain": Case(),
    "all at once": Case(
        (
            *("--optimizer_type", "AdamW8bit", "--network_dim", 40, "--ema_decay", 0.8),
            *("--network_dropout", 0.3, *BIG_LAYERS, "rank_dropout=0.2", "module_dropout=0.2"),
            *("--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--gradient_accumulation_steps", 4),
            *("--num_timestep_buckets", 3, "--visual_cond_prob", 0.6, "--max_data_loader_n_workers", 1),
        ),
        ("--max_data_loader_n_workers", 0),
        data="two",
        steps=6,
        task="k5-tiny-i2v",
    ),
    "accumulation 3": Case(("--gradient_accumulation_steps", 3), steps=5),
    "two datasets, repeats, batches of 2": Case(data="two", steps=19),
    "two datasets, accumulation 4": Case(("--gradient_accumulation_steps", 4), data="two", steps=7),
    "2 workers": Case(("--max_data_loader_n_workers", 2), steps=6),
    "0 workers, then 2": Case(resumed=("--max_data_loader_n_workers", 2), steps=6),
    "2 workers, then 0": Case(
        ("--max_data_loader_n_workers", 2), ("--max_data_loader_n_workers", 0), steps=6
    ),
    "AdamW8bit": Case(("--optimizer_type", "AdamW8bit", *PLAIN_LORA), steps=6),
    "AdamW8bit, accumulation 3, cosine": Case(
        (
            *("--optimizer_type", "AdamW8bit", *PLAIN_LORA, "--gradient_accumulation_steps", 3),
            *("--lr_scheduler", "cosine", "--lr_warmup_steps", 2),
        ),
        steps=5,
    ),
    "AdaFactor with its own rate": Case(("--optimizer_type", "AdaFactor")),
    "RAdam": Case(("--optimizer_type", "RAdam")),
    "schedulefree.AdamWScheduleFree": Case(("--optimizer_type", "schedulefree.AdamWScheduleFree")),
    "prodigyopt.Prodigy": Case(("--optimizer_type", "prodigyopt.Prodigy", "--learning_rate", 1.0)),
    "warm-up and cosine": Case(("--lr_scheduler", "cosine", "--lr_warmup_steps", 3)),
    "warm-up of a share, linear": Case(("--lr_scheduler", "linear", "--lr_warmup_steps", "20%")),
    "a schedule of torch's": Case((
        "--lr_scheduler_type",
        "StepLR",
        "--lr_scheduler_args",
        "step_size=2",
        "gamma=0.5",
    )),
    "moving average": Case(("--ema_decay", 0.8)),
    "dropout of network, rank and module": Case((
        "--network_dropout",
        0.3,
        "--network_args",
        "rank_dropout=0.2",
        "module_dropout=0.2",
    )),
    "LoRA+ and a limit on norms": Case((
        "--network_args",
        "loraplus_lr_ratio=4",
        "--scale_weight_norms",
        0.02,
    )),
    "timestep buckets": Case(("--num_timestep_buckets", 3)),
    "image to video": Case(("--visual_cond_prob", 0.6), task="k5-tiny-i2v"),
    "image to video, condition channels": Case(
        ("--visual_cond_prob", 0.6, "--i2v_conditioning", "channels"), task="k5-tiny-i2v"
    ),
    "8-bit weights, swapped blocks, checkpointing": Case(
        ("--fp8_base", "--gradient_checkpointing", "--blocks_to_swap", 2, "--override_dit", "{}"), steps=6
    ),
    "several captions, masks, prior term, caption dropout": Case(ALL, data="rich", steps=9),
    "int8 weights": Case(("--int8_base", "--gradient_checkpointing"), steps=6),
    "validation every 2 steps": Case(
        ("--validation_dataset_config", "{two}", "--validate_every_n_steps", 2), steps=6
    ),
    "samples every 2 steps": Case(("--sample_every_n_steps", 2, "--network_dropout", 0.2), steps=6),
}
CHEAP = {"accumulation 3": (1, 3), "all at once": (2, 4)}
"""Settings and stop points of the ordinary run; the others tell which setting it is."""


@dataclass(frozen=True)
class Files:
    """What all runs read."""

    dit: Path
    whole_dit: Path
    data: dict[str, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("matrix")
    whole = folder / "whole.safetensors"
    write_tensors(whole, {key: value.detach() for key, value in tiny_dit().state_dict().items()})
    data = {
        "one": write_dataset(folder / "one"),
        "two": write_two_datasets(folder / "two"),
        "rich": write_rich_dataset(folder / "rich"),
    }
    return Files(write_dit(folder), whole, data)


def write_two_datasets(folder: Path) -> Path:
    """Two datasets in one file: repeats, four shapes with 1 to 6 clips an epoch, batches of 2 and 1."""
    parts = [
        write_dataset(folder / "a", UNEQUAL, batch_size=2),
        write_dataset(folder / "b", UNEQUAL[:4], batch_size=1),
    ]
    texts = [part.read_text(encoding="utf-8").replace("[5, 9]", "[1, 5, 9]") for part in parts]
    texts[0] += "num_repeats = 2\n"
    texts[1] = "[[datasets]]" + texts[1].partition("[[datasets]]")[2] + "caption_dropout_rate = 0.4\n"
    empty = TextCacheMeta(
        caption1="", template="video", qwen_max_length=256, clip_max_length=77, encoder_fingerprint="none"
    )
    generator = torch.Generator().manual_seed(6)
    embeds, pooled = torch.randn(3, 64, generator=generator), torch.randn(32, generator=generator)
    write_text_cache(folder / "b/cache" / empty_text_cache_name("video"), embeds, pooled, empty)
    path = folder / "dataset.toml"
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def sampling(
    tiny_models: Path, encoders: TextEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Words:
    """Options for samples; the encoders are loaded once for all runs."""
    monkeypatch.setattr(encoders, "free", lambda: None)
    monkeypatch.setattr(train_samples, "load_text_encoders", lambda *_, **__: encoders)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a --w 32 --h 32 --f 5 --s 2 --g 1", encoding="utf-8")
    return (
        *("--vae", tiny_models / "vae", "--text_encoder_qwen", tiny_models / "text_encoder"),
        *("--text_encoder_clip", tiny_models / "text_encoder2", "--sample_prompts", prompts),
    )


class Runs:
    """Runs of one case."""

    def __init__(self, case: Case, files: Files, folder: Path, extra: Words) -> None:
        self.case, self.files, self.folder = case, files, folder
        self.words = (*case.words, *extra, "--max_train_steps", case.steps, "--save_state_on_train_end")

    def run(self, name: str, *words: object, stop_after: int | None = None) -> list[Record]:
        """The records of one run; stopped by the control file's word after so many steps of it."""
        dit = self.files.whole_dit if "{}" in self.case.words else self.files.dit
        data = self.files.data[self.case.data]
        given = [str(word).replace("{two}", str(self.files.data["two"])) for word in (*self.words, *words)]
        plain, seen = control.take_control_word, iter(range(1, 99))
        with pytest.MonkeyPatch.context() as patch, recorded() as records:
            patch.setattr(
                control, "take_control_word", lambda n: "stop" if next(seen) == stop_after else plain(n)
            )
            train(dit, data, self.folder / name, *given, task=self.case.task)
        return records


def check(runs: Runs, stops: tuple[int, ...]) -> None:
    """Every stop point by the states of one run, then stops one after another."""
    case, folder = runs.case, runs.folder
    whole = runs.run("whole")
    assert len(whole) == case.steps
    assert_same_steps(runs.run("saving", "--save_state", "--save_every_n_steps", 1), whole)
    for step in stops:
        state = folder / f"saving/lora-step{step:08d}-state"
        assert_same_steps(runs.run(f"from-{step}", *case.resumed, "--resume", state), whole[step:])
        assert_same_results(folder / f"from-{step}", folder / "whole")
    pieces = runs.run("pieces", stop_after=1)
    # Stopped once, twice and three times.
    for length in (1, 2):
        pieces += runs.run("pieces", *case.resumed, "--resume", "auto", stop_after=length)
        newest = folder / f"pieces/lora-step{len(pieces):08d}-state"
        saved = folder / "saving" / newest.name
        assert state_hashes(read_state(newest)) == state_hashes(read_state(saved))
    pieces += runs.run("pieces", *case.resumed, "--resume", "auto")
    assert_same_steps(pieces, whole)
    assert_same_results(folder / "pieces", folder / "whole")
    # A finished run has nothing to do.
    assert runs.run("pieces", *case.resumed, "--resume", "auto") == []


def tensor_dtypes(value: object) -> set[torch.dtype]:
    """Of all tensors in nested dicts."""
    if isinstance(value, torch.Tensor):
        return {value.dtype}
    return set().union(*map(tensor_dtypes, value.values())) if isinstance(value, dict) else set()


def needed_package(name: str) -> None:
    package = name.partition(".")[0]
    if package in ("schedulefree", "prodigyopt"):
        pytest.importorskip(package)


@pytest.mark.parametrize("name", CHEAP)
def test_a_stopped_run_is_the_same_run(name: str, files: Files, tmp_path: Path) -> None:
    check(Runs(MATRIX[name], files, tmp_path, ()), CHEAP[name])
    if "AdamW8bit" in MATRIX[name].words:
        state = read_state(tmp_path / "whole/lora-state").optimizer["state"]
        assert len(state) > 0
        for moments in state.values():
            assert torch.uint8 in tensor_dtypes(moments), moments.keys()


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, str]]]:
    """Rows of the matrix, printed when all are there."""
    rows: list[tuple[str, str]] = []
    yield rows
    capture = request.config.pluginmanager.getplugin("capturemanager")
    width = max((len(name) for name, _ in rows), default=0)
    with capture.global_and_fixture_disabled():
        print("\n\nresumed equals uninterrupted, to the bit:")
        for name, result in rows:
            print(f"  {name:<{width}}  {result}")


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX)
def test_every_stop_point_of_every_setting(
    name: str, files: Files, tmp_path: Path, table: list[tuple[str, str]], request: pytest.FixtureRequest
) -> None:
    needed_package(name)
    extra: Words = request.getfixturevalue("sampling") if name.startswith("samples") else ()
    case = MATRIX[name]
    stops = tuple(range(1, case.steps))
    table.append((name, "FAILED"))
    check(Runs(case, files, tmp_path, extra), stops)
    table[-1] = (name, f"stops after steps 1..{stops[-1]} of {case.steps}, and stopped three times")
    if name.startswith("samples"):
        assert len(list((tmp_path / "whole/sample").glob("*.mp4"))) == 3


def test_samples_and_validation_move_no_number_of_the_training(
    files: Files, tmp_path: Path, sampling: Words
) -> None:
    case = Case(("--network_dropout", 0.2), steps=4)
    plain = Runs(case, files, tmp_path, ()).run("plain")
    looking = (*sampling, "--sample_every_n_steps", 2, *MATRIX["validation every 2 steps"].words)
    assert_same_steps(Runs(case, files, tmp_path, looking).run("looking"), plain)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_signal_between_accumulated_batches_finishes_the_step(
    micro_batch: int, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(MATRIX["accumulation 3"], files, tmp_path, ())
    whole = runs.run("whole")
    compute, seen = objective.Objective.training_losses, iter(range(1, 99))

    def interrupted(self: objective.Objective, *arguments: object) -> object:
        if next(seen) == micro_batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, *arguments)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch, recorded() as records:
        patch.setattr(objective.Objective, "training_losses", interrupted)
        with pytest.raises(SystemExit) as caught:
            train(files.dit, files.data["one"], tmp_path / "parts", *runs.words)
    assert caught.value.code == 128 + signal.SIGTERM
    assert_same_steps([*records, *runs.run("parts", "--resume", "auto")], whole)


def test_a_finished_run_goes_on_to_a_later_end(files: Files, tmp_path: Path) -> None:
    """The schedule is that of the longer run from the step on at which it goes on."""
    runs = Runs(Case(("--lr_scheduler", "linear", "--lr_warmup_steps", 2), steps=4), files, tmp_path, ())
    first = runs.run("parts")
    longer = Runs(Case(runs.case.words, steps=7), files, tmp_path, ())
    rest = longer.run("parts", "--resume", "auto")
    whole = longer.run("whole")
    assert [record["step"] for record in first + rest] == [1, 2, 3, 4, 5, 6, 7]
    for field in ("items", "noise", "timesteps", "learning rates"):
        assert [record[field] for record in rest] == [record[field] for record in whole[4:]], field


def test_a_difference_is_reported_where_it_begins(files: Files, tmp_path: Path) -> None:
    """The matrix can fail, and says what drifted first."""
    runs = Runs(Case(steps=3), files, tmp_path, ())
    whole = runs.run("whole")
    other = runs.run("other", "--learning_rate", 2e-3)
    with pytest.raises(AssertionError, match="step 1: learning rates"):
        assert_same_steps(other, whole)
    shifted = runs.run("shifted", "--discrete_flow_shift", 3.0)
    with pytest.raises(AssertionError, match="step 1: timesteps"):
        assert_same_steps(shifted, whole)
    with pytest.raises(AssertionError, match=r"steps \[1, 2, 3\], were"):
        assert_same_steps(whole, [])
