"""The table times what it says it times, says what failed, and keeps what other runs of the machine have found."""

import dataclasses
import itertools
import json
import sys
import time
import warnings

import pytest
import torch

from bench import chain_rows, markdown, record, report, rows, table, timing, workloads
from bench.report import Goal, Line
from bench.row import CAPTURED, COPY, OURS, Row
from fastanila import AniLA, ops
from fastanila.samplers import captured, state

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(ops.INTERPRETED, reason="the interpreter's times are its own")


def check_table(works, tmp_path, capsys):
    """The works have every way timed, printed and in the JSON."""
    path = tmp_path / "table.json"
    assert table.main(["--device", "cpu", "--seconds", "0", "--works", *works, "--json", str(path)]) == 0
    found, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["device"]
    measured = [line for line in found["lines"] if line["device"] == "cpu"]
    assert {line["work"] for line in measured} == set(works)
    for line in measured:
        assert f"| {line['work']} | {line['way']} |" in printed
        if "not installed" not in line["note"]:
            assert 0 < line["low"] <= line["median"] <= line["high"] and line["rounds"] == 3, line
    for _, group in itertools.groupby(measured, key=lambda line: line["work"]):
        timed = {line["way"]: line for line in group if line["median"] is not None}
        assert timed["fastanila"]["ratio"] == 1.0 and len(timed) >= 2
        for line in timed.values():
            assert line["ratio"] == pytest.approx(line["median"] / timed["fastanila"]["median"])
    return printed


@pytest.mark.slow
def test_the_table_times_every_way(graphs, tmp_path, capsys, monkeypatch):
    small = workloads.Chains("mixture", (64, 2), 5)
    monkeypatch.setattr(rows, "chain_rows", lambda kind: [chain_rows.chain_row(kind, small)])
    for module in ("torchebm", "torchebm.core", "ebm", "ebm.samplers.langevin"):
        monkeypatch.setitem(sys.modules, module, None)
    works = ["step, 2^12, float32", "normals, 2^16", small.title, "host time of one eager call, 64 elements"]
    printed = check_table(works, tmp_path, capsys)
    assert graphs and "torchebm is not installed" in printed and "ebmkit is not installed" in printed
    assert f"| {works[0]} | not measured: needs a GPU | " in printed


@pytest.mark.slow
@pytest.mark.parametrize("work", ["mixture, 10,000 x 2 x 100, float32", "one update, rings, the default, K=60"])
def test_a_row_of_the_table_by_the_compiler(work, tmp_path, capsys):
    check_table([work], tmp_path, capsys)


# --------------------------------------------------------------------------------------------- what does not succeed


def row_of(**ways) -> Row:
    goals = {OURS: {"rival": 2.0}}
    return Row("host", "a work", (1,), "float32", lambda device, closing: ways, at_least=goals)


def test_a_way_that_breaks_shows_and_fails_the_run(capsys):
    def broken():
        raise RuntimeError("no such kernel")

    [(_, lines)] = table.run([row_of(fastanila=lambda: broken, rival=lambda: list)], CPU, rounds=1)
    assert [line.way for line in lines] == ["rival", "fastanila"]
    assert lines[1].note == "failed: RuntimeError: no such kernel" and lines[1].median is None
    assert lines[0].ratio is None and lines[0].met == (None,)
    assert "no such kernel" in capsys.readouterr().err


def test_a_way_that_breaks_while_it_is_timed_takes_its_row_and_no_other(capsys):
    calls = []

    def breaks():
        calls.append(None)
        if len(calls) > 1:
            raise RuntimeError("out of memory")

    first = row_of(fastanila=lambda: breaks, rival=lambda: list)
    following = dataclasses.replace(row_of(fastanila=lambda: list), work="next")
    (_, lines), (_, after) = table.run([first, following], CPU, rounds=1)
    assert {line.way: line.note for line in lines} == dict.fromkeys(
        (OURS, "rival"), "failed: RuntimeError: out of memory"
    )
    assert [line.median is not None for line in after] == [True]


@pytest.mark.parametrize("leaves", ["the context", "nothing"])
def test_an_error_that_shows_late_is_its_ways_own(leaves, monkeypatch):
    """On CUDA a kernel's error shows at the next wait, whoever waits; and may leave no context to go on with."""
    pending, broken = [], []

    def synchronize(device):
        if broken and leaves == "nothing":
            raise RuntimeError("an illegal memory access was encountered")
        if pending:
            broken.append(pending.pop())
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(table.torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(table, "lost", lambda device: bool(broken) and leaves == "nothing")
    ways = dict(first=lambda: list, second=lambda: lambda: pending.append(1), third=lambda: list)
    made, notes = table.built(ways, torch.device("cuda"))
    assert notes["second"] == "failed: RuntimeError: an illegal memory access was encountered"
    if leaves == "nothing":
        assert not made and notes["first"] == notes["third"] == "skipped: the device was lost to second"
    else:
        assert [*made] == ["first", "third"] and [*notes] == ["second"]


def test_no_row_follows_when_the_device_is_lost(monkeypatch):
    monkeypatch.setattr(table, "lost", lambda device: True)
    chosen = [row_of(fastanila=lambda: list), dataclasses.replace(row_of(fastanila=lambda: list), work="next")]
    assert [row.work for row, _ in table.run(chosen, CPU, rounds=1)] == ["a work"]


def test_a_context_is_lost_when_it_cannot_be_waited_for(monkeypatch):
    def synchronize(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(table.torch.cuda, "synchronize", synchronize)
    assert table.lost(torch.device("cuda")) and not table.lost(CPU)


class Breaking(torch.nn.Module):
    """An energy that does not compile as one graph."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return x.square().sum(-1)


def test_a_fallback_is_a_failure():
    """A chain that runs eagerly, or uncaptured, would else be timed under the fast way's name."""

    def eagerly():
        return AniLA().run(Breaking(), torch.zeros(2, 2), steps=2, seed=0)

    def uncaptured():
        def refuses(function, device):
            raise RuntimeError("operation not permitted when stream is capturing")

        chain = captured.Captured(lambda *arguments: (state.State(torch.zeros(2, 2)), None), refuses)
        zero = torch.zeros((), dtype=torch.int64)
        return chain(3, (), state.State(torch.zeros(2, 2)), zero, zero)

    ways = {OURS: lambda: eagerly, "captured": lambda: uncaptured, "rival": lambda: list}
    lines = {line.way: line for line in table.lines_of(row_of(**ways), CPU, seconds=0.0, rounds=1)}
    assert lines[OURS].note.startswith("failed: UserWarning: the energy does not compile as one graph")
    assert lines["captured"].note.startswith("failed: UserWarning: the chain runs uncaptured")
    assert lines["rival"].median is not None and lines[OURS].median is None
    with warnings.catch_warnings(record=True):  # and outside a row they are warnings as ever
        warnings.simplefilter("always")
        eagerly(), uncaptured()


def test_a_row_is_marked_as_failed_while_it_runs(tmp_path, monkeypatch):
    """So that what a process leaves that dies in it says so."""
    path = tmp_path / "table.json"

    def dies(row, device, **options):
        raise SystemExit(9)

    monkeypatch.setattr(table, "lines_of", dies)
    with pytest.raises(SystemExit):
        table.main(["--device", "cpu", "--rows", "host", "startup", "--json", str(path)])
    notes = {line["work"]: line["note"] for line in json.loads(path.read_text())["lines"] if line["device"] == "cpu"}
    assert notes == {
        "host time of one eager call, 64 elements": table.RUNNING, "start-up, a process each": table.NOT_REACHED,
    }  # fmt: skip
    assert table.RUNNING.startswith("failed")


def test_the_report_keeps_other_works_of_the_same_machine_and_forgets_those_there_are_no_more(tmp_path, monkeypatch):
    path, results = tmp_path / "table.json", tmp_path / "RESULTS.md"
    results.write_text("<!-- bench.table cpu -->\n<!-- end of bench.table cpu -->\n")
    monkeypatch.setattr(
        table,
        "lines_of",
        lambda row, device, **o: [table.line_of(row, OURS, device, {OURS: timing.Timing(1, 1, 1, 1)})],
    )

    def works(*arguments):
        files = ["--json", str(path), "--write", str(results)]
        assert table.main(["--device", "cpu", *files, *arguments]) == 0
        found = [line for line in json.loads(path.read_text())["lines"] if line["device"] == "cpu"]
        return {line["group"]: line["note"] for line in found}

    assert works("--rows", "host") == {"host": ""}
    report_of = json.loads(path.read_text())
    gone = report_of["lines"][0] | {"work": "a work that was renamed", "group": "step"}
    path.write_text(json.dumps(report_of | {"lines": [*report_of["lines"], gone]}))
    assert works("--rows", "startup") == {"host": "", "startup": ""}
    assert "host time of one eager call" in results.read_text() and "start-up" in results.read_text()
    assert works("--rows", "host", "startup", "--works", "no such work") == {"host": "", "startup": ""}
    assert works("--rows", "startup", "--budget", "0")["startup"] == "skipped: out of time"
    monkeypatch.setattr(report, "machine", lambda device: {"device": "another", "torch": "0"})
    assert works("--rows", "startup") == {"startup": ""}


def test_a_goal_is_met_or_not(tmp_path):
    assert [Goal(OURS, least, 2.0).met for least in (2.0, 2.1)] == [True, False] and Goal(OURS, 2.0).met is None
    line = Line("step", "w", "way", "cpu", (1,), "float32", 1.0, 1.0, 1.0, ratio=2.0)
    assert line.met == ()
    goals = (Goal(OURS, 2.0, 2.0), Goal(CAPTURED, 0.5, 0.25))
    line = dataclasses.replace(line, goals=goals, at_most=0.5)
    assert line.met == (True, False, False)
    assert "| 2.00 | >= 2; >= 0.5 to fastanila, captured; <= 0.5 s | yes; 0.25: NO; NO |" in report.text([line], {})
    kept = record.Record(tmp_path / "a.json", None, "cpu", {"device": "X"})
    kept.keep([line])
    assert kept.lines() == [line]


def test_each_goal_is_measured_from_the_way_it_names():
    goals = {OURS: {"rival": 100.0}, CAPTURED: {"rival": 20.0, "other": 3.0}}
    row = Row("host", "a work", (1,), "float32", lambda device, closing: {}, at_least=goals)
    medians = {OURS: 1.0, CAPTURED: 2.0, "rival": 50.0, "other": 5.0}
    timings = {way: timing.Timing(m, m, m, 1) for way, m in medians.items()}
    rival, other = (table.line_of(row, way, CPU, timings) for way in ("rival", "other"))
    assert rival.ratio == 50 and rival.goals == (Goal(OURS, 100.0, 50.0), Goal(CAPTURED, 20.0, 25.0))
    assert rival.met == (False, True) and other.goals == (Goal(CAPTURED, 3.0, 2.5),)


def test_a_step_is_shown_beside_a_copy():
    row = Row("step", "a step", (1,), "float32", lambda device, closing: {}, bytes_moved=8_000_000)
    timings = {way: timing.Timing(m, m, m, 1) for way, m in {OURS: 4e-6, COPY: 3e-6}.items()}
    line = table.line_of(row, OURS, CPU, timings)
    assert line.gigabytes_s == pytest.approx(2000) and line.of_copy == pytest.approx(0.75)
    assert report.cells(line)[-1] == "2,000 GB/s, 75.0% of a copy"


def test_rows_without_the_time_they_need_are_skipped_and_say_so():
    row = row_of(fastanila=lambda: list, rival=lambda: list)
    for until in (0.0, time.monotonic() + row.seconds - 0.5):
        [(_, (ours, rival))] = table.run([row], CPU, until=until)
        assert ours.note == rival.note == "skipped: out of time"
        assert (ours.way, rival.way, rival.goals) == (OURS, "rival", (Goal(OURS, 2.0),))
    assert "| a work | skipped: out of time | rival >= 2 |" in report.text([ours, rival], {"device": "none"})
    [(_, lines)] = table.run([row], CPU, rounds=1, until=time.monotonic() + row.seconds + 60)
    assert all(line.median is not None for line in lines)


def test_ways_that_are_left_when_the_time_is_over_are_skipped(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(table.time, "monotonic", lambda: float(next(now)))
    row = row_of(fastanila=lambda: list, rival=lambda: list, third=lambda: list)
    lines = table.lines_of(row, CPU, seconds=0.0, rounds=5, until=1.0)
    assert {line.way: line.note for line in lines} == {OURS: "", "rival": "", "third": "skipped: out of time"}
    assert lines[0].rounds == lines[1].rounds == 1
    assert "| a work | third | - | - | - | - |  |  | skipped: out of time |" in report.text(lines, {})


def test_writing_replaces_its_own_block_and_no_other(tmp_path):
    path = tmp_path / "RESULTS.md"
    blocks = "".join(f"<!-- bench.table {k} -->\nold {k}\n<!-- end of bench.table {k} -->\n" for k in ("cuda", "cpu"))
    path.write_text(f"# Head\n{blocks}tail\n")
    markdown.write("new", "cpu", path)
    markdown.write("newer", "cpu", path)
    text = path.read_text()
    assert "old cuda" in text and "old cpu" not in text and text.count("newer") == 1 and "new\n" not in text
    assert text.startswith("# Head\n") and text.endswith("tail\n")
    with pytest.raises(ValueError, match="markers"):
        markdown.write("new", "tpu", path)
