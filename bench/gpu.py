"""Everything that needs a GPU, against a clock: `python -m bench.gpu [--budget 540]`.

Runs the tests marked gpu, then the whole table, and skips the rows that are left when the budget is spent. Writes one
JSON to bench/results/ and the table into bench/RESULTS.md; exits with 1 if a test or one of the ways failed. Without a
GPU it makes the CPU's rows, and the tests are reported as skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from . import table

ROOT = Path(__file__).resolve().parent.parent
_RESERVE = 20.0  # seconds for a row that was begun when the budget ran out
_FOR_TESTS = 0.5  # of the budget at most


def run_tests(seconds: float) -> dict:
    """The tests marked gpu in a process of their own: how many ended how, and which failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", "tests"]
        began = time.monotonic()
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"outcome": f"stopped after {seconds:.0f} s", "seconds": round(seconds, 1)}
        found = {"exit": done.returncode, "seconds": round(time.monotonic() - began, 1)}
        if not report.exists():
            return found | {"outcome": "no report", "output": (done.stdout + done.stderr)[-2000:]}
        return found | outcome(report.read_text(encoding="utf-8"), done.returncode)


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


def main(argv: list[str] | None = None) -> int:
    made = table.parser(__doc__.splitlines()[0])
    made.add_argument("--budget", type=float, default=540.0, help="seconds for all of it")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON")
    made.add_argument("--results", type=Path, default=table.RESULTS, help="file whose table is replaced")
    made.set_defaults(seconds=4.0)
    arguments = made.parse_args(argv)
    began = time.monotonic()
    device = torch.device(arguments.device)
    tests = run_tests(_FOR_TESTS * arguments.budget)
    print(f"tests marked gpu: {json.dumps(tests)}", flush=True)
    lines = table.table(arguments, until=began + arguments.budget - _RESERVE)
    on = table.machine(device)
    skipped = sorted({line.work for line in lines if line.note.startswith("skipped")})
    seconds = round(time.monotonic() - began, 1)

    arguments.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"{device.type} {on['device']}".lower()).strip("-")
    report = table.as_json(lines, on) | {"tests": tests, "skipped": skipped, "seconds": seconds}
    path = arguments.out / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = table.markdown(lines, on) + f"\n\nTests marked gpu: {tests['outcome']}."
    table.write(text, device.type, arguments.results)
    print(text)
    print(f"{seconds:.0f} s; {path}" + (f"; skipped, out of time: {', '.join(skipped)}" if skipped else ""))
    return int(table.failed(lines) or tests["outcome"] not in ("passed", "skipped"))


if __name__ == "__main__":
    sys.exit(main())
