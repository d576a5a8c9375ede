"""Energies made of others: at another precision or temperature, given part of the state, or one for each class."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..data import classes
from ..data.completion import free
from .energies import MLP, ConvNet
from .unet import UNet

#: The networks whose ``layers`` autocast computes at its own precision.
_NETWORKS = (MLP, ConvNet, UNet)


class ConditionalEnergy(nn.Module):
    """U(x | c) of states, by a network of as many channels: (B, C + 1, H, W) -> (B,).

    Its score is zero but where chains may move, so that a norm over channels or chains sees only that.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        return self.network(torch.where(free(z), z, z.detach()))


class ClassEnergy(nn.Module):
    """U(x, y) of states that carry their class (`data.classes`), by a network that maps images (B, C, H, W) to one
    energy for each of ``count`` classes, (B, count): (B, C + 1, H, W) -> (B,).

    Of an image alone the energy is the classes' together, U(x) = -log sum_y exp(-U(x, y)), and -U(x, y) are the logits
    of a classifier p(y | x) (Grathwohl et al., "Your classifier is secretly an energy based model", ICLR 2020).
    ``every_class=True`` gives the energies under every class, (B, count), whatever class the states carry.
    """

    def __init__(self, network: nn.Module, count: int):
        super().__init__()
        self.network, self.count = network, count

    def forward(self, z: Tensor, every_class: bool = False) -> Tensor:
        each = self.network(classes.images(z))
        if each.shape != (len(z), self.count):
            expected = f"an energy for each of {self.count} classes, {(len(z), self.count)}"
            raise ValueError(f"energy must map images (B, C, H, W) to {expected}, got {tuple(each.shape)}")
        return each if every_class else each.gather(1, classes.labels(z)[:, None])[:, 0]


def energies_by_class(energy: Callable[..., Tensor], x: Tensor) -> Tensor:
    """U(x, y) of images (B, C, H, W) for every class y: (B, count). energy: a `ClassEnergy`, or one wrapped as here."""
    return energy(classes.state(x, torch.zeros(len(x), device=x.device)), every_class=True)


def marginal(energy: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """U(x) = -log sum_y exp(-U(x, y)) of images (B, C, H, W): (B,)."""
    return lambda x: -torch.logsumexp(-energies_by_class(energy, x), 1)


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

    def forward(self, x: Tensor, **asked: bool) -> Tensor:
        with torch.autocast(x.device.type, self.dtype):
            return self.energy(x, **asked)

    @torch.no_grad()
    def for_chains(self) -> Autocast:
        """This energy with the layers' weights in ``dtype`` already, for chains: autocast casts frozen weights in every
        call, K times a chain.

        It is kept, and each call writes the parameters of now into it, so that what was compiled or captured of it
        stays good. It shares all other tensors. Of networks that it does not know, it is the energy itself.
        """
        networks = [m for m in self.modules() if isinstance(m, _NETWORKS)]
        masters = [p for network in networks for p in network.layers.parameters()]
        if not masters:
            return self
        everything = [*self.parameters(), *self.buffers()]
        source = self._twin.source
        if len(source) != len(everything) or any(a is not b for a, b in zip(source, everything, strict=True)):
            self._twin = _Twin(self._cast(masters), everything)
        twin = self._twin.energy
        copies = [p for m in twin.modules() if isinstance(m, _NETWORKS) for p in m.layers.parameters()]
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

    def forward(self, x: Tensor, **asked: bool) -> Tensor:
        return self.energy(x, **asked) / self.temperature


def for_chains(energy):
    """The energy as chains take it, with what does not change meanwhile done ahead: see `Autocast.for_chains`."""
    return energy.for_chains() if isinstance(energy, Autocast) else energy
