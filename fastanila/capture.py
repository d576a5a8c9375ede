"""Compiling the pieces of a chain, each as one graph."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable

import torch

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
