"""Everything that needs a GPU, against a clock: `python -m bench.gpu [--budget 540] [--out DIR]`.

Three phases, each for a share of the seconds, what one leaves going to the next:

* smoke, 40 %: the parts of `bench.smoke` side by side, each in a process of its own: they check that all works run by
  their paths, and fill the caches.
* tests, 35 %: the tests marked gpu (`bench.gpu_tests`), their tracebacks kept.
* table, 25 %: `bench.table`, what matters most first. Where its process dies, the row it was at is lost, and another
  goes on with the rest. Every row is kept when it is done, so a run that is cut short leaves what it measured.

For a GPU that is held for minutes, it goes in two calls, the second at once after the first, while its caches are warm:

    python -m bench.gpu --no-table --budget 420 --out $OUT --results $OUT/RESULTS.md
    python -m bench.gpu --no-smoke --no-tests --budget 290 --out $OUT --results $OUT/RESULTS.md

It runs from a bare checkout, needs no package beside torch, triton, numpy and pytest for most of it (pytest-xdist for
speed), and reaches for no network. All that it writes lies in --out, in at most eight files: those of FILES, one JSON
named after the machine with all results, and a copy of bench/RESULTS.md if --results is a file there that is not yet.
A later call, with fewer phases or for some groups of rows only, keeps what the JSON holds of the others, if it is of
the same machine and versions; where --out has no such JSON, it goes on from the one in --earlier.

Its exit code is 1 if a check, a test or one of the ways failed. Without a GPU it makes the CPU's rows, the tests are
reported as skipped, and so is smoke.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import gpu_tests, markdown, record, report, smoke, table
from .processes import Command, run, run_together
from .record import Record

#: What it may write into --out beside the report, which is named after the machine, and RESULTS.md.
FILES = {
    "findings": "gpu-smoke.jsonl",  # of smoke, a line of JSON each
    "smoke": "gpu-smoke.txt",  # its tracebacks
    "junit": "gpu-tests.xml",
    "tests": "gpu-tests.txt",  # pytest's output
    "table": "gpu-table.txt",  # what the table's processes printed
}
SHARES = {"smoke": 0.40, "tests": 0.35, "table": 0.25}
#: What each of the smoke's many processes may compile with.
_FEW_THREADS = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
_RESERVE = 30.0  #: seconds of the budget that no phase gets: for a process that has to be stopped, and then killed
_OVER = 15.0  #: seconds that a process of the table has beyond its own budget, for a way that it has begun
_TO_START = 5.0  #: seconds that it takes until its budget counts
_RESULTS = Path(__file__).parent / "results"
_PYTHON = (sys.executable, "-m")


class Clock:
    """The time until a deadline, shared out among what is still to come."""

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds

    def left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    def share(self, shares: dict[str, float], to_come: Sequence[str]) -> float:
        """Seconds for the first of those to come."""
        return self.left() * shares[to_come[0]] / sum(shares[each] for each in to_come)


# --------------------------------------------------------------------------------------------------------------- smoke


def run_smoke(seconds: float, parts: Sequence[str], findings: Path, errors: Path) -> dict:
    """The parts side by side."""
    for path in (findings, errors):
        path.unlink(missing_ok=True)
    commands = [Command([*_PYTHON, "bench.smoke", part], findings, errors, _FEW_THREADS) for part in parts]
    ended = dict(zip(parts, run_together(commands, seconds), strict=True))
    print(findings.read_text(encoding="utf-8", errors="replace"), end="", flush=True)
    told = {part: dict(outcome=str(each), seconds=round(each.seconds, 1)) for part, each in ended.items()}
    failed = [part for part, each in told.items() if each["outcome"] != "passed"]
    return {"outcome": "failed" if failed else "passed", "failed": failed, "parts": told}


# --------------------------------------------------------------------------------------------------------------- table


def run_table(seconds: float, argv: Sequence[str], groups: Sequence[str], kept: Record, output: Path) -> bool:
    """The groups' rows, for about so many seconds, by one process, or as many as it takes, where one dies; whether all
    their ways succeeded. ``argv``: the command of such a process, which writes the record.

    A row is marked ahead of being timed, and stays marked as failed if its process dies in it; the next process takes
    those that were not come to.
    """
    output.unlink(missing_ok=True)
    clock, works, good = Clock(seconds), [], True
    while True:
        left = clock.left()
        budget = ["--budget", f"{max(left - _TO_START, 0.0):.1f}"]
        ended = run(Command([*argv, *budget, *(["--works", *works] if works else [])], output), left + _OVER)
        good &= str(ended) == "passed"
        print(f"table: {ended}, {ended.seconds:.0f} s", flush=True)
        before, works = works, not_reached(kept, groups)
        if ended.stopped:
            renote(kept, table.RUNNING, "failed: stopped, for it went on when its time was over")
        elif works and (works == before or not clock.left()):
            renote(kept, table.NOT_REACHED, f"failed: the process ahead of it ended with {ended.code}")
        elif works:
            continue
        return good


def not_reached(kept: Record, groups: Sequence[str]) -> list[str]:
    """The groups' works that no process has come to."""
    mark = (kept.device_type, table.NOT_REACHED)
    found = [line for line in kept.lines() if (line.device, line.note) == mark and line.group in groups]
    return list(dict.fromkeys(line.work for line in found))


def renote(kept: Record, note: str, other: str) -> None:
    """Replace that note of lines by the other."""
    kept.keep([dataclasses.replace(line, note=other) if line.note == note else line for line in kept.lines()])


# ------------------------------------------------------------------------------------------------------------- the run


def begun(results: Path, device_type: str) -> None:
    """Make the file of the table if it is not there, from bench/RESULTS.md. Raises ValueError if it has no place for
    this table."""
    results.parent.mkdir(parents=True, exist_ok=True)
    if not results.exists():
        shutil.copy(markdown.RESULTS, results)
    markdown.markers(device_type, results)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    clock = Clock(max(arguments.budget - _RESERVE, 0.0))
    device = torch.device(arguments.device)
    on = report.machine(device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    begun(arguments.results, device.type)
    path = arguments.out / record.name_of(device.type, on)
    if not path.exists() and (arguments.earlier / path.name).exists():
        shutil.copy(arguments.earlier / path.name, path)
    kept = Record(path.resolve(), arguments.results.resolve(), device.type, on)
    files = {name: (arguments.out / file).resolve() for name, file in FILES.items()}

    phases = [phase for phase in SHARES if not getattr(arguments, f"no_{phase}")]
    good = True
    for i, phase in enumerate(phases):
        began, seconds = time.monotonic(), clock.share(SHARES, phases[i:])
        good &= run_phase(phase, seconds, arguments, kept, files)
        print(f"{phase}: {time.monotonic() - began:.0f} of {seconds:.0f} s", flush=True)
    late = sorted({line.work for line in kept.lines() if line.note.startswith("skipped")}) if "table" in phases else []
    print(f"{path}; skipped, out of time: {', '.join(late)}" if late else path)
    return int(not good)


def run_phase(
    phase: str, seconds: float, arguments: argparse.Namespace, kept: Record, files: dict[str, Path]
) -> bool:  # fmt: skip
    """Run it, keep what it finds, and print that; whether nothing failed."""
    if phase == "table":
        argv = [
            *_PYTHON, "bench.table", "--device", arguments.device, "--seconds", str(arguments.seconds), "--json",
            str(kept.json), "--write", str(kept.results), "--rows", *arguments.rows,
        ]  # fmt: skip
        good = run_table(seconds, argv, arguments.rows, kept, files["table"])
        print(record.text(kept.read()))
        return good
    if phase == "tests":
        found = gpu_tests.run_tests(seconds, files["junit"], files["tests"])
    elif kept.device_type == "cuda":
        found = run_smoke(seconds, arguments.parts, files["findings"], files["smoke"])
    else:
        found = {"outcome": "skipped"}
    kept.keep(**{phase: found})
    print(f"{phase}: {json.dumps(found)}", flush=True)
    return found["outcome"] in ("passed", "skipped")


def parser() -> argparse.ArgumentParser:
    made = table.parser(__doc__.splitlines()[0])
    made.add_argument("--budget", type=float, default=540.0, help="seconds for all of it")
    for phase in SHARES:
        made.add_argument(f"--no-{phase}", action="store_true", help=f"leave out: {phase}")
    made.add_argument(
        "--parts", nargs="+", choices=smoke.PARTS, default=list(smoke.PARTS), help="of smoke; default all"
    )
    made.add_argument("--out", type=Path, default=_RESULTS, help="folder of all that it writes")
    made.add_argument("--earlier", type=Path, default=_RESULTS, help="folder of an earlier call's JSON")
    made.add_argument("--results", type=Path, default=markdown.RESULTS, help="file whose table is replaced")
    made.set_defaults(seconds=2.0)
    return made


def _ended_by_a_signal(number: int, frame) -> None:
    sys.exit(128 + number)  # by way of what ends the processes


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _ended_by_a_signal)
    sys.exit(main())
