"""The algorithm as its authors printed and coded it, against their lines written out, in float64."""

import math

import pytest
import torch

from fastanila import CodedAniLA
from fastanila.ops import reference

THRESHOLD, SCALE, STEPS = 0.3, 0.05, 7


def network_energy(x):
    """Of images (B, C, H, W), with gradients of all sizes."""
    return (2 * x.square().sum((1, 2, 3)) + torch.sin(3 * x).sum((1, 2, 3)) + x.mean((1, 2, 3)).square()) / 5


def gradient(x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(-network_energy(x).sum(), x)[0]


def drawn():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64), [
        torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(STEPS)
    ]


def as_coded(z, noises):
    """The authors' loop for CIFAR-10: |s| over dim 1, no half in the drift, no root in the noise."""
    for noise in noises:
        grad = gradient(z)
        length = grad.norm(dim=1)
        thresholds = torch.tensor([THRESHOLD] * length.numel(), dtype=z.dtype).reshape(length.shape)
        stepsize = thresholds / torch.max(thresholds, length)
        stepsize = stepsize.unsqueeze(1).repeat(1, 3, 1, 1)
        z = z + stepsize * grad + stepsize * (SCALE * noise)
    return z


def as_printed(z, noises):
    """Algorithm 1: the step size from the score where the chain starts, then K transitions with it."""
    gamma = THRESHOLD / gradient(z).abs().clamp(min=THRESHOLD)
    for noise in noises:
        z = z + gamma / 2 * gradient(z) + gamma.sqrt() * (SCALE * noise)
    return z


def coded_here(z, noises, sampler, times=1.0):
    """``times``: what the score is multiplied by, which is that of another energy."""
    for noise in noises:
        mean, sd = sampler.proposal(z, times * gradient(z))
        z = mean + sd * noise
    return z


def test_the_coded_form_is_the_authors_lines():
    z, noises = drawn()
    want = as_coded(z, noises)
    here = CodedAniLA(THRESHOLD, 2.0, SCALE / math.sqrt(2), "channel")
    torch.testing.assert_close(coded_here(z, noises, here), want, rtol=1e-12, atol=1e-12)
    # the same chain at temperature 1, of the energy that has it: 2 U / scale^2
    unit = CodedAniLA(2 * THRESHOLD / SCALE**2, SCALE**2, 1.0, "channel")
    torch.testing.assert_close(coded_here(z, noises, unit, times=2 / SCALE**2), want, rtol=1e-12, atol=1e-12)
    by_element = CodedAniLA(THRESHOLD, 2.0, SCALE / math.sqrt(2))
    assert (coded_here(z, noises, by_element) - want).abs().max() > 1e-3


@pytest.mark.parametrize("heat", [1.0, SCALE**2], ids=["as it is", "at temperature 1"])
def test_the_printed_form_is_anila_with_a_frozen_gain(heat):
    z, noises = drawn()
    want = as_printed(z, noises)
    score = gradient(z) / heat
    gamma = reference.gain(score, THRESHOLD / heat)
    moved = z
    for noise in noises:
        moved = reference.anisotropic_step(
            moved, gradient(moved) / heat, None, step_size=heat, noise_scale=SCALE / math.sqrt(heat), gamma=gamma,
            noise=noise,
        )  # fmt: skip
    torch.testing.assert_close(moved, want, rtol=1e-12, atol=1e-12)
    assert (gamma < 1).double().mean() > 0.3  # it is about clipped scores
