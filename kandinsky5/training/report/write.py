"""Writes the report of a run into its output folder."""

from __future__ import annotations

from pathlib import Path

import av

from kandinsky5.cli.train import default_options
from kandinsky5.configs.train import SavingConfig
from kandinsky5.training.report.page import report_page
from kandinsky5.training.report.records import RunRecords, read_run
from kandinsky5.training.results.output_files import SAMPLE_FOLDER
from kandinsky5.training.sample_files import SampledPrompt, SampleNames, write_pictures_of
from modules.files import write_text
from modules.logs import get_logger

log = get_logger(__name__)


def report_run(saving: SavingConfig) -> None:
    """Write the report at the end of a run, whose results it must not endanger."""
    try:
        path = write_report(saving.output_dir, saving.output_name)
    except OSError as error:
        log.warning("the report of the run is not written: %s", error)
    else:
        log.info("report of the run: %s", path)


def write_report(output_dir: Path, name: str) -> Path:
    """Write `<name>_report.html`; returns its path. What is missing or damaged is named in it.

    Raises:
        OSError: the folder cannot be read or written.
    """
    run = read_run(output_dir, name)
    videos = _sample_videos(run)
    path = run.names.report
    write_text(path, report_page(run, default_options(), videos))
    for problem in run.problems:
        log.warning("%s: %s", path.name, problem)
    return path


def _sample_videos(run: RunRecords) -> dict[int, Path]:
    """What shows the samples of each prompt over the steps, drawn again where a file of the run is gone."""
    folder = run.names.output_dir / SAMPLE_FOLDER
    names = SampleNames(folder, run.names.output_name, "")
    found = {}
    for samples in run.samples:
        number = samples.number
        video, grid = names.steps_video(number), names.grid(number)
        if not video.is_file() and not grid.is_file():
            files = {step: run.names.output_dir / path for step, path in samples.files.items()}
            try:
                write_pictures_of(names, SampledPrompt(number, samples.text or "", 0), files)
            except (OSError, av.FFmpegError) as error:
                run.problems.append(f"the samples of prompt {number} cannot be shown: {error}")
        for path in (video, grid):
            if path.is_file():
                found[number] = path
                break
    return found
