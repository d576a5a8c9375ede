"""Our ways of a work do that work: the public face's chains, captured or not, exact or not."""

import pytest
import torch

from bench import workloads
from bench.workloads import Chains
from fastanila import AdjustedAniLA, ops

CPU = torch.device("cpu")
SMALL = Chains("mlp-64", (20, 2), 4)
IMAGES = Chains("convnet-32", (2, 3, 8, 8), 5)

pytestmark = pytest.mark.skipif(ops.INTERPRETED, reason="the interpreter has rows of its own")


@pytest.mark.parametrize("kind", ["AniLA", "Langevin", "AdjustedAniLA"])
def test_our_captured_way_makes_the_public_faces_chain(kind, graphs):
    torch.testing.assert_close(SMALL.captured(kind, CPU)(), SMALL.ours(kind, CPU, compile=False)())
    assert graphs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AniLA", "AdjustedAniLA"])
def test_our_compiled_captured_way_makes_the_public_faces_chain(kind):
    plain = SMALL.ours(kind, CPU, compile=False)()
    torch.testing.assert_close(SMALL.captured(kind, CPU)(), plain, rtol=1e-4, atol=1e-4)


def test_our_exact_chains_are_the_public_faces():
    chains = Chains("mixture", (2000, 2), 3)
    numbers = chains.numbers
    sampler = AdjustedAniLA(threshold=numbers.threshold, step_size=numbers.step_size)
    want = sampler.run(chains.energy(CPU), chains.start(CPU), steps=3, seed=0, compile=False)
    assert torch.equal(chains.ours("AdjustedAniLA", CPU, compile=False)(), want)


def test_an_exact_sampler_has_the_law_of_the_other_at_its_steps():
    """It is given the energy over the temperature; where that is 1 as it is, which whole-chain kernels take."""
    plane = Chains("mixture", (20, 2), 1)
    exact, other = (IMAGES.sampler(kind, "element") for kind in ("AdjustedAniLA", "AniLA"))
    assert type(plane.energy_of(exact, CPU)) is type(plane.energy(CPU))
    z, heat = IMAGES.start(CPU), other.noise_scale**2
    torch.testing.assert_close(IMAGES.energy_of(exact, CPU)(z), IMAGES.energy_of(other, CPU)(z) / heat)
    score = torch.linspace(-3 * other.threshold, 3 * other.threshold, 12).view(1, 12)
    z = torch.zeros(1, 12)
    for mine, theirs in zip(exact.proposal(z, score / heat), other.proposal(z, score), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_timed_transitions_take_a_gradient_each_and_go_on_where_they_were(monkeypatch):
    calls = []

    class Counting(torch.nn.Module):
        def forward(self, x):
            calls.append(x.clone())
            return 0.5 * x.square().flatten(1).sum(1)

    monkeypatch.setattr(workloads.Chains, "energy", lambda self, device: Counting())
    for kind in ("AdjustedAniLA", "AniLA"):
        way = IMAGES.transitions(kind, "chain", CPU, compile=False)
        way()
        calls.clear()
        first = way()
        assert len(calls) == 5
        assert not torch.equal(way(), first) and len(calls) == 10
