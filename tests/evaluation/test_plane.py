"""Quadrature against closed forms. Statistical tests use fixed seeds and bounds with their margin stated; each raises
a false alarm once in 1e6 seeds."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import MultivariateNormal

from fastanila.evaluation import distances, plane, quadrature


class Gaussian:
    """N(0, s**2 I) with the face of a fastanila.data density; closed=False hides what is known of it."""

    name, box, modes = "gaussian", (-4.0, 4.0), None

    def __init__(self, s=0.5, closed=True):
        self.s = s
        self.log_density = self._log_density if closed else None
        self.entropy = 1 + math.log(2 * math.pi * s**2) if closed else None

    def _log_density(self, x):
        return -0.5 * x.square().sum(1) / self.s**2 - math.log(2 * math.pi * self.s**2)

    def draw(self, count, *, seed, step, purpose="train", offset=0, device=None):
        assert purpose == "held-out", "an evaluation must not see the training draws"
        generator = torch.Generator().manual_seed(hash((seed, step, offset)))
        return (self.s * torch.randn(count, 2, generator=generator)).to(device)


def gaussian(mean, covariance):
    law = MultivariateNormal(torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64))
    return law, lambda x: -law.log_prob(x.double())


A, ENERGY_A = gaussian([0.2, -0.3], [[0.8, 0.3], [0.3, 0.5]])
B, ENERGY_B = gaussian([-0.1, 0.4], [[0.6, -0.1], [-0.1, 0.9]])
CELLS = quadrature.grid((-7.0, 7.0), 300)


def test_grid_covers_the_box_with_x_first():
    cells = quadrature.grid((-1.0, 2.0), 3)
    assert cells.cell_area == 1.0 and cells.points.dtype == torch.float64
    assert cells.points.view(3, 3, 2)[0, 2].tolist() == [-0.5, 1.5]
    with pytest.raises(ValueError, match="box"):
        quadrature.grid((1.0, 1.0))


def test_the_energy_sees_float32_batches_without_a_graph():
    weight = torch.tensor(2.0, requires_grad=True)
    seen = []

    def energy(x):
        seen.append((len(x), x.dtype))
        return weight * x.square().sum(1)

    cells = quadrature.grid((-1.0, 1.0), 10)
    u = quadrature.energy_on_grid(energy, cells, batch=64)
    assert seen == [(64, torch.float32), (36, torch.float32)]
    assert u.dtype == torch.float64 and u.shape == (100,) and not u.requires_grad


@pytest.mark.parametrize("s", [0.3, 1.0])
def test_log_normalizer_and_entropy_of_a_gaussian(s):
    def energy(x):
        return 0.5 * x.double().square().sum(1) / s**2

    cells = quadrature.grid((-8 * s, 8 * s), 200)
    assert quadrature.log_normalizer(energy, cells) == pytest.approx(math.log(2 * math.pi * s**2), abs=1e-6)
    log_p = quadrature.model_log_density(energy, cells)
    assert quadrature.entropy(log_p, cells) == pytest.approx(1 + math.log(2 * math.pi * s**2), abs=1e-6)


def test_kl_and_cross_entropy_of_two_gaussians():
    p, q = (quadrature.model_log_density(e, CELLS) for e in (ENERGY_A, ENERGY_B))
    true = torch.distributions.kl_divergence(A, B).item()
    assert quadrature.kl(p, q, CELLS) == pytest.approx(true, abs=1e-6)
    assert quadrature.cross_entropy(p, q, CELLS) == pytest.approx(true + A.entropy().item(), abs=1e-6)
    assert quadrature.kl(p, p, CELLS) == 0.0


@pytest.mark.parametrize("distance", [0.1, 1.0, 3.0])
def test_total_variation_of_shifted_gaussians(distance):
    cells = quadrature.grid((-8.0, 8.0), 400)
    p, q = (
        quadrature.model_log_density(lambda x, m=m: 0.5 * (x.double() - torch.tensor([m, 0.0])).square().sum(1), cells)
        for m in (-distance / 2, distance / 2)
    )
    true = math.erf(distance / 2 / math.sqrt(2))  # 2 Phi(d / 2) - 1
    assert quadrature.total_variation(p, q, cells) == pytest.approx(true, abs=2e-4)  # |p - q| has a kink: O(1 / n**2)


def test_total_variation_of_disjoint_densities_is_one():
    log_p = torch.full((CELLS.n**2,), -math.inf, dtype=torch.float64)
    log_q = log_p.clone()
    log_p[0], log_q[1] = (-math.log(CELLS.cell_area),) * 2
    assert quadrature.total_variation(log_p, log_q, CELLS) == pytest.approx(1)
    assert quadrature.kl(log_p, log_q, CELLS) == math.inf
    assert quadrature.entropy(log_p, CELLS) == pytest.approx(math.log(CELLS.cell_area))  # one cell, and no 0 * inf


def test_a_smooth_integral_converges_faster_than_a_kinked_one():
    smooth = [quadrature.log_normalizer(ENERGY_A, quadrature.grid((-7.0, 7.0), n)) for n in (10, 30)]
    assert abs(smooth[0]) > 1e-4 and abs(smooth[1]) < 1e-6

    def cone(x):
        return x.double().norm(dim=1)  # the integral of exp(-|x|) over the plane is 2 pi

    errors = [
        quadrature.log_normalizer(cone, quadrature.grid((-30.0, 30.0), n)) - math.log(2 * math.pi) for n in (200, 400)
    ]
    assert 0 < abs(errors[1]) < abs(errors[0]) / 3.5


def test_a_mixture_is_normalised_whatever_its_weights():
    def energy(x):
        return -torch.logsumexp(torch.stack([math.log(0.3) - ENERGY_A(x), math.log(0.7) - ENERGY_B(x)]), 0)

    assert quadrature.log_normalizer(energy, CELLS) == pytest.approx(0, abs=1e-6)
    log_p = quadrature.model_log_density(energy, CELLS)
    assert log_p.exp().sum().item() * CELLS.cell_area == pytest.approx(1, abs=1e-12)
    assert (log_p + energy(CELLS.points)).abs().max() < 1e-4  # the energy saw float32 points


def test_a_constant_changes_nothing_but_log_z():
    shifted = quadrature.model_log_density(lambda x: ENERGY_A(x) + 7.5, CELLS)
    assert torch.allclose(shifted, quadrature.model_log_density(ENERGY_A, CELLS), atol=1e-12, rtol=0)
    moved = quadrature.log_normalizer(lambda x: ENERGY_A(x) + 7.5, CELLS) - quadrature.log_normalizer(ENERGY_A, CELLS)
    assert moved == pytest.approx(-7.5, abs=1e-12)
    density = Gaussian()
    plain, other = (plane.evaluate(lambda x, c=c: ENERGY_A(x) + c, density, resolution=80) for c in (0.0, -1000.0))
    assert plain == pytest.approx(other, abs=1e-9)


def test_infinite_energies_are_no_mass_and_nan_is_seen():
    def half(x):
        return torch.where(x[:, 0] > 0, ENERGY_A(x), math.inf)

    p = quadrature.model_log_density(half, CELLS)
    assert math.isfinite(quadrature.entropy(p, CELLS)) and quadrature.total_variation(p, p, CELLS) == 0
    assert quadrature.kl(quadrature.model_log_density(ENERGY_A, CELLS), p, CELLS) == math.inf
    broken = plane.evaluate(lambda x: x[:, 0] * math.nan, Gaussian(), resolution=20)
    assert math.isnan(broken["nll"]) and math.isnan(broken["tv"])


def test_held_out_nll():
    s, density = 0.8, Gaussian(0.5)
    cells = quadrature.grid((-6.0, 6.0), 200)
    nll = quadrature.held_out_nll(lambda x: 0.5 * x.double().square().sum(1) / s**2, density, cells)
    assert nll == pytest.approx(math.log(2 * math.pi * s**2) + 0.5**2 / s**2, abs=1e-6)


def test_the_estimate_from_draws_has_the_stated_error():
    samples = 1_000_000
    cells = quadrature.grid((-4.0, 4.0), 200)
    true = quadrature.data_log_density(Gaussian(), cells)
    estimate = quadrature.data_log_density(Gaussian(closed=False), cells, samples=samples)
    # The stated bound is on the mean with C cells; C = those within 4.5 standard deviations holds 0.99996 of the
    # mass. The TV of 1e6 draws moves by less than sqrt(ln(1e6) / 2 / samples) = 0.003 but once in 1e6 (McDiarmid).
    occupied = (cells.points.norm(dim=1) < 4.5 * 0.5).sum().item()
    bound = math.sqrt(2 * occupied / (math.pi * samples)) / 3
    tv = quadrature.total_variation(true, estimate, cells)
    assert bound / 10 < tv < bound + 0.003
    # a cell's blur adds h**2 / 6 to each variance: h**2 / (6 s**2) to the entropy; the draws' own is 1 / sqrt(samples)
    blur = 0.04**2 / (6 * 0.5**2)
    bias = 2 * occupied / (9 * samples)
    error = quadrature.entropy(estimate, cells) - quadrature.entropy(true, cells)
    assert -bias - 0.005 < error < blur + 0.005

    def energy(x):
        return 0.5 * x.double().square().sum(1)

    plain, drawn = (
        quadrature.cross_entropy(p, quadrature.model_log_density(energy, cells), cells) for p in (true, estimate)
    )
    # U has variance s**4 under the data: 4.9 standard deviations are crossed once in 1e6
    assert abs(drawn - plain) < 0.04**2 / 6 + 4.9 * 0.5**2 / math.sqrt(samples)


def test_histogram_counts_the_edges_and_what_is_lost():
    box = (-1.0, 1.0)
    samples = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-0.5, 0.5], [1.1, 0.0], [math.nan, 0.0]])
    counts = plane.histogram(samples, box, 2) * 5
    assert counts.tolist() == [[1, 1], [0, 1]]
    inside = plane.histogram(samples[:3], box, 2)
    assert inside.sum() == 1 and inside.dtype == torch.float64
    assert plane.histogram_tv(inside, plane.histogram(samples, box, 2)) == pytest.approx(0.4)
    outside = plane.histogram(torch.full((7, 2), 3.0), box, 2)
    assert plane.histogram_tv(inside, outside) == 1 and plane.histogram_tv(outside, outside) == 0
    with pytest.raises(ValueError, match="samples"):
        plane.histogram(torch.empty(0, 2), box, 2)


def test_the_masses_of_bins_that_cut_cells():
    # of a Gaussian whose two axes differ, by its distribution function
    cells = quadrature.grid((-7.0, 7.0), 400)
    _, energy = gaussian([0.5, -1.0], [[0.8, 0.0], [0.0, 1.5]])
    edges = np.linspace(-3.0, 2.0, 8)
    x, y = (np.diff(scipy.stats.norm.cdf(edges, m, math.sqrt(v))) for m, v in ((0.5, 0.8), (-1.0, 1.5)))
    found = plane.bin_masses(quadrature.model_log_density(energy, cells), cells, (-3.0, 2.0), 7)
    assert found.shape == (7, 7) and found.dtype == torch.float64
    assert np.abs(found.numpy() - np.outer(x, y)).max() < 1e-5
    # a uniform density, of which every bin has what it covers, also where it reaches out of the square
    flat = quadrature.model_log_density(lambda x: 0 * x[:, 0], quadrature.grid((0.0, 1.0), 5))
    found = plane.bin_masses(flat, quadrature.grid((0.0, 1.0), 5), (-0.5, 1.0), 3)
    assert torch.allclose(found, torch.tensor([[0, 0, 0], [0, 0.25, 0.25], [0, 0.25, 0.25]], dtype=torch.float64))


def test_draws_on_a_grid_have_the_law():
    cells = quadrature.grid((-6.0, 6.0), 200)
    law, energy = gaussian([0.5, -1.0], [[0.8, 0.6], [0.6, 1.5]])
    log_p, count = quadrature.model_log_density(energy, cells), 200_000
    x = quadrature.draw(log_p, cells, count, seed=1, step=5)
    assert x.shape == (count, 2) and x.dtype == torch.float32
    assert torch.equal(x, quadrature.draw(log_p, cells, count, seed=1, step=5))
    assert not torch.equal(x[:9], quadrature.draw(log_p, cells, 9, seed=1, step=6))
    # made N(0, I) by the law's own root: a test of each axis and of the angle; Kolmogorov and Smirnov's bound for
    # 1e-6 in all three is sqrt(ln(6e6) / 2 / count) = 0.0062; the cells' blur of 0.06**2 / 12 / 0.8 is 1 % of it
    white = torch.linalg.solve_triangular(law.scale_tril, (x.double() - law.mean).T, upper=False)
    angle = torch.atan2(white[1], white[0]) / (2 * math.pi) + 0.5
    for values, cdf in ((white[0], "norm"), (white[1], "norm"), (angle, "uniform")):
        assert scipy.stats.kstest(values.numpy(), cdf).statistic < 0.0063


def test_draws_within_a_cell_are_uniform_and_empty_cells_have_none():
    cells = quadrature.grid((-1.0, 3.0), 2)  # 2 * 2 cells of side 2, of which (right, low) has no mass
    log_p = quadrature.normalised(torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=torch.float64).log(), cells)
    count = 100_000
    x = quadrature.draw(log_p, cells, count, seed=0, step=0).double()
    masses = plane.histogram(x, (-1.0, 3.0), 2)
    assert masses[1, 0] == 0 and masses.sum() == 1
    # 5.2 standard errors for three numbers at 1e-6
    assert (masses - torch.tensor([[0.25, 0.5], [0, 0.25]])).abs().max() < 5.2 * 0.5 / math.sqrt(count)
    bound = math.sqrt(math.log(6e6) / 2 / count)
    within = (x + 1) % 2 / 2
    products = within[:, 0] * within[:, 1]  # of two independent uniforms: P(xy < t) = t (1 - ln t)
    for values, cdf in (
        (within[:, 0], lambda t: t),
        (within[:, 1], lambda t: t),
        (products, lambda t: t - t * np.log(t)),
    ):
        assert scipy.stats.kstest(values.numpy(), cdf).statistic < bound
    broken = quadrature.draw(log_p * math.nan, cells, 3, seed=0, step=0)
    assert broken.shape == (3, 2) and broken.isnan().all()


def exact_draws(s, seed):
    """count -> (count, 2) draws of N(0, s**2 I)."""
    return lambda count: s * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def test_chain_distances_by_their_definitions():
    density, box, n = Gaussian(1.0), (-4.0, 4.0), 300
    chains, draws = exact_draws(1.5, 1)(n), exact_draws(1.0, 2)
    cells = quadrature.grid((-5.0, 5.0), 200)
    found = plane.chain_distances(chains, quadrature.data_log_density(density, cells), cells, draws, box=box, bins=16)
    everything = draws(8 * n + 10_000)
    sets, reference = [chains, *everything[: 8 * n].view(8, n, 2)], everything[8 * n :]
    one = np.diff(scipy.stats.norm.cdf(np.linspace(*box, 17)))
    truth = np.outer(one, one)
    tv = []
    for x in sets:
        counts = np.histogram2d(*x.double().numpy().T, bins=16, range=(box, box))[0] / n
        tv.append(0.5 * (np.abs(counts - truth).sum() + abs(counts.sum() - truth.sum())))
    assert found["tv"] == pytest.approx((tv[0], np.mean(tv[1:])), abs=1e-4)
    sw = [distances.sliced_wasserstein(x, reference, 32) for x in sets]
    assert found["sw"] == pytest.approx((sw[0], np.mean(sw[1:])), rel=1e-12)
    mmd = [distances.mmd(x, reference[::10]) for x in sets]
    assert found["mmd"] == pytest.approx((mmd[0], np.mean(np.square(mmd[1:])) ** 0.5), rel=1e-12)
    assert all(value > 1.2 * floor > 0 for value, floor in found.values())  # and chains too wide are seen by all


@pytest.mark.slow
def test_distances_of_chains_tell_the_samplers_error_from_the_models():
    n = 4000

    def evaluated(model, chains, closed=True):
        """Of data N(0, 0.8**2 I) and a model and chains of the standard deviations given."""
        draws = exact_draws(chains, 3)(n)
        data = Gaussian(0.8, closed)
        return plane.evaluate(
            lambda x: 0.5 * x.double().square().sum(1) / model**2, data, draws, resolution=200, bins=16
        )

    good, wrong_model, wrong_sampler = evaluated(0.8, 0.8, closed=False), evaluated(1.0, 1.0), evaluated(0.8, 1.0)
    # McDiarmid: the TV of 4000 draws is within sqrt(ln(2e6) / 2 / 4000) = 0.043 of its mean but once in 1e6, the mean
    # of eight nearer still. Sliced distances of 4000 draws have a standard deviation of less than half their mean and
    # Gaussian tails: 5 of them. MMD's is of the floor, whose tails are exponential: 14 of them.
    allowed = {"tv": lambda floor: 0.043, "sw": lambda floor: 2.5 * floor, "mmd": lambda floor: 14 * floor}
    for report, near, far in (
        (good, ("", "_model"), ()), (wrong_model, ("_model",), ("",)), (wrong_sampler, (), ("", "_model"))
    ):  # fmt: skip
        for name, bound in allowed.items():
            for of in (*near, *far):
                value, floor = report[f"{name}_chains{of}"], report[f"{name}_chains{of}_floor"]
                assert floor > 0 and (value - floor < bound(floor)) == (of in near), (name, of)


def test_chains_that_are_not_finite_are_seen():
    chains = exact_draws(0.5, 0)(100)
    chains[3] = math.nan
    report = plane.evaluate(lambda x: 2 * x.double().square().sum(1), Gaussian(), chains, resolution=100)
    assert math.isnan(report["sw_chains"]) and math.isnan(report["mmd_chains_model"])
    assert math.isfinite(report["sw_chains_floor"]) and report["tv_chains"] > 0
    broken = plane.evaluate(lambda x: x[:, 0] * math.nan, Gaussian(), chains[4:], resolution=100)
    assert math.isfinite(broken["tv_chains"]) and math.isnan(broken["quadrature_error"])
    assert all(math.isnan(value) for key, value in broken.items() if "model" in key)


@pytest.mark.parametrize("closed", [True, False])
def test_the_quadratures_error_is_seen(closed):
    data = Gaussian(0.5, closed)  # box (-4, 4), integrated over (-5, 5)

    def error(s, resolution):
        """What is reported, and the true error of nll, for a model N(0, s**2 I)."""
        report = plane.evaluate(lambda x: 0.5 * x.double().square().sum(1) / s**2, data, resolution=resolution)
        true = math.log(2 * math.pi * s**2) + 0.5**2 / s**2
        return report["quadrature_error"], abs(report["nll"] - true)

    reported, true = error(0.8, 300)
    # nll of 4 million draws: its standard error is 0.5**2 / 0.8**2 / 2000 = 0.0002, and the cells' blur of its
    # variance at most (1 / 15)**2 / 6 / 0.8**2 = 0.0012; 4.9 standard errors
    # closed, the nll is exact, and what moves is the tv, which has a kink
    assert (reported < 1e-3 and true < 1e-6) if closed else (reported < 0.0035 and true < 0.0022)
    coarse, true = error(0.2, 20)  # cells of 0.5, two and a half standard deviations
    assert coarse > true > 0.01
    coarse, true = error(0.8, 7)  # of 1.4, where the data's standard deviation is 0.5
    assert coarse > 0.1
    small, true = error(5.0, 300)  # a square that ends one standard deviation of the model from its centre
    assert small > 0.2 and true > 0.5


def test_evaluate_reports_floats():
    density = Gaussian(0.5)
    chains = 0.5 * torch.randn(500, 2, generator=torch.Generator().manual_seed(2))

    def model(s):
        return lambda x: 0.5 * x.double().square().sum(1) / s**2

    report = plane.evaluate(model(0.5), density, chains, resolution=200)
    keys = {"nll", "entropy", "gap", "kl", "tv", "boundary_mass", "quadrature_error"}
    keys |= {f"{d}_chains{of}{floor}" for d in ("tv", "sw", "mmd") for of in ("", "_model") for floor in ("", "_floor")}
    assert set(report) == keys and json.loads(json.dumps(report)) == report
    assert all(type(value) is float for value in report.values())
    assert abs(report["gap"]) < 1e-6 and abs(report["kl"]) < 1e-6 and report["tv"] < 1e-6
    assert report["nll"] == pytest.approx(density.entropy, abs=1e-6)
    assert 0 <= report["boundary_mass"] < 1e-12
    wide = plane.evaluate(model(50.0), density, resolution=200)
    assert wide["boundary_mass"] == pytest.approx(1 - (198 / 200) ** 2, rel=0.02) and "tv_chains" not in wide
    assert wide["nll"] == pytest.approx(math.log(10.0**2), abs=0.01)  # nearly uniform on the data's box and a quarter
