"""Energies made of others: at another precision or temperature, or given part of the state."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..data.completion import free
from .energies import MLP, ConvNet


class ConditionalEnergy(nn.Module):
    """U(x | c) of states, by a network of as many channels: (B, C + 1, H, W) -> (B,).

    Its score is zero but where chains may move, so that a norm over channels or chains sees only that.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        return self.network(torch.where(free(z), z, z.detach()))


class _Twin(NamedTuple):
    """What an `Autocast` keeps for its chains: one energy, until a parameter or buffer is exchanged or its own end."""

    energy: Autocast | None
    source: list[Tensor]  #: the parameters and buffers that it was made from


class Autocast(nn.Module):
    """An energy evaluated under autocast to ``dtype``; its last layer and its value stay float32."""

    def __init__(self, energy: nn.Module, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.energy, self.dtype = energy, dtype
        self._twin = _Twin(None, [])

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype):
            return self.energy(x)

    @torch.no_grad()
    def for_chains(self) -> Autocast:
        """This energy with the layers' weights in ``dtype`` already, for chains: autocast casts frozen weights in every
        call, K times a chain.

        It is kept, and each call writes the parameters of now into it, so that what was compiled or captured of it
        stays good. It shares all other tensors. Of networks that it does not know, it is the energy itself.
        """
        networks = [m for m in self.modules() if isinstance(m, (MLP, ConvNet))]
        masters = [p for network in networks for p in network.layers.parameters()]
        if not masters:
            return self
        everything = [*self.parameters(), *self.buffers()]
        source = self._twin.source
        if len(source) != len(everything) or any(a is not b for a, b in zip(source, everything, strict=True)):
            self._twin = _Twin(self._cast(masters), everything)
        twin = self._twin.energy
        copies = [p for m in twin.modules() if isinstance(m, (MLP, ConvNet)) for p in m.layers.parameters()]
        torch._foreach_copy_(copies, [p.detach() for p in masters])
        return twin

    def _cast(self, masters: list[nn.Parameter]) -> Autocast:
        casts = {id(p): nn.Parameter(p.detach().to(self.dtype), requires_grad=False) for p in masters}
        shared = {id(t): t for t in (*self.parameters(), *self.buffers())} | casts
        twin = copy.deepcopy(self, shared | {id(self._twin): _Twin(None, [])})
        return twin.eval()


class Tempered(nn.Module):
    """An energy at a temperature: U / temperature, which is what a sampler without a noise scale needs to have the law
    exp(-U / temperature)."""

    def __init__(self, energy: nn.Module, temperature: float):
        super().__init__()
        checks.positive("temperature", temperature, finite=True)
        self.energy, self.temperature = energy, temperature

    def forward(self, x: Tensor) -> Tensor:
        return self.energy(x) / self.temperature


def for_chains(energy):
    """The energy as chains take it, with what does not change meanwhile done ahead: see `Autocast.for_chains`."""
    return energy.for_chains() if isinstance(energy, Autocast) else energy
