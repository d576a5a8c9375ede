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
    assert job.ebm.average is not None  # of this start every run keeps one
    average = build.at_precision(job.ebm.average, s.precision)
    on_chains = for_chains(average) if s.fused else average
    chain = chain_of(job.sampler, on_chains, z=witnesses.states, compile=s.fused, capture=False, strict=strict)
    numbers = job.sampler.numbers_on(job.device)

    def values(z: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        return energy(z).double(), average(states).double() if len(states) else witnesses.log_weights

    def reweigh(made: Tensor, moved: Moved, unless: Tensor) -> None:
        broken, u = unless > 0, job.start.uniforms(made)
        witnesses.keep(moved.states, broken)
        of_walkers, of_witnesses = values(walkers.states, witnesses.states)
        walkers.reweigh(moved.walkers - of_walkers, u[:1], broken)
        if len(witnesses.states):
            witnesses.reweigh(moved.witnesses - of_witnesses, u[1:], broken)

    values_of, reweigh_of = compile(values), compile(reweigh)

    def move(z: Tensor, seed: Tensor, first: Tensor) -> Moved:
        states = witnesses.states
        with sampling(energy), sampling(average):
            if s.fused:
                for_chains(average)  # the parameters of now
            if len(states):  # whose indices go on from the walkers', so that no noise is shared
                states = chain(s.steps, numbers, State(states), seed, first, s.batch_size, None)[0].z
            of_walkers, of_witnesses = values_of(z, states)
        return Moved(of_walkers, of_witnesses, states)

    def follow(made: Tensor, moved: Moved, unless: Tensor) -> None:
        with sampling(energy), sampling(average):
            reweigh_of(made, moved, unless)

    return Weighing(move, follow)
