"""The other ways to do the same work: torchebm, ebmkit, loops by hand, torch.compile, the authors' own form.

Each builder returns a way: a callable without arguments that does the whole work once. The steps follow one law,
z' = z + eps/2 gamma s + sigma sqrt(eps gamma) xi, in each library's own parameters; only the authors' differs, as their
code does. The loops by hand are at their best: parameters frozen, eval mode, the gradient of the input alone, nothing
read back by the host, in place where it can be.
"""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .workloads import STEP_SIZE, STEP_THRESHOLD, Chains, Way

_numbers = itertools.count()


class NotInstalled(RuntimeError):
    """A rival's package is missing: it comes with the extra [bench]."""


# ------------------------------------------------------------------------------------------------------ libraries


def torchebm_langevin(chains: Chains, device: torch.device) -> Way:
    """torchebm's z - eta grad U + sigma sqrt(2 eta) xi, with eta = eps/2."""
    try:
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics
    except ModuleNotFoundError as error:
        raise NotInstalled("torchebm is not installed") from error

    class Model(BaseModel):
        def __init__(self, energy: nn.Module):
            super().__init__(device=device)
            self.energy = energy

        def forward(self, x: Tensor) -> Tensor:
            return self.energy(x)

    sampler = LangevinDynamics(
        Model(chains.ordinary_energy(device)),
        step_size=chains.step_size / 2,
        noise_scale=chains.noise_scale,
        device=device,
    )
    z = chains.start(device)
    return chains.at_precision(lambda: sampler.sample(x=z, n_steps=chains.steps))


def ebmkit_langevin(chains: Chains, device: torch.device) -> Way:
    """ebmkit's z - eta grad U + s xi, with eta = eps/2 and s = sigma sqrt(eps)."""
    try:
        from ebm.samplers.langevin import LangevinDynamics
    except ModuleNotFoundError as error:
        raise NotInstalled("ebmkit is not installed") from error
    sampler = LangevinDynamics(
        step_size=chains.step_size / 2,
        steps=chains.steps,
        noise_scale=chains.noise_scale * math.sqrt(chains.step_size),
    )
    energy, z = chains.ordinary_energy(device), chains.start(device)
    return chains.at_precision(lambda: sampler.sample(energy, z))


# -------------------------------------------------------------------------------------------------------- by hand


def move_langevin(z: Tensor, gradient: Tensor, step_size: float, threshold: float, noise_scale: float) -> Tensor:
    return z.add(gradient, alpha=-step_size / 2).add_(torch.randn_like(z), alpha=noise_scale * math.sqrt(step_size))


def move_anila(z: Tensor, gradient: Tensor, step_size: float, threshold: float, noise_scale: float) -> Tensor:
    """In six passes: neither a division nor a square root of its own, and every temporary is used again."""
    root = gradient.abs().mul_(1 / threshold).clamp_(min=1).rsqrt_()
    moved = z.add(gradient.clamp(-threshold, threshold), alpha=-step_size / 2)
    return moved.addcmul_(root, torch.randn_like(z), value=noise_scale * math.sqrt(step_size))


MOVES = {"Langevin": move_langevin, "AniLA": move_anila}


def eager_loop(chains: Chains, kind: str, device: torch.device, *, channels_last: bool = False) -> Way:
    """``kind``: Langevin or AniLA. ``channels_last``: images and network in that layout."""
    energy, z = frozen(chains, device, channels_last), start(chains, device, channels_last)
    move, numbers = MOVES[kind], (chains.step_size, chains.threshold, chains.noise_scale)

    def loop():
        x = z
        for _ in range(chains.steps):
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(energy(x).sum(), x)
            with torch.no_grad():
                x = move(x.detach(), gradient, *numbers)
        return x

    return chains.at_precision(loop)


class MalaState(NamedTuple):
    z: Tensor  #: (B, ...)
    energy: Tensor  #: (B,) at z, as is the gradient (B, ...)
    gradient: Tensor


def mala_begun(energy: Callable[[Tensor], Tensor], z: Tensor) -> MalaState:
    x = z.detach().requires_grad_()
    u = energy(x)
    (gradient,) = torch.autograd.grad(u.sum(), x)
    return MalaState(x.detach(), u.detach(), gradient)


def mala_transition(energy: Callable[[Tensor], Tensor], state: MalaState, step_size: float) -> MalaState:
    """The Metropolis-adjusted Langevin step, by hand at its best: one gradient, the proposal's, kept for the next."""
    z, energy_z, gradient = state
    noise = torch.randn_like(z)
    there = mala_begun(energy, z.add(gradient, alpha=-step_size / 2).add_(noise, alpha=math.sqrt(step_size)))
    with torch.no_grad():
        # the noise that would lead back, times the root of the step size
        back = torch.sub(z, there.z).add_(there.gradient, alpha=step_size / 2)
        odds = noise.square_().add_(back.square_(), alpha=-1 / step_size).flatten(1).sum(1).div_(2)
        accepted = torch.rand_like(energy_z).log_() < odds.add_(energy_z - there.energy)
        of_state = accepted.view(-1, *[1] * (z.dim() - 1))
        return MalaState(
            torch.where(of_state, there.z, z),
            torch.where(accepted, there.energy, energy_z),
            torch.where(of_state, there.gradient, gradient),
        )


def mala_loop(chains: Chains, device: torch.device) -> Way:
    """Its law is that of `Chains.exact`: exp(-U), at a noise scale of 1."""
    if chains.noise_scale != 1:
        raise ValueError(f"chains must have noise_scale 1, got {chains.noise_scale}")
    energy, z = frozen(chains, device, channels_last=False), start(chains, device, channels_last=False)

    def loop():
        state = mala_begun(energy, z)
        for _ in range(chains.steps):
            state = mala_transition(energy, state, chains.step_size)
        return state.z

    return chains.at_precision(loop)


def compiled_step(
    chains: Chains, kind: str, device: torch.device, *, cudagraphs: bool = False, rand4x: bool = False
) -> Callable[[Tensor], Tensor]:
    """One transition through torch.compile, z -> z; images in channels_last. For the options see `fresh_compile`."""
    energy = frozen(chains, device, chains.is_image)
    move, numbers = MOVES[kind], (chains.step_size, chains.threshold, chains.noise_scale)

    def transition(z):
        gradient = torch.func.grad(lambda x: energy(x).sum())(z)
        return move(z, gradient, *numbers)

    return fresh_compile(transition, cudagraphs=cudagraphs, rand4x=rand4x)


def compiled_loop(chains: Chains, step: Callable[[Tensor], Tensor], device: torch.device) -> Way:
    """The loop by hand over a compiled transition."""
    z = start(chains, device, chains.is_image)
    return chains.at_precision(lambda: _repeated(step, z, chains.steps))


def reduce_overhead_loop(chains: Chains, step: Callable[[Tensor], Tensor], device: torch.device) -> Way:
    """The same over a transition compiled with ``cudagraphs``, which is mode="reduce-overhead"."""

    def kept(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return step(x).clone()  # the next replay overwrites what this one returned

    return compiled_loop(chains, kept, device)


def captured_loop(chains: Chains, step: Callable[[Tensor], Tensor], device: torch.device) -> Way:
    """The best that torch alone can do: all transitions, compiled, captured by hand as one CUDA graph."""
    z = start(chains, device, chains.is_image)
    state = z.clone()
    replay = captured(chains.at_precision(lambda: _repeated(step, state, chains.steps)), device)

    def run():
        state.copy_(z)
        return replay()

    return run


@torch.no_grad()
def _repeated(step: Callable[[Tensor], Tensor], z: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        z = step(z)
    return z


def captured(function: Way, device: torch.device) -> Way:
    """What the function launches, captured as a CUDA graph; it runs twice before, so that everything is compiled."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay(kept=function):  # what the graph reads lives as long as its replay
        graph.replay()
        return result

    return replay


def convolutions_alone(chains: Chains, device: torch.device, beside: Sequence[int] = ()) -> Way:
    """The chain's convolutions and nothing else: each layer's forward and its gradient in the input, K times over.

    Without the biases, which are part of the pointwise work, and without the head, which a sum does as well. Where
    ``beside`` is given, for each of its numbers a kernel follows that moves so many bytes and computes next to nothing:
    the least that pointwise kernels cost. On CUDA captured as one graph, so that no launch is in the way.
    """
    dtype = torch.bfloat16 if chains.precision == "bf16" else torch.float32
    convolutions = [
        (layer, x, torch.randn_like(layer(x)))
        for layer, x in _convolutions(frozen(chains, device, channels_last=True), chains, device, dtype)
    ]
    passes = [torch.zeros(2, n // 8, device=device).unbind() for n in beside]

    @torch.no_grad()
    def once():
        for layer, x, _ in convolutions:
            nn.functional.conv2d(x, layer.weight, None, layer.stride, layer.padding)
        for layer, x, gradient in reversed(convolutions):
            torch.ops.aten.convolution_backward(
                gradient, x, layer.weight, None, layer.stride, layer.padding, layer.dilation, False, (0, 0), 1,
                (True, False, False),
            )  # fmt: skip
        for source, target in passes:
            torch.neg(source, out=target)

    def repeated():
        for _ in range(chains.steps):
            once()

    repeated = chains.at_precision(repeated)
    return captured(repeated, device) if device.type == "cuda" else repeated


@torch.no_grad()
def _convolutions(
    energy: nn.Module, chains: Chains, device: torch.device, dtype: torch.dtype
) -> list[tuple[nn.Conv2d, Tensor]]:
    """The layers but the head and what each is given, in channels_last."""
    noted: list[tuple[nn.Conv2d, Tensor]] = []

    def note(layer, inputs, output):
        x = inputs[0].to(dtype).contiguous(memory_format=torch.channels_last)
        noted.append((layer.to(dtype).to(memory_format=torch.channels_last), x))

    hooks = [m.register_forward_hook(note) for m in energy.modules() if isinstance(m, nn.Conv2d)]
    energy(start(chains, device, channels_last=True))
    for hook in hooks:
        hook.remove()
    return noted[:-1]


def frozen(chains: Chains, device: torch.device, channels_last: bool) -> nn.Module:
    """The energy as a loop at its best has it. In bf16 its weights are cast here, once: autocast, which keeps the casts
    of weights that are trained, would cast frozen ones in every call."""
    energy = chains.ordinary_energy(device).eval().requires_grad_(False)
    if chains.precision == "bf16":
        energy.net.to(torch.bfloat16)
    return energy.to(memory_format=torch.channels_last) if channels_last else energy


def start(chains: Chains, device: torch.device, channels_last: bool) -> Tensor:
    z = chains.start(device)
    return z.contiguous(memory_format=torch.channels_last) if channels_last else z


def fresh_compile(function: Callable, *, cudagraphs: bool = False, rand4x: bool = False) -> Callable:
    """torch.compile with a history of its own: closures of one function share code, and with it Dynamo's limits.

    ``cudagraphs``: what mode="reduce-overhead" sets, on CUDA. ``rand4x``: Inductor's path of four normals a Philox
    call, off by default for a silent error in it (pytorch #198333). Raises NotInstalled where this torch has none.
    """
    options: dict[str, bool] = {"triton.cudagraphs": True} if cudagraphs else {}
    if rand4x:
        from torch import _inductor

        if "use_rand4x" not in _inductor.list_options():
            raise NotInstalled(f"torch {torch.__version__} has no use_rand4x")
        options["use_rand4x"] = True
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, options=options or None)


# ----------------------------------------------------------------------------------------------- the step by hand


@torch.no_grad()
def eager_step(z: Tensor, score: Tensor) -> Tensor:
    """The anisotropic step at the numbers of the workload, as constants: what a careful user writes."""
    root = score.abs().mul_(1 / STEP_THRESHOLD).clamp_(min=1).rsqrt_()
    moved = z.add(score.clamp(-STEP_THRESHOLD, STEP_THRESHOLD), alpha=STEP_SIZE / 2)
    return moved.addcmul_(root, torch.randn_like(z), value=math.sqrt(STEP_SIZE))


def plain_step(z: Tensor, score: Tensor) -> Tensor:
    """The same as its formula reads, for torch.compile to fuse."""
    gamma = 1.0 / torch.clamp(score.abs() / STEP_THRESHOLD, min=1.0)
    return z + STEP_SIZE / 2 * gamma * score + torch.sqrt(STEP_SIZE * gamma) * torch.randn_like(z)


# ---------------------------------------------------------------------------------------------------- the authors


def authors_transition(energy: nn.Module, x: Tensor, threshold: float, noise_scale: float) -> None:
    """A transition as the STANLEY code writes it, into x: the gradient twice, |s| over dim 1, a tensor of thresholds
    from the host, drift gamma grad, noise gamma sigma xi (no root), parameters not frozen."""
    (gradient,) = torch.autograd.grad(energy(x).sum(), [x])
    length = torch.autograd.grad(energy(x).sum(), [x])[0].norm(dim=1)
    thresholds = torch.tensor([threshold] * length.numel()).reshape(length.shape).to(x.device)
    gamma = thresholds / torch.max(thresholds, length)
    gamma = gamma.unsqueeze(1).repeat(1, x.shape[1], *[1] * (x.dim() - 2))
    x.data += -gamma * gradient + gamma * (noise_scale * torch.randn_like(x))


def authors_loop(chains: Chains, device: torch.device) -> Way:
    energy, z = chains.ordinary_energy(device), chains.start(device)

    def loop():
        x = z.clone().requires_grad_()
        for _ in range(chains.steps):
            authors_transition(energy, x, chains.threshold, chains.noise_scale * math.sqrt(chains.step_size))
        return x.detach()

    return chains.at_precision(loop)
