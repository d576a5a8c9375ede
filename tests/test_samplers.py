"""Samplers: settings, the loop, what they leave behind, and the laws they claim. Statistical false alarms: 1e-6."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch._dynamo.utils import counters

import fastanila
from fastanila import AniLA, Langevin, calibrate, ops
from fastanila.energies import MLP, GaussianMixture

FALSE_ALARM = 1e-6


def quadratic(x):
    return 0.5 * x.square().flatten(1).sum(1)


def start(chains=64, dim=2):
    return torch.randn(chains, dim, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------ the loop


@pytest.mark.parametrize(
    "sampler", [AniLA(0.5, 0.1), AniLA(0.5, 0.1, norm="chain"), Langevin(0.1), AniLA(0.5, bounds=(-1, 1))]
)
def test_run_is_the_step_repeated(sampler):
    z = want = start()
    for t in range(5, 12):
        want = ops.anisotropic_step(
            want,
            -want,
            getattr(sampler, "threshold", math.inf),
            step_size=sampler.step_size,
            noise_scale=sampler.noise_scale,
            norm=getattr(sampler, "norm", "element"),
            bounds=sampler.bounds,
            seed=3,
            step=t,
        )
    got = sampler.run(quadratic, z, steps=7, seed=3, step=5, compile=False)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert torch.equal(z, start())  # not changed
    by_score = sampler.run(None, z, score=lambda x: -x, steps=7, seed=3, step=5, compile=False)
    torch.testing.assert_close(by_score, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["element", "chain"])
@pytest.mark.parametrize("compile", [False, True])
def test_refresh_update_freezes_the_gain_of_the_start(norm, compile):
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


def test_a_later_call_goes_on():
    whole = AniLA().run(quadratic, start(), steps=10, seed=1, compile=False)
    half = AniLA().run(quadratic, start(), steps=4, seed=1, compile=False)
    assert torch.equal(AniLA().run(quadratic, half, steps=6, seed=1, step=4, compile=False), whole)


def test_a_chain_alone_equals_the_same_chain_in_a_batch():
    whole = AniLA().run(quadratic, start(), steps=10, seed=1, compile=False)
    alone = AniLA().run(quadratic, start()[5:6], steps=10, seed=1, offset=5, compile=False)
    assert torch.equal(alone[0], whole[5])


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


def test_mask_keeps_elements():
    mask = torch.tensor([True, False])
    z = AniLA().run(quadratic, start(), steps=5, seed=0, mask=mask, compile=False)
    assert torch.equal(z[:, 1], start()[:, 1]) and not torch.isclose(z[:, 0], start()[:, 0]).any()


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


def test_an_energy_that_does_not_trace_runs_eagerly_and_says_so():
    class Untraceable(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return quadratic(x)

    with pytest.warns(UserWarning, match="does not compile as one graph and runs eagerly"):
        z = AniLA().run(Untraceable(), start(), steps=3, seed=0)
    assert torch.equal(z, AniLA().run(quadratic, start(), steps=3, seed=0, compile=False))


def test_an_unhashable_energy():
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
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------- laws


def stationary_law(step_size, threshold, noise_scale=1.0, score=lambda x: -x, half_width=8.0, n=1201):
    """The chain's own stationary law in one dimension, by powers of its transition matrix on a grid: (x, cdf)."""
    x = np.linspace(-half_width, half_width, n)
    s = score(x)
    gamma = np.ones_like(x) if math.isinf(threshold) else threshold / np.maximum(threshold, np.abs(s))
    kernel = scipy.stats.norm.pdf(x[None, :], (x + step_size / 2 * gamma * s)[:, None],
                                  (noise_scale * np.sqrt(step_size * gamma))[:, None])  # fmt: skip
    kernel /= kernel.sum(1, keepdims=True)
    for _ in range(14):  # 2^14 transitions
        kernel = kernel @ kernel
    density = kernel[n // 2]
    return x, (density.cumsum() - density / 2) / density.sum()


def distance(z, x, cdf):
    """Kolmogorov-Smirnov p-value of the chains z (N, 1) against a gridded law."""
    return scipy.stats.kstest(z.flatten().double().numpy(), lambda v: np.interp(v, x, cdf)).pvalue


LAWS = [
    # step size, threshold, noise scale, transitions
    (1.0, 1.0, 1.0, 60),
    (1.0, 0.3, 1.0, 200),
    (0.5, math.inf, 1.0, 80),
    (0.5, 1.0, 0.6, 150),
]


@pytest.mark.parametrize("step_size, threshold, noise_scale, steps", LAWS)
def test_one_dimension_own_law(step_size, threshold, noise_scale, steps):
    z = GaussianMixture(torch.zeros(1, 1)).sample(100_000, seed=1)
    z = AniLA(threshold, step_size, noise_scale).run(None, z, score=torch.neg, steps=steps, seed=2, compile=False)
    assert distance(z, *stationary_law(step_size, threshold, noise_scale)) > FALSE_ALARM
    # teeth: the laws of wrong samplers are refused at this number of chains
    wrong = [
        stationary_law(step_size, threshold, 1.1 * noise_scale),
        stationary_law(step_size, threshold, noise_scale, lambda x: -1.2 * x),
    ]
    if math.isfinite(threshold):
        wrong.append(stationary_law(step_size, math.inf, noise_scale))
    for law in wrong:
        assert distance(z, *law) < FALSE_ALARM


def test_small_step_law_of_anila():
    """N(0, 1), b = 1: exp(f) max(1, |s|/b), variance 1.418, and not the target, as the docstring warns."""
    x = np.linspace(-8, 8, 4001)
    density = np.exp(-(x**2) / 2) * np.maximum(1, np.abs(x))
    density /= density.sum()
    assert (density * x**2).sum() == pytest.approx(1.4148, abs=1e-4)
    law = x, density.cumsum() - density / 2
    z = torch.from_numpy(np.interp(np.random.default_rng(0).random(40_000), law[1], x)).float()[:, None]
    z = AniLA(1.0, 0.02).run(None, z, score=torch.neg, steps=400, seed=3, compile=False)
    assert distance(z, *law) > FALSE_ALARM
    assert scipy.stats.kstest(z.flatten().numpy(), "norm").pvalue < FALSE_ALARM
    assert not AniLA.is_exact and not Langevin.is_exact


def test_residuals_of_one_step():
    """The drift's slope and the noise's variance, with the kernel's own noise: 0.51 for 1/2 and 1.003 are seen."""
    z = torch.randn(1024, 3072, generator=torch.Generator().manual_seed(1))
    score = 2 * torch.randn(1024, 3072, generator=torch.Generator().manual_seed(2))
    bound = scipy.stats.norm.isf(FALSE_ALARM / 4)

    def statistics(out):
        root = (1 / (score.abs() / 1.5).clamp(min=1)).sqrt().double()
        residual, regressor = (out - z).double() / root, root * score.double()
        slope = (residual * regressor).sum() / regressor.square().sum()
        noise = residual - 0.5 * regressor
        return (
            ((slope - 0.5) * regressor.square().sum().sqrt()).item(),
            ((noise.square().mean() - 1) * math.sqrt(noise.numel() / 2)).item(),
        )

    out = ops.anisotropic_step(z, score, 1.5, seed=1, step=1)
    assert max(map(abs, statistics(out))) < bound
    drift = score.clamp(-1.5, 1.5)
    assert abs(statistics(out + 0.01 * drift)[0]) > bound
    assert abs(statistics(z + 0.5 * drift + 1.003 * (out - z - 0.5 * drift))[1]) > bound


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


def test_the_public_face():
    assert fastanila.__version__ and set(fastanila.__all__) <= set(dir(fastanila))
