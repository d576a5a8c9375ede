"""The table times what it says it times: its rows, its rivals' laws, its goals, and how it fails."""

import contextlib
import dataclasses
import itertools
import json
import sys
import time
import warnings

import pytest
import torch

from bench import chain_rows, limits, report, rows, table, timing
from bench.report import Goal, Line
from bench.row import CAPTURED, GROUPS, OURS, Row
from fastanila import AniLA, ops
from fastanila.samplers import captured, state

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
    assert cuda["step, 2^26, float32"][OURS] == {
        "copy of the same bytes": 0.92, "torch.compile": 1.4, "eager": limits.eager_over_step(),
    }  # fmt: skip
    assert cuda["step, 2^26, bfloat16"][OURS]["torch.compile"] == 2.5
    assert cuda["mlp-128, 1,024 x 2 x 100, float32"][OURS]["torchebm"] == 100
    assert cuda["mlp-128, 1,024 x 2 x 100, float32"][CAPTURED]["torchebm"] == 20
    assert cuda["mlp-64, 16,384 x 2 x 100, float32"][CAPTURED]["torch.compile"] == 3
    assert cuda["mlp-128, 16,384 x 2 x 100, float32"][CAPTURED]["torch.compile"] < 2  # products that both make
    assert cuda["mlp-64, 1,024 x 2 x 100, float32"][OURS]["torch.compile, reduce-overhead, rand4x"] == 10
    assert "torch.compile, captured by hand" not in cuda["mlp-64, 64 x 8 x 50, float32"][CAPTURED]
    assert cuda["mlp-64, 1,024 x 128 x 200, float32"].keys() == {OURS}  # captured by itself
    assert cuda["mlp-64, 1,024 x 128 x 200, float32"][OURS]["torchebm"] == 20
    assert cuda["mlp-64, 1,024 x 128 x 200, float32"][OURS]["torch.compile, reduce-overhead"] == 3
    assert cuda["mixture, 10,000 x 2 x 100, float32"][OURS]["torch.compile, captured by hand"] < 10
    assert cuda["mlp-64, 1,024 x 2 x 100, float32"][OURS]["torch.compile, captured by hand"] == 10
    assert cuda["convnet-32, 64 x 3x32x32 x 100, float32"][OURS][chain_rows.FLOOR] == 1 / 1.1
    assert "its convolutions alone" not in cuda["convnet-32, 64 x 3x32x32 x 100, float32"][OURS]
    assert cuda["convnet-32, 64 x 3x32x32 x 100, bf16"][OURS]["eager loop in float32"] == 5
    assert cuda["one update, rings, K=60"][OURS]["the authors' form"] == 40
    cpu = {row.work: row.at_least for row in rows.rows("cpu")}
    assert cpu["step, 2^24, float32"][OURS] == {"eager": 4.0, "torch.compile": 2.0}
    assert cpu["normals, 2^24"][OURS] == {"torch.randn": 3.0}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_default_job_and_exact_chains_have_rows(kind):
    found = {row.work: row for row in rows.rows(kind)}
    for work in (
        "one update, rings, the default, K=60",
        "exact: mlp-64, 1,024 x 2 x 100, float32",
        "exact: mixture, 10,000 x 2 x 100, float32",
    ):
        with contextlib.ExitStack() as closing:
            ways = found[work].build(torch.device(kind), closing)
        assert {OURS, chain_rows.UNADJUSTED, chain_rows.MALA_BY_HAND} <= set(ways)
        assert (chain_rows.PLAIN in ways) == (kind == "cpu" or work.startswith("one update"))
        assert (CAPTURED in ways) == (kind == "cuda" and work.startswith("exact"))
    assert "one update, rings, K=60" in found


def test_the_authors_form_is_left_out_where_the_host_holds_it_up():
    def has_it(kind):
        with contextlib.ExitStack() as closing:
            return {r.work for r in rows.rows(kind) if "the authors' form" in r.build(torch.device(kind), closing)}

    def of_images(works):
        return {work for work in works if "3x32x32" in work}

    assert not of_images(has_it("cuda")) and has_it("cuda") and of_images(has_it("cpu"))


# ---------------------------------------------------------------------------------------------------------- limits


def test_the_eager_steps_bytes_are_those_of_its_kernels():
    """Counted from what it calls: each call reads its tensors of z's size and writes one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from bench import rivals

    class Counted(TorchDispatchMode):
        passes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            self.passes += 1 + (0 if function is torch.ops.aten.randn_like.default else len(tensors))
            return function(*args, **(kwargs or {}))

    z, score = torch.zeros(8), torch.ones(8)
    with Counted() as counted:
        rivals.eager_step(z, score)
    assert counted.passes == limits.EAGER_PASSES == 18
    assert limits.eager_over_step() == pytest.approx(18 / 3 * 0.92)


def test_the_limits_of_whole_chains():
    assert limits.mlp_products(2, 64) == 2 * 4288 and limits.mlp_products(2, 128) == 2 * 16768
    few, many = (limits.over_whole_mlp(chains, 2, 64, 100) for chains in (1024, 16384))
    assert limits.whole_mlp_run(1024, 2, 64, 100) == limits.RUN < limits.whole_mlp_run(16384, 2, 64, 100)
    # of few chains both sides are bound by launches: 12 nodes a transition against one run's time on the host
    assert few.captured == pytest.approx(100 * 12 * limits.NODE / limits.RUN)
    assert few.launched == pytest.approx(100 * 12 * limits.LAUNCH / limits.RUN)
    # of many, ours is bound by its instructions: products of 16,384 states, 1.7 instructions each
    assert limits.whole_mlp_run(16384, 2, 64, 100) == pytest.approx(100 * 16384 * 8576 * 1.7 / limits.LANES)
    assert many.captured < few.captured < few.launched < few.eager


def test_the_limits_of_captured_chains():
    assert limits.COMPILED.nodes == 12 and limits.OURS.nodes == 8
    assert limits.over_captured_mlp(64, 8, 64, 50).captured == pytest.approx(12 / 8)  # all of them small
    # wide ones are bound by products (here inner ones alone) and bytes, which no capture saves
    wide = limits.captured_mlp_run(limits.Kernels(0, 0), 1 << 20, 2, 128, 1)
    assert wide == pytest.approx(
        2 * (1 << 20) * 128 * 128 / limits.LANES + 2 * 4 * (1 << 20) * (128 + 2) / limits.BANDWIDTH
    )


def test_the_convnets_bytes_and_products_are_its_layers():
    from fastanila.models import ConvNet

    shape, width, seen = (2, 3, 16, 16), 8, []
    energy = ConvNet(3, 16, width)
    for layer in energy.layers[::2]:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append((layer, output)))
    energy(torch.zeros(shape))
    assert limits.activation_shapes(shape, width) == [tuple(output.shape) for _, output in seen]
    products = [output.numel() * layer.weight[0].numel() for layer, output in seen]
    assert limits.convolution_products(shape, width) == 2 * sum(products)
    sizes = [4 * output.numel() for _, output in seen]
    states = 3 * 4 * 2 * 3 * 16 * 16
    assert sum(limits.pointwise_bytes(shape, width, 4)) == 5 * sum(sizes) + states
    assert len(limits.pointwise_bytes(shape, width, 4)) == 9
    assert sum(limits.pointwise_bytes(shape, width, 2)) == 5 * sum(sizes) / 2 + states  # the states stay float32
    images = chain_rows.pointwise_bytes(chain_rows.IMAGES["float32"])
    assert images == limits.pointwise_bytes((64, 3, 32, 32), 32, 4) and 80e6 < sum(images) < 82e6


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
    assert table.failed(lines) and [line.median is not None for line in after] == [True]


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
        table.main(["--quick", "--device", "cpu", "--rows", "host", "startup", "--json", str(path)])
    notes = {line["work"]: line["note"] for line in json.loads(path.read_text())["lines"] if line["device"] == "cpu"}
    assert notes == {
        "host time of one eager call, 64 elements": table.RUNNING, "start-up, a process each": table.NOT_REACHED,
    }  # fmt: skip
    assert table.RUNNING.startswith("failed")


def test_the_report_keeps_other_works_of_the_same_machine_and_forgets_those_there_are_no_more(tmp_path, monkeypatch):
    path, results = tmp_path / "table.json", tmp_path / "RESULTS.md"
    results.write_text("<!-- bench.table cpu -->\n<!-- end of bench.table cpu -->\n")
    monkeypatch.setattr(
        table, "lines_of", lambda row, device, **o: [table.timed(row, OURS, device, {OURS: timing.Timing(1, 1, 1, 1)})]
    )

    def works(*arguments):
        files = ["--json", str(path), "--write", str(results)]
        assert table.main(["--quick", "--device", "cpu", *files, *arguments]) == 0
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
