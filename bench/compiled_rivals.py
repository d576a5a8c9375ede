"""Rivals that go through torch.compile or a CUDA graph; and the convolutions of a chain alone, as a bound."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, _inductor, nn

from fastanila.graphs import cuda_graph

from .rivals import NotInstalled, frozen, move_anila
from .workloads import STEP_SIZE, STEP_THRESHOLD, Chains, Way

_numbers = itertools.count()


def fresh_compile(function: Callable, *, cudagraphs: bool = False, rand4x: bool = False) -> Callable:
    """torch.compile with a history of its own: closures of one function share code, and with it Dynamo's limits.

    ``cudagraphs``: what mode="reduce-overhead" sets, on CUDA. ``rand4x``: Inductor's path of four normals a Philox
    call, off by default for a silent error in it (pytorch #198333). Raises NotInstalled where this torch has none.
    """
    options: dict[str, bool] = {"triton.cudagraphs": True} if cudagraphs else {}
    if rand4x:
        if "use_rand4x" not in _inductor.list_options():
            raise NotInstalled(f"torch {torch.__version__} has no use_rand4x")
        options["use_rand4x"] = True
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, options=options or None)


def plain_step(z: Tensor, score: Tensor) -> Tensor:
    """The anisotropic step at the numbers of the workload, as its formula reads, for torch.compile to fuse."""
    gamma = 1.0 / torch.clamp(score.abs() / STEP_THRESHOLD, min=1.0)
    return z + STEP_SIZE / 2 * gamma * score + torch.sqrt(STEP_SIZE * gamma) * torch.randn_like(z)


# --------------------------------------------------------------------------------------------------------- chains


class Compiled(NamedTuple):
    """A transition of AniLA through torch.compile, z -> z', and where the chains start; images in channels_last."""

    step: Callable[[Tensor], Tensor]
    z: Tensor


def compiled(chains: Chains, device: torch.device, **options: bool) -> Compiled:
    """``options``: see `fresh_compile`."""
    energy, z = frozen(chains, device, chains.is_image)
    numbers = tuple(chains.numbers)

    def transition(z):
        gradient = torch.func.grad(lambda x: energy(x).sum())(z)
        return move_anila(z, gradient, *numbers)

    return Compiled(fresh_compile(transition, **options), z)


def compiled_loop(chains: Chains, of: Compiled) -> Way:
    """The loop by hand over a compiled transition."""
    return chains.at_precision(lambda: _repeated(of.step, of.z, chains.steps))


def reduce_overhead_loop(chains: Chains, of: Compiled) -> Way:
    """The same over a transition compiled with ``cudagraphs``, which is mode="reduce-overhead"."""

    def kept(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return of.step(x).clone()  # the next replay overwrites what this one returned

    return compiled_loop(chains, of._replace(step=kept))


def captured_loop(chains: Chains, of: Compiled, device: torch.device) -> Way:
    """The best that torch alone can do: all transitions, compiled, captured by hand as one CUDA graph."""
    state = of.z.clone()
    replay = captured(chains.at_precision(lambda: _repeated(of.step, state, chains.steps)), device)

    def run():
        state.copy_(of.z)
        return replay()

    return run


@torch.no_grad()
def _repeated(step: Callable[[Tensor], Tensor], z: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        z = step(z)
    return z


def captured(function: Way, device: torch.device) -> Way:
    """What the function launches, captured as a CUDA graph; it runs twice before, so that everything is compiled."""
    for _ in range(2):
        function()
    replay = cuda_graph(function, device)
    return lambda kept=function: replay()  # what the graph reads lives as long as its replay


# --------------------------------------------------------------------------------------------------- convolutions


def convolutions_alone(chains: Chains, device: torch.device, beside: Sequence[int] = ()) -> Way:
    """The chain's convolutions and nothing else: each layer's forward and its gradient in the input, K times over.

    Without the biases, which are part of the pointwise work, and without the head, which a sum does as well. Where
    ``beside`` is given, for each of its numbers a kernel follows that moves so many bytes and computes next to nothing:
    the least that pointwise kernels cost. On CUDA captured as one graph, so that no launch is in the way.
    """
    layers = [(layer, x, torch.randn_like(layer(x))) for layer, x in _convolutions(chains, device)]
    passes = [torch.zeros(2, n // 8, device=device).unbind() for n in beside]

    @torch.no_grad()
    def repeated():
        for _ in range(chains.steps):
            for layer, x, _ in layers:
                nn.functional.conv2d(x, layer.weight, None, layer.stride, layer.padding)
            for layer, x, gradient in reversed(layers):
                torch.ops.aten.convolution_backward(
                    gradient, x, layer.weight, None, layer.stride, layer.padding, layer.dilation, False, (0, 0), 1,
                    (True, False, False),
                )  # fmt: skip
            for source, target in passes:
                torch.neg(source, out=target)

    way = chains.at_precision(repeated)
    return captured(way, device) if device.type == "cuda" else way


@torch.no_grad()
def _convolutions(chains: Chains, device: torch.device) -> list[tuple[nn.Conv2d, Tensor]]:
    """The layers but the head and what each is given, in channels_last."""
    energy, z = frozen(chains, device, channels_last=True)
    how = dict(dtype=torch.bfloat16 if chains.precision == "bf16" else torch.float32, memory_format=torch.channels_last)
    found: list[tuple[nn.Conv2d, Tensor]] = []

    def note(layer, inputs, output):
        found.append((layer.to(**how), inputs[0].to(**how)))

    hooks = [m.register_forward_hook(note) for m in energy.modules() if isinstance(m, nn.Conv2d)]
    energy(z)
    for hook in hooks:
        hook.remove()
    return found[:-1]
