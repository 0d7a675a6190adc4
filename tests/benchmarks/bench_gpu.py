"""What training, generation and caching take on a GPU, with random weights of the real sizes, in one short call.

    python bench_gpu.py --budget 480          # seconds; what does not fit is left out, the most telling rows are first
    python bench_gpu.py --estimate            # without a GPU: what each row should take on an H100
    python bench_gpu.py --rehearse            # every row at tiny size on the CPU: shows that they run

Every row is a process of its own, so that what it does to memory, or a crash, ends with it. A row that fails says
how; one that does not fit its card is out of memory. Beside each measurement stands what the memory planner and
counted operations had predicted. The table is written anew after every row, as Markdown and as JSON.
"""

import argparse
import json
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gpu_child
import torch
from gpu_cases import CASES, Case, tiny
from gpu_plans import Planned, Plans

from modules.child_process import CallFailed, ChildProcess
from modules.errors import ConfigError
from modules.files import atomic_writer

H100 = {"name": "NVIDIA H100 (datasheet)", "gib": 79.2, "flops": 989e12}
SHORTEST_LIMIT = 90.0
"""Seconds that a row may take at least, and `PATIENCE` times its estimate otherwise."""
PATIENCE = 3.0
HEADERS = ("", "what", "added", "planned s", "s", "first s", "to", "ratio", "goal", "planned GiB", "GiB", "reserved",
           "host GiB planned", "page-locked", "row took", "estimated", "result")  # fmt: skip


@dataclass
class Row:
    """What is known of one case, before and after it ran."""

    case: Case
    planned: Planned | None = None
    measured: dict = field(default_factory=dict)
    seconds: float = 0.0
    """The whole row."""
    estimate: float = 0.0
    failure: str = ""

    def ratio(self, rows):
        """(with what, how many times its seconds), where both were measured."""
        other = self.case.beside or self.case.to
        ours = self.measured.get("ours_seconds")
        theirs = self.measured.get("beside_seconds")
        if other in rows:
            theirs = rows[other].measured.get("ours_seconds")
        return (other, ours / theirs) if ours and theirs else (other, None)

    def result(self, rows):
        """In words: how it failed, or whether the goals are met."""
        if self.failure or not self.measured:
            return self.failure or "not run"
        ratio, peak = self.ratio(rows)[1], self.measured.get("peak_gib")
        misses = []
        if ratio is not None and self.case.at_most is not None and ratio > self.case.at_most:
            misses.append(f"ratio above {self.case.at_most:g}")
        if peak is not None and self.case.at_most_gib is not None and peak > self.case.at_most_gib:
            misses.append(f"above {self.case.at_most_gib:g} GiB")
        parts = "".join(f"; {name} {seconds:.3g} s" for name, seconds in self.measured["parts"].items())
        return (", ".join(misses) or "ok") + parts


class Table:
    """All rows so far, as text and as files."""

    def __init__(self, card, output, flops):
        self.card, self.output, self.flops, self.rows = card, output, flops, {}

    def add(self, row):
        self.rows[row.case.name] = row
        print(self.line(row), flush=True)
        if self.output is not None:
            with atomic_writer(self.output.with_suffix(".md")) as stream:
                stream.write(self.markdown().encode())
            with atomic_writer(self.output.with_suffix(".json")) as stream:
                stream.write(json.dumps(self.facts(), indent=1).encode())

    def head(self):
        day = datetime.now(UTC).date().isoformat()
        facts = ", ".join(
            f"{key} {value}" for key, value in self.card.items() if key not in {"name", "flops"} and value
        )
        speed = f"{self.flops / 1e12:.3g} TFLOP/s in one large bf16 product"
        rule = "|".join(" --- " for _ in HEADERS)
        return f"{day}, {self.card['name']}, {facts}; {speed}\n\n| {' | '.join(HEADERS)} |\n|{rule}|"

    def line(self, row):
        planned, measured, case = row.planned, row.measured, row.case
        other, ratio = row.ratio(self.rows)
        cells = [
            case.name, case.what, " ".join(planned.chosen) if planned else "",
            _number(planned and planned.run_seconds(self.flops)), _number(measured.get("ours_seconds")),
            _number(measured.get("first_seconds")), other, _number(ratio), _number(case.at_most),
            _number(planned and planned.gib), _number(measured.get("peak_gib")), _number(measured.get("reserved_gib")),
            _number(planned and planned.host_gib), _number(measured.get("page_locked_gib")),
            _number(row.seconds), _number(row.estimate), row.result(self.rows),
        ]  # fmt: skip
        return f"| {' | '.join(cell or '' for cell in cells)} |"

    def markdown(self):
        return "\n".join([self.head(), *map(self.line, self.rows.values()), ""])

    def facts(self):
        return {
            "card": self.card,
            "rows": [asdict(row) | {"result": row.result(self.rows)} for row in self.rows.values()],
        }


def _number(value):
    return "" if value is None else f"{value:.3g}"


class Children:
    """Processes that measure. The next is started before it is needed, so that its imports take no time.

    `keep` lets one of them serve for case after case, as long as it lives.
    """

    def __init__(self, function, *, keep):
        self.function, self.keep = function, keep
        self.next = ChildProcess(function)

    def call(self, *arguments, timeout):
        child = self.next
        if not self.keep:
            self.next = ChildProcess(self.function)
        try:
            return child.call(*arguments, timeout=timeout)
        finally:
            if not self.keep:
                child.close()
            elif not child.is_alive:
                self.next = ChildProcess(self.function)

    def close(self):
        self.next.close()


def estimate(row, flops):
    """Fill in the row's estimate."""
    row.estimate = row.planned.seconds(row.case, flops) if row.planned else SHORTEST_LIMIT


def run_row(case, plan, children, left, card, flops, device):
    """One row, whatever happens to it; `left` seconds remain for all."""
    row = Row(case)
    try:
        row.planned = plan.result()
    except ConfigError as error:
        row.failure = f"not planned: {str(error).splitlines()[0]}"
        return row
    estimate(row, flops)
    if card["gib"] is not None and row.planned.gib > card["gib"]:
        row.failure = f"not run: the plan is larger than the card's {card['gib']:.3g} GiB"
        return row
    if row.estimate > left:
        row.failure = f"left out: {row.estimate:.0f} s estimated, {left:.0f} s left"
        return row
    begin = time.monotonic()
    limit = min(left, max(SHORTEST_LIMIT, PATIENCE * row.estimate))
    try:
        row.measured = children.call(case, row.planned.chosen, device, timeout=limit)
    except CallFailed as error:
        row.failure = str(error)
        if error.details:
            print(error.details, file=sys.stderr)
    row.seconds = time.monotonic() - begin
    return row


def run_all(cases, *, budget, output, device, is_rehearsal):
    """Measure the cases in order within the budget; the rows."""
    end = time.monotonic() + budget
    first = ChildProcess(gpu_child.card)
    children = Children(gpu_child.measure, keep=is_rehearsal)
    with ThreadPoolExecutor(1) as planning:
        plans = Plans(torch.device(device))
        planned: list[Future] = [planning.submit(plans.plan, case) for case in cases]
        try:
            card = first.call(device, timeout=budget)
            table = Table(card, output, card["flops"])
            print(table.head(), flush=True)
            for case, plan in zip(cases, planned):
                left = end - time.monotonic()
                table.add(run_row(case, plan, children, left, card, card["flops"], device))
        except CallFailed as error:
            raise SystemExit(f"the device cannot be used: {error}") from error
        finally:
            planning.shutdown(wait=False, cancel_futures=True)
            first.close()
            children.close()
    return list(table.rows.values())


def print_estimate(cases, budget):
    """What the rows should take on an H100, and which of them fit into the budget."""
    plans = Plans(torch.device("cuda"))
    flops, left = H100["flops"], budget
    print(f"{H100['name']}, estimated; budget {budget:.0f} s\n")
    print(
        "|  | what | added | GiB | host GiB | PFLOP | s | whole row, s | fits |\n|---|---|---|---|---|---|---|---|---|"
    )
    for case in cases:
        row = Row(case, plans.plan(case))
        estimate(row, flops)
        fits = row.estimate <= left
        left -= row.estimate if fits else 0.0
        plan = row.planned
        cells = [
            case.name, case.what, " ".join(plan.chosen), f"{plan.gib:.1f}", f"{plan.host_gib:.1f}",
            f"{plan.work / 1e15:.3g}", f"{plan.run_seconds(flops):.3g}", f"{row.estimate:.0f}", "yes" if fits else "no",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{budget - left:.0f} of {budget:.0f} s are planned")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--budget", type=float, default=480.0, metavar="SECONDS", help="for the whole call (default: 480)"
    )
    p.add_argument("--only", nargs="*", metavar="NAME", help="rows, or letters of parts")
    p.add_argument(
        "--output", type=Path, default=Path("bench_gpu"), help="of the two files, without a suffix"
    )
    p.add_argument("--rehearse", action="store_true")
    p.add_argument("--estimate", action="store_true")
    args = p.parse_args(argv)
    wanted = args.only or [case.part for case in CASES]
    cases = [case for case in CASES if case.name in wanted or case.part in wanted]
    if args.estimate:
        return print_estimate(cases, args.budget)
    if not (args.rehearse or torch.cuda.is_available()):
        raise SystemExit("no CUDA device; --rehearse runs every row at tiny size on the CPU")
    if args.rehearse:
        cases = [tiny(case) for case in cases]
    return run_all(
        cases,
        budget=args.budget,
        output=args.output,
        device="cpu" if args.rehearse else "cuda",
        is_rehearsal=args.rehearse,
    )


if __name__ == "__main__":
    main()
