"""bench.gpu: what it runs, what it leaves when it is cut short, and what a later call keeps."""

import json
import os
import sys

import pytest

from bench import gpu, report, table, timing
from bench.row import OURS

JUNIT = """<testsuites><testsuite tests="{tests}" failures="{failures}" errors="0" skipped="{skipped}">
<testcase classname="tests.a" name="good"/><testcase classname="tests.a" name="bad">{body}</testcase>
</testsuite></testsuites>"""


def test_the_outcome_of_the_gpu_tests():
    failing = JUNIT.format(tests=2, failures=1, skipped=0, body="<failure>x</failure>")
    assert gpu.outcome(failing, 1)["outcome"] == "failed" and gpu.outcome(failing, 1)["broken"] == ["tests.a::bad"]
    assert gpu.outcome(JUNIT.format(tests=2, failures=0, skipped=0, body=""), 0)["outcome"] == "passed"
    assert gpu.outcome(JUNIT.format(tests=2, failures=0, skipped=2, body="<skipped/>"), 0)["outcome"] == "skipped"
    assert gpu.outcome(JUNIT.format(tests=0, failures=0, skipped=0, body=""), 5)["outcome"] == "skipped"
    assert gpu.outcome(JUNIT.format(tests=2, failures=0, skipped=0, body=""), 3)["outcome"] == "failed"


SLEEPY = """
import time
def test_good(): pass
def test_long():
    for _ in range(600): time.sleep(0.1)
"""


def test_tests_that_take_too_long_are_stopped_and_still_report(tmp_path):
    (tmp_path / "test_sleepy.py").write_text(SLEEPY)
    junit = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", str(tmp_path)]
    code, output, stopped = gpu.run_for(6.0, command, dict(os.environ))
    assert stopped and code == 2, output
    assert gpu.outcome(junit.read_text(), code)["tests"] >= 1


def test_what_does_not_stop_is_killed(monkeypatch):
    monkeypatch.setattr(gpu, "_GRACE", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    code, output, stopped = gpu.run_for(2.0, [sys.executable, "-c", deaf], dict(os.environ))
    assert (code, output, stopped) == (-9, "up\n", True)


@pytest.fixture
def gpu_run(tmp_path, monkeypatch):
    """Arguments of a run on the CPU of the host row, its results file, and what reads its report."""
    results = tmp_path / "RESULTS.md"
    results.write_text("<!-- bench.table cpu -->\n<!-- end of bench.table cpu -->\n")
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: {"outcome": "skipped", "tests": 3})
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--results", str(results), "--rows"]
    return arguments, results, lambda: json.loads(next(tmp_path.glob("cpu-*.json")).read_text())


def test_bench_gpu_writes_its_report_and_the_table(gpu_run, monkeypatch, capsys):
    arguments, results, read = gpu_run
    assert gpu.main([*arguments, "host"]) == 0
    assert read()["tests"] == {"outcome": "skipped", "tests": 3} and read()["skipped"] == [] and read()["lines"]
    assert "host time of one eager call" in results.read_text() and "Tests marked gpu: skipped" in results.read_text()

    monkeypatch.setattr(gpu, "run_tests", lambda seconds: {"outcome": "failed"})
    assert gpu.main([*arguments, "host", "--budget", "0"]) == 1
    assert read()["skipped"] and read()["tests"] == {"outcome": "failed"}
    assert "skipped, out of time: host time" in capsys.readouterr().out


def test_a_run_that_is_cut_short_leaves_what_it_measured(gpu_run, monkeypatch):
    arguments, results, read = gpu_run

    def cut(row, device, **options):
        if row.group == "startup":
            raise KeyboardInterrupt
        return [table.timed(row, OURS, device, {OURS: timing.Timing(1.0, 1.0, 1.0, 1)})]

    monkeypatch.setattr(table, "lines_of", cut)
    with pytest.raises(KeyboardInterrupt):
        gpu.main([*arguments, "host", "startup"])
    notes = {line["group"]: line["note"] for line in read()["lines"] if line["device"] == "cpu"}
    assert notes == {"host": "", "startup": "skipped: the run has not come to it"}
    assert "| 1 s |" in results.read_text() and "has not come to it" in results.read_text()


def test_a_later_call_keeps_the_tests_and_the_other_groups(gpu_run, monkeypatch):
    arguments, results, read = gpu_run
    assert gpu.main([*arguments, "host"]) == 0
    assert gpu.main([*arguments, "startup", "--no-tests"]) == 0
    assert read()["tests"] == {"outcome": "skipped", "tests": 3}
    assert {line["group"] for line in read()["lines"]} == {"host", "startup"}
    assert "import torch" in results.read_text() and "torch.add" in results.read_text()
    monkeypatch.setattr(report, "machine", lambda device: {"device": gpu_run[2]()["machine"]["device"], "torch": "0"})
    assert gpu.main([*arguments, "startup", "--no-tests"]) == 0
    assert read()["tests"] == {"outcome": "not run"}
    assert {line["group"] for line in read()["lines"]} == {"startup"}
