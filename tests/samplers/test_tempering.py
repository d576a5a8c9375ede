"""Replica exchange leaves the law of every replica as it is, crosses between modes, and makes the same transitions in
every way to make them. Each statistical test names mutants that it refuses; its own false alarms: 1e-6."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import torch

from fastanila import HMC, MALA, AdjustedAniLA, AniLA, ReplicaExchange, noise, ops
from fastanila.models import MLP, GaussianMixture
from fastanila.models.score import evaluator
from fastanila.samplers import ladder, tempering
from fastanila.samplers.captured import Captured
from fastanila.samplers.metropolis import _AdjustedStep
from fastanila.samplers.state import State, leaves
from fastanila.samplers.stepwise import Stepwise, plain_transition
from known import FALSE_ALARM, SKEWED

pytestmark = pytest.mark.skipif(ops.INTERPRETED, reason="mutants of the definition are not mutants of the kernel")

TEMPERATURES = (1.0, 1.6, 4.0)


def skewed_draws(chains, temperatures=TEMPERATURES, seed=0):
    """Exact draws of exp(-U / T) for the skewed U, every temperature in turn: logarithms of Gamma(1 / T) draws, T times
    as large."""
    u = np.random.default_rng(seed).random((len(temperatures), chains))
    draws = [np.log(scipy.stats.gamma.ppf(u_r, 1 / t, scale=t)) for u_r, t in zip(u, temperatures, strict=True)]
    return torch.from_numpy(np.concatenate(draws)).float()[:, None]


def skewed_p_value(z, temperatures=TEMPERATURES):
    """Of the rows being such draws: the least Kolmogorov-Smirnov of the temperatures, by Bonferroni."""
    each = z.double().numpy().reshape(len(temperatures), -1)
    return len(temperatures) * min(
        scipy.stats.kstest(values, lambda y, t=t: scipy.stats.gamma.cdf(np.exp(y), 1 / t, scale=t)).pvalue
        for values, t in zip(each, temperatures, strict=True)
    )


def after_20(sampler, chains=20_000):
    z = ReplicaExchange(sampler, TEMPERATURES).run(SKEWED.energy, skewed_draws(chains), steps=20, seed=1, compile=False)
    return skewed_p_value(z)


@pytest.mark.parametrize("sampler", [MALA(1.0), AdjustedAniLA(0.5, 1.0), HMC(1.0, 3)], ids=str)
def test_exact_draws_stay_exact_draws_at_every_temperature(sampler):
    assert after_20(sampler) > FALSE_ALARM


right_exchanged, right_traded = tempering.exchanged, tempering.traded


def without_the_energy_term(energies, betas, uniform, step):
    return right_exchanged(torch.zeros_like(energies), betas, uniform, step)


def of_the_energies_alone(energies, betas, uniform, step):
    """As if neighbours differed by 1 in the inverse temperature."""
    return right_exchanged(energies, -torch.arange(len(betas)).float(), uniform, step)


def by_tempered_energies(energies, betas, uniform, step):
    return right_exchanged(energies * betas[:, None], betas, uniform, step)


def the_ratio_inverted(energies, betas, uniform, step):
    return right_exchanged(-energies, betas, uniform, step)


def each_judged_alone(energies, betas, uniform, step):
    """Rows that take their partner's state whether or not it takes theirs."""
    r = torch.arange(len(betas))
    source = right_exchanged(energies, betas, uniform, step)
    return torch.where((r % 2 == 0)[:, None], source, r[:, None])


EXCHANGES = [
    without_the_energy_term, of_the_energies_alone, by_tempered_energies, the_ratio_inverted, each_judged_alone,
]  # fmt: skip


@pytest.mark.parametrize("mutant", EXCHANGES, ids=lambda f: f.__name__)
def test_no_mutant_of_the_exchange_leaves_exact_draws(mutant, monkeypatch):
    monkeypatch.setattr(tempering, "exchanged", mutant)
    assert after_20(MALA(1.0)) < FALSE_ALARM


def energies_left_behind(moved, z, rows, source):
    made = right_traded(moved, z, rows, source)
    return made._replace(inner=made.inner._replace(energy=moved.energy))


def scores_left_behind(moved, z, rows, source):
    made = right_traded(moved, z, rows, source)
    return made._replace(inner=made.inner._replace(score=moved.score))


def energies_not_restated(moved, z, rows, source):
    """At the temperature that the state comes from."""
    made, count = right_traded(moved, z, rows, source), source.shape[1]
    at = (source * count + torch.arange(count)).flatten()
    return made._replace(inner=made.inner._replace(energy=moved.energy[at]))


@pytest.mark.parametrize(
    "mutant", [energies_left_behind, scores_left_behind, energies_not_restated], ids=lambda f: f.__name__
)
def test_no_mutant_of_what_moves_with_a_state_leaves_exact_draws(mutant, monkeypatch):
    monkeypatch.setattr(tempering, "traded", mutant)
    assert after_20(MALA(1.0)) < FALSE_ALARM


def test_proposals_of_before_an_exchange_do_not_leave_exact_draws(monkeypatch):
    right = _AdjustedStep.transition
    made = {}

    def remembered(self, evaluate, state, **settings):
        made["after"], info = right(self, evaluate, state, **settings)
        return made["after"], info

    monkeypatch.setattr(_AdjustedStep, "transition", remembered)
    right_proposed = _AdjustedStep.proposed

    def proposed(self, state, **settings):
        return state._replace(proposal=made["after"].proposal) if made else right_proposed(self, state, **settings)

    monkeypatch.setattr(_AdjustedStep, "proposed", proposed)
    assert after_20(MALA(1.0)) < FALSE_ALARM


# ------------------------------------------------------------------------------------------------------------ 25 modes

GRID = torch.stack(torch.meshgrid(*[2 * torch.arange(-2.0, 3.0)] * 2, indexing="ij"), -1).reshape(-1, 2)
SHARES = (1 + torch.arange(25, dtype=torch.float64) % 5) / 75
MODES = GaussianMixture(GRID, 0.15, SHARES)
#: as `adapt` finds them: tests/samplers/test_tempering.py::test_adapt_makes_exchanges_equally_likely
LADDER = (1.0, 1.55, 2.45, 3.95, 6.55, 11.8, 25.0, 60.0)


def counts(z):
    return torch.cdist(z, GRID).argmin(1).bincount(minlength=25)


def shares_p_value(z):
    return scipy.stats.chisquare(counts(z).numpy(), len(z) * SHARES.numpy()).pvalue


def distance(z):
    """The total variation between the modes' shares among the states z and the right ones."""
    return (counts(z) / len(z) - SHARES).abs().sum().item() / 2


def crossed(chains, steps):
    """Cold states after that many transitions of eight replicas, all of whose chains start in the middle mode."""
    sampler = ReplicaExchange(MALA(0.05), LADDER)
    start = GRID[12] + 0.15 * torch.randn(chains, 2, generator=torch.Generator().manual_seed(0))
    return sampler.cold(sampler.run(MODES, sampler.start(start), steps=steps, seed=1, compile=False))


def test_replicas_give_25_modes_their_shares_where_one_temperature_stays_in_one(monkeypatch):
    """Within one and a half times the distance of as many exact draws, from chains in one mode, at equal gradients."""
    chains, steps = 256, 120
    exact = np.mean([distance(MODES.sample(chains, seed=seed)) for seed in range(20)])
    z = crossed(chains, steps)
    assert distance(z) < 1.5 * exact
    assert shares_p_value(z) > FALSE_ALARM
    # one temperature stays where it is: the eightfold gradients of a chain, of the step size that accepts as many
    start = GRID[12] + 0.15 * torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    stayed = MALA(0.05).run(MODES, start, steps=8 * steps, seed=1, compile=False)
    assert (counts(stayed) > 0).sum() == 1
    monkeypatch.setattr(tempering, "exchanged", without_the_energy_term)
    wrong = crossed(chains, steps)
    assert distance(wrong) > 1.5 * exact
    assert shares_p_value(wrong) < FALSE_ALARM


def test_adapt_makes_exchanges_equally_likely():
    """On 25 modes, from a ladder and step sizes that are far off: the acceptance rate of each replica, and the rate of
    each exchange; and states that go on at once."""
    start = ReplicaExchange.of(MALA(0.5), replicas=4, highest=60.0).start(MODES.sample(200, seed=1))
    given = ReplicaExchange(MALA(0.5), (1.0, 1.2, 1.4, 60.0), (1.0, 1.0, 1.0, 30.0))
    found = given.adapt(MODES, start, steps=120, seed=1, compile=False)
    infos = []
    z = found.sampler.run(MODES, found.z, steps=20, seed=1, step=120, callback=infos.append, compile=False)
    acceptance = torch.stack([i.acceptance for i in infos]).view(20, 4, 200).mean((0, 2))
    swaps = torch.stack([found.sampler.swap_rates(i.energy) for i in infos]).mean(0)
    torch.testing.assert_close(acceptance, torch.full((4,), 0.574), rtol=0, atol=0.06)
    assert swaps.max() - swaps.min() < 0.12
    before, infos = ReplicaExchange(MALA(0.05), given.temperatures), []
    before.run(MODES, start, steps=40, seed=1, callback=infos.append, callback_every=40, compile=False)
    swaps = before.swap_rates(infos[0].energy)
    assert swaps.max() - swaps.min() > 0.5
    assert found.sampler.temperatures[0] == 1 and found.sampler.temperatures[-1] == 60
    assert z.isfinite().all() and isinstance(found.sampler.sampler.step_size, float)
    again = given.adapt(MODES, start, steps=120, seed=1, compile=False)
    assert again.sampler == found.sampler and torch.equal(again.z, found.z)


def test_a_ladder_parts_the_barrier_equally():
    """Of rejections that grow as the logarithm of the temperature does, it is geometric again."""
    uneven = (1.0, 2.0, 16.0, 32.0, 81.0)
    placed = ladder.equalised(uneven, np.diff(np.log(uneven)))
    np.testing.assert_allclose(placed, ladder.geometric(5, 81.0), rtol=1e-12)
    assert ladder.equalised((1.0, 2.0, 4.0, 8.0), (0.6, 0.1, 0.1))[1] < 1.5
    assert ladder.equalised((1.0, 2.0, 4.0), (0.0, 0.0)) == pytest.approx((1.0, 2.0, 4.0))


# ------------------------------------------------------------------------------------------------------- one transition


def test_exchanges_equal_the_definition():
    """Pair by pair in float64; neither of the two keeps what both have agreed to trade."""
    rng = np.random.default_rng(3)
    energies, betas, uniform = (
        rng.normal(size=(5, 40)) * 3,
        1 / np.array([1.0, 1.5, 2.5, 4.0, 9.0]),
        rng.random((5, 40)),
    )
    energies[1, :3], energies[2, 1:5] = math.inf, math.nan
    for step in (6, 7):
        want = np.arange(5)[:, None].repeat(40, 1)
        for r in range(step % 2, 4, 2):
            for b in range(40):
                ratio = (betas[r] - betas[r + 1]) * (energies[r, b] - energies[r + 1, b])
                if np.isfinite(energies[r : r + 2, b]).all() and np.log(uniform[r, b]) < ratio:
                    want[r, b], want[r + 1, b] = r + 1, r
        got = ladder.exchanged(*map(torch.from_numpy, (energies, betas, uniform)), torch.tensor(step))
        assert (got.numpy() == want).all() and 20 < (got.numpy() != np.arange(5)[:, None]).sum() < 120
        assert (ladder.exchanged(*map(torch.from_numpy, (energies, betas, uniform)), step) == got).all()
        assert (ladder.exchanged(*map(torch.from_numpy, (energies, betas, uniform)), step + 1) != got).any()


def start(replicas=3, chains=40, dim=2):
    return torch.randn(replicas * chains, dim, generator=torch.Generator().manual_seed(0))


EACH = [
    ReplicaExchange(s, TEMPERATURES, (1.0, 1.1, 2.5))
    for s in (MALA(0.3), AdjustedAniLA(1.5, 0.3), AdjustedAniLA(1.5, 0.3, "chain"), HMC(0.3, 3))
]
each = pytest.mark.parametrize("sampler", EACH, ids=lambda s: str(s.sampler))


def bumpy(x):
    return x.square().square().flatten(1).sum(1) / 4 + x.flatten(1).sum(1).square() / 2


@each
def test_what_replicas_carry_is_of_where_they_stand(sampler):
    """After each transition: energies, scores and the next proposals, of rows that stayed, moved or traded places."""
    evaluate, state = evaluator(bumpy), State(start())
    temperatures = torch.tensor(TEMPERATURES).repeat_interleave(40)
    scales = torch.tensor([1.0, 1.1, 2.5]).repeat_interleave(40)[:, None]
    for t in range(10):
        state, _ = sampler.transition(evaluate, state, seed=1, step=t)
        energy, score = evaluate(state.z)
        y, inner = state.z / scales, state.inner
        torch.testing.assert_close(inner.z, y, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(inner.energy, energy / temperatures, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(inner.score, score * scales / temperatures[:, None], rtol=1e-4, atol=1e-4)
        if inner.proposal is not None:
            s = sampler.sampler
            settings = dict(step_size=s.step_size, norm=s.norm, seed=1, step=t + 1)
            made = ops.anisotropic_step(inner.z, inner.score, s.threshold, **settings)
            torch.testing.assert_close(inner.proposal, made, rtol=1e-5, atol=1e-5)


@each
def test_a_run_is_the_transition_repeated_and_its_rows_draw_by_their_index(sampler):
    state, z = State(start()), start()
    for t in range(5, 12):
        state, _ = sampler.transition(evaluator(bumpy), state, seed=3, step=t)
    got = sampler.run(bumpy, z, steps=7, seed=3, step=5, compile=False)
    torch.testing.assert_close(got, state.z, rtol=0, atol=1e-6)
    assert torch.equal(z, start())
    assert not torch.allclose(sampler.run(bumpy, z, steps=7, seed=3, step=5, offset=1, compile=False), got)
    infos = []
    sampler.run(bumpy, z, steps=1, seed=3, callback=infos.append, compile=False)
    energy, score = evaluator(bumpy)(z)
    torch.testing.assert_close(infos[0].energy, energy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(infos[0].score_rms, score.square().mean(1).sqrt(), rtol=1e-4, atol=1e-4)
    assert sampler.cold(z).shape == (40, 2)
    assert torch.equal(sampler.start(z[:2]), torch.cat([z[:2]] * 3))


@each
def test_captured_replicas_equal_replicas_made_one_by_one(sampler):
    advance, numbers = plain_transition(sampler, bumpy), sampler.numbers_on(None)
    captured, stepwise = Captured(advance, lambda function, device: function), Stepwise(advance, sparing=True)
    with torch.no_grad():
        for count in (1, 2, 9, 9):
            arguments = (count, numbers, State(start()), noise.as_word64(3), noise.as_word64(5))
            for a, b in zip(leaves(captured(*arguments)), leaves(stepwise(*arguments)), strict=True):
                assert torch.equal(a, b)


def test_one_replica_is_the_sampler_itself_and_cold_rows_begin_as_it_does():
    alone = MALA(0.3).run(bumpy, start(1), steps=9, seed=3, compile=False)
    assert torch.equal(ReplicaExchange(MALA(0.3)).run(bumpy, start(1), steps=9, seed=3, compile=False), alone)
    one = MALA(0.3).run(bumpy, start(1), steps=1, seed=3, step=1, compile=False)  # at step 1 the odd pairs: 1 and 2
    three = EACH[0].run(bumpy, start(), steps=1, seed=3, step=1, compile=False)
    torch.testing.assert_close(three[:40], one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", [EACH[1], EACH[3]], ids=lambda s: str(s.sampler))
def test_compiled_replicas_equal_eager_ones(sampler, compiler):
    energy, z = MLP(2, 16, 1), start()
    of = dict(steps=6, seed=3, step=4)
    torch.testing.assert_close(
        sampler.run(energy, z, **of), sampler.run(energy, z, **of, compile=False), rtol=1e-4, atol=1e-4
    )
    other = dataclasses.replace(sampler, temperatures=(1.0, 3.0, 5.0))  # the same graph, other numbers
    torch.testing.assert_close(
        other.run(energy, z, **of), other.run(energy, z, **of, compile=False), rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_is_refused():
    for temperatures in ((), (2.0,), (1.0, 1.0), (1.0, 3.0, 2.0), (1.0, math.inf), (1.0, math.nan)):
        with pytest.raises(ValueError, match="temperatures must be 1 and then larger and larger, got"):
            ReplicaExchange(MALA(), temperatures)
    with pytest.raises(ValueError, match="scales must be 1 and then one for each temperature, got"):
        ReplicaExchange(MALA(), (1.0, 2.0), (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="scales must be"):
        ReplicaExchange(MALA(), (1.0, 2.0), (1.0, 0.0))
    with pytest.raises(TypeError, match="sampler must be MALA, AdjustedAniLA or HMC, got AniLA"):
        ReplicaExchange(AniLA(), (1.0, 2.0))
    for replicas, highest, named in ((1, 9.0, "replicas"), (8, 1.0, "highest"), (8, math.inf, "highest")):
        with pytest.raises(ValueError, match=f"{named} must be"):
            ReplicaExchange.of(MALA(), replicas=replicas, highest=highest)
    sampler = ReplicaExchange.of(MALA(), replicas=3, highest=9.0)
    for call in (sampler.run, sampler.adapt):
        with pytest.raises(ValueError, match="z must have as many chains for each of 3 replicas, got 40 rows"):
            call(bumpy, start(1), steps=1, seed=0)
        with pytest.raises(ValueError, match="mask must be None with replicas"):
            call(bumpy, start(), steps=1, seed=0, mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="energy must be given"):
        sampler.run(None, start(), score=torch.neg, steps=1, seed=0)
    with pytest.raises(ValueError, match="energy must be given"):
        sampler.adapt(None, start(), steps=1, seed=0)
    with pytest.raises(ValueError, match="target_acceptance must be between 0 and 1"):
        sampler.adapt(bumpy, start(), steps=1, seed=0, target_acceptance=1.0)
