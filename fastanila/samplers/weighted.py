"""Walkers that carry weights, so that averages over them are the model's while its parameters move.

Where the energy changes at once from U_old to U_new, a population of the old law has the new one's averages with the
weights exp(U_old(z) - U_new(z)) (Jarzynski 1997; Neal 2001). A transition that leaves the law as it is changes no
weight. So the walkers of an exact sampler, each with a log weight A,

    A += U_old(z) - U_new(z)         at every update of the parameters, and nothing at a transition,

have at any time, however short the transitions, E[exp(A) g(z)] = Z E_model[g]: the mean of exp(A) measures Z without
bias, and softmax(A) weighs the walkers in averages of the model, up to the bias of order 1 / count of a ratio of means
(Carbone, Hua, Coste and Vanden-Eijnden 2023, arXiv 2305.19414, whose unadjusted transitions add a ratio of their
densities to A, which is 0 of exact ones; Carbone 2025, arXiv 2506.07843).

That holds for given changes of the energy. Walkers whose average the parameters learn from make the changes that they
are to measure: the energy rises where they are, and their estimate of log Z is too low. A second population, the
witnesses, is moved and weighted alike and never learned from. It may follow another energy than the walkers do: the
moving average of the parameters takes a smoother way, which costs less of the weights. (Desjardins, Courville and
Bengio 2011 track Z of a restricted Boltzmann machine while it learns, by tempered chains.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import noise
from ..noise import Stream

#: Witnesses are resampled within so many blocks, each by itself: independent measurements, hence a standard error.
BLOCKS = 16
#: The effective sample size, as a share of the walkers, below which they are resampled.
LEAST = 0.5


def ess(log_weights: Tensor) -> Tensor:
    """The effective sample size as a share, 1 / (n sum of squares of softmax(A)), of log weights (..., n): (...)."""
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp() / log_weights.shape[-1]


def log_mean(log_weights: Tensor) -> Tensor:
    """log of the mean of exp(A), of log weights (..., n): (...)."""
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])


def systematic(log_weights: Tensor, u: Tensor) -> Tensor:
    """The rows that systematic resampling takes of log weights (..., n): (..., n) int64, in order.

    Row i is taken n softmax(A)_i times in the mean, and each time that number rounded down or up (Whitley 1994). One
    uniform in (0, 1] for each population: u (...).
    """
    count = log_weights.shape[-1]
    cumulative = log_weights.double().softmax(-1).cumsum(-1)
    cumulative = (cumulative / cumulative[..., -1:]).contiguous()  # ends at 1, and so does the last place
    places = (torch.arange(count, device=u.device) + u.double()[..., None]) / count
    return torch.searchsorted(cumulative, places).clamp(max=count - 1)


def resampled(states: Tensor, log_weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """States (b, n, ...) and log weights (b, n) of b populations; those whose effective sample size is below `LEAST`
    resampled. Their weights become equal, and keep their mean: of Z they say what they said. u: (b,), see
    `systematic`."""
    poor = (ess(log_weights) < LEAST)[:, None]
    rows = torch.where(poor, systematic(log_weights, u), torch.arange(log_weights.shape[1], device=u.device))
    rows = rows.reshape(*rows.shape, *[1] * (states.dim() - 2)).expand_as(states)
    return states.gather(1, rows), torch.where(poor, log_mean(log_weights)[:, None], log_weights)


def evenly(states: Tensor, log_weights: Tensor, *, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """Walkers (n, ...) resampled by their log weights (n,), for whoever takes them as draws of the model: (n, ...)."""
    u = noise.uniform((), seed=seed, step=step, stream=Stream.RESAMPLING, device=states.device)
    return states[systematic(log_weights, u)]


class LogZ(NamedTuple):
    """log Z as a population measures it: 0-dim float64 each."""

    value: Tensor
    error: Tensor  #: standard error, from how far blocks of the population are apart


def log_z(log_weights: Tensor) -> LogZ:
    """log of the mean of exp(A) over a population whose `BLOCKS` blocks, in order, are independent; (n,) float64."""
    blocks = log_mean(log_weights.view(BLOCKS, -1))
    value = log_mean(blocks)
    return LogZ(value, (blocks - value).exp().std() / math.sqrt(BLOCKS))


class Population:
    """States (n, ...), float32, and their log weights (n,), float64, in ``blocks`` that are resampled each by itself.

    Updates change both where they are. They begin as draws of N(0, sd^2 I), with the weights of `begin`.
    """

    def __init__(self, states: Tensor, blocks: int):
        self.states, self.blocks = states, blocks
        self.log_weights = torch.zeros(len(states), dtype=torch.float64, device=states.device)

    @torch.no_grad()
    def begin(self, energy: Callable[[Tensor], Tensor], sd: float) -> None:
        """Weights of the first energy: A = -U(z) - log N(z; 0, sd^2 I), all the same where it is that Gaussian's."""
        z = self.states.double().flatten(1)
        log_density = -0.5 * (z / sd).square().sum(1) - z.shape[1] * math.log(sd * math.sqrt(2 * math.pi))
        self.log_weights.copy_(-energy(self.states).double() - log_density)

    def keep(self, z: Tensor, unless: Tensor) -> None:
        """The states after their transitions, unless the 0-dim bool says no."""
        self.states.copy_(torch.where(unless, self.states, z))

    def reweigh(self, change: Tensor, u: Tensor, unless: Tensor) -> None:
        """A += change (n,), which is U_old - U_new at the states, and resample with uniforms u (blocks,), unless the
        0-dim bool says no."""
        new = (self.log_weights + change.double()).view(self.blocks, -1)
        states, new = resampled(self.states.unflatten(0, (self.blocks, -1)), new, u)
        self.states.copy_(torch.where(unless, self.states, states.flatten(0, 1)))
        self.log_weights.copy_(torch.where(unless, self.log_weights, new.flatten()))


class WeightedStart:
    """Walkers with weights, and the witnesses, on the device: every update moves all of them.

    Walkers are one population of ``count``, and the witnesses `BLOCKS` of equal size.
    ValueError where they are no multiple of `BLOCKS`.
    """

    def __init__(self, count: int, witnesses: int, shape, sd: float, *, seed: int | Tensor, device=None):
        if witnesses % BLOCKS:
            raise ValueError(f"witnesses must be a multiple of {BLOCKS}, got {witnesses}")
        self.sd, self.seed = sd, seed
        everyone, step = (count + witnesses, *shape), (1 << 56) - 1  # the step as that of `PersistentStart`
        states = sd * noise.normal(everyone, seed=seed, step=step, stream=Stream.START, device=device)
        self.walkers = Population(states[:count].clone(), 1)
        self.witnesses = Population(states[count:].clone(), BLOCKS)

    def begin(self, energy: Callable[[Tensor], Tensor]) -> None:
        for population in (self.walkers, self.witnesses):
            population.begin(energy, self.sd)

    def draw(self, update: int | Tensor, given: Tensor | None = None) -> Tensor:
        return self.walkers.states

    def keep(self, update: int | Tensor, z: Tensor, unless: Tensor) -> None:
        self.walkers.keep(z, unless)

    def uniforms(self, made: int | Tensor) -> Tensor:
        """Of update ``made``, by which its walkers (the first) and its witnesses' blocks are resampled:
        (1 + BLOCKS,)."""
        shape, device = (1 + BLOCKS,), self.walkers.states.device
        return noise.uniform(shape, seed=self.seed, step=made, stream=Stream.RESAMPLING, device=device)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "population": self.walkers.states,
            "log_weights": self.walkers.log_weights,
            "witnesses": self.witnesses.states,
            "witness_log_weights": self.witnesses.log_weights,
        }
