"""One training update in other people's form: the authors' own, and a loop by hand at its best."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastanila.training.settings import Settings

from .rivals import authors_transition, mala_begun, mala_transition, move_anila
from .workloads import Way


def authors_update(energy: nn.Module, pool: Tensor, batch_size: int, population: int, settings: Settings) -> Way:
    """An update in the form of the authors' training loop, on the given network and data.

    The states are drawn from a persistent set by a permutation made on the host, the mean gradient is recorded at
    every transition, and Adam is torch's default.
    """
    device = pool.device
    optimizer = torch.optim.Adam(energy.parameters(), lr=settings.lr)
    persistent = torch.rand((population, *pool.shape[1:]), device=device) * 2 - 1
    noise_scale = settings.noise_scale * math.sqrt(settings.step_size)

    def update():
        chosen = torch.randperm(population)[:batch_size].to(device)
        x = persistent[chosen].clone().requires_grad_()
        for _ in range(settings.steps):
            authors_transition(energy, x, settings.threshold, noise_scale)
        chains = x.detach()
        persistent[chosen] = chains
        data = pool[torch.randint(len(pool), (batch_size,)).to(device)]
        loss = energy(data).mean() - energy(chains).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return update


def eager_update(energy: nn.Module, pool: Tensor, batch_size: int, population: int, settings: Settings) -> Way:
    """The same by hand at its best: one gradient a transition, of a frozen copy of the energy whose weights are in the
    precision of its products, and Adam fused on CUDA."""
    numbers = (settings.step_size, settings.threshold, settings.noise_scale)

    def chain(still: nn.Module, x: Tensor) -> Tensor:
        for _ in range(settings.steps):
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(still(x).sum(), x)
            with torch.no_grad():
                x = move_anila(x.detach(), gradient, *numbers)
        return x

    return _update_with(chain, energy, pool, batch_size, population, settings)


def eager_mala_update(energy: nn.Module, pool: Tensor, batch_size: int, population: int, settings: Settings) -> Way:
    """The same with exact chains: MALA, which is adjusted AniLA without a threshold."""

    def chain(still: nn.Module, x: Tensor) -> Tensor:
        state = mala_begun(still, x)
        for _ in range(settings.steps):
            state = mala_transition(still, state, settings.step_size)
        return state.z

    return _update_with(chain, energy, pool, batch_size, population, settings)


def _update_with(
    chain: Callable[[nn.Module, Tensor], Tensor], energy: nn.Module, pool: Tensor, batch_size: int, population: int,
    settings: Settings,
) -> Way:  # fmt: skip
    """An update whose chains ``chain`` moves: (a frozen copy of the energy, where they start) -> where they end."""
    device = pool.device
    parameters = list(energy.parameters())
    optimizer = torch.optim.Adam(parameters, lr=settings.lr, fused=device.type == "cuda" or None)
    persistent = torch.rand((population, *pool.shape[1:]), device=device) * 2 - 1
    still = copy.deepcopy(energy).eval().requires_grad_(False)
    if settings.precision == "bf16":
        still.net.to(torch.bfloat16)
    copies = list(still.parameters())

    def update():
        chosen = torch.randint(population, (batch_size,), device=device)
        with torch.no_grad():
            torch._foreach_copy_(copies, parameters)
        x = chain(still, persistent[chosen])
        persistent[chosen] = x
        data = pool[torch.randint(len(pool), (batch_size,), device=device)]
        u = energy(torch.cat((data, x)))
        loss = u[: len(data)].mean() - u[len(data) :].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    return update
