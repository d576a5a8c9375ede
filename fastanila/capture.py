"""Compiling the pieces of a run, each as one graph, and capturing what they launch as CUDA graphs."""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
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
    return torch.compile(own, fullgraph=True, backend=_inductor)


def _inductor(graph, example_inputs) -> Callable:
    """Inductor, whose compiled graphs tell `watching` what they are called with."""
    run = torch._dynamo.lookup_backend("inductor")(graph, example_inputs)

    def call(*inputs):
        if _watched is not None:
            _watched.append((run, tuple(x.data_ptr() for x in inputs if isinstance(x, Tensor))))
        return run(*inputs)

    return call


_watched: list | None = None

#: The compiled graphs that ran, each with the addresses of all tensors that it read: arguments, parameters, closures.
Reads = list[tuple[Callable, tuple[int, ...]]]


@contextlib.contextmanager
def watching() -> Iterator[Reads]:
    """What compiled graphs read meanwhile.

    A CUDA graph replays kernels on addresses and knows nothing of the Python that launched them. A call under this
    context passes Dynamo's guards, so that equal reads prove that a graph captured from the same call is still good.
    """
    global _watched
    before, _watched = _watched, []
    try:
        yield _watched
    finally:
        _watched = before


def cuda_graph(function: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """What ``function`` launches on the device, captured once: each call of the result replays it, on the current
    stream, and returns the same tensors, which the next call overwrites.

    The function reads and writes tensors that live as long as the result, and has run before, so that everything
    is compiled and every library has its workspace; it does not run now. Raises RuntimeError if it synchronises with
    the host or does anything else that a capture forbids.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()

    def replay() -> T:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay


def mapped(function: Callable[[Tensor], Any], tree):
    """The function of every tensor of a tree of tuples and named tuples; whatever else it holds stays."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        parts = [mapped(function, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def leaves(tree) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(found.append, tree)
    return found


def copy(target, source) -> None:
    """Write the tensors of one tree into those of another of the same form."""
    for into, value in zip(leaves(target), leaves(source), strict=True):
        into.copy_(value)
