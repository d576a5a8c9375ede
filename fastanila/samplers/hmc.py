"""Hamiltonian Monte Carlo."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks, noise
from ..noise import Stream
from ..ops import reference
from .metropolis import Adjusted
from .state import Info, State


@dataclasses.dataclass(frozen=True)
class HMC(Adjusted):
    """Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011) with unit mass, in plain PyTorch.

    Law: exp(-U). A transition draws a momentum and makes ``leapfrog_steps`` leapfrog steps of length sqrt(step_size),
    one gradient each: with one step it is `MALA` of the same step_size.

    Args:
        step_size: the square of the leapfrog step, squared units of z.
        leapfrog_steps: how many; choose them for the trajectory to cross the target, about its width / sqrt(step_size).
    """

    step_size: float | Tensor = 0.01
    leapfrog_steps: int = 10

    threshold: ClassVar[float] = math.inf
    target_acceptance: ClassVar[float] = 0.8
    is_one_graph: ClassVar[bool] = False  # as many copies of the network would take minutes to compile
    numbers: ClassVar[tuple[str, ...]] = ("step_size",)

    def __post_init__(self):
        super().__post_init__()
        checks.count("leapfrog_steps", self.leapfrog_steps)

    @property
    def gradients(self) -> int:
        return self.leapfrog_steps

    def transition(self, evaluate, state, *, seed, step, offset=0, mask=None, statistics=True):
        if state.score is None:
            state = self.init(evaluate, state.z)
        length = self.step_size**0.5

        def free(x: Tensor) -> Tensor:
            return x if mask is None else torch.where(mask, x, 0.0)

        momentum = free(noise.normal(state.z.shape, seed=seed, step=step, offset=offset, device=state.z.device))
        z, score, p = state.z, state.score, momentum
        for _ in range(self.leapfrog_steps):
            p = p + 0.5 * length * free(score)
            z = (z + length * p).to(state.z.dtype)
            energy, score = evaluate(z)
            p = p + 0.5 * length * free(score)
        kinetic = reference.chain_sum(0.5 * (momentum - p) * (momentum + p))
        uniform = noise.uniform(
            state.z.shape[:1], seed=seed, step=step, stream=Stream.ACCEPTANCE, offset=offset, device=state.z.device
        )
        energy = energy.float()
        judged = reference.judge(state.energy - energy + kinetic, uniform)
        after = State(
            judged.pick(z, state.z), energy=judged.pick(energy, state.energy), score=judged.pick(score, state.score)
        )
        if not statistics:
            return after, None
        seen = reference.statistics(state.score, math.inf)
        return after, Info.of(state.energy, seen, judged.acceptance)
