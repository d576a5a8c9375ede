"""The table times what it says it times: its rows, its rivals' laws, its goals, and how it fails."""

import contextlib
import dataclasses
import itertools
import json
import sys
import time

import pytest
import torch

from bench import report, rows, table, timing
from bench.report import Goal, Line
from bench.row import CAPTURED, GROUPS, OURS, Row
from fastanila import ops

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(ops.INTERPRETED, reason="the interpreter's times are its own")


def test_the_quick_table_has_every_way_timed_and_fits_its_json(tmp_path, capsys):
    path = tmp_path / "table.json"
    arguments = ["--quick", "--device", "cpu", "--rows", "step", "noise", "chains", "host", "startup"]
    assert table.main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["device"]
    measured = [line for line in report["lines"] if line["device"] == "cpu"]
    for line in measured:
        if "not installed" not in line["note"]:
            assert 0 < line["low"] <= line["median"] <= line["high"] and line["rounds"] == 2, line
    for work, group in itertools.groupby(measured, key=lambda line: line["work"]):
        timed = {line["way"]: line for line in group if line["median"] is not None}
        if work != "start-up, a process each":
            assert timed["fastanila"]["ratio"] == 1.0 and len(timed) >= 2
            for line in timed.values():
                assert line["ratio"] == pytest.approx(line["median"] / timed["fastanila"]["median"])
    absent = [line for line in report["lines"] if line["device"] == "cuda"]
    assert absent and all(line["note"].startswith("not measured") and line["median"] is None for line in absent)
    printed = capsys.readouterr().out
    assert all(f"| {line['work']} | {line['way']} |" in printed for line in measured)
    assert "not measured: needs a GPU" in printed


@pytest.mark.slow
def test_the_quick_update_row(capsys):
    assert table.main(["--quick", "--device", "cpu", "--rows", "update"]) == 0
    assert "one update, rings" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_goal_belongs_to_a_way(kind):
    names = set()
    for row in rows.rows(kind):
        with contextlib.ExitStack() as closing:
            ways = set(row.build(torch.device(kind), closing))
        assert {OURS, CAPTURED} >= set(row.at_least) and set(row.at_least) <= ways, row.work
        assert {*row.at_most, *itertools.chain(*row.at_least.values())} <= ways, row.work
        assert OURS in ways or row.group == "startup"
        assert (row.group, row.work) not in names
        names.add((row.group, row.work))
    assert {group for group, _ in names} == set(GROUPS)


def test_a_gpu_takes_first_what_matters_most():
    found = rows.rows("cuda")
    turns = [row.work for row in rows.in_order_of_interest(found)]
    assert sorted(turns) == sorted(row.work for row in found)
    assert tuple(turns[: len(rows.FIRST)]) == rows.FIRST
    assert [row.group for row in rows.in_order_of_interest(found)][-3:] == ["host", "noise", "startup"]


def test_the_goals_are_the_issues():
    cuda = {row.work: row.at_least for row in rows.rows("cuda")}
    assert cuda["step, 2^26, float32"][OURS] == {"copy of the same bytes": 0.92, "torch.compile": 1.4, "eager": 6.0}
    assert cuda["step, 2^26, bfloat16"][OURS]["torch.compile"] == 2.5
    assert cuda["mlp-128, 1,024 x 2 x 100, float32"][OURS]["torchebm"] == 100
    assert cuda["mlp-128, 1,024 x 2 x 100, float32"][CAPTURED]["torchebm"] == 20
    assert cuda["mlp-64, 16,384 x 2 x 100, float32"][CAPTURED]["torch.compile"] == 3
    assert cuda["mlp-64, 1,024 x 2 x 100, float32"][OURS]["torch.compile, reduce-overhead, rand4x"] == 10
    assert "torch.compile, captured by hand" not in cuda["mlp-64, 64 x 8 x 50, float32"][CAPTURED]
    assert cuda["mlp-64, 1,024 x 128 x 200, float32"].keys() == {OURS}  # captured by itself
    assert cuda["mlp-64, 1,024 x 128 x 200, float32"][OURS]["torchebm"] == 20
    assert cuda["mlp-64, 1,024 x 128 x 200, float32"][OURS]["torch.compile, reduce-overhead"] == 3
    assert cuda["mixture, 10,000 x 2 x 100, float32"][OURS]["torch.compile, captured by hand"] == 10
    assert cuda["convnet-32, 64 x 3x32x32 x 100, bf16"][OURS]["eager loop in float32"] == 5
    assert cuda["one update, rings, K=60"][OURS]["the authors' form"] == 40
    cpu = {row.work: row.at_least for row in rows.rows("cpu")}
    assert cpu["step, 2^24, float32"][OURS] == {"eager": 4.0, "torch.compile": 2.0}
    assert cpu["normals, 2^24"][OURS] == {"torch.randn": 3.0}


# ---------------------------------------------------------------------------------------------------------- timing


def test_ways_take_turns_and_quick_ones_are_repeated():
    calls = []
    clock = timing.measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, rounds=3, once=True)
    assert calls == ["a", "b"] * 3
    assert {name: t.rounds for name, t in clock.items()} == {"a": 3, "b": 3}
    calls.clear()
    timing.measure({"a": lambda: calls.append("a")}, CPU, rounds=2)
    assert len(calls) == 1 + 2 * 1000  # once to see how quick it is


def test_time_limits_the_rounds_but_not_below_the_least():
    assert timing.measure({"a": lambda: None}, CPU, rounds=50, least=4, seconds=0.0)["a"].rounds == 4


def test_no_round_begins_after_the_deadline_but_one_is_made():
    assert timing.measure({"a": lambda: None}, CPU, rounds=50, until=0.0)["a"].rounds == 1


class Simulated:
    """A GPU with a clock of its own: a call costs the host one time, and the device another once it is free."""

    def __init__(self, host: float, device: float):
        self.now = self.free = 0.0  # the host's clock, and when the device has nothing left to do
        self.host, self.device = host, device

    def call(self, host=None, device=None):
        self.now += self.host if host is None else host
        self.free = max(self.free, self.now) + (self.device if device is None else device)

    def synchronize(self, device=None):
        self.now = max(self.now, self.free)

    def sleep(self, cycles):
        self.call(device=cycles / 1e9)

    def event(self, enable_timing):
        class Event:
            def record(event):
                event.at = max(self.free, self.now)

            def elapsed_time(event, other):
                return 1e3 * (other.at - event.at)

        return Event()


@pytest.mark.parametrize(("host", "device"), [(50e-6, 20e-6), (5e-6, 300e-6), (8e-6, 2e-6)])
def test_a_queued_sample_does_not_wait_for_the_host(host, device, monkeypatch):
    simulated = Simulated(host, device)
    for name, value in (
        ("synchronize", simulated.synchronize),
        ("_sleep", simulated.sleep),
        ("Event", simulated.event),
    ):
        monkeypatch.setattr(timing.torch.cuda, name, value)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: simulated.now)
    timing._cycles_a_second.cache_clear()
    cuda, ways = torch.device("cuda"), {"a": simulated.call}
    assert timing.measure(ways, cuda, queued=True)["a"].median == pytest.approx(device, rel=1e-3)
    assert timing.measure(ways, cuda)["a"].median == pytest.approx(max(host, device), rel=0.2)
    timing._cycles_a_second.cache_clear()


def test_the_median_is_a_calls_time(monkeypatch):
    now = iter([0.0, *itertools.accumulate([0.0, 5.0, 0.0, 1.0, 0.0, 9.0, 0.0, 5.0, 0.0, 5.0])])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    found = timing.measure({"a": lambda: None}, CPU, rounds=5, least=5, once=True)["a"]
    assert found == timing.Timing(5.0, 5.0, 5.0, 5)


# --------------------------------------------------------------------------------------------- what does not succeed


def test_a_rival_that_is_not_installed_is_named_and_nothing_fails(monkeypatch, capsys):
    for module in ("torchebm", "torchebm.core", "ebm", "ebm.samplers.langevin"):
        monkeypatch.setitem(sys.modules, module, None)
    assert table.main(["--quick", "--device", "cpu", "--rows", "chains"]) == 0
    printed = capsys.readouterr().out
    assert "torchebm is not installed" in printed and "ebmkit is not installed" in printed


def row_of(**ways) -> Row:
    goals = {OURS: {"rival": 2.0}}
    return Row("host", "a work", (1,), "float32", lambda device, closing: ways, at_least=goals)


def test_a_way_that_breaks_shows_and_fails_the_run(capsys):
    def broken():
        raise RuntimeError("no such kernel")

    [(_, lines)] = table.run([row_of(fastanila=lambda: broken, rival=lambda: list)], CPU, rounds=1)
    assert [line.way for line in lines] == ["rival", "fastanila"]
    assert lines[1].note == "failed: RuntimeError: no such kernel" and lines[1].median is None
    assert lines[0].ratio is None and lines[0].met == (None,) and table.failed(lines)
    assert "no such kernel" in capsys.readouterr().err


def test_a_goal_is_met_or_not():
    assert [Goal(OURS, least, 2.0).met for least in (2.0, 2.1)] == [True, False] and Goal(OURS, 2.0).met is None
    line = Line("step", "w", "way", "cpu", (1,), "float32", 1.0, 1.0, 1.0, ratio=2.0)
    assert line.met == ()
    goals = (Goal(OURS, 2.0, 2.0), Goal(CAPTURED, 0.5, 0.25))
    line = dataclasses.replace(line, goals=goals, at_most=0.5)
    assert line.met == (True, False, False)
    assert "| 2.00 | >= 2; >= 0.5 to fastanila, captured; <= 0.5 s | yes; 0.25: NO; NO |" in report.markdown([line], {})
    (stored,) = report.lines_of_json(json.loads(json.dumps(report.as_json([line], {})))["lines"])
    assert stored == line


def test_each_goal_is_measured_from_the_way_it_names(monkeypatch):
    goals = {OURS: {"rival": 100.0}, CAPTURED: {"rival": 20.0, "other": 3.0}}
    row = Row("host", "a work", (1,), "float32", lambda device, closing: {}, at_least=goals)
    medians = {OURS: 1.0, CAPTURED: 2.0, "rival": 50.0, "other": 5.0}
    timings = {way: timing.Timing(m, m, m, 1) for way, m in medians.items()}
    rival, other = (table.timed(row, way, CPU, timings) for way in ("rival", "other"))
    assert rival.ratio == 50 and rival.goals == (Goal(OURS, 100.0, 50.0), Goal(CAPTURED, 20.0, 25.0))
    assert rival.met == (False, True) and other.goals == (Goal(CAPTURED, 3.0, 2.5),)


def test_a_step_is_shown_beside_a_copy():
    row = Row("step", "a step", (1,), "float32", lambda device, closing: {}, bytes_moved=8_000_000)
    timings = {way: timing.Timing(m, m, m, 1) for way, m in {OURS: 4e-6, table.COPY: 3e-6}.items()}
    line = table.timed(row, OURS, CPU, timings)
    assert line.gigabytes_s == pytest.approx(2000) and line.of_copy == pytest.approx(0.75)
    assert report.cells(line)[-1] == "2,000 GB/s, 75.0% of a copy"
    assert table.COPY in {way for row in rows.rows("cuda") if row.group == "step" for way in row.build(CPU, None)}


def test_rows_without_the_time_they_need_are_skipped_and_say_so():
    row = row_of(fastanila=lambda: list, rival=lambda: list)
    for until in (0.0, time.monotonic() + row.seconds - 0.5):
        [(_, (ours, rival))] = table.run([row], CPU, until=until)
        assert ours.note == rival.note == "skipped: out of time"
        assert (ours.way, rival.way, rival.goals) == (OURS, "rival", (Goal(OURS, 2.0),))
    assert "| a work | skipped: out of time | rival >= 2 |" in report.markdown([ours, rival], {"device": "none"})
    [(_, lines)] = table.run([row], CPU, rounds=1, until=time.monotonic() + row.seconds + 60)
    assert all(line.median is not None for line in lines)


def test_ways_that_are_left_when_the_time_is_over_are_skipped(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(table.time, "monotonic", lambda: float(next(now)))
    row = row_of(fastanila=lambda: list, rival=lambda: list, third=lambda: list)
    lines = table.lines_of(row, CPU, seconds=0.0, rounds=5, until=1.0)
    assert {line.way: line.note for line in lines} == {OURS: "", "rival": "", "third": "skipped: out of time"}
    assert lines[0].rounds == lines[1].rounds == 1
    assert "| a work | third | - | - | - | - |  |  | skipped: out of time |" in report.markdown(lines, {})


def test_writing_replaces_its_own_block_and_no_other(tmp_path):
    path = tmp_path / "RESULTS.md"
    blocks = "".join(f"<!-- bench.table {k} -->\nold {k}\n<!-- end of bench.table {k} -->\n" for k in ("cuda", "cpu"))
    path.write_text(f"# Head\n{blocks}tail\n")
    report.write("new", "cpu", path)
    report.write("newer", "cpu", path)
    text = path.read_text()
    assert "old cuda" in text and "old cpu" not in text and text.count("newer") == 1 and "new\n" not in text
    assert text.startswith("# Head\n") and text.endswith("tail\n")
    with pytest.raises(ValueError, match="markers"):
        report.write("new", "tpu", path)
