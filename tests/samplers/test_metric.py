"""A diagonal metric leaves the law as it is, is learned from the chains, and makes the same transitions in every way to
make them. Each statistical test names mutants that it refuses; its own false alarms: 1e-6.
"""

import math

import numpy as np
import pytest
import scipy.stats
import torch

import oracle
from fastanila import HMC, MALA, AdjustedAniLA, AniLA, Preconditioned, noise, ops
from fastanila.models import MLP
from fastanila.models.score import evaluator
from fastanila.samplers import adaptation, metric
from fastanila.samplers.captured import Captured
from fastanila.samplers.state import State, leaves
from fastanila.samplers.stepwise import Stepwise, plain_transition
from fastanila.theory import markov, targets
from known import BANANA, FALSE_ALARM

pytestmark = pytest.mark.skipif(ops.INTERPRETED, reason="mutants of the definition are not mutants of the kernel")

SCALE = torch.tensor([0.5, 1.6])
INNER = [MALA(1.0), AdjustedAniLA(0.7, 1.0), AdjustedAniLA(0.7, 1.0, "chain"), HMC(0.6, 3)]
EACH = [Preconditioned(sampler, SCALE) for sampler in INNER]
each = pytest.mark.parametrize("sampler", EACH, ids=lambda s: str(s.sampler))


def start(chains=40, dim=2):
    return torch.randn(chains, dim, generator=torch.Generator().manual_seed(0))


def bumpy(x):
    return x.square().square().flatten(1).sum(1) / 4 + x.flatten(1).sum(1).square() / 2


# ------------------------------------------------------------------------------------------------------------- the law


def after_20(sampler, chains=20_000):
    infos = []
    z = sampler.run(BANANA.energy, BANANA.start(chains), steps=20, seed=1, callback=infos.append, compile=False)
    return BANANA.p_value(z), torch.stack([i.acceptance for i in infos]).mean().item()


@each
def test_exact_draws_stay_exact_draws(sampler):
    p_value, acceptance = after_20(sampler)
    assert p_value > FALSE_ALARM and 0.4 < acceptance < 0.95


right_scaled = metric.scaled


def energy_without_the_metric(evaluate, scale):
    return lambda y: (evaluate(y)[0], right_scaled(evaluate, scale)(y)[1])


def energy_of_a_density_of_z(evaluate, scale):
    """U(scale y) less the logarithm of a volume that goes with the place."""
    return lambda y: (right_scaled(evaluate, scale)(y)[0] - (y * scale).square().sum(1) / 8, evaluate(y * scale)[1])


@pytest.mark.parametrize("mutant", [energy_without_the_metric, energy_of_a_density_of_z], ids=lambda f: f.__name__)
def test_no_mutant_of_the_energy_leaves_exact_draws(mutant, monkeypatch):
    monkeypatch.setattr(metric, "scaled", mutant)
    assert after_20(EACH[0])[0] < FALSE_ALARM


def test_a_metric_that_goes_on_adapting_does_not_leave_exact_draws(monkeypatch):
    """To where each chain is, or to what few chains are spread over."""
    exact, right = BANANA.start(20_000), Preconditioned.scale_on

    def moved(scale_of):
        monkeypatch.setattr(Preconditioned, "scale_on", lambda self, z, mask=None: scale_of(z))
        z = exact
        for t in range(20):
            z = EACH[0].transition(evaluator(BANANA.energy), State(z), seed=1, step=t)[0].z
        return BANANA.p_value(z)

    def of_pairs(z):
        spread = z.unflatten(0, (-1, 2)).std(1, keepdim=True)
        return (0.2 + spread).expand(-1, 2, -1).flatten(0, 1)

    assert moved(lambda z: right(EACH[0], z)) > FALSE_ALARM
    assert moved(lambda z: 0.5 + z.abs()) < FALSE_ALARM
    assert moved(of_pairs) < FALSE_ALARM


@pytest.mark.parametrize("inner", [MALA(0.5), AdjustedAniLA(0.8, 0.5)], ids=str)
def test_the_kernel_on_a_grid_has_the_targets_law(inner):
    """Whose rejections are those of the same moves of z: by a metric of 2, of four times the step size."""
    target = targets.load("normal")
    cells = markov.cells(target.box, 120)
    found = markov.transition_kernel(Preconditioned(inner, torch.tensor([2.0])), target, cells)
    law = found.matrix.T @ found.target
    assert np.abs(law - found.target).sum() < 1e-5
    same = MALA(2.0) if isinstance(inner, MALA) else AdjustedAniLA(0.4, 2.0)
    np.testing.assert_allclose(
        found.matrix.toarray(), markov.transition_kernel(same, target, cells).matrix.toarray(), atol=1e-9
    )


# ------------------------------------------------------------------------------------------------------ one transition

MASKS = [None, torch.tensor([True, False, True]), torch.arange(200).view(-1, 1, 1) % 2 == 0]
WIDE = torch.tensor([[0.4, 1.0, 2.0], [0.7, 1.5, 0.9]])


@pytest.mark.parametrize("mask", MASKS, ids=["", "masked", "masked by chain"])
@pytest.mark.parametrize("b, norm", [(math.inf, "element"), (2.0, "element"), (2.0, "channel"), (4.0, "chain")])
def test_a_transition_equals_the_formula_in_z(b, norm, mask, monkeypatch):
    """z' = z + eps/2 m^2 gamma s + m sqrt(eps gamma) xi, judged by the densities of both moves; in float64 by scipy."""
    inner = MALA(0.3) if math.isinf(b) else AdjustedAniLA(b, 0.3, norm)
    z = 0.8 * torch.randn(200, 2, 3, generator=torch.Generator().manual_seed(0))
    m = WIDE.double().numpy()
    free = np.broadcast_to(True if mask is None else mask.numpy(), z.shape)
    xi = oracle.normals(np.arange(z.numel(), dtype=object), 7, 5).reshape(z.shape)
    scale = np.where(free, m, 1)

    def score_of(x):
        return -(x**3) - x.sum((1, 2), keepdims=True)

    def energy_of(x):
        return (x**4).sum((1, 2)) / 4 + x.sum((1, 2)) ** 2 / 2

    def law(x):
        gamma, drift = oracle.gain(scale * score_of(x), b, norm)
        return x + 0.15 * scale * drift, scale * np.sqrt(0.3 * gamma)

    def densities(x, to):
        return np.where(free, scipy.stats.norm.logpdf(to, *law(x)), 0).sum((1, 2))

    x = z.double().numpy()
    mean, sd = law(x)
    y = np.where(free, mean + sd * xi, x)
    ratio = energy_of(x) - energy_of(y) + densities(y, x) - densities(x, y)
    want = np.minimum(1, np.exp(ratio))

    def differences():
        sampler = Preconditioned(inner, WIDE)
        after, info = sampler.transition(evaluator(bumpy), State(z), seed=7, step=5, mask=mask)
        got = after.z.double().numpy()
        near = np.minimum(np.abs(got - y).max((1, 2)), np.abs(got - x).max((1, 2)))
        stayed = np.abs(got - x).max((1, 2)) < 1e-6
        return np.abs(info.acceptance.numpy() - want).max(), near.max(), stayed.mean(), after

    off, near, stayed, after = differences()
    assert off < 1e-4 and near < 1e-5 and 0.02 < stayed < 0.9
    assert torch.equal(after.z[torch.from_numpy(~free)], z[torch.from_numpy(~free)])  # every bit
    if mask is None and norm != "channel":
        proposal = Preconditioned(inner, WIDE).proposal(z, torch.from_numpy(score_of(x)).float())
        np.testing.assert_allclose(proposal.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(proposal.sd, sd, rtol=1e-5)
    # which leaves the law as it is, for any drift has a right ratio, but is slow
    monkeypatch.setattr(metric, "scaled", lambda evaluate, m: lambda y: (evaluate(y * m)[0], evaluate(y * m)[1]))
    assert differences()[0] > 0.1


def test_a_scale_for_all_elements_is_another_step_size():
    for inner, same in (
        (MALA(0.1), MALA(0.4)),
        (AdjustedAniLA(3.0, 0.1), AdjustedAniLA(1.5, 0.4)),
        (HMC(0.1, 3), HMC(0.4, 3)),
    ):
        of = dict(steps=9, seed=3, step=5, compile=False)
        doubled = Preconditioned(inner, torch.tensor(2.0)).run(bumpy, start(), **of)  # a power of two: exact
        torch.testing.assert_close(doubled, same.run(bumpy, start(), **of), rtol=1e-4, atol=1e-5)
        assert torch.equal(Preconditioned(inner).run(bumpy, start(), **of), inner.run(bumpy, start(), **of))


@each
def test_what_a_chain_carries_is_of_where_it_stands(sampler):
    evaluate, state = evaluator(bumpy), State(start())
    for t in range(8):
        state, info = sampler.transition(evaluate, state, seed=1, step=t)
        energy, score = evaluate(state.z)
        inner = state.inner
        torch.testing.assert_close(inner.z, state.z / SCALE, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(inner.energy, energy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inner.score, score * SCALE, rtol=1e-4, atol=1e-4)
        if inner.proposal is not None:
            s = sampler.sampler
            settings = dict(step_size=s.step_size, norm=s.norm, seed=1, step=t + 1)
            made = ops.anisotropic_step(inner.z, inner.score, s.threshold, **settings)
            torch.testing.assert_close(inner.proposal, made, rtol=1e-5, atol=1e-5)
    assert 0.05 < info.acceptance.mean() < 1


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False])], ids=["", "masked"])
@each
def test_a_run_is_the_transition_repeated_and_captured_the_same(sampler, mask):
    state, z = State(start()), start()
    for t in range(5, 12):
        state, _ = sampler.transition(evaluator(bumpy), state, seed=3, step=t, mask=mask)
    of = dict(steps=7, seed=3, step=5, mask=mask, compile=False)
    got = sampler.run(bumpy, z, **of)
    torch.testing.assert_close(got, state.z, rtol=0, atol=1e-6)
    assert torch.equal(z, start()) and (mask is None or torch.equal(got[:, 1], z[:, 1]))
    assert not torch.allclose(sampler.run(bumpy, z, **of, offset=1), got)
    half = sampler.run(bumpy, z.bfloat16(), **of)
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    advance, numbers = plain_transition(sampler, bumpy), sampler.numbers_on(None)
    captured, stepwise = Captured(advance, lambda function, device: function), Stepwise(advance, sparing=True)
    with torch.no_grad():
        for count in (1, 2, 9, 9):
            arguments = (count, numbers, State(start()), noise.as_word64(3), noise.as_word64(5), 0, mask)
            for a, b in zip(leaves(captured(*arguments)), leaves(stepwise(*arguments)), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("sampler", [EACH[1], pytest.param(EACH[3], marks=pytest.mark.slow)], ids=str)
def test_a_compiled_run_equals_an_eager_one(sampler, compiler):
    energy, of = MLP(2, 16, 1), dict(steps=6, seed=3, step=4)
    for m in (SCALE, 2 * SCALE):  # the same graph, other numbers
        changed = Preconditioned(sampler.sampler, m)
        torch.testing.assert_close(
            changed.run(energy, start(), **of), changed.run(energy, start(), **of, compile=False), rtol=1e-4, atol=1e-4
        )


# ------------------------------------------------------------------------------------------------------------- adapted

VARIANCE = torch.logspace(-2, 0, 20)


def ill_conditioned(x):
    return 0.5 * (x.square() / VARIANCE).sum(1)


def forgotten(sampler, z):
    """(how little of the widest element's place is left after 20 transitions, as a correlation; mean acceptance)."""
    infos = []
    after = sampler.run(
        ill_conditioned, z, steps=20, seed=1, step=400, callback=infos.append, callback_every=4, compile=False
    )
    correlation = torch.corrcoef(torch.stack((z[:, -1], after[:, -1])))[0, 1].item()
    return correlation, torch.stack([i.acceptance for i in infos]).mean().item()


@pytest.mark.parametrize("inner", [MALA(0.02), AdjustedAniLA(30.0, 0.02, "chain"), HMC(0.02, 2)], ids=str)
def test_adapt_learns_the_spreads_and_the_step_size(inner):
    """Of normals whose variances go from 1/100 to 1, from chains that all start near 0."""
    z = 0.01 * start(100, 20)
    found = inner.adapt(ill_conditioned, z, steps=200, seed=1, metric=True, compile=False)
    sampler = found.sampler
    assert isinstance(sampler, Preconditioned) and isinstance(sampler.step_size, float)
    spread = VARIANCE.sqrt() / VARIANCE.sqrt().log().mean().exp()
    torch.testing.assert_close(sampler.scale, spread, rtol=0.15, atol=0)
    assert sampler.scale.log().mean().item() == pytest.approx(0, abs=1e-5)
    exact = VARIANCE.sqrt() * start(2000, 20)
    left, acceptance = forgotten(sampler, exact)
    assert left < 0.2 and acceptance == pytest.approx(inner.target_acceptance, abs=0.1)
    plain = inner.adapt(ill_conditioned, exact[:100], steps=100, seed=1, compile=False).sampler
    assert forgotten(plain, exact)[0] > 0.5
    again = inner.adapt(ill_conditioned, z, steps=200, seed=1, metric=True, compile=False)
    assert torch.equal(again.sampler.scale, sampler.scale) and again.sampler.sampler == sampler.sampler
    assert torch.equal(again.z, found.z)
    # once more without a metric: the scale is frozen, the step size is not
    other = sampler.adapt(ill_conditioned, exact[:100], steps=20, seed=2, compile=False).sampler
    assert torch.equal(other.scale, sampler.scale) and other.step_size != sampler.step_size


def test_what_a_mask_holds_has_no_part_in_the_metric():
    mask = torch.arange(20) % 3 > 0
    found = MALA(0.02).adapt(ill_conditioned, start(50, 20), steps=40, seed=1, metric=True, mask=mask, compile=False)
    scale = found.sampler.scale
    assert (scale[~mask] == 1).all() and scale[mask].log().mean().item() == pytest.approx(0, abs=1e-5)
    assert torch.equal(found.z[:, ~mask], start(50, 20)[:, ~mask])
    all_free = MALA(0.02).adapt(ill_conditioned, start(50, 20), steps=40, seed=1, metric=True, compile=False)
    assert not torch.allclose(all_free.sampler.scale[mask], scale[mask], rtol=1e-2)


def test_pooled_moments_and_their_regularised_scale_equal_the_definition():
    rng = np.random.default_rng(4)
    parts = [rng.normal(3.0, [0.1, 1.0, 5.0], size=(n, 3)) for n in (1, 7, 4)]
    moments = None
    for part in parts:
        moments = adaptation.pooled(moments, torch.from_numpy(part).float())
    everything = np.concatenate(parts)
    assert moments.draws == 12
    np.testing.assert_allclose(moments.mean, everything.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.squares / 11, everything.var(0, ddof=1), rtol=1e-4)
    variance = everything.var(0, ddof=1)
    regular = 12 / 17 * variance + 5 / 17 * 1e-3 * variance.mean()
    np.testing.assert_allclose(
        adaptation.scale_of(moments), np.sqrt(regular) / scipy.stats.gmean(np.sqrt(regular)), rtol=1e-4
    )
    free = torch.tensor([True, False, True])
    some = 12 / 17 * variance[[0, 2]] + 5 / 17 * 1e-3 * variance[[0, 2]].mean()
    got = adaptation.scale_of(moments, free).numpy()
    np.testing.assert_allclose(got[[0, 2]], np.sqrt(some / scipy.stats.gmean(some)), rtol=1e-4)
    assert got[1] == 1


def test_calibrate_is_of_what_the_sampler_moves():
    z = VARIANCE.sqrt() * start(500, 20)
    by_metric = Preconditioned(AdjustedAniLA(), VARIANCE.sqrt()).calibrate(ill_conditioned, z).sampler
    of_normals = AdjustedAniLA().calibrate(lambda y: 0.5 * y.square().sum(1), start(500, 20))
    assert by_metric.threshold == pytest.approx(of_normals.threshold, rel=1e-4)
    assert by_metric.step_size == pytest.approx(of_normals.step_size, rel=1e-4)
    by_score = (
        Preconditioned(AdjustedAniLA(), VARIANCE.sqrt()).calibrate(None, z, score=lambda x: -x / VARIANCE).sampler
    )
    assert by_score.threshold == pytest.approx(by_metric.threshold, rel=1e-4)


def test_what_cannot_be_is_refused():
    with pytest.raises(TypeError, match="sampler must be MALA, AdjustedAniLA or HMC, got AniLA"):
        Preconditioned(AniLA())
    for scale in (2.0, torch.tensor([1, 2])):
        with pytest.raises(TypeError, match="scale must be a tensor of floats or None, got"):
            Preconditioned(MALA(), scale)
    of = dict(steps=1, seed=0, compile=False)
    for call in ("run", "adapt"):
        with pytest.raises(ValueError, match=r"scale must broadcast to a state's shape \(2,\), got \(3,\)"):
            getattr(Preconditioned(MALA(), torch.ones(3)), call)(bumpy, start(), **of)
        for wrong in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="scale must be positive and finite, got values from"):
                getattr(Preconditioned(MALA(), torch.tensor([1.0, wrong])), call)(bumpy, start(), **of)
        with pytest.raises(TypeError, match="z must be a tensor, got list"):
            getattr(Preconditioned(MALA(), torch.ones(2)), call)(bumpy, [[1.0, 2.0]], **of)
    with pytest.raises(ValueError, match="steps must be an integer of at least 16"):
        MALA().adapt(bumpy, start(), steps=15, seed=0, metric=True, compile=False)
    with pytest.raises(ValueError, match="z must have chains to learn a metric from, got none"):
        MALA().adapt(bumpy, start(0), steps=16, seed=0, metric=True, compile=False)
    with pytest.raises(ValueError, match="energy must be given, for Preconditioned compares energies"):
        MALA().adapt(None, start(), steps=16, seed=0, metric=True, compile=False)
    with pytest.raises(ValueError, match="energy must be given, for Preconditioned compares energies"):
        EACH[0].run(None, start(), score=torch.neg, **of)
    with pytest.raises(ValueError, match="z must be finite and move, for a metric to be learned"):
        MALA().adapt(bumpy, start() * math.nan, steps=16, seed=0, metric=True, compile=False)
