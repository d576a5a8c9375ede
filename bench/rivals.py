"""The other ways to do the same work: torchebm, ebmkit, loops by hand, the authors' own form; compiled ones are in
`bench.compiled_rivals`.

Each builder returns a way: a callable without arguments that does the whole work once. The steps follow one law,
z' = z + eps/2 gamma s + sigma sqrt(eps gamma) xi, in each library's own parameters; only the authors' differs, as their
code does. The loops by hand are at their best: parameters frozen, eval mode, the gradient of the input alone, nothing
read back by the host, in place where it can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .workloads import STEP_SIZE, STEP_THRESHOLD, Chains, Numbers, Way

Energy = Callable[[Tensor], Tensor]
Move = Callable[..., Tensor]  #: (z, gradient of U, *`Numbers`) -> z'


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

    step_size, _, noise_scale = chains.numbers
    model, z = Model(chains.ordinary_energy(device)), chains.start(device)
    sampler = LangevinDynamics(model, step_size=step_size / 2, noise_scale=noise_scale, device=device)
    return chains.at_precision(lambda: sampler.sample(x=z, n_steps=chains.steps))


def ebmkit_langevin(chains: Chains, device: torch.device) -> Way:
    """ebmkit's z - eta grad U + s xi, with eta = eps/2 and s = sigma sqrt(eps)."""
    try:
        from ebm.samplers.langevin import LangevinDynamics
    except ModuleNotFoundError as error:
        raise NotInstalled("ebmkit is not installed") from error
    step_size, _, noise_scale = chains.numbers
    noise_scale *= math.sqrt(step_size)
    sampler = LangevinDynamics(step_size=step_size / 2, steps=chains.steps, noise_scale=noise_scale)
    energy, z = chains.ordinary_energy(device), chains.start(device)
    return chains.at_precision(lambda: sampler.sample(energy, z))


# -------------------------------------------------------------------------------------------------------- by hand


def frozen(chains: Chains, device: torch.device, channels_last: bool = False) -> tuple[nn.Module, Tensor]:
    """The energy as a loop at its best has it, and where its chains start. In bf16 its weights are cast here, once:
    autocast, which keeps the casts of weights that are trained, would cast frozen ones in every call."""
    energy, z = chains.ordinary_energy(device).eval().requires_grad_(False), chains.start(device)
    if chains.precision == "bf16":
        energy.net.to(torch.bfloat16)
    if channels_last:
        return energy.to(memory_format=torch.channels_last), z.contiguous(memory_format=torch.channels_last)
    return energy, z


def move_langevin(z: Tensor, gradient: Tensor, step_size: float, threshold: float, noise_scale: float) -> Tensor:
    return z.add(gradient, alpha=-step_size / 2).add_(torch.randn_like(z), alpha=noise_scale * math.sqrt(step_size))


def move_anila(z: Tensor, gradient: Tensor, step_size: float, threshold: float, noise_scale: float) -> Tensor:
    """In six passes: neither a division nor a square root of its own, and every temporary is used again."""
    root = gradient.abs().mul_(1 / threshold).clamp_(min=1).rsqrt_()
    moved = z.add(gradient.clamp(-threshold, threshold), alpha=-step_size / 2)
    return moved.addcmul_(root, torch.randn_like(z), value=noise_scale * math.sqrt(step_size))


MOVES: dict[str, Move] = {"Langevin": move_langevin, "AniLA": move_anila}


def eager_chain(energy: Energy, z: Tensor, steps: int, move: Move, numbers: Numbers) -> Tensor:
    for _ in range(steps):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(energy(z).sum(), z)
        with torch.no_grad():
            z = move(z.detach(), gradient, *numbers)
    return z


def eager_loop(chains: Chains, kind: str, device: torch.device, *, channels_last: bool = False) -> Way:
    """``kind``: Langevin or AniLA. ``channels_last``: images and network in that layout."""
    energy, z = frozen(chains, device, channels_last)
    return chains.at_precision(lambda: eager_chain(energy, z, chains.steps, MOVES[kind], chains.numbers))


class MalaState(NamedTuple):
    z: Tensor  #: (B, ...)
    energy: Tensor  #: (B,) at z, as is the gradient (B, ...)
    gradient: Tensor


def mala_begun(energy: Energy, z: Tensor) -> MalaState:
    x = z.detach().requires_grad_()
    u = energy(x)
    (gradient,) = torch.autograd.grad(u.sum(), x)
    return MalaState(x.detach(), u.detach(), gradient)


def mala_transition(energy: Energy, state: MalaState, step_size: float) -> MalaState:
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


def mala_chain(energy: Energy, z: Tensor, steps: int, step_size: float) -> Tensor:
    state = mala_begun(energy, z)
    for _ in range(steps):
        state = mala_transition(energy, state, step_size)
    return state.z


def mala_loop(chains: Chains, device: torch.device) -> Way:
    """Its law is that of our exact chains: exp(-U), at a noise scale of 1."""
    if chains.numbers.noise_scale != 1:
        raise ValueError(f"chains must have noise_scale 1, got {chains.numbers.noise_scale}")
    energy, z = frozen(chains, device)
    return chains.at_precision(lambda: mala_chain(energy, z, chains.steps, chains.numbers.step_size))


@torch.no_grad()
def eager_step(z: Tensor, score: Tensor) -> Tensor:
    """The anisotropic step at the numbers of the workload, as constants: what a careful user writes."""
    root = score.abs().mul_(1 / STEP_THRESHOLD).clamp_(min=1).rsqrt_()
    moved = z.add(score.clamp(-STEP_THRESHOLD, STEP_THRESHOLD), alpha=STEP_SIZE / 2)
    return moved.addcmul_(root, torch.randn_like(z), value=math.sqrt(STEP_SIZE))


# ---------------------------------------------------------------------------------------------------- the authors


def authors_chain(energy: Energy, z: Tensor, steps: int, numbers: Numbers) -> Tensor:
    """Transitions as the STANLEY code writes them: the gradient twice, |s| over dim 1, a tensor of thresholds from the
    host, drift gamma grad, noise gamma sigma xi (no root), parameters not frozen."""
    x, noise_scale = z.clone().requires_grad_(), numbers.noise_scale * math.sqrt(numbers.step_size)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(energy(x).sum(), [x])
        length = torch.autograd.grad(energy(x).sum(), [x])[0].norm(dim=1)
        thresholds = torch.tensor([numbers.threshold] * length.numel()).reshape(length.shape).to(x.device)
        gamma = thresholds / torch.max(thresholds, length)
        gamma = gamma.unsqueeze(1).repeat(1, x.shape[1], *[1] * (x.dim() - 2))
        x.data += -gamma * gradient + gamma * (noise_scale * torch.randn_like(x))
    return x.detach()


def authors_loop(chains: Chains, device: torch.device) -> Way:
    energy, z = chains.ordinary_energy(device), chains.start(device)
    return chains.at_precision(lambda: authors_chain(energy, z, chains.steps, chains.numbers))
