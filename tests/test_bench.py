"""The table times what it says it times: its rows, its rivals' laws, its goals, and how it fails."""

import contextlib
import dataclasses
import itertools
import json
import math
import sys

import pytest
import torch

from bench import gpu, rival_updates, rivals, rows, table, timing, workloads
from fastanila import ops, reference
from fastanila.energies import MLP, ConvNet

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
        assert set(row.at_least) | set(row.at_most) <= ways, row.work
        assert rows.OURS in ways or row.group == "startup"
        assert (row.group, row.work) not in names
        names.add((row.group, row.work))
    assert {group for group, _ in names} == set(rows.GROUPS)


def test_the_goals_are_the_issues():
    cuda = {row.work: row.at_least for row in rows.rows("cuda")}
    assert cuda["step, 2^26, float32"] == {"copy of the same bytes": 0.92, "torch.compile": 1.4, "eager": 6.0}
    assert cuda["step, 2^26, bfloat16"]["torch.compile"] == 2.5
    assert cuda["mlp-128, 1,024 x 2 x 100, float32"]["torchebm"] == 100
    assert cuda["mlp-64, 1,024 x 128 x 200, float32"]["torchebm"] == 20
    assert cuda["mlp-64, 1,024 x 128 x 200, float32"]["torch.compile"] == 3
    assert cuda["mixture, 10,000 x 2 x 100, float32"]["torch.compile, captured by hand"] == 10
    assert cuda["convnet-32, 64 x 3x32x32 x 100, bf16"]["eager loop in float32"] == 5
    assert cuda["one update, rings, K=60"]["the authors' form"] == 40
    cpu = {row.work: row.at_least for row in rows.rows("cpu")}
    assert cpu["step, 2^24, float32"] == {"eager": 4.0, "torch.compile": 2.0}
    assert cpu["normals, 2^24"] == {"torch.randn": 3.0}


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


def test_the_median_is_a_calls_time(monkeypatch):
    now = iter([0.0, *itertools.accumulate([0.0, 5.0, 0.0, 1.0, 0.0, 9.0, 0.0, 5.0, 0.0, 5.0])])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    found = timing.measure({"a": lambda: None}, CPU, rounds=5, least=5, once=True)["a"]
    assert found == timing.Timing(5.0, 5.0, 5.0, 5)


# ---------------------------------------------------------------------------------------------------------- rivals

CHAINS = workloads.Chains("mixture", (2000, 2), 10)  # few transitions: their law still depends on the step size


def mean_energy(way) -> float:
    z = way()
    assert z.shape == CHAINS.shape and torch.isfinite(z).all() and not z.requires_grad
    return CHAINS.energy(CPU)(z).mean().item()


def plain_chain() -> float:
    sampler = CHAINS.sampler("Langevin")
    return mean_energy(lambda: sampler.run(CHAINS.energy(CPU), CHAINS.start(CPU), steps=10, seed=0, compile=False))


# Means over 2,000 chains of an energy whose standard deviation is 3.8, from equal starts: two of them differ by more
# than 0.75, six standard deviations, once in 1e9 if the laws are equal.
@pytest.mark.parametrize(
    "build", [rivals.torchebm_langevin, rivals.ebmkit_langevin, lambda c, d: rivals.eager_loop(c, "Langevin", d)]
)
def test_plain_rivals_run_the_same_chain(build):
    torch.manual_seed(0)
    try:
        way = build(CHAINS, CPU)
    except rivals.NotInstalled as missing:
        pytest.skip(str(missing))
    assert mean_energy(way) == pytest.approx(plain_chain(), abs=0.75)


def test_a_rival_that_moves_twice_as_far_would_be_noticed():
    torch.manual_seed(0)
    longer = dataclasses.replace(CHAINS, steps=20)
    assert abs(mean_energy(rivals.eager_loop(longer, "Langevin", CPU)) - plain_chain()) > 2


@pytest.mark.parametrize("network", [MLP(2, 16), MLP(2, 16, features=8, confinement=0.5), ConvNet(3, 8, 4)])
def test_the_rivals_network_is_the_same_function(network):
    shape = (3, 8, 8) if isinstance(network, ConvNet) else (2,)
    z = torch.randn(5, *shape)
    torch.testing.assert_close(workloads.Ordinary(network, "float32")(z), network(z))
    ordinary = workloads.Ordinary(network, "bf16")
    torch.testing.assert_close(ordinary(z), network(z), rtol=0.05, atol=0.05)
    assert len(list(ordinary.parameters())) == len(list(network.parameters()))


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("step", [rivals.eager_step, rivals.plain_step])
def test_the_steps_by_hand_are_the_definition(step, noise, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", lambda z: torch.full_like(z, noise))
    arguments = workloads.step_arguments(4096, "float32", CPU)
    z, score = arguments["z"], 3 * arguments["score"]
    expected = reference.anisotropic_step(
        z, score, workloads.STEP_THRESHOLD, step_size=workloads.STEP_SIZE, noise=torch.full_like(z, noise)
    )
    torch.testing.assert_close(step(z, score), expected)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["AniLA", "Langevin"])
def test_a_loop_by_hand_makes_the_definitions_transitions(kind, noise, monkeypatch):
    chains = workloads.Chains("mixture", (50, 2), 3)
    monkeypatch.setattr(torch, "randn_like", lambda z: torch.full_like(z, noise))
    final = rivals.eager_loop(chains, kind, CPU)()
    z, energy = chains.start(CPU), chains.energy(CPU)
    for _ in range(3):
        score = -torch.func.grad(lambda x: energy(x).sum())(z)
        threshold = chains.threshold if kind == "AniLA" else math.inf
        z = reference.anisotropic_step(z, score, threshold, step_size=chains.step_size, noise=torch.full_like(z, noise))
    torch.testing.assert_close(final, z)


def test_the_authors_form_scales_by_the_norm_over_dim_1(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4]], requires_grad=True)
    rivals.authors_transition(lambda x: 0.5 * x.square().sum(1), x, threshold=1.0, noise_scale=0.1)
    gamma = torch.tensor([[0.2], [1.0]])
    expected = torch.tensor([[3.0, 4.0], [0.3, 0.4]]) * (1 - gamma) + 0.1 * gamma
    torch.testing.assert_close(x.detach(), expected)


@pytest.mark.parametrize("form", [rival_updates.authors_update, rival_updates.eager_update])
def test_an_update_by_hand_moves_the_parameters_and_leaves_them_trainable(form):
    energy, pool = MLP(2, 16), torch.randn(64, 2)
    before = [p.detach().clone() for p in energy.parameters()]
    settings = workloads.Settings(steps=2, lr=1e-3, threshold=1.0, step_size=0.01, noise_scale=1.0)
    update = form(energy, pool, 16, 32, settings)
    assert torch.isfinite(update())
    assert all(p.requires_grad for p in energy.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, energy.parameters(), strict=True))


def test_the_convolutions_alone_are_the_networks():
    chains = workloads.Chains("convnet-32", (2, 3, 8, 8), 1)
    seen = []
    run = rivals.convolutions_alone(chains, CPU)
    with contextlib.ExitStack() as closing:
        patch = closing.enter_context(pytest.MonkeyPatch.context())
        conv2d = torch.nn.functional.conv2d
        patch.setattr(torch.nn.functional, "conv2d", lambda x, *a: seen.append(tuple(x.shape)) or conv2d(x, *a))
        run()
    assert seen == [(2, 3, 8, 8), (2, 32, 8, 8), (2, 64, 4, 4), (2, 128, 2, 2), (2, 256, 1, 1)]


# --------------------------------------------------------------------------------------------- what does not succeed


def test_a_rival_that_is_not_installed_is_named_and_nothing_fails(monkeypatch, capsys):
    for module in ("torchebm", "torchebm.core", "ebm", "ebm.samplers.langevin"):
        monkeypatch.setitem(sys.modules, module, None)
    assert table.main(["--quick", "--device", "cpu", "--rows", "chains"]) == 0
    printed = capsys.readouterr().out
    assert "torchebm is not installed" in printed and "ebmkit is not installed" in printed


def row_of(**ways) -> rows.Row:
    return rows.Row("host", "a work", (1,), "float32", lambda device, closing: ways, at_least={"rival": 2.0})


def test_a_way_that_breaks_shows_and_fails_the_run(capsys):
    def broken():
        raise RuntimeError("no such kernel")

    lines = list(table.run([row_of(fastanila=lambda: broken, rival=lambda: list)], CPU, rounds=1))
    assert [line.way for line in lines] == ["rival", "fastanila"]
    assert lines[1].note == "failed: RuntimeError: no such kernel" and lines[1].median is None
    assert lines[0].ratio is None and lines[0].met is None and table.failed(lines)
    assert "no such kernel" in capsys.readouterr().err


def test_a_goal_is_met_or_not():
    line = table.Line("step", "w", "way", "cpu", (1,), "float32", median=1.0, ratio=2.0)
    replace = dataclasses.replace
    assert table.is_met(line) is None
    assert table.is_met(replace(line, at_least=2.0)) is True
    assert table.is_met(replace(line, at_least=2.1)) is False
    assert table.is_met(replace(line, at_most=0.5)) is False
    assert table.is_met(replace(line, at_least=2.0, ratio=None)) is None


def test_rows_after_the_deadline_are_skipped_and_say_so():
    (ours, rival) = table.run([row_of(fastanila=lambda: list, rival=lambda: list)], CPU, until=0.0)
    assert ours.note == rival.note == "skipped: out of time"
    assert (ours.way, rival.way, rival.at_least) == ("fastanila", "rival", 2.0)
    assert "| a work | skipped: out of time | rival >= 2 |" in table.markdown([ours, rival], {"device": "none"})


def test_writing_replaces_its_own_block_and_no_other(tmp_path):
    path = tmp_path / "RESULTS.md"
    blocks = "".join(f"<!-- bench.table {k} -->\nold {k}\n<!-- end of bench.table {k} -->\n" for k in ("cuda", "cpu"))
    path.write_text(f"# Head\n{blocks}tail\n")
    table.write("new", "cpu", path)
    table.write("newer", "cpu", path)
    text = path.read_text()
    assert "old cuda" in text and "old cpu" not in text and text.count("newer") == 1 and "new\n" not in text
    assert text.startswith("# Head\n") and text.endswith("tail\n")
    with pytest.raises(ValueError, match="markers"):
        table.write("new", "tpu", path)


# ------------------------------------------------------------------------------------------------------- bench.gpu

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


def test_bench_gpu_writes_its_report_and_the_table(tmp_path, monkeypatch, capsys):
    results = tmp_path / "RESULTS.md"
    results.write_text("<!-- bench.table cpu -->\n<!-- end of bench.table cpu -->\n")
    arguments = ["--device", "cpu", "--quick", "--rows", "host", "--out", str(tmp_path), "--results", str(results)]
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: {"outcome": "skipped", "tests": 3})
    assert gpu.main(arguments) == 0
    (path,) = tmp_path.glob("cpu-*.json")
    report = json.loads(path.read_text())
    assert report["tests"] == {"outcome": "skipped", "tests": 3} and report["skipped"] == [] and report["lines"]
    assert "host time of one eager call" in results.read_text() and "Tests marked gpu: skipped" in results.read_text()

    monkeypatch.setattr(gpu, "run_tests", lambda seconds: {"outcome": "failed"})
    assert gpu.main([*arguments, "--budget", "0"]) == 1
    report = json.loads(path.read_text())
    assert report["skipped"] and report["tests"] == {"outcome": "failed"}
    assert "skipped, out of time: host time" in capsys.readouterr().out
