"""The kernel on a grid against closed forms. Nothing here is random: a bound is the grid's error with room to spare,
and each is shown to be far below what a wrong kernel would give."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.special import ndtr

from fastanila import data, ergodicity
from fastanila.models import MLP
from fastanila.ops import reference
from fastanila.samplers import SAMPLERS
from fastanila.samplers.hmc import HMC
from fastanila.samplers.langevin import AniLA, GradientDescent, Langevin, TamedLangevin
from fastanila.samplers.metropolis import MALA, AdjustedAniLA
from fastanila.theory import conditions, markov, study, targets
from fastanila.training import run as run_training
from fastanila.training.settings import Settings

NORMAL = targets.normal()


def kernel_of(sampler, target=NORMAL, resolution=300, box=None):
    grid = markov.cells(target.box if box is None else box, resolution)
    return markov.transition_kernel(sampler, target, grid), grid


def law_of(sampler, target=NORMAL, resolution=300, box=None):
    kernel, grid = kernel_of(sampler, target, resolution, box)
    return conditions.stationary(kernel.matrix), kernel, grid


def mutant(drift=1.0, noise=1.0, step_size=0.5):
    """Langevin with its drift or its noise off by a factor."""

    def proposal(z, score):
        return reference.Proposal(z + drift * step_size / 2 * score, torch.full_like(z, noise * math.sqrt(step_size)))

    return SimpleNamespace(is_exact=False, refresh="transition", noise_scale=1.0, proposal=proposal)


def dense(rows):
    return sparse.csr_array(np.array(rows, dtype=float))


# ------------------------------------------------------------------------------------------------------ the kernel


@pytest.mark.parametrize("target", ["normal", "correlated"])
@pytest.mark.parametrize("name", markov.SAMPLER_NAMES)
def test_rows_are_probabilities(name, target):
    kernel, _ = kernel_of(SAMPLERS[name](step_size=0.5), targets.load(target), 40)
    assert kernel.matrix.shape == (len(kernel.target),) * 2
    assert kernel.matrix.data.min() >= 0
    np.testing.assert_allclose(kernel.matrix.sum(1), 1, atol=1e-12)
    assert kernel.target.sum() == pytest.approx(1) and kernel.log_target.max() == 0


@pytest.mark.parametrize("sampler", [Langevin(0.3), AniLA(1.0, 0.5, norm="chain"), TamedLangevin(1.0, 0.5)], ids=repr)
def test_a_row_has_the_mean_and_the_covariance_of_the_proposal(sampler):
    target = targets.correlated(0.5)
    kernel, grid = kernel_of(sampler, target, 64)
    z = torch.from_numpy(grid.centres)
    score = torch.from_numpy(kernel.score)
    gain = {
        Langevin: torch.ones_like(z),
        AniLA: 1 / score.norm(dim=1, keepdim=True).clamp(min=1).expand_as(z),
        TamedLangevin: torch.ones_like(z),
    }[type(sampler)]
    drift = score.clamp(-math.sqrt(2), math.sqrt(2)) if isinstance(sampler, TamedLangevin) else gain * score
    mean = (z + sampler.step_size / 2 * drift).numpy()
    variance = (sampler.step_size * gain).numpy()
    inside = (kernel.lost < 1e-12) & ~kernel.coarse
    assert inside.mean() > 0.15
    first = kernel.matrix @ grid.centres
    np.testing.assert_allclose(first[inside], mean[inside], atol=1e-3)
    second = kernel.matrix @ grid.centres**2 - first**2
    np.testing.assert_allclose(second[inside], variance[inside], rtol=2e-2)  # width / sd is 1.9 at the worst
    cross = kernel.matrix @ grid.centres.prod(1) - first.prod(1)
    np.testing.assert_allclose(cross[inside], 0, atol=1e-3)


def test_what_rounding_adds_to_the_variance_is_taken_off():
    kernel, grid = kernel_of(Langevin(0.05), resolution=100)  # 0.16 wide, sd 0.22
    x = grid.centres[:, 0]
    middle = np.abs(x) < 4
    variance = kernel.matrix @ x**2 - (kernel.matrix @ x) ** 2
    np.testing.assert_allclose(variance[middle], 0.05, rtol=1e-4)
    assert 0.16**2 / 12 > 0.04 * 0.05  # without the correction


def test_a_proposal_narrower_than_half_a_cell_is_reported():
    kernel, grid = kernel_of(AniLA(1.0, 0.03), resolution=100)
    x = np.abs(grid.centres[:, 0])
    assert (kernel.coarse == (np.sqrt(0.03 / x.clip(min=1)) < 0.1)).all()  # 0.2 wide
    assert 0 < kernel.coarse.sum() < 100


def test_what_leaves_the_box_goes_to_the_border_cells():
    sampler = Langevin(1.0)
    kernel, grid = kernel_of(sampler, resolution=40, box=((-1.0, 1.0),))
    x = grid.centres[:, 0]
    matrix = kernel.matrix.toarray()
    sd = math.sqrt(1 - 0.05**2 / 12)
    np.testing.assert_allclose(matrix[:, -1], ndtr(-(0.95 - x / 2) / sd), rtol=1e-10)
    np.testing.assert_allclose(kernel.lost, ndtr(-(1 - x / 2) / sd) + ndtr((-1 - x / 2) / sd), rtol=1e-10)
    law = conditions.stationary(kernel.matrix)
    assert law[0] > 5 * law[1]


def test_what_leaves_the_box_is_rejected_by_an_adjusted_sampler():
    law, kernel, _ = law_of(MALA(1.0), resolution=100, box=((-1.0, 1.0),))
    assert (kernel.matrix.diagonal() >= kernel.lost).all() and kernel.lost.min() > 0.3
    assert conditions.total_variation(law, kernel.target) < 1e-6


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (HMC(0.1, 3), "normals"),
        (GradientDescent(0.1), "point mass"),
        (AniLA(1.0, 0.1, refresh="update"), "state alone"),
    ],
)
def test_samplers_without_such_a_kernel_are_refused(sampler, message):
    with pytest.raises(ValueError, match=message):
        kernel_of(sampler)


def test_a_target_must_be_finite_on_its_box():
    target = dataclasses.replace(NORMAL, energy=lambda x: -x[:, 0].log())
    with pytest.raises(ValueError, match="finite"):
        kernel_of(Langevin(0.1), target)
    with pytest.raises(ValueError, match="box"):
        markov.cells(((1.0, 1.0),), 10)


# ------------------------------------------------------------------------------------- laws and rates of known chains


@pytest.mark.parametrize("eps", [0.1, 0.5, 1.0])
def test_langevin_on_a_normal_has_its_known_law_and_rate(eps):
    law, kernel, grid = law_of(Langevin(eps))
    assert study.variance(law, grid)[0] == pytest.approx(1 / (1 - eps / 4), abs=1e-5)
    assert conditions.geometric_rate(kernel.matrix) == pytest.approx(1 - eps / 2, abs=1e-6)
    exact = markov.normalised(-0.5 * (1 - eps / 4) * grid.centres[:, 0] ** 2)
    assert conditions.total_variation(law, exact) < 1e-5


@pytest.mark.parametrize("wrong", [{"drift": 1.02}, {"noise": 1.002}, {"noise": 0.998}])
def test_the_law_or_the_rate_shows_a_step_that_is_slightly_wrong(wrong):
    law, kernel, grid = law_of(mutant(**wrong))
    variance, rate = study.variance(law, grid)[0], conditions.geometric_rate(kernel.matrix)
    assert max(abs(variance - 1 / (1 - 0.5 / 4)), abs(rate - 0.75)) > 1e-3  # the test above allows 1e-5
    right, _, _ = law_of(mutant())
    assert conditions.total_variation(right, law_of(Langevin(0.5))[0]) < 1e-12


@pytest.mark.parametrize(
    ("eps", "b", "ratio", "tv"),
    [(1, 10, 4 / 3, 0.069), (1, 1, 1.763, 0.153), (1, 0.1, 2.322, 0.349), (0.01, 1, 1.418, 0.103)],
)
def test_anila_on_a_normal_has_the_law_computed_elsewhere(eps, b, ratio, tv):
    """Against an independent quadrature on 2,001 points, to the digits that were kept of it."""
    law, kernel, grid = law_of(AniLA(float(b), float(eps)), resolution=800)
    assert study.variance(law, grid)[0] == pytest.approx(ratio, abs=1e-3)
    assert conditions.total_variation(law, kernel.target) == pytest.approx(tv, abs=1e-3)


def test_langevin_in_the_plane_is_two_chains_on_the_line():
    eps, condition = 0.3, 4.0
    law, kernel, grid = law_of(Langevin(eps), targets.gaussian(condition), 40)
    known = [1 / (1 - eps / 4), 1 / (condition * (1 - condition * eps / 4))]
    np.testing.assert_allclose(study.variance(law, grid), known, rtol=1e-3)
    rate = conditions.geometric_rate(kernel.matrix)  # 1,600 states: by Arnoldi's method
    assert rate == pytest.approx(1 - eps / 2, abs=1e-4)


def test_few_and_many_states_give_the_same(monkeypatch):
    kernel, _ = kernel_of(AniLA(1.0, 0.5), targets.skewed())
    law, rate = conditions.stationary(kernel.matrix), conditions.geometric_rate(kernel.matrix)
    monkeypatch.setattr(conditions, "_DENSE", 10)
    monkeypatch.setattr(conditions, "_SOLVED", 10)
    assert conditions.total_variation(conditions.stationary(kernel.matrix), law) < 1e-9
    assert conditions.geometric_rate(kernel.matrix) == pytest.approx(rate, abs=1e-9)


def test_a_chain_of_two_states_has_known_numbers():
    a, b = 0.3, 0.1
    matrix = dense([[1 - a, a], [b, 1 - b]])
    law = conditions.stationary(matrix)
    np.testing.assert_allclose(law, [b / (a + b), a / (a + b)])
    assert conditions.geometric_rate(matrix) == pytest.approx(1 - a - b)
    found = conditions.distances(matrix, 0, law)
    np.testing.assert_allclose(found, law[1] * (1 - a - b) ** np.arange(len(found)), atol=1e-12)
    assert found[-1] <= 1e-6 < found[-2]
    assert conditions.bound_constant(found, 1 - a - b) == pytest.approx(law[1])
    assert len(conditions.distances(matrix, 0, law, most=3)) == 4


def test_a_chain_with_several_laws_is_refused():
    with pytest.raises(RuntimeError, match="stationary law"):
        conditions.stationary(dense([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]]))


def test_the_tail_start_leaves_out_the_least_likely():
    target = np.array([0.2, 0.5, 0.00004, 0.29986, 0.0001])
    assert [conditions.tail_cell(target, mass) for mass in (1e-5, 1e-4, 2e-4, 0.4)] == [2, 4, 0, 3]


# ------------------------------------------------------------------------------------------------- small-step laws


def small_step_error(sampler, target, resolution, law_as):
    """TV between the closed form and the law extrapolated to a step size of 0 from the sampler's and half of it."""
    coarse, kernel, _ = law_of(sampler, target, resolution)
    fine, _, _ = law_of(dataclasses.replace(sampler, step_size=sampler.step_size / 2), target, resolution)
    closed = markov.normalised(kernel.log_target + law_as(kernel))
    return conditions.total_variation(2 * fine - coarse, closed)


def clipped_by(norm, b=1.0):
    return lambda kernel: markov.log_inverse_gain(kernel.score, b, norm)


@pytest.mark.parametrize("target", [NORMAL, targets.skewed(), targets.logistic(0.5)], ids=lambda t: t.name)
def test_the_small_step_law_on_the_line(target):
    sampler = AniLA(1.0, 0.04)
    assert small_step_error(sampler, target, 500, clipped_by("element")) < 2e-3
    assert small_step_error(sampler, target, 500, lambda kernel: 0.0) > 0.05
    assert small_step_error(sampler, target, 500, clipped_by("element", b=1.1)) > 5e-3
    half = small_step_error(sampler, target, 500, lambda kernel: 0.5 * clipped_by("element")(kernel))
    assert half > 0.02  # sqrt(max(1, |s| / b)), say


@pytest.mark.parametrize("target", [targets.correlated(0.6), targets.banana(0.3)], ids=lambda t: t.name)
def test_the_small_step_law_of_the_chain_norm_where_nothing_is_separable(target):
    sampler = AniLA(1.0, 0.2, norm="chain")
    target = dataclasses.replace(target, box=((-5.0, 5.0), (-5.0, 6.0)))
    assert small_step_error(sampler, target, 44, clipped_by("chain")) < 0.015
    assert small_step_error(sampler, target, 44, clipped_by("element")) > 0.04
    assert small_step_error(sampler, target, 44, lambda kernel: 0.0) > 0.1


def test_the_small_step_law_of_the_element_norm_is_a_product_where_the_target_is():
    sampler = AniLA(1.0, 0.2)
    target = dataclasses.replace(targets.gaussian(2.0), box=((-5.0, 5.0),) * 2)
    assert small_step_error(sampler, target, 40, clipped_by("element")) < 0.01
    assert small_step_error(sampler, target, 40, clipped_by("chain")) > 0.03


def test_which_small_step_laws_are_known():
    def law(sampler, target=NORMAL):
        kernel, _ = kernel_of(sampler, target, 20)
        return markov.small_step_law(sampler, kernel), kernel.target

    assert law(AniLA(1.0, 0.5), targets.correlated())[0] is None
    for sampler in (Langevin(0.5), TamedLangevin(1.0, 0.5), AdjustedAniLA(1.0, 0.5)):
        found, target = law(sampler)
        assert (found == target).all()
    found, target = law(AniLA(1.0, 0.5, norm="chain"), targets.correlated())
    assert conditions.total_variation(found, target) > 0.05


def test_noise_scale_is_a_temperature():
    law, kernel, grid = law_of(Langevin(0.1, noise_scale=0.5))
    assert study.variance(kernel.target, grid)[0] == pytest.approx(0.25, abs=1e-6)
    assert study.variance(law, grid)[0] == pytest.approx(0.25 / (1 - 0.1 / 4), abs=1e-5)


# ----------------------------------------------------------------------------------------------- adjusted samplers


def asymmetry(kernel):
    """Total variation of the stationary flow from i to j and that from j to i."""
    flow = kernel.target[:, None] * kernel.matrix.toarray()
    return 0.5 * np.abs(flow - flow.T).sum()


ADJUSTED = [MALA(0.5), AdjustedAniLA(1.0, 0.5)]


@pytest.mark.parametrize("sampler", ADJUSTED, ids=repr)
@pytest.mark.parametrize("target", [NORMAL, targets.skewed()], ids=lambda t: t.name)
def test_an_adjusted_sampler_has_the_target_for_its_law(sampler, target):
    law, kernel, _ = law_of(sampler, target, 300)
    assert conditions.total_variation(law, kernel.target) < 1e-5
    assert asymmetry(kernel) < 1e-5
    unadjusted = {MALA: Langevin(0.5), AdjustedAniLA: AniLA(1.0, 0.5)}[type(sampler)]
    assert conditions.total_variation(law_of(unadjusted, target, 300)[0], kernel.target) > 0.03


@pytest.mark.parametrize("norm", ["element", "channel", "chain"])
def test_adjusted_anila_has_the_target_for_its_law_in_the_plane(norm):
    sampler, target = (
        AdjustedAniLA(1.5, 0.5, norm),
        dataclasses.replace(targets.correlated(0.5), box=((-4.0, 4.0),) * 2),
    )
    law, kernel, _ = law_of(sampler, target, 32)
    assert conditions.total_variation(law, kernel.target) < 2e-3
    unadjusted, _, _ = law_of(AniLA(1.5, 0.5, norm=norm), target, 32)
    assert conditions.total_variation(unadjusted, kernel.target) > 0.03


@pytest.mark.parametrize("sampler", ADJUSTED, ids=repr)
def test_detailed_balance_fails_by_the_fourth_power_of_the_width(sampler):
    errors = [asymmetry(kernel_of(sampler, resolution=n)[0]) for n in (60, 120, 240)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 1e-7


def without_gains(z, score, energy, y, s, u, threshold, *, step_size, norm):
    """The ratio without the proposals' normalisation."""
    forth, back = (reference.proposal(a, b, threshold, step_size=step_size, norm=norm) for a, b in ((z, score), (y, s)))
    right = RATIO(z, score, energy, y, s, u, threshold, step_size=step_size, norm=norm)
    return right - (forth.sd.log() - back.sd.log()).sum(1)


def stale(z, score, energy, y, s, u, threshold, **settings):
    return RATIO(z, score, energy, y, score, u, threshold, **settings)


def inverted(z, score, energy, y, s, u, threshold, **settings):
    return RATIO(y, s, energy, z, score, u, threshold, **settings)


def without_proposals(z, score, energy, y, s, u, threshold, **settings):
    return energy - u


RATIO = reference.log_accept
MUTANTS = [without_gains, stale, inverted, without_proposals]


@pytest.mark.parametrize("wrong", MUTANTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("target", [NORMAL, targets.skewed()], ids=lambda t: t.name)
def test_a_wrong_acceptance_ratio_shows_in_the_law(wrong, target, monkeypatch):
    monkeypatch.setattr(reference, "log_accept", wrong)
    law, kernel, _ = law_of(AdjustedAniLA(1.0, 0.5), target, 300)
    assert conditions.total_variation(law, kernel.target) > 1e-2  # where the right one gives less than 1e-5
    assert asymmetry(kernel) > 1e-3


def test_mala_is_not_geometrically_ergodic_in_a_light_tail():
    rates = [
        conditions.geometric_rate(kernel_of(MALA(0.5), targets.skewed(), 200, box=((-15.0, high),))[0].matrix)
        for high in (2.0, 3.5, 5.0)
    ]
    assert rates[0] < 0.97 and rates[2] > 1 - 1e-9 and rates == sorted(rates)
    bounded, _ = kernel_of(AdjustedAniLA(1.0, 0.5), targets.skewed(), 400, box=((-15.0, 5.0),))
    assert conditions.geometric_rate(bounded.matrix) < 0.97


# ------------------------------------------------------------------------------------------------------- conditions


def expected_v(mean, variance, beta):
    """E exp(beta y**2 / 2) for y ~ N(mean, variance)."""
    rest = 1 - beta * variance
    return np.exp(beta * mean**2 / (2 * rest)) / np.sqrt(rest)


@pytest.mark.parametrize("beta", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("sampler", [Langevin(0.5), AniLA(1.0, 0.5)], ids=repr)
def test_the_drift_condition_of_a_normal_is_known(sampler, beta):
    kernel, grid = kernel_of(sampler, resolution=600)
    x = np.abs(grid.centres[:, 0])
    gain = 1.0 if isinstance(sampler, Langevin) else 1 / np.maximum(1, x)
    v = np.exp(beta * x**2 / 2)
    after = expected_v(x * (1 - 0.25 * gain), 0.5 * gain, beta)
    ball = conditions.Ball(np.zeros(1), 2.0)
    found = conditions.drift(kernel, grid, ball, beta)
    judged = x <= found.judged_to
    rate = (after / v)[(x > 2) & judged].max()
    assert found.judged_to > 4 and rate < 1
    assert found.rate == pytest.approx(rate, rel=1e-6)
    assert found.kappa == pytest.approx((after - rate * v)[x <= 2].max(), rel=1e-3)
    assert abs(found.worst[0]) == pytest.approx(2, abs=0.03)
    assert found.least_radius == pytest.approx(x[(after >= v) & judged].max(), abs=0.03)
    other = expected_v(x * (1 - 0.25 * gain), 0.505 * gain, beta)  # a mutant: the noise half a percent wider
    assert abs((other / v)[(x > 2) & judged].max() - rate) > 1e-4 * rate


def test_the_drift_condition_fails_on_a_ball_that_is_too_small():
    kernel, grid = kernel_of(Langevin(0.5))
    found = conditions.drift(kernel, grid, conditions.Ball(np.zeros(1), 0.5), 0.25)
    assert found.rate > 1 and found.kappa < 0.1 and abs(found.worst[0]) < 0.6
    assert conditions.drift(kernel, grid, conditions.Ball(np.zeros(1), 1.01 * found.least_radius), 0.25).rate < 1


def test_a_coarse_cell_is_not_judged():
    kernel, grid = kernel_of(AniLA(1.0, 0.03), resolution=100)
    ball = conditions.Ball(np.zeros(1), 2.0)
    found = conditions.drift(kernel, grid, ball, 0.5)
    edge = np.abs(grid.centres[~kernel.coarse]).max()
    assert found.judged_to == edge < 4 and found.rate < 1
    widened = conditions.drift(kernel._replace(coarse=np.zeros(100, bool)), grid, ball, 0.5)
    assert widened.rate > 1.02  # what the proposals that the grid widens would give


def test_an_infinite_expectation_is_not_judged():
    kernel, grid = kernel_of(Langevin(1.0))
    ball = conditions.Ball(np.zeros(1), 1.0)
    assert conditions.drift(kernel, grid, ball, 1.1) is None  # beta eps > 1: E exp(beta y**2 / 2) is infinite
    assert conditions.drift(kernel, grid, ball, 0.5) is not None
    assert conditions.drift(kernel, grid, conditions.Ball(np.zeros(1), 20.0), 0.5) is None
    with pytest.raises(ValueError, match="beta"):
        conditions.drift(kernel, grid, ball, 50.0)


def test_the_minorisation_of_two_states_is_known():
    a, b = 0.3, 0.1
    matrix, both = dense([[1 - a, a], [b, 1 - b]]), np.array([True, True])
    found = conditions.minorisation(matrix, both, 3)
    assert list(found) == [1, 2, 4, 8]
    for m, constant in found.items():
        assert constant == pytest.approx(1 - (1 - a - b) ** m)
    assert conditions.minorisation(matrix, np.array([True, False]), 1) == pytest.approx({1: 1, 2: 1})


@pytest.mark.parametrize("radius", [1.0, 2.0])
def test_the_minorisation_of_langevin_on_a_normal_is_known(radius):
    """The infimum over the ball is over its two ends: eps_m is the overlap of two normals."""
    kernel, grid = kernel_of(Langevin(0.5), resolution=800)
    within = np.abs(grid.centres[:, 0]) <= radius
    end = np.abs(grid.centres[within]).max()
    for m, constant in conditions.minorisation(kernel.matrix, within, 3).items():
        mean, variance = 0.75**m * end, 0.5 * (1 - 0.75 ** (2 * m)) / (1 - 0.75**2)
        assert constant == pytest.approx(2 * ndtr(-mean / math.sqrt(variance)), rel=1e-3)
    larger = conditions.minorisation(kernel.matrix, np.abs(grid.centres[:, 0]) <= radius + 0.1, 0)[1]
    assert larger < 0.9 * conditions.minorisation(kernel.matrix, within, 0)[1]


def test_the_ball_holds_the_mass_it_should():
    for target, mass, radius in ((NORMAL, 0.95, 1.96), (targets.gaussian(), 0.5, math.sqrt(2 * math.log(2)))):
        grid = markov.cells(target.box, 300)
        law = markov.normalised(-target.energy(torch.from_numpy(grid.centres)).numpy())
        ball = conditions.mass_ball(law, grid.centres, law @ grid.centres, mass)
        assert ball.radius == pytest.approx(radius, abs=0.05)
        assert law[ball.holds(grid.centres)].sum() == pytest.approx(mass, abs=0.02)


# ------------------------------------------------------------------------------------------------------- the targets


@pytest.mark.parametrize(
    ("name", "parameter", "mean", "variance"),
    [
        ("normal", None, [0], [1]),
        ("normal", 3.0, [0], [9]),
        ("skewed", 2.0, [-2 * np.euler_gamma], [4 * math.pi**2 / 6]),
        ("logistic", 0.5, [0], [math.pi**2 / 12]),
        ("gaussian", 9.0, [0, 0], [1, 1 / 9]),
        ("correlated", 0.7, [0, 0], [1, 1]),
        ("banana", 0.5, [0, 0], [1, 1.5]),
    ],
)
def test_a_target_has_its_known_moments(name, parameter, mean, variance):
    target = targets.load(name, parameter)
    kernel, grid = kernel_of(Langevin(0.1), target, 400 if len(target.box) == 1 else 64)
    np.testing.assert_allclose(kernel.target @ grid.centres, mean, atol=1e-3)
    np.testing.assert_allclose(study.variance(kernel.target, grid), variance, rtol=1e-3)
    assert kernel.target[grid.border].sum() < 1e-6
    if name == "correlated":
        assert kernel.target @ grid.centres.prod(1) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("name", [*targets.PLAIN, "double-well"])
def test_a_target_lies_in_its_box(name):
    target = targets.load(name)
    grid = markov.cells(target.box, 150)
    energy = target.energy(torch.from_numpy(grid.centres)).numpy()
    assert markov.normalised(-energy)[grid.border].sum() < 1e-6
    if name in targets.PLAIN:
        assert np.exp(-energy).sum() * grid.volume == pytest.approx(1, abs=1e-3)
        assert target.box[0][1] > data.box_of(name)[1]


def test_the_wells_are_as_deep_as_their_parameter():
    energy = targets.double_well(3.0).energy(torch.tensor([[-1.0], [0.0], [1.0]]))
    assert energy.tolist() == [0, 3, 0]


@pytest.mark.parametrize(
    ("name", "parameter", "message"),
    [
        ("cauchy", None, "cauchy"),
        ("rings", 1.0, "no parameter"),
        ("normal", -1.0, "parameter"),
        ("correlated", 1.0, "parameter"),
    ],
)
def test_a_target_that_cannot_be_is_refused(name, parameter, message):
    with pytest.raises(ValueError, match=message):
        targets.load(name, parameter)


def a_run(sampler, shape=(4, 2)):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = MLP(2, width=16, depth=1, confinement=4.0)
    return run_training.Run(energy, sampler, torch.zeros(shape), Settings(data="rings"), 10)


def test_a_learned_energy_is_a_target():
    run = a_run(AniLA(1.0, 0.1))
    target = study.learned(run)
    assert target.box == ((-6.25, 6.25),) * 2
    x = torch.randn(5, 2, dtype=torch.float64)
    assert target.energy(x).dtype == torch.float64
    torch.testing.assert_close(target.energy(x).float(), run.energy(x.float()))
    kernel, grid = kernel_of(run.sampler, target, 24)
    differences = np.gradient(kernel.log_target.reshape(24, 24), grid.edges[0][1] - grid.edges[0][0], axis=0)
    np.testing.assert_allclose(kernel.score[:, 0].reshape(24, 24)[2:-2], differences[2:-2], atol=0.2)
    assert np.abs(kernel.score[:, 0]).max() > 10


def test_a_clamped_run_lives_in_its_bounds_and_images_have_no_grid():
    assert study.learned(a_run(AniLA(1.0, 0.1, bounds=(-5, 5)))).box == ((-5.0, 5.0),) * 2
    with pytest.raises(ValueError, match="two dimensions"):
        study.learned(a_run(Langevin(0.1), (4, 3, 8, 8)))


# ------------------------------------------------------------------------------------------------------- the command


def test_a_family_is_as_slow_as_its_slowest_member(tmp_path, capsys):
    arguments = "--target normal --sampler langevin --step-size 0.2 0.5 1 --parameter 1 0.8 --resolution 200"
    assert ergodicity.main([*arguments.split(), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "all: rate 0.90000" in printed.out
    report = json.loads((tmp_path / "out" / "ergodicity.json").read_text())
    assert (tmp_path / "out" / "ergodicity.png").read_bytes()[1:4] == b"PNG"
    members, whole = report["members"], report["uniform"]
    assert len(members) == 6 and members[0]["label"] == "parameter 1, step_size 0.2"
    assert whole["rate"] == pytest.approx(0.9, abs=1e-6) == max(m["rate"] for m in members)
    assert whole["drift"] == {k: max(m["drift"][k] for m in members) for k in ("rate", "kappa")}
    assert whole["drift"]["rate"] < 1
    assert whole["minorisation"]["4"] == min(m["minorisation"]["4"] for m in members) > 0
    assert report["ball"]["radius"] == pytest.approx(1.96, abs=0.1)  # the wider target's
    for m in members:
        assert m["tv_to_target"] == m["tv_to_small_step_law"] > 0.005


def test_a_ball_too_small_for_the_drift_condition_is_widened():
    target, sampler = targets.correlated(0.6), AniLA(1.0, 0.5, norm="chain")
    results = [study.analyse(study.Member(target, None, sampler), 40)]
    grid, kernel = results[0].grid, results[0].kernel
    least = conditions.mass_ball(kernel.target, grid.centres, np.zeros(2))
    assert conditions.drift(kernel, grid, least, 0.25).rate > 1
    wide = study.common_ball(results, 0.25, None)
    assert wide.radius > least.radius and conditions.drift(kernel, grid, wide, 0.25).rate < 1
    assert study.common_ball(results, 0.25, 0.5).radius == 0.5


def test_a_condition_that_fails_is_said_to(capsys):
    assert ergodicity.main("--sampler langevin --step-size 0.5 --resolution 200 --radius 0.5".split()) == 0
    assert "drift fails: lambda 1." in capsys.readouterr().out


def test_the_command_takes_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ergodicity, "load", lambda directory, device: a_run(AniLA(3.0, 0.3)))
    arguments = [
        "--run",
        "somewhere",
        "--resolution",
        "28",
        "--norm",
        "chain",
        "--threshold",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert ergodicity.main(arguments) == 0
    report = json.loads((tmp_path / "ergodicity.json").read_text())
    assert report["target"] == "rings (learned)" and report["sampler"] == "AniLA"
    settings = report["members"][0]["settings"]
    assert (settings["threshold"], settings["norm"], settings["step_size"]) == (2.0, "chain", 0.3)
    assert report["members"][0]["rate"] < 1
    assert ergodicity.main(["--run", "somewhere", "--parameter", "2"]) == 2
    assert "parameter" in capsys.readouterr().err


def test_what_the_grid_cannot_resolve_is_warned_of(capsys):
    arguments = "--sampler anila --threshold 0.5 --step-size 0.005 --resolution 40 --box -2 2"
    assert ergodicity.main(arguments.split()) == 0
    error = capsys.readouterr().err
    assert "--box" in error and "--resolution" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sampler langevin --threshold 1", "threshold is not a setting of Langevin"),
        ("--sampler mala --step-size -1", "step_size"),
        ("--target rings --parameter 2", "no parameter"),
        ("--resolution 1", "resolution"),
        ("--run no-such-run", "no-such-run"),
    ],
)
def test_bad_arguments_end_with_a_reason(arguments, message, capsys):
    assert ergodicity.main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_the_table_shows_which_biases_vanish():
    lines = study.table(step_sizes=(0.5, 0.05), thresholds=(1.0,), resolution=700).splitlines()
    assert lines[0] == "| target | sampler | b | eps = 0.5 | eps = 0.05 | eps -> 0 |"
    rows = {tuple(row[:2]): row[3:] for row in ([c.strip() for c in line.split("|")[1:-1]] for line in lines[2:])}
    assert len(rows) == 10

    def tv(cell):
        return float(cell.split()[0])

    for target in ("normal", "skewed"):
        for name in ("langevin", "tamed"):
            first, second, least = map(tv, rows[target, name])
            assert first > 5 * second > 0 and least == 0
        assert all(0.09 < tv(cell) < 0.14 for cell in rows[target, "anila"])
        for name in ("mala", "anila-mh"):
            assert all(cell == "0.000 (1.000)" for cell in rows[target, name])
    assert rows["normal", "langevin"][0] == "0.032 (1.143)"
