"""Whole chains in one kernel against the same transitions one by one in float64: on CUDA, else in the interpreter."""

import copy
import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from cases import (
    ADJUSTED_MIXTURES,
    ADJUSTED_NETWORKS,
    BATCHES,
    DIMS,
    MIXTURES,
    NETWORKS,
    SAMPLERS,
    SHARED_MEMORIES,
    SLOW_ADJUSTED_MIXTURES,
    SLOW_ADJUSTED_NETWORKS,
    SQUEEZED,
    one_in,
    with_slow,
)
from fastanila import MALA, AdjustedAniLA, noise, ops
from fastanila.models import MLP, ConvNet, GaussianMixture
from fastanila.models.score import evaluator
from fastanila.models.wrappers import Autocast
from fastanila.ops import dispatch, reference
from fastanila.ops import whole_chain as whole_chain_ops
from fastanila.samplers import whole_chain
from steps import DEVICE, MARKS, counting

pytestmark = MARKS
SETTINGS = dict(threshold=1.5, step_size=0.1, noise_scale=0.9, seed=(1 << 63) + 5, step=(1 << 33) - 4)


def chains(count, dim, seed=0):
    return (2 * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def mixture(dim, components=3):
    g = torch.Generator().manual_seed(1)
    means, sd = 3 * torch.randn(components, dim, generator=g), 0.4 + torch.rand(components, generator=g)
    return GaussianMixture(means, sd, 0.1 + torch.rand(components, generator=g)).to(DEVICE)


def mlp(dim, width=64, depth=2, **options):
    torch.manual_seed(2)
    return MLP(dim, width, depth, feature_scale=1.5, **{"confinement": 0.5} | options).to(DEVICE)


def one_by_one(
    energy, z, *, threshold, step_size, noise_scale, seed, step, steps, norm="element", refresh="transition",
    bounds=None, offset=0,
):  # fmt: skip
    """The transitions in float64 on the CPU: z, and energy, mean gain, RMS score and clipped fraction of the last."""
    energy, z, gamma = copy.deepcopy(energy).double().cpu(), z.double().cpu(), None
    for j in range(steps):
        x = z.clone().requires_grad_()
        u = value(energy, x)
        score = -torch.autograd.grad(u.sum(), x)[0]
        if refresh == "transition" or gamma is None:
            gamma = reference.clipped(score, threshold, norm)[0].expand_as(score)
        xi = noise.normal(z.shape, seed=seed, step=step + j, offset=offset, dtype=torch.float64)
        gained = dict(threshold=threshold, norm=norm) if refresh == "transition" else dict(threshold=None, gamma=gamma)
        z = reference.anisotropic_step(
            z, score, **gained, step_size=step_size, noise_scale=noise_scale, bounds=bounds, noise=xi
        )
    clipped = (gamma < 1).double().mean(1)
    rms = score.square().mean(1).sqrt()
    return whole_chain.Trajectory(z, u.detach(), gamma.mean(1), rms, clipped, torch.ones_like(rms))


def value(energy, x):
    """The energy in float64: the modules round their phases and their head to float32."""
    if isinstance(energy, GaussianMixture):
        return energy(x)
    phase = x @ energy.projections.T
    h = energy.layers(torch.cat((phase.sin(), phase.cos()), -1) if len(energy.projections) else x)
    return energy.head(h).squeeze(-1) + 0.5 * energy.confinement * x.square().sum(-1)


def rounded(want):
    return whole_chain.Trajectory(*(x.float() for x in want))


def assert_close(out, want, tolerance=1e-4):
    for name, a, b in zip(out._fields, out, want, strict=True):
        error = (a.double().cpu() - b).abs() / b.abs().clamp(min=1)
        assert a.dtype == torch.float32 and a.shape == b.shape, name
        assert error.max() < tolerance, (name, error.max())


@pytest.fixture
def few_programs(monkeypatch):
    """Many rows a program though there are few chains, as for many chains."""
    monkeypatch.setattr("fastanila.kernels.mlp.PROGRAMS", 2)


# --------------------------------------------------------------------------------------------------------- the numbers


@one_in(7, count=[1, 3, 33], sizes=MIXTURES)
def test_a_mixture(poisoned, sizes, count):
    dim, components = sizes
    energy, z = mixture(dim, components), chains(count, dim)
    before = z.clone()
    out = whole_chain.run(energy, z, **SETTINGS, steps=10)
    assert_close(out, one_by_one(energy, z, **SETTINGS, steps=10))
    assert torch.equal(z, before)


@one_in(5, batch=BATCHES, network=NETWORKS)
def test_a_network(poisoned, monkeypatch, network, batch):
    (dim, width, depth, features, activation), (count, rows) = network, batch
    monkeypatch.setattr("fastanila.kernels.mlp.PROGRAMS", -(-count // rows))
    energy = mlp(dim, width, depth, features=features, activation=activation)
    z = chains(count, dim)
    assert whole_chain.supports(energy, z)
    out = whole_chain.run(energy, z, **SETTINGS, steps=10)
    assert_close(out, one_by_one(energy, z, **SETTINGS, steps=10))


ENERGIES = {"mixture": lambda dim: mixture(dim), "mlp": lambda dim: mlp(dim, 20, 2)}


@pytest.mark.parametrize(("norm", "refresh", "bounds"), SAMPLERS)
@pytest.mark.parametrize("kind", with_slow(["mlp"], ["mixture"]))
def test_every_sampler(few_programs, kind, norm, refresh, bounds):
    energy, z = ENERGIES[kind](3), chains(5, 3)
    settings = SETTINGS | dict(norm=norm, refresh=refresh, bounds=bounds, threshold=0.2, steps=10)
    out, want = whole_chain.run(energy, z, **settings), one_by_one(energy, z, **settings)
    assert_close(out, want)
    assert bounds is None or (out.z.min() >= bounds[0] and out.z.max() <= bounds[1])
    mutants = [dict(refresh={"update": "transition", "transition": "update"}[refresh]), dict(threshold=math.inf)]
    mutants += [dict(norm={"element": "chain", "chain": "element", "channel": "element"}[norm])]
    for change in mutants:
        with pytest.raises(AssertionError):
            assert_close(rounded(one_by_one(energy, z, **settings | change)), want)


@pytest.mark.parametrize("kind", ENERGIES)
def test_plain_langevin(few_programs, kind):
    energy, z = ENERGIES[kind](2), chains(5, 2)
    settings = SETTINGS | dict(threshold=math.inf, steps=10)
    out = whole_chain.run(energy, z, **settings)
    assert_close(out, one_by_one(energy, z, **settings))
    assert (out.gamma_mean == 1).all() and not out.clip_fraction.any()


@one_in(3, kind=list(ENERGIES), dim=DIMS)
def test_noise_is_the_stream(few_programs, kind, dim):
    """Whatever lanes a chain's elements take, at any offset, step and seed."""
    energy, z = ENERGIES[kind](dim), chains(3, dim)
    for seed, step, offset in ((0, 0, 1), (-1, (1 << 56) - 2, 2), ((1 << 64) - 7, 1 << 32, 3), (5, 6, (1 << 40) + 1)):
        settings = SETTINGS | dict(seed=seed, step=step, offset=offset, steps=2, noise_scale=1.3)
        assert_close(whole_chain.run(energy, z, **settings), one_by_one(energy, z, **settings), 2e-5)


@pytest.mark.parametrize("kind", ENERGIES)
def test_one_transition_is_the_operators(few_programs, kind):
    energy, z = ENERGIES[kind](3), chains(9, 3)
    u, score = evaluator(energy)(z)
    out = whole_chain.run(energy, z, **SETTINGS, steps=1)
    want, seen = ops.anisotropic_step(z, score, SETTINGS["threshold"], **without_threshold(SETTINGS), statistics=True)
    seen = (seen.gamma_mean, seen.score_rms, seen.clip_fraction, torch.ones_like(u))
    for a, b in zip(out, (want, u, *seen), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-5)


def without_threshold(settings):
    return {name: x for name, x in settings.items() if name != "threshold"}


@pytest.mark.parametrize("kind", ENERGIES)
def test_a_run_in_pieces_and_a_batch_in_slices(few_programs, kind):
    energy, z = ENERGIES[kind](2), chains(7, 2)
    whole = whole_chain.run(energy, z, **SETTINGS, steps=7)
    first = whole_chain.run(energy, z, **SETTINGS, steps=3)
    then = SETTINGS | dict(step=SETTINGS["step"] + 3)
    torch.testing.assert_close(whole_chain.run(energy, first.z, **then, steps=4), whole, rtol=1e-5, atol=1e-5)
    part = whole_chain.run(energy, z[5:], **SETTINGS, steps=7, offset=5)
    torch.testing.assert_close(part, whole_chain.Trajectory(*(x[5:] for x in whole)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ENERGIES)
def test_numbers_and_tensors(few_programs, kind):
    energy, z = ENERGIES[kind](2), chains(5, 2)
    numbers = SETTINGS | dict(seed=-3)
    want = whole_chain.run(energy, z, **numbers, steps=3)
    tensors = {
        name: torch.tensor(x, device=DEVICE, dtype=torch.int64 if name in ("seed", "step") else torch.float32)
        for name, x in numbers.items()
    }
    for name in numbers:
        out = whole_chain.run(energy, z, **numbers | {name: tensors[name]}, steps=3)
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True)), name
    assert torch.equal(whole_chain.run(energy, z, **tensors, steps=3).z, want.z)


def test_matrices_that_do_not_fit_are_read_at_every_transition(monkeypatch):
    """The same numbers to rounding, however many matrices stay on chip."""
    dim, width, depth, features = SQUEEZED
    energy, z = mlp(dim, width, depth, features=features), chains(3, dim)
    from fastanila.kernels.mlp import mlp_constants

    held, want = set(), whole_chain.run(energy, z, **SETTINGS, steps=3)
    for shared in SHARED_MEMORIES:
        monkeypatch.setattr(whole_chain_ops, "shared_memory", lambda z, shared=shared: shared)
        held.add(mlp_constants(*SQUEEZED, len(z), shared)[0]["HELD"])
        got = whole_chain.run(energy, z, **SETTINGS, steps=3)
        torch.testing.assert_close(got.z, want.z, rtol=1e-5, atol=1e-5)
    assert held == {0, 1, 2, 3, 4, 5, 6, 8}  # seven and room for the eighth hold eight
    monkeypatch.setattr(whole_chain_ops, "shared_memory", lambda z: 9000)
    assert "shared memory" in whole_chain.refusal(energy, z)
    with pytest.raises(ValueError, match="a layer of the energy exceeds"):
        whole_chain.run(energy, z, **SETTINGS, steps=3)


def test_phases_far_from_zero(few_programs):
    """Fast sines err there; the states' own rounding, times the frequency, is what is left."""
    energy, z = mlp(2, 16, 1, features=16, confinement=0.0), chains(5, 2)
    energy.projections.mul_(20)
    settings = SETTINGS | dict(threshold=0.5, step_size=1e-6)
    assert (z @ energy.projections.T).abs().max() > 100
    assert_close(whole_chain.run(energy, z, **settings, steps=2), one_by_one(energy, z, **settings, steps=2))


# ---------------------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("refresh", reference.REFRESHES)
@pytest.mark.parametrize("norm", ["element", "chain"])
def test_nan_stays_in_its_chain_and_shows(few_programs, norm, refresh):
    for energy in (mixture(3), mlp(3, 20, 2)):
        z = chains(5, 3)
        z[1, 2] = math.nan
        out = whole_chain.run(energy, z, **SETTINGS, steps=2, norm=norm, refresh=refresh, bounds=(-3.0, 3.0))
        clean = whole_chain.run(
            energy, z[2:], **SETTINGS, steps=2, norm=norm, refresh=refresh, bounds=(-3, 3), offset=2
        )
        assert out.z[1].isnan().all() and out.energy[1].isnan() and out.score_rms[1].isnan()
        assert out.z[0].isfinite().all()
        torch.testing.assert_close(out.z[2:], clean.z, rtol=1e-5, atol=1e-5)


def test_huge_and_infinite_scores_move_a_step(few_programs):
    z = torch.tensor([[3.0, -2.0, 0.5], [1.0, 1.0, 1.0]], device=DEVICE)
    for confinement in (1e30, 3e38):  # the score -c x: huge, then infinite where |x| > 1
        energy = mlp(3, 20, 1, confinement=confinement)
        settings = SETTINGS | dict(threshold=2.0, step_size=0.5, steps=1)
        out = whole_chain.run(energy, z, **settings)
        torch.testing.assert_close(out.z, z - 0.5 * z.sign(), rtol=1e-6, atol=1e-6)
        assert (out.clip_fraction == 1).all() and out.gamma_mean.max() < 1e-29
        assert out.score_rms[1].item() == pytest.approx(confinement, rel=1e-6)
        out = whole_chain.run(energy, z, **settings, norm="chain")
        length = (out.z - z).norm(dim=1)
        torch.testing.assert_close(length, torch.full_like(length, 0.5), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------- accepted or rejected

EXACT = dict(threshold=1.5, step_size=2.5, seed=(1 << 63) + 5, step=(1 << 33) - 4, steps=5)


class Judged(NamedTuple):
    """What `judged_one_by_one` finds."""

    out: whole_chain.Trajectory
    accepted: torch.Tensor  #: (steps, B) bool
    margin: torch.Tensor  #: (B,), the smallest |log alpha - log u| of a chain's transitions


def judged_one_by_one(
    energy, z, *, threshold, step_size, seed, step, steps, norm="element", offset=0,
    ratio=reference.log_accept, uniform_step=0, stream=noise.Stream.ACCEPTANCE, element=0, noise_step=1, first=False,
    carried=("energy", "score"), seen="before",
):  # fmt: skip
    """Metropolis transitions in float64 on the CPU. The last eight arguments make mutants of them."""
    energy, z = copy.deepcopy(energy).double().cpu(), z.double().cpu()

    def at(x):
        x = x.clone().requires_grad_()
        u = value(energy, x)
        return u.detach(), -torch.autograd.grad(u.sum(), x)[0]

    def proposal(z, score, t):
        xi = noise.normal(z.shape, seed=seed, step=t, offset=offset, dtype=torch.float64)
        return reference.anisotropic_step(z, score, threshold, step_size=step_size, norm=norm, noise=xi)

    def seen_at(u, score):
        found = reference.statistics(score, threshold, norm)
        return dict(energy=u, gamma_mean=found.gamma_mean, score_rms=found.score_rms, clip_fraction=found.clip_fraction)

    u, score = at(z)
    y = z if first else proposal(z, score, step)
    accepted, margin = [], []
    for j in range(steps):
        before, (new_u, new_score) = (u, score), at(y)
        log_alpha = ratio(z, score, u, y, new_score, new_u, threshold, step_size=step_size, norm=norm)
        place = dict(seed=seed, step=step + j + uniform_step, stream=stream, offset=offset + element)
        log_u = noise.uniform(z.shape[:1], **place).double().log()
        judged = reference.Judgement(log_alpha.isfinite() & (log_u < log_alpha), reference.acceptance(log_alpha))
        z = judged.pick(y, z)
        u = judged.pick(new_u, u) if "energy" in carried else new_u
        score = judged.pick(new_score, score) if "score" in carried else new_score
        y = proposal(z, score, step + j + noise_step)
        accepted.append(judged.accepted)
        margin.append((log_alpha - log_u).abs().nan_to_num(math.inf))
    found = seen_at(*(before if seen == "before" else (u, score)))
    out = whole_chain.Trajectory(z=z, **found, acceptance=judged.acceptance)
    return Judged(out, torch.stack(accepted), torch.stack(margin).amin(0))


def only(out, which):
    return whole_chain.Trajectory(*(x[which.to(x.device)] for x in out))


def check_adjusted(energy, z, **settings):
    """The kernel's chains are those of the definition, but for the few with a decision that rounding could turn."""
    before, want = z.clone(), judged_one_by_one(energy, z, **settings)
    out = whole_chain.run(energy, z, adjusted=True, **settings)
    clear = want.margin > 1e-3
    assert (~clear).sum() <= 1
    assert_close(only(out, clear), only(want.out, clear), 3e-4)
    assert torch.equal(z, before)
    return want


@pytest.mark.parametrize(("dim", "components", "norm"), with_slow(ADJUSTED_MIXTURES, SLOW_ADJUSTED_MIXTURES))
def test_an_adjusted_mixture(poisoned, dim, components, norm):
    want = check_adjusted(mixture(dim, components), chains(21, dim), norm=norm, **EXACT)
    assert 0.1 < want.accepted.double().mean() < 0.97


@pytest.mark.parametrize(
    ("dim", "width", "depth", "features", "activation", "norm", "count", "rows"),
    with_slow(ADJUSTED_NETWORKS, SLOW_ADJUSTED_NETWORKS),
)
def test_an_adjusted_network(poisoned, monkeypatch, dim, width, depth, features, activation, norm, count, rows):
    monkeypatch.setattr("fastanila.kernels.mlp.PROGRAMS", -(-count // rows))
    energy = mlp(dim, width, depth, features=features, activation=activation)
    want = check_adjusted(energy, chains(count, dim), norm=norm, **EXACT)
    assert count == 1 or 0.1 < want.accepted.double().mean() < 0.97


def without_log_gamma(z, score, energy, y, new_score, new_energy, threshold, **settings):
    sd, back = (reference.proposal(s, s, threshold, **settings).sd for s in (score, new_score))
    right = reference.log_accept(z, score, energy, y, new_score, new_energy, threshold, **settings)
    return right - (sd / back).log().sum(1)


def without_energy(z, score, energy, y, new_score, new_energy, *rest, **settings):
    return reference.log_accept(z, score, energy, y, new_score, energy, *rest, **settings)


def energy_reversed(z, score, energy, y, new_score, new_energy, *rest, **settings):
    return reference.log_accept(z, score, new_energy, y, new_score, energy, *rest, **settings)


def another_threshold(z, score, energy, y, new_score, new_energy, threshold, **settings):
    return reference.log_accept(z, score, energy, y, new_score, new_energy, 1.1 * threshold, **settings)


def another_step_size(*tensors, step_size, norm):
    return reference.log_accept(*tensors, step_size=1.1 * step_size, norm=norm)


def stale_score(z, score, energy, y, new_score, new_energy, threshold, **settings):
    return reference.log_accept(z, score, energy, y, score, new_energy, threshold, **settings)


def backwards(z, score, energy, y, new_score, new_energy, threshold, **settings):
    return -reference.log_accept(z, score, energy, y, new_score, new_energy, threshold, **settings)


ADJUSTED_MUTANTS = {
    "the next step's uniform": dict(uniform_step=1),
    "the last step's uniform": dict(uniform_step=-1),
    "the stream of the normals": dict(stream=noise.Stream.LANGEVIN),
    "the next chain's uniform": dict(element=1),
    "the same normals again": dict(noise_step=0),
    "normals of a step too late": dict(noise_step=2),
    "log gamma missing": dict(ratio=without_log_gamma),
    "the energies missing": dict(ratio=without_energy),
    "the energies' difference reversed": dict(ratio=energy_reversed),
    "the ratio reversed": dict(ratio=backwards),
    "judged by another threshold": dict(ratio=another_threshold),
    "judged by another step size": dict(ratio=another_step_size),
    "the reverse move by the score at z": dict(ratio=stale_score),
    "always accepted": dict(ratio=lambda *a, **k: torch.zeros_like(a[2])),
    "the first pass counts as a transition": dict(first=True),
    "the energy of a refused place": dict(carried=("score",)),
    "the score of a refused place": dict(carried=("energy",)),
    "statistics of where the transition ends": dict(seen="after"),
}


def test_mutants_of_adjusted_transitions_are_told():
    """By the comparison above, on its mixture and its network."""
    for energy, z, norm in ((mixture(2), chains(21, 2), "element"), (mlp(2, features=64), chains(9, 2), "element")):
        settings = EXACT | dict(norm=norm)
        want = judged_one_by_one(energy, z, **settings)
        clear = want.margin > 1e-3
        for name, change in ADJUSTED_MUTANTS.items():
            mutant = only(rounded(judged_one_by_one(energy, z, **settings | change).out), clear)
            try:
                assert_close(mutant, only(want.out, clear), 3e-4)
            except AssertionError:
                continue
            pytest.fail(f"{name} is not told on a {type(energy).__name__}")


@one_in(2, kind=list(ENERGIES), dim=DIMS)
def test_adjusted_randomness_is_the_stream(few_programs, kind, dim):
    """At any offset, step and seed, in numbers or tensors."""
    energy, z = mixture(dim, 1) if kind == "mixture" else mlp(dim, 5, 1), chains(3, dim)
    cases = ((-1, 0, 1), ((1 << 64) - 7, (1 << 56) - 3, (1 << 40) + 1))
    for case, (seed, step, offset) in enumerate(cases):
        settings = EXACT | dict(seed=seed, step=step, offset=offset, steps=2)
        check_adjusted(energy, z, **settings)
        if case == 0 and dim == 2:
            tensors = {
                name: torch.tensor(
                    settings[name], device=DEVICE, dtype=torch.int64 if name in ("seed", "step") else torch.float32
                )
                for name in ("threshold", "step_size", "seed", "step")
            }
            some, other = (whole_chain.run(energy, z, adjusted=True, **settings | x) for x in ({}, tensors))
            assert all(map(torch.equal, some, other))


ADJUSTED_SAMPLERS = {
    "mala": MALA(2.0),
    "element": AdjustedAniLA(1.0, 2.0),
    "chain": AdjustedAniLA(1.0, 2.0, "chain"),
}


@pytest.mark.parametrize("kind", ENERGIES)
@pytest.mark.parametrize("name", ADJUSTED_SAMPLERS)
def test_an_exact_sampler_in_pieces_is_the_sampler_step_by_step(few_programs, monkeypatch, kind, name):
    """Decisions and statistics, seen at every second transition; and at once."""
    energy, z, sampler = ENERGIES[kind](2), chains(7, 2), ADJUSTED_SAMPLERS[name]
    settings = dict(steps=4, seed=3, step=5, offset=2)
    launches, run = [], whole_chain.run
    monkeypatch.setattr(whole_chain, "run", lambda *a, **k: (launches.append(k["steps"]), run(*a, **k))[1])
    infos, plain = [], []
    watch = dict(callback_every=2, keep_every=2)
    kept = sampler.run(energy, z, **settings, **watch, callback=infos.append)
    assert launches == [2, 2]
    with ops.plain():
        want = sampler.run(energy, z, **settings, **watch, callback=plain.append, compile=False)
    torch.testing.assert_close(kept, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(infos, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-4, atol=3e-4)
    assert 0 < plain[-1].acceptance.min() < 1 and not torch.equal(kept[0], kept[1])
    torch.testing.assert_close(sampler.run(energy, z, **settings), kept[-1], rtol=1e-5, atol=1e-5)


def test_adapt_finds_the_same_step_size(few_programs):
    energy, z = mixture(2, 1), chains(9, 2)
    found = AdjustedAniLA(1.0, 2.0).adapt(energy, z, steps=6, seed=3)
    with ops.plain():
        plain = AdjustedAniLA(1.0, 2.0).adapt(energy, z, steps=6, seed=3, compile=False)
    assert found.sampler.step_size == pytest.approx(plain.sampler.step_size, rel=1e-3)
    torch.testing.assert_close(found.z, plain.z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["element", "chain"])
def test_what_is_not_finite_is_rejected(few_programs, norm):
    def check(energy, z, sampler, acceptance=None):
        settings, infos = dict(steps=2, seed=1, callback_every=2), ([], [])
        out = sampler.run(energy, z, **settings, callback=infos[0].append)
        with ops.plain():
            want = sampler.run(energy, z, **settings, callback=infos[1].append, compile=False)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(infos[0][0], infos[1][0], rtol=3e-4, atol=3e-4, equal_nan=True)
        return out, infos[0][0].acceptance

    sampler = AdjustedAniLA(2.0, 0.5, norm)
    for energy in (mixture(3), mlp(3, 20, 2)):
        z = chains(5, 3)
        z[1, 2], z[3] = math.nan, 1e25  # whose energy is inf
        out, acceptance = check(energy, z, sampler)
        assert torch.equal(out[[1, 3]].nan_to_num(), z[[1, 3]].nan_to_num()) and (acceptance[[1, 3]] == 0).all()
        z = chains(5, 3)
        out, acceptance = check(energy, z, dataclasses.replace(sampler, threshold=math.inf, step_size=1e38))
        assert torch.equal(out, z) and (acceptance == 0).all()  # proposals so far out that their energies overflow
    # from where the energy is inf to where it is not: the ratio is infinite
    z = torch.tensor([[1.9e19, 0.0, 0.0]], device=DEVICE)
    out, acceptance = check(mlp(3, 20, 1, confinement=1.0), z, AdjustedAniLA(1e18, 4.0, norm))
    assert torch.equal(out, z) and acceptance[0] == 0
    z = torch.tensor([[3.0, -2.0, 0.5], [0.0, 0.0, 0.0]], device=DEVICE)
    out, acceptance = check(mlp(3, 20, 1, confinement=3e38), z, sampler)  # the score is infinite where |x| > 1
    assert torch.equal(out[0], z[0]) and acceptance[0] == 0


@pytest.mark.parametrize("kind", ENERGIES)
def test_adjusted_it_is_one_launch_of_new_tensors(monkeypatch, few_programs, kind):
    launches = counting(monkeypatch, (dispatch.kernels.mixture, "_launch_mixture"), (dispatch.kernels.mlp, "_launch"))
    energy, z = ENERGIES[kind](2), chains(3, 2).requires_grad_()
    out = whole_chain.run(energy, z, **EXACT, adjusted=True)
    assert len(launches) == 1 and not any(x.requires_grad for x in out) and out.z.data_ptr() != z.data_ptr()
    empty = whole_chain.run(energy, torch.zeros(0, 2, device=DEVICE), **EXACT, adjusted=True)
    assert empty.z.shape == (0, 2) and empty.acceptance.shape == (0,)
    assert len(launches) == 1


# ------------------------------------------------------------------------------------------------------------ the law


def test_the_law_of_short_chains():
    """Langevin on N(0, 1) is autoregressive; 6 standard errors, twice, false alarm below 1e-8."""
    eps, steps, z = 0.5, 12, torch.zeros(96, 8, device=DEVICE)
    energy = GaussianMixture(torch.zeros(1, 8, device=DEVICE))
    settings = dict(threshold=math.inf, step_size=eps, noise_scale=1.0, seed=1, step=0, steps=steps)
    out = whole_chain.run(energy, z, **settings).z
    variance = eps * sum((1 - eps / 2) ** (2 * k) for k in range(steps))
    error = math.sqrt(variance / out.numel())
    assert abs(out.mean().item()) < 6 * error
    assert abs(out.var().item() - variance) < 6 * variance * math.sqrt(2 / out.numel())


@pytest.mark.skipif(DEVICE == "cpu", reason="takes the interpreter hours")
def test_the_law_of_long_chains():
    """AniLA's small-step law on N(0, 1), exp(-x^2/2) max(1, |x|/b): variance 1.42 at b = 1, not 1; adjusted it is 1."""
    x = torch.linspace(-12, 12, 100001, dtype=torch.float64)
    density = torch.exp(-0.5 * x**2) * x.abs().clamp(min=1)
    want = ((density * x**2).sum() / density.sum()).item()
    energy = GaussianMixture(torch.zeros(1, 2, device=DEVICE))
    settings = dict(threshold=1.0, seed=1, step=0, steps=2000)
    start = torch.zeros(100_000, 2, device=DEVICE)
    out = whole_chain.run(energy, start, step_size=0.02, **settings).z
    assert want == pytest.approx(1.42, abs=0.01)
    assert out.var().item() == pytest.approx(want, rel=0.03)
    exact = whole_chain.run(energy, start, step_size=0.5, adjusted=True, **settings).z
    assert exact.var().item() == pytest.approx(1.0, rel=0.02)  # six standard errors


# ------------------------------------------------------------------------------------------ launches and registration


@pytest.mark.parametrize("kind", ENERGIES)
def test_one_launch(monkeypatch, few_programs, kind):
    launches = counting(monkeypatch, (dispatch.kernels.mixture, "_launch_mixture"), (dispatch.kernels.mlp, "_launch"))
    whole_chain.run(ENERGIES[kind](2), chains(33, 2), **SETTINGS, steps=4)
    assert len(launches) == 1


@pytest.mark.parametrize("kind", ENERGIES)
def test_parameters_are_read_at_the_launch(few_programs, kind):
    energy, z = ENERGIES[kind](2), chains(3, 2)
    before = whole_chain.run(energy, z, **SETTINGS, steps=2)
    with torch.no_grad():
        for x in [*energy.parameters()] or [energy.means]:
            x.add_(0.3)
    after = whole_chain.run(energy, z, **SETTINGS, steps=2)
    assert not torch.isclose(after.z, before.z, atol=1e-5).all()
    assert_close(after, one_by_one(energy, z, **SETTINGS, steps=2))


def test_results_are_new_and_detached(few_programs):
    energy, z = mlp(2, 20, 1), chains(3, 2).requires_grad_()
    out = whole_chain.run(energy, z, **SETTINGS, steps=2)
    assert not any(x.requires_grad for x in out) and out.z.data_ptr() != z.data_ptr()
    strided = chains(3, 2).T.contiguous().T
    assert torch.equal(whole_chain.run(energy, strided, **SETTINGS, steps=2).z, out.z)


@pytest.mark.parametrize("kind", ENERGIES)
def test_empty(kind):
    out = whole_chain.run(ENERGIES[kind](2), torch.zeros(0, 2, device=DEVICE), **SETTINGS, steps=2)
    assert out.z.shape == (0, 2) and out.energy.shape == (0,)


@one_in(2, kind=list(ENERGIES), tensors=[True, False])
def test_opcheck(monkeypatch, few_programs, kind, tensors):
    caught = []
    numbers = SETTINGS | dict(seed=3, bounds=(-2.0, 2.0))
    if tensors:
        numbers |= dict(threshold=torch.tensor(1.0, device=DEVICE), step=torch.tensor(4, device=DEVICE))
    face = getattr(whole_chain_ops, kind)
    monkeypatch.setattr(dispatch, "direct", lambda *tensors: False)  # through torch's dispatcher
    monkeypatch.setattr(whole_chain_ops, kind, lambda *given: (caught.append(given), face(*given))[1])
    whole_chain.run(ENERGIES[kind](2), chains(3, 2), **numbers, steps=2)
    ((*first, arguments),) = caught
    torch.library.opcheck(getattr(torch.ops.fastanila, f"{kind}_trajectory").default, (*first, *arguments))


@pytest.mark.parametrize("kind", with_slow([], ["mlp", "mixture"]))
def test_compiled_it_is_one_opaque_call(few_programs, kind):
    energy = ENERGIES[kind](2)

    def f(z, seed, step):
        out = whole_chain.run(energy, 1.0 * z, **SETTINGS | dict(seed=seed, step=step), steps=3)
        return out.z + 1.0, out.energy

    counter = CompileCounter()
    for i in range(3):
        arguments = chains(3, 2, seed=i), torch.tensor(i, device=DEVICE), torch.tensor(2 + i, device=DEVICE)
        made = torch.compile(f, fullgraph=True)(*arguments)
        torch.testing.assert_close(made, f(*arguments), rtol=1e-5, atol=1e-5)
        torch.compile(f, fullgraph=True, backend=counter)(*arguments)
    assert counter.frame_count == 1


def test_supports():
    z = chains(3, 2)
    hooked, deep, uneven = mlp(2), mlp(2, depth=4), mlp(2)
    hooked.layers[0].register_forward_hook(lambda *a: None)
    uneven.layers[2] = torch.nn.Linear(64, 64, bias=False, device=DEVICE)
    yes = [
        (mixture(2), z), (mixture(8, 1000), chains(1, 8)), (mlp(2), z), (mlp(2, 128, 3, features=128), z),
        (mlp(1, 1, 1, features=1), chains(1, 1)), (mlp(2, activation="leaky-relu"), z.T.contiguous().T),
    ]  # fmt: skip
    no = {
        "mask": (mixture(2), z, torch.ones(3, 2, device=DEVICE) > 0),
        "float64": (mixture(2), z.double()),
        "its own dtype": (mixture(2).double(), z),
        "another size": (mixture(3), z),
        "another input": (mlp(3), z),
        "images": (mixture(2), z[..., None]),
        "too many elements": (mixture(9), chains(3, 9)),
        "too wide": (mlp(2, 129), z),
        "too deep": (deep, z),
        "too many features": (mlp(2, features=129), z),
        "a hook": (hooked, z),
        "a layer without a bias": (uneven, z),
        "autocast": (Autocast(mlp(2)), z),
        "another module": (ConvNet(1, 8), z),
        "a function": (lambda x: x.sum(1), z),
        "no device of ours": (mixture(2).to("meta"), z.to("meta")),
    }
    assert all(whole_chain.supports(*case) for case in yes)
    for name, (energy, states, *mask) in no.items():
        assert not whole_chain.supports(energy, states, mask=mask[0] if mask else None), name
        if not mask:
            with pytest.raises(ValueError, match="energy and z must be what"):
                whole_chain.run(energy, states, **SETTINGS, steps=1)

    class Mine(MLP):
        pass

    assert not whole_chain.supports(Mine(2).to(DEVICE), z)
    with ops.plain():
        assert not whole_chain.supports(mixture(2), z)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert not whole_chain.supports(mlp(2), z)
