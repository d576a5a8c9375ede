"""bench.gpu: what it runs, what it leaves when something dies or is cut short, and what a later call keeps."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import bench
from bench import ROOT, gpu, gpu_tests, markdown, processes, record, report, smoke, table
from bench.processes import Command, Ended
from bench.record import Record
from bench.report import Line
from bench.row import OURS, Row

JUNIT = """<testsuites><testsuite tests="{tests}" failures="{failures}" errors="0" skipped="{skipped}">
<testcase classname="tests.a" name="good"/><testcase classname="tests.a" name="bad">{body}</testcase>
</testsuite></testsuites>"""


# ------------------------------------------------------------------------------------------------------- the gpu tests


def test_the_outcome_of_the_gpu_tests():
    outcome = gpu_tests.outcome
    failing = JUNIT.format(tests=2, failures=1, skipped=0, body="<failure>x</failure>")
    assert outcome(failing, 1)["outcome"] == "failed" and outcome(failing, 1)["broken"] == ["tests.a::bad"]
    assert outcome(JUNIT.format(tests=2, failures=0, skipped=0, body=""), 0)["outcome"] == "passed"
    assert outcome(JUNIT.format(tests=2, failures=0, skipped=2, body="<skipped/>"), 0)["outcome"] == "skipped"
    assert outcome(JUNIT.format(tests=0, failures=0, skipped=0, body=""), 5)["outcome"] == "skipped"
    assert outcome(JUNIT.format(tests=2, failures=0, skipped=0, body=""), 3)["outcome"] == "failed"


def test_without_a_whole_report_the_output_tells(tmp_path):
    junit, output = tmp_path / "report.xml", tmp_path / "output.txt"
    output.write_text("no module named pytest")
    assert gpu_tests.found(Ended(1, 2.0, False), junit, output)["output"] == "no module named pytest"
    junit.write_text("<testsuites><testsuite")
    assert gpu_tests.found(Ended(-9, 2.0, True), junit, output)["outcome"] == "stopped after 2 s"


def test_the_files_of_gpu_tests_are_those_that_name_the_marker(tmp_path):
    assert len(gpu_tests.files()) >= 6
    for name, text in (("here", "@pytest.mark" + ".gpu\ndef test(): pass"), ("not_here", "def test(): pass")):
        (tmp_path / f"test_{name}.py").write_text(text)
    assert gpu_tests.files(tmp_path) == [str(tmp_path / "test_here.py")]


SLEEPY = """
import time
def test_bad(): assert "here" == "there"
def test_long():
    for _ in range(600): time.sleep(0.1)
"""


def test_tests_that_take_too_long_are_stopped_and_their_tracebacks_kept(tmp_path, monkeypatch):
    (tmp_path / "test_sleepy.py").write_text(SLEEPY)
    monkeypatch.setattr(gpu_tests, "files", lambda: [str(tmp_path), "-m", ""])
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    found = gpu_tests.run_tests(6.0, tmp_path / "gpu.xml", tmp_path / "gpu.txt")
    assert found["exit"] == 2 and found["outcome"].startswith("stopped") and found["tests"] >= 1, found
    assert [name.endswith("test_sleepy::test_bad") for name in found["broken"]] == [True]
    assert "'here' == 'there'" in (tmp_path / "gpu.txt").read_text()


@pytest.mark.parametrize(("cores", "processes"), [(64, 14), (4, 2), (1, 1), (None, 1)])
def test_as_many_processes_of_tests_as_there_are_cores_for(cores, processes, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: name)
    argv = gpu_tests.command(Path("a"), Path("b")).argv
    assert argv[argv.index("-n") + 1] == str(processes) and "worksteal" in argv and "--tb=short" in argv


# ----------------------------------------------------------------------------------------------------------- processes


def python(output: Path, code: str) -> Command:
    return Command([sys.executable, "-S", "-c", code], output)


def test_what_does_not_stop_is_killed_and_others_beside_it_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_GRACE", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    commands = [python(tmp_path / "deaf", deaf), python(tmp_path / "quick", "import os; print('done', end=''); 1 / 0")]
    killed, failed = processes.run_together(commands, 2.0)
    assert (killed.code, killed.stopped) == (-9, True) and (tmp_path / "deaf").read_text() == "up\n"
    assert (failed.code, failed.stopped) == (1, False) and "ZeroDivisionError" in (tmp_path / "quick").read_text()


def test_what_a_process_has_started_ends_with_it(tmp_path):
    code = "import os, subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); os._exit(7)"
    assert processes.run(python(tmp_path / "a", code), 20.0).code == 7
    status = Path(f"/proc/{int((tmp_path / 'a').read_text())}/stat")
    limit = time.monotonic() + 20.0
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < limit
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------ a bare checkout


@pytest.fixture
def bare(tmp_path):
    """A copy of what git tracks of the library and its benchmarks, and the environment of a Python with nothing else:
    no tyro, and no fastanila but the copy."""
    for folder in ("fastanila", "kernels", "bench"):
        ignored = shutil.ignore_patterns("__pycache__", "kernels" if folder == "fastanila" else "results")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.modules['tyro'] = None\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', repr(f)).lower()]\n"
    )
    return tmp_path, dict(os.environ, PYTHONPATH=str(hook))


@pytest.mark.slow
def test_bench_gpu_runs_from_a_bare_checkout(bare):
    root, environment = bare
    out = root / "out"
    arguments = ["--device", "cpu", "--rows", "host", "--seconds", "0", "--budget", "150", "--no-tests"]
    files = ["--out", str(out), "--earlier", str(out), "--results", str(out / "RESULTS.md")]
    command = [sys.executable, "-m", "bench.gpu", *arguments, *files]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    link = root / "fastanila" / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"
    written = sorted(path.name for path in out.iterdir())
    assert "RESULTS.md" in written and len(written) == 3  # and the report and the table's output
    (found,) = (json.loads(path.read_text()) for path in out.glob("cpu-*.json"))
    assert {line["note"] for line in found["lines"] if line["device"] == "cpu"} == {""}
    assert found["smoke"] == {"outcome": "skipped"} and found["tests"] == {"outcome": "not run"}
    text = (out / "RESULTS.md").read_text()
    assert "| host time of one eager call, 64 elements | torch.add |" in text and "bench.smoke: skipped" in text
    assert text.splitlines()[0] == (ROOT / "bench" / "RESULTS.md").read_text().splitlines()[0]


def test_the_link_is_made_where_there_is_none_and_git_does_not_see_it(tmp_path, monkeypatch):
    (tmp_path / "fastanila").mkdir()
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.link_kernels(tmp_path) and bench.link_kernels(tmp_path)  # the second as if another were first
    assert os.readlink(tmp_path / "fastanila" / "kernels") == "../kernels"
    monkeypatch.undo()
    assert not bench.link_kernels(tmp_path / "nowhere")  # fastanila.kernels is found here
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/fastanila/kernels" in ignored and "/bench/results/gpu-*" in ignored


# ------------------------------------------------------------------------------------------------------- what it writes


def test_it_writes_at_most_eight_files_of_plain_names():
    names = [*gpu.FILES.values(), "RESULTS.md", record.name_of("cuda", {"device": "NVIDIA H100 80GB HBM3 (a/b)"})]
    assert len(set(names)) == len(names) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)


def test_a_results_file_without_a_place_for_the_table_is_refused_at_the_start(tmp_path):
    results = tmp_path / "RESULTS.md"
    results.write_text("# Nothing\n")
    with pytest.raises(ValueError, match="markers"):
        gpu.begun(results, "cuda")
    gpu.begun(tmp_path / "new" / "RESULTS.md", "cuda")
    assert (tmp_path / "new" / "RESULTS.md").read_text() == markdown.RESULTS.read_text()


@pytest.fixture
def kept(tmp_path):
    results = tmp_path / "RESULTS.md"
    results.write_text("<!-- bench.table cuda -->\n<!-- end of bench.table cuda -->\n")
    found = Record(tmp_path / "cuda-x.json", results, "cuda", {"device": "X", "torch": "2"})
    return found


def line(work: str, note: str = "", group: str = "chains") -> Line:
    timed = {} if note else dict(median=1.0, low=1.0, high=1.0, rounds=3, ratio=1.0)
    return Line(group, work, "fastanila", "cuda", (1,), "float32", note=note, **timed)


# The protocol of a process of the table, without torch: it takes the works in turn, marks each ahead of it, and dies in
# the second, or in whatever it is told to.
CHILD = """
import json, os, sys, time
path, dies, after, not_reached, running = sys.argv[1:6]
works = sys.argv[sys.argv.index("--works") + 1:] if "--works" in sys.argv else ["a", "b", "c", "d"]
def mark(works, note, **timed):
    report = json.load(open(path))
    for line in report["lines"]:
        if line["work"] in works:
            line.update(note=note, **timed)
    json.dump(report, open(path, "w"))
if dies == "start": os._exit(5)
mark(works, not_reached)
for work in works:
    mark([work], running)
    if work in dies.split(","):
        if after == "hangs": time.sleep(60)
        os._exit(int(after))
    mark([work], "", median=1.0, low=1.0, high=1.0, rounds=3)
"""


def child(kept: Record, dies: str, after: str) -> list[str]:
    return [sys.executable, "-S", "-c", CHILD, str(kept.json), dies, after, table.NOT_REACHED, table.RUNNING]


def table_by_a_process_that(dies: str, after: str, kept: Record, tmp_path, seconds: float = 30.0):
    kept.keep([line(work, "skipped: earlier") for work in "abcd"])
    good = gpu.run_table(seconds, child(kept, dies, after), ["chains"], kept, tmp_path / "output")
    return good, {line.work: line.note for line in kept.lines()}


@pytest.mark.parametrize("code", [3, 139])
def test_a_process_that_dies_loses_only_the_row_it_was_at(code, kept, tmp_path, capsys):
    good, notes = table_by_a_process_that("b,c", str(code), kept, tmp_path)
    assert not good and notes == {"a": "", "b": table.RUNNING, "c": table.RUNNING, "d": ""}
    assert capsys.readouterr().out.count(f"ended with {code}") == 2
    good, notes = table_by_a_process_that("none", str(code), kept, tmp_path)
    assert good and set(notes.values()) == {""}


def test_one_that_dies_ahead_of_any_row_is_not_started_for_ever(kept, tmp_path, capsys):
    kept.keep([line("a", table.NOT_REACHED), line("b", table.NOT_REACHED, "noise")])
    assert not gpu.run_table(30.0, child(kept, "start", "5"), ["chains"], kept, tmp_path / "output")
    assert capsys.readouterr().out.count("ended with 5") == 2
    assert kept.lines()[1].note == "failed: the process ahead of it ended with 5"


def test_one_that_hangs_is_stopped_and_its_row_has_failed(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_OVER", 1.0)
    good, notes = table_by_a_process_that("b", "hangs", kept, tmp_path, seconds=1.0)
    assert not good and notes["a"] == "" and notes["b"].startswith("failed: stopped")
    assert notes["c"] == notes["d"] == table.NOT_REACHED


@pytest.fixture
def phases(tmp_path, monkeypatch):
    """main with phases that do nothing: the seconds that each was given, and its arguments."""
    given = {}

    def phase(name, result):
        def run(seconds, *others):
            given[name] = seconds
            return result

        return run

    monkeypatch.setattr(gpu, "run_smoke", phase("smoke", {"outcome": "passed"}))
    monkeypatch.setattr(gpu_tests, "run_tests", phase("tests", {"outcome": "failed", "tests": 3, "failures": 1}))
    monkeypatch.setattr(gpu, "run_table", phase("table", True))
    monkeypatch.setattr(report, "machine", lambda device: {"device": "X"})
    out = ["--out", str(tmp_path / "out"), "--earlier", str(tmp_path / "before"), "--results", str(tmp_path / "R.md")]
    return given, lambda *arguments: gpu.main(["--device", "cuda", *out, *arguments]), tmp_path


def test_the_two_calls_are_told_alike_and_leave_time_to_start_a_machine():
    told = re.findall(r"python -m bench\.gpu --no-.*--budget \d+ --out \$OUT --results \$OUT/RESULTS\.md", gpu.__doc__)
    text = markdown.RESULTS.read_text()
    assert len(told) == 2 and all(command in text for command in told)
    calls = [gpu.parser().parse_args(command.split()[3:]) for command in told]
    assert sum(call.budget for call in calls) <= 720 and all(call.budget <= 540 for call in calls)
    assert [[phase for phase in gpu.SHARES if not getattr(call, f"no_{phase}")] for call in calls] == [
        ["smoke", "tests"], ["table"],
    ]  # fmt: skip


def test_the_phases_share_the_seconds_and_the_exit_code_tells_of_failures(phases):
    given, main, tmp_path = phases
    assert main("--budget", "430") == 1  # 400 less the reserve; phases that take no time leave it to the next
    assert given["smoke"] == pytest.approx(160, abs=1) and given["table"] == pytest.approx(400, abs=1)
    found = json.loads((tmp_path / "out" / "cuda-x.json").read_text())
    assert found["tests"]["outcome"] == "failed" and found["smoke"]["outcome"] == "passed"
    assert "Tests marked gpu: failed: 3 tests, 1 failures." in (tmp_path / "R.md").read_text()
    given.clear()
    assert main("--budget", "430", "--no-tests") == 0 and [*given] == ["smoke", "table"]
    given.clear()
    assert main("--budget", "430", "--no-smoke", "--no-tests") == 0 and [*given] == ["table"]
    assert json.loads((tmp_path / "out" / "cuda-x.json").read_text())["tests"]["outcome"] == "failed"  # of the first


def test_a_later_call_goes_on_from_the_earlier_ones_report(phases):
    _, main, tmp_path = phases
    assert main("--no-table") == 1
    (tmp_path / "out").rename(tmp_path / "before")
    assert main("--no-smoke", "--no-tests") == 0
    assert json.loads((tmp_path / "out" / "cuda-x.json").read_text())["tests"]["failures"] == 1


# --------------------------------------------------------------------------------------------------------------- smoke


def test_smoke_runs_its_parts_side_by_side(tmp_path, monkeypatch, capsys):
    def run_together(commands, seconds):
        assert [c.argv[3] for c in commands] == [*smoke.PARTS] and seconds == 100
        for command in commands:
            with command.output.open("a") as file:
                file.write(f"a finding of {command.argv[3]}\n")
        return [Ended({"capture": 1, "chains": 139}.get(c.argv[3], 0), 1.0, c.argv[3] == "train") for c in commands]

    monkeypatch.setattr(gpu, "run_together", run_together)
    found = gpu.run_smoke(100.0, [*smoke.PARTS], tmp_path / "findings", tmp_path / "errors")
    assert found["failed"] == ["capture", "chains", "train"] and found["outcome"] == "failed"
    outcomes = {part: each["outcome"] for part, each in found["parts"].items()}
    assert outcomes == dict.fromkeys(smoke.PARTS, "passed") | {
        "capture": "failed", "chains": "ended with 139", "train": "stopped after 1 s",
    }  # fmt: skip
    assert capsys.readouterr().out.count("a finding of") == len(smoke.PARTS)


def row_of(work: str, group: str, ours) -> Row:
    def rival():
        raise AssertionError("a rival was built")

    return Row(group, work, (1,), "float32", lambda device, closing: {OURS: lambda: ours, "eager": rival})


def test_a_work_that_breaks_or_falls_back_is_a_finding_and_the_next_goes_on(monkeypatch, capsys):
    def breaks():
        raise RuntimeError("no such kernel")

    def warns():
        warnings.warn("the chain runs uncaptured: why", stacklevel=1)

    found = [row_of("fine", "noise", list), row_of("breaks", "noise", breaks), row_of("other", "host", breaks)]
    monkeypatch.setattr(smoke.rows, "rows", lambda kind: [*found, row_of("warns", "noise", warns)])
    assert smoke.main(["noise", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    told = {line["check"]: line for line in map(json.loads, captured.out.splitlines())}
    assert {work: one.get("ok") for work, one in told.items()} == {
        "fine": True, "breaks": False, "warns": False, "noise": None,
    }  # fmt: skip
    assert told["breaks"]["error"] == "failed: RuntimeError: no such kernel" and "uncaptured" in told["warns"]["error"]
    assert "no such kernel" in captured.err
    del found[1:]
    monkeypatch.setattr(smoke.rows, "rows", lambda kind: found)
    assert smoke.main(["noise", "--device", "cpu"]) == 0


def test_a_check_that_breaks_is_a_finding(monkeypatch, capsys):
    def breaks(device):
        yield dict(check="first", ok=True, value=0.25)
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(smoke.PARTS, "capture", breaks)
    assert smoke.main(["capture", "--device", "cpu"]) == 1
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == dict(check="first", ok=True, value=0.25)
    assert (last["check"], last["ok"], last["error"]) == ("capture", False, "RuntimeError: no such kernel")


def test_the_sizes_of_a_launch_are_put_back(monkeypatch):
    pytest.importorskip("triton")
    from bench.studies import launch_sizes
    from fastanila.kernels import mlp, step

    chosen, sizes = mlp.mlp_constants, (2, 64, 2, 0, 1024, 232448)
    with launch_sizes.mlp_size((4, 8)):
        constants, warps = mlp.mlp_constants(*sizes)
        assert (constants["ROWS"], warps) == (4, 8)
    assert mlp.mlp_constants is chosen and chosen(*sizes)[0]["ROWS"] != 4
    with launch_sizes.mlp_size(None):
        assert mlp.mlp_constants(*sizes) == chosen(*sizes)

    seen = []
    monkeypatch.setattr(launch_sizes.workloads, "anisotropic_step", lambda: seen.append(step.CONFIGURATION))
    monkeypatch.setattr(launch_sizes.workloads, "step_arguments", lambda *arguments: {})
    monkeypatch.setattr(launch_sizes.workloads, "device_copy", lambda *arguments: None)
    monkeypatch.setattr(launch_sizes, "times", lambda work, ways, device: [ways[name]() for name in [*ways][1:]])
    before = step.CONFIGURATION
    assert len(list(launch_sizes.of_step(torch.device("cpu")))) == 4 * len(launch_sizes.STEP_SIZES)
    assert seen == 4 * [*launch_sizes.STEP_SIZES] and before == step.CONFIGURATION
