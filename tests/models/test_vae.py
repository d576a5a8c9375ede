"""The VAE: its networks, its ELBO against a model whose evidence is known, and what the joint scheme ends at."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastanila import MALA, generate, noise
from fastanila.data import completion
from fastanila.models import vae
from fastanila.noise import Stream
from fastanila.samplers import starts
from fastanila.samplers.starts import AmortizedStart
from fastanila.training import build as build_training
from fastanila.training import job as job_training
from fastanila.training import learner
from fastanila.training import update as update_training
from fastanila.training.config import resolve
from fastanila.training.losses import elbo, likelihood
from fastanila.training.settings import Settings

# ------------------------------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize("size", [8, 9, 15, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_in_their_shape(size, channels):
    x = torch.rand(3, channels, size, size) * 2 - 1
    net = vae.of_images(channels, size, latent=5, width=4)
    posterior = net.encode(x)
    assert posterior.mean.shape == posterior.log_variance.shape == (3, 5)
    back = net.decode(torch.randn(3, 5))
    assert back.shape == x.shape and back.is_contiguous() and back.abs().max() <= 1
    states = completion.state(x, completion.region("blocks", 3, size, seed=0, step=0))
    conditional = vae.of_completions(channels, size, latent=5, width=4)
    assert conditional.encode(states).mean.shape == (3, 5)
    assert conditional.decode(torch.randn(3, 5), states).shape == states.shape


@pytest.mark.parametrize("features", [0, 7])
def test_vectors_come_back_in_their_shape(features):
    net = vae.of_vectors(3, latent=2, width=8, features=features)
    assert net.decode(torch.randn(5, 2)).shape == (5, 3)
    assert net.encode(torch.randn(5, 3)).latents(torch.zeros(5, 2)).shape == (5, 2)
    other = vae.of_vectors(3, latent=2, width=8, features=features, seed=1)
    same = [torch.equal(a, b) for (_, a), (_, b) in zip(net.named_buffers(), other.named_buffers(), strict=True)]
    assert not any(same) or not features


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: vae.of_images(1, 7, 2, 4), "size must be an integer of at least 8, got 7"),
        (lambda: vae.of_images(1, 8, 0, 4), "latent must be an integer of at least 1, got 0"),
        (lambda: vae.of_vectors(2, 0, 4), "latent must be an integer of at least 1, got 0"),
        (lambda: vae.of_vectors(2, 2, 0), "width must be an integer of at least 1, got 0"),
    ],
)
def test_what_cannot_be_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_conditional_decoder_sees_what_is_known_and_nothing_else():
    net = vae.of_completions(3, 16, latent=4, width=4)
    x = completion.state(torch.rand(2, 3, 16, 16), completion.region("half", 2, 16, seed=0, step=0))
    free, latents = completion.free(x), torch.randn(2, 4)
    out = net.decode(latents, x)
    assert torch.equal(out[~free], x[~free]) and not torch.isclose(out[free], x[free]).any()
    assert torch.equal(net.decode(latents, torch.where(free, torch.randn_like(x), x)), out)  # the truth does not leak
    other = net.decode(latents, torch.where(free, x, x.roll(1, 2)))
    assert not torch.isclose(other[free], out[free]).all()
    with pytest.raises(ValueError, match="given must be the states to complete"):
        net.decode(latents)


def test_a_start_from_proposals_is_a_function_of_seed_and_update():
    net = vae.of_vectors(2, latent=3, width=8)
    start = AmortizedStart(6, net, seed=4)
    z = noise.normal((6, 3), seed=4, step=9, stream=Stream.LATENT)
    assert torch.equal(start.draw(9), net.decode(z)) and not torch.equal(start.draw(8), start.draw(9))
    assert start.tensors() == {}


def test_interpolations_start_and_end_at_proposals():
    net = vae.of_vectors(2, latent=6, width=8, features=3)
    rows = generate.interpolated(net, 3, 5, seed=1, update=7).view(3, 5, 2)
    ends = starts.proposals(net, 6, seed=1, update=7).view(3, 2, 2)
    torch.testing.assert_close(rows[:, [0, -1]], ends)
    shown = vae.VAE(nn.Identity(), nn.Identity(), 6)  # its decoder shows the latents
    shown.register_parameter("any", nn.Parameter(torch.zeros(())))
    z = generate.interpolated(shown, 1, 9, seed=1, update=7).double()
    lengths = z.norm(dim=1)
    torch.testing.assert_close(lengths.diff(), (lengths[-1] - lengths[0]).expand(8) / 8, rtol=1e-3, atol=1e-5)
    angles = torch.acos((z[1:] * z[:-1]).sum(1) / (lengths[1:] * lengths[:-1]))
    torch.testing.assert_close(angles, angles.mean().expand(8), rtol=1e-3, atol=1e-5)
    middle = (z[0] + z[-1]) / 2
    assert middle.norm() < 0.95 * lengths[4]  # where a straight line would go


# ----------------------------------------------------------------------------------------------------------- the ELBO


def affine(dim, latent, weight, seed=0):
    """Probabilistic PCA: a decoder A z + c with noise of variance ``weight``, its exact posterior, and log p(x)."""
    rng = np.random.default_rng(seed)
    a, c = rng.normal(size=(dim, latent)), rng.normal(size=dim)
    precision = np.eye(latent) + a.T @ a / weight
    # the encoder's posterior has independent elements: turn A so that the exact one has
    a = a @ np.linalg.eigh(a.T @ a)[1]
    precision = np.eye(latent) + a.T @ a / weight
    assert np.allclose(precision, np.diag(np.diag(precision)))
    net = vae.of_vectors(dim, latent, width=1, depth=0).double()
    gain = np.linalg.solve(precision, a.T) / weight
    with torch.no_grad():
        head = net.encoder[-1]
        head.weight.zero_()
        head.weight[:latent] = torch.from_numpy(gain)
        head.bias[:latent] = torch.from_numpy(-gain @ c)
        head.bias[latent:] = torch.from_numpy(-np.log(np.diag(precision)))
        net.decoder[-1].weight.copy_(torch.from_numpy(a))
        net.decoder[-1].bias.copy_(torch.from_numpy(c))
    covariance = a @ a.T + weight * np.eye(dim)

    def log_p(x):
        centred = x - c
        quadratic = np.einsum("ni,ij,nj->n", centred, np.linalg.inv(covariance), centred)
        return -0.5 * (quadratic + np.linalg.slogdet(covariance)[1] + dim * math.log(2 * math.pi))

    return net, log_p


def sigma_points(x, latent):
    """Rows and normals whose average over a quadratic is its expectation: +- sqrt(latent) along each axis."""
    axes = math.sqrt(latent) * torch.eye(latent, dtype=torch.float64)
    points = torch.cat((axes, -axes))
    return x.repeat_interleave(len(points), 0), points.repeat(len(x), 1)


@pytest.mark.parametrize("dim, latent, weight", [(1, 1, 0.3), (3, 2, 0.5), (5, 3, 2.0)])
def test_elbo_is_the_evidence_of_a_linear_gaussian_model(dim, latent, weight):
    """With the exact posterior the bound is tight; any other is below."""
    net, log_p = affine(dim, latent, weight)
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(7, dim)) * 2)
    rows, xi = sigma_points(x, latent)
    constant = 0.5 * dim * math.log(2 * math.pi * weight)

    def evidence():
        return -elbo(net, rows, weight, xi).loss.item() / weight - constant

    assert evidence() == pytest.approx(log_p(x.numpy()).mean(), rel=1e-9)
    found = elbo(net, rows, weight, xi)
    assert found.loss.item() == pytest.approx((found.reconstruction + weight * found.kl).item())
    with torch.no_grad():
        for change in (0.3, -0.3):
            for place in (0, latent):  # a mean, a log variance
                net.encoder[-1].bias[place] += change
                assert evidence() < log_p(x.numpy()).mean() - 1e-3
                net.encoder[-1].bias[place] -= change


def test_elbo_sums_over_elements_and_averages_over_the_batch():
    net = vae.of_images(1, 8, latent=2, width=4)
    x, xi = torch.rand(5, 1, 8, 8), torch.randn(5, 2)
    found = elbo(net, x, 0.5, xi)
    posterior = net.encode(x)
    mean, variance = posterior.mean.double(), posterior.log_variance.double().exp()
    back = net.decode((mean + variance.sqrt() * xi).float()).double()
    kl = [0.5 * (m**2 + v - 1 - v.log()).sum() for m, v in zip(mean, variance, strict=True)]
    squares = [0.5 * ((b - a.double()) ** 2).sum() for a, b in zip(x, back, strict=True)]
    assert found.kl.item() == pytest.approx((sum(kl) / 5).item(), rel=1e-4)
    assert found.reconstruction.item() == pytest.approx((sum(squares) / 5).item(), rel=1e-4)


# --------------------------------------------------------------------------------------------------- the joint scheme


def test_each_loss_moves_its_own_parameters_only():
    net = vae.of_vectors(2, latent=2, width=8)
    energy = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))
    proposals = net.decode(torch.randn(6, 2))
    revised = proposals - torch.func.grad(lambda z: energy(z).sum())(proposals)  # with the graph of both
    assert revised.requires_grad
    likelihood(energy, torch.randn(6, 2), revised).loss.backward()
    assert all(p.grad is not None for p in energy.parameters()) and all(p.grad is None for p in net.parameters())
    energy.zero_grad(set_to_none=True)
    elbo(net, revised, 0.1, torch.randn(6, 2)).loss.backward()
    assert all(p.grad is not None for p in net.parameters()) and all(p.grad is None for p in energy.parameters())


class Normal1D:
    """Data N(mean, sd**2) on the line."""

    def __init__(self, mean, sd):
        self.mean, self.sd = mean, sd

    def draw(self, count, *, seed, step, purpose="train", offset=0, device=None):
        return self.mean + self.sd * noise.normal((count, 1), seed=seed, step=step, stream=Stream.DATA, offset=offset)


class Quadratic(nn.Module):
    """U = a x^2 / 2 - b x."""

    def __init__(self):
        super().__init__()
        self.log_a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return (0.5 * self.log_a.exp() * x.square() - self.b * x).squeeze(1)


def joint_job(kl_weight=0.25, iterations=1500, **changes):
    settings = resolve(
        Settings(init="vae", steps=20, batch_size=512, lr=0.02, vae_lr=0.02, kl_weight=kl_weight, ema=0.0,
                 iterations=iterations, sampler="mala", vae_warm_up=0, energy_l2=0.0, latent=1, features=0, **changes)
    )  # fmt: skip
    cpu = torch.device("cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = vae.of_vectors(1, 1, width=1, depth=0)
    ebm = learner.build(Quadratic(), settings, settings.lr, settings.lr_decay, cpu)
    taught = learner.build(network, settings, settings.vae_lr, settings.vae_lr_decay, cpu)
    start = build_training.build_start(settings, None, cpu, network)
    chains = start.draw(0).detach().clone()
    zero = torch.zeros((), dtype=torch.int64)
    return job_training.Job(
        settings, Path("."), cpu, Normal1D(1.5, 0.8), ebm, taught, MALA(0.5), start, chains, chains.clone(), zero,
        zero.bool(), noise.as_word64(settings.seed, cpu), torch.ones(()),
    )  # fmt: skip


@pytest.mark.slow
def test_the_joint_scheme_finds_a_gaussian():
    """Data N(m, s^2), U quadratic, both networks affine, MALA: everything that is learned has a closed form. With v the
    weight of KL: a = 1 / s^2, b = m / s^2, g(z) = m + w z, w^2 = s^2 - v, reconstruction v / 2, KL log(s^2 / v) / 2.

    The averages over the last 300 updates scatter over seeds by about a third of the tolerances.
    """
    job = joint_job()
    update, seen = update_training.build_update(job), []
    for i in range(job.settings.iterations):
        made = update()
        if i >= job.settings.iterations - 300:
            g = job.vae.module.decoder[-1]
            a = job.ebm.module.log_a.exp()
            now = (
                a,
                job.ebm.module.b / a,
                g.bias[0],
                g.weight[0, 0].abs(),
                made.teaching.reconstruction,
                made.teaching.kl,
            )
            seen.append([x.item() for x in now])
    m, s, v = 1.5, 0.8, 0.25
    known = [1 / s**2, m, m, math.sqrt(s**2 - v), v / 2, 0.5 * math.log(s**2 / v)]
    found = np.mean(seen, 0)
    assert np.abs(found / known - 1).max() < 0.05, (found, known)
    assert not job.broken and job.made == job.settings.iterations
    # teeth: what other conventions would end at lies outside: squares without the half, KL without its weight
    for wrong in (0.5, 2.0):
        other = [math.sqrt(s**2 - wrong * v), wrong * v / 2, 0.5 * math.log(s**2 / (wrong * v))]
        assert np.abs(found[3:] / other - 1).max() > 0.15


@pytest.mark.parametrize("other", ["likelihood", "elbo"])
def test_an_update_moves_each_network_by_its_own_loss(other, monkeypatch):
    """A hundred times the other's loss makes no difference, bit for bit."""
    loss = getattr(update_training, other)

    def larger(*arguments, **named):
        found = loss(*arguments, **named)
        return found._replace(loss=100 * found.loss)

    jobs = [joint_job(fused=False), joint_job(fused=False)]
    update_training.build_update(jobs[0])()
    monkeypatch.setattr(update_training, other, larger)
    update_training.build_update(jobs[1])()
    own = "vae" if other == "likelihood" else "ebm"
    a, b = ([p.detach() for p in getattr(job, own).module.parameters()] for job in jobs)
    assert all(map(torch.equal, a, b))
    theirs = "ebm" if own == "vae" else "vae"
    moments = [list(getattr(job, theirs).optimizer.state.values()) for job in jobs]
    for one, hundred in zip(*moments, strict=True):  # teeth: the other network did see it
        torch.testing.assert_close(100 * one["exp_avg"], hundred["exp_avg"])
