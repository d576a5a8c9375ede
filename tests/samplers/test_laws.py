"""The laws that the samplers claim, against quadrature. Each test names wrong samplers that it refuses; false alarms of
the right one: 1e-6 each."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from fastanila import MALA, AdjustedAniLA, AniLA, CodedAniLA, Langevin, ShrunkNoise, TamedLangevin, noise, ops
from fastanila.samplers.state import State
from known import BANANA, FALSE_ALARM, NORMAL, SKEWED

# ------------------------------------------------------------------------------- one dimension, large steps: quadrature


def clip(s, level):
    return np.clip(s, -level, level)


def gamma(s, b):
    return 1 / np.maximum(1, np.abs(s) / b)


# The law of one transition: (score, eps, b) -> (mean displacement, standard deviation), from the docstrings' formulas.
RIGHT = {
    Langevin: lambda s, eps, b: (eps / 2 * s, np.sqrt(eps)),
    AniLA: lambda s, eps, b: (eps / 2 * clip(s, b), np.sqrt(eps * gamma(s, b))),
    TamedLangevin: lambda s, eps, b: (eps / 2 * clip(s, b / np.sqrt(eps)), np.sqrt(eps)),
    CodedAniLA: lambda s, eps, b: (eps / 2 * clip(s, b), np.sqrt(eps) * gamma(s, b)),
    ShrunkNoise: lambda s, eps, b: (eps / 2 * s, np.sqrt(eps * gamma(s, b))),
}
WRONG = {
    CodedAniLA: {
        "a root of gamma in the noise": lambda s, eps, b: RIGHT[AniLA](s, eps, b),
        "no half in the drift": lambda s, eps, b: (eps * clip(s, b), np.sqrt(eps) * gamma(s, b)),
    },
    ShrunkNoise: {
        "the drift clipped as well": lambda s, eps, b: RIGHT[AniLA](s, eps, b),
        "gamma without a root in the noise": lambda s, eps, b: (eps / 2 * s, np.sqrt(eps) * gamma(s, b)),
    },
    AniLA: {
        "gamma without a root in the noise": lambda s, eps, b: (eps / 2 * clip(s, b), np.sqrt(eps) * gamma(s, b)),
        "isotropic noise": lambda s, eps, b: (eps / 2 * clip(s, b), np.sqrt(eps)),
        "threshold ignored": RIGHT[Langevin],
        "b / (b + |s|)": lambda s, eps, b: (eps / 2 * b / (b + np.abs(s)) * s, np.sqrt(eps * b / (b + np.abs(s)))),
    },
    TamedLangevin: {
        "the noise shrunk as well": lambda s, eps, b: RIGHT[AniLA](s, eps, b / np.sqrt(eps)),
        "a level that forgets the step": lambda s, eps, b: (eps / 2 * clip(s, b), np.sqrt(eps)),
        "threshold ignored": RIGHT[Langevin],
        "b / (b + |s|)": lambda s, eps, b: (eps / 2 * s * b / (b + np.abs(s) * np.sqrt(eps)), np.sqrt(eps)),
    },
    Langevin: {},
}
COMMON = {
    "drift 0.45": lambda displacement, sd: (0.9 * displacement, sd),
    "noise 1.05": lambda displacement, sd: (displacement, 1.05 * sd),
}


def law_after(transition, score, density, steps, eps, b, noise_scale=1.0, box=(-16.0, 12.0), n=1801):
    """(x, cdf) after that many transitions from the density, by products with the transition matrix. What leaves the
    box is lost, and shows as a mass below 1."""
    x = np.linspace(*box, n)
    displacement, sd = transition(score(x), eps, b)
    sd = noise_scale * np.broadcast_to(sd, x.shape)
    kernel = scipy.stats.norm.pdf(x[None, :], (x + displacement)[:, None], sd[:, None]) * (x[1] - x[0])
    mass = density(x) * (x[1] - x[0])
    for _ in range(steps):
        mass = mass @ kernel
    return x, mass.cumsum() - mass / 2


def p_value(values, law):
    return scipy.stats.kstest(values, lambda v: np.interp(v, *law)).pvalue


LINES = {
    "normal": (NORMAL, lambda x: -x, scipy.stats.norm.pdf),
    "skewed": (SKEWED, lambda x: 1 - np.exp(x), lambda x: np.exp(x - np.exp(x))),
}


@pytest.mark.parametrize(
    "line, sampler",
    [
        ("normal", Langevin(0.5)),
        ("normal", AniLA(0.5, 1.0)),
        ("normal", AniLA(0.3, 0.5, 0.6)),
        ("normal", TamedLangevin(0.8, 0.5)),
        ("normal", CodedAniLA(0.7, 0.5)),
        ("normal", ShrunkNoise(0.7, 0.5)),
        ("skewed", Langevin(0.3)),
        ("skewed", AniLA(0.5, 1.0)),
        ("skewed", TamedLangevin(0.8, 0.5)),
    ],
    ids=str,
)
def test_an_unadjusted_chain_has_its_own_law(line, sampler):
    (target, score, density), kind, steps = LINES[line], type(sampler), 40
    z = sampler.run(target.energy, target.start(120_000), steps=steps, seed=1, compile=False)
    values, start = z.flatten().double().numpy(), (score, density, steps, sampler.step_size, sampler.threshold)

    def law(transition):
        return law_after(transition, *start, noise_scale=sampler.noise_scale)

    right = law(RIGHT[kind])
    assert right[1][-1] == pytest.approx(1, abs=1e-4)  # the box holds it
    assert p_value(values, right) > FALSE_ALARM
    wrong = WRONG[kind] | {
        name: lambda s, eps, b, change=change: change(*RIGHT[kind](s, eps, b)) for name, change in COMMON.items()
    }
    for name, transition in wrong.items():
        assert p_value(values, law(transition)) < FALSE_ALARM, name
    assert target.p_value(z) < FALSE_ALARM and not sampler.is_exact  # nor is it the target's


# ---------------------------------------------------------------------------------------------------------- small steps


def huber(x, level):
    """Minus the log density whose score is that of N(0, 1), clipped."""
    return np.where(np.abs(x) <= level, x**2 / 2, level * np.abs(x) - level**2 / 2)


def line_law(log_density, half_width=10.0, n=8001):
    x = np.linspace(-half_width, half_width, n)
    mass = np.exp(log_density(x))
    mass /= mass.sum()
    return x, mass.cumsum() - mass / 2, mass


def draws(x, cdf, count, seed=0):
    return torch.from_numpy(np.interp(np.random.default_rng(seed).random(count), cdf, x)).float()[:, None]


def test_the_small_step_law_of_anila_on_a_line():
    """N(0, 1), b = 1: exp(f) max(1, |s|/b), variance 1.415, and not the target, as the docstring warns."""
    x, cdf, mass = line_law(lambda x: -(x**2) / 2 + np.log(np.maximum(1, np.abs(x))))
    assert (mass * x**2).sum() == pytest.approx(1.4148, abs=1e-4)
    z = AniLA(1.0, 0.02).run(NORMAL.energy, draws(x, cdf, 40_000), steps=400, seed=3, compile=False)
    values = z.flatten().numpy()
    assert p_value(values, (x, cdf)) > FALSE_ALARM
    assert NORMAL.p_value(z) < FALSE_ALARM
    for other in (lambda x: -(x**2) / 2 + 2 * np.log(np.maximum(1, np.abs(x))), lambda x: -huber(x, 1.0)):
        assert p_value(values, line_law(other)[:2]) < FALSE_ALARM  # 1 / gamma**2; the clipped score's own


@pytest.mark.parametrize("kind, power", [(CodedAniLA, 2), (ShrunkNoise, 1)], ids=["coded", "shrunk noise"])
def test_the_small_step_laws_of_the_forms_for_comparison(kind, power):
    """N(0, 1): exp(integral of s max(1, |s|/b)) max(1, |s|/b)^power, as their docstrings have it."""
    b = 0.6

    def law(q):
        def log_density(x):
            size = np.maximum(b, np.abs(x))
            beyond = b**2 / 2 + (size**3 - b**3) / (3 * b)
            return q * np.log(size / b) - np.where(np.abs(x) <= b, x**2 / 2, beyond)

        return line_law(log_density, half_width=5.0)

    x, cdf, _ = law(power)
    z = kind(b, 0.005).run(NORMAL.energy, draws(x, cdf, 40_000), steps=400, seed=3, compile=False)
    values = z.flatten().numpy()
    assert p_value(values, (x, cdf)) > FALSE_ALARM
    for other in {0, 1, 2, 3} - {power}:
        assert p_value(values, law(other)[:2]) < FALSE_ALARM
    assert NORMAL.p_value(z) < FALSE_ALARM


class Plane:
    """A density on the plane's grid: draws, and tests of projections."""

    def __init__(self, log_density, half_width=6.0, n=480):
        self.side = 2 * half_width / n
        centres = -half_width + self.side * (np.arange(n) + 0.5)
        self.points = np.stack(np.meshgrid(centres, centres, indexing="ij"), -1).reshape(-1, 2)
        mass = np.exp(log_density(self.points))
        self.mass = mass / mass.sum()

    def draw(self, count, seed=0):
        rng = np.random.default_rng(seed)
        cells = np.searchsorted(self.mass.cumsum(), rng.random(count) * self.mass.sum())
        return torch.from_numpy(self.points[cells] + self.side * (rng.random((count, 2)) - 0.5)).float()

    def p_value(self, z):
        """Kolmogorov-Smirnov of four projections, by Bonferroni."""
        values = []
        for direction in np.array([[1, 0], [0, 1], [1, 1], [1, -1]]):  # along these, cells line up
            at = self.points @ direction
            mass = np.bincount(np.rint((at - at.min()) / self.side).astype(int), self.mass)
            law = at.min() + self.side * np.arange(len(mass)), mass.cumsum() - mass / 2
            values.append(p_value(z.double().numpy() @ direction, law))
        return 4 * min(values)


def test_the_small_step_law_of_the_chain_norm_on_a_target_that_is_not_separable():
    """Correlated normals: exp(f) max(1, |s|/b) for norm="chain", whatever the target; the element norm's product form
    is another law, and so is what that norm samples."""
    rho, b = 0.8, 1.0

    def score(x):
        return -(x - rho * x[:, ::-1]) / (1 - rho**2)

    def f(x):
        return (x * score(x)).sum(1) / 2

    def energy(x):
        return (x.square().sum(1) / 2 - rho * x[:, 0] * x[:, 1]) / (1 - rho**2)

    def product(x):
        return f(x) + np.log(np.maximum(1, np.abs(score(x)) / b)).sum(1)

    claimed = Plane(lambda x: f(x) + np.log(np.maximum(1, np.linalg.norm(score(x), axis=1) / b)))
    start, steps = claimed.draw(40_000), dict(steps=300, seed=3, compile=False)
    z = AniLA(b, 0.005, norm="chain").run(energy, start, **steps)
    assert claimed.p_value(z) > FALSE_ALARM
    for other in (f, product):
        assert Plane(other).p_value(z) < FALSE_ALARM
    assert claimed.p_value(AniLA(b, 0.005, norm="element").run(energy, start, **steps)) < FALSE_ALARM


def test_the_bias_of_tamed_langevin_vanishes_with_the_step():
    """The same time, 6, from exact draws of N(0, 1): wrong at eps = 0.25, right at 0.01, where AniLA is not, and
    where a level held fixed would give the clipped score's law."""
    start = NORMAL.start(40_000)

    def run(sampler):
        return sampler.run(NORMAL.energy, start, steps=round(6 / sampler.step_size), seed=4, compile=False)

    fine = run(TamedLangevin(0.2, 0.01))
    assert NORMAL.p_value(fine) > FALSE_ALARM
    assert NORMAL.p_value(run(TamedLangevin(0.2, 0.25))) < FALSE_ALARM
    assert NORMAL.p_value(run(AniLA(1.0, 0.01))) < FALSE_ALARM
    assert p_value(fine.flatten().numpy(), line_law(lambda x: -huber(x, 0.2))[:2]) < FALSE_ALARM


# ------------------------------------------------------------------------------------------------- residuals of a step

CHAINS, DIM, B, EPS = 2048, 3072, 1.5, 0.7
#: two-sided, for the three statistics of `seen`
BOUND = scipy.stats.norm.isf(FALSE_ALARM / 6)


def seen(z, score, out):
    """z-scores of a transition's drift, noise and independence between chains, from z, its score and where it led:
    the slope of the residual on the drift less 1/2, the noise's variance less 1, and the variance over the elements of
    the mean over the chains, times their number, less 1."""
    root = (EPS / (score.abs() / B).clamp(min=1)).sqrt_().double()
    xi = (out.double() - z).div_(root)
    root *= score  # sqrt(eps gamma) s: half of it is the drift, in standard deviations
    length = root.square().sum()
    slope = (xi * root).sum() / length
    xi -= 0.5 * root
    return (
        ((slope - 0.5) * length.sqrt()).item(),
        ((xi.square().mean() - 1) * math.sqrt(xi.numel() / 2)).item(),
        ((xi.mean(0).square().mean() * len(xi) - 1) * math.sqrt(xi.shape[1] / 2)).item(),
    )


def of_the_operator():
    z = torch.randn(CHAINS, DIM, generator=torch.Generator().manual_seed(1))
    score = 2 * torch.randn(CHAINS, DIM, generator=torch.Generator().manual_seed(2))
    return z, score, ops.anisotropic_step(z, score, B, step_size=EPS, seed=1, step=1)


def of_the_adjusted_sampler():
    """The proposal that it makes while it judges the last."""
    z = torch.randn(CHAINS, DIM, generator=torch.Generator().manual_seed(1))
    # energies that leave the proposals about as likely to be accepted as not, which is not what is looked at here
    values = iter([torch.zeros(CHAINS), torch.where(torch.arange(CHAINS) % 2 == 0, -1e6, 1e6)])
    state, info = AdjustedAniLA(B, EPS).transition(lambda x: (next(values), -2 * x), State(z), seed=1, step=1)
    assert 0.4 < info.acceptance.mean() < 0.6
    return state.z, state.score, state.proposal


@pytest.mark.parametrize("made", [of_the_operator, of_the_adjusted_sampler])
def test_residuals_show_the_drift_the_noise_and_the_independence_of_chains(made):
    z, score, out = made()
    assert max(map(abs, seen(z, score, out))) < BOUND
    gain = 1 / (score.abs() / B).clamp(min=1)
    drift, sd = EPS * gain * score, (EPS * gain).sqrt()
    assert abs(seen(z, score, out + 0.01 * drift)[0]) > BOUND  # 0.51 for 1/2
    assert abs(seen(z, score, z + 0.5 * drift + 1.002 * (out - z - 0.5 * drift))[1]) > BOUND
    shared = torch.randn(1, DIM, generator=torch.Generator().manual_seed(3))
    noise_ = (out - z - 0.5 * drift) / sd
    mixed = 0.999**0.5 * noise_ + 0.001**0.5 * shared  # a thousandth of the variance
    assert abs(seen(z, score, z + 0.5 * drift + sd * mixed)[2]) > BOUND
    noise_[CHAINS // 2 :] = noise_[: CHAINS // 2]
    assert abs(seen(z, score, z + 0.5 * drift + sd * noise_)[2]) > BOUND


def test_noise_of_one_transition_is_independent_of_the_next_ones_and_of_the_acceptance():
    draw = dict(seed=5, stream=noise.Stream.LANGEVIN)
    now, after = (noise.normal((1 << 20, 1), step=t, **draw).flatten() for t in (7, 8))
    judged = noise.uniform((1 << 20,), seed=5, step=7, stream=noise.Stream.ACCEPTANCE)
    uniform = scipy.stats.norm.ppf(judged.double().clamp(max=1 - 1e-9).numpy())
    pairs = [(now, after), (now, torch.from_numpy(uniform)), (after, torch.from_numpy(uniform))]

    def z_score(a, b):
        return abs((a.double() * b.double()).sum().item()) / math.sqrt(len(a))

    bound = scipy.stats.norm.isf(FALSE_ALARM / 6)
    for a, b in pairs:
        assert z_score(a, b) < bound
        assert z_score(a, b + 0.01 * a) > bound  # a ten-thousandth of the variance shared


# ------------------------------------------------------------------------------------------- what the docstrings say


def test_only_the_adjusted_samplers_call_themselves_exact():
    assert [s.is_exact for s in (Langevin, AniLA, TamedLangevin, MALA, AdjustedAniLA)] == [False] * 3 + [True] * 2
    assert BANANA.p_value(BANANA.start(10_000)) > FALSE_ALARM  # the targets of the tests are what they say
    assert SKEWED.start(100_000).mean().item() == pytest.approx(-0.5772, abs=0.02)
    assert SKEWED.start(100_000).var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
