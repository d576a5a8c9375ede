"""How a chain makes its transitions: one after the other, replayed from a CUDA graph, or all in a single kernel.

A chain is a callable

    chain(count, numbers, state, seed, step, offset, mask) -> (State, Info)

that makes transitions step .. step + count - 1 of a sampler whose number-valued settings are ``numbers``; seed and step
are 0-dim int64 tensors on the device. The Info is the last transition's. `chain_of` chooses among the three by the
energy's type, the shapes and the machine, so that a run can be repeated; all draw the same noise.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from ..graphs import compiles, first_line
from ..ops import dispatch
from . import whole_chain
from .captured import Captured
from .kept import Kept, kept_of
from .state import Chain, Info, State
from .stepwise import Stepwise, compiled_transition, plain_transition


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
    plain = Stepwise(plain_transition(sampler, energy, score), sparing=z.is_cuda)
    if not compile or not compiles():
        return plain
    transition = compiled_transition(sampler, energy, score)
    # one that is several graphs reads what lies between them, at addresses that prove nothing
    if capture and z.is_cuda and sampler.is_one_graph:
        fused = Captured(transition, replays=transition.replays)
    else:  # on a CPU a graph that only begins the chains would take longer to compile than all that it saves
        fused = Stepwise(transition, sparing=z.is_cuda, begins=None if z.is_cuda else sampler)
    return fused if strict else _FallingBack(fused, plain, kept_of(energy, score))


def makes_whole_chains(sampler, energy, z: Tensor, mask: Tensor | None = None) -> bool:
    """Whether a single kernel can make the chain's transitions: see `samplers.whole_chain`."""
    return sampler.whole_chain and energy is not None and whole_chain.supports(energy, z, mask=mask)


def describe(sampler, energy, z: Tensor, *, fused: bool, update: bool = False) -> str:
    """One line on the device and the implementation that `chain_of` selects; ``update``: within a training update."""
    words, replicas = _described(sampler, energy, z, fused, update), getattr(sampler, "replicas", 1)
    return words if replicas == 1 else f"{words}, {replicas} replicas up to temperature {sampler.temperatures[-1]:g}"


def _described(sampler, energy, z: Tensor, fused: bool, update: bool) -> str:
    if not fused:
        return f"{z.device.type}: plain definition, eager"
    whole = makes_whole_chains(sampler, energy, z)
    if not whole and not compiles():
        graph = ", CUDA graph" if z.is_cuda and update else ""
        return f"{z.device.type}: plain definition, eager, for torch.compile is switched off{graph}"
    words = "compiled reference" if sampler.is_one_graph else "compiled energy, plain transition"
    if whole or (dispatch.fused(z, sampler.norm) and sampler.is_one_graph):
        words = "whole-chain Triton kernel" if whole else "fused Triton kernels"
        words += "" if z.is_cuda else ", interpreted"
    graph = ", CUDA graph" if z.is_cuda and (update or (sampler.is_one_graph and not whole)) else ""
    return f"{z.device.type}: {words}{graph}"


# ------------------------------------------------------------------------------------------------ one after the other


class _FallingBack:
    """A chain that is ``fused`` until its energy fails to compile as one graph, and ``plain`` from then on, in later
    chains of the same energy too.

    Where the energy traces and the compiler behind it fails, that is no fault of the energy's, and raises.
    """

    def __init__(self, fused: Chain, plain: Chain, kept: Kept):
        self.fused, self.plain, self.kept = fused, plain, kept

    def __call__(self, *arguments):
        if self.kept.refusal is not None:
            return self.plain(*arguments)
        try:
            return self.fused(*arguments)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise RuntimeError(
                f"the compiler failed on the transition ({first_line(error)}); compile=False runs without it"
            ) from error
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = first_line(error)
        result = self.plain(*arguments)  # where the energy itself is at fault, it says so here
        self.kept.refusal = reason
        warnings.warn(
            f"the energy does not compile as one graph and runs eagerly ({reason}); compile=False (--no-fused) says so",
            stacklevel=3,
        )
        return result


# ----------------------------------------------------------------------------------------------- all in a single kernel


def _whole_chain(sampler, energy, count, numbers, state, seed, step, offset=0, mask=None):
    """Of the state only z counts: energy and score are taken there anew, and the proposal is that of ``step`` again."""
    s = sampler.with_numbers(numbers)
    out = whole_chain.run(energy, state.z, **_settings(s), seed=seed, step=step, steps=count, offset=offset)
    return State(out.z), Info(out.energy, out.score_rms, out.clip_fraction, out.gamma_mean, out.acceptance)


def whole_run(sampler, energy, z: Tensor, *, steps: int, seed: int, step: int, offset: int, mask=None) -> Tensor | None:
    """The chains after ``steps`` transitions, by a launch and nothing else; None where no kernel makes them."""
    if not sampler.whole_chain:
        return None
    numbers = dict(seed=seed, step=step, steps=steps, offset=offset)
    found = whole_chain.attempt(energy, z, **_settings(sampler), **numbers, mask=mask)
    return None if isinstance(found, str) else found[0]


def _settings(s) -> dict:
    return dict(
        threshold=s.threshold, step_size=s.step_size, noise_scale=s.noise_scale, norm=s.norm, refresh=s.refresh,
        bounds=s.bounds, adjusted=s.is_exact,
    )  # fmt: skip
