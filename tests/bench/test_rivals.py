"""The rivals of the table do the work that they are said to do, in their own laws and at their best."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import compiled_rivals, rival_updates, rivals, workloads
from bench.workloads import Numbers
from fastanila import ops
from fastanila.models import MLP, ConvNet
from fastanila.ops import reference
from fastanila.training.settings import Settings

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(ops.INTERPRETED, reason="the interpreter has rows of its own")

CHAINS = workloads.Chains("mixture", (2000, 2), 10)  # few transitions: their law still depends on the step size


def mean_energy(way) -> float:
    z = way()
    assert z.shape == CHAINS.shape and torch.isfinite(z).all() and not z.requires_grad
    return CHAINS.energy(CPU)(z).mean().item()


def plain_chain() -> float:
    return mean_energy(CHAINS.ours("Langevin", CPU, compile=False))


def test_frozen_weights_are_cast_once_and_change_no_number():
    chains = workloads.Chains("convnet-32", (2, 3, 8, 8), 1, "bf16")
    energy, z = rivals.frozen(chains, CPU)
    assert {p.dtype for p in energy.parameters()} == {torch.bfloat16}
    assert torch.equal(energy(z), chains.ordinary_energy(CPU)(z))


# Means over 2,000 chains of an energy whose standard deviation is 3.8, from equal starts: two of them differ by more
# than 0.75, six standard deviations, once in 1e9 if the laws are equal.
@pytest.mark.parametrize(
    "build", [rivals.torchebm_langevin, rivals.ebmkit_langevin, lambda c, d: rivals.eager_loop(c, "Langevin", d)]
)
def test_plain_rivals_run_the_same_chain(build):
    torch.manual_seed(0)
    try:
        way = build(CHAINS, CPU)
    except rivals.NotInstalled as missing:
        pytest.skip(str(missing))
    assert mean_energy(way) == pytest.approx(plain_chain(), abs=0.75)


def test_a_rival_that_moves_twice_as_far_would_be_noticed():
    torch.manual_seed(0)
    longer = dataclasses.replace(CHAINS, steps=20)
    assert abs(mean_energy(rivals.eager_loop(longer, "Langevin", CPU)) - plain_chain()) > 2


@pytest.mark.parametrize("network", [MLP(2, 16), MLP(2, 16, features=8, confinement=0.5), ConvNet(3, 8, 4)])
def test_the_rivals_network_is_the_same_function(network):
    shape = (3, 8, 8) if isinstance(network, ConvNet) else (2,)
    z = torch.randn(5, *shape)
    torch.testing.assert_close(workloads.Ordinary(network, "float32")(z), network(z))
    ordinary = workloads.Ordinary(network, "bf16")
    torch.testing.assert_close(ordinary(z), network(z), rtol=0.05, atol=0.05)
    assert len(list(ordinary.parameters())) == len(list(network.parameters()))


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("step", [rivals.eager_step, compiled_rivals.plain_step])
def test_the_steps_by_hand_are_the_definition(step, noise, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", lambda z: torch.full_like(z, noise))
    arguments = workloads.step_arguments(4096, "float32", CPU)
    z, score = arguments["z"], 3 * arguments["score"]
    expected = reference.anisotropic_step(
        z, score, workloads.STEP_THRESHOLD, step_size=workloads.STEP_SIZE, noise=torch.full_like(z, noise)
    )
    torch.testing.assert_close(step(z, score), expected)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["AniLA", "Langevin"])
def test_a_loop_by_hand_makes_the_definitions_transitions(kind, noise, monkeypatch):
    chains = workloads.Chains("mixture", (50, 2), 3)
    monkeypatch.setattr(torch, "randn_like", lambda z: torch.full_like(z, noise))
    final = rivals.eager_loop(chains, kind, CPU)()
    z, energy = chains.start(CPU), chains.energy(CPU)
    for _ in range(3):
        score = -torch.func.grad(lambda x: energy(x).sum())(z)
        threshold = chains.numbers.threshold if kind == "AniLA" else math.inf
        step_size, xi = chains.numbers.step_size, torch.full_like(z, noise)
        z = reference.anisotropic_step(z, score, threshold, step_size=step_size, noise=xi)
    torch.testing.assert_close(final, z)


def test_the_authors_form_scales_by_the_norm_over_dim_1(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    x, gamma = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor([[0.2], [1.0]])
    numbers = Numbers(step_size=0.04, threshold=1.0, noise_scale=0.5)
    got = rivals.authors_chain(lambda x: 0.5 * x.square().sum(1), x, 1, numbers)
    torch.testing.assert_close(got, x * (1 - gamma) + 0.1 * gamma)


SETTINGS = Settings(steps=2, lr=1e-3, threshold=1.0, step_size=0.01, noise_scale=1.0, batch_size=16, chains=32)


def test_the_eager_update_samples_with_the_weights_of_the_update_before():
    """In bf16 its chains run on a copy of the network."""
    torch.manual_seed(0)
    energy = workloads.Ordinary(ConvNet(3, 8, 4), "bf16")
    settings = dataclasses.replace(SETTINGS, lr=0.1, precision="bf16", batch_size=4, chains=8)
    seen, first = [], next(energy.parameters())
    forward = workloads.Ordinary.forward

    def noted(module, x):
        seen.append((module is energy, next(module.parameters()).detach().float().clone(), first.detach().clone()))
        return forward(module, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workloads.Ordinary, "forward", noted)
        update = rival_updates.eager_update(energy, torch.rand(16, 3, 8, 8), settings)
        for _ in range(2):
            update()
    assert [own for own, *_ in seen] == [False, False, True] * 2
    for _, used, trained in seen:
        torch.testing.assert_close(used, trained, rtol=0.01, atol=1e-6)
    assert not torch.allclose(seen[0][1], seen[3][1], rtol=0.01)


@pytest.mark.parametrize(
    "form", [rival_updates.authors_update, rival_updates.eager_update, rival_updates.eager_mala_update]
)
def test_an_update_by_hand_moves_the_parameters_and_leaves_them_trainable(form):
    energy, pool = MLP(2, 16), torch.randn(64, 2)
    before = [p.detach().clone() for p in energy.parameters()]
    update = form(energy, pool, SETTINGS)
    assert torch.isfinite(update())
    assert all(p.requires_grad for p in energy.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, energy.parameters(), strict=True))


class Calls(TorchDispatchMode):
    """The operators called, with the shapes and layouts of their tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append((function, [a for a in args if isinstance(a, torch.Tensor)]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_convolutions_alone_are_the_networks_and_nothing_else(precision):
    chains = workloads.Chains("convnet-32", (2, 3, 16, 16), 3, precision)
    run = compiled_rivals.convolutions_alone(chains, CPU)
    with Calls() as calls:
        run()
    forward, back = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default
    assert [function for function, _ in calls.seen] == 3 * (4 * [forward] + 4 * [back])
    shapes = [(2, 3, 16, 16), (2, 32, 16, 16), (2, 64, 8, 8), (2, 128, 4, 4)]
    assert [tuple(tensors[0].shape) for _, tensors in calls.seen[:4]] == shapes  # the head's is not among them
    assert [tuple(tensors[1].shape) for _, tensors in calls.seen[4:8]] == shapes[::-1]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for function, tensors in calls.seen:
        assert len(tensors) == (2 if function is forward else 3)  # no bias, which would be a kernel of its own
        for tensor in tensors:  # no layout or dtype to convert
            assert tensor.dtype == dtype and tensor.is_contiguous(memory_format=torch.channels_last)


def test_passes_beside_the_convolutions_move_the_bytes_that_they_are_to():
    chains = workloads.Chains("convnet-32", (2, 3, 16, 16), 1)
    run = compiled_rivals.convolutions_alone(chains, CPU, beside=(800, 4096))
    with Calls() as calls:
        run()
    passes = [tensors for function, tensors in calls.seen if function is torch.ops.aten.neg.out]
    assert len(calls.seen) == 8 + 2 and [2 * x.numel() * x.itemsize for (x,) in passes] == [800, 4096]


def quadratic(x):
    return (x.square() * torch.tensor([1.0, 4.0])).sum(1) / 2


def test_a_mala_transition_by_hand_is_the_definitions(monkeypatch):
    """Accepted with the probability by the two moves' densities, written out here in float64."""
    generator, eps = torch.Generator().manual_seed(0), 0.4
    z, xi = (torch.randn(500, 2, generator=generator) for _ in range(2))
    u = torch.rand(500, generator=generator)
    monkeypatch.setattr(torch, "randn_like", lambda x: xi.clone())
    monkeypatch.setattr(torch, "rand_like", lambda x: u.clone())
    after = rivals.mala_transition(quadratic, rivals.mala_begun(quadratic, z), eps)

    scales, z, xi, u = torch.tensor([1.0, 4.0]).double(), z.double(), xi.double(), u.double()
    there = z - eps / 2 * scales * z + math.sqrt(eps) * xi

    def log_density(to, origin):
        return -(to - origin + eps / 2 * scales * origin).square().sum(1) / (2 * eps)

    def energy(x):
        return (x.square() * scales).sum(1) / 2

    log_ratio = energy(z) - energy(there) + log_density(z, there) - log_density(there, z)
    accepted = u.log() < log_ratio
    assert 25 < accepted.sum() < 475  # both occur
    want = torch.where(accepted[:, None], there, z)
    torch.testing.assert_close(after.z.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.energy.double(), energy(want), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.gradient.double(), scales * want, rtol=1e-5, atol=1e-5)


def test_mala_by_hand_leaves_its_law_as_it_is(monkeypatch):
    """From 20,000 exact draws, of a mean energy of 1: six standard errors are 0.04. Were every proposal accepted, the
    mean would be that of the unadjusted step, which is 1.4."""

    def mean_after(transitions):
        torch.manual_seed(0)
        state = rivals.mala_begun(quadratic, torch.randn(20_000, 2) / torch.tensor([1.0, 2.0]))
        for _ in range(transitions):
            state = rivals.mala_transition(quadratic, state, 0.4)
        return state.energy.mean().item()

    assert mean_after(20) == pytest.approx(1.0, abs=0.04)
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    assert mean_after(20) > 1.3


def test_mala_runs_at_a_noise_scale_of_one_only():
    with pytest.raises(ValueError, match="noise_scale"):
        rivals.mala_loop(workloads.Chains("convnet-32", (2, 3, 8, 8), 1), CPU)
    assert mean_energy(rivals.mala_loop(CHAINS, CPU)) < CHAINS.energy(CPU)(CHAINS.start(CPU)).mean()
