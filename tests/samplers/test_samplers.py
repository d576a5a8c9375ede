"""Samplers: settings, the loop, what they leave behind. Their laws: tests/test_laws.py and tests/test_adjusted.py."""

import copy
import dataclasses
import inspect
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import fastanila
import oracle
from fastanila import (
    HMC,
    MALA,
    AdjustedAniLA,
    AniLA,
    CodedAniLA,
    GradientDescent,
    Langevin,
    ShrunkNoise,
    TamedLangevin,
    calibrate,
    noise,
    ops,
)
from fastanila.models import MLP, GaussianMixture
from fastanila.models.score import evaluator
from fastanila.samplers import EXACT, SAMPLERS
from fastanila.samplers import stepwise as stepwise_samplers
from fastanila.samplers.captured import Captured
from fastanila.samplers.state import State, leaves
from fastanila.samplers.stepwise import Stepwise
from fastanila.training import settings


def quadratic(x):
    return 0.5 * x.square().flatten(1).sum(1)


def start(chains=64, dim=2):
    return torch.randn(chains, dim, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------ the loop


ADJUSTED = [MALA(1.0), AdjustedAniLA(0.7, 1.0), AdjustedAniLA(1.0, 1.0, "chain"), HMC(0.5, 3)]
UNADJUSTED = [
    Langevin(0.1, 0.7), Langevin(0.1, bounds=(-1, 1)), AniLA(0.5, 0.1), AniLA(0.5, 0.1, 0.7, "chain"),
    TamedLangevin(0.2, 0.1), TamedLangevin(0.3, 0.1, 0.7, "chain", (-1, 1)), GradientDescent(0.1),
    CodedAniLA(0.5, 0.1), ShrunkNoise(0.5, 0.1, 0.7, "chain", (-1, 1)),
]  # fmt: skip
ALL = [*UNADJUSTED, *ADJUSTED]
every_sampler = pytest.mark.parametrize("sampler", ALL, ids=str)


def test_all_are_known_by_name():
    assert {type(s) for s in ALL} == set(SAMPLERS.values())
    assert set(settings.names_of("sampler")) == set(SAMPLERS)
    others = {"Preconditioned", "ReplicaExchange", "Sampler", "calibrate", "load"}
    assert {kind.__name__ for kind in SAMPLERS.values()} | others == set(fastanila.__all__)
    assert all(getattr(fastanila, kind.__name__) is kind for kind in SAMPLERS.values())
    assert [name for name, kind in SAMPLERS.items() if kind.is_exact] == [*EXACT]
    assert all(s.gradients == (3 if isinstance(s, HMC) else 1) for s in ALL)
    assert all(s.is_exact == (s in ADJUSTED) for s in ALL)


@every_sampler
def test_run_is_the_transition_repeated(sampler):
    state, z = State(start()), start()
    for t in range(5, 12):
        state, _ = sampler.transition(evaluator(quadratic), state, seed=3, step=t)
    got = sampler.run(quadratic, z, steps=7, seed=3, step=5, compile=False)
    torch.testing.assert_close(got, state.z, rtol=0, atol=1e-6)
    assert torch.equal(z, start())  # not changed
    assert not torch.allclose(got, sampler.run(quadratic, z, steps=7, seed=4, step=5, compile=False)) or isinstance(
        sampler, GradientDescent
    )


@pytest.mark.parametrize("sampler", UNADJUSTED, ids=str)
def test_a_score_is_enough_for_the_unadjusted(sampler):
    settings = dict(steps=7, seed=3, step=5, compile=False)
    by_score, by_energy = (sampler.run(*given, start(), **settings, **more) for given, more in (
        ((None,), dict(score=torch.neg)), ((quadratic,), {})))  # fmt: skip
    torch.testing.assert_close(by_score, by_energy, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ADJUSTED, ids=str)
def test_a_score_is_not_enough_for_the_adjusted(sampler):
    with pytest.raises(ValueError, match=f"energy must be given, for {type(sampler).__name__} compares energies"):
        sampler.run(None, start(), score=torch.neg, steps=1, seed=0, compile=False)


# ---------------------------------------------------------------------------------- one transition against the formula


def bumpy(x):
    return x.square().square().flatten(1).sum(1) / 4 + x.flatten(1).sum(1).square() / 2


def bumpy_energy(x):
    return (x**4).reshape(len(x), -1).sum(1) / 4 + x.reshape(len(x), -1).sum(1) ** 2 / 2


def bumpy_score(x):
    return -(x**3) - x.sum((1, 2), keepdims=True)


def lattice(chains=200):
    return 0.8 * torch.randn(chains, 2, 3, generator=torch.Generator().manual_seed(0))


MASKS = [None, torch.tensor([True, False, True]), torch.arange(200).view(-1, 1, 1) % 2 == 0]
masks = pytest.mark.parametrize("mask", MASKS, ids=["", "masked", "masked by chain"])


def drawn(z, seed, step):
    return oracle.normals(np.arange(z.numel(), dtype=object), seed, step).reshape(z.shape)


@masks
@pytest.mark.parametrize(
    "sampler",
    [
        Langevin(0.4, 0.7, (-0.5, 1.0)),
        *(AniLA(1.2, 0.4, 0.7, norm) for norm in ("element", "channel", "chain")),
        *(TamedLangevin(0.9, 0.4, 0.7, norm, (-1.5, 1.5)) for norm in ("element", "channel", "chain")),
        *(CodedAniLA(1.2, 0.4, 0.7, norm) for norm in ("element", "channel", "chain")),
        *(ShrunkNoise(1.2, 0.4, 0.7, norm, (-1.5, 1.5)) for norm in ("element", "channel", "chain")),
        GradientDescent(0.1, (-0.5, 1.0)),
    ],
    ids=str,
)
def test_an_unadjusted_transition_equals_the_formula(sampler, mask):
    z, s = lattice(), bumpy_score(lattice().double().numpy())
    after, _ = sampler.transition(evaluator(bumpy), State(z), seed=7, step=5, mask=mask)
    law = sampler.proposal(z, torch.from_numpy(s).float())

    def want(eps=sampler.step_size, **settings):
        b, score = sampler.threshold, s
        if isinstance(sampler, TamedLangevin):
            b, score = math.inf, oracle.gain(s, sampler.threshold / math.sqrt(eps), sampler.norm)[1]
        settings = dict(norm=sampler.norm, noise_scale=sampler.noise_scale) | settings
        if isinstance(sampler, (CodedAniLA, ShrunkNoise)):
            settings.pop("norm")
            gamma, drift = oracle.gain(s, b, sampler.norm)
            # Langevin's step of another drift and other noise: gamma for its root, or the drift as it is
            score, xi = (drift, gamma) if isinstance(sampler, CodedAniLA) else (s, np.sqrt(gamma))
            return oracle.step(z, score, math.inf, xi * drawn(z, 7, 5), step_size=eps, **settings)
        return oracle.step(z, score, b, drawn(z, 7, 5), step_size=eps, **settings)

    clamped = dict(bounds=sampler.bounds, mask=None if mask is None else mask.numpy())
    np.testing.assert_allclose(after.z, want(**clamped), rtol=2e-5, atol=1e-5)
    assert not np.allclose(after.z, want(eps=1.01 * sampler.step_size, **clamped), rtol=2e-5, atol=1e-5)
    # mean and deviation, ahead of clamping
    np.testing.assert_allclose(law.mean, want(noise_scale=0.0), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(law.mean + law.sd * torch.from_numpy(drawn(z, 7, 5)), want(), rtol=2e-5, atol=1e-5)


def uniforms(z, seed, step):
    return oracle.uniforms(np.arange(len(z), dtype=object), seed, step, stream=1)


@masks
@pytest.mark.parametrize(
    "sampler", [MALA(0.4), *(AdjustedAniLA(1.2, 0.4, norm) for norm in ("element", "channel", "chain"))], ids=str
)
def test_adjusted_transitions_equal_the_formula(sampler, mask):
    """Three in a row, each from the state the last one left: who is accepted, how likely, and the next proposal."""
    settings = dict(step_size=sampler.step_size, norm=sampler.norm, mask=None if mask is None else mask.numpy())
    state, at = State(lattice()), lattice().double().numpy()
    proposal, b = (
        oracle.step(at, bumpy_score(at), sampler.threshold, drawn(state.z, 7, 5), **settings),
        sampler.threshold,
    )
    for t in (5, 6, 7):
        state, info = sampler.transition(evaluator(bumpy), state, seed=7, step=t, mask=mask)
        scores, energies = ([f(x) for x in (at, proposal)] for f in (bumpy_score, bumpy_energy))
        log_alpha = oracle.log_accept(at, scores[0], energies[0], proposal, scores[1], energies[1], b, **settings)
        alpha = np.minimum(1, np.exp(log_alpha))
        np.testing.assert_allclose(info.acceptance, alpha, rtol=0, atol=1e-4)
        np.testing.assert_allclose(info.energy, energies[0], rtol=1e-5, atol=1e-5)
        moved = uniforms(at, 7, t) < alpha
        assert 10 < moved.sum() < 190
        at = np.where(moved[:, None, None], proposal, at)
        np.testing.assert_allclose(state.z, at, rtol=2e-5, atol=2e-5)
        at = state.z.double().numpy()  # as it was rounded
        proposal = oracle.step(at, bumpy_score(at), b, drawn(state.z, 7, t + 1), **settings)
        np.testing.assert_allclose(state.proposal, proposal, rtol=2e-5, atol=2e-5)
        off = oracle.step(at, bumpy_score(at), b, drawn(state.z, 7, t + 1), **settings | dict(step_size=0.404))
        assert not np.allclose(state.proposal, off, rtol=2e-5, atol=2e-5)
        proposal = state.proposal.double().numpy()


@masks
@pytest.mark.parametrize("steps", [1, 3])
def test_a_hamiltonian_transition_equals_the_formula(steps, mask):
    z, eps, held = lattice(), 0.25, None if mask is None else mask.numpy()
    start_, momentum = z.double().numpy(), drawn(z, 7, 5)
    state, info = HMC(eps, steps).transition(evaluator(bumpy), State(z), seed=7, step=5, mask=mask)

    def want(step_size):
        end, p = oracle.leapfrog(start_, momentum, bumpy_score, step_size, steps, held)
        kinetic = (np.broadcast_to(True if held is None else held, z.shape) * (momentum**2 - p**2)).sum((1, 2)) / 2
        alpha = np.minimum(1, np.exp(bumpy_energy(start_) - bumpy_energy(end) + kinetic))
        moved = uniforms(z, 7, 5) < alpha
        return alpha, np.where(moved[:, None, None], end, start_)

    alpha, end = want(eps)
    np.testing.assert_allclose(info.acceptance, alpha, rtol=0, atol=1e-4)
    np.testing.assert_allclose(state.z, end, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(state.energy, bumpy_energy(end), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.score, bumpy_score(end), rtol=1e-4, atol=1e-4)
    assert 0.3 < alpha.mean() < 0.999
    assert not np.allclose(info.acceptance, want(1.01 * eps)[0], rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- the loop, again


@pytest.mark.parametrize("norm", ["element", "chain"])
@pytest.mark.parametrize("compile", [False, True])
def test_refresh_update_freezes_the_gain_of_the_start(norm, compile, compiler):
    z = want = 3 * start()
    size = z.abs() if norm == "element" else z.norm(dim=1, keepdim=True)
    gamma = (0.7 / size.clamp(min=0.7)).expand_as(z)
    assert (gamma < 1).any()
    for t in range(5, 12):
        want = ops.anisotropic_step(want, -want, None, gamma=gamma, step_size=0.1, seed=3, step=t)
    sampler = AniLA(0.7, 0.1, norm=norm, refresh="update")
    got = sampler.run(quadratic, z, steps=7, seed=3, step=5, compile=compile)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    # seen in pieces it is the same gain, and a run of its own takes another
    kept = sampler.run(quadratic, z, steps=7, seed=3, step=5, keep_every=1, compile=compile)
    torch.testing.assert_close(kept[-1], want, rtol=1e-5, atol=1e-5)
    again = sampler.run(quadratic, kept[3], steps=3, seed=3, step=9, compile=compile)
    assert not torch.allclose(again, want, atol=1e-3)


def test_compiled_and_eager_agree_and_there_is_one_graph():
    energy = MLP(2, width=16, features=8, confinement=0.1)
    counters.clear()
    fused = AniLA(0.3, 0.05).run(energy, start(), steps=20, seed=1)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    plain = AniLA(0.3, 0.05).run(energy, start(), steps=20, seed=1, compile=False)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    # other numbers, the same graph
    AniLA(0.7, 0.01, 0.5).run(energy, start(), steps=3, seed=9, step=1 << 40)
    assert counters["stats"]["unique_graphs"] == 1


@every_sampler
def test_a_later_call_goes_on(sampler):
    whole = sampler.run(quadratic, start(), steps=10, seed=1, compile=False)
    half = sampler.run(quadratic, start(), steps=4, seed=1, compile=False)
    assert torch.equal(sampler.run(quadratic, half, steps=6, seed=1, step=4, compile=False), whole)


@every_sampler
def test_a_chain_alone_equals_the_same_chain_in_a_batch(sampler):
    whole = sampler.run(quadratic, start(), steps=10, seed=1, compile=False)
    alone = sampler.run(quadratic, start()[5:6], steps=10, seed=1, offset=5, compile=False)
    assert torch.equal(alone[0], whole[5])


COMPILED = [AdjustedAniLA(0.5, 0.5), HMC(0.1, 2)]


@pytest.mark.parametrize("sampler", COMPILED, ids=str)
def test_adjusted_samplers_compile_to_what_they_are_uncompiled(sampler, compiler):
    energy, infos = MLP(2, width=16, features=8, confinement=0.5), ([], [])
    counters.clear()
    ends = [
        sampler.run(energy, start(), steps=12, seed=1, callback=seen.append, compile=compile)
        for seen, compile in zip(infos, (True, False), strict=True)
    ]
    assert not counters["graph_break"]
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)
    for fused, plain in zip(*infos, strict=True):
        torch.testing.assert_close(tuple(fused), tuple(plain), rtol=1e-3, atol=1e-3)
    assert 0.1 < (torch.stack([i.acceptance for i in infos[0]])).mean() < 0.999


@pytest.mark.parametrize("sampler", [TamedLangevin(0.2, 0.1), GradientDescent(0.1), *ADJUSTED], ids=str)
def test_captured_chains_equal_those_made_one_by_one(sampler):
    """With a stand-in for the graph, which calls again what it would replay: what it reads and writes is the same."""
    energy = GaussianMixture(torch.eye(2))
    advance, recorded = stepwise_samplers.plain_transition(sampler, energy), []

    def record(function, device):
        recorded.append(function)
        return function

    captured, stepwise = Captured(advance, record), Stepwise(advance, sparing=True)
    with torch.no_grad():
        for step in (5, 14):
            arguments = 9, sampler.numbers_on(None), State(start()), noise.as_word64(3), noise.as_word64(step)
            got, want = captured(*arguments), stepwise(*arguments)
            for a, b in zip(leaves(got), leaves(want), strict=True):
                assert torch.equal(a, b)
    assert len(recorded) == 1  # the second call replays the first one's


def test_callback_thinning_and_info():
    infos = []
    kept = AniLA(threshold=0.5).run(
        quadratic, start(), steps=10, seed=1, keep_every=3, callback=infos.append, callback_every=5, compile=False
    )
    assert kept.shape == (3, 64, 2) and len(infos) == 2
    assert torch.equal(kept[2], AniLA(threshold=0.5).run(quadratic, start(), steps=9, seed=1, compile=False))
    z = AniLA(threshold=0.5).run(quadratic, start(), steps=4, seed=1, compile=False)  # what the fifth step saw
    torch.testing.assert_close(infos[0].energy, quadratic(z))
    torch.testing.assert_close(infos[0].score_rms, z.square().mean(1).sqrt())
    torch.testing.assert_close(infos[0].clip_fraction, (z.abs() > 0.5).float().mean(1))
    assert torch.equal(infos[0].acceptance, torch.ones(64))
    assert AniLA().run(quadratic, start(), steps=2, seed=0, keep_every=3, compile=False).shape == (0, 64, 2)
    assert torch.equal(AniLA().run(quadratic, start(), steps=0, seed=0), start())


def test_clip_fraction_by_norm():
    z = torch.tensor([[[3.0], [4.0]], [[0.3], [0.4]]])  # (2, 2, 1): channel and chain norms 5 and 0.5
    infos = []
    for norm in ("element", "channel", "chain"):
        AniLA(3.5, norm=norm).run(quadratic, z, steps=1, seed=0, callback=infos.append, compile=False)
    assert [i.clip_fraction.tolist() for i in infos] == [[0.5, 0.0], [1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("sampler", ADJUSTED, ids=str)
def test_info_of_the_adjusted(sampler):
    infos = []
    kept = sampler.run(
        quadratic, start(), steps=9, seed=1, keep_every=2, callback=infos.append, callback_every=3, compile=False
    )
    assert kept.shape == (4, 64, 2) and len(infos) == 3
    z = sampler.run(quadratic, start(), steps=2, seed=1, compile=False)  # what the third transition saw
    assert torch.equal(kept[0], z)
    torch.testing.assert_close(infos[0].energy, quadratic(z))
    torch.testing.assert_close(infos[0].score_rms, z.square().mean(1).sqrt())
    size = z.norm(dim=1, keepdim=True) if sampler.norm == "chain" else z.abs()
    clips = (size > sampler.threshold).float().expand_as(z).mean(1)
    torch.testing.assert_close(infos[0].clip_fraction, clips)
    assert ((infos[0].acceptance >= 0) & (infos[0].acceptance <= 1)).all() and infos[0].acceptance.std() > 0
    after = sampler.run(quadratic, start(), steps=3, seed=1, compile=False)
    moved = (after != z).any(1)
    assert moved[infos[0].acceptance > 1 - 1e-6].all() and 0 < moved.float().mean() < 1


@every_sampler
def test_mask_keeps_elements(sampler):
    mask = torch.tensor([True, False])
    z = sampler.run(quadratic, start().clamp(-1, 1), steps=20, seed=0, mask=mask, compile=False)
    assert torch.equal(z[:, 1], start().clamp(-1, 1)[:, 1])
    assert torch.isclose(z[:, 0], start().clamp(-1, 1)[:, 0]).float().mean() < 0.2


@every_sampler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_states_keep_their_dtype(sampler, dtype):
    infos = []
    z = sampler.run(quadratic, start().to(dtype), steps=5, seed=0, callback=infos.append, compile=False)
    assert z.dtype == dtype and z.isfinite().all()
    assert all(x.dtype == torch.float32 for x in infos[-1])


@every_sampler
def test_chains_without_number_or_elements(sampler):
    for shape in ((0, 2), (3, 0)):
        assert sampler.run(quadratic, torch.zeros(shape), steps=3, seed=0, compile=False).shape == shape


# ------------------------------------------------------------------------------------- energies that are not finite


def walled(value):
    """N(0, 1) to the right of 0, and nowhere to the left."""
    return lambda x: torch.where(x[:, 0] > 0, quadratic(x), value + 0 * quadratic(x))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("sampler", ADJUSTED, ids=str)
def test_adjusted_chains_never_enter_where_the_energy_is_not_finite(sampler, value):
    infos, z = [], start().abs()
    kept = sampler.run(walled(value), z, steps=40, seed=0, keep_every=1, callback=infos.append, compile=False)
    assert (kept[..., 0] > 0).all() and not torch.isclose(kept[-1], z).all(1).any()
    acceptance = torch.stack([i.acceptance for i in infos])
    assert acceptance.isfinite().all() and (acceptance == 0).any()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("sampler", ADJUSTED, ids=str)
def test_adjusted_chains_that_start_where_it_is_not_finite_stay_and_disturb_no_other(sampler, value):
    infos, z = [], start()
    z[:, 0] = z[:, 0].abs()
    z[::2, 0] *= -1
    after = sampler.run(walled(value), z, steps=10, seed=0, callback=infos.append, compile=False)
    assert torch.equal(after[::2], z[::2]) and all((i.acceptance[::2] == 0).all() for i in infos)
    others = z.clone()
    others[::2, 0] *= -1
    assert torch.equal(sampler.run(walled(value), others, steps=10, seed=0, compile=False)[1::2], after[1::2])


# ---------------------------------------------------------------------------------------- what sampling leaves behind


class Fussy(nn.Module):
    """An energy with dropout, a frozen parameter and a submodule in eval mode, that can raise."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.net[2].eval()
        self.net[0].bias.requires_grad_(False)
        self.seen = None
        self.broken = False

    def forward(self, x):
        self.seen = self.training, self.net[1].training, any(p.requires_grad for p in self.parameters())
        if self.broken:
            raise ArithmeticError("broken")
        return self.net(x).squeeze(-1)


@pytest.mark.parametrize("raises", [False, True])
def test_the_module_is_frozen_and_put_back(raises):
    energy = Fussy()
    modes = [m.training for m in energy.modules()]
    grads = [p.requires_grad for p in energy.parameters()]
    energy.broken = raises
    if raises:
        with pytest.raises(ArithmeticError):
            AniLA().run(energy, start(), steps=2, seed=0, compile=False)
    else:
        AniLA().run(energy, start(), steps=2, seed=0, compile=False)
    assert energy.seen == (False, False, False)
    assert [m.training for m in energy.modules()] == modes
    assert [p.requires_grad for p in energy.parameters()] == grads
    assert all(p.grad is None for p in energy.parameters())


def test_an_energy_that_does_not_trace_runs_eagerly_and_says_so(compiler):
    class Untraceable(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return quadratic(x)

    with pytest.warns(UserWarning, match="does not compile as one graph and runs eagerly"):
        z = AniLA().run(Untraceable(), start(), steps=3, seed=0)
    assert torch.equal(z, AniLA().run(quadratic, start(), steps=3, seed=0, compile=False))


def test_an_unhashable_energy(compiler):
    @dataclasses.dataclass
    class Scaled:
        scale: float

        def __call__(self, x):
            return self.scale * quadratic(x)

    z = AniLA().run(Scaled(2.0), start(), steps=3, seed=0)
    torch.testing.assert_close(z, AniLA().run(Scaled(2.0), start(), steps=3, seed=0, compile=False))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(energy=lambda x: x), r"energy must map \(B, ...\) to \(B,\) = \(64,\), got \(64, 2\)"),
        (dict(energy=None), "energy or score must be given, and not both"),
        (dict(score=torch.neg), "energy or score must be given, and not both"),
        (dict(energy=lambda x: quadratic(x.detach())), "energy must be differentiable in z"),
        (dict(energy=lambda x: quadratic(x.detach()), compile=True), "energy must be differentiable in z"),
        (dict(steps=-1), "steps must be an integer of at least 0, got -1"),
        (dict(keep_every=0), "keep_every must be an integer of at least 1, got 0"),
        (dict(callback_every=1.5), "callback_every must be an integer of at least 1, got 1.5"),
        (dict(step=-1), "step must be an integer of at least 0, got -1"),
        (dict(step=(1 << 56) - 1, steps=2), "step must leave room for steps below"),
        (dict(offset=-1), "offset must be an integer of at least 0, got -1"),
    ],
)
def test_bad_arguments_of_run(arguments, message):
    with pytest.raises(ValueError, match=message):
        AniLA().run(**dict(energy=quadratic, z=start(), steps=1, seed=0, compile=False) | arguments)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AniLA(threshold=0), "threshold must be positive or inf, got 0"),
        (lambda: AniLA(step_size=-1), "step_size must be positive and finite, got -1"),
        (lambda: Langevin(noise_scale=math.nan), "noise_scale must be at least 0 and finite, got nan"),
        (lambda: AniLA(norm="pixel"), "norm must be one of element, channel, chain, got 'pixel'"),
        (lambda: AniLA(refresh="never"), "refresh must be one of transition, update, got 'never'"),
        (lambda: Langevin(bounds=(1, 0)), "bounds must be a pair with low < high"),
        (lambda: TamedLangevin(bounds=(1, 0)), "bounds must be a pair with low < high"),
        (lambda: TamedLangevin(threshold=-1), "threshold must be positive or inf, got -1"),
        (lambda: TamedLangevin(norm="pixel"), "norm must be one of element, channel, chain, got 'pixel'"),
        (lambda: GradientDescent(math.inf), "step_size must be positive and finite, got inf"),
        (lambda: MALA(0), "step_size must be positive and finite, got 0"),
        (lambda: AdjustedAniLA(threshold=math.nan), "threshold must be positive or inf, got nan"),
        (lambda: AdjustedAniLA(norm="pixel"), "norm must be one of element, channel, chain, got 'pixel'"),
        (lambda: HMC(-1.0), "step_size must be positive and finite, got -1"),
        (lambda: HMC(leapfrog_steps=0), "leapfrog_steps must be an integer of at least 1, got 0"),
        (lambda: HMC(leapfrog_steps=1.5), "leapfrog_steps must be an integer of at least 1, got 1.5"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [MALA, AdjustedAniLA, HMC])
@pytest.mark.parametrize(
    "setting, reason",
    [
        (dict(noise_scale=0.5), "noise_scale must be left out of {}, got 0.5: .*give the energy U / T"),
        (dict(bounds=(-1, 1)), r"bounds must be left out of {}, got \(-1, 1\): .*has no density"),
        (dict(refresh="update"), "refresh must be left out of {}, got 'update': .*reverse move"),
    ],
    ids=str,
)
def test_adjusted_samplers_refuse_what_would_break_them_with_the_reason(kind, setting, reason):
    with pytest.raises(ValueError, match=reason.format(kind.__name__)):
        kind(**setting)
    assert (kind().noise_scale, kind().bounds, kind().refresh) == (1.0, None, "transition")
    assert not set(setting) & {*inspect.signature(kind).parameters}
    assert pickle.loads(pickle.dumps(kind(step_size=0.3))) == copy.copy(kind(step_size=0.3)) == kind(step_size=0.3)


@every_sampler
def test_settings_are_frozen_and_may_be_tensors(sampler):
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.step_size = 1.0
    as_tensors = sampler.with_numbers(sampler.numbers_on("cpu"))
    assert isinstance(as_tensors.step_size, torch.Tensor)
    got, want = (s.run(quadratic, start(), steps=3, seed=1, compile=False) for s in (as_tensors, sampler))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- calibration


def test_calibrate():
    energy = GaussianMixture(torch.zeros(1, 4), sd=0.5)
    z = energy.sample(5000, seed=0)
    found = calibrate(energy, z, clip_fraction=0.1, stability=0.1)
    scores = (z / 0.25).abs()
    assert (scores > found.threshold).float().mean().item() == pytest.approx(0.1, abs=1e-3)
    assert found.step_size == pytest.approx(4 * 0.1 * 0.25, rel=0.05)  # 4 stability sd^2
    sampler = AniLA(noise_scale=1.0).calibrate(energy, z, clip_fraction=0.1)
    assert sampler == AniLA(found.threshold, found.step_size)
    assert Langevin().calibrate(energy, z) == Langevin(found.step_size)
    # the promise of the docstring: Langevin's variance is too large by a fraction of about `stability`
    after = Langevin(found.step_size).run(energy, z, steps=300, seed=1, compile=False)
    assert after.var().item() / 0.25 == pytest.approx(1 / 0.9, abs=0.05)
    with pytest.raises(ValueError, match="norm must be one of"):
        calibrate(energy, z, norm="pixel")
    with pytest.raises(ValueError, match="clip_fraction"):
        calibrate(energy, z, clip_fraction=1.0)
    with pytest.raises(ValueError, match="scores at z must be finite"):
        calibrate(energy, z * math.nan)


@every_sampler
def test_every_sampler_can_be_calibrated(sampler):
    energy = GaussianMixture(torch.zeros(1, 4), sd=0.5)
    z = energy.sample(2000, seed=0)
    found = sampler.calibrate(energy, z, clip_fraction=0.1)
    sigma, has_threshold = float(sampler.noise_scale), "threshold" in sampler.numbers
    scale = sigma if sigma else 1.0
    want = calibrate(energy, z, clip_fraction=0.1, norm=sampler.norm, noise_scale=scale)
    assert found.step_size == pytest.approx(want.step_size)
    if has_threshold:
        infos = []
        found.run(energy, z, steps=1, seed=0, callback=infos.append, compile=False)
        assert infos[0].clip_fraction.mean().item() == pytest.approx(0.1, abs=0.01)
    numbers = {"step_size": sampler.step_size} | ({"threshold": sampler.threshold} if has_threshold else {})
    assert dataclasses.replace(found, **numbers) == sampler  # the rest is as it was


def test_the_public_face():
    assert fastanila.__version__ and set(fastanila.__all__) <= set(dir(fastanila))
