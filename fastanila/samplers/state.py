"""What a chain carries from transition to transition, and what a transition tells.

States, like all that a chain reads, are trees: tuples and named tuples of tensors, of None, and of trees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.reference import Statistics


class State(NamedTuple):
    """What a chain carries from transition to transition; all but z are None where a chain starts, or has no use.

    A sampler that carries something else has a named tuple of its own, with a ``z``. Where a chain starts it is given a
    State nevertheless, and each `Sampler.run` starts one.
    """

    z: Tensor  #: (B, ...)
    gamma: Tensor | None = None  #: the frozen gain, of z's shape, for refresh="update"
    energy: Tensor | None = None  #: (B,) float32, at z, of samplers that judge proposals; so are the next two
    score: Tensor | None = None  #: (B, ...), at z
    proposal: Tensor | None = None  #: (B, ...), for the next transition to judge

    def unproposed(self) -> State:
        """The same, whose next proposal is made anew."""
        return self._replace(proposal=None)


class Info(NamedTuple):
    """What one transition saw, by chain, at the state it started from: each (B,) float32."""

    energy: Tensor | None  #: U(z); None where only a score is given
    score_rms: Tensor  #: root mean square of the score's elements, 1 / unit of z
    clip_fraction: Tensor  #: fraction of elements whose gain is below 1: |s| exceeds the threshold
    gamma_mean: Tensor  #: mean of the gain over the elements, in (0, 1]
    acceptance: Tensor  #: probability of acceptance; 1 for samplers without correction

    @classmethod
    def of(cls, energy: Tensor | None, seen: Statistics, acceptance: Tensor | None = None) -> Info:
        if acceptance is None:
            acceptance = torch.ones_like(seen.score_rms)
        energy = None if energy is None else energy.float()
        return cls(energy, seen.score_rms, seen.clip_fraction, seen.gamma_mean, acceptance)


Chain = Callable[..., tuple[State, Info]]


def mapped(function: Callable[[Tensor], Any], tree):
    """The function of every tensor of a tree of tuples and named tuples; whatever else it holds stays."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        parts = [mapped(function, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def form(tree) -> tuple:
    """Equal for trees of the same types, whose tensors have the same shapes, dtypes and devices."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype, tree.device
    return (type(tree), *map(form, tree)) if isinstance(tree, tuple) else (type(tree),)


def leaves(tree) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(found.append, tree)
    return found


def copy(target, source) -> None:
    """Write the tensors of one tree into those of another of the same form: one launch for each dtype."""
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for into, value in zip(leaves(target), leaves(source), strict=True):
        if into is not value:
            both = groups.setdefault(into.dtype, ([], []))
            both[0].append(into)
            both[1].append(value)
    for into, values in groups.values():
        torch._foreach_copy_(into, values)


def cloned(tree):
    """A copy of every tensor of a tree, contiguous."""
    fresh = mapped(lambda x: torch.empty_like(x, memory_format=torch.contiguous_format), tree)
    copy(fresh, tree)
    return fresh
