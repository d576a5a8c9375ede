"""What a run leaves: a line for every way of every row, printed as a table, as JSON, and kept in bench/RESULTS.md."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from .row import OURS

RESULTS = Path(__file__).parent / "RESULTS.md"
#: how the notes of works begin that this run did not time
ABSENT = ("not measured", "skipped")


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a way's time is to be over that of one of ours."""

    ours: str
    at_least: float
    ratio: float | None = None  #: None where either was not measured

    @property
    def met(self) -> bool | None:
        return None if self.ratio is None else self.ratio >= self.at_least


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
    ratio: float | None = None  #: over OURS
    goals: tuple[Goal, ...] = ()  #: for ratios
    at_most: float | None = None  #: the goal for the median, seconds
    gigabytes_s: float | None = None
    of_copy: float | None = None  #: a device copy's time over this one's: 1 is the memory's roof
    note: str = ""

    @property
    def met(self) -> tuple[bool | None, ...]:
        """Whether each goal is met: those for ratios, then the one for the median. None where it is not known."""
        limits = () if self.at_most is None else (None if self.median is None else self.median <= self.at_most,)
        return (*(goal.met for goal in self.goals), *limits)


def with_note(line: Line, note: str) -> Line:
    return dataclasses.replace(line, note=note)


# ---------------------------------------------------------------------------------------------------------- the table


def markdown(lines: Sequence[Line], on: dict) -> str:
    head = ", ".join(f"{k} {v}" if k != "device" else str(v) for k, v in on.items() if v is not None)
    timed = {(line.device, line.work) for line in lines if not line.note.startswith(ABSENT)}
    parts = [
        f"{head}. Medians over rounds in which all ways of a row take turns, with their quartiles. Chains are named "
        f"by their number x dimension x transitions. A goal is for the ratio to {OURS} unless it names another way.",
        "",
        "| work | way | median | quartiles | rounds | times ours | goal | met | note |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
        *[f"| {' | '.join(cells(line))} |" for line in lines if (line.device, line.work) in timed],
    ]
    absent: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if (line.device, line.work) not in timed:
            goals = absent.setdefault((line.work, line.note), [])
            goals += [f"{line.way} {text}" for text in goal_texts(line)]
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
        "; ".join(goal_texts(line)),
        "; ".join(met_texts(line)),
        line.note or speed(line),
    ]


def goal_texts(line: Line) -> list[str]:
    ratios = [f">= {goal.at_least:.3g}" + (f" to {goal.ours}" if goal.ours != OURS else "") for goal in line.goals]
    return ratios + ([f"<= {line.at_most:g} s"] if line.at_most is not None else [])


def met_texts(line: Line) -> list[str]:
    """Yes or NO by goal, with the ratio where that is not the one of its own column."""
    ratios = [f"{g.ratio:.2f}: " if g.ratio is not None and g.ours != OURS else "" for g in line.goals]
    words = [{True: "yes", False: "NO", None: "-"}[met] for met in line.met]
    return [ratio + word for ratio, word in zip([*ratios, *[""] * (len(words) - len(ratios))], words, strict=True)]


def speed(line: Line) -> str:
    if line.gigabytes_s is None:
        return ""
    return f"{line.gigabytes_s:,.4g} GB/s" + (f", {line.of_copy:.1%} of a copy" if line.of_copy is not None else "")


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def write(text: str, name: str, path: Path = RESULTS) -> None:
    """Replace what stands between the markers of the block ``name``. Raises ValueError if the file has none."""
    begin, end = check(name, path)
    head, rest = path.read_text(encoding="utf-8").split(begin, 1)
    _, tail = rest.split(end, 1)
    replace(path, f"{head}{begin}\n{text}\n\n{end}{tail}")


def check(name: str, path: Path) -> tuple[str, str]:
    """The markers of the block ``name``. Raises ValueError if the file does not hold them."""
    begin, end = f"<!-- bench.table {name} -->\n", f"<!-- end of bench.table {name} -->"
    whole = path.read_text(encoding="utf-8")
    if begin not in whole or end not in whole:
        raise ValueError(f"{path} must hold the markers {begin.strip()} and {end}")
    return begin, end


def replace(path: Path, text: str) -> None:
    """Write the file in one stroke: who reads it, or ends this process, finds the old text or the new."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


# ------------------------------------------------------------------------------------------------------------- as JSON


def as_json(lines: Sequence[Line], on: dict) -> dict:
    return {"machine": on, "lines": [dataclasses.asdict(line) | {"met": line.met} for line in lines]}


def lines_of_json(found: Sequence[dict]) -> list[Line]:
    def line(fields: dict) -> Line:
        goals = tuple(Goal(**goal) for goal in fields["goals"])
        own = {name: x for name, x in fields.items() if name != "met"}
        return Line(**own | {"shape": tuple(fields["shape"]), "goals": goals})

    return [line(fields) for fields in found]


def dumped(report: dict) -> str:
    return json.dumps(report, indent=1) + "\n"


# --------------------------------------------------------------------------------------------------------- the machine


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
