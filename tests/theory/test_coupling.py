"""Chains that meet: each by itself is the sampler's, and how soon they meet bounds the distance to the law.

Statistical tests have fixed seeds and a false-alarm rate of 1e-6 each."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

from fastanila import ergodicity
from fastanila.models import MLP
from fastanila.ops.reference import Proposal
from fastanila.samplers.hmc import HMC
from fastanila.samplers.langevin import AniLA
from fastanila.samplers.metropolis import MALA, AdjustedAniLA
from fastanila.theory import conditions, coupling, coupling_report, markov, targets
from fastanila.training import run as run_training
from fastanila.training.settings import Settings

FALSE_ALARM = 1e-6
Z = scipy.stats.norm.isf(FALSE_ALARM)


def laws(count, mean, sd):
    """Two proposals of three elements, the same for every pair."""
    return [
        Proposal(*(torch.tensor(v, dtype=torch.float64).expand(count, 3) for v in pair))
        for pair in zip(mean, sd, strict=True)
    ]


def draws_of(count, seed=0):
    return coupling.draws(torch.zeros(count, 3, dtype=torch.float64), seed=seed, step=1)


MEANS = [(0.3, -0.2, 0.0), (-0.5, 0.1, 0.4)]
FAR = [(3.0, -2.0, 0.0), (-2.0, 1.0, 1.0)]
ALIKE, UNLIKE = [(0.5, 1.0, 2.0)] * 2, [(0.5, 1.0, 2.0), (0.6, 0.9, 2.0)]
CASES = {"alike": (MEANS, ALIKE), "unlike": (MEANS, UNLIKE), "far": (FAR, UNLIKE), "far, alike": (FAR, ALIKE)}


def p_value(draws, law):
    """Of the draws being independent normals: of each element and of three directions, by Bonferroni."""
    z = ((draws - law.mean) / law.sd).numpy()
    marks = [*z.T, (z[:, 0] + z[:, 1]) / math.sqrt(2), (z[:, 0] - z[:, 2]) / math.sqrt(2), z.sum(1) / math.sqrt(3)]
    return len(marks) * min(scipy.stats.kstest(mark, "norm").pvalue for mark in marks)


@pytest.mark.parametrize("mean, sd", CASES.values(), ids=CASES)
def test_each_draw_has_its_own_law(mean, sd):
    first, second = laws(100_000, mean, sd)
    shared = draws_of(100_000)
    made = coupling.couple(first, second, shared)
    assert p_value(made.x, first) > FALSE_ALARM / 2 and p_value(made.y, second) > FALSE_ALARM / 2
    assert torch.equal(made.same, (made.x == made.y).all(1))
    # teeth: where they are not made equal, a draw anew in place of one by the residual law
    anew = torch.where(made.same[:, None], made.y, second.mean + second.sd * draws_of(100_000, seed=1).normal)
    refused = p_value(anew, second) < FALSE_ALARM
    assert refused == (mean is MEANS)  # far away they hardly ever become one, and the mutant is right


def test_the_wider_law_needs_its_extra_noise():
    first, second = laws(100_000, MEANS, UNLIKE)
    shared = draws_of(100_000)
    made = coupling.couple(first, second, shared._replace(extra=0 * shared.extra))
    assert p_value(made.x, first) < FALSE_ALARM


@pytest.mark.parametrize("distance", [0.1, 1.0, 3.0])
def test_equal_scales_meet_as_often_as_can_be(distance):
    """1 - TV of two normals so many standard deviations apart is 2 Phi(-distance / 2)."""
    count = 100_000
    first, second = laws(count, [(0.0, 0.0, 0.0), (0.0, distance, 0.0)], [(2.0, 1.0, 1.0)] * 2)
    share = coupling.couple(first, second, draws_of(count)).same.double().mean().item()
    most = 2 * scipy.stats.norm.cdf(-distance / 2)
    assert abs(share - most) < Z * math.sqrt(most * (1 - most) / count) + 1e-9


def test_unequal_scales_meet_less_often_than_can_be_but_often():
    count = 100_000
    first, second = laws(count, MEANS, UNLIKE)
    x = first.mean + first.sd * draws_of(count, seed=3).normal
    ratio = sum(torch.distributions.Normal(*law).log_prob(x).sum(1) * sign for law, sign in ((second, 1), (first, -1)))
    most = ratio.exp().clamp(max=1).mean().item()  # 1 - TV
    share = coupling.couple(first, second, draws_of(count)).same.double().mean().item()
    assert 0.6 * most < share < most


def drawn_anew(first, second, shared, right=coupling.couple):
    """A mutant: where the two do not become one, the second is a draw of its whole law."""
    made = right(first, second, shared)
    normal = torch.randn(made.y.shape, generator=torch.Generator().manual_seed(1), dtype=made.y.dtype)
    return made._replace(y=torch.where(made.same[:, None], made.y, second.mean + second.sd * normal))


SAMPLERS = {"mala": MALA(0.8), "anila-mh": AdjustedAniLA(1.0, 0.6)}


def after(target, sampler, start, other, steps, count, seed=0, transition=coupling.transition):
    """(x, y), (count,): pairs after some transitions, from ``start`` and ``other``."""
    evaluate = coupling.evaluator(target.energy)
    ends = [coupling.chains_at(evaluate, torch.full((count, 1), at, dtype=torch.float64)) for at in (start, other)]
    pairs = coupling.Pairs(*ends, torch.zeros(count, dtype=torch.bool))
    for step in range(steps):
        pairs = transition(sampler, evaluate, pairs, coupling.draws(ends[0].z, seed=seed, step=step))
    return pairs.x.z[:, 0], pairs.y.z[:, 0], pairs.met


def chi_squared(z, law, grid):
    """The p-value of draws z on the line against the masses of the grid's cells."""
    seen = np.histogram(z.numpy(), grid.edges[0])[0]
    groups = np.minimum((law.cumsum() * 40).astype(int), 39)
    seen, expected = (np.bincount(groups, v, 40) for v in (seen, law * len(z)))
    kept = expected > 5
    rest = [seen[~kept].sum()], [expected[~kept].sum()]
    seen, expected = np.append(seen[kept], rest[0]), np.append(expected[kept], rest[1])
    return scipy.stats.chi2.sf(((seen - expected) ** 2 / np.maximum(expected, 1)).sum(), len(seen) - 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_chain_of_a_pair_is_the_samplers_own(name, monkeypatch):
    """After four transitions from a point each, against the powers of the exact kernel on a grid."""
    target, sampler, steps, count = targets.skewed(), SAMPLERS[name], 4, 40_000
    grid = markov.cells(target.box, 1300)
    kernel = markov.transition_kernel(sampler, target, grid)
    cells = [int(np.abs(grid.centres[:, 0] - at).argmin()) for at in (0.5, -1.0)]

    def p_values():
        found = after(target, sampler, *(grid.centres[c, 0] for c in cells), steps, count)
        for z, cell in zip(found, cells, strict=False):
            law = np.eye(1, len(grid.centres), cell)[0]
            for _ in range(steps):
                law = kernel.matrix.T @ law
            # where the chain has not moved it is on the centre of its cell, as on the grid
            yield chi_squared(z, law, grid)
        assert 0.3 < found[2].double().mean() < 1

    assert min(p_values()) > FALSE_ALARM / 2
    # teeth: the second of a pair drawn anew where they did not become one, and not by the residual law
    monkeypatch.setattr(coupling, "couple", drawn_anew)
    assert min(p_values()) < FALSE_ALARM


def test_both_chains_end_where_the_samplers_own_run_does(monkeypatch):
    """Two samples, of a target that is not separable and gains that differ by element."""
    target, sampler, count = targets.banana(), AdjustedAniLA(1.0, 0.8), 20_000
    start = torch.tensor([[1.5, 0.5], [-1.0, 1.0]])
    settings = dict(seed=9, compile=False)
    own = sampler.run(target.energy, start.repeat_interleave(count, 0), steps=6, **settings).unflatten(0, (2, -1))
    ahead = sampler.run(target.energy, own[0], steps=1, step=6, **settings)  # by one transition

    def p_values():
        x, y = start[:, None].expand(2, count, 2)
        *_, last = coupling.lagged(sampler, target.energy, x, y, lag=1, budget=7, seed=4, least=7)
        assert last.met.double().mean() > 0.2
        for found, expected in ((last.x, ahead), (last.y, own[1])):
            for marks in ([1.0, 0.0], [0.0, 1.0], [1.0, -1.0]):
                yield scipy.stats.ks_2samp(*(z @ torch.tensor(marks) for z in (found, expected))).pvalue

    assert min(p_values()) > FALSE_ALARM / 6
    monkeypatch.setattr(coupling, "couple", drawn_anew)
    assert min(p_values()) < FALSE_ALARM


@pytest.mark.parametrize(
    "sampler", [MALA(0.3), AdjustedAniLA(1.5, 0.3), AdjustedAniLA(2.0, 0.3, norm="chain")], ids=repr
)
def test_pairs_that_have_met_stay_together(sampler):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = MLP(3, width=8, depth=1, confinement=1.0)
        x, y = torch.randn(2, 65, 3)
    seen = {}
    for moment in coupling.lagged(sampler, energy, x, y, lag=2, budget=80, seed=1, least=80):
        if moment.y is not None:
            equal = (moment.x == moment.y).all(1)
            assert torch.equal(equal, moment.met)  # at once, bit for bit, and never apart again
            assert all(equal[row] for row, t in seen.items())
            seen |= {int(row): moment.t for row in moment.met.nonzero() if int(row) not in seen}
    assert len(seen) > 60
    times = coupling.meetings(sampler, energy, x, y, lag=2, budget=80, seed=1).times
    assert {row: t for row, t in enumerate(times.tolist()) if t >= 0} == seen  # also of those that leave the batch


# ------------------------------------------------------------------------------------------------------ the bound


def test_the_bound_is_the_formula():
    found = coupling.Meetings(torch.tensor([3, 8, 12]), 3, 100, 0, 1.0)
    bound = coupling.tv_bound(found, 10)
    for t in range(11):
        terms = [max(0, math.ceil((tau - 3 - t) / 3)) for tau in (3, 8, 12)]
        assert bound.value[t].item() == pytest.approx(np.mean(terms))
        assert bound.error[t].item() == pytest.approx(np.std(terms, ddof=1) / math.sqrt(3))
    assert len(coupling.tv_bound(found).value) == 10 and coupling.tv_bound(found).value[-1] == 0


BOUNDED = {
    "normal": (targets.normal(), MALA(0.8), 400, 10),
    "skewed": (targets.skewed(), AdjustedAniLA(1.0, 0.6), 600, 40),
    "double-well": (targets.double_well(), MALA(0.3), 300, 40),
}


@pytest.mark.parametrize("target, sampler, resolution, lag", BOUNDED.values(), ids=BOUNDED)
def test_the_bound_lies_above_the_true_distance(target, sampler, resolution, lag):
    """The distance by powers of the kernel on a grid, from a cell in the tail; the bound less z standard errors of the
    largest deviation over all t at a rate of 1e-6."""
    count = 1000
    grid = markov.cells(target.box, resolution)
    kernel = markov.transition_kernel(sampler, target, grid)
    start = conditions.tail_cell(kernel.target)
    truth = conditions.distances(kernel.matrix, start, conditions.stationary(kernel.matrix), least=1e-4)
    x = torch.from_numpy(grid.centres[start]).expand(count, 1)
    found = coupling.meetings(sampler, target.energy, x, x, lag=lag, budget=2000, seed=1)
    bound = coupling.tv_bound(found, len(truth) - 1)
    assert 0.5 < found.acceptance < 1
    z = scipy.stats.norm.isf(FALSE_ALARM / len(truth))

    def below(bound):
        # where few pairs are left the standard error is itself uncertain: at least that of ten of them
        error = bound.error.clamp(min=10**0.5 / count)
        return bool((bound.value + z * error < torch.from_numpy(truth)).any())

    assert not below(bound)
    assert bound.value[len(truth) // 2] < 0.5 < truth[0]  # and it says something
    # teeth: the floor in place of the ceiling, which is what pairs that meet a lag earlier would give
    assert below(coupling.tv_bound(found._replace(times=found.times - lag + 1), len(truth) - 1))


def test_no_bound_of_pairs_that_have_not_met():
    found = coupling.Meetings(torch.tensor([3, -1]), 1, 10, 0, 1.0)
    with pytest.raises(ValueError, match="1 of 2 had not within 10"):
        coupling.tv_bound(found)


# ------------------------------------------------------------------------------------------------------ the command


def test_chains_that_do_not_meet_are_said_not_to(capsys, tmp_path):
    arguments = "--target double-well --parameter 30 --coupling --sampler mala --step-size 0.005 --budget 60 --pairs 40"
    assert ergodicity.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "no bound" in printed and "at most" not in printed and "acceptance 0." in printed
    report = json.loads((tmp_path / "coupling.json").read_text())
    assert report["bound"] is None and report["close"] is None and report["met"] < report["pairs"]
    assert (tmp_path / "coupling.png").read_bytes()[1:4] == b"PNG"


def test_the_command_bounds_a_named_target(capsys, tmp_path):
    arguments = "--target normal --coupling --sampler mala --step-size 0.8 --pairs 100 --box -3 3"
    assert ergodicity.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "coupling.json").read_text())
    assert "100 of 100 pairs met" in printed and f"0.01 from t = {report['close']['0.01']}" in printed
    assert report["lag"] > 1 and report["bound"][-1][0] == 0
    value = [v for v, _ in report["bound"]]
    assert value[report["close"]["0.25"]] <= 0.25 < value[report["close"]["0.25"] - 1]


def a_run(sampler, shape, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flat = MLP(math.prod(shape), width=8, depth=1, confinement=2.0)
    energy = torch.nn.Sequential(torch.nn.Flatten(), flat)
    return run_training.Run(energy, sampler, torch.zeros(9, *shape), Settings(**settings), 10, box=(-1.0, 1.0))


def test_the_command_takes_a_run_of_images(monkeypatch, capsys):
    run = a_run(MALA(0.01), (1, 3, 3), data="digits", steps=7)
    monkeypatch.setattr(ergodicity, "load", lambda directory, device: run)
    assert ergodicity.main("--run R --coupling --pairs 20 --warm-up 60 --lag 20 --gradient 40".split()) == 0
    printed = capsys.readouterr().out
    assert "20 of 20 pairs met" in printed and "after the 7 transitions of an update" in printed
    assert "unbiased gradient, 40 pairs" in printed


def test_a_clamped_run_is_taken_within_its_bounds():
    run = a_run(MALA(0.3), (2, 2), data="digits")
    subject = coupling_report.of_run(run, (-0.5, 0.5), (-0.5, 0.5))
    x, y = coupling_report.starts(subject, 50, seed=0)
    assert x.abs().max() < 0.5 and not torch.equal(x, y)
    for moment in coupling.lagged(subject.sampler, subject.energy, x, y, lag=1, budget=40, seed=0, least=40):
        assert moment.x.abs().max() <= 0.5
    assert not torch.equal(moment.x, x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--coupling --sampler langevin", "sampler must be MALA or AdjustedAniLA"),
        ("--coupling --sampler hmc", "got HMC"),
        ("--coupling --resolution 30", "resolution has no effect"),
        ("--coupling --step-size 0.1 0.2", "must be one for coupling, got 2"),
        ("--coupling --pairs 1", "pairs must be an integer of at least 2"),
        ("--coupling --lag 0", "lag"),
        ("--pairs 10", "pairs has no effect without coupling"),
        ("--coupling --gradient 4", "gradient has no effect without a run"),
    ],
)
def test_bad_arguments_end_with_a_reason(arguments, message, capsys):
    assert ergodicity.main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_samplers_and_starts_that_cannot_be_are_refused():
    x = torch.zeros(4, 2)
    energy = targets.correlated().energy
    for sampler in (HMC(0.1, 3), AniLA()):
        with pytest.raises(ValueError, match="MALA or AdjustedAniLA"):
            next(coupling.lagged(sampler, energy, x, x, lag=1, budget=3, seed=0))
    for bad in (dict(lag=0), dict(budget=1, lag=2), dict(y=x[:3]), dict(y=x.double())):
        with pytest.raises(ValueError, match=next(iter(bad))):
            next(coupling.lagged(MALA(), energy, **dict(x=x, y=x, lag=1, budget=3, seed=0) | bad))
    run = a_run(MALA(), (2,), data="rings")
    with pytest.raises(ValueError, match="one law"):
        coupling_report.of_run(run._replace(classes=3))
