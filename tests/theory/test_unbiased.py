"""Means by pairs that meet, against quadrature. False alarms: 1e-6 for each test, seeds fixed."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from fastanila.models import MLP
from fastanila.samplers.metropolis import MALA, AdjustedAniLA
from fastanila.theory import coupling, targets, unbiased

FALSE_ALARM = 1e-6


def an_energy():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MLP(2, width=4, depth=1, confinement=1.0)


def starts(count):
    z = torch.from_numpy(np.random.default_rng(0).uniform(-4, 4, (2, count, 2))).float()
    return z[0], z[1]


def exact_gradient(energy, data):
    """By a sum over a fine grid, in float64: E grad U - mean grad U(data)."""
    energy = an_energy().double()
    line = torch.linspace(-8, 8, 401, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    with torch.no_grad():
        law = torch.softmax(-energy(z), 0)
    total = (law * energy(z)).sum() - energy(data.double()).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(energy.parameters()))])


def p_value(found, truth):
    """Of the mean of independent estimates being the truth: Student's t of each parameter, by Bonferroni."""
    varies = found.groups.std(0) > 1e-9
    torch.testing.assert_close(found.mean[~varies], truth[~varies], atol=1e-4, rtol=1e-4)
    t = ((found.mean - truth) / found.error)[varies].abs().max().item()
    return min(1.0, 2 * int(varies.sum()) * scipy.stats.t.sf(t, len(found.groups) - 1))


@pytest.mark.parametrize("sampler", [MALA(0.5), AdjustedAniLA(1.0, 0.6)], ids=["mala", "anila-mh"])
def test_the_gradient_has_no_bias(sampler):
    """From uniform starts, and after three transitions only: the plain average of chains is far off there."""
    energy, (x, y) = an_energy(), starts(12_800)
    data = torch.from_numpy(np.random.default_rng(1).normal(0.3, 1, (37, 2))).float()
    truth = exact_gradient(energy, data)
    found = unbiased.weighted(sampler, energy, x, y, at=[2, 3], lag=2, budget=500, seed=1)
    made = unbiased.likelihood_gradient(energy, data, found, groups=64)
    assert p_value(made, truth) > FALSE_ALARM
    assert made.variance == pytest.approx(float(made.groups.var(0).sum()) * 200)
    # teeth: the chains alone; and the correction off by one transition of the chains behind
    plain = unbiased.likelihood_gradient(energy, data, unbiased.single(found), groups=64)
    assert p_value(plain, truth) < FALSE_ALARM
    late = found._replace(weight=torch.where(found.weight < 0, 0.9 * found.weight, found.weight))
    assert p_value(unbiased.likelihood_gradient(energy, data, late, groups=64), truth) < FALSE_ALARM


def test_the_weights_are_those_of_the_formula():
    """Term by term from the pairs themselves, for one pair at a time."""
    target, sampler, lag, at = targets.double_well(), MALA(0.3), 3, [0, 4, 5]
    x = torch.tensor([[-1.0], [0.5], [1.2], [-0.3]], dtype=torch.float64)
    y = x.flip(0)
    path = list(coupling.lagged(sampler, target.energy, x, y, lag=lag, budget=120, seed=3, step=7, least=120))
    found = unbiased.weighted(sampler, target.energy, x, y, at=at, lag=lag, budget=120, seed=3, step=7)
    times = coupling.meetings(sampler, target.energy, x, y, lag=lag, budget=120, seed=3, step=7).times
    assert found.pairs == 4 and torch.equal(found.ends, path[5].x)
    for h in (lambda z: z[0], lambda z: z[0] ** 2, lambda z: torch.ones(())):
        for pair in range(4):
            expected = 0.0
            for number in at:
                expected += h(path[number].x[pair]) / 3
                for t in range(number + lag, int(times[pair]), lag):
                    expected += (h(path[t].x[pair]) - h(path[t].y[pair])) / 3
            own = found.pair == pair
            got = sum(w * h(z) for z, w in zip(found.z[own], found.weight[own], strict=True))
            assert float(got) == pytest.approx(float(expected), abs=1e-9)


def test_the_cost_is_counted():
    target, x = targets.normal(), torch.full((5, 1), 3.0, dtype=torch.float64)
    found = unbiased.weighted(MALA(0.8), target.energy, x, -x, at=[30], lag=4, budget=200, seed=0)
    times = coupling.meetings(MALA(0.8), target.energy, x, -x, lag=4, budget=200, seed=0).times
    assert times.max() < 30
    transitions = 5 * 30 + int((times - 4).sum())
    assert transitions - int((times - 4).sum()) < found.gradients <= 10 + transitions


def test_pairs_that_do_not_meet_give_no_mean():
    energy = targets.double_well(30.0).energy
    x = torch.ones(6, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="6 of 6 had not within 20"):
        unbiased.weighted(MALA(0.005), energy, x, -x, at=[3], lag=1, budget=20, seed=0)


def test_bad_arguments_are_refused():
    x, energy = torch.zeros(6, 2), an_energy()
    for at in ([], [3, 3], [30], [-1]):
        with pytest.raises(ValueError, match="at must"):
            unbiased.weighted(MALA(), energy, x, x, at=at, lag=1, budget=20, seed=0)
    found = unbiased.weighted(MALA(1.0), energy, *starts(6), at=[3], lag=1, budget=500, seed=0)
    for groups in (1, 4):
        with pytest.raises(ValueError, match="groups"):
            unbiased.likelihood_gradient(energy, x, found, groups=groups)
    with pytest.raises(ValueError, match="parameters"):
        unbiased.likelihood_gradient(torch.nn.Identity(), x, found, groups=2)
    assert math.isclose(float(found.weight.sum()), 6)
