"""Compiling the pieces of a run, each as one graph."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
import warnings
from collections.abc import Callable

import torch

from .energies import evaluator

_numbers = itertools.count()


def compiled(function: Callable) -> Callable:
    """torch.compile(fullgraph=True), with a cache of its own for each call of this function.

    Dynamo keeps its cache, its recompilation limit and what it has learned of changing shapes by code object, which
    all closures of one function share: a program with many energies would run into the limit. A copy of the code
    under a new name has none of that history.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, fullgraph=True)


def transition_of(sampler, energy, score=None, *, compile: bool, strict: bool = False) -> Callable:
    """advance(numbers, state, seed, step, offset, mask) -> (State, Info), for all samplers that differ in numbers only.

    A compiled transition is kept for the next call with the same energy (the last 16 are). Unless ``strict``, one
    that does not compile as a single graph runs eagerly for the rest of this function's life, with a warning that says
    why.
    """

    def plain(numbers, state, seed, step, offset=0, mask=None):
        return sampler.with_numbers(numbers).transition(
            evaluate_plain, state, seed=seed, step=step, offset=offset, mask=mask
        )

    evaluate_plain = evaluator(energy, score)
    if not compile:
        return plain
    static = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(sampler) if f.name not in sampler.numbers}
    try:
        hash((energy, score))
        build = _compiled_transition
    except TypeError:  # a dataclass with __call__, say
        build = _compiled_transition.__wrapped__
    fused = build(energy, score, type(sampler), tuple(static.items()))
    return fused if strict else _falling_back(fused, plain)


@functools.lru_cache(maxsize=16)
def _compiled_transition(energy, score, kind: type, static: tuple) -> Callable:
    template = kind(**dict(static))
    evaluate = evaluator(energy, score, traced=True)

    def transition(numbers, state, seed, step, offset=0, mask=None):
        return template.with_numbers(numbers).transition(
            evaluate, state, seed=seed, step=step, offset=offset, mask=mask
        )

    return compiled(transition)


def _falling_back(fused: Callable, plain: Callable) -> Callable:
    works = True

    def advance(*arguments):
        nonlocal works
        if works:
            try:
                return fused(*arguments)
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                reason = str(error).strip().splitlines()[0]
                warnings.warn(
                    f"the energy does not compile as one graph and runs eagerly ({reason}); compile=False says so",
                    stacklevel=3,
                )
                works = False
        return plain(*arguments)

    return advance
