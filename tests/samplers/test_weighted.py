"""Weighted walkers: resampling, and averages that stay the model's while its energy changes. False alarms: 1e-6."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from fastanila import MALA, noise
from fastanila.samplers import weighted
from known import FALSE_ALARM

# ------------------------------------------------------------------------------------------------------- resampling


def counts(log_weights, u):
    return np.bincount(weighted.systematic(log_weights, u).numpy(), minlength=len(log_weights))


def test_systematic_resampling_takes_each_row_its_share_rounded_down_or_up():
    log_weights = torch.from_numpy(scipy.stats.norm.rvs(size=37, random_state=1))
    share = 37 * np.exp(log_weights.numpy()) / np.exp(log_weights.numpy()).sum()
    found = np.array([counts(log_weights, torch.tensor(u)) for u in (np.arange(1000) + 0.5) / 1000])
    assert (found.sum(1) == 37).all()
    assert (found >= np.floor(share - 1e-9)).all() and (found <= np.ceil(share + 1e-9)).all()
    assert np.abs(found.mean(0) - share).max() < 2e-3  # the mean over u, by the midpoint rule


@pytest.mark.parametrize("u", [2.0**-33, 0.5, 1.0])
def test_a_row_of_weight_zero_is_never_taken(u):
    log_weights = torch.full((11,), -math.inf, dtype=torch.float64)
    log_weights[[3, 7]] = torch.tensor([-1000.0, -1001.0], dtype=torch.float64)
    found = counts(log_weights, torch.tensor(u))
    assert found[3] + found[7] == 11 and found[3] in (8, 9)


def test_equal_weights_take_each_row_once():
    for u in (2.0**-33, 0.5, 0.999):
        assert (counts(torch.zeros(11, dtype=torch.float64), torch.tensor(u)) == 1).all()


def test_only_poor_populations_are_resampled_and_the_mean_weight_stays():
    log_weights = torch.from_numpy(scipy.stats.norm.rvs(size=(5, 16), random_state=2))
    log_weights *= torch.tensor([[0.3], [5.0], [5.0], [5.0], [1.0]])
    log_weights[4] = 700.0  # beyond exp
    states = torch.arange(5 * 16 * 6.0).reshape(5, 16, 2, 3)
    w = np.exp(log_weights.numpy() - log_weights.numpy().max(1, keepdims=True))
    share = w.sum(1) ** 2 / (16 * (w**2).sum(1))
    np.testing.assert_allclose(weighted.ess(log_weights), share, rtol=1e-12)
    assert (share < 0.5).tolist() == [False, True, True, True, False]
    u = torch.linspace(0.1, 0.9, 5)
    z, a = weighted.resampled(states, log_weights, u)
    np.testing.assert_allclose(weighted.log_mean(a), weighted.log_mean(log_weights), rtol=1e-12)
    for i, poor in enumerate(share < 0.5):
        rows = weighted.systematic(log_weights[i], u[i]) if poor else torch.arange(16)
        assert torch.equal(z[i], states[i][rows])
        assert torch.equal(a[i], a[i, :1].expand(16) if poor else log_weights[i])


def test_the_standard_error_is_that_of_independent_blocks():
    log_weights = torch.from_numpy(scipy.stats.norm.rvs(size=16 * 7, random_state=3)) + 900
    means = np.exp(log_weights.numpy() - 900).reshape(16, 7).mean(1)
    found = weighted.log_z(log_weights)
    assert found.value.item() == pytest.approx(900 + math.log(means.mean()), rel=1e-12)
    assert found.error.item() == pytest.approx(means.std(ddof=1) / 4 / means.mean(), rel=1e-9)


# --------------------------------------------------------------------------- a changing energy, and short transitions


SD, CHANGES, STEPS = 1.0, 12, 2
SHIFT = 2.5


def energy(t):
    """From the energy of N(0, SD^2), not normalised, to a ragged one elsewhere, faster than its chains follow."""
    part = t / CHANGES
    return lambda x: (0.5 * ((x - SHIFT * part) / SD).square() + part * (3 * x).cos()).sum(-1) - 3 * part


def exact():
    """Z and Z E[x^2] of the last energy, by quadrature in float64."""

    def density(x, power):
        u = energy(CHANGES)(torch.tensor([[x]], dtype=torch.float64)).item()
        return x**power * math.exp(-u)

    return [scipy.integrate.quad(density, -12, 12, args=(power,), limit=200)[0] for power in (0, 2)]


def scores(kind, blocks):
    """How many standard errors the blocks' estimates of the two are out, after all changes."""
    population = kind(SD * noise.normal((32 * blocks, 1), seed=4, step=0, stream=noise.Stream.START), blocks)
    population.begin(energy(0), SD)
    never = torch.tensor(False)
    for t in range(CHANGES):
        z = MALA(0.2).run(energy(t), population.states, steps=STEPS, seed=4, step=t * STEPS, compile=False)
        population.keep(z, unless=never)
        u = noise.uniform((blocks,), seed=4, step=t, stream=noise.Stream.RESAMPLING)
        population.reweigh(energy(t)(z) - energy(t + 1)(z), u, unless=never)
    w = population.log_weights.view(blocks, -1).exp()
    x2 = population.states.double().square().view(blocks, -1)
    found = [w.mean(1).numpy(), (w * x2).mean(1).numpy()]
    return [(x.mean() - true) / (x.std(ddof=1) / math.sqrt(blocks)) for x, true in zip(found, exact(), strict=True)]


class Forgetful(weighted.Population):
    def reweigh(self, change, u, unless):
        super().reweigh(torch.zeros_like(change), u, unless)


class Backwards(weighted.Population):
    def reweigh(self, change, u, unless):
        super().reweigh(-change, u, unless)


def keeping_weights(states, log_weights, u, right=weighted.resampled):
    return right(states, log_weights, u)[0], log_weights


def never(states, log_weights, u):
    return states, log_weights


@pytest.mark.parametrize(
    ("kind", "resampled", "right"),
    [
        (weighted.Population, weighted.resampled, True),
        (weighted.Population, never, True),
        (Forgetful, weighted.resampled, False),
        (Backwards, weighted.resampled, False),
        (weighted.Population, keeping_weights, False),
    ],
    ids=["as it is", "without resampling", "no weights", "the sign flipped", "resampled, weights kept"],
)
def test_weighted_averages_are_those_of_the_last_energy(kind, resampled, right, monkeypatch):
    blocks, bound = 512, scipy.stats.norm.isf(FALSE_ALARM / 2 / 2)
    seen = []

    def watched(states, log_weights, u):
        seen.append((weighted.ess(log_weights) < 0.5).sum().item())
        return resampled(states, log_weights, u)

    monkeypatch.setattr(weighted, "resampled", watched)
    found = scores(kind, blocks)
    assert (max(map(abs, found)) < bound) == right, found
    assert kind is Forgetful or sum(seen) > blocks  # each block was resampled, in the mean, or would have been


def test_nothing_changes_where_an_update_is_broken():
    start = weighted.WeightedStart(8, 16, (3,), 1.5, seed=1)
    start.begin(lambda x: x.square().sum(1))
    before = {name: x.clone() for name, x in start.tensors().items()}
    broken = torch.tensor(True)
    start.keep(0, torch.full((8, 3), math.nan), unless=broken)
    start.witnesses.keep(torch.full((16, 3), math.nan), unless=broken)
    start.walkers.reweigh(torch.full((8,), math.nan), start.uniforms(1)[:1], unless=broken)
    start.witnesses.reweigh(torch.full((16,), math.nan), start.uniforms(1)[1:], unless=broken)
    assert {name: x.shape for name, x in before.items()} == {
        "population": (8, 3), "log_weights": (8,), "witnesses": (16, 3), "witness_log_weights": (16,)
    }  # fmt: skip
    assert all(torch.equal(x, before[name]) for name, x in start.tensors().items())


def test_the_first_weights_are_those_of_importance():
    start = weighted.WeightedStart(8, 16, (2, 3), 1.5, seed=1)
    start.begin(lambda x: x.square().sum((1, 2)) / (2 * 1.5**2) - 7.0)
    wanted = 7.0 + 6 * math.log(1.5 * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(start.walkers.log_weights, np.full(8, wanted), rtol=1e-6)
    start.begin(lambda x: torch.zeros(len(x)))
    for population in (start.walkers, start.witnesses):
        density = scipy.stats.norm(scale=1.5).logpdf(population.states.double().numpy()).sum((1, 2))
        np.testing.assert_allclose(population.log_weights, -density, rtol=1e-6)


def test_witnesses_come_in_blocks():
    with pytest.raises(ValueError, match="witnesses must be a multiple of 16, got 24"):
        weighted.WeightedStart(8, 24, (2,), 1.0, seed=0)
