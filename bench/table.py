"""Every ratio in one table: `python -m bench.table [--rows step chains ...] [--json FILE] [--write [FILE]]`.

Each row is one work. Its ways are timed in turn in one run (bench.timing), so the ratios hold whatever else the machine
does; "times ours" is a way's median over fastanila's. A goal is a least ratio, or a largest time, that the project
has set itself. A way that fails, or falls back to a slower path than the row is named for, is reported as failed, and
the others go on. An error that takes the CUDA context with it ends the process after its row, with LOST: what is left
is for another process (`bench.gpu` starts one).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch._inductor.config

from . import markdown, report, rows
from .record import Record
from .report import Goal, Line
from .rivals import NotInstalled
from .row import COPY, GROUPS, OURS, Builders, Row
from .timing import Timing, fallbacks_are_errors, measure
from .workloads import Way

LOST = 3  #: exit code
NOT_REACHED = "skipped: the run has not come to it"
RUNNING = "failed: its process ended"  #: how a row is marked while it runs, so that it stays if that is so
_OUT_OF_TIME = "skipped: out of time"


def run(
    chosen: Sequence[Row], device: torch.device, *, seconds: float = 10.0, rounds: int = 15, until: float = math.inf,
    begin: Callable[[Row], None] = lambda row: None,
) -> Iterator[tuple[Row, list[Line]]]:  # fmt: skip
    """The rows with their lines, one after the other; a row that would end after ``until`` of ``time.monotonic()``, by
    what it is taken to need, is skipped, and so is what is left of one that takes longer. Ends early if the device is
    `lost`. ``begin`` is called ahead of each row that is not skipped."""
    for row in chosen:
        if time.monotonic() + row.seconds > until:
            yield row, unmeasured(row, device, _OUT_OF_TIME)
            continue
        began = time.monotonic()
        begin(row)
        yield row, lines_of(row, device, seconds=seconds, rounds=rounds, until=until)
        is_lost = lost(device)
        told = ", and the device is lost to this process" if is_lost else ""
        print(f"{row.work}: {time.monotonic() - began:.1f} s{told}", file=sys.stderr, flush=True)
        if is_lost:
            return
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def lines_of(row: Row, device: torch.device, *, seconds: float, rounds: int, until: float = math.inf) -> list[Line]:
    with contextlib.ExitStack() as closing, fallbacks_are_errors():
        ways, notes = built(row.build(device, closing), device, until)
        try:
            timings = measure(
                ways, device, seconds=seconds, rounds=min(rounds, row.rounds), until=until, host=row.host,
                queued=row.queued, once=row.once,
            )  # fmt: skip
        except Exception as error:
            traceback.print_exc()
            timings, notes = {}, notes | dict.fromkeys(ways, _failure(error))
    timed = [line_of(row, way, device, timings) for way in timings]
    return timed + [line_of(row, way, device, timings, note) for way, note in notes.items()]


def built(
    builders: Builders, device: torch.device, until: float = math.inf
) -> tuple[dict[str, Way], dict[str, str]]:  # fmt: skip
    """(the ways that ran once, by name; why the others did not)."""
    ways, notes = {}, {}
    for name, build in builders.items():
        if time.monotonic() > until:
            notes[name] = _OUT_OF_TIME
            continue
        try:
            way = build()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # an error of its kernels is to be its own
            ways[name] = way
        except NotInstalled as error:
            notes[name] = str(error)
        except Exception as error:  # one way that breaks must not take the table with it; it shows, and main returns 1
            traceback.print_exc()
            notes[name] = _failure(error)
            if lost(device):
                return {}, dict.fromkeys(builders, f"skipped: the device was lost to {name}") | notes
    return ways, notes


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def lost(device: torch.device) -> bool:
    """Whether an error has left this process without its CUDA context."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError:
        return True
    return False


def line_of(row: Row, way: str, device: torch.device, timings: dict[str, Timing], note: str = "") -> Line:
    """A way's line; without its time where the timings do not hold it, and then ``note`` says why."""
    timing = timings.get(way)
    goals = tuple(
        Goal(ours, rivals[way], over(way, ours, timings)) for ours, rivals in row.at_least.items() if way in rivals
    )
    times = {}
    if timing is not None:
        times = timing._asdict() | dict(ratio=over(way, OURS, timings), of_copy=over(COPY, way, timings))
        if row.bytes_moved is not None:
            times["gigabytes_s"] = row.bytes_moved / timing.median / 1e9
    return Line(
        row.group, row.work, way, device.type, row.shape, row.dtype, goals=goals, at_most=row.at_most.get(way),
        note=note, **times,
    )  # fmt: skip


def over(way: str, base: str, timings: dict[str, Timing]) -> float | None:
    return timings[way].median / timings[base].median if way in timings and base in timings else None


def unmeasured(row: Row, device: torch.device, why: str) -> list[Line]:
    """The row's goals as lines without a time."""
    ways = dict.fromkeys([OURS, *[way for rivals in row.at_least.values() for way in rivals], *row.at_most])
    return [line_of(row, way, device, {}, why) for way in ways]


# ----------------------------------------------------------------------------------------------------- command line


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--rows", nargs="+", choices=GROUPS, default=GROUPS, help="groups of rows; default all")
    made.add_argument("--seconds", type=float, default=5.0, help="at most about so long for the rounds of one row")
    return made


def table(arguments: argparse.Namespace, device: torch.device, record: Record) -> list[Line]:
    """The chosen rows on the device; on a CPU, the rows that need a GPU follow, marked "not measured".

    The record gets all lines ahead of each row and after it, those of rows still to come marked skipped. It keeps what
    it holds of other works, if there are such works.
    """
    until = time.monotonic() + arguments.budget
    there = {kind: rows.rows(kind) for kind in ("cpu", "cuda")}
    works = {(kind, row.work) for kind, found in there.items() for row in found}
    kept = [line for line in record.lines() if (line.device, line.work) in works]

    def chosen(kind: str) -> list[Row]:
        of_groups = [row for row in there[kind] if row.group in arguments.rows]
        return [row for row in of_groups if arguments.works is None or row.work in arguments.works]

    mine = chosen(device.type)
    found = {(device.type, row.work): unmeasured(row, device, NOT_REACHED) for row in mine}  # in the table's order
    if device.type == "cpu":
        gpu = torch.device("cuda")
        found |= {("cuda", row.work): unmeasured(row, gpu, "not measured: needs a GPU") for row in chosen("cuda")}
    others = [line for line in kept if (line.device, line.work) not in found]

    def keep(row: Row | None = None, lines: Sequence[Line] = ()) -> list[Line]:
        if row is not None:
            found[device.type, row.work] = list(lines)
        of_chosen = [line for of_row in found.values() for line in of_row]
        record.keep([*others, *of_chosen])
        return of_chosen

    lines = keep()
    turns = rows.in_order_of_interest(mine) if device.type == "cuda" else mine
    for row, of_row in run(
        turns, device, seconds=arguments.seconds, until=until,
        begin=lambda row: keep(row, unmeasured(row, device, RUNNING)),
    ):  # fmt: skip
        lines = keep(row, of_row)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--works", nargs="+", help="rows by their names; default all of the groups")
    made.add_argument("--budget", type=float, default=math.inf, help="seconds: rows that would end later are skipped")
    made.add_argument("--json", type=Path, help="report to keep the lines in, beside its other works if it has some")
    made.add_argument(
        "--write", type=Path, nargs="?", const=markdown.RESULTS, help="put the table into that file or bench/RESULTS.md"
    )
    arguments = made.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"device is cuda, but torch {torch.__version__} sees no CUDA device here")
    if device.type == "cpu":
        torch._inductor.config.compile_threads = 1  # a pool would start up beside the first rows, on their cores
    record = Record(arguments.json, arguments.write, device.type, report.machine(device))
    lines = table(arguments, device, record)
    print(report.text(lines, record.on))
    return LOST if lost(device) else int(any(line.note.startswith("failed") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
