"""The samplers with a Metropolis correction leave their target as it is: by the identity that makes them exact, and by
where exact draws are after 50 transitions. Each test names mutants that it refuses; false alarms: 1e-6 each.

The operator's kernel and its formula: tests/kernels/test_metropolis.py.
"""

import math

import numpy as np
import pytest
import scipy.stats
import torch

import oracle
from fastanila import HMC, MALA, AdjustedAniLA, ops
from fastanila import noise as noise_
from fastanila.models.score import evaluator
from fastanila.ops import reference
from fastanila.samplers.calibration import averaged, dual_averaging
from fastanila.samplers.state import State
from known import BANANA, FALSE_ALARM, NORMAL, SKEWED

pytestmark = pytest.mark.skipif(ops.INTERPRETED, reason="mutants of the definition are not mutants of the kernel")

# ------------------------------------------------------------------------------------------------------------ mutants

right_log_accept, right_step = reference.log_accept, reference.anisotropic_step


def _log_gamma(score, proposal_score, threshold, step_size, norm, mask):
    """The part of the log ratio that comes of the two densities' heights."""
    sd, back = (reference.proposal(s, s, threshold, step_size=step_size, norm=norm).sd for s in (score, proposal_score))
    terms = (sd / back).log()
    return (terms if mask is None else torch.where(mask, terms, 0.0)).flatten(1).sum(1)


def without_log_gamma(share):
    def log_accept(z, score, energy, y, proposal_score, proposal_energy, threshold, *, step_size, norm, mask=None):
        right = right_log_accept(
            z, score, energy, y, proposal_score, proposal_energy, threshold, step_size=step_size, norm=norm, mask=mask
        )
        return right - share * _log_gamma(score, proposal_score, threshold, step_size, norm, mask)

    return log_accept


def stale_score(z, score, energy, y, proposal_score, proposal_energy, threshold, **settings):
    return right_log_accept(z, score, energy, y, score, proposal_energy, threshold, **settings)


def stale_gamma(z, score, energy, y, proposal_score, proposal_energy, threshold, *, step_size, norm, mask=None):
    gamma = reference.gain(score, threshold, norm)
    sd = (step_size * gamma).sqrt()
    forth, back = ((move - step_size / 2 * gamma * s) / sd for move, s in ((y - z, score), (z - y, proposal_score)))
    terms = (forth**2 - back**2) / 2
    return energy - proposal_energy + (terms if mask is None else torch.where(mask, terms, 0.0)).flatten(1).sum(1)


def changed(change):
    """A mutant of the difference in energy and of the whole ratio."""

    def log_accept(z, score, energy, y, proposal_score, proposal_energy, threshold, **settings):
        right = right_log_accept(z, score, energy, y, proposal_score, proposal_energy, threshold, **settings)
        return change(energy - proposal_energy, right)

    return log_accept


RATIOS = {
    "log gamma missing": without_log_gamma(1.0),
    "half of log gamma missing": without_log_gamma(0.5),
    "gamma(z) in the reverse move": stale_gamma,
    "score(z) in the reverse move": stale_score,
    "the ratio of proposals inverted": changed(lambda difference, right: 2 * difference - right),
    "the whole ratio inverted": changed(lambda difference, right: -right),
    "no ratio of proposals": changed(lambda difference, right: difference),
    "target tempered by 1.1": changed(lambda difference, right: right + 0.1 * difference),
}


def drift_1(z, score, threshold, *, step_size, norm="element", mask=None, noise, **rest):
    """The proposal moves by eps gamma s, and the ratio knows nothing of it."""
    drift = reference.clipped(score, threshold, norm)[1]
    moved = right_step(z, score, threshold, step_size=step_size, norm=norm, mask=mask, noise=noise, **rest)
    return moved + step_size / 2 * drift


def mutate(monkeypatch, name):
    if name in RATIOS:
        monkeypatch.setattr(reference, "log_accept", RATIOS[name])
    else:
        monkeypatch.setattr(reference, "anisotropic_step", drift_1)


# ------------------------------------------------------------------------------------------------- detailed balance


def _energies(z):
    """A density of no special form on (B, 2, 3), and its score."""
    return evaluator(lambda x: (x**4 / 4 + x.sin()).flatten(1).sum(1) + x.flatten(1).sum(1).square() / 3)(z)


@pytest.mark.parametrize("threshold", [0.7, math.inf])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm", reference.NORMS)
def test_detailed_balance(norm, masked, threshold):
    """log pi(z) + log q(z' | z) + log a(z, z') is the same with z and z' exchanged, to rounding in float64."""
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 500, 2, 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(500, 2, 3, generator=generator) < 0.6 if masked else None
    if masked:
        y = torch.where(mask, y, z)
    settings = dict(step_size=0.8, norm=norm)
    (u, s), (u_y, s_y) = _energies(z), _energies(y)

    def log_flow(log_accept, a, b):
        (x, score, energy), (x_b, score_b, energy_b) = a, b
        log_q = reference.log_q(x_b, reference.proposal(x, score, threshold, **settings), mask)
        ratio = log_accept(x, score, energy, x_b, score_b, energy_b, threshold, **settings, mask=mask)
        return -energy + log_q + ratio.clamp(max=0)

    def imbalance(log_accept):
        forth, back = (log_flow(log_accept, *pair) for pair in (((z, s, u), (y, s_y, u_y)), ((y, s_y, u_y), (z, s, u))))
        return ((forth - back).abs() / (1 + forth.abs())).max().item()

    assert imbalance(reference.log_accept) < 1e-12
    # with b = inf there is no gamma to forget
    blind = {name for name in RATIOS if "gamma" in name} if math.isinf(threshold) else set()
    for name, mutant in RATIOS.items():
        assert (imbalance(mutant) > 1e-3) == (name not in blind), name


@pytest.mark.parametrize("norm", reference.NORMS)
def test_the_densities_of_the_ratio_are_those_of_the_proposals(norm):
    """log_q against scipy's normal density, at the mean and the deviation of the formula."""
    z, score, y = torch.randn(3, 20, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gamma, drift = oracle.gain(3 * score.numpy(), 1.2, norm)
    want = scipy.stats.norm.logpdf(y.numpy(), z.numpy() + 0.15 * drift, np.sqrt(0.3 * gamma)).sum((1, 2))
    sampler = AdjustedAniLA(1.2, 0.3, norm)
    np.testing.assert_allclose(reference.log_q(y, sampler.proposal(z, 3 * score)), want, rtol=1e-12)
    half = torch.tensor([True, False, True])
    terms = scipy.stats.norm.logpdf(y.numpy(), z.numpy() + 0.15 * drift, np.sqrt(0.3 * gamma))
    masked = reference.log_q(y, sampler.proposal(z, 3 * score), half)
    np.testing.assert_allclose(masked, terms[..., half.numpy()].sum((1, 2)), rtol=1e-12)


@pytest.mark.parametrize("norm", reference.NORMS)
def test_a_step_with_its_randomness_given_equals_the_formula(norm):
    """In float64, to 1e-11; numbers off by 1e-6 are refused."""
    draw = torch.randn(6, 30, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (z, y, xi), (score, score_y), energies = draw[:3], 2 * draw[3:5], draw[5, :, :, 0].T
    uniform = torch.rand(30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out = reference.metropolis_step(
        z, score, energies[0], y, score_y, energies[1], 1.1, step_size=1.5, norm=norm, uniform=uniform, noise=xi
    )

    def want(threshold=1.1, step_size=1.5):
        states = (t.numpy() for t in (z, score, energies[0], y, score_y, energies[1]))
        log_alpha = oracle.log_accept(*states, threshold, step_size=step_size, norm=norm)
        moved = (np.log(uniform.numpy()) < log_alpha)[:, None, None]
        at, its = np.where(moved, y, z), np.where(moved, score_y, score)
        energy = np.where(moved[:, 0, 0], energies[1], energies[0])
        after = oracle.step(at, its, threshold, xi, step_size=step_size, norm=norm)
        return at, its, energy, after, np.minimum(1, np.exp(log_alpha))

    assert 3 < (out.energy == energies[1]).sum() < 27
    for got, wanted in zip(out, want(), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-11)
    for other in (want(threshold=1.1 * (1 + 1e-6)), want(step_size=1.5 * (1 + 1e-6))):
        assert not np.allclose(out.proposal, other[3], rtol=1e-8, atol=1e-8)
        assert not np.allclose(out.acceptance, other[4], rtol=1e-8, atol=1e-8)


# -------------------------------------------------------------------------------------------------------- exact start


def after_50(sampler, target, chains):
    """(p-value of the chains still being exact draws, mean acceptance)."""
    infos = []
    z = sampler.run(
        target.energy, target.start(chains), steps=50, seed=1, callback=infos.append, callback_every=10, compile=False
    )
    return target.p_value(z), torch.stack([i.acceptance for i in infos]).mean().item()


EXACT = [
    ("normal", NORMAL, MALA(2.0)),
    ("normal", NORMAL, AdjustedAniLA(0.5, 1.0)),
    ("normal", NORMAL, HMC(1.6, 3)),
    ("skewed", SKEWED, MALA(1.0)),
    ("skewed", SKEWED, AdjustedAniLA(0.5, 1.0)),
    ("skewed", SKEWED, HMC(1.0, 3)),
    ("banana", BANANA, AdjustedAniLA(0.7, 1.0)),
    ("banana", BANANA, AdjustedAniLA(0.7, 1.0, "chain")),
]


@pytest.mark.parametrize("chains", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name, target, sampler", EXACT, ids=lambda x: x if isinstance(x, str) else "")
def test_exact_draws_stay_exact_draws(name, target, sampler, chains):
    p_value, acceptance = after_50(sampler, target, chains)
    assert p_value > FALSE_ALARM
    assert 0.5 < acceptance < 0.99  # or the correction would have nothing to do, or the chains would stay


@pytest.mark.parametrize("mutant", [*RATIOS, "drift 1 in the proposal only"])
def test_no_mutant_leaves_exact_draws_of_the_skewed_density(mutant, monkeypatch):
    mutate(monkeypatch, mutant)
    assert after_50(AdjustedAniLA(0.5, 1.0), SKEWED, 50_000)[0] < FALSE_ALARM


@pytest.mark.parametrize("mutant", ["half of log gamma missing", "score(z) in the reverse move"])
def test_no_mutant_of_the_chain_norm_leaves_those_of_a_banana(mutant, monkeypatch):
    mutate(monkeypatch, mutant)
    assert after_50(AdjustedAniLA(0.7, 1.0, "chain"), BANANA, 100_000)[0] < FALSE_ALARM


@pytest.mark.parametrize("mutant", ["always accepted", "target tempered by 1.3", "momentum 1.1 times too large"])
def test_no_mutant_of_hamiltonian_monte_carlo_leaves_those_of_the_skewed_density(mutant, monkeypatch):
    judge, normal = reference.judge, noise_.normal
    if mutant == "always accepted":
        monkeypatch.setattr(reference, "judge", lambda a, u: judge(a + math.inf, u)._replace(accepted=u <= 1))
    elif mutant == "target tempered by 1.3":
        monkeypatch.setattr(reference, "judge", lambda a, u: judge(1.3 * a, u))
    else:
        monkeypatch.setattr(noise_, "normal", lambda *a, **k: 1.1 * normal(*a, **k))
    assert after_50(HMC(1.0, 3), SKEWED, 50_000)[0] < FALSE_ALARM


# ------------------------------------------------------------------------------------------------------ carried state


def worst_carried(sampler, energy, z, steps):
    """(how far what the chains carry is from what it should be at their z, fraction of chains rejected)."""
    evaluate, state, worst, stayed = evaluator(energy), State(z), 0.0, []
    for t in range(steps):
        before = state.z
        state, _ = sampler.transition(evaluate, state, seed=1, step=t)
        stayed.append((state.z == before).all(1).float().mean().item())
        wanted_energy, score = evaluate(state.z)
        pairs = [(state.energy, wanted_energy), (state.score, score)]
        if state.proposal is not None:
            settings = dict(step_size=sampler.step_size, norm=sampler.norm, seed=1, step=t + 1)
            pairs.append((state.proposal, ops.anisotropic_step(state.z, score, sampler.threshold, **settings)))
        worst = max([worst, *((a - b).abs().max().item() for a, b in pairs)])
    return worst, np.mean(stayed)


@pytest.mark.parametrize(
    "sampler", [MALA(2.0), AdjustedAniLA(0.7, 1.5), AdjustedAniLA(0.7, 1.5, "chain"), HMC(0.6, 3)], ids=str
)
def test_what_a_chain_carries_is_of_where_it_stands_also_after_a_rejection(sampler, monkeypatch):
    start = BANANA.start(500)
    worst, stayed = worst_carried(sampler, BANANA.energy, start, 12)
    assert worst < 1e-4 and 0.1 < stayed < 0.9
    # mutants: the energy, the score or the next proposal of the place that was refused
    right = reference.metropolis_step

    def mutant(field):
        def step(z, score, energy, y, proposal_score, proposal_energy, threshold, **settings):
            made = right(z, score, energy, y, proposal_score, proposal_energy, threshold, **settings)
            rest = {k: settings[k] for k in ("step_size", "norm", "mask", "noise")}
            refused = dict(
                energy=proposal_energy,
                score=proposal_score,
                proposal=right_step(y, proposal_score, threshold, **rest),
            )
            return made._replace(**{field: refused[field]})

        return step

    if isinstance(sampler, HMC):
        pick = reference.Judgement.pick
        monkeypatch.setattr(
            reference.Judgement, "pick", lambda self, new, old: new if new.dim() == 1 else pick(self, new, old)
        )
        assert worst_carried(sampler, BANANA.energy, start, 12)[0] > 0.1
        return
    for field in ("energy", "score", "proposal"):
        monkeypatch.setattr(reference, "metropolis_step", mutant(field))
        assert worst_carried(sampler, BANANA.energy, start, 12)[0] > 0.1, field


# ---------------------------------------------------------------------------------------------- Geweke's joint test

#: g(theta, x), its mean and its variance under theta ~ N(0, 1), x | theta ~ N(theta, 1)
JOINT = [
    (lambda a, x: a, 0.0, 1.0),
    (lambda a, x: a**2, 1.0, 2.0),
    (lambda a, x: x, 0.0, 2.0),
    (lambda a, x: x**2, 2.0, 8.0),
    (lambda a, x: a * x, 1.0, 3.0),
    (lambda a, x: (x - a) ** 3, 0.0, 15.0),
]


def joint(theta, x):
    """The largest z-score of the means of JOINT, over independent pairs."""
    pairs = [v.double().flatten() for v in (theta, x)]
    return max(abs((g(*pairs).mean().item() - m) / math.sqrt(v / len(theta))) for g, m, v in JOINT)


def successive_conditional(sampler, chains, rounds, prior=1.0):
    """Geweke (2004): x given theta by drawing it, theta given x by the sampler, in turn, from an exact pair on."""
    generator = torch.Generator().manual_seed(7)
    theta = torch.randn(chains, 1, generator=generator)
    for t in range(rounds):
        x = theta + torch.randn(chains, 1, generator=generator)

        def energy(a, x=x):
            return (prior * a.square() / 2 + (x - a).square() / 2).sum(1)

        theta = sampler.run(energy, theta, steps=2, seed=1, step=2 * t, compile=False)
    return theta, theta + torch.randn(chains, 1, generator=generator)


@pytest.mark.parametrize("sampler", [MALA(1.5), AdjustedAniLA(0.5, 1.0), HMC(0.5, 2)], ids=str)
def test_gewekes_joint_test(sampler, monkeypatch):
    bound = scipy.stats.norm.isf(FALSE_ALARM / (2 * len(JOINT)))
    assert joint(*successive_conditional(sampler, 100_000, 10)) < bound
    assert joint(*successive_conditional(sampler, 100_000, 10, prior=1.1)) > bound  # a posterior with another prior
    if isinstance(sampler, AdjustedAniLA):
        for mutant in ("log gamma missing", "score(z) in the reverse move", "drift 1 in the proposal only"):
            with monkeypatch.context() as patch:
                mutate(patch, mutant)
                assert joint(*successive_conditional(sampler, 100_000, 10)) > bound, mutant


# ------------------------------------------------------------------------------------- Hamiltonian Monte Carlo, adapt


def test_one_leapfrog_step_is_mala():
    start = BANANA.start(300)
    infos = [], []
    ends = [
        sampler.run(BANANA.energy, start, steps=20, seed=3, step=5, callback=seen.append, compile=False)
        for sampler, seen in zip((HMC(1.2, 1), MALA(1.2)), infos, strict=True)
    ]
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)
    for a, b in zip(*infos, strict=True):
        torch.testing.assert_close(a.acceptance, b.acceptance, rtol=1e-3, atol=1e-4)
    assert 0.3 < infos[0][-1].acceptance.mean() < 0.95
    other = HMC(1.2 * 1.001, 1).run(BANANA.energy, start, steps=20, seed=3, step=5, compile=False)
    assert not torch.allclose(other, ends[1], rtol=1e-4, atol=1e-4)


def test_dual_averaging_equals_the_algorithm():
    acceptances = 0.6 + 0.4 * np.sin(np.arange(40))
    tried, kept = oracle.dual_averaging(acceptances, 0.65, 0.02)
    found = dual_averaging(0.02)
    for alpha, want in zip(acceptances, tried, strict=True):
        assert found.step_size.item() == pytest.approx(want, rel=1e-3)
        found = averaged(found, torch.tensor(alpha, dtype=torch.float32), 0.65)
    assert found.kept.item() == pytest.approx(kept, rel=1e-3)
    assert oracle.dual_averaging(acceptances, 0.66, 0.02)[1] != pytest.approx(kept, rel=1e-1)


@pytest.mark.parametrize("factor", [0.01, pytest.param(100.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampler", [MALA(), AdjustedAniLA(4.0, norm="chain"), AdjustedAniLA(2.0), HMC()], ids=str)
def test_adapt_finds_the_step_size_of_the_target_acceptance(sampler, factor):
    """On 20 normals, from step sizes a hundred times too large and too small."""
    z = torch.randn(200, 20, generator=torch.Generator().manual_seed(5))
    near = {MALA: 1.1, HMC: 0.5, AdjustedAniLA: 0.5}[type(sampler)]
    settings = {"threshold": sampler.threshold, "norm": sampler.norm} if isinstance(sampler, AdjustedAniLA) else {}

    def energy(x):
        return 0.5 * x.square().sum(1)

    found = type(sampler)(step_size=factor * near, **settings).adapt(energy, z, steps=150, seed=1, compile=False)
    assert isinstance(found.sampler.step_size, float)
    infos = []
    after = found.sampler.run(energy, found.z, steps=20, seed=1, step=150, callback=infos.append, compile=False)
    acceptance = torch.stack([i.acceptance for i in infos]).mean().item()
    assert acceptance == pytest.approx(sampler.target_acceptance, abs=0.05)
    assert found.sampler == type(sampler)(step_size=found.sampler.step_size, **settings)  # nothing else is moved
    again = type(sampler)(step_size=factor * near, **settings).adapt(energy, z, steps=150, seed=1, compile=False)
    assert again.sampler == found.sampler and torch.equal(again.z, found.z) and after.isfinite().all()


def test_adapt_takes_another_target_and_refuses_none():
    z = torch.randn(200, 5, generator=torch.Generator().manual_seed(5))

    def energy(x):
        return 0.5 * x.square().sum(1)

    sizes = [
        MALA().adapt(energy, z, steps=100, seed=1, target_acceptance=target, compile=False).sampler.step_size
        for target in (0.4, 0.9)
    ]
    assert sizes[0] > 1.5 * sizes[1]
    for target in (0, 1, math.nan):
        with pytest.raises(ValueError, match="target_acceptance must be between 0 and 1, got"):
            MALA().adapt(energy, z, steps=1, seed=1, target_acceptance=target)
    with pytest.raises(ValueError, match="steps must be an integer of at least 0"):
        MALA().adapt(energy, z, steps=-1, seed=1)
