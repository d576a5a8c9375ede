"""Matching: an energy that learns by regression, without chains, whose score leads from uniform noise to the data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: The share of the way from noise to data that the drift of one transition makes.
SPEED = 0.05
#: The last share of the way, on which the score falls linearly to 0 at the data.
LAST = 0.2
#: Errors are weighted by 1 / max(this, the share of the full length that the score is to have there).
LEAST = 0.1


def matching(
    energy: Callable[[Tensor], Tensor], data: Tensor, noise: Tensor, times: Tensor, step_size: float | Tensor
) -> Tensor:
    """The weighted mean squared error, over elements, of the energy's gradient: 0-dim, to be minimised.

    States x = t data + (1 - t) noise lie on the way from noise to data, and the gradient at x is to be

        grad U(x) = (2 SPEED / step_size) min(1, (1 - t) / LAST) (noise - data),

    so that a transition's drift, -step_size / 2 grad U, goes SPEED of the way, ever less near the data, and ends there.
    The error is in units of 2 SPEED / step_size, and its square has the weight 1 / max(LEAST, min(1, (1 - t) / LAST)):
    near the data, where the score is short, its direction decides on an image's detail. The least error has the mean of
    the right-hand side given x: near the data that is denoising score matching at all small levels of noise at once
    (Vincent 2011). This is equilibrium matching with an explicit energy (Wang and Du 2025) from uniform noise, where
    chains start.

    data (B, ...), noise (B, ...): as many uniform states of the box; times (B, 1, ...): t in [0, 1]. ``step_size``: the
    sampler's, squared units of data.
    """
    x = torch.lerp(noise, data, times).detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
    share = torch.clamp((1 - times) / LAST, max=1.0)
    error = gradient * (step_size / (2 * SPEED)) - share * (noise - data)
    return (error.square() / share.clamp(min=LEAST)).mean()
