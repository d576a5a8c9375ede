"""One training update in other people's form: the authors' own, and a loop by hand at its best."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastanila.training.settings import Settings

from .rivals import authors_chain, eager_chain, mala_chain, move_anila
from .workloads import Numbers, Way


def authors_update(energy: nn.Module, pool: Tensor, settings: Settings) -> Way:
    """An update in the form of the authors' training loop, on the given network and data.

    The states are drawn from a persistent set by a permutation made on the host, the mean gradient is recorded at
    every transition, and Adam is torch's default.
    """
    device, count = pool.device, settings.batch_size
    optimizer = torch.optim.Adam(energy.parameters(), lr=settings.lr)
    persistent = _uniform(pool, settings.chains)

    def update():
        chosen = torch.randperm(settings.chains)[:count].to(device)
        chains = authors_chain(energy, persistent[chosen], settings.steps, _numbers(settings))
        persistent[chosen] = chains
        data = pool[torch.randint(len(pool), (count,)).to(device)]
        loss = energy(data).mean() - energy(chains).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return update


def eager_update(energy: nn.Module, pool: Tensor, settings: Settings) -> Way:
    """The same by hand at its best: one gradient a transition, of a frozen copy of the energy whose weights are in the
    precision of its products, and Adam fused on CUDA."""
    numbers = _numbers(settings)
    return _update(lambda still, x: eager_chain(still, x, settings.steps, move_anila, numbers), energy, pool, settings)


def eager_mala_update(energy: nn.Module, pool: Tensor, settings: Settings) -> Way:
    """The same with exact chains: MALA, which is adjusted AniLA without a threshold."""
    return _update(lambda still, x: mala_chain(still, x, settings.steps, settings.step_size), energy, pool, settings)


def _update(
    chain: Callable[[nn.Module, Tensor], Tensor], energy: nn.Module, pool: Tensor, settings: Settings
) -> Way:  # fmt: skip
    """An update whose chains ``chain`` moves: (a frozen copy of the energy, where they start) -> where they end."""
    device, count = pool.device, settings.batch_size
    parameters = list(energy.parameters())
    optimizer = torch.optim.Adam(parameters, lr=settings.lr, fused=device.type == "cuda" or None)
    persistent = _uniform(pool, settings.chains)
    still = copy.deepcopy(energy).eval().requires_grad_(False)
    if settings.precision == "bf16":
        still.net.to(torch.bfloat16)
    copies = list(still.parameters())

    def update():
        chosen = torch.randint(settings.chains, (count,), device=device)
        with torch.no_grad():
            torch._foreach_copy_(copies, parameters)
        x = chain(still, persistent[chosen])
        persistent[chosen] = x
        data = pool[torch.randint(len(pool), (count,), device=device)]
        u = energy(torch.cat((data, x)))
        loss = u[:count].mean() - u[count:].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    return update


def _numbers(settings: Settings) -> Numbers:
    return Numbers(settings.step_size, settings.threshold, settings.noise_scale)


def _uniform(pool: Tensor, count: int) -> Tensor:
    """Chains anywhere in the box of the data."""
    return torch.rand((count, *pool.shape[1:]), device=pool.device) * 2 - 1
