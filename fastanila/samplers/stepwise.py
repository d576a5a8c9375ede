"""Transitions one after the other, eager or compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..graphs import compiled
from ..models import callables
from ..models.score import evaluator
from .kept import SHAPES, Latest, Replays, Transition, kept_of
from .state import State


class Stepwise:
    """A chain that calls ``advance`` for every transition."""

    def __init__(self, advance: Callable, *, sparing: bool, begins=None):
        # sparing: statistics of the last transition only. On a CPU that would mean to compile the transition twice,
        # which costs more than all the statistics of a run.
        # begins: the sampler whose `init_by` makes the state complete ahead of the first transition, if one does.
        self.advance, self.sparing, self.begins = advance, sparing, begins

    def __call__(self, count, numbers, state, seed, step, offset=0, mask=None):
        if self.begins is not None:
            state = self._complete(numbers, state, seed, step, offset, mask)
        for i, t in enumerate(_times(step, count), start=1):
            state, info = self.advance(numbers, state, seed, t, offset, mask, i == count or not self.sparing)
        return state, info

    def _complete(self, numbers, state, seed, step, offset, mask) -> State:
        def advance(state, seed, step, offset, mask):
            (t,) = _times(step, 1)
            return self.advance(numbers, state, seed, t, offset, mask, True)[0]

        sampler = self.begins.with_numbers(numbers)
        return sampler.init_by(advance, state, seed=seed, step=step, offset=offset, mask=mask)


def _times(step: Tensor, count: int) -> tuple[Tensor, ...]:
    """step, step + 1, ...: 0-dim tensors, each aligned to 16 bytes, lest compiled code copy it to where it would be."""
    times = step + torch.arange(count, device=step.device)
    return times[:, None].expand(-1, 2).contiguous()[:, 0].unbind()


def plain_transition(sampler, energy, score=None) -> Callable:
    return _plain_of(sampler, evaluator(energy, score))


def _plain_of(sampler, evaluate) -> Callable:
    def transition(numbers, state, seed, step, offset=0, mask=None, statistics=True):
        return sampler.with_numbers(numbers).transition(
            evaluate, state, seed=seed, step=step, offset=offset, mask=mask, statistics=statistics
        )

    return transition


class CompiledTransition(NamedTuple):
    """advance(numbers, state, seed, step, offset, mask, statistics) -> (State, Info or None) as one graph, for all
    samplers that differ in numbers only."""

    energy: Callable | None
    score: Callable | None
    advance: Callable  #: the same, with these two as its first arguments
    replays: Replays  #: the graphs captured of it

    def __call__(self, numbers, state, seed, step, offset=0, mask=None, statistics=True):
        return self.advance(self.energy, self.score, numbers, state, seed, step, offset, mask, statistics)


def compiled_transition(sampler, energy, score=None) -> CompiledTransition:
    """The sampler's transition, with what was compiled and captured of it before."""
    which = sampler.built_in()
    transitions = kept_of(energy, score).transitions
    if which not in transitions:
        transitions[which] = Transition(_compiled_transition(*which), Latest(SHAPES))
    advance, replays = transitions[which]
    own = replays.use(callables.identity((energy, score)).tensors, Replays)
    return CompiledTransition(energy, score, advance, own)


def _compiled_transition(kind: type, static: tuple) -> Callable:
    """The energy is an argument, which Dynamo looks at in each call, so that what is compiled does not keep it."""
    template = kind(**dict(static))
    if not template.is_one_graph:
        return _compiled_evaluation(template)

    def transition(energy, score, numbers, state, seed, step, offset, mask, statistics):
        return template.with_numbers(numbers).transition(
            evaluator(energy, score, traced=True),
            state, seed=seed, step=step, offset=offset, mask=mask, statistics=statistics,
        )  # fmt: skip

    # two functions, because Dynamo limits how many variants one may have, and energies make variants of their own
    seeing, blind = compiled(transition), compiled(transition)

    def advance(energy, score, numbers, state, seed, step, offset, mask, statistics):
        return (seeing if statistics else blind)(energy, score, numbers, state, seed, step, offset, mask, statistics)

    return advance


def _compiled_evaluation(template) -> Callable:
    """The same with the energy and its score compiled, and the rest of the transition plain."""

    def evaluation(energy, score, z):
        return evaluator(energy, score, traced=True)(z)

    evaluate = compiled(evaluation)

    def advance(energy, score, *arguments):
        return _plain_of(template, functools.partial(evaluate, energy, score))(*arguments)

    return advance
