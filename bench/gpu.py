"""Everything that needs a GPU, against a clock: `python -m bench.gpu [--budget 540] [--no-tests] [--rows step ...]`.

Runs the tests marked gpu, then the table, of which it skips what it has no time left for. After every row it writes one
JSON to bench/results/ and the table into bench/RESULTS.md, so that a run that is cut short leaves what it measured.
Exits with 1 if a test or one of the ways failed. A call without the tests, or for some groups of rows only, keeps what
the JSON holds of the others, if it is of the same machine and versions. Without a GPU it makes the CPU's rows, and the
tests are reported as skipped.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import torch

from . import report, table
from .report import Line
from .row import GROUPS

ROOT = Path(__file__).resolve().parent.parent
_RESERVE = 20.0  # seconds for a way that was begun when the budget ran out
_FOR_TESTS = 0.5  # of the budget at most
_WORKERS = 8  # processes of tests, where pytest-xdist is installed
_GRACE = 15.0  # seconds for pytest to write its report when it is stopped
_NOT_RUN = {"outcome": "not run"}


def run_tests(seconds: float) -> dict:
    """The tests marked gpu in processes of their own: how many ended how, and which failed."""
    options, environment = [], dict(os.environ)
    if importlib.util.find_spec("xdist") is not None:
        options = ["-n", str(_WORKERS)]
        environment |= {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # or each takes all cores
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *options, f"--junitxml={junit}", "tests"]
        began = time.monotonic()
        code, output, stopped = run_for(seconds, command, environment)
        found = {"exit": code, "seconds": round(time.monotonic() - began, 1)}
        if junit.exists():
            found |= outcome(junit.read_text(encoding="utf-8"), code)
        else:
            found |= {"outcome": "no report", "output": output[-2000:]}
        return found | ({"outcome": f"stopped after {seconds:.0f} s"} if stopped else {})


def run_for(seconds: float, command: Sequence[str], environment: dict[str, str]) -> tuple[int, str, bool]:
    """(exit code, output, whether it was stopped): as by Ctrl-C when the time is over, and killed if it goes on."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output, False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own, so that its workers go with it
        output, _ = process.communicate()
    return process.returncode, output, True


def outcome(junit: str, code: int) -> dict:
    """The counts of a JUnit report; ``code`` is pytest's exit code, of which 5 is "no test was found"."""
    suites = list(ElementTree.fromstring(junit).iter("testsuite"))
    counts = {k: sum(int(suite.get(k, 0)) for suite in suites) for k in ("tests", "failures", "errors", "skipped")}
    broken = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if broken or code not in (0, 5):
        verdict = "failed"
    else:
        verdict = "passed" if counts["tests"] > counts["skipped"] else "skipped"
    return {"outcome": verdict, **counts, "broken": broken}


def earlier(path: Path, on: dict) -> dict:
    """The report that an earlier call left, if it is of the same machine and versions; else one of nothing."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if found.get("machine") == on else {"lines": [], "tests": _NOT_RUN}


def joined(kept: Sequence[Line], lines: Sequence[Line]) -> list[Line]:
    """The lines, and those kept of groups that they do not touch, in the table's order."""
    touched = {line.group for line in lines}
    both = [*[line for line in kept if line.group not in touched], *lines]
    return sorted(both, key=lambda line: GROUPS.index(line.group))


def summary(tests: dict) -> str:
    counts = [f"{tests[k]} {k}" for k in ("tests", "failures", "errors", "skipped") if tests.get(k)]
    return ": ".join(filter(None, (f"Tests marked gpu: {tests['outcome']}", ", ".join(counts)))) + "."


def main(argv: list[str] | None = None) -> int:
    made = table.parser(__doc__.splitlines()[0])
    made.add_argument("--budget", type=float, default=540.0, help="seconds for all of it")
    made.add_argument("--no-tests", action="store_true", help="the table alone")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON")
    made.add_argument("--results", type=Path, default=report.RESULTS, help="file whose table is replaced")
    made.set_defaults(seconds=4.0)
    arguments = made.parse_args(argv)
    began = time.monotonic()
    device = torch.device(arguments.device)
    on = report.machine(device)
    name = re.sub(r"[^a-z0-9]+", "-", f"{device.type} {on['device']}".lower()).strip("-")
    path = arguments.out / f"{name}.json"
    before = earlier(path, on)
    tests = before["tests"] if arguments.no_tests else run_tests(_FOR_TESTS * arguments.budget)
    print(f"tests marked gpu: {json.dumps(tests)}", flush=True)
    kept = report.lines_of_json(before["lines"])
    arguments.out.mkdir(parents=True, exist_ok=True)

    def keep(lines: list[Line]) -> None:
        everything = joined(kept, lines)
        found = report.as_json(everything, on) | {
            "tests": tests, "skipped": skipped(everything), "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        report.replace(path, report.dumped(found))
        report.write(f"{report.markdown(everything, on)}\n\n{summary(tests)}", device.type, arguments.results)

    lines = table.table(arguments, until=began + arguments.budget - _RESERVE, keep=keep)
    print(f"{report.markdown(lines, on)}\n\n{summary(tests)}")
    left = skipped(lines)
    late = f"; skipped, out of time: {', '.join(left)}" if left else ""
    print(f"{time.monotonic() - began:.0f} s; {path}{late}")
    return int(table.failed(lines) or tests["outcome"] not in ("passed", "skipped", "not run"))


def skipped(lines: Sequence[Line]) -> list[str]:
    """The works that were not timed, or not in every way, for want of time."""
    return sorted({line.work for line in lines if line.note.startswith("skipped")})


if __name__ == "__main__":
    sys.exit(main())
