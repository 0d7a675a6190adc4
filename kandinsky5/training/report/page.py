"""The report as one HTML page, without scripts; pictures and videos are in the page itself."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import quote

from kandinsky5.training.report.charts import averaged, loss_picture, rate_picture
from kandinsky5.training.report.records import PromptSamples, Record, RunRecords, as_number
from kandinsky5.training.results.output_files import FILE_KINDS, files_of_run
from modules.byte_sizes import size_text
from modules.files import last_part
from modules.messages import counted

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; }
body { color: #222; }
h1 { font-size: 1.6em; margin-bottom: .2em; } h2 { font-size: 1.15em; margin: 2em 0 .5em; }
table { border-collapse: collapse; } th, td { padding: .25em .8em; text-align: left; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; } tr + tr { border-top: 1px solid #ddd; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
img, video { max-width: 100%; display: block; } code { font-size: .92em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } .quiet { color: #666; } .prompt { margin: 1.2em 0 .3em; }
.problems { background: #fdf3e7; border-left: 4px solid #b3541e; padding: .5em 1em; }
"""
_PATH = re.compile(r"(?<![\w.:/\\])(?:[A-Za-z]:[\\/]|\\\\|~?/)[^\s\"'<>|]*[\\/][^\s\"'<>|]*")
"""An absolute path of either system within a text."""

Cell = str | int | float | None


def report_page(run: RunRecords, defaults: Mapping[str, Any], videos: Mapping[int, Path]) -> str:
    """The page of a run.

    Args:
        defaults: of the options of the training script.
        videos: prompt -> what shows its samples over the steps, an .mp4 or a .png.
    """
    name = html.escape(run.names.output_name)
    sections = [
        *_section("Samples", [_samples(samples, videos.get(samples.number)) for samples in run.samples]),
        *_section("Loss", [_picture(loss_picture(run.steps, run.validations), "losses by timestep")]),
        *_section(
            "Learning rate and time", [_picture(rate_picture(run.steps), "learning rate, seconds per step")]
        ),
        *_section("Effect of the LoRA", [_effects(run.effects)]),
        *_section("Memory", [_memory(run)]),
        *_section("Datasets", [_datasets(run.start)]),
        *_section("Settings that differ from the defaults", [_settings(run.options, defaults)]),
        *_section("What is in the output folder", [_files(run)]),
    ]
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}: report of a training</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>{name}</h1>
<p>{html.escape(_headline(run))}</p>
{_problems(run.problems)}
{body}
</body></html>
"""


def without_places(text: str) -> str:
    """A text in which absolute paths are shortened to their last part."""
    return _PATH.sub(lambda match: last_part(Path(match[0])) or "…", text)


def _section(title: str, parts: Iterable[str]) -> list[str]:
    body = "\n".join(part for part in parts if part)
    return [f"<h2>{html.escape(title)}</h2>\n{body}"] if body else []


def _headline(run: RunRecords) -> str:
    options, steps = run.options, run.steps
    task = options.get("task")
    parts = [f"LoRA for {task}"] if isinstance(task, str) else []
    if steps:
        total = options.get("max_train_steps")
        of = f" of {total}" if isinstance(total, int) and total > steps[-1].number else ""
        parts.append(f"{counted(steps[-1].number, 'step')}{of}")
    seconds = [step.seconds for step in steps if step.seconds is not None]
    if seconds:
        middle = sorted(seconds)[len(seconds) // 2]
        parts.append(f"{middle:.3g} s per step (median)")
    losses = averaged([(step.number, step.loss) for step in steps])
    if losses:
        parts.append(f"training loss {losses[0][1]:.4g} at the start and {losses[-1][1]:.4g} at the end")
    if run.validations:
        last = run.validations[-1]
        loss, base = as_number(last["loss"]), as_number(last["base_loss"])
        parts.append(f"validation loss {loss:.4g}, without the LoRA {base:.4g}")
    return "; ".join(parts)


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    lines = "".join(f"<li>{html.escape(without_places(line))}</li>" for line in problems)
    return f'<div class="problems"><b>This report is incomplete</b><ul>{lines}</ul></div>'


def _samples(samples: PromptSamples, video: Path | None) -> str:
    text = samples.text if samples.text is not None else f"prompt {samples.number}"
    links = " · ".join(
        f'<a href="{html.escape(quote(path.as_posix()), quote=True)}">step {step}</a>'
        for step, path in samples.files.items()
    )
    head = f'<p class="prompt"><b>{html.escape(text)}</b></p>'
    return f'{head}\n{"" if video is None else _moving(video)}\n<p class="quiet">files: {links}</p>'


def _moving(path: Path) -> str:
    source = base64.b64encode(path.read_bytes()).decode("ascii")
    if path.suffix == ".mp4":
        address = f"data:video/mp4;base64,{source}"
        return f'<video src="{address}" autoplay loop muted playsinline controls></video>'
    return f'<img src="data:image/png;base64,{source}" alt="samples over the steps">'


def _picture(png: bytes | None, words: str) -> str:
    if png is None:
        return ""
    source = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{source}" alt="{html.escape(words, quote=True)}">'


def _effects(effects: Sequence[Record]) -> str:
    timesteps = sorted({timestep for record in effects for timestep in _prediction(record)})
    rows: list[list[Cell]] = []
    for record in effects:
        change, prediction = as_number(record["change"]), _prediction(record)
        rows.append([
            record["file"],
            record["step"],
            _percent(change),
            *(_percent(prediction.get(timestep)) for timestep in timesteps),
            "DOES NOTHING" if change == 0 else "",
        ])
    if not rows:
        return ""
    head = ["file", "step", "change of the weights", *(f"prediction at {t}" for t in timesteps), ""]
    words = "Norm of the change as a share of the norm of the model's weights, and of its predicted velocity."
    return f"{_table(head, rows)}\n<p class='quiet'>{words}</p>"


def _prediction(record: Record) -> dict[int, float]:
    entries = record.get("prediction")
    found = {}
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, Mapping):
            timestep, change = entry.get("timestep"), as_number(entry.get("change"))
            if isinstance(timestep, int) and change is not None:
                found[timestep] = change
    return found


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g} %"


def _memory(run: RunRecords) -> str:
    plan = run.start.get("memory")
    peaks = [step.peak_bytes for step in run.steps if step.peak_bytes]
    if not isinstance(plan, Mapping):
        return ""
    device = str(plan.get("device"))
    if "planned_bytes" not in plan:
        words = f"The run computed on {device}, for which no memory is planned and which reports no peak."
        return f"<p>{html.escape(words)}</p>"
    planned = as_number(plan["planned_bytes"]) or 0.0
    rows: list[list[Cell]] = [[f"planned for {plan.get('batch')}", size_text(planned), ""]]
    if peaks:
        rows.append(["highest peak of a step", size_text(max(peaks)), _percent(max(peaks) / max(planned, 1))])
    parts = plan.get("parts")
    lines: list[list[Cell]] = [
        [f"of this: {part}", size_text(size), ""]
        for part, value in (parts.items() if isinstance(parts, Mapping) else ())
        if (size := as_number(value))
    ]
    rows[1:1] = lines
    return _table([f"memory of {device}", "", "of the plan"], rows)


def _datasets(start: Record) -> str:
    rows: list[list[Cell]] = []
    skipped = []
    for entry in start.get("datasets", ()):
        buckets = entry.get("buckets")
        sizes = (
            ", ".join(f"{size}: {n}" for size, n in buckets.items()) if isinstance(buckets, Mapping) else ""
        )
        names, count = entry.get("skipped"), entry.get("num_skipped")
        names = [str(item) for item in names] if isinstance(names, list) else []
        skipped += [f"dataset {entry.get('index')}: {item}" for item in names]
        if isinstance(count, int) and count > len(names):
            skipped.append(f"dataset {entry.get('index')}: and {count - len(names)} more")
        keys = ("index", "use", "content", "found", "used", "clips", "batches")
        rows.append([*(entry.get(key) for key in keys), count, sizes])
    if not rows:
        return ""
    head = ["dataset", "use", "content", "found", "used", "clips", "batches", "skipped", "clips per size"]
    shown = "".join(f"<li>{html.escape(without_places(line))}</li>" for line in skipped)
    return _table(head, rows) + (f"\n<p>Skipped:</p><ul>{shown}</ul>" if shown else "")


def _settings(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    rows: list[list[Cell]] = [
        [f"--{name}", _value(value), _value(defaults.get(name))]
        for name, value in sorted(options.items())
        if value != defaults.get(name) and name != "output_dir"
    ]
    return _table(["option", "value", "default"], rows) if rows else ""


def _value(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_value, value))
    if value is None:
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    is_place = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return last_part(Path(text)) if is_place else without_places(text)


def _files(run: RunRecords) -> str:
    folder, name = run.names.output_dir, run.names.output_name
    rows: list[list[Cell]] = []
    found = files_of_run(folder, name, also=[run.names.report])  # this page, before there is one
    for kind, group in groupby(found, key=lambda entry: entry[0]):
        paths = [path.relative_to(folder).as_posix() for _, path in group]
        shown = paths[0] if len(paths) == 1 else f"{paths[0]} ... {Path(paths[-1]).name}"
        rows.append([shown, len(paths), FILE_KINDS[kind].meaning])
    return _table(["name", "files", "what it is"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """An HTML table; a column of numbers is aligned to the right."""
    is_number = [
        all(isinstance(row[column], int) or row[column] in (None, "") for row in rows)
        and any(isinstance(row[column], int) for row in rows)
        for column in range(len(head))
    ]

    def line(tag: str, cells: Sequence[Cell]) -> str:
        parts = []
        for cell, right in zip(cells, is_number, strict=True):
            text = "" if cell is None else html.escape(str(cell))
            parts.append(f"<{tag}{' class=number' if right else ''}>{text}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    lines = "\n".join([line("th", head), *(line("td", row) for row in rows)])
    return f'<div class="scroll"><table>\n{lines}\n</table></div>'
