"""Energies: shapes, the closed form, autocast, and where chains start."""

import copy
import math

import pytest
import scipy.stats
import torch

from fastanila import AniLA, data, noise
from fastanila.models import MLP, ConvNet, GaussianMixture, UNet, wrappers
from fastanila.models.score import evaluator
from fastanila.models.wrappers import Autocast
from fastanila.samplers import starts
from fastanila.training.losses import likelihood


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_convnet(channels, size):
    net = ConvNet(channels, size, width=4)
    x = torch.randn(3, channels, size, size)
    assert net(x).shape == (3,) and net(x).dtype == torch.float32
    assert sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) == 5
    energy, score = evaluator(net)(x)
    assert score.shape == x.shape and energy.shape == (3,) and (score != 0).any(dim=0).float().mean() > 0.9
    torch.testing.assert_close(evaluator(net, traced=True)(x), (energy, score))


def test_convnet_refuses_tiny_images():
    with pytest.raises(ValueError, match="size must be at least 8 pixels, got 7"):
        ConvNet(1, 7)


@pytest.mark.parametrize("channels, size, confinement", [(1, 8, 0.0), (3, 16, 0.5), (2, 20, 0.0)])
def test_unet(channels, size, confinement):
    """The energy is the product that it says it is, and its score the gradient of that; every output has one network's
    energy of its own."""
    torch.manual_seed(0)
    net = UNet(channels, size, width=4, confinement=confinement).double()
    x = torch.randn(3, channels, size, size, dtype=torch.float64)
    field = net.layers(x)
    assert field.shape == x.shape
    expected = 0.025 * (x * field).flatten(1).sum(1) + confinement / 2 * x.square().flatten(1).sum(1)
    torch.testing.assert_close(net(x).double(), expected, rtol=1e-5, atol=1e-6)  # it reduces in float32
    net = net.float()
    x = x.float()
    energy, score = evaluator(net)(x)
    assert energy.dtype == torch.float32 and energy.shape == (3,)
    direction, h = torch.randn_like(x), 1e-2
    slope = (net(x + h * direction) - net(x - h * direction)) / (2 * h)
    torch.testing.assert_close(-(score * direction).flatten(1).sum(1), slope, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(evaluator(net, traced=True)(x), (energy, score))

    several = UNet(channels, size, width=4, confinement=confinement, outputs=3)
    for i in range(3):
        one = UNet(channels, size, width=4, confinement=confinement)
        weights = several.layers.state_dict()
        own = slice(i * channels, (i + 1) * channels)
        one.layers.load_state_dict({k: v[own] if k.startswith("last") else v for k, v in weights.items()})
        torch.testing.assert_close(several(x)[:, i], one(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [4, 18])
def test_unet_refuses_sizes_that_its_levels_do_not_divide(size):
    with pytest.raises(ValueError, match=f"size must be a multiple of 4 and at least 8 pixels for a U-Net, got {size}"):
        UNet(1, size)


@pytest.mark.parametrize("features", [0, 8])
def test_mlp(features):
    net = MLP(3, width=16, depth=2, features=features, confinement=0.5)
    x = torch.randn(5, 3)
    assert net(x).shape == (5,)
    assert torch.allclose(net(100 * x) / (0.25 * (100 * x).square().sum(1)), torch.ones(5), atol=0.05)
    again = MLP(3, width=16, features=features, confinement=0.5)
    assert torch.equal(net.projections, again.projections)  # a function of the seed
    assert "projections" in net.state_dict()


def test_gaussian_mixture_closed_form():
    means = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    energy = GaussianMixture(means, sd=torch.tensor([0.5, 2.0]), weights=torch.tensor([1.0, 3.0]))
    x = torch.randn(50, 2, dtype=torch.float64)
    density = sum(
        w * scipy.stats.multivariate_normal(m, s**2).pdf(x.numpy())
        for w, m, s in zip((0.25, 0.75), means.numpy(), (0.5, 2.0), strict=True)
    )
    torch.testing.assert_close(energy(x), -torch.from_numpy(density).log())
    draws = energy.sample(200_000, seed=0)
    near = (draws - means[0]).norm(dim=1) < 0.5
    inside = sum(
        w * scipy.stats.ncx2(2, (m - means[0]).square().sum().item() / s**2).cdf(0.25 / s**2)
        for w, m, s in zip((0.25, 0.75), means, (0.5, 2.0), strict=True)
    )
    deviation = math.sqrt(inside * (1 - inside) / 200_000)
    assert abs(near.double().mean().item() - inside) < scipy.stats.norm.isf(5e-7) * deviation
    for bad in (dict(sd=0.0), dict(weights=torch.tensor([1.0, 0.0])), dict(weights=torch.ones(3))):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GaussianMixture(means, **bad)


def test_autocast_computes_in_bfloat16_and_reduces_in_float32():
    for net, x in ((MLP(2, 32, features=8), torch.randn(64, 2)), (ConvNet(1, 8, 4), torch.randn(64, 1, 8, 8))):
        seen = []
        net.layers.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        u = Autocast(net)(x)
        (h,) = seen
        assert h.dtype == torch.bfloat16 and u.dtype == torch.float32
        head = (h.double() * net.head.weight[0].double()).flatten(1).sum(1) + net.head.bias.double()
        torch.testing.assert_close(u.double(), head, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(u, net(x), rtol=0.05, atol=0.02)
        assert len(u.unique()) > 50  # not rounded to bfloat16's few values


# ----------------------------------------------------------------------------------------------------- the objective


def test_likelihood_is_the_gap_and_its_gradient_points_to_the_data():
    """1-D Gaussian with unknown mean and scale: U = exp(-2 a) (x - m)^2 / 2; data N(1, 2^2), chains N(0, 1)."""
    m, a = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)

    def energy(x):
        return torch.exp(-2 * a) * (x[:, 0] - m).square() / 2

    x = 1 + 2 * noise.normal((100_000, 1), seed=0, step=0)
    z = noise.normal((100_000, 1), seed=0, step=1).requires_grad_()
    result = likelihood(energy, x, z)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(energy(x).mean().item() - energy(z).mean().item(), rel=1e-5)
    # minus the gradient of the mean log likelihood: E_data dU - E_model dU
    assert m.grad.item() == pytest.approx(-1.0, abs=0.05) and a.grad.item() == pytest.approx(-4.0, abs=0.1)
    assert z.grad is None
    with_l2 = likelihood(energy, x, z, energy_l2=0.1).loss - result.loss
    expected = 0.1 * (energy(x).square().mean() + energy(z).square().mean())
    assert with_l2.item() == pytest.approx(expected.item(), rel=1e-3)


def test_training_finds_the_gaussian():
    """With exact negatives the objective's gradient descends to the data's mean and scale (the sign of eq. 7)."""
    m, a = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([m, a], lr=0.05)
    for step in range(800):
        xi = noise.normal((2, 512, 1), seed=1, step=step)
        x, z = 1 + 2 * xi[0], (m + a.exp() * xi[1]).detach()
        loss = likelihood(lambda v: torch.exp(-2 * a) * (v[:, 0] - m).square() / 2, x, z).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert m.item() == pytest.approx(1, abs=0.2) and a.exp().item() == pytest.approx(2, abs=0.2)


# ------------------------------------------------------------------------------------------------------- chain starts


def test_noise_start():
    start = starts.NoiseStart(1000, (2,), (-3.0, 5.0), seed=0)
    z = start.draw(4)
    assert z.shape == (1000, 2) and z.min() >= -3 and z.max() <= 5 and abs(z.mean() - 1) < 0.3
    assert torch.equal(z, start.draw(4)) and not torch.isclose(z, start.draw(5)).any()


def test_data_start_draws_data_of_its_own():
    density = data.load("rings")
    start = starts.DataStart(500, density, seed=0)
    z = start.draw(3)
    assert density.log_density(z).isfinite().all()
    assert not torch.isclose(z, density.draw(500, seed=0, step=3)).all(dim=1).any()


def test_persistent_start_walks_the_population_and_restarts_a_fraction():
    start = starts.PersistentStart(100, 400, (2,), (-1.0, 1.0), reinit=0.1, seed=0)
    before = start.chains.clone()
    restarted = 0
    for update in range(8):
        z = start.draw(update)
        rows = slice(update % 4 * 100, update % 4 * 100 + 100)
        fresh = ~torch.isclose(z, start.chains[rows]).all(dim=1)
        restarted += fresh.sum().item()
        assert z[fresh].abs().max() <= 1
        was = start.chains.clone()
        start.keep(update, torch.full_like(z, math.nan), unless=torch.tensor(True))
        assert torch.equal(start.chains, was)
        start.keep(update, torch.full_like(z, 10.0 + update), unless=torch.tensor(False))
        assert (start.chains[rows] == 10 + update).all()
        assert torch.equal(start.draw(torch.tensor(update + 1)), start.draw(update + 1))
    assert (start.chains > 9).all() and before.abs().max() <= 1
    low, high = scipy.stats.binom(800, 0.1).ppf([5e-7, 1 - 5e-7])
    assert low <= restarted <= high
    never = starts.PersistentStart(100, 100, (2,), (-1.0, 1.0), reinit=0.0, seed=0)
    assert torch.equal(never.draw(0), never.chains)
    with pytest.raises(ValueError, match=r"chains must be a multiple of batch_size \(100\), got 150"):
        starts.PersistentStart(100, 150, (2,), (-1.0, 1.0), reinit=0.0, seed=0)


def test_restarts_differ_from_the_starts():
    start = starts.PersistentStart(10, 10, (2,), (-1.0, 1.0), reinit=1.0, seed=0)
    assert not torch.isclose(start.draw(0), start.chains).any()


@pytest.mark.parametrize(
    "build, shape",
    [
        (lambda: ConvNet(3, 9, 4, confinement=0.1), (5, 3, 9, 9)),
        (lambda: UNet(3, 12, 4, confinement=0.1), (5, 3, 12, 12)),
        (lambda: MLP(3, 8, features=4), (7, 3)),
        (lambda: wrappers.ConditionalEnergy(ConvNet(2, 8, 4)), (3, 2, 8, 8)),
    ],
    ids=["convnet", "unet", "mlp", "conditional"],
)
def test_weights_cast_ahead_change_no_bit(build, shape):
    torch.manual_seed(0)
    energy, x = Autocast(build()), torch.randn(shape)
    twin = energy.for_chains()
    assert twin is not energy and twin is energy.for_chains()
    layers = [p for m in twin.modules() if hasattr(m, "layers") for p in m.layers.parameters()]
    assert layers and all(p.dtype == torch.bfloat16 for p in layers)
    for _ in range(2):
        for a, b in zip(evaluator(twin)(x), evaluator(energy)(x), strict=True):
            assert torch.equal(a, b) and a.dtype == torch.float32
        before = twin(x)
        with torch.no_grad():
            for p in energy.parameters():
                p.add_(torch.randn_like(p) / 8)
        energy.for_chains()  # the parameters of now, at the same addresses
        assert [p.data_ptr() for p in layers] == [
            p.data_ptr() for m in twin.modules() if hasattr(m, "layers") for p in m.layers.parameters()
        ]
        assert not torch.equal(twin(x), before)
    assert not any(key.startswith("_twin") for key in energy.state_dict()) and len(list(energy.parameters())) == len(
        list(energy.energy.parameters())
    )


def test_a_network_whose_parts_were_replaced_is_cast_anew():
    energy, x = Autocast(ConvNet(1, 8, 2)), torch.randn(3, 1, 8, 8)
    first = energy.for_chains()
    energy.energy.head = torch.nn.Conv2d(16, 1, 1)
    second = energy.for_chains()
    assert second is not first and torch.equal(second(x), energy(x))
    copied = copy.deepcopy(energy)
    with torch.no_grad():
        copied.energy.head.weight.add_(1)
    assert torch.equal(copied.for_chains()(x), copied(x)) and torch.equal(energy.for_chains()(x), energy(x))


def test_what_autocast_does_not_know_stays_as_it_is():
    energy = Autocast(torch.nn.Flatten())
    assert energy.for_chains() is energy


def test_a_run_in_bfloat16_follows_the_parameters(compiler):
    torch.manual_seed(0)
    energy, z = Autocast(MLP(2, 8)), torch.randn(5, 2)

    def run(compile):
        return AniLA(1.0, 0.1).run(energy, z, steps=3, seed=1, compile=compile)

    for _ in range(2):
        torch.testing.assert_close(run(True), run(False), rtol=1e-2, atol=1e-2)
        before = run(True)
        with torch.no_grad():
            for p in energy.parameters():
                p.mul_(3)
    assert not torch.allclose(run(True), before, atol=1e-2)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in energy.parameters())
