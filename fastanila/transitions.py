"""How a chain makes its transitions: one after the other, replayed from a CUDA graph, or all in a single kernel.

A chain is a callable

    chain(count, numbers, state, seed, step, offset, mask) -> (State, Info)

that makes transitions step .. step + count - 1 of a sampler whose number-valued settings are ``numbers``; seed and step
are 0-dim int64 tensors on the device. The Info is the last transition's. `chain_of` chooses among the three by the
energy's type, the shapes and the machine, so that a run can be repeated; all draw the same noise.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, trajectory
from .capture import Reads, cloned, compiled, copy, cuda_graph, first_line, leaves, mapped, watching
from .energies import evaluator
from .reference import Statistics


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

#: Transitions of one CUDA graph at most: longer runs replay it, and a graph's nodes take memory.
_LONGEST = 128
#: Captured shapes kept by a chain, and graphs by a shape.
_SHAPES, _GRAPHS = 4, 6


def chain_of(
    sampler, energy, score=None, *, z: Tensor, mask: Tensor | None = None, compile: bool, capture: bool = True,
    whole: bool = True, strict: bool = False,
) -> Chain:  # fmt: skip
    """The fastest chain for this sampler and energy at z's shape, dtype and device.

    ``whole``: a single kernel may make all transitions of a call. ``capture``: CUDA graphs may; who captures more than
    the chain asks for none. ``strict``: an energy that does not compile raises, instead of running eagerly with a
    warning.
    """
    if compile and whole and makes_whole_chains(sampler, energy, z, mask):
        return functools.partial(_whole_chain, sampler, energy)
    plain = Stepwise(_plain_transition(sampler, energy, score), sparing=z.is_cuda)
    if not compile:
        return plain
    transition = compiled_transition(sampler, energy, score)
    # one that is several graphs reads what lies between them, at addresses that prove nothing
    captured = capture and z.is_cuda and sampler.is_one_graph
    if captured:
        fused = _captured(transition)
    else:  # on a CPU a graph that only begins the chains would take longer to compile than all that it saves
        fused = Stepwise(transition, sparing=z.is_cuda, begun=None if z.is_cuda else sampler)
    return fused if strict else _FallingBack(fused, plain)


def makes_whole_chains(sampler, energy, z: Tensor, mask: Tensor | None = None) -> bool:
    """Whether a single kernel can make the chain's transitions: see `fastanila.trajectory`."""
    return sampler.whole_chain and energy is not None and trajectory.supports(energy, z, mask=mask)


def path(sampler, energy, z: Tensor, *, fused: bool, update: bool = False) -> str:
    """One line on the device and the implementation that `chain_of` selects; ``update``: within a training update."""
    if not fused:
        return f"{z.device.type}: plain definition, eager"
    whole = makes_whole_chains(sampler, energy, z)
    words = "compiled reference" if sampler.is_one_graph else "compiled energy, plain transition"
    if whole or (ops.fused(z, sampler.norm) and sampler.is_one_graph):
        words = "whole-chain Triton kernel" if whole else "fused Triton kernels"
        words += "" if z.is_cuda else ", interpreted"
    graph = ", CUDA graph" if z.is_cuda and (update or (sampler.is_one_graph and not whole)) else ""
    return f"{z.device.type}: {words}{graph}"


# ------------------------------------------------------------------------------------------------ one after the other


class Stepwise:
    """A chain that calls ``advance`` for every transition."""

    def __init__(self, advance: Callable, *, sparing: bool, begun=None):
        # sparing: statistics of the last transition only. On a CPU that would mean to compile the transition twice,
        # which costs more than all the statistics of a run.
        # begun: the sampler, if it is to make the state complete ahead of the first transition.
        self.advance, self.sparing, self.begun = advance, sparing, begun

    def __call__(self, count, numbers, state, seed, step, offset=0, mask=None):
        if self.begun is not None:
            state = self._begun(numbers, state, seed, step, offset, mask)
        for made, t in enumerate(_times(step, count), start=1):
            state, info = self.advance(numbers, state, seed, t, offset, mask, made == count or not self.sparing)
        return state, info

    def _begun(self, numbers, state, seed, step, offset, mask) -> State:
        def advance(state, seed, step, offset, mask):
            (t,) = _times(step, 1)
            return self.advance(numbers, state, seed, t, offset, mask, True)[0]

        sampler = self.begun.with_numbers(numbers)
        return sampler.begun(advance, state, seed=seed, step=step, offset=offset, mask=mask)


def _times(step: Tensor, count: int) -> tuple[Tensor, ...]:
    """step, step + 1, ...: 0-dim tensors, each aligned to 16 bytes, lest compiled code copy it to where it would be."""
    times = step + torch.arange(count, device=step.device)
    return times[:, None].expand(-1, 2).contiguous()[:, 0].unbind()


def _plain_transition(sampler, energy, score=None) -> Callable:
    return _plain_of(sampler, evaluator(energy, score))


def _plain_of(sampler, evaluate) -> Callable:
    def transition(numbers, state, seed, step, offset=0, mask=None, statistics=True):
        return sampler.with_numbers(numbers).transition(
            evaluate, state, seed=seed, step=step, offset=offset, mask=mask, statistics=statistics
        )

    return transition


def compiled_transition(sampler, energy, score=None) -> Callable:
    """advance(numbers, state, seed, step, offset, mask, statistics) -> (State, Info or None) as one graph, for all
    samplers that differ in numbers only. It is kept for the next call with the same energy (the last 16 are)."""
    static = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(sampler) if f.name not in sampler.numbers}
    try:
        hash((energy, score))
        build = _compiled_transition
    except TypeError:  # a dataclass with __call__, say
        build = _compiled_transition.__wrapped__
    return build(energy, score, type(sampler), tuple(static.items()))


@functools.lru_cache(maxsize=16)
def _compiled_transition(energy, score, kind: type, static: tuple) -> Callable:
    template = kind(**dict(static))
    evaluate = evaluator(energy, score, traced=True)
    if not kind.is_one_graph:
        return _plain_of(template, compiled(evaluate))

    def transition(numbers, state, seed, step, offset, mask, statistics):
        return template.with_numbers(numbers).transition(
            evaluate, state, seed=seed, step=step, offset=offset, mask=mask, statistics=statistics
        )

    # two functions, because Dynamo limits how many variants one may have, and energies make variants of their own
    seeing, blind = compiled(transition), compiled(transition)

    def advance(numbers, state, seed, step, offset=0, mask=None, statistics=True):
        return (seeing if statistics else blind)(numbers, state, seed, step, offset, mask, statistics)

    return advance


class _FallingBack:
    """A chain that is ``fused`` until its energy fails to compile as one graph, and ``plain`` from then on.

    Where the energy traces and the compiler behind it fails, that is no fault of the energy's, and raises.
    """

    def __init__(self, fused: Chain, plain: Chain):
        self.fused, self.plain, self.works = fused, plain, True

    def __call__(self, *arguments):
        if self.works:
            try:
                return self.fused(*arguments)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                raise RuntimeError(
                    f"the compiler failed on the transition ({first_line(error)}); compile=False runs without it"
                ) from error
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                self.works = False
                warnings.warn(
                    f"the energy does not compile as one graph and runs eagerly ({first_line(error)}); compile=False "
                    "says so",
                    stacklevel=3,
                )
        return self.plain(*arguments)


# -------------------------------------------------------------------------------------------- replayed from CUDA graphs


@dataclasses.dataclass
class _Held:
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
    ``record(function, device)`` gives the function's replay; tests on a CPU pass one that calls it.
    """

    def __init__(self, advance: Callable, record: Callable = cuda_graph):
        self.advance, self.record = advance, record
        self.stepwise = Stepwise(advance, sparing=True)
        self.held: dict[tuple, _Held] = {}
        self.lock = threading.Lock()

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
        made = 0
        for length in _pieces(count, _LONGEST):
            start = held.after if made else held.state
            replay = self._graph(held, length, start, offset)
            if replay is None:
                return self.stepwise(count - made, held.numbers, start, held.seed, held.step, offset, held.mask)
            info, made = replay(), made + length
        return cloned((held.after, info))

    def _held_for(self, inputs, offset: int, alone: bool) -> _Held:
        """The tensors for inputs of these shapes. ``alone``: a single transition, whose graph has the statistics."""
        tensors = tuple((x.shape, x.dtype, x.device) for x in leaves(inputs))
        absent = tuple(part is None for part in (*inputs[1], inputs[4]))
        key = (tensors, absent, alone, offset, *_arithmetic())
        held = self.held.pop(key, None)
        if held is None:
            held = _Held(*mapped(lambda x: torch.empty_like(x, memory_format=torch.contiguous_format), inputs))
        self.held[key] = held  # the latest last
        if len(self.held) > _SHAPES:
            self.held.pop(next(iter(self.held)))
        return held

    def _graph(self, held: _Held, length: int, start: State, offset: int) -> Callable[[], Info] | None:
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
            after, _ = transitions(min(length, 3))
            if held.after is None:
                alike = all((a is None) == (b is None) for a, b in zip(after, held.state, strict=True))
                held.after = held.state if alike else cloned(after)
            try:
                held.graphs[key] = self.record(recorded, held.seed.device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                held.works = False
                warnings.warn(f"the chain runs uncaptured: {first_line(error)}", stacklevel=4)
                return None
            if len(held.graphs) > _GRAPHS:
                held.graphs.pop(next(iter(held.graphs)))
        return held.graphs[key]


def _pieces(count: int, most: int) -> list[int]:
    """``count`` as the fewest parts of at most ``most``, as equal as can be."""
    parts = -(-count // most)
    return [count // parts + (i < count % parts) for i in range(parts)]


def _captured(transition: Callable) -> Captured:
    """The transition's captured chain, which lives as long as it does, so that a later run finds its graphs."""
    if not hasattr(transition, "captured"):
        transition.captured = Captured(transition)
    return transition.captured


def _beside(reads: Reads, arguments) -> Reads:
    """The reads less the addresses of the arguments, which differ from call to call."""
    own = {x.data_ptr() for x in leaves(arguments)}
    return [(graph, tuple(a for a in addresses if a not in own)) for graph, addresses in reads]


def _same(a: Reads, b: Reads) -> bool:
    return len(a) == len(b) and all(x[0] is y[0] and x[1] == y[1] for x, y in zip(a, b, strict=True))


def _arithmetic() -> tuple[str, str]:
    """What kernels a product and a convolution take, which no guard looks at."""
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


# ----------------------------------------------------------------------------------------------- all in a single kernel


def _whole_chain(sampler, energy, count, numbers, state, seed, step, offset=0, mask=None):
    """Of the state only z counts: energy and score are taken there anew, and the proposal is that of ``step`` again."""
    s = sampler.with_numbers(numbers)
    out = trajectory.run(energy, state.z, **_settings(s), seed=seed, step=step, steps=count, offset=offset)
    return State(out.z), Info(out.energy, out.score_rms, out.clip_fraction, out.gamma_mean, out.acceptance)


def whole_run(sampler, energy, z: Tensor, *, steps: int, seed: int, step: int, offset: int, mask=None) -> Tensor | None:
    """The chains after ``steps`` transitions, by a launch and nothing else; None where no kernel makes them."""
    if not sampler.whole_chain:
        return None
    numbers = dict(seed=seed, step=step, steps=steps, offset=offset)
    made = trajectory.attempt(energy, z, **_settings(sampler), **numbers, mask=mask)
    return None if isinstance(made, str) else made[0]


def _settings(s) -> dict:
    return dict(
        threshold=s.threshold, step_size=s.step_size, noise_scale=s.noise_scale, norm=s.norm, refresh=s.refresh,
        bounds=s.bounds, adjusted=s.is_exact,
    )  # fmt: skip
