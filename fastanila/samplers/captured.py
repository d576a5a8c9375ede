"""Transitions replayed from CUDA graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..graphs import Reads, captured, cuda_graph, on_capture_stream, watching
from .kept import GRAPHS, Replays
from .state import Info, State, cloned, copy, form, leaves, mapped
from .stepwise import Stepwise

#: Transitions of one CUDA graph at most: longer runs replay it, and a graph's nodes take memory.
_LONGEST = 128


@dataclasses.dataclass
class Held:
    """The tensors that the graphs of one set of shapes read and write, and the graphs."""

    numbers: tuple[Tensor, ...]
    state: State  #: where a call starts
    seed: Tensor
    step: Tensor
    mask: Tensor | None
    after: State | None = None  #: where its transitions have led; ``state`` itself where both have the same parts
    #: by number of transitions, and whether they go on from ``after``
    graphs: dict[tuple[int, bool], Callable[[], Info]] = dataclasses.field(default_factory=dict)
    reads: Reads = dataclasses.field(default_factory=list)
    works: bool = True

    @property
    def inputs(self):
        return self.numbers, self.state, self.seed, self.step, self.mask


class Captured:
    """A chain whose transitions are captured as CUDA graphs, by shape and number, and replayed. Threads take turns.

    Every call rehearses its first transition: nothing is launched, but Dynamo's guards see whatever Python state the
    energy depends on, and tell which tensors it reads. Where either has changed, the graphs are captured anew.
    ``record(function, device)`` gives the function's replay; tests on a CPU pass one that calls it. ``replays``: those
    of earlier chains of this transition.
    """

    def __init__(self, advance: Callable, record: Callable = cuda_graph, replays: Replays | None = None):
        self.advance, self.record = advance, record
        self.stepwise = Stepwise(advance, sparing=True)
        replays = Replays() if replays is None else replays
        self.held, self.lock = replays.held, replays.lock

    def __call__(self, count, numbers, state, seed, step, offset=0, mask=None):
        with self.lock:
            return self._replayed(count, numbers, state, seed, step, offset, mask)

    def _replayed(self, count, numbers, state, seed, step, offset, mask):
        inputs = numbers, state, seed, step, mask
        held = self._held_for(inputs, offset, alone=count == 1)
        if not held.works:
            return self.stepwise(count, numbers, state, seed, step, offset, mask)
        with watching(rehearsing=True) as reads:
            self.advance(numbers, state, seed, step, offset, mask, count == 1)
        reads = _beside(reads, inputs)
        if not _same(reads, held.reads):
            held.graphs.clear()
            held.reads = reads
        copy(held.inputs, inputs)
        ahead = 0
        for length in _pieces(count, _LONGEST):
            start = held.after if ahead else held.state
            replay = self._graph(held, length, start, offset)
            if replay is None:
                return self.stepwise(count - ahead, held.numbers, start, held.seed, held.step, offset, held.mask)
            info, ahead = replay(), ahead + length
        return cloned((held.after, info))

    def _held_for(self, inputs, offset: int, alone: bool) -> Held:
        """The tensors for inputs of these shapes. ``alone``: a single transition, whose graph has the statistics."""
        key = (form(inputs), alone, offset, *_arithmetic())
        return self.held.use(key, lambda: Held(*mapped(_contiguous, inputs)))

    def _graph(self, held: Held, length: int, start: State, offset: int) -> Callable[[], Info] | None:
        """The replay of that many transitions from ``start``; None, with a warning, if they cannot be captured."""
        key = length, start is not held.state
        if key not in held.graphs:

            def transitions(count: int) -> tuple[State, Info]:
                return self.stepwise(count, held.numbers, start, held.seed, held.step, offset, held.mask)

            def recorded() -> Info:
                after, info = transitions(length)
                copy(held.after, after)
                held.step.add_(length)
                return info

            # every variant of the transition that the capture meets, so that nothing is compiled under it
            after, _ = on_capture_stream(lambda: transitions(min(length, 3)), held.seed.device)
            if held.after is None:
                held.after = held.state if form(after) == form(held.state) else cloned(after)
            replay = captured(recorded, held.seed.device, "the chain", record=self.record)
            if replay is None:
                held.works = False
                return None
            held.graphs[key] = replay
            if len(held.graphs) > GRAPHS:
                held.graphs.pop(next(iter(held.graphs)))
        return held.graphs[key]


def _pieces(count: int, most: int) -> list[int]:
    """``count`` as the fewest parts of at most ``most``, as equal as can be."""
    parts = -(-count // most)
    return [count // parts + (i < count % parts) for i in range(parts)]


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _beside(reads: Reads, arguments) -> Reads:
    """The reads less the addresses of the arguments, which differ from call to call."""
    own = {x.data_ptr() for x in leaves(arguments)}
    return [(graph, tuple(a for a in addresses if a not in own)) for graph, addresses in reads]


def _same(a: Reads, b: Reads) -> bool:
    return len(a) == len(b) and all(x[0] is y[0] and x[1] == y[1] for x, y in zip(a, b, strict=True))


def _arithmetic() -> tuple[str, str]:
    """What kernels a product and a convolution take, which no guard looks at."""
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
