"""A batch of replicas: what its rows are scaled by, what they carry, and how states move from one to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.score import Evaluate
from .state import State


class Replicas(NamedTuple):
    """What the replicas carry from transition to transition."""

    z: Tensor  #: (R B, ...) the states
    inner: State  #: the same as the inner sampler carries them: states over their scale, tempered energies and scores


class Rows(NamedTuple):
    """What each row of a batch of replicas is scaled by."""

    scale: Tensor  #: (R B, 1, ...), of z / y
    beta: Tensor  #: (R B,), 1 / temperature
    pull: Tensor  #: (R B, 1, ...), scale / temperature, by which the score of y is the score of z


def rows_of(z: Tensor, temperatures: Sequence[float] | Tensor, scales: Sequence[float] | Tensor) -> Rows:
    """Of the states z (R B, ...) at R temperatures."""
    count, ones = len(z) // len(temperatures), [1] * (z.dim() - 1)
    s, t = (torch.as_tensor(x, dtype=torch.float32, device=z.device) for x in (scales, temperatures))
    scale, beta, pull = (x[:, None].expand(-1, count).reshape(-1) for x in (s, 1 / t, s / t))
    return Rows(scale.view(-1, *ones), beta, pull.view(-1, *ones))


def tempered(evaluate: Evaluate, rows: Rows) -> Evaluate:
    """y -> U(s y) / T and its score, of z -> U(z) and its score."""

    def evaluate_rows(y: Tensor) -> tuple[Tensor, Tensor]:
        energy, score = evaluate((y * rows.scale).to(y.dtype))
        if energy is None:
            raise ValueError("energy must be given, for ReplicaExchange compares energies, got a score only")
        return energy.float() * rows.beta, (score * rows.pull).to(score.dtype)

    return evaluate_rows


def traded(moved: State, z: Tensor, rows: Rows, source: Tensor) -> Replicas:
    """The replicas after an exchange: a row that has another's state has its energy and score at the own temperature,
    and one that keeps its own keeps every bit of it. ``source``: of `exchanged`."""
    replicas, count = source.shape
    own = torch.arange(replicas, device=source.device)[:, None].expand(-1, count)
    came = (source != own).flatten()
    at = (source * count + torch.arange(count, device=source.device)).flatten()
    came_rows = came.view(rows.scale.shape)
    z = z[at]
    y = torch.where(came_rows, (z / rows.scale).to(z.dtype), moved.z)
    energy, score = _judged(moved)
    brought = (energy / rows.beta)[at] * rows.beta, ((score / rows.pull)[at] * rows.pull).to(score.dtype)
    energy, score = torch.where(came, brought[0], energy), torch.where(came_rows, brought[1], score)
    return Replicas(z, State(y, energy=energy, score=score))


def restated(state: State | Replicas, old: Rows, new: Rows) -> State | Replicas:
    """The same states, for a sampler of other scales and temperatures; the next proposals are made anew."""
    if not isinstance(state, Replicas):
        return state
    energy, score = _judged(state.inner)
    y = (state.z / new.scale).to(state.z.dtype)
    score = (score / old.pull * new.pull).to(score.dtype)
    return Replicas(state.z, State(y, energy=energy / old.beta * new.beta, score=score))


def _judged(state: State) -> tuple[Tensor, Tensor]:
    assert state.energy is not None and state.score is not None
    return state.energy, state.score
