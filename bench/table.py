"""Every ratio in one table: `python -m bench.table [--rows step chains ...] [--json FILE] [--write]`.

Each row is one work. Its ways are timed in turn in one run (bench.timing), so the ratios hold whatever else the machine
does; "times ours" is a way's median over fastanila's. A goal is a least ratio, or a largest time, that the project
has set itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from . import rows
from .rivals import NotInstalled
from .rows import GROUPS, OURS, Builders, Row
from .timing import measure
from .workloads import Way

#: how the notes of works begin that this run did not time at all
ABSENT = ("not measured", "skipped")
RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclasses.dataclass(frozen=True)
class Line:
    """One way of one row. Times in seconds a call; None where it was not measured, and then ``note`` says why."""

    group: str
    work: str
    way: str
    device: str
    shape: tuple[int, ...]
    dtype: str
    median: float | None = None
    low: float | None = None  #: lower quartile
    high: float | None = None  #: upper quartile
    rounds: int = 0
    ratio: float | None = None  #: over ours
    at_least: float | None = None  #: the goal for the ratio
    at_most: float | None = None  #: the goal for the median, seconds
    met: bool | None = None
    gigabytes_s: float | None = None
    note: str = ""


def run(
    chosen: Sequence[Row], device: torch.device, *, seconds: float = 10.0, rounds: int = 15,
    until: float = float("inf"), say: Callable[[str], None] = lambda text: None,
) -> Iterator[Line]:  # fmt: skip
    """The lines of the rows, row after row; those that ``time.monotonic()`` finds after ``until`` are skipped."""
    for row in chosen:
        if time.monotonic() > until:
            yield from unmeasured(row, device, "skipped: out of time")
            continue
        began = time.monotonic()
        yield from lines_of(row, device, seconds=seconds, rounds=rounds)
        say(f"{row.work}: {time.monotonic() - began:.1f} s")
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def lines_of(row: Row, device: torch.device, *, seconds: float, rounds: int) -> list[Line]:
    with contextlib.ExitStack() as closing:
        ways, notes = built(row.build(device, closing))
        rounds = min(rounds, 3) if row.once else rounds
        timings = measure(ways, device, seconds=seconds, rounds=rounds, host=row.host, once=row.once)
    lines = []
    for way in [*timings, *notes]:
        line = blank(row, way, device, notes.get(way, ""))
        if way in timings:
            t = timings[way]
            line = dataclasses.replace(line, median=t.median, low=t.low, high=t.high, rounds=t.rounds)
            if OURS in timings:
                line = dataclasses.replace(line, ratio=t.median / timings[OURS].median)
            if row.bytes_moved is not None:
                line = dataclasses.replace(line, gigabytes_s=row.bytes_moved / t.median / 1e9)
        lines.append(dataclasses.replace(line, met=is_met(line)))
    return lines


def built(builders: Builders) -> tuple[dict[str, Way], dict[str, str]]:
    """(the ways that ran once, by name; why the others did not)."""
    ways, notes = {}, {}
    for name, build in builders.items():
        try:
            way = build()
            way()
            ways[name] = way
        except NotInstalled as error:
            notes[name] = str(error)
        except Exception as error:  # one way that breaks must not take the table with it; it shows, and main returns 1
            traceback.print_exc()
            notes[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return ways, notes


def blank(row: Row, way: str, device: torch.device, note: str) -> Line:
    return Line(
        row.group, row.work, way, device.type, row.shape, row.dtype, note=note,
        at_least=row.at_least.get(way), at_most=row.at_most.get(way),
    )  # fmt: skip


def unmeasured(row: Row, device: torch.device, why: str) -> list[Line]:
    """The row's goals as lines without a time."""
    return [blank(row, way, device, why) for way in {OURS: None} | row.at_least | row.at_most]


def is_met(line: Line) -> bool | None:
    if line.at_least is not None and line.ratio is not None:
        return line.ratio >= line.at_least
    if line.at_most is not None and line.median is not None:
        return line.median <= line.at_most
    return None


# ---------------------------------------------------------------------------------------------------------- output


def machine(device: torch.device) -> dict[str, str | int | None]:
    """What the numbers were measured on."""
    try:
        import triton

        version = triton.__version__
    except ModuleNotFoundError:
        version = None
    found: dict[str, str | int | None] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "driver": driver() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
    }
    return found


def processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for text in file:
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def markdown(lines: Sequence[Line], on: dict) -> str:
    head = ", ".join(f"{k} {v}" if k != "device" else str(v) for k, v in on.items() if v is not None)
    measured = [line for line in lines if not line.note.startswith(ABSENT)]
    parts = [
        f"{head}. Medians over rounds in which all ways of a row take turns, with their quartiles. Chains are named "
        "by their number x dimension x transitions.",
        "",
        "| work | way | median | quartiles | rounds | times ours | goal | met | GB/s, note |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
        *[f"| {' | '.join(cells(line))} |" for line in measured],
    ]
    absent: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if line.note.startswith(ABSENT):
            goals = absent.setdefault((line.work, line.note), [])
            goals += [f"{line.way} {goal(line)}"] if goal(line) else []
    if absent:
        parts += ["", "| work | state | goals, in times ours |", "| --- | --- | --- |"]
        parts += [f"| {work} | {state} | {'; '.join(goals)} |" for (work, state), goals in absent.items()]
    return "\n".join(parts)


def cells(line: Line) -> list[str]:
    timed = line.median is not None
    return [
        line.work,
        line.way,
        duration(line.median) if timed else "-",
        f"{duration(line.low)} to {duration(line.high)}" if timed else "-",
        str(line.rounds) if timed else "-",
        f"{line.ratio:.2f}" if line.ratio is not None else "-",
        goal(line),
        {True: "yes", False: "NO", None: ""}[line.met],
        line.note or (f"{line.gigabytes_s:,.3g}" if line.gigabytes_s is not None else ""),
    ]


def goal(line: Line) -> str:
    if line.at_most is not None:
        return f"<= {line.at_most:g} s"
    return f">= {line.at_least:.3g}" if line.at_least is not None else ""


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def write(text: str, name: str, path: Path = RESULTS) -> None:
    """Replace what stands between the markers of the block ``name``. Raises ValueError if the file has none."""
    begin, end = f"<!-- bench.table {name} -->\n", f"<!-- end of bench.table {name} -->"
    whole = path.read_text(encoding="utf-8")
    if begin not in whole or end not in whole:
        raise ValueError(f"{path} must hold the markers {begin.strip()} and {end}")
    head, rest = whole.split(begin, 1)
    _, tail = rest.split(end, 1)
    path.write_text(f"{head}{begin}\n{text}\n\n{end}{tail}", encoding="utf-8")


def as_json(lines: Sequence[Line], on: dict) -> dict:
    return {"machine": on, "lines": [dataclasses.asdict(line) for line in lines]}


# ----------------------------------------------------------------------------------------------------- command line


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--rows", nargs="+", choices=GROUPS, default=GROUPS, help="groups of rows; default all")
    made.add_argument("--quick", action="store_true", help="small works, two rounds: to test the table itself")
    made.add_argument("--seconds", type=float, default=5.0, help="at most about so long for the rounds of one row")
    return made


def table(arguments, until: float = float("inf")) -> list[Line]:
    """The chosen rows on the device; on a CPU, the rows that need a GPU follow, marked "not measured"."""
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"device is cuda, but torch {torch.__version__} sees no CUDA device here")

    def chosen(kind: str) -> list[Row]:
        return [row for row in rows.rows(kind, arguments.quick) if row.group in arguments.rows]

    mine = chosen(device.type)
    rounds = 2 if arguments.quick else 15
    seconds = 1.0 if arguments.quick else arguments.seconds
    lines = list(run(mine, device, seconds=seconds, rounds=rounds, until=until, say=progress))
    if device.type == "cpu":
        absent = [row for row in chosen("cuda") if row.group not in ("host", "startup")]
        lines += [line for row in absent for line in unmeasured(row, torch.device("cuda"), "not measured: needs a GPU")]
    return lines


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def failed(lines: Sequence[Line]) -> bool:
    return any(line.note.startswith("failed") for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--json", type=Path, help="write the lines to this file as well")
    made.add_argument("--write", action="store_true", help="put the table into bench/RESULTS.md")
    arguments = made.parse_args(argv)
    lines, on = table(arguments), machine(torch.device(arguments.device))
    print(markdown(lines, on))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(as_json(lines, on), indent=1) + "\n", encoding="utf-8")
    if arguments.write:
        write(markdown(lines, on), arguments.device)
    return int(failed(lines))


if __name__ == "__main__":
    sys.exit(main())
