"""What a run leaves: a line for every way of every row, as a table in Markdown, and the machine it was measured on."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import platform
import subprocess
from collections.abc import Sequence

import torch

from . import markdown
from .row import OURS

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

    @property
    def is_absent(self) -> bool:
        return self.note.startswith(ABSENT)


# ---------------------------------------------------------------------------------------------------------- the table


def text(lines: Sequence[Line], on: dict) -> str:
    """The lines as Markdown: works that were timed, then those that were not with their goals. ``on``: `machine`."""
    head = ", ".join(f"{k} {v}" if k != "device" else str(v) for k, v in on.items() if v is not None)
    about = (
        f"{head}. Medians over rounds in which all ways of a row take turns, with their quartiles. Chains are named "
        f"by their number x dimension x transitions. A goal is for the ratio to {OURS} unless it names another way."
    )
    timed = {(line.device, line.work) for line in lines if not line.is_absent}
    columns = ["work", "way", "median", "quartiles", "rounds", "times ours", "goal", "met", "note"]
    rows = [cells(line) for line in lines if (line.device, line.work) in timed]
    absent: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if (line.device, line.work) not in timed:
            goals = absent.setdefault((line.work, line.note), [])
            goals += [f"{line.way} {goal}" for goal in goal_texts(line)]
    tables = [markdown.table(columns, "llrrrrrll", rows)]
    if absent:
        rest = [[work, state, "; ".join(goals)] for (work, state), goals in absent.items()]
        tables.append(markdown.table(["work", "state", "goals, in times ours"], "lll", rest))
    return "\n\n".join([about, *tables])


def cells(line: Line) -> list[str]:
    times = ["-", "-", "-"]
    if line.median is not None:
        times = [duration(line.median), f"{duration(line.low)} to {duration(line.high)}", str(line.rounds)]
    ratio = "-" if line.ratio is None else f"{line.ratio:.2f}"
    goals = ["; ".join(goal_texts(line)), "; ".join(met_texts(line))]
    return [line.work, line.way, *times, ratio, *goals, line.note or speed(line)]


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
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    return f"{seconds / scale:.3g} {unit}"


# --------------------------------------------------------------------------------------------------------- the machine


def machine(device: torch.device) -> dict[str, str | int | None]:
    """What the numbers were measured on."""
    cuda, triton = device.type == "cuda", None
    if importlib.util.find_spec("triton") is not None:
        import triton
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "driver": driver() if cuda else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
    }


def processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
