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
import dataclasses
import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch._inductor.config

from . import report, rows
from .record import Record
from .report import Goal, Line
from .rivals import NotInstalled
from .row import GROUPS, OURS, Builders, Row
from .timing import Timing, fallbacks_are_errors, measure
from .workloads import Way

COPY = "copy of the same bytes"
LOST = 3  #: exit code
NOT_REACHED = "skipped: the run has not come to it"
RUNNING = "failed: its process ended"  #: how a row is marked while it runs, so that it stays if that is so
_OUT_OF_TIME = "skipped: out of time"


def run(
    chosen: Sequence[Row], device: torch.device, *, seconds: float = 10.0, rounds: int = 15, until: float = math.inf,
    begin: Callable[[Row], None] = lambda row: None, say: Callable[[str], None] = lambda text: None,
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
        say(f"{row.work}: {time.monotonic() - began:.1f} s")
        if lost(device):
            say(f"{row.work}: the device is lost to this process")
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
    lines = [blank(row, way, device, note, timings) for way, note in notes.items()]
    return [timed(row, way, device, timings) for way in timings] + lines


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


def timed(row: Row, way: str, device: torch.device, timings: dict[str, Timing]) -> Line:
    t = timings[way]
    return dataclasses.replace(
        blank(row, way, device, "", timings), median=t.median, low=t.low, high=t.high, rounds=t.rounds,
        ratio=over(way, OURS, timings), of_copy=over(COPY, way, timings),
        gigabytes_s=row.bytes_moved / t.median / 1e9 if row.bytes_moved is not None else None,
    )  # fmt: skip


def blank(row: Row, way: str, device: torch.device, note: str, timings: dict[str, Timing]) -> Line:
    """A way's line without its time."""
    goals = tuple(
        Goal(ours, rivals[way], over(way, ours, timings)) for ours, rivals in row.at_least.items() if way in rivals
    )
    return Line(
        row.group,
        row.work,
        way,
        device.type,
        row.shape,
        row.dtype,
        note=note,
        goals=goals,
        at_most=row.at_most.get(way),
    )


def over(way: str, base: str, timings: dict[str, Timing]) -> float | None:
    return timings[way].median / timings[base].median if way in timings and base in timings else None


def unmeasured(row: Row, device: torch.device, why: str) -> list[Line]:
    """The row's goals as lines without a time."""
    ways = dict.fromkeys([OURS, *[way for rivals in row.at_least.values() for way in rivals], *row.at_most])
    return [blank(row, way, device, why, {}) for way in ways]


# ----------------------------------------------------------------------------------------------------- command line


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--rows", nargs="+", choices=GROUPS, default=GROUPS, help="groups of rows; default all")
    made.add_argument("--quick", action="store_true", help="small works, two rounds: to test the table itself")
    made.add_argument("--seconds", type=float, default=5.0, help="at most about so long for the rounds of one row")
    return made


def table(arguments, until: float = math.inf, keep: Callable[[list[Line]], None] = lambda lines: None) -> list[Line]:
    """The chosen rows on the device; on a CPU, the rows that need a GPU follow, marked "not measured".

    ``keep`` is called with all lines ahead of each row and after it, those of rows still to come marked skipped.
    """
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"device is cuda, but torch {torch.__version__} sees no CUDA device here")

    if device.type == "cpu":
        torch._inductor.config.compile_threads = 1  # a pool would start up beside the first rows, on their cores

    def chosen(kind: str) -> list[Row]:
        of_groups = [row for row in rows.rows(kind, arguments.quick) if row.group in arguments.rows]
        return [row for row in of_groups if arguments.works is None or row.work in arguments.works]

    mine = chosen(device.type)
    found = {row.work: unmeasured(row, device, NOT_REACHED) for row in mine}  # in the table's order
    elsewhere = [
        line
        for row in (chosen("cuda") if device.type == "cpu" else [])
        for line in unmeasured(row, torch.device("cuda"), "not measured: needs a GPU")
    ]

    def lines() -> list[Line]:
        return [line for of_row in found.values() for line in of_row] + elsewhere

    def begin(row: Row) -> None:
        found[row.work] = unmeasured(row, device, RUNNING)
        keep(lines())

    keep(lines())
    turns = rows.in_order_of_interest(mine) if device.type == "cuda" else mine
    rounds = 2 if arguments.quick else 15
    seconds = 1.0 if arguments.quick else arguments.seconds
    for row, of_row in run(turns, device, seconds=seconds, rounds=rounds, until=until, begin=begin, say=progress):
        found[row.work] = of_row
        keep(lines())
    return lines()


def known(kinds: Sequence[str], quick: bool) -> set[tuple[str, str]]:
    """(device, work) of every row that there is."""
    return {(kind, row.work) for kind in kinds for row in rows.rows(kind, quick)}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def failed(lines: Sequence[Line]) -> bool:
    return any(line.note.startswith("failed") for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--works", nargs="+", help="rows by their names; default all of the groups")
    made.add_argument("--budget", type=float, default=math.inf, help="seconds: rows that would end later are skipped")
    made.add_argument("--json", type=Path, help="report to keep the lines in, beside its other works if it has some")
    made.add_argument(
        "--write", type=Path, nargs="?", const=report.RESULTS, help="put the table into that file or bench/RESULTS.md"
    )
    arguments = made.parse_args(argv)
    until = time.monotonic() + arguments.budget
    device = torch.device(arguments.device)
    record = Record(arguments.json, arguments.write, device.type, report.machine(device))
    there = known(("cpu", "cuda"), arguments.quick)
    kept = [line for line in record.lines() if (line.device, line.work) in there]
    lines = table(arguments, until, keep=lambda lines: record.keep(kept, lines))
    print(report.markdown(lines, record.on))
    return LOST if lost(device) else int(failed(lines))


if __name__ == "__main__":
    sys.exit(main())
