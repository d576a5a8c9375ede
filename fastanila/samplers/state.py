"""What a chain carries from transition to transition, and what a transition tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.reference import Statistics


class State(NamedTuple):
    """What a chain carries from transition to transition; all but z are None where a chain starts, or has no use."""

    z: Tensor  #: (B, ...)
    gamma: Tensor | None = None  #: the frozen gain, of z's shape, for refresh="update"
    energy: Tensor | None = None  #: (B,) float32, at z, of samplers that judge proposals; so are the next two
    score: Tensor | None = None  #: (B, ...), at z
    proposal: Tensor | None = None  #: (B, ...), for the next transition to judge


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
