"""What the parameters are trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Likelihood(NamedTuple):
    loss: Tensor  #: to be minimised, 0-dim
    energy_data: Tensor  #: mean U(data), 0-dim, detached
    energy_chains: Tensor  #: mean U(chains), 0-dim, detached


def likelihood(energy: Callable[[Tensor], Tensor], data: Tensor, chains: Tensor, energy_l2: float = 0.0) -> Likelihood:
    """The likelihood gradient as a loss: mean U(data) - mean U(chains), chains detached.

    Its gradient in the parameters is minus that of the mean log likelihood of the data if the chains have the model's
    law (Karimi, Xie and Li, Algorithm 1, eq. 7; eq. 3 of an early draft has the sign reversed). ``energy_l2`` adds
    its multiple of mean U(data)**2 + mean U(chains)**2, which keeps the energies near zero (Du and Mordatch 2019).

    data: (N, ...), chains: (M, ...), of one dtype and device; energy maps either to one float32 energy a state.
    """
    u = energy(torch.cat((data, chains.detach())))
    on_data, on_chains = u[: len(data)], u[len(data) :]
    loss = on_data.mean() - on_chains.mean()
    if energy_l2:
        loss = loss + energy_l2 * (on_data.square().mean() + on_chains.square().mean())
    return Likelihood(loss, on_data.mean().detach(), on_chains.mean().detach())
