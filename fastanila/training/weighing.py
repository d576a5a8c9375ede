"""What an update with weighted walkers does beside the others: it moves the witnesses, and lets the weights follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..models.score import sampling
from ..models.wrappers import for_chains
from ..samplers.chain import chain_of
from ..samplers.state import State
from . import build
from .job import Job


class Moved(NamedTuple):
    """Walkers and witnesses after an update's transitions, ahead of its step."""

    walkers: Tensor  #: (B,) float64: U of them
    witnesses: Tensor  #: (witnesses,) float64: U of them, by the moving average
    states: Tensor  #: (witnesses, ...)


class Weighing(NamedTuple):
    #: (z, seed, first) -> Moved: z (B, ...) the walkers as they were moved, first the step of their first transition
    move: Callable[..., Moved]
    #: (made, moved, unless): the parameters have moved, unless the 0-dim float tensor is 1
    follow: Callable[..., None]


def build_weighing(job: Job, energy: Callable[[Tensor], Tensor], compile: Callable, *, strict: bool) -> Weighing:
    """``energy``: of the walkers, at the run's precision. Witnesses follow the moving average of its parameters, which
    is the model that evaluation and sampling use. ``compile``: what runs once an update; ``strict``: as `chain_of`."""
    s, walkers, witnesses = job.settings, job.start.walkers, job.start.witnesses
    average = build.at_precision(job.ebm.average, s.precision)
    on_chains = for_chains(average) if s.fused else average
    chain = chain_of(job.sampler, on_chains, z=witnesses.states, compile=s.fused, capture=False, strict=strict)
    numbers = job.sampler.numbers_on(job.device)

    def move(z: Tensor, seed: Tensor, first: Tensor) -> Moved:
        with sampling(energy):
            of_walkers = energy(z).double()
        if not len(witnesses.states):
            return Moved(of_walkers, witnesses.log_weights, witnesses.states)
        with sampling(average):
            if s.fused:
                for_chains(average)  # the parameters of now
            # their indices go on from the walkers', so that no noise is shared
            state, _ = chain(s.steps, numbers, State(witnesses.states), seed, first, s.batch_size, None)
            return Moved(of_walkers, average(state.z).double(), state.z)

    def reweigh(made: Tensor, moved: Moved, unless: Tensor) -> None:
        broken, u = unless > 0, job.start.uniforms(made)
        walkers.reweigh(moved.walkers - energy(walkers.states).double(), u[:1], broken)
        if len(witnesses.states):
            witnesses.keep(moved.states, broken)
            witnesses.reweigh(moved.witnesses - average(witnesses.states).double(), u[1:], broken)

    reweigh_of = compile(reweigh)

    def follow(made: Tensor, moved: Moved, unless: Tensor) -> None:
        with sampling(energy), sampling(average):
            reweigh_of(made, moved, unless)

    return Weighing(move, follow)
