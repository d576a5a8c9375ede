"""The tests marked gpu, in processes of their own: how many ended how, which failed, and what they printed."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from . import ROOT
from .processes import Command, Ended, run

_MARKED = re.compile(r"mark\.gpu\b|\bimport .*\bMARKS\b")
_WORKERS = 14  #: at most
_MOST_FAILURES = 60  #: with more of them there is nothing to learn from the rest


def files(tests: Path = ROOT / "tests") -> list[str]:
    """Those that hold such tests: to collect the others takes longer than some of these run."""
    return sorted(str(path) for path in tests.rglob("test_*.py") if _MARKED.search(path.read_text(encoding="utf-8")))


def workers() -> int:
    """Processes of tests, where pytest-xdist is installed: two cores are left for what compiles beside them."""
    return max(1, min(_WORKERS, (os.cpu_count() or 1) - 2))


def command(junit: Path, output: Path) -> Command:
    options, environment = [], {}
    if importlib.util.find_spec("xdist") is not None:
        options = ["-n", str(workers()), "--dist", "worksteal"]
        environment = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # or each takes all cores
    argv = [
        sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short", "-rfE", f"--maxfail={_MOST_FAILURES}",
        "-p", "no:cacheprovider", f"--junitxml={junit}", *options, *files(),
    ]  # fmt: skip
    return Command(argv, output, environment=environment)


def run_tests(seconds: float, junit: Path, output: Path) -> dict:
    """Run them for at most so long; what they print, tracebacks with it, and the JUnit report stay in the files."""
    junit.unlink(missing_ok=True)
    output.unlink(missing_ok=True)
    return found(run(command(junit, output), seconds), junit, output)


def found(ended: Ended, junit: Path, output: Path) -> dict:
    told = {"exit": ended.code, "seconds": round(ended.seconds, 1)}
    try:
        told |= outcome(junit.read_text(encoding="utf-8"), ended.code)
    except (FileNotFoundError, ElementTree.ParseError):  # pytest was killed ahead of it, or in the middle
        told |= {"outcome": "no report", "output": output.read_text(encoding="utf-8", errors="replace")[-2000:]}
    return told | ({"outcome": str(ended)} if ended.stopped else {})


def outcome(junit: str, code: int) -> dict:
    """The counts of a JUnit report; ``code`` is pytest's exit code, of which 5 is "no test was found"."""
    report = ElementTree.fromstring(junit)
    kinds = ("tests", "failures", "errors", "skipped")
    counts = {kind: sum(int(suite.get(kind, 0)) for suite in report.iter("testsuite")) for kind in kinds}
    broken = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in report.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if broken or code not in (0, 5):
        verdict = "failed"
    else:
        verdict = "passed" if counts["tests"] > counts["skipped"] else "skipped"
    return {"outcome": verdict, **counts, "broken": broken}
